"""Optimiser steps taken in one go, by a policy that knows PPO's loss and AdamW by heart.

What it does is what :mod:`bridle.learn.ppo` does step by step, which stays its oracle and takes over wherever a step needs
to be looked at: before the first that is not finite, a policy stops.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bridle.batch import Policy, Units
from bridle.learn.minibatches import Minibatches
from bridle.learn.optim import FlatAdam, Optimiser
from bridle.learn.step import Seen

__all__ = ["ClippedTerms", "Descended", "Descends", "steps_ahead"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClippedTerms:
    """The loss of an action where it is these three terms and no others.

    −min(r A, clip(r, low, high) A) + value · ½(V − R)² − entropy · H
    """

    low: float
    """1 − ε."""
    high: float
    """1 + ε of the upper side."""
    value: float
    """Coefficient of the critic's squared error."""
    entropy: float
    """Coefficient of the entropy bonus, per nat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Descended:
    """What steps in one go leave behind."""

    seen: Seen
    """[K] what the policy answered for the minibatches end to end, before each one's step; anything where none was taken."""
    norms: list[float]
    """L2 norm of the gradient before clipping, of each step that was taken: the first ones."""


class Descends(ABC):
    """A policy that takes optimiser steps by itself."""

    @abstractmethod
    def descend(self, units: Any, parts: Minibatches, terms: ClippedTerms, adam: FlatAdam) -> Descended | None:
        """Take a step on each of the minibatches, the mean loss of which is Σ_i w_i loss_i, and count it in ``adam``.

        It stops before a step whose gradient is not finite. None, and nothing done, where it cannot take any.
        """


def steps_ahead(
    policy: Policy, units: Units, parts: Minibatches, terms: ClippedTerms | None, optimiser: Optimiser
) -> Sequence[tuple[Seen, dict[str, float]]]:
    """Take the steps that the policy can take by itself: the first of ``parts``, or none.

    Returns:
        what was seen before each step, and the norm of its gradient by the group's name
    """
    if terms is None or not isinstance(policy, Descends):
        return ()
    adam = optimiser.flat_adam(len(parts))
    if adam is None:
        return ()
    try:
        found = policy.descend(units, parts, terms, adam)
    except BaseException:  # a module's: the steps before it were taken all the same
        optimiser.moved(adam.steps)
        raise
    if found is None:
        return ()
    optimiser.moved(adam.steps)
    seen = found.seen.split(parts.lengths)
    return [(one, {adam.group: norm}) for one, norm in zip(seen, found.norms, strict=False)]
