"""Compiled code for the tests that ask for it: as it was built on installing, or built anew where that is of another source."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bridle.native.compiling import SOURCES, compile_source, compiled_from
from bridle.native.loading import levels_here

__all__ = ["HERE", "built", "source_named"]

HERE = levels_here()
"""What is compiled for processors that this one can stand for: fixtures of compiled code go through all of them."""


def source_named(name: str) -> Path:
    """The source of that name, such as layers.c."""
    (source,) = (source for source in SOURCES if source.name == name)
    return source


def built(name: str, load: Callable[[Path], Any], folder: Path, level: str) -> Any:
    """What ``load`` opens of the source's library for ``level``, compiled into ``folder`` if need be; or why there is none."""
    source, place = source_named(name), folder / f"library.{level}.so"
    return load(compiled_from(source, level)) or compile_source(source, place, level) or load(place)
