"""Opens what was compiled of the present source."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bridle.native.compiling import BFLOAT16, LEVELS, compiled_from
from bridle.native.compiling import checksum as checksum_of

__all__ = ["computing_now", "halved_library_of", "levels_here", "library_of", "load_library"]


def levels_here() -> tuple[str, ...]:
    """Those of LEVELS that this processor runs, the best first.

    As PyTorch sees it, whose ATEN_CPU_CAPABILITY=avx2 or =default takes away what is better here too.
    """
    sees, told = torch.backends.cpu.get_cpu_capability(), _capabilities()
    lacking = {"AVX512": (), "AVX2": ("x86-64-v4",)}.get(sees, ("x86-64-v4", "x86-64-v3"))
    if not all(told.get(name, True) for name in _WITH_AVX2):
        lacking = ("x86-64-v4", "x86-64-v3")
    return tuple(level for level in LEVELS if level not in lacking)


_WITH_AVX2 = ("fma3", "f16c", "bmi2", "lzcnt")
"""What x86-64-v3 has besides, and a virtual machine may hide."""


def _capabilities() -> Mapping[str, Any]:
    """What PyTorch says of the processor; nothing before 2.11, which does not say."""
    told: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return told


def library_of(source: Path) -> Path:
    """Where the best library that this processor runs lies of those that there are, or where one would."""
    places = [compiled_from(source, level) for level in levels_here()]
    return next((place for place in places if place.is_file()), places[-1])


def halved_library_of(source: Path) -> Path | None:
    """Where the library lies that multiplies in bfloat16, or would; None where this processor does not."""
    able = "x86-64-v4" in levels_here() and _capabilities().get("avx512_bf16")
    return compiled_from(source, BFLOAT16) if able else None


def computing_now(library: Any, halved: Any) -> Any:
    """Of two openings of a source, the one for what is computed in: the second under autocast to bfloat16, which stands for it.

    None where there is none, or autocast is to something else.
    """
    if not torch.is_autocast_enabled("cpu"):
        return library
    return halved if torch.get_autocast_dtype("cpu") is torch.bfloat16 else None


def load_library(
    place: Path | None, source: Path, functions: Mapping[str, tuple[Any, Sequence[Any]]], checksum: str
) -> Any:
    """Open the library at ``place`` and declare its functions; None where there is none, or none for this machine or source.

    Args:
        place: the library; None: there is none.
        source: what it must have been compiled from: structures may lie otherwise in what was built before it changed.
        functions: of each name what it returns and what it takes, as ctypes has them.
        checksum: the function that returns the checksum of the library's source.
    """
    if place is None or not place.is_file():
        return None
    try:
        found = ctypes.CDLL(str(place))
        told = getattr(found, checksum)
    except (OSError, AttributeError):  # built for another machine, or before it said of what
        return None
    told.restype = ctypes.c_int64
    if told() != checksum_of(source):
        return None
    for name, (result, arguments) in functions.items():
        function = getattr(found, name)
        function.restype, function.argtypes = result, arguments
    return found
