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
from typing import Any

CRASHES = Path(__file__).parent / "crashes"
SLOW = 3.0
"""Processor seconds for one input that are a fault."""
LARGE = 300 * 2**10
"""KiB that one input may add to the process."""
_LIBFUZZER = ("-max_len=20000", "-timeout=100", "-rss_limit_mb=8192", "-len_control=0")
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


def child(name: str, seconds: float, seed: int, corpus: Path, report: Path) -> None:
    """Fuzz one target in this process, and leave it."""
    import atheris

    with atheris.instrument_imports(include=["bridle"], enable_loader_override=False):
        from tests.fuzz.mutate import mutate
        from tests.fuzz.targets import TARGETS, try_one
    target, tally = TARGETS[name], Tally()
    with tempfile.TemporaryDirectory() as home:
        folder = Path(home)
        target.prepare(folder)
        for number, data in enumerate(target.seeds(folder)):
            (corpus / f"seed-{number}").write_bytes(data)
        began = time.process_time()

        def one(data: bytes) -> None:
            started, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            try:
                refusal = try_one(target, data, folder)
            except Exception as error:
                frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bridle/" in frame.filename]
                last = frames[-1] if frames else traceback.extract_tb(error.__traceback__)[-1]
                tally.crash(
                    name,
                    data,
                    f"{type(error).__name__}: {str(error)[:80]!r}",
                    f"{Path(last.filename).name}:{last.name}",
                )
            else:
                tally.accepted += not refusal
                tally.refusals.add(re.sub(r"'.*?'|\d+", "·", refusal)[:60])
            tally.inputs += 1
            taken = time.process_time() - started
            if taken > SLOW:
                tally.crash(name, data, "slow", f"{taken:.0f} s")
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size > LARGE:
                tally.crash(name, data, "large", "one input")
            if time.process_time() - began > seconds:
                report.write_text(
                    json.dumps(
                        {
                            "inputs": tally.inputs,
                            "accepted": tally.accepted,
                            "different_refusals": len(tally.refusals),
                            "crashes": tally.crashes,
                            "processor_seconds": round(time.process_time() - began, 1),
                        }
                    )
                )
                sys.stderr.flush()
                os._exit(0)  # libFuzzer would go on

        def change(data: bytes, most: int, key: int) -> bytes:
            draws = Random(key)
            new = mutate(data, draws) if draws.random() < 0.7 else bytes(atheris.Mutate(data, most))
            return new[:most]

        atheris.Setup(
            [
                sys.argv[0],
                f"-seed={seed}",
                "-max_len=20000",
                "-timeout=100",
                "-rss_limit_mb=8192",
                "-len_control=0",
                str(corpus),
            ],
            one,
            custom_mutator=change,
        )
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
    if asked.output is not None:
        command = f"scripts/fuzz --seconds {asked.seconds:g} --seed {asked.seed} --output {asked.output}"
        asked.output.write_text(json.dumps({"command": command, "targets": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
