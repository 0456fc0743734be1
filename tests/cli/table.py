"""The table of bad inputs: every mistake is made, watched and written down. ``python -m tests.cli.table`` writes the page."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from unittest import mock

import gymnasium
import numpy as np
import safetensors.torch
from transformers import PreTrainedModel

import bridle
from bridle.language import rendering
from tests.cli import mistakes, mistakes_of_runs, mistakes_of_settings
from tests.cli.mistakes import Mistake
from tests.cli.watched import Seen, Site, as_users_see_it, command, observe
from tests.cli.world import contents, make_world

PAGE = Path(__file__).parents[2] / "docs" / "BAD_INPUT.md"

HEAD = """# What a mistake gets to hear

Each row is a mistake that somebody can make, and the one line that Bridle prints for it: `bridle: ` and the message on
standard error, exit code 2, no traceback, and no file written, changed or lost (a resumed run may note in its
`events.jsonl` that a checkpoint is damaged). In Python the same message is that of the
error raised, always a `bridle.UserError`. "Raised in" is the place in the code that refuses; {sites} different lines
refuse the {rows} mistakes below. An ellipsis (…) stands where the words of another library follow, which change with its
version.

The page is written by making every mistake: `python -m tests.cli.table`. A test holds it to what the program says.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A mistake and what came of it."""

    mistake: Mistake
    """what was done."""
    seen: Seen
    """what was said."""
    changed: tuple[str, ...]
    """files and folders that are not as they were."""

    opened: int
    """how often weights were read before it was told."""
    world: str
    """the working directory, which the page leaves out."""

    @property
    def done(self) -> str:
        """The command or the statement."""
        return self.mistake.python or shlex.join(("bridle", *self.mistake.arguments))

    @property
    def faults(self) -> list[str]:
        """What is wrong with how the mistake was met; empty if nothing."""
        found = []
        if self.seen.trace:
            found.append(f"a traceback: {self.seen.trace.splitlines()[-1]}")
        if self.seen.code != 2:
            found.append(f"exit code {self.seen.code}")
        if self.seen.err.count("\n") != 1:
            found.append(f"{self.seen.err.count(chr(10))} lines: {self.seen.err!r}")
        if self.seen.site is None:
            found.append("no line of ours refused")
        if self.mistake.until and self.mistake.until not in self.seen.message:
            found.append(f"no {self.mistake.until!r} in {self.seen.message!r}")
        if self.changed:
            found.append(f"changed: {', '.join(self.changed[:5])}")
        return found

    @property
    def message(self) -> str:
        """What was said, as far as it is ours."""
        said, until = self.seen.message.replace(f"{self.world}/", ""), self.mistake.until
        return f"{said.partition(until)[0]}{until} …" if until else said


def all_mistakes() -> Iterator[Mistake]:
    """Every mistake, in the order of the page."""
    yield from sorted(mistakes_of_settings.config_mistakes(), key=lambda mistake: mistake.group == "Settings")
    yield from mistakes.data_mistakes()
    yield from mistakes.model_mistakes()
    yield from mistakes.judge_mistakes()
    yield from mistakes_of_runs.world_mistakes()
    yield from mistakes_of_runs.run_mistakes()
    yield from mistakes_of_runs.fault_mistakes()
    yield from mistakes_of_runs.python_mistakes()
    yield from mistakes_of_runs.saved_mistakes()


@contextmanager
def working_directory(path: Path) -> Iterator[Path]:
    """Fill ``path``, work there, and do not ask the hub."""
    make_world(path)
    mistakes.write_data(path)
    before = Path.cwd()
    os.chdir(path)
    try:
        with (
            mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
            mock.patch.object(rendering, "SECONDS", 0.5),
            as_users_see_it(),
        ):
            mistakes_of_runs.make_runs(path)
            mistakes_of_runs.make_odd_runs(path)
            mistakes_of_runs.make_faults(path)
            yield path
    finally:
        os.chdir(before)


def _prints(folder: Path) -> dict[str, str | None]:
    return {name: None if found is None else sha256(found).hexdigest() for name, found in contents(folder).items()}


@contextmanager
def counted_weights() -> Iterator[list[str]]:
    """Note each time that weights are read: a model's, or a file of tensors."""
    opened: list[str] = []
    of_models, of_tensors = PreTrainedModel.from_pretrained.__func__, safetensors.torch.load_file

    def model(cls: type[PreTrainedModel], *arguments: object, **named: object) -> object:
        opened.append(cls.__name__)
        return of_models(cls, *arguments, **named)

    def tensors(path: Path, *arguments: object, **named: object) -> object:
        if path.name != "batch.safetensors":  # of a fault: data
            opened.append(str(path))
        return of_tensors(path, *arguments, **named)

    with (
        mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(model)),
        mock.patch.object(safetensors.torch, "load_file", tensors),
    ):
        yield opened


def make(mistake: Mistake, world: Path) -> Row:
    """Make one mistake; what it prepared as ``r`` is removed after it."""
    if mistake.before is not None:
        mistake.before(world)
    before = _prints(world)
    with counted_weights() as opened:
        seen = command(mistake.arguments) if not mistake.python else observe(lambda: _execute(mistake.python))
    after = _prints(world)
    shutil.rmtree(world / "r", ignore_errors=True)
    differing = (name for name in {**before, **after} if before.get(name, "") != after.get(name, ""))
    changed = tuple(name for name in differing if name not in mistake.notes)
    return Row(mistake=mistake, seen=seen, changed=changed, opened=len(opened), world=str(world.resolve()))


def _execute(python: str) -> int:
    exec(python, {"bridle": bridle, "np": np, "gymnasium": gymnasium})
    return 0


def sites(rows: list[Row]) -> set[Site]:
    """The different lines that refused."""
    return {row.seen.site for row in rows if row.seen.site is not None}


def page(rows: list[Row]) -> str:
    """The page."""
    lines = [HEAD.format(sites=len(sites(rows)), rows=len(rows))]
    for group, members in groupby(rows, key=lambda row: row.mistake.group):
        lines += [f"## {group}", "", "| mistake | what is said | raised in |", "| --- | --- | --- |"]
        lines += [
            f"| {row.mistake.what} | {_cell(row.message)} | `{row.seen.site}` ({row.seen.kind}) |" for row in members
        ]
        lines.append("")
    return "\n".join(lines)


def _cell(text: str) -> str:
    shown = text if len(text) <= 400 else text[:397] + "..."
    fence = "``" if "`" in shown else "`"
    return f"{fence} {shown} {fence}".replace("|", "\\|")


def main() -> None:
    """Make every mistake and write the page; complain of those that are met badly."""
    with tempfile.TemporaryDirectory() as folder, working_directory(Path(folder)) as world:
        rows = [make(mistake, world) for mistake in all_mistakes()]
    for row in rows:
        if row.faults:
            print(f"{row.mistake.group}: {row.mistake.what}: {'; '.join(row.faults)[:600]}\n    {row.done[-160:]}")
            print("".join(f"    {line[:160]}\n" for line in row.seen.trace.splitlines()[-4:]))
    PAGE.write_text(page(rows))
    seconds = sum(row.seen.seconds for row in rows)
    print(f"{len(rows)} mistakes at {len(sites(rows))} places in {seconds:.0f} s of processor time: {PAGE}")
    sys.exit(any(row.faults for row in rows))


if __name__ == "__main__":
    main()
