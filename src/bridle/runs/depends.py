"""What a run depends on to be the same to the bit: the code, the machine, and the content of every file that it reads.

It is taken stock of when the run starts and kept in its config.json under ``depends``; a resume takes stock again and
compares. What changed is named: what it is now, what it was, and how to mend it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from bridle.runs.files import Json, JsonObject, file_digest

__all__ = ["Difference", "Sources", "differences", "source_of", "take_stock", "version_of"]

_READ = frozenset((".safetensors", ".json", ".model", ".txt", ".jinja", ".tiktoken"))
"""Suffixes of what is read out of a model's folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What a job reads besides its settings."""

    packages: tuple[str, ...] = ()
    """distributions whose version may change a number, besides NumPy and PyTorch."""
    files: Mapping[str, Path]
    """setting → the file that it names, or the folder of a model."""
    contents: Mapping[str, Callable[[], Mapping[str, str]]] = field(default_factory=dict)
    """setting → what looks at what it names where that is no file here: name → digest."""

    def with_files(self, files: Mapping[str, Path]) -> Sources:
        """Return the same with more files."""
        return replace(self, files={**files, **self.files})


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One thing that is not what it was when the run started."""

    what: str
    """what it is: a package, a file, the threads."""
    now: Json
    """what it is now; None if it is gone."""
    was: Json
    """what it was; None if it was not there."""
    remedy: str
    """how to have it as it was."""

    def __str__(self) -> str:
        """Say it without a full stop: ``torch is 2.12.0 and was 2.13.0``."""
        return f"{self.what} is {_shown(self.now)} and was {_shown(self.was)}"


def _shown(value: Json) -> str:
    if value is None:
        return "not there"
    text = str(value)
    return f"{text[:12]}…" if len(text) == 64 else text  # a SHA-256


@cache
def version_of(package: str) -> str | None:
    """Return the version of an installed distribution; None without it. Read once, for reading it takes milliseconds."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def source_of(name: str) -> Path | None:
    """Return the source file of ``module:function`` or ``file.py:function``; None where a module has none.

    The module must have been imported, or be found where Python looks; nothing is run here but a module's parents.
    """
    where = name.rpartition(":")[0]
    if where.endswith(".py"):
        return Path(where)
    loaded = sys.modules.get(where)
    try:
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(where)
    except (ImportError, ValueError, AttributeError):  # no such module: it will be refused where it is imported
        return None
    origin = None if spec is None else spec.origin
    return Path(origin) if origin is not None and origin.endswith(".py") else None


def take_stock(sources: Sources, *, device: str, threads: int) -> JsonObject:
    """Look at everything that a run's numbers depend on, apart from its settings.

    Args:
        sources: what the job reads.
        device: what computes: "cpu", or the name of a GPU.
        threads: threads of one tensor operation.
    """
    code: dict[str, Json] = {"bridle": version_of("bridle"), "bridle's source": _own_source()}
    code |= {name: version_of(name) for name in ("numpy", "torch", *sources.packages)}
    code["Python"] = ".".join(platform.python_version_tuple()[:2])
    return {
        "code": code,
        "machine": {"device": device, "processor": _processor(), "threads": threads},
        "files": {setting: _digests(path) for setting, path in sources.files.items()}
        | {setting: {**look()} for setting, look in sources.contents.items()},
    }


def differences(kept: Mapping[str, Json], now: Mapping[str, Json]) -> list[Difference]:
    """Compare what :func:`take_stock` gave when the run started with what it gives now, code first."""
    found = [
        Difference(what=name, now=new, was=old, remedy=_remedy(name, old))
        for part in ("code", "machine")
        for name, new, old in _changed(_part(kept, part), _part(now, part))
    ]
    old_files, new_files = _part(kept, "files"), _part(now, "files")
    for setting in sorted({*old_files, *new_files}):
        for path, new, old in _changed(_part(old_files, setting), _part(new_files, setting)):
            what = f"{setting}: the content of {path}"
            found.append(Difference(what=what, now=new, was=old, remedy="put it back as it was"))
    return found


def _remedy(name: str, was: Json) -> str:
    if name == "threads":
        return f"set OMP_NUM_THREADS={was}"
    if name in ("device", "processor"):
        return "go on where it was started"
    if name == "bridle's source":
        return "use the code that it was started with"
    if name == "Python" or was is None:
        return f"use the environment that it was started with, {name} {_shown(was)}"
    return f"pip install {name}=={was}"


def _part(stock: Mapping[str, Json], name: str) -> Mapping[str, Json]:
    part = stock.get(name)
    return part if isinstance(part, Mapping) else {}


def _changed(old: Mapping[str, Json], new: Mapping[str, Json]) -> list[tuple[str, Json, Json]]:
    names = dict.fromkeys((*old, *new))
    return [(name, new.get(name), old.get(name)) for name in names if new.get(name) != old.get(name)]


def _digests(path: Path) -> dict[str, Json]:
    """SHA-256 of a file, or of every file in a folder that a model or tokenizer is read from."""
    if not path.is_dir():
        return {path.name: file_digest(path)}
    return {found.name: file_digest(found) for found in sorted(path.iterdir()) if found.suffix in _READ}


@cache
def _own_source() -> str:
    """SHA-256 over this package's files of Python and compiled code, each with its name."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted((*root.rglob("*.py"), *root.rglob("*.so"))):
        digest.update(f"{path.relative_to(root).as_posix()}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()


@cache
def _processor() -> str:
    """Name the processor, and what of it is used: another one, or other instructions of it, may add up in another order."""
    import torch

    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    name = next(named, platform.processor() or platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"
