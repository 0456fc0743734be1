"""All that changes while an agent learns: the policy and its optimiser, running statistics, counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import Tensor

from bridle.batch import Batch
from bridle.control.collect import Episode, Rollout, Stop
from bridle.control.environments import World
from bridle.control.policy import ControlPolicy
from bridle.control.saved import Agent, save_policy
from bridle.control.scaling import RewardScale, observed
from bridle.core.moments import Moments
from bridle.errors import SamplerMismatch
from bridle.jobs.config import from_dict, to_dict
from bridle.jobs.session import Session
from bridle.learn import a2c, ppo, trpo
from bridle.learn.optim import Group, Optimiser
from bridle.learn.ppo import PPOSettings
from bridle.learn.record import UpdateStep, summarise
from bridle.runs.files import Json, load_json, load_tensors, save_json, save_tensors

if TYPE_CHECKING:
    from bridle.jobs.control import ControlConfig

__all__ = ["Learner", "Progress", "check_gap"]

GAP_BOUND = 1e-2
"""A larger mean |first trainer forward − sampler log-probability| (float32, nats) ends the run: they are not one policy."""


RECENT = 100
"""How many finished episodes the moving average of returns covers."""

_MOMENTS = ("count", "mean", "m2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come."""

    actions: int = 0
    """Actions taken; steps in which an environment only reset itself are none."""
    episodes: int = 0
    """Episodes finished."""
    recent: tuple[Episode, ...] = ()
    """The last 100 of them, oldest first."""
    best: float | None = None
    """Highest mean return of an evaluation so far; None before the first."""

    def after(self, rollout: Rollout) -> Progress:
        """Count one rollout."""
        recent = (*self.recent, *rollout.episodes)[-RECENT:]
        actions, episodes = self.actions + rollout.steps, self.episodes + len(rollout.episodes)
        return replace(self, actions=actions, episodes=episodes, recent=recent)

    @property
    def recent_return(self) -> float:
        """Mean return of the last 100 finished episodes; NaN before the first."""
        return sum(e.return_ for e in self.recent) / len(self.recent) if self.recent else float("nan")


def _episode_metrics(episodes: tuple[Episode, ...]) -> dict[str, float]:
    """Means over the episodes that a rollout ended; nothing if it ended none."""
    if not episodes:
        return {}
    n = len(episodes)
    return {
        "episode_return_mean": sum(e.return_ for e in episodes) / n,
        "episode_length_mean": sum(e.length for e in episodes) / n,
        "episode_truncated_share": sum(e.stop is Stop.TRUNCATED for e in episodes) / n,
    }


def _group(config: ControlConfig, policy: ControlPolicy) -> Group:
    """What the optimiser moves: with TRPO the critic alone, otherwise all."""
    parameters = dict(policy.named_parameters())
    if config.algorithm != "trpo":
        return Group(name="policy", parameters=parameters, settings=config.optim)
    actor = policy.actor_parameters()
    critic = {name: parameter for name, parameter in parameters.items() if name not in actor}
    return Group(name="critic", parameters=critic, settings=config.optim)


class Learner:
    """All that changes while an agent learns: the policy and its optimiser, running statistics, counts."""

    def __init__(self, config: ControlConfig, policy: ControlPolicy, world: World) -> None:
        """Start from the policy's present weights, in ``world``."""
        self.config = config
        self.policy = policy
        self.world = world
        self.optimiser = Optimiser([_group(config, policy)], total_steps=config.total_steps, flat=True)
        self.moments = Moments.empty((world.observations.width,)) if config.normalise_observations else None
        self.scale = RewardScale.fresh(world.num_envs) if config.scale_rewards else None
        self.progress = Progress()

    @property
    def agent(self) -> Agent:
        """The policy as it is now, with all it needs to act."""
        world = self.world
        return Agent(policy=self.policy, observations=world.observations, actions=world.actions, moments=self.moments)

    def update(
        self, batch: Batch, *, seed: int, step: int, anew: Callable[[], Batch] | None = None
    ) -> Iterator[UpdateStep]:
        """Learn from one rollout; with ``anew``, PPO prepares it again before each epoch after the first."""
        self.optimiser.schedule(self.progress.actions)
        if self.config.algorithm == "ppo":
            return self._ppo(batch, anew, seed=seed, step=step)
        if self.config.algorithm == "trpo":
            return trpo.update(self.policy, batch, self.optimiser, self.config.trpo, seed=seed, step=step)
        return a2c.update(self.policy, batch, self.optimiser, self.config.a2c)

    def _ppo(self, batch: Batch, anew: Callable[[], Batch] | None, *, seed: int, step: int) -> Iterator[UpdateStep]:
        settings = self.ppo_settings()
        if anew is None:
            yield from ppo.update(self.policy, batch, self.optimiser, settings, seed=seed, step=step)
            return
        for epoch in range(settings.epochs):
            batch = anew() if epoch else batch
            for taken in ppo.update(self.policy, batch, self.optimiser, settings, seed=seed, step=step, epochs=[epoch]):
                yield taken
                if not taken.applied:
                    return

    def ppo_settings(self) -> PPOSettings:
        """Return the settings of this update: ε as far fallen as the run is done."""
        settings = self.config.ppo
        if self.config.clip_schedule == "constant" or settings.clip is None:
            return settings
        left = 1 - self.progress.actions / self.config.total_steps
        high = None if settings.clip_high is None else left * settings.clip_high
        return replace(settings, clip=left * settings.clip, clip_high=high)

    def learnt_rewards(self, rollout: Rollout) -> Tensor | None:
        """Take the rollout into the reward scale and return the rewards to learn from; None for the world's own."""
        rewards = rollout.rewards
        if self.scale is not None:
            ended = rollout.terminated | rollout.truncated | rollout.lost
            self.scale = self.scale.updated(rewards, ended, rollout.mask, gamma=self.config.advantage.gamma)
            rewards = self.scale.apply(rewards)
        if self.config.clip_rewards is not None:
            rewards = rewards.clamp(-self.config.clip_rewards, self.config.clip_rewards)
        return None if rewards is rollout.rewards else rewards

    def take_in(self, rollout: Rollout) -> None:
        """Count the rollout, and let the observation statistics see it."""
        self.progress = self.progress.after(rollout)
        if self.moments is not None:
            self.moments = observed(self.moments, rollout.observations, rollout.mask, self.world.observations.measured)

    def forget_episodes_in_progress(self) -> None:
        """Follow a restart of the environments."""
        if self.scale is not None:
            self.scale = self.scale.restarted()

    def metrics(self, rollout: Rollout, updates: list[UpdateStep]) -> dict[str, float]:
        """Return what the run records of one update."""
        metrics = {
            "actions": self.progress.actions,
            "episodes": self.progress.episodes,
            "return_of_last_100": self.progress.recent_return,
            **_episode_metrics(rollout.episodes),
            **summarise(updates),
            **{f"lr/{name}": lr for name, lr in self.optimiser.lrs.items()},
        }
        for kind in ("mean", "max"):
            if (gap := metrics.get(f"first_ratio_gap_{kind}")) is not None:
                metrics[f"sampler_gap_{kind}"] = gap
        return metrics

    def keep_if_best(self, score: float, session: Session, *, step: int) -> None:
        """Export the policy as RUN/best unless an earlier one did better in its evaluation."""
        if self.progress.best is not None and score < self.progress.best:
            return
        self.progress = replace(self.progress, best=score)
        with session.run.export("best") as folder:
            save_policy(folder, self.agent, self.config.network, env=self.world.name)
            save_json(folder / "best.json", {"step": step, "actions": self.progress.actions, "return_mean": score})

    def save(self, folder: Path, session: Session) -> None:
        """Write a checkpoint: the policy as a finished one is saved, the best one so far, and what learning needs besides."""
        (folder / "policy").mkdir()
        save_policy(folder / "policy", self.agent, self.config.network, env=self.world.name)
        save_tensors(folder / "optimiser.safetensors", self.optimiser.state())
        save_tensors(folder / "statistics.safetensors", self._statistics())
        save_json(folder / "progress.json", to_dict(self.progress))
        if self.progress.best is not None:
            shutil.copytree(session.run.path / "best", folder / "best")

    def restore(self, session: Session) -> None:
        """Go on from the session's checkpoint, if there is one; RUN/best is again what it was then.

        Raises:
            RunError: the checkpoint does not fit these settings.
        """
        shutil.rmtree(session.run.path / "best", ignore_errors=True)
        if session.checkpoint is None:
            return
        folder, device = session.checkpoint.path, str(session.device)
        weights = load_tensors(folder / "policy" / "policy.safetensors", device=device)
        own = {name.removeprefix("policy/"): value for name, value in weights.items() if name.startswith("policy/")}
        self.policy.load_state_dict(own)
        self.optimiser.load_state(load_tensors(folder / "optimiser.safetensors"))
        statistics = load_tensors(folder / "statistics.safetensors")
        if self.moments is not None:
            self.moments = Moments(**{name: statistics[f"observations/{name}"] for name in _MOMENTS})
        if self.scale is not None:
            moments = Moments(**{name: statistics[f"rewards/{name}"] for name in _MOMENTS})
            self.scale = replace(self.scale, moments=moments, running=statistics["rewards/running"])
        self.progress = from_dict(Progress, cast(dict[str, Json], load_json(folder / "progress.json")))
        if self.progress.best is not None:
            with session.run.export("best") as best:
                shutil.copytree(folder / "best", best, dirs_exist_ok=True)

    def _statistics(self) -> dict[str, Tensor]:
        moments = {"observations": self.moments, "rewards": None if self.scale is None else self.scale.moments}
        kept = {f"{of}/{name}": getattr(m, name) for of, m in moments.items() if m is not None for name in _MOMENTS}
        return kept if self.scale is None else kept | {"rewards/running": self.scale.running}


def check_gap(updates: list[UpdateStep]) -> None:
    """Refuse to go on where sampler and trainer are not one policy; raises :class:`SamplerMismatch`."""
    gap = updates[0].gap if updates else None
    if gap is not None and float(gap.mean) > GAP_BOUND:
        raise SamplerMismatch(
            f"the trainer's first forward differs from the sampler's log-probabilities by {float(gap.mean):.2g} nats "
            f"on average (at most {GAP_BOUND} is expected); is the policy stochastic outside its distribution (dropout)?"
        )
