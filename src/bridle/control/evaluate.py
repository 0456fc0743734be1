"""Evaluating: whole episodes of a frozen policy, and what they say about its mean return."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch

from bridle.control.collect import Recall, led_here
from bridle.control.environments import World
from bridle.control.policy import ControlPolicy
from bridle.control.scaling import normalise
from bridle.core.moments import Moments
from bridle.errors import ConfigError, NonFiniteWorld
from bridle.random import generator

__all__ = ["STREAM", "EvaluationSettings", "Score", "evaluate", "student_t"]

MAX_STEPS = 20_000

STREAM = "evaluation-environments"
"""What keys the first states of an evaluation's episodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """How a policy is judged, between updates and at the end; normalisation is frozen meanwhile."""

    every: int | None = None
    """Updates between evaluations; 0 leaves only the final one. By default every 3,000 steps of each environment."""
    episodes: int = 10
    """Episodes of an evaluation between updates."""
    final_episodes: int = 100
    """Episodes of the final evaluation."""
    max_steps: int = MAX_STEPS
    """An episode that goes on longer than this many actions is cut: a world without an end must not hold the run up."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.every is not None and self.every < 0:
            raise ConfigError.of("every", self.every, "a number of updates >= 0", "0 leaves only the final evaluation")
        for name in ("episodes", "final_episodes"):
            if getattr(self, name) < 5:
                raise ConfigError.of(
                    name, getattr(self, name), "at least 5 episodes", "fewer say nothing about the mean"
                )
        if self.max_steps < 1:
            raise ConfigError.of("max_steps", self.max_steps, "a number of actions >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Returns of n episodes, undiscounted, in the environment's own rewards."""

    returns: tuple[float, ...]
    """[n] sum of rewards of each episode."""
    lengths: tuple[int, ...]
    """[n] actions of each episode."""

    @property
    def mean(self) -> float:
        """Mean return."""
        return sum(self.returns) / len(self.returns)

    @property
    def deviation(self) -> float:
        """Sample standard deviation, n − 1 in the denominator."""
        return math.sqrt(sum((r - self.mean) ** 2 for r in self.returns) / (len(self.returns) - 1))

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean: t_{0.975, n−1} s / √n."""
        return student_t(len(self.returns) - 1) * self.deviation / math.sqrt(len(self.returns))

    def __str__(self) -> str:
        """Say mean, 95 % interval, deviation and count in one line."""
        n = len(self.returns)
        return f"{self.mean:.4g} ± {self.half_width:.2g} (95 %), deviation {self.deviation:.3g}, {n} episodes"

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return the numbers that a run records."""
        return {
            f"{prefix}/return_mean": self.mean,
            f"{prefix}/return_deviation": self.deviation,
            f"{prefix}/return_ci95": self.half_width,
            f"{prefix}/length_mean": sum(self.lengths) / len(self.lengths),
            f"{prefix}/episodes": len(self.returns),
        }


def student_t(degrees: int) -> float:
    """0.975 quantile of Student's t with ν ≥ 4 degrees of freedom, right to 1 %.

    t = z + g₁/ν + g₂/ν² + g₃/ν³, Abramowitz & Stegun 1964, 26.7.5.
    """
    z = 1.959963984540054
    g1 = (z**3 + z) / 4
    g2 = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    g3 = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + g1 / degrees + g2 / degrees**2 + g3 / degrees**3


@torch.no_grad()
def evaluate(
    world: World,
    policy: ControlPolicy,
    moments: Moments | None,
    *,
    episodes: int,
    deterministic: bool,
    seed: int,
    step: int = 0,
    max_steps: int = MAX_STEPS,
) -> Score:
    """Play ``episodes`` whole episodes from the keys (seed, "evaluation…", step).

    Each environment plays a share fixed beforehand: taking the first to finish would favour short episodes. An episode whose
    environment died is played anew and counts for nothing.

    Args:
        world: reset here; nothing else may be using it.
        policy: acts with its mode if ``deterministic``, else by drawing.
        moments: observation statistics, frozen.
        episodes: n ≥ 2.
        deterministic: take each state's most likely action.
        seed: the run's seed.
        step: the run's step.
        max_steps: actions after which an episode is cut and counted as it is; where nothing ended, the next goes on from there.
    """
    device = next(policy.parameters()).device
    quota = np.array([len(share) for share in np.array_split(np.arange(episodes), world.num_envs)])
    played = np.zeros(world.num_envs, dtype=np.int64)
    total, length = np.zeros(world.num_envs), np.zeros(world.num_envs, dtype=np.int64)
    finished: list[list[tuple[float, int]]] = [[] for _ in range(world.num_envs)]
    draws = generator(seed, "evaluation-actions", step)
    observations = world.reset(int(generator(seed, STREAM, step).integers(2**31 - world.num_envs)))
    recall, actions = Recall(policy, world.num_envs), list[np.ndarray]()
    while (played < quota).any():
        recall.begin()
        acted = policy.act(normalise(observations, moments).to(device), recall.state, None if deterministic else draws)
        actions.append(policy.play(acted.actions.cpu().numpy()))
        try:
            taken = world.step(actions[-1])
        except NonFiniteWorld as fault:
            fault.led_here = led_here(step, [np.stack(actions)], world)
            raise
        recall.take(acted.state, taken)
        observations = taken.observations
        total += np.where(taken.acted, taken.rewards, 0.0)
        length += taken.acted
        for i in np.flatnonzero(taken.over | taken.lost | (length >= max_steps)):
            if played[i] < quota[i] and not taken.lost[i]:
                finished[i].append((float(total[i]), int(length[i])))
                played[i] += 1
            total[i], length[i] = 0.0, 0
    flat = [episode for own in finished for episode in own]
    return Score(returns=tuple(r for r, _ in flat), lengths=tuple(n for _, n in flat))
