"""``scripts/fuzz``: coverage-guided fuzzing of the targets by atheris (libFuzzer), with our own mutations of JSON.

Each target runs in a process of its own for ``--seconds`` of processor time. An input that ends in anything but success or
a refusal of one line, takes seconds, or takes hundreds of megabytes, is a crash: it is kept in ``tests/fuzz/crashes`` and
replayed by the tests ever after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import CodeType, FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.fuzz.target import Target

CRASHES = Path(__file__).parent / "crashes"
SLOW = 3.0
"""Processor seconds for one input that are a fault."""
LARGE = 300 * 2**10
"""KiB that one input may add to the process."""
PARENTS = 500
"""Sound inputs that are kept to be changed."""
_LIBFUZZER = ("-max_len=20000", "-timeout=100", "-rss_limit_mb=8192", "-len_control=0", "-mutate_depth=1")
_PROGRESS = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


@dataclass(slots=True, kw_only=True)
class Tally:
    """What has come of the inputs so far."""

    inputs: int = 0
    accepted: int = 0
    refusals: set[str] = field(default_factory=set)
    crashes: dict[str, str] = field(default_factory=dict)

    def crash(self, name: str, data: bytes, what: str, place: str) -> None:
        """Keep the first input of each kind."""
        if f"{what} at {place}" not in self.crashes:
            CRASHES.mkdir(exist_ok=True)
            path = CRASHES / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}"
            path.write_bytes(data)
            self.crashes[f"{what} at {place}"] = path.name


class Watch:
    """Gives inputs to one target until its time is over, and counts what came of them."""

    def __init__(self, target: Target, folder: Path, seconds: float) -> None:
        """Prepare ``folder`` for ``target``."""
        target.prepare(folder)
        self.target, self.folder, self.seconds = target, folder, seconds
        self.tally = Tally()
        self.sound = target.seeds(folder)
        """inputs that were taken, the seeds first."""
        self.began = time.process_time()

    def give(self, data: bytes) -> None:
        """Let the target take ``data``."""
        from tests.fuzz.target import try_one  # late: what it imports of bridle is to be instrumented

        name, tally = self.target.name, self.tally
        started, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            refusal = try_one(self.target, data, self.folder)
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            last = ([frame for frame in frames if "/bridle/" in frame.filename] or frames)[-1]
            what = f"{type(error).__name__}: {str(error)[:80]!r}"
            tally.crash(name, data, what, f"{Path(last.filename).name}:{last.name}")
        else:
            tally.accepted += not refusal
            tally.refusals.add(re.sub(r"'.*?'|\d+", "·", refusal)[:60])
            if not refusal and len(self.sound) < PARENTS:
                self.sound.append(data)
        tally.inputs += 1
        taken = time.process_time() - started
        if taken > SLOW:
            tally.crash(name, data, "slow", f"{taken:.0f} s")
        if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size > LARGE:
            tally.crash(name, data, "large", "one input")

    def change(self, data: bytes, draws: Random, mutate: Callable[[bytes], bytes]) -> bytes:
        """Make another input: one change of a sound one, half the time; else something odd, from libFuzzer's own pool."""
        if draws.random() < 0.5:
            return self.target.vary(draws.choice(self.sound), draws)
        return self.target.mutate(data, draws) if draws.random() < 0.7 else mutate(data)

    @property
    def is_over(self) -> bool:
        """Whether the time is."""
        return time.process_time() - self.began > self.seconds

    @property
    def figures(self) -> dict[str, Any]:
        """What came of it."""
        return {
            "inputs": self.tally.inputs,
            "accepted": self.tally.accepted,
            "different_refusals": len(self.tally.refusals),
            "crashes": self.tally.crashes,
            "processor_seconds": round(time.process_time() - self.began, 1),
        }


def child(name: str, seconds: float, seed: int, corpus: Path, report: Path) -> None:
    """Fuzz one target in this process, and leave it."""
    import atheris

    with atheris.instrument_imports(include=["bridle"], enable_loader_override=False):
        from tests.fuzz.targets import TARGETS
    with tempfile.TemporaryDirectory() as folder:
        watch = Watch(TARGETS[name], Path(folder), seconds)
        for number, data in enumerate(watch.sound):
            (corpus / f"seed-{number}").write_bytes(data)

        def one(data: bytes) -> None:
            watch.give(data)
            if watch.is_over:
                report.write_text(json.dumps(watch.figures))
                sys.stderr.flush()
                shutil.rmtree(folder)
                os._exit(0)  # libFuzzer would go on

        def change(data: bytes, most: int, key: int) -> bytes:
            return watch.change(data, Random(key), lambda given: bytes(atheris.Mutate(given, most)))[:most]

        atheris.Setup([sys.argv[0], f"-seed={seed}", *_LIBFUZZER, str(corpus)], one, custom_mutator=change)
        atheris.Fuzz()


def lines_reached(name: str, corpus: Path) -> dict[str, list[int]]:
    """Give the corpus to the target once more: module → [lines of functions reached, lines of functions there are]."""
    import bridle
    from tests.fuzz.targets import TARGETS, try_one

    home, target = Path(bridle.__file__).parent, TARGETS[name]
    files = {str(home / module): module for module in target.reads}
    seen: dict[str, set[int]] = {path: set() for path in files}

    def trace(frame: FrameType, event: str, _: Any) -> Callable[..., Any] | None:
        lines = seen.get(frame.f_code.co_filename)
        if lines is None:
            return None
        if event == "line":
            lines.add(frame.f_lineno)
        return trace

    with tempfile.TemporaryDirectory() as folder:
        target.prepare(Path(folder))
        for path in sorted(corpus.iterdir()):
            sys.settrace(trace)
            try:
                try_one(target, path.read_bytes(), Path(folder))
            except Exception:  # a crash has been kept already
                continue
            finally:
                sys.settrace(None)
    return {module: [len(seen[path] & _lines(path)), len(_lines(path))] for path, module in files.items()}


def _lines(path: str) -> set[int]:
    """Line numbers inside functions."""
    todo: list[tuple[CodeType, bool]] = [(compile(Path(path).read_text(), path, "exec"), False)]
    found: set[int] = set()
    while todo:
        code, counted = todo.pop()
        if counted:
            found |= {line for *_, line in code.co_lines() if line is not None and line != code.co_firstlineno}
        todo += [(const, bool(const.co_flags & 2)) for const in code.co_consts if isinstance(const, CodeType)]
    return found


def main() -> None:
    """Fuzz every target that is asked for, and write down what came of it."""
    parser = argparse.ArgumentParser(prog="scripts/fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="processor seconds a target")
    parser.add_argument("--target", action="append", help="one of them; may be given several times")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", type=Path, help="file for the figures, as JSON")
    parser.add_argument("--child", nargs=2, type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        child(asked.target[0], asked.seconds, asked.seed, *asked.child)
    from tests.fuzz.targets import TARGETS

    results: dict[str, Any] = {}
    for name in asked.target or TARGETS:
        with tempfile.TemporaryDirectory() as folder:
            corpus, report, log = Path(folder, "corpus"), Path(folder, "report"), Path(folder, "log")
            corpus.mkdir()
            again = ["--target", name, "--seconds", str(asked.seconds), "--seed", str(asked.seed)]
            with log.open("wb") as written:
                done = subprocess.run(
                    [sys.executable, "-m", "tests.fuzz.hunt", *again, "--child", str(corpus), str(report)],
                    check=False,
                    stdout=written,
                    stderr=written,
                )
            said = log.read_text(errors="replace")
            if not report.exists():
                sys.exit(f"{name}: ended with {done.returncode}: {said[-2000:]}")
            found = json.loads(report.read_text())
            steps = _PROGRESS.findall(said)
            found |= {"edges": int(steps[-1][0]), "corpus": len(list(corpus.iterdir()))} if steps else {}
            found["lines"] = lines_reached(name, corpus)
        results[name] = found
        print(f"{name}: {json.dumps(found)}", flush=True)
        if asked.output is not None:  # after each, so that a hunt that is cut short leaves what it found
            command = f"scripts/fuzz --seconds {asked.seconds:g} --seed {asked.seed} --output {asked.output}"
            asked.output.write_text(json.dumps({"command": command, "targets": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
