"""Collecting: the policy acts in every environment for T steps, and the facts are written down."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.control.environments import World, WorldStep
from bridle.control.networks import ControlPolicy
from bridle.control.scaling import normalise
from bridle.core.moments import Moments
from bridle.random import generator

__all__ = ["Collector", "Episode", "Rollout", "Stop"]


class Stop(Enum):
    """How an episode ended."""

    TERMINATED = "terminated"
    TRUNCATED = "truncated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One finished episode, in the environment's own rewards."""

    return_: float
    """Sum of its rewards, undiscounted."""
    length: int
    """Actions taken."""
    stop: Stop
    """How it ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """T steps of B environments: facts only. Where ``mask`` is False an environment only reset itself."""

    observations: Float[Tensor, "B T D"]
    """[B, T, D] what was acted on, encoded, not normalised."""
    actions: Tensor
    """[B, T] int64 or [B, T, A] float32: the policy's own actions, before clipping."""
    sampler_logp: Float[Tensor, "B T"]
    """[B, T] log-probability of each action under the distribution it was drawn from, nats."""
    rewards: Float[Tensor, "B T"]
    """[B, T] the environment's own rewards."""
    terminated: Bool[Tensor, "B T"]
    """[B, T] the successor is a terminal state."""
    truncated: Bool[Tensor, "B T"]
    """[B, T] the episode was cut and did not terminate."""
    mask: Bool[Tensor, "B T"]
    """[B, T] True where an action was taken."""
    last: Float[Tensor, "B D"]
    """[B, D] the observations after the last step: what the next rollout acts on first."""
    cut: Float[Tensor, "K D"]
    """[K, D] true successors of the K truncated actions, in the order of ``truncated.nonzero()``."""
    episodes: tuple[Episode, ...]
    """The episodes that ended during these steps."""

    @property
    def steps(self) -> int:
        """Actions taken: what counts in budgets and speeds."""
        return int(self.mask.sum())


class Collector:
    """Acts in a world, rollout after rollout; episodes go on from one to the next."""

    def __init__(self, world: World, n_steps: int, *, device: torch.device | None = None) -> None:
        """Prepare to collect ``n_steps`` steps a rollout; the policy lives on ``device``."""
        self.world = world
        self.n_steps = n_steps
        self._device = device or torch.device("cpu")
        self._observations: Float[np.ndarray, "B D"] | None = None
        self._returns = np.zeros(world.num_envs)
        self._lengths = np.zeros(world.num_envs, dtype=np.int64)

    def restart(self, *, seed: int, step: int) -> None:
        """Start every environment anew from the key (seed, "environments", step); episodes in progress are dropped."""
        # leaves room for one environment each at seed, seed + 1, …
        start = int(generator(seed, "environments", step).integers(2**31 - self.world.num_envs))
        self._observations = self.world.reset(start)
        self._returns[:] = 0
        self._lengths[:] = 0

    @torch.no_grad()
    def collect(self, policy: ControlPolicy, moments: Moments | None, *, seed: int, step: int) -> Rollout:
        """Act for T steps with draws from the key (seed, "actions", step); ``moments`` stay as they are meanwhile.

        Raises:
            WorldError: the environment raised or showed something that is not finite.
            RuntimeError: :meth:`restart` has not been called.
        """
        if self._observations is None:
            raise RuntimeError("call restart before the first rollout")
        observations = self._observations
        draws = generator(seed, "actions", step)
        shown, actions, logps, steps = [], [], [], []
        episodes: list[Episode] = []
        for _ in range(self.n_steps):
            states = normalise(torch.from_numpy(observations), moments).to(self._device)
            distribution = policy.distribution(states)
            action = distribution.draw(draws)
            taken = self.world.step(action.cpu().numpy())
            episodes += self._account(taken)
            shown.append(observations)
            actions.append(action.cpu())
            logps.append(distribution.log_prob(action).cpu())
            steps.append(taken)
            observations = taken.observations
        self._observations = observations
        return Rollout(
            observations=_columns(shown),
            actions=torch.stack(actions, dim=1),
            sampler_logp=torch.stack(logps, dim=1),
            rewards=_columns([s.rewards for s in steps]).float(),
            terminated=_columns([s.terminated for s in steps]),
            truncated=_columns([s.truncated for s in steps]),
            mask=_columns([s.acted for s in steps]),
            last=torch.from_numpy(observations),
            cut=_cut_successors(steps),
            episodes=tuple(episodes),
        )

    def _account(self, taken: WorldStep) -> list[Episode]:
        """Add one step to the episodes in progress and return those it ended."""
        self._returns += np.where(taken.acted, taken.rewards, 0.0)
        self._lengths += taken.acted
        ended = []
        for i in np.flatnonzero(taken.over):
            stop = Stop.TERMINATED if taken.terminated[i] else Stop.TRUNCATED
            ended.append(Episode(return_=float(self._returns[i]), length=int(self._lengths[i]), stop=stop))
            self._returns[i] = 0
            self._lengths[i] = 0
        return ended


def _columns(rows: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(rows, axis=1))


def _cut_successors(steps: list[WorldStep]) -> Float[Tensor, "K D"]:
    truncated = np.stack([s.truncated for s in steps], axis=1)
    rows = [steps[t].successors[b] for b, t in np.argwhere(truncated)]
    width = steps[0].successors.shape[1]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, width)
