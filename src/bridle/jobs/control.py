"""``bridle train``: an agent learns in a Gymnasium environment, by PPO, TRPO or the plain actor–critic.

Each update acts ``n_steps`` steps in every environment, learns from them, and records what it saw. The environments start
anew from a keyed seed every ``restart_every`` updates and after a resume; so a run resumed from a checkpoint at such an
update goes on exactly as the uninterrupted one, although the inside of an environment cannot be saved.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

from torch import Tensor

from bridle.batch import Batch
from bridle.control.collect import Collector, Episode, Rollout, Stop
from bridle.control.environments import World
from bridle.control.evaluate import EvaluationSettings, evaluate
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.policy import ControlPolicy
from bridle.control.prepare import prepare
from bridle.control.saved import Agent, save_policy
from bridle.control.scaling import RewardScale, observed
from bridle.control.spaces import ObservationSpec
from bridle.core.moments import Moments
from bridle.errors import ConfigError, SamplerMismatch
from bridle.jobs.config import from_dict, to_dict
from bridle.jobs.session import RunSettings, Session, open_session
from bridle.learn import a2c, ppo, trpo
from bridle.learn.a2c import A2CSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.record import UpdateStep, summarise
from bridle.learn.trpo import TRPOSettings
from bridle.runs.files import Json, load_json, load_tensors, save_json, save_tensors

__all__ = ["ControlConfig", "run"]

GAP_BOUND = 1e-2
"""A larger mean |first trainer forward − sampler log-probability| (float32, nats) ends the run: they are not one policy."""

_MOMENTS = ("count", "mean", "m2")

UNDISTURBED = 6_000
"""Steps that each environment is left alone at least, by default, before it starts anew for the sake of exact resumes."""

RECENT = 100
"""How many finished episodes the moving average of returns covers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Train an agent in a Gymnasium environment by PPO, TRPO or the plain actor–critic."""

    env: str = "CartPole-v1"
    """Id of the environment, "CartPole-v1", or "module:Name-v0" to import its module first."""
    algorithm: Literal["ppo", "a2c", "trpo"] = "ppo"
    """Clipped surrogate with several epochs a rollout, the plain actor–critic with one step a rollout, or one natural gradient
    step of the actor inside a trust region."""
    total_steps: int = 100_000
    """Actions to take in all environments together; the last rollout is finished."""
    n_steps: int = 128
    """Steps in each environment before each update, T; 1 learns at every step."""
    world: WorldSettings = field(default_factory=WorldSettings)
    """The environments."""
    network: NetworkSettings = field(default_factory=NetworkSettings)
    """Actor and critic."""
    advantage: AdvantageSettings = field(default_factory=AdvantageSettings)
    """γ, λ and the estimator."""
    ppo: PPOSettings = field(default_factory=lambda: PPOSettings(epochs=10, value_coefficient=0.5))
    """For algorithm "ppo"."""
    a2c: A2CSettings = field(default_factory=lambda: A2CSettings(value_coefficient=0.5))
    """For algorithm "a2c"."""
    trpo: TRPOSettings = field(default_factory=TRPOSettings)
    """For algorithm "trpo"."""
    optim: OptimSettings = field(
        default_factory=lambda: OptimSettings(lr=1e-3, schedule="linear", eps=1e-5, max_grad_norm=0.5)
    )
    """The optimiser, of the critic alone with algorithm "trpo"; its schedule counts actions, not updates."""
    normalise_observations: bool = False
    """Bring every feature to mean 0 and deviation 1 by running statistics, frozen during a rollout and in evaluation."""
    scale_rewards: bool = True
    """Divide rewards by the running deviation of the discounted return, so that actor and critic share one learning rate
    and one gradient norm whatever the rewards' size; metrics keep the environment's own."""
    restart_every: int | None = None
    """Updates after which the environments start anew; a resume from a checkpoint at such an update is exact. 0: never. By
    default a multiple of run.checkpoint_every that leaves each environment at least 6,000 steps."""
    record_every: int = 1
    """Updates between two records."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """How the policy is judged."""
    run: RunSettings = field(default_factory=lambda: RunSettings(dir=Path("runs/train")))
    """Where the run lies and what it runs on."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        for name in ("total_steps", "n_steps", "record_every"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number >= 1")
        if self.restart_every is not None and self.restart_every < 0:
            raise ConfigError.of("restart_every", self.restart_every, "a number of updates >= 0", "0 never restarts")
        if self.run.dtype != "float32":
            raise ConfigError.of("run.dtype", self.run.dtype, "float32", "networks of this size gain nothing from less")
        for algorithm, name, count in (
            ("ppo", "ppo.minibatches", self.ppo.minibatches),
            ("trpo", "trpo.critic_minibatches", self.trpo.critic_minibatches),
        ):
            if self.algorithm == algorithm and count > self.fewest_actions:
                expected = f"at most {self.fewest_actions}, the fewest actions that a rollout can hold"
                raise ConfigError.of(name, count, expected, "raise n_steps or world.num_envs")
        if self.algorithm == "trpo" and self.network.shared_trunk:
            expected = 'False with algorithm "trpo", which moves the actor apart from the critic'
            raise ConfigError.of("network.shared_trunk", True, expected)
        if self.algorithm == "ppo" and self.ppo.kl_loss != "none":
            raise ConfigError.of("ppo.kl_loss", self.ppo.kl_loss, '"none"', "an agent in a world has no reference")

    @property
    def restart_updates(self) -> int:
        """Updates after which the environments start anew; 0 if never."""
        if self.restart_every is not None:
            return self.restart_every
        saved = self.run.checkpoint_every
        return saved * math.ceil(UNDISTURBED / (saved * self.n_steps))

    @property
    def evaluation_updates(self) -> int:
        """Updates between evaluations; 0 leaves only the final one."""
        if self.evaluation.every is not None:
            return self.evaluation.every
        return math.ceil(UNDISTURBED / (2 * self.n_steps))

    @property
    def fewest_actions(self) -> int:
        """Actions in the worst rollout: each environment may spend every other step on resetting itself."""
        return max(self.n_steps, self.world.num_envs * (self.n_steps // 2))


def run(config: ControlConfig, *, resume: bool = False) -> Path:
    """Train an agent; return the run's directory, whose ``policy`` folder holds it.

    Raises:
        WorldError: the environment cannot be made or trained on.
        ConfigError: the settings cannot work together.
        TrainingError: a loss is not finite, or sampler and trainer disagree.
    """
    with closing(make_world(config.env, config.world)) as world, closing(make_world(config.env, config.world)) as judge:
        policy = build_policy(world.observations, world.actions, config.network, seed=config.run.seed)
        with open_session("control", config, config.run, resume=resume) as session:
            learner = Learner(config, policy.to(session.device), world.observations)
            learner.restore(session)
            _train(config, learner, Collector(world, config.n_steps, device=session.device), judge, session)
            agent = Agent(
                policy=policy, observations=world.observations, actions=world.actions, moments=learner.moments
            )
            with session.run.export("policy") as folder:
                save_policy(folder, agent, config.network, env=config.env)
    return session.run.path


def _train(config: ControlConfig, learner: Learner, collector: Collector, judge: World, session: Session) -> None:
    seed, step = config.run.seed, session.start
    with session.progress(config.total_steps, config.env, start=learner.progress.actions) as bar:
        while learner.progress.actions < config.total_steps:
            step += 1
            started = time.perf_counter()
            if step == session.start + 1 or (config.restart_updates and (step - 1) % config.restart_updates == 0):
                collector.restart(seed=seed, step=step)
                learner.forget_episodes_in_progress()
            rollout = collector.collect(learner.policy, learner.moments, seed=seed, step=step)
            batch = prepare(
                rollout, learner.policy, learner.moments, config.advantage, rewards=learner.scaled_rewards(rollout)
            )
            updates = list(learner.update(batch, seed=seed, step=step))
            learner.take_in(rollout)
            _check_gap(updates[0])
            elapsed = time.perf_counter() - started
            last = learner.progress.actions >= config.total_steps
            metrics = _judge(config, learner, judge, step=step, last=last)
            if metrics or step % config.record_every == 0:
                session.record(step, {**learner.metrics(rollout, updates), **metrics})
                session.run.timing(step, seconds=elapsed, steps_per_second=rollout.steps / elapsed)
            bar.advance(rollout.steps, return_of_last_100=learner.progress.recent_return)
            session.end_step(step, last=step if last else step + 1, save=learner.save)


def _judge(config: ControlConfig, learner: Learner, judge: World, *, step: int, last: bool) -> dict[str, float]:
    """Evaluate if it is due, with the most likely actions and with drawn ones."""
    settings = config.evaluation
    every = config.evaluation_updates
    if not (last or (every and step % every == 0)):
        return {}
    metrics: dict[str, float] = {}
    for name, deterministic in (("deterministic", True), ("sampled", False)):
        score = evaluate(
            judge,
            learner.policy,
            learner.moments,
            episodes=settings.final_episodes if last else settings.episodes,
            deterministic=deterministic,
            seed=config.run.seed,
            step=step,
            max_steps=settings.max_steps,
        )
        metrics |= score.metrics(f"{'final' if last else 'evaluation'}/{name}")
    return metrics


def _check_gap(first: UpdateStep) -> None:
    if first.gap is not None and float(first.gap.mean) > GAP_BOUND:
        raise SamplerMismatch(
            f"the trainer's first forward differs from the sampler's log-probabilities by {float(first.gap.mean):.2g} nats "
            f"on average (at most {GAP_BOUND} is expected); is the policy stochastic outside its distribution (dropout)?"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far a run has come."""

    actions: int = 0
    """Actions taken; steps in which an environment only reset itself are none."""
    episodes: int = 0
    """Episodes finished."""
    recent: tuple[Episode, ...] = ()
    """The last 100 of them, oldest first."""

    def after(self, rollout: Rollout) -> Progress:
        """Count one rollout."""
        recent = (*self.recent, *rollout.episodes)[-RECENT:]
        actions, episodes = self.actions + rollout.steps, self.episodes + len(rollout.episodes)
        return Progress(actions=actions, episodes=episodes, recent=recent)

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

    def __init__(self, config: ControlConfig, policy: ControlPolicy, observations: ObservationSpec) -> None:
        """Start from the policy's present weights, in a world of these ``observations``."""
        self.config = config
        self.policy = policy
        self.optimiser = Optimiser([_group(config, policy)], total_steps=config.total_steps)
        self.moments = Moments.empty((observations.width,)) if config.normalise_observations else None
        self.measured = observations.measured
        self.scale = RewardScale.fresh(config.world.num_envs) if config.scale_rewards else None
        self.progress = Progress()

    def update(self, batch: Batch, *, seed: int, step: int) -> Iterator[UpdateStep]:
        """Learn from one rollout."""
        self.optimiser.schedule(self.progress.actions)
        if self.config.algorithm == "ppo":
            return ppo.update(self.policy, batch, self.optimiser, self.config.ppo, seed=seed, step=step)
        if self.config.algorithm == "trpo":
            return trpo.update(self.policy, batch, self.optimiser, self.config.trpo, seed=seed, step=step)
        return a2c.update(self.policy, batch, self.optimiser, self.config.a2c)

    def scaled_rewards(self, rollout: Rollout) -> Tensor | None:
        """Take the rollout into the reward scale and return its rewards scaled; None where they are not."""
        if self.scale is None:
            return None
        ended = rollout.terminated | rollout.truncated
        self.scale = self.scale.updated(rollout.rewards, ended, rollout.mask, gamma=self.config.advantage.gamma)
        return self.scale.apply(rollout.rewards)

    def take_in(self, rollout: Rollout) -> None:
        """Count the rollout, and let the observation statistics see it."""
        self.progress = self.progress.after(rollout)
        if self.moments is not None:
            self.moments = observed(self.moments, rollout.observations, rollout.mask, self.measured)

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
        if updates[0].gap is not None:
            metrics["sampler_gap_mean"] = float(updates[0].gap.mean)
            metrics["sampler_gap_max"] = float(updates[0].gap.maximum)
        return metrics

    def save(self, folder: Path) -> None:
        """Write a checkpoint."""
        save_tensors(folder / "policy.safetensors", self.policy.state_dict())
        save_tensors(folder / "optimiser.safetensors", self.optimiser.state())
        save_tensors(folder / "statistics.safetensors", self._statistics())
        save_json(folder / "progress.json", to_dict(self.progress))

    def restore(self, session: Session) -> None:
        """Go on from the session's checkpoint, if there is one.

        Raises:
            RunError: the checkpoint does not fit these settings.
        """
        if session.checkpoint is None:
            return
        folder, device = session.checkpoint.path, str(session.device)
        self.policy.load_state_dict(load_tensors(folder / "policy.safetensors", device=device))
        self.optimiser.load_state(load_tensors(folder / "optimiser.safetensors"))
        statistics = load_tensors(folder / "statistics.safetensors")
        if self.moments is not None:
            self.moments = Moments(**{name: statistics[f"observations/{name}"] for name in _MOMENTS})
        if self.scale is not None:
            moments = Moments(**{name: statistics[f"rewards/{name}"] for name in _MOMENTS})
            self.scale = replace(self.scale, moments=moments)
        self.progress = from_dict(Progress, cast(dict[str, Json], load_json(folder / "progress.json")))

    def _statistics(self) -> dict[str, Tensor]:
        moments = {"observations": self.moments, "rewards": None if self.scale is None else self.scale.moments}
        return {f"{of}/{name}": getattr(m, name) for of, m in moments.items() if m is not None for name in _MOMENTS}
