"""Compiled code for the tests that ask for it: as it was built on installing, or built anew where that is of another source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridle.native.compiling import SOURCES, compile_source, compiled_from

__all__ = ["built", "source_named"]


def source_named(name: str) -> Path:
    """The source of that name, such as layers.c."""
    (source,) = (source for source in SOURCES if source.name == name)
    return source


def built(name: str, load: Callable[[Path], Any], folder: Path) -> Any:
    """What ``load`` opens of the source's library, compiled into ``folder`` if need be, which takes seconds; or why not."""
    source, place = source_named(name), folder / "library.so"
    return load(compiled_from(source)) or compile_source(source, place) or load(place)
