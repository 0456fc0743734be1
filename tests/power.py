"""What a power loss may leave of a folder: what was made durable, and any part of the rest.

A file's content is durable as of its last fsync, the names in a folder as of the folder's last fsync (POSIX promises no
more). Of what came after, each change is drawn to have reached the disk or not, on its own: a file may be there without its
content, with a part of it, or with zeros for it; a removed file may be back. Only what a file system does at once stays
at once: a rename, the old name, the new name and whatever it replaced. The model is that of Pillai et al., "All File Systems
Are Not Created Equal" (OSDI 2014), section 3, for a file system that keeps no order between directory operations.
"""

from __future__ import annotations

import os
import resource
import stat
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

__all__ = ["Disk"]

Names = dict[str, int]
"""A folder's names, each with the number of its inode."""


@dataclass(slots=True)
class Disk:
    """What of a folder is durable: all of it when it is made, then what :meth:`sync` is told."""

    root: Path
    _contents: dict[int, bytes] = field(default_factory=dict)
    _folders: dict[int, Names] = field(default_factory=dict)
    _held: list[int] = field(default_factory=list)
    """Descriptors of all that is known, so that no inode's number is given away anew."""

    def __post_init__(self) -> None:
        """Take all that is there for durable, as after a start of the machine."""
        most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for folder, _, files in os.walk(self.root):
            for path in (folder, *(os.path.join(folder, name) for name in files)):
                self._learn(path)

    def sync(self, descriptor: int) -> None:
        """Note that the file or folder open as ``descriptor`` was made durable."""
        self._learn(f"/proc/self/fd/{descriptor}")

    def _learn(self, path: str) -> None:
        held = os.open(path, os.O_RDONLY)
        inode = os.fstat(held)
        if inode.st_ino in self._contents or inode.st_ino in self._folders:
            os.close(held)
        else:
            self._held.append(held)
        if stat.S_ISDIR(inode.st_mode):
            self._folders[inode.st_ino] = _names(path)
        else:
            self._contents[inode.st_ino] = Path(path).read_bytes()

    def lose_power(self, target: Path, draws: np.random.Generator, *, kept: float) -> None:
        """Lay at ``target`` what a power loss now may leave of the root, each change kept with probability ``kept``."""
        now: dict[int, Names] = {}
        contents: dict[int, bytes] = {}
        for folder, _, files in os.walk(self.root):
            now[os.stat(folder).st_ino] = _names(folder)
            for path in (Path(folder, name) for name in files):
                contents[path.stat().st_ino] = path.read_bytes()
        folders = _drawn(self._folders, now, draws, kept)
        self._lay(os.stat(self.root).st_ino, target, folders, contents, draws, kept)

    def _lay(
        self,
        inode: int,
        target: Path,
        folders: dict[int, Names],
        contents: dict[int, bytes],
        draws: np.random.Generator,
        kept: float,
    ) -> None:
        target.mkdir()
        for name, number in sorted(folders.get(inode, {}).items()):
            if number in folders:
                self._lay(number, target / name, folders, contents, draws, kept)
            else:
                durable = self._contents.get(number, b"")
                (target / name).write_bytes(_torn(durable, contents.get(number, durable), draws, kept))


def _names(folder: str) -> Names:
    return {entry.name: entry.inode() for entry in os.scandir(folder)}


def _drawn(
    durable: dict[int, Names], now: dict[int, Names], draws: np.random.Generator, kept: float
) -> dict[int, Names]:
    """Draw each folder's names between those that are durable and those of now.

    What belongs to one rename has reached the disk or has not: changes that share an inode or a name go together.
    """
    groups = _Groups()
    changes: dict[tuple[int, str], tuple[int | None, int | None]] = {}
    for folder in sorted({*durable, *now}):
        old, new = durable.get(folder, {}), now.get(folder, {})
        for name in sorted({*old, *new}):
            was, becomes = old.get(name), new.get(name)
            if was != becomes:
                changes[folder, name] = (was, becomes)
                for inode in (was, becomes):
                    if inode is not None:
                        groups.join((folder, name), inode)
    made = {group: bool(draws.random() < kept) for group in sorted({groups.of(change) for change in changes}, key=repr)}
    drawn = {folder: dict(durable.get(folder, {})) for folder in {*durable, *now}}
    for (folder, name), (_, becomes) in changes.items():
        if made[groups.of((folder, name))]:
            drawn[folder].pop(name, None)
            if becomes is not None:
                drawn[folder][name] = becomes
    return drawn


@dataclass(slots=True)
class _Groups:
    """Sets that grow together (union–find)."""

    _above: dict[Hashable, Hashable] = field(default_factory=dict)

    def of(self, one: Hashable) -> Hashable:
        while (above := self._above.setdefault(one, one)) != one:
            one = above
        return one

    def join(self, one: Hashable, other: Hashable) -> None:
        self._above[self.of(one)] = self.of(other)


def _torn(durable: bytes, now: bytes, draws: np.random.Generator, kept: float) -> bytes:
    """Draw what a file holds between its durable content and that of now."""
    if durable == now or draws.random() >= kept:
        return durable
    if not now.startswith(durable):
        return now[: len(now) // 2] if draws.random() < 0.5 else now
    part = len(durable) + int(draws.integers(len(now) - len(durable) + 1))
    return (
        now,
        now[:part],
        now[:part].ljust(len(now), b"\0"),
        durable.ljust(part, b"\0") + now[part:],
    )[int(draws.integers(4))]
