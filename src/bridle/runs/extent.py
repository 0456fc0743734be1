"""How far a run's records had come at a checkpoint, and what of them is missing where it is to be taken up from there.

Records up to a checkpoint are durable before it is, so no crash shortens them: what is missing was taken away since.
``events.jsonl`` has no part in this: how many events there are depends on how often a run was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from bridle.runs.checkpoints import Checkpoint, kept_records
from bridle.runs.files import Json, read_line, step_of
from bridle.runs.mending import count_lines

__all__ = ["extents", "missing"]

_STREAMS = ("metrics.jsonl", "timing.jsonl")


def extents(run: Path, step: int) -> dict[str, Json]:
    """Measure the records of the run at ``run`` after ``step``, for the manifest of a checkpoint.

    Of ``metrics.jsonl`` lines, bytes and SHA-256; of ``timing.jsonl``, which holds the wall clock, lines; of each file of
    samples bytes.
    """
    metrics, timing = (run / name for name in _STREAMS)
    content = metrics.read_bytes() if metrics.exists() else b""
    sizes = {f"samples/{path.name}": {"bytes": path.stat().st_size} for path in _samples(run, step)}
    return {
        metrics.name: {
            "lines": content.count(b"\n"),
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        },
        timing.name: {"lines": count_lines(timing)},
        **sizes,
    }


def missing(run: Path, checkpoint: Checkpoint) -> list[str]:
    """Say which records of the run are not what the checkpoint followed on; of a manifest that does not count them, none."""
    kept = kept_records(checkpoint)
    found = [_of_lines(run / name, kept[name], checkpoint) for name in _STREAMS if name in kept]
    gone = [name for name in kept if name.startswith("samples/") and _size(run / name) != kept[name].get("bytes")]
    if gone:
        first = run / gone[0]
        how = "has another size than it had" if first.exists() else "is missing, and was there"
        more = f" (and {len(gone) - 1} more files of samples)" if len(gone) > 1 else ""
        found.append(f"{first} {how} at the checkpoint of step {checkpoint.step}{more}")
    return [text for text in found if text is not None]


def _of_lines(path: Path, kept: Mapping[str, Json], checkpoint: Checkpoint) -> str | None:
    content = path.read_bytes() if path.exists() else b""
    lines, size = kept.get("lines"), kept.get("bytes")
    rows = filter(None, map(read_line, content.split(b"\n")[:-1]))
    before = [step for row in rows if (step := step_of(row)) is not None and step <= checkpoint.step]
    if isinstance(lines, int) and len(before) != lines:
        last = f", the last of step {before[-1]}" if before else ""
        of = f"before the checkpoint of step {checkpoint.step}{last}"
        few = len(before) < lines
        return (
            f"{path} has {len(before)} of the {lines} lines {of}"
            if few
            else f"{path} has {len(before)} lines {of}, and had {lines}"
        )
    if isinstance(size, int) and hashlib.sha256(content[:size]).hexdigest() != kept.get("sha256"):
        return f"{path} was altered in the {lines} lines that the checkpoint of step {checkpoint.step} followed on"
    return None


def _samples(run: Path, step: int) -> list[Path]:
    numbered = ((path, path.stem.rpartition("-")[2]) for path in sorted((run / "samples").glob("*-*.jsonl")))
    return [path for path, number in numbered if number.isdecimal() and int(number) <= step]


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
