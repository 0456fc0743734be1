"""Buffers that runs of small networks write in, kept for later runs over as many states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

__all__ = ["Buffers"]

_KEPT = 4
"""Runs whose buffers are kept for later ones of as many states."""


class _Sized(Protocol):
    @property
    def rows(self) -> int: ...


_Run = TypeVar("_Run", bound=_Sized)


class Buffers(Generic[_Run]):
    """Runs that are over, the last few of them."""

    def __init__(self, make: Callable[[int], _Run]) -> None:
        """Make a run over n states by ``make(n)`` where none is kept."""
        self._make = make
        self._free: list[_Run] = []

    def __len__(self) -> int:
        """Return how many are kept."""
        return len(self._free)

    def take(self, rows: int) -> _Run:
        """Return a run over ``rows`` states, which nobody else has."""
        for place, kept in enumerate(self._free):
            if kept.rows == rows:
                return self._free.pop(place)
        return self._make(rows)

    def let_go(self, run: _Run) -> None:
        """Keep a run that is over."""
        self._free.append(run)
        del self._free[:-_KEPT]
