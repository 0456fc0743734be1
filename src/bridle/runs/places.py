"""Where a run lies, before there is one: a directory that is free, held by a lock that only one process can have."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bridle.errors import RunError

__all__ = ["FOLDERS", "Reserved", "clear", "is_locked", "let_go", "reserve", "take_lock"]

FOLDERS = ("samples", "checkpoints", "faults")
"""What a new run's directory holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """A directory that nobody else can make a run in; nothing lies there yet but the lock."""

    path: Path
    """where it is."""
    lock: int
    """descriptor of the locked file."""
    made: tuple[Path, ...]
    """the directories that had to be made for it, the innermost first."""

    def release(self) -> None:
        """Leave everything as it was found."""
        clear(self.path, self.made)
        let_go(self.lock)


def reserve(path: Path | str) -> Reserved:
    """Take the directory ``path``, which must not exist or be empty, for a run that is still to be made.

    Raises :class:`RunError` where something is there already, another process has taken it, or it cannot be written.
    """
    path = Path(path)
    remedy = "pass --run.dir another path"
    made: tuple[Path, ...] = ()
    try:
        if ".." in path.parts:  # nowhere/../taken is not there as long as nowhere is not
            path = path.resolve()
        _require_bare(path)
        made = _make(path)
        lock = take_lock(path)
        try:
            _require_bare(path)  # of those that saw it empty at once, one has the lock
        except RunError:
            let_go(lock)
            raise
    except (OSError, ValueError) as error:
        _unmake(made)
        if isinstance(error, RunError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{str(path)[:200]} cannot be written ({reason}); {remedy}") from None
    return Reserved(path=path, lock=lock, made=made)


def _require_bare(path: Path) -> None:
    remedy = "pass --run.dir another path"
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is a file, not a directory; {remedy}")
    if path.is_dir() and not _is_bare(path):
        resume = f" or `bridle resume {path}`" if (path / "config.json").is_file() else ""
        raise RunError(f"{path} is not empty; {remedy}{resume}")


def _make(path: Path) -> tuple[Path, ...]:
    """Make a directory and those above it; return the ones that were not there, the innermost first."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    made: list[Path] = []
    try:
        for folder in reversed(missing):
            with suppress(FileExistsError):  # somebody else was faster
                folder.mkdir()
                made.insert(0, folder)
    except OSError:
        _unmake(made)
        raise
    return tuple(made)


def _unmake(made: Iterable[Path]) -> None:
    """Remove directories as long as they are empty."""
    with suppress(OSError):
        for folder in made:
            folder.rmdir()


def clear(path: Path, made: Iterable[Path]) -> None:
    """Empty a directory that is locked, its lock last, and remove what was made of it."""
    lock = path / ".lock"
    for found in [found for found in path.iterdir() if found != lock]:
        if found.is_dir() and not found.is_symlink():
            shutil.rmtree(found)
        else:
            found.unlink()
    lock.unlink(missing_ok=True)
    _unmake(made)


def _is_bare(path: Path) -> bool:
    """Whether a directory is empty, or holds no more than what a process that died at once left of a beginning."""
    files = {path / ".lock", path / ".config.json.partial"}
    folders = {path / name for name in FOLDERS}
    return all(
        found in files or (found in folders and found.is_dir() and not any(found.iterdir())) for found in path.iterdir()
    )


_held: set[int] = set()


def _drop_all() -> None:
    """A forked child holds no lock: or it would go on holding its parent's after the parent's death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_all)


def take_lock(path: Path) -> int:
    """Lock a run's directory for this process; raises :class:`RunError` where another one has it."""
    descriptor = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(descriptor)
        still = os.stat(path / ".lock")
    except OSError as error:  # held, or taken away with the directory by whoever held it
        os.close(descriptor)
        if not isinstance(error, BlockingIOError | FileNotFoundError):
            raise
        raise _in_use(path) from None
    if not os.path.samestat(still, os.fstat(descriptor)):  # the file was taken away, and another made in its place
        os.close(descriptor)
        raise _in_use(path)
    _held.add(descriptor)
    return descriptor


def _lock(descriptor: int) -> None:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _in_use(path: Path) -> RunError:
    return RunError(f"{path} is in use by another process; wait for it to end")


def let_go(descriptor: int) -> None:
    """Unlock what :func:`take_lock` locked."""
    if descriptor in _held:
        _held.discard(descriptor)
        os.close(descriptor)


def is_locked(path: Path) -> bool:
    """Whether some process writes the run at ``path``."""
    try:
        descriptor = os.open(path / ".lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(descriptor)
