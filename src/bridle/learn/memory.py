"""Running out of a device's memory: what a forward pass may hold is halved, and the gradient is taken anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from bridle.errors import TrainingError

__all__ = ["MicroBudget", "within_memory"]

_T = TypeVar("_T")


class MicroBudget:
    """How many tokens (units × longest unit) one forward pass may hold, as long as the memory lasts."""

    def __init__(self, tokens: int | None) -> None:
        self.tokens = tokens
        """at most this many; None is no bound."""
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
        self.halvings.append(f"out of memory: micro-batches of at most {self.tokens} tokens from here on, not {before}")


def within_memory(
    budget: MicroBudget | int | None,
    lengths: Int[Tensor, " M"],
    attempt: Callable[[int | None], _T],
    forget: Callable[[], None] | None = None,
) -> _T:
    """Return ``attempt(tokens)``; where memory runs out, ``forget`` what it left and try with half as many tokens.

    The result does not depend on the number beyond rounding. A plain number is tried once.
    """
    if not isinstance(budget, MicroBudget):
        return attempt(budget)
    while True:
        try:
            return attempt(budget.tokens)
        except torch.OutOfMemoryError:
            pass  # the traceback holds the graph: leave it before anything else
        if forget is not None:
            forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        budget.halve(lengths)
