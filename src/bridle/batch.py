"""The data that flows from a world to the algorithm.

A world collects episodes, lays them out as :class:`Trajectories` for the advantage estimators, and flattens them to a
:class:`Batch` for the update. ``learn`` reads the flat tensors and shuffles the *units*; what a unit is (a transition,
a recurrent sequence, a token segment) only the world that made it knows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Batch", "Evaluation", "Policy", "Trajectories", "Units"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectories:
    """What the advantage estimators need, one row a sequence or environment; T indexes actions.

    Where ``mask`` is False nothing happened (right padding, or the dummy transition of a NEXT_STEP autoreset): the
    other fields may hold anything finite there, and every result is 0 there.
    """

    rewards: Float[Tensor, "B T"]
    """[B, T] reward after action a_t, in units of reward (r_t in our index convention)."""
    values: Float[Tensor, "B T"]
    """[B, T] V(s_t), in units of return."""
    next_values: Float[Tensor, "B T"]
    """[B, T] V of the *true* successor of action a_t, also where an episode was cut; ignored where terminated."""
    terminated: Bool[Tensor, "B T"]
    """[B, T] the episode ended in a terminal state: the successor is worth 0."""
    truncated: Bool[Tensor, "B T"]
    """[B, T] the episode was cut after this action, but its successor is worth ``next_values``."""
    mask: Bool[Tensor, "B T"]
    """[B, T] True where an action was taken."""

    def __post_init__(self) -> None:
        """Refuse fields of different shapes and an action that both terminated and was truncated."""
        shape = self.rewards.shape
        for name in ("values", "next_values", "terminated", "truncated", "mask"):
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {tuple(getattr(self, name).shape)}, rewards {tuple(shape)}")
        if bool((self.terminated & self.truncated & self.mask).any()):
            raise ValueError("an action is both terminated and truncated; termination wins: clear truncated there")


@runtime_checkable
class Units(Protocol):
    """What a world hands to its policy: units that can be counted, weighed and picked, and nothing else.

    A unit holds one or more consecutive actions of the flat batch, in order.
    """

    def __len__(self) -> int:
        """Return the number of units U."""
        ...

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        """[U] actions in each unit (int64, on the CPU); their sum is N."""
        ...

    @property
    def lengths(self) -> Int[Tensor, " U"]:
        """[U] what each unit costs to evaluate (tokens or steps, int64, on the CPU); ``sizes`` if all cost alike."""
        ...

    def select(self, index: Int[Tensor, " M"] | slice) -> Self:
        """Return the units at ``index``, in that order; a stretch of them (step 1) may share memory."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """A policy's answer for some units holding n actions: what the update differentiates."""

    logp: Float[Tensor, " n"]
    """[n] log π(a_t | s_t), nats."""
    entropy: Float[Tensor, " n"]
    """[n] entropy of π(· | s_t), nats."""
    value: Float[Tensor, " n"]
    """[n] V(s_t), in units of return."""
    exact_kl: Float[Tensor, " n"] | None = None
    """[n] KL(π(· | s_t) ‖ reference), nats, over all actions; None unless the units carry the reference."""


class Policy(Protocol):
    """An ``nn.Module``: ``policy(units)`` gives an :class:`Evaluation`; weights are touched only inside ``forward``."""

    def __call__(self, units: Units) -> Evaluation:
        """Evaluate the actions that ``units`` hold under the present weights."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rollout, ready to learn from: flat per-action tensors and the units they came from, in the same order."""

    units: Units
    """U units; unit u holds ``units.sizes[u]`` consecutive actions of the flat tensors."""
    old_logp: Float[Tensor, " N"]
    """[N] log-probability of each action under the policy that acted, nats."""
    old_value: Float[Tensor, " N"]
    """[N] V(s_t) when the batch was prepared, in units of return."""
    advantages: Float[Tensor, " N"]
    """[N] advantage estimates, in units of return (not yet whitened)."""
    returns: Float[Tensor, " N"]
    """[N] the critic's regression targets, in units of return."""
    episode: Int[Tensor, " N"]
    """[N] which episode each action belongs to, for per-episode averaging."""
    ref_logp: Float[Tensor, " N"] | None = None
    """[N] log-probability under the reference, nats; None in a world without one."""

    def __post_init__(self) -> None:
        """Refuse tensors whose lengths do not agree with each other and with the units."""
        n = int(self.units.sizes.sum())
        for name in ("old_logp", "old_value", "advantages", "returns", "episode", "ref_logp"):
            value = getattr(self, name)
            if value is not None and value.shape != (n,):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the units hold {n} actions")

    def __len__(self) -> int:
        """Return the number of actions N."""
        return self.old_logp.shape[0]

    def actions_of(self, index: Int[Tensor, " M"]) -> Int[Tensor, " n"]:
        """Return the positions in the flat tensors of the actions of units ``index``, in the order of ``index``."""
        sizes = self.units.sizes
        starts = (sizes.cumsum(0) - sizes)[index]
        counts = sizes[index]
        if bool((counts == 1).all()):
            return starts
        within = torch.arange(int(counts.sum())) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        return starts.repeat_interleave(counts) + within
