"""Running statistics: observations brought to mean 0 and deviation 1, rewards to returns of deviation 1."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.control.observations import Observations
from bridle.core.moments import Moments

__all__ = ["RewardScale", "normalise", "observed"]

OBSERVATION_BOUND = 10.0
"""Normalised observations are clipped to ± this many deviations."""


def normalise(observations: Observations, moments: Moments | None) -> Observations:
    """Standardise each number by ``moments``, clipped to ±10 deviations; without moments, return all as it is.

    Images stay bytes; bits and one-hots stay 0 and 1, since :func:`observed` leaves their moments at 0.
    """
    if moments is None:
        return observations
    return observations.with_vector(moments.standardise(observations.vector, bound=OBSERVATION_BOUND))


def observed(
    moments: Moments, observations: Observations, mask: Bool[Tensor, "*n"], measured: Bool[Tensor, " D"]
) -> Moments:
    """Return the moments with these observations taken in.

    Args:
        moments: (D,) of each number of the vector.
        observations: [*n, …].
        mask: [*n] True where an observation was acted on.
        measured: [D] True for numbers of a Box; the others count as 0 throughout, which leaves them as they are.
    """
    return moments.updated(observations.vector * measured, mask)


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardScale:
    """Divides rewards by the running deviation of the discounted return so far, G_t = γ G_{t−1} + r_t (no shift).

    Source: Engstrom et al. 2020, "Implementation matters in deep policy gradients", §3, reward scaling.
    """

    moments: Moments
    """[] each: count, mean and squared deviations of G over all valid steps."""
    running: Float[Tensor, " B"]
    """[B] G of each environment's episode in progress, in units of reward."""

    @classmethod
    def fresh(cls, num_envs: int) -> RewardScale:
        """Nothing seen yet, in ``num_envs`` environments."""
        return cls(moments=Moments.empty(), running=torch.zeros(num_envs, dtype=torch.float64))

    def restarted(self) -> RewardScale:
        """Keep the statistics and forget the episodes in progress, as when the environments restart."""
        return RewardScale(moments=self.moments, running=torch.zeros_like(self.running))

    def updated(
        self, rewards: Float[Tensor, "B T"], ended: Bool[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float
    ) -> RewardScale:
        """Take in one rollout; ``ended`` is True where an episode terminated or was truncated, or its environment was lost."""
        running = self.running.numpy().copy()
        acted, over, gained = mask.T.numpy(), ended.T.numpy(), rewards.T.numpy()
        seen = np.zeros(gained.shape)
        for t in range(len(gained)):
            running = np.where(acted[t], gamma * running + gained[t], running)
            seen[t] = running
            running[over[t]] = 0.0
        moments = self.moments.updated(torch.from_numpy(seen.T), mask)
        return RewardScale(moments=moments, running=torch.from_numpy(running))

    def apply(self, rewards: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
        """Divide by the deviation; as they are while it is 0."""
        return self.moments.standardise(rewards, shift=False)
