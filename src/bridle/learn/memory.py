"""Running out of a device's memory: what a forward pass may hold is halved, and the work is done anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from bridle.errors import TrainingError

__all__ = ["MicroBudget", "RowBudget", "within_memory", "within_rows"]

_T = TypeVar("_T")


class MicroBudget:
    """How many tokens (units × longest unit) one forward pass may hold, as long as the memory lasts."""

    def __init__(self, tokens: int | None, *, name: str = "tokens", of: str = "micro-batches") -> None:
        self.tokens = tokens
        """at most this many; None is no bound."""
        self.name = name
        """what the number is called where it is kept."""
        self._of = of
        self.halvings: list[str] = []
        """one line for each time that it was halved; whoever tells them empties it."""

    def halve(self, lengths: Int[Tensor, " M"]) -> None:
        """Halve it, as seen on units of these lengths.

        Raises:
            TrainingError: every unit already goes alone, so that there is nothing left to halve.
        """
        longest, whole = int(lengths.max()), int(lengths.max()) * len(lengths)
        before = whole if self.tokens is None else min(self.tokens, whole)
        if before <= longest:
            raise TrainingError(
                f"out of memory with one text of {longest} tokens at a time; shorten the texts, or take a smaller model "
                "or run.dtype bfloat16"
            )
        self.tokens = max(before // 2, longest)
        self.halvings.append(f"out of memory: {self._of} of at most {self.tokens} tokens from here on, not {before}")


class RowBudget:
    """How many answers may be under way at once, as long as the memory lasts."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        """at most this many, ≥ 1."""
        self.halvings: list[str] = []
        """as in :class:`MicroBudget`."""

    def halve(self, count: int) -> None:
        """Halve it, as seen on ``count`` answers; raises TrainingError where each already goes alone."""
        before = min(self.rows, count)
        if before <= 1:
            raise TrainingError(
                "out of memory with one answer at a time; ask for shorter ones, or take a smaller model or run.dtype bfloat16"
            )
        self.rows = before // 2
        self.halvings.append(f"out of memory: at most {self.rows} answers under way from here on, not {before}")


def within_memory(
    budget: MicroBudget | int | None,
    lengths: Int[Tensor, " M"],
    attempt: Callable[[int | None], _T],
    forget: Callable[[], object] | None = None,
) -> _T:
    """Return ``attempt(tokens)``; where memory runs out, ``forget`` what it left and try with half as many tokens.

    The result does not depend on the number beyond rounding. A plain number is tried once.
    """
    if not isinstance(budget, MicroBudget):
        return attempt(budget)
    return _until_it_fits(lambda: attempt(budget.tokens), lambda: budget.halve(lengths), forget)


def within_rows(budget: RowBudget | int, count: int, attempt: Callable[[int], _T]) -> _T:
    """Return ``attempt(rows)``; where memory runs out, try with half as many of the ``count`` answers at once.

    A plain number is tried once.
    """
    if not isinstance(budget, RowBudget):
        return attempt(budget)
    return _until_it_fits(lambda: attempt(budget.rows), lambda: budget.halve(count))


def _until_it_fits(
    attempt: Callable[[], _T], halve: Callable[[], None], forget: Callable[[], object] | None = None
) -> _T:
    while True:
        try:
            return attempt()
        except torch.OutOfMemoryError:
            pass  # the traceback holds the graph: leave it before anything else
        if forget is not None:
            forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        halve()
