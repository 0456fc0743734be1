"""Collecting: the policy acts in every environment for T steps, and the facts are written down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor

from bridle.control.environments import World, WorldStep
from bridle.control.observations import Observations
from bridle.control.policy import ControlPolicy
from bridle.control.processes import Replacement
from bridle.control.scaling import normalise
from bridle.core.moments import Moments
from bridle.random import generator

__all__ = ["Collector", "Episode", "Memory", "Recall", "Rollout", "Stop", "led_here"]


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
class Memory:
    """What a policy with a memory remembered during T steps of B environments."""

    before: Float[Tensor, "B T S"]
    """[B, T, S] before each step; the initial one where an episode begins."""
    fresh: Bool[Tensor, "B T"]
    """[B, T] True where an episode begins with this step; what was remembered before is forgotten."""
    last: Float[Tensor, "B S"]
    """[B, S] before the step that follows the last one."""
    cut: Float[Tensor, "K S"]
    """[K, S] after each of the K truncated actions' states, in the order of ``truncated.nonzero()``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """T steps of B environments: facts only. Where ``mask`` is False an environment only reset itself, or died."""

    observations: Observations
    """[B, T, …] what was acted on, and what was allowed, encoded, not normalised."""
    actions: Tensor
    """[B, T] or [B, T, A]: the policy's own actions, before squashing and clipping."""
    sampler_logp: Float[Tensor, "B T"]
    """[B, T] log-probability of each action under the distribution it was drawn from, nats."""
    values: Float[Tensor, "B T"] | None
    """[B, T] V of what was acted on, as the policy that acted found it on the way; None where it did not."""
    rewards: Float[Tensor, "B T"]
    """[B, T] the environment's own rewards."""
    terminated: Bool[Tensor, "B T"]
    """[B, T] the successor is a terminal state."""
    truncated: Bool[Tensor, "B T"]
    """[B, T] the episode was cut and did not terminate."""
    mask: Bool[Tensor, "B T"]
    """[B, T] True where an action was taken, and what came of it is known."""
    lost: Bool[Tensor, "B T"]
    """[B, T] the environment died of this step and was made anew: masked, and the step before was cut at this observation."""
    last: Observations
    """[B, …] the observations after the last step: what the next rollout acts on first."""
    cut: Observations
    """[K, …] true successors of the K truncated actions, in the order of ``truncated.nonzero()``."""
    memory: Memory | None
    """What the policy remembered; None for a memoryless one."""
    episodes: tuple[Episode, ...]
    """The episodes that ended during these steps."""

    @property
    def steps(self) -> int:
        """Actions taken: what counts in budgets and speeds."""
        return int(self.mask.sum())


class Recall:
    """Carries a policy's memory from step to step of B environments, and starts it anew with each episode."""

    def __init__(self, policy: ControlPolicy, num_envs: int) -> None:
        """Start with the initial memory everywhere; without one there is nothing to do."""
        self._initial = policy.initial_state(num_envs)
        self.state = self._initial
        self.begin()

    def begin(self) -> None:
        """Start a rollout: forget what was written down, keep what is remembered."""
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []
        self._fresh: list[NDArray[np.bool_]] = []

    def take(self, after: Tensor | None, taken: WorldStep) -> None:
        """Follow one step, ``after`` which [B, S] is remembered: memory goes on where the episode does."""
        if self._initial is None:
            return
        assert self.state is not None
        assert after is not None
        # where an environment only reset itself, its first observation is still to come
        fresh = taken.over | ~taken.acted
        self._before.append(self.state)
        self._after.append(after)
        self._fresh.append(fresh)
        self.state = torch.where(torch.from_numpy(fresh).to(after.device)[:, None], self._initial, after)

    def memory(self, truncated: Bool[Tensor, "B T"]) -> Memory | None:
        """Return what was remembered since :meth:`begin`; None without a memory."""
        if self.state is None:
            return None
        began = [np.zeros_like(self._fresh[0]), *self._fresh[:-1]]
        after = torch.stack(self._after, dim=1).cpu()
        before = torch.stack(self._before, dim=1).cpu()
        return Memory(before=before, fresh=_columns(began), last=self.state.cpu(), cut=after[truncated])


class Collector:
    """Acts in a world, rollout after rollout; episodes go on from one to the next.

    The inside of an environment cannot be saved, but what led there can: the key it was reset from and every action
    since. :meth:`replay` takes the same steps again, without a policy.
    """

    def __init__(self, world: World, n_steps: int, *, device: torch.device | None = None) -> None:
        """Prepare to collect ``n_steps`` steps a rollout; the policy lives on ``device``."""
        self.world = world
        self.n_steps = n_steps
        self._device = device or torch.device("cpu")
        self._observations: Observations | None = None
        self._restarted = 0
        self._played: list[NDArray[Any]] = []
        self._recall: Recall | None = None
        self._earned = np.zeros(world.num_envs)
        self._returns = np.zeros(world.num_envs)
        self._lengths = np.zeros(world.num_envs, dtype=np.int64)

    def restart(self, *, seed: int, step: int, stream: str = "environments") -> None:
        """Start every environment anew from the key (seed, stream, step); episodes in progress are dropped."""
        # leaves room for one environment each at seed, seed + 1, …
        start = int(generator(seed, stream, step).integers(2**31 - self.world.num_envs))
        self._observations = None  # and so it stays where the world goes wrong
        self._restarted = step
        self._played = []
        self._recall = None
        self._earned[:] = 0
        self._returns[:] = 0
        self._lengths[:] = 0
        self._observations = self.world.reset(start)

    @property
    def idle(self) -> bool:
        """Whether :meth:`restart` must be called before the next rollout."""
        return self._observations is None

    def forget(self) -> None:
        """Drop the episodes in progress, as when somebody else has used the world."""
        self._observations = None
        self._played = []

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`replay` needs: the last restart, the actions since, and what came of them; empty if idle."""
        if self._observations is None:
            return {}
        kept = {**self.led_here(), **self._outcome(self._observations)}
        if self._recall is not None and self._recall.state is not None:
            kept["memory"] = self._recall.state
        return kept

    def led_here(self) -> dict[str, Tensor]:
        """Return what :meth:`retake` needs: the last restart, the actions since, and which environments died."""
        return led_here(self._restarted, self._played, self.world)

    def replay(self, kept: Mapping[str, Tensor], policy: ControlPolicy, *, seed: int) -> bool:
        """Bring the world to where :meth:`state` was taken; False if the same actions led elsewhere.

        Environments that had died are made anew after the same actions, from the same seeds.

        Raises:
            WorldError: as :meth:`collect`.
        """
        if not self.retake(kept, seed=seed):
            return False
        if "memory" in kept:
            self._recall = Recall(policy, self.world.num_envs)
            self._recall.state = kept["memory"].to(self._device)
        assert self._observations is not None
        return all(torch.equal(value, kept[name]) for name, value in self._outcome(self._observations).items())

    def retake(self, kept: Mapping[str, Tensor], *, seed: int, stream: str = "environments") -> bool:
        """Take the steps of :meth:`led_here` again, begun from the key (seed, stream, step).

        False if this world cannot, since environments died then.

        Raises:
            WorldError: as :meth:`collect`.
        """
        self.restart(seed=seed, step=int(kept["restarted"]), stream=stream)
        rows = kept["replacements"].tolist() if "replacements" in kept else []
        if not self.world.expect([Replacement(call=c, environment=e, seed=s) for c, e, s in rows]):
            return False
        actions = kept["actions"].numpy() if "actions" in kept else ()
        for played in actions:
            taken = self.world.step(played)
            self._account(taken)
            self._observations = taken.observations
        if len(actions):
            self._played.append(np.asarray(actions))
        return True

    def _outcome(self, observations: Observations) -> dict[str, Tensor]:
        """Name what came of the actions since the restart: what the environments show, and all that they gave."""
        return _shown(observations) | {"rewards": torch.from_numpy(self._earned + self._returns)}

    @torch.no_grad()
    def collect(self, policy: ControlPolicy, moments: Moments | None, *, seed: int, step: int) -> Rollout:
        """Act for T steps with draws from the key (seed, "actions", step); ``moments`` stay as they are meanwhile.

        Raises:
            WorldError: the environment raised, or (:class:`~bridle.errors.NonFiniteWorld`) gave something that is not finite.
            RuntimeError: :meth:`restart` has not been called.
        """
        if self._observations is None:
            raise RuntimeError("call restart before the first rollout")
        observations = self._observations
        if self._recall is None:
            self._recall = Recall(policy, self.world.num_envs)
        recall = self._recall
        recall.begin()
        shown: list[Observations] = []
        steps: list[WorldStep] = []
        played: list[NDArray[Any]] = []
        episodes: list[Episode] = []
        seen = normalise(observations, moments).to(self._device)
        acting = policy.acting(seen, self.n_steps, generator(seed, "actions", step))
        try:
            for _ in range(self.n_steps):
                actions, after = acting.act(normalise(observations, moments).to(self._device), recall.state)
                played.append(policy.play(actions))
                taken = self.world.step(played[-1])
                recall.take(after, taken)
                shown.append(observations)
                steps.append(taken)
                observations = taken.observations
        finally:  # also where the world goes wrong: led_here() tells how
            self._observations = observations
            self._played += [np.array(played)] if played else []
            for taken in steps:  # one after the other in caches that are warm: a third of what it takes between steps
                episodes += self._account(taken)
        truncated = _columns([s.truncated for s in steps])
        return Rollout(
            observations=Observations.stack(shown, dim=1),
            actions=acting.actions(),
            sampler_logp=acting.logp(),
            values=acting.values(),
            rewards=_columns([s.rewards for s in steps]).float(),
            terminated=_columns([s.terminated for s in steps]),
            truncated=truncated,
            mask=_columns([s.acted for s in steps]),
            lost=_columns([s.lost for s in steps]),
            last=observations,
            cut=_cut_successors(steps, truncated),
            memory=recall.memory(truncated),
            episodes=tuple(episodes),
        )

    def _account(self, taken: WorldStep) -> list[Episode]:
        """Add one step to the episodes in progress and return those it ended; one that is lost never ends."""
        self._returns += taken.rewards * taken.acted
        self._lengths += taken.acted
        ended: list[Episode] = []
        if not (np.count_nonzero(taken.over) or np.count_nonzero(taken.lost)):
            return ended
        left = np.flatnonzero(taken.over | taken.lost)
        over = np.flatnonzero(taken.over)
        columns = (self._returns[over].tolist(), self._lengths[over].tolist(), taken.terminated[over].tolist())
        for return_, length, terminated in zip(*columns, strict=True):
            stop = Stop.TERMINATED if terminated else Stop.TRUNCATED
            ended.append(Episode(return_=return_, length=length, stop=stop))
        self._earned[left] += self._returns[left]
        self._returns[left] = 0
        self._lengths[left] = 0
        return ended


def led_here(restarted: int, played: Sequence[NDArray[Any]], world: World) -> dict[str, Tensor]:
    """Lay out what :meth:`Collector.retake` needs: the step of its key, blocks of actions [T, B, …], deaths."""
    kept = {"restarted": torch.tensor(restarted)}
    if played:
        kept["actions"] = torch.from_numpy(np.concatenate(played))
    if world.replacements:
        rows = [[one.call, one.environment, one.seed] for one in world.replacements]
        kept["replacements"] = torch.tensor(rows)
    return kept


def _shown(observations: Observations) -> dict[str, Tensor]:
    """Name the tensors of what the environments show."""
    named = {"shown/vector": observations.vector, "shown/mask": observations.mask}
    named |= {f"shown/image-{i}": image for i, image in enumerate(observations.images)}
    return {name: value for name, value in named.items() if value is not None}


def _columns(rows: list[np.ndarray]) -> Tensor:
    """Lay T rows [B] out as [B, T]; NumPy's ``stack`` looks at each of them in Python."""
    return torch.from_numpy(np.array(rows).T.copy())


def _cut_successors(steps: list[WorldStep], truncated: Bool[Tensor, "B T"]) -> Observations:
    rows = [steps[t].successors.with_mask(None).select(slice(b, b + 1)) for b, t in truncated.nonzero().tolist()]
    return Observations.cat(rows) if rows else steps[0].successors.with_mask(None).select(slice(0))
