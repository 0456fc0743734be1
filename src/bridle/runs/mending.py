"""What a power cut may leave in a run's files of records: a torn last line, zeros or rubbish, mended as far as is known.

Lines up to a checkpoint were durable before it was, and it says how many there were; what follows is written again by the
run that is taken up. So damage behind a checkpoint is cut off, with what came after it; damage before it is only named.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from bridle.errors import RunError
from bridle.runs.checkpoints import Checkpoint, vouched_lines
from bridle.runs.files import read_line, step_of, write_bytes

__all__ = ["count_lines", "cut_back", "drop_damaged_lines"]


def count_lines(path: Path) -> int:
    """Count the complete lines of a file; 0 where there is none."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def cut_back(path: Path, newest: Callable[[], Checkpoint | None]) -> str | None:
    """Cut a file of records back to before its first damaged line; return what to say of it, None where nothing is.

    Args:
        path: the file; of a damaged one a copy is kept in the run's ``faults``.
        newest: finds the checkpoint that the run goes on from; asked only where a line is damaged.

    Raises:
        RunError: a line is damaged that the checkpoint followed on.
    """
    lines = _lines(path)
    bad = [place for place, line in enumerate(lines) if _step(line) is None]
    if not bad:
        return None
    first, checkpoint = bad[0], newest()
    if first < _vouched(path, lines[:first], checkpoint):
        before = "" if checkpoint is None else f", before the checkpoint of step {checkpoint.step}"
        raise RunError(
            f"{path} line {first + 1} is damaged{before}; put the file back as it was, "
            f"or delete that line and go on without it: bridle resume {path.parent} --force"
        )
    _keep(path)
    write_bytes(path, b"".join(lines[:first]))
    after = "" if checkpoint is None else f"; the checkpoint of step {checkpoint.step} comes before them"
    return f"{path.name} was damaged from line {first + 1} on: {len(lines) - first} lines cut off{after}"


def drop_damaged_lines(path: Path) -> str | None:
    """Leave the damaged lines of a file of events out; return what to say of it, None where nothing is."""
    lines = _lines(path)
    whole = [line for line in lines if read_line(line, texts=True) is not None]
    if len(whole) == len(lines):
        return None
    _keep(path)
    write_bytes(path, b"".join(whole))
    return f"left {len(lines) - len(whole)} damaged lines of {path.name} out"


def _vouched(path: Path, sound: list[bytes], checkpoint: Checkpoint | None) -> int:
    """How many lines must be sound; without a checkpoint none, since the run begins again."""
    if checkpoint is None:
        return 0
    said = vouched_lines(checkpoint, path.name)
    if said is not None:
        return said
    last = _step(sound[-1]) if sound else None  # an older manifest: steps never fall, so a later one bounds it
    return len(sound) if last is not None and last > checkpoint.step else len(sound) + 1


def _lines(path: Path) -> list[bytes]:
    return [line + b"\n" for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


def _step(line: bytes) -> int | None:
    row = read_line(line)
    return None if row is None else step_of(row)


def _keep(path: Path) -> None:
    """Keep a copy of a damaged file where evidence is kept."""
    folder = path.parent / "faults"
    folder.mkdir(exist_ok=True)
    numbered = (folder / f"{path.name}.damaged-{number}" for number in count(1))
    shutil.copyfile(path, next(place for place in numbered if not place.exists()))
