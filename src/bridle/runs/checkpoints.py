"""Folders that appear whole or not at all, and checkpoints that prove it with checksums.

A checkpoint is written as ``checkpoints/.step-N.partial``, given ``manifest.json`` with the size and the SHA-256 of
each file, made durable, and renamed to ``checkpoints/step-N``. Nothing is unpickled: tensors are safetensors, the rest
JSON.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bridle.errors import RunError
from bridle.runs.files import (
    Json,
    JsonObject,
    file_digest,
    json_digest,
    load_json,
    load_tensors,
    save_json,
    save_tensors,
    sync,
    sync_tree,
    write_text,
)

__all__ = [
    "Checkpoint",
    "clear_leftovers",
    "kept_records",
    "list_checkpoints",
    "load_json",
    "load_tensors",
    "remove_folder",
    "save_json",
    "save_tensors",
    "verify",
    "vouched_lines",
    "whole_folder",
    "write_manifest",
    "write_text",
]

MANIFEST = "manifest.json"

FORMAT = 1
"""Version of a checkpoint's layout; one of a newer format is refused by name."""


class NewerFormat(RunError):
    """A checkpoint that a newer bridle wrote: whole, but not to be read by this one."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Checkpoint:
    """A checkpoint that is visible in the run; whether its files are intact is what :func:`verify` asks."""

    step: int
    """[step] the last step that it includes."""
    path: Path
    """the folder that holds it."""


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Lend an empty folder to write into; on leaving, make it durable and rename it to ``path``.

    An exception inside leaves ``path`` as it was. A folder that was at ``path`` is replaced.
    """
    aside = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    for leftover in (aside, old):
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_tree(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    if path.exists():
        path.rename(old)
    aside.rename(path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that it is gone at once or not at all: renamed first, then taken apart."""
    aside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def clear_leftovers(folder: Path) -> None:
    """Clear what a crash left half done in ``folder``; a folder that was about to be replaced is put back."""
    for old in folder.glob(".*.old"):
        whole = folder / old.name[1 : -len(".old")]
        shutil.rmtree(old) if whole.exists() else old.rename(whole)
    for partial in folder.glob(".*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def write_manifest(folder: Path, step: int, records: Mapping[str, Json] | None = None) -> None:
    """Write ``manifest.json``: for every file of the folder its size in bytes and its SHA-256, and that of all this.

    ``records`` are the run's files of records, with how far they had come after ``step``.
    """
    files: dict[str, Json] = {
        path.relative_to(folder).as_posix(): {"sha256": file_digest(path), "size": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    extent = {} if records is None else {"records": {**records}}
    manifest: JsonObject = {"format": FORMAT, "step": step, **extent, "files": files}
    save_json(folder / MANIFEST, {**manifest, "sha256": json_digest(manifest)})


def kept_records(checkpoint: Checkpoint) -> dict[str, JsonObject]:
    """Return how far each file of records had come, by its name; empty where an older manifest does not say.

    One that counts lines alone has a number in place of the object.
    """
    manifest = load_json(checkpoint.path / MANIFEST)
    records = manifest.get("records") if isinstance(manifest, dict) else None
    entries = records.items() if isinstance(records, dict) else ()
    kept: dict[str, JsonObject] = {}
    for name, entry in entries:
        if isinstance(entry, int):
            kept[name] = {"lines": entry}
        elif isinstance(entry, dict):
            kept[name] = entry
    return kept


def vouched_lines(checkpoint: Checkpoint, name: str) -> int | None:
    """Return how many lines of a file of records the checkpoint followed on; None where its manifest does not say."""
    count = kept_records(checkpoint).get(name, {}).get("lines")
    return count if isinstance(count, int) else None


def verify(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest, and the manifest with its own checksum; an older one has none.

    Raises:
        NewerFormat: a newer bridle wrote it.
        RunError: a file is missing or altered; the text names the first.
    """
    manifest = load_json(checkpoint.path / MANIFEST)
    written = manifest.get("format") if isinstance(manifest, dict) else None
    if isinstance(written, int) and written > FORMAT:
        raise NewerFormat(
            f"{checkpoint.path} is a checkpoint of format {written}, and this bridle reads {FORMAT}; use a newer bridle"
        )
    if isinstance(manifest, dict) and manifest.pop("sha256", None) not in (None, json_digest(manifest)):
        raise RunError(f"{checkpoint.path / MANIFEST} was altered; the checkpoint is damaged")
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict):
        raise RunError(f"{checkpoint.path / MANIFEST} lists no files; the checkpoint is damaged")
    for name, entry in files.items():
        path = checkpoint.path / name
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise RunError(
                f"{checkpoint.path / MANIFEST} names {name!r}, which lies outside; the checkpoint is damaged"
            )
        if not path.is_file():
            raise RunError(f"{path} is missing; the checkpoint is damaged")
        if not isinstance(entry, dict) or entry.get("size") != path.stat().st_size:
            raise RunError(f"{path} has another size than its manifest says; the checkpoint is damaged")
        if entry.get("sha256") != file_digest(path):
            raise RunError(f"{path} has another checksum than its manifest says; the checkpoint is damaged")


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """List the checkpoints in ``folder``, oldest first; what is still being written is not among them."""
    found = []
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if path.is_dir() and number.isdecimal():
            found.append(Checkpoint(step=int(number), path=path))
    return sorted(found)
