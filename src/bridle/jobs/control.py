"""``bridle train``: an agent learns in a Gymnasium environment, by PPO, TRPO or the plain actor–critic.

Each update acts ``n_steps`` steps in every environment, learns from them, and records what it saw. The inside of an
environment cannot be saved, so a checkpoint keeps the actions since the environments last started anew, and a resume takes
them again: from every checkpoint a run goes on exactly as the uninterrupted one. So that this stays short, the environments
start anew from a keyed seed every ``restart_every`` updates.
"""

from __future__ import annotations

import json
import math
import re
import time
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import VectorEnv

from bridle.control import compiled, convolutions
from bridle.control.collect import Collector, Rollout
from bridle.control.environments import World
from bridle.control.evaluate import EvaluationSettings, evaluate
from bridle.control.evidence import units_to
from bridle.control.images import NatureCNN
from bridle.control.making import GivenWorld, WorldSettings, is_atari, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.policy import ControlPolicy, Sequences, Transitions
from bridle.control.prepare import prepare
from bridle.control.saved import Agent, load_policy, save_policy
from bridle.control.small import SmallActorCritic
from bridle.control.spaces import BoxActions
from bridle.errors import ConfigError, NonFiniteStep, NonFiniteWorld
from bridle.jobs.config import from_dict, require_sane, to_dict
from bridle.jobs.faults import Kept, contain, evidence_of, of_evidence
from bridle.jobs.learner import Learner, check_gap
from bridle.jobs.presets import KINDS, PRESETS, merged
from bridle.jobs.session import RunSettings, Session, hold_place
from bridle.jobs.sources import of_world
from bridle.jobs.worlds import contain_world, enough, leave_evaluation_out, take_up_episodes, tell_deaths
from bridle.learn.a2c import A2CSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.trpo import TRPOSettings
from bridle.random import torch_rng
from bridle.runs.files import save_tensors

__all__ = ["ControlConfig", "default_config", "kind_of", "run", "train"]

_APART = 'False with algorithm "trpo", which moves the actor apart from the critic'

Algorithm = Literal["ppo", "a2c", "trpo"]

PPO_ONLY = ("clip_schedule", "recompute_advantages")
"""Settings beside ``ppo`` that another algorithm refuses."""

RESTART_GRAIN = 50
"""By default the updates between two restarts of the environments are a multiple of this."""

UNDISTURBED = 6_000
"""Steps that each environment is left alone at least, by default, before it starts anew for the sake of short resumes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlConfig:
    """Train an agent in a Gymnasium environment by PPO, TRPO or the plain actor–critic."""

    env: str = "CartPole-v1"
    """Id of the environment, "CartPole-v1", or "module:Name-v0" to import its module first."""
    preset: str = "none"
    """Which row of the table of presets these settings started from; `bridle train` begins with it and lets flags win. "auto":
    the environment's own row, else that of its kind; "none": the plain defaults."""
    algorithm: Algorithm = "ppo"
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
    clip_rewards: float | None = None
    """Clip what is learned from, after scaling, to ± this; 1 leaves an Atari reward's sign."""
    clip_schedule: Literal["constant", "linear"] = "constant"
    """Whether PPO's ε stays, or falls with the actions taken so that 0 would be reached after the last."""
    recompute_advantages: bool = False
    """Evaluate the rollout's values and advantages again with the present critic before each of PPO's epochs."""
    restart_every: int | None = None
    """Updates after which the environments start anew; a resume takes the steps since again. 0: never, and the actions of
    the whole run are kept. By default a multiple of 50 that leaves each environment at least 6,000 steps."""
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
        for algorithm, name, number in (
            ("ppo", "ppo.minibatches", self.ppo.minibatches),
            ("trpo", "trpo.critic_minibatches", self.trpo.critic_minibatches),
        ):
            if self.algorithm != algorithm:
                continue
            if number > self.fewest_actions:
                expected = f"at most {self.fewest_actions}, the fewest actions that a rollout can hold"
                raise ConfigError.of(name, number, expected, "raise n_steps or world.num_envs")
            if self.network.recurrent is not None and number > self.world.num_envs:
                expected = f"at most {self.world.num_envs}: with a memory each environment's steps stay together"
                raise ConfigError.of(name, number, expected, "raise world.num_envs")
        if self.algorithm == "trpo" and self.network.shared_trunk:
            raise ConfigError.of("network.shared_trunk", True, _APART)
        if self.algorithm == "trpo" and self.network.recurrent is not None:
            expected = 'None with algorithm "trpo"; actor and critic share a memory'
            raise ConfigError.of("network.recurrent", self.network.recurrent, expected)
        if self.clip_rewards is not None and self.clip_rewards <= 0:
            raise ConfigError.of("clip_rewards", self.clip_rewards, "a number > 0", "leave it out to switch it off")
        if self.recompute_advantages and self.algorithm != "ppo":
            raise ConfigError.of("recompute_advantages", True, 'algorithm "ppo"', "the others see a rollout once")
        if self.clip_schedule == "linear" and (self.algorithm != "ppo" or self.ppo.clip is None):
            remedy = "pass --clip-schedule constant"
            raise ConfigError.of("clip_schedule", "linear", 'algorithm "ppo" with a clip', remedy)
        if self.algorithm == "ppo" and self.ppo.kl_loss != "none":
            raise ConfigError.of("ppo.kl_loss", self.ppo.kl_loss, '"none"', "an agent in a world has no reference")

    @property
    def restart_updates(self) -> int:
        """Updates after which the environments start anew; 0 if never."""
        if self.restart_every is not None:
            return self.restart_every
        return RESTART_GRAIN * math.ceil(UNDISTURBED / (RESTART_GRAIN * self.n_steps))

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


def run(config: ControlConfig, *, resume: bool = False, force: bool = False, world: GivenWorld | None = None) -> Path:
    """Train an agent; return the run's directory, whose ``policy`` folder holds it.

    Args:
        config: what to do.
        resume: go on with the run at ``config.run.dir``.
        force: do so also where it cannot be the same run to the bit.
        world: a vector environment of the user's own, or a function that makes one, instead of ``config.env``. A function
            makes new ones at each call: for training, for evaluation, and again where these start anew; a vector
            environment serves both, so training episodes start anew after each evaluation.

    Raises:
        WorldError: the environment cannot be made or trained on.
        ConfigError: the settings cannot work together.
        TrainingError: a loss is not finite, or sampler and trainer disagree.
    """
    given = config.env if world is None else world
    with ExitStack() as stack:
        known = config if world is None else None  # of a world of the user's own, what it says of itself
        place = stack.enter_context(hold_place("control", config.run, config=known, resume=resume, force=force))
        acted = stack.enter_context(closing(make_world(given, config.world)))
        if not isinstance(given, str):
            config = replace(config, env=acted.name, world=replace(config.world, num_envs=acted.num_envs))
        judge = acted if isinstance(given, VectorEnv) else stack.enter_context(closing(make_world(given, config.world)))
        if config.algorithm == "trpo" and config.network.factory is None and config.network.shares(acted.observations):
            raise ConfigError.of("network.shared_trunk", config.network.shared_trunk, _APART, "images share by default")
        policy = build_policy(acted.observations, acted.actions, config.network, seed=config.run.seed)
        sources = of_world(given, config.world, config.network.factory)
        with place.session(config, sources) as session:
            session.say(f"{config.env}: {config.world.num_envs} environments {acted.form}, settings: {config.preset}")
            if _runs_plainly(policy, session.device):
                session.say("networks run without compiled code, slower; python -m bridle.native.compiling builds it")
            if isinstance(acted.actions, BoxActions):
                session.leave_out("entropy_collapse")  # a density's entropy has no floor
            learner = Learner(config, policy.to(session.device), acted)
            learner.restore(session)
            collector = Collector(acted, config.n_steps, device=session.device)
            take_up_episodes(collector, learner, session)
            _train(config, learner, collector, judge, session)
            with session.run.export("policy") as folder:
                save_policy(folder, learner.agent, config.network, env=config.env)
    return session.run.path


def _runs_plainly(policy: ControlPolicy, device: torch.device) -> bool:
    """Whether there is compiled code for some of a policy's networks where it runs, but none was built."""
    looks = device.type == "cpu" and any(isinstance(module, NatureCNN) for module in policy.modules())
    small = isinstance(policy, SmallActorCritic)
    return (small and compiled.library is None) or (looks and convolutions.library is None)


def _drawing(policy: ControlPolicy, seed: int, what: str, step: int) -> AbstractContextManager[None]:
    """Key what a user's modules draw from PyTorch, as dropout does, to the step; Bridle's small networks draw nothing."""
    return nullcontext() if type(policy) is SmallActorCritic else torch_rng(seed, f"modules/{what}", step)


def _train(config: ControlConfig, learner: Learner, collector: Collector, judge: World, session: Session) -> None:
    seed, step = config.run.seed, session.start

    def save(folder: Path) -> None:
        learner.save(folder, session)
        save_tensors(folder / "episodes.safetensors", collector.state())

    with session.progress(config.total_steps, config.env, start=learner.progress.actions) as bar:
        while learner.progress.actions < config.total_steps:
            step += 1
            started = time.perf_counter()
            try:
                with _drawing(learner.policy, seed, "collect", step):
                    rollout = _collect(config, learner, collector, step)
            except NonFiniteWorld as fault:
                contain_world(config, collector, session, step, fault)
                died = tell_deaths(session, step, collector.world)
                session.record(step, {"actions": learner.progress.actions, "skipped": 1.0, **died})
                session.end_step(step, last=step + 1, save=save)
                continue
            ready = partial(
                prepare,
                rollout,
                learner.policy,
                learner.moments,
                config.advantage,
                rewards=learner.learnt_rewards(rollout),
            )
            again = {"anew": partial(ready, anew=True)} if config.recompute_advantages else {}
            try:
                with (
                    np.errstate(over="ignore", invalid="ignore"),  # what comes of it is refused
                    _drawing(learner.policy, seed, "update", step),
                ):
                    updates = (
                        list(learner.update(ready(), seed=seed, step=step, **again)) if enough(config, rollout) else []
                    )
                check_gap(updates)
            except NonFiniteStep as fault:
                contain(session, step, fault, config, _kept(config, learner, fault))
                updates = []
            learner.take_in(rollout)
            elapsed = time.perf_counter() - started
            last = learner.progress.actions >= config.total_steps
            judged = last or bool(config.evaluation_updates and step % config.evaluation_updates == 0)
            scores = _judge(config, learner, judge, session, step=step, last=last) if judged else {}
            shown: dict[str, float] = {}
            died = tell_deaths(session, step, collector.world, judge)
            if not updates:
                session.record(step, {"actions": learner.progress.actions, "skipped": 1.0, **scores, **died})
            elif scores or died or step % config.record_every == 0:
                metrics = learner.metrics(rollout, updates)
                session.record(step, {**metrics, **scores, **died})
                session.run.timing(step, seconds=elapsed, steps_per_second=rollout.steps / elapsed)
                moved = {} if config.algorithm == "a2c" else {"KL": metrics["old_kl"]}  # A2C looks at a rollout once
                shown = {**moved, "explained_variance": metrics["explained_variance"]}
            speed = round(rollout.steps / elapsed)
            if learner.progress.recent:
                shown = {"return": learner.progress.recent_return, **shown}
            bar.advance(rollout.steps, **shown, **{"steps/s": speed})
            if judged and judge is collector.world:
                collector.forget()
            session.end_step(step, last=step if last else step + 1, save=save)


def _collect(config: ControlConfig, learner: Learner, collector: Collector, step: int) -> Rollout:
    """Let the environments start anew if it is time for it, and act."""
    if collector.idle or (config.restart_updates and (step - 1) % config.restart_updates == 0):
        collector.restart(seed=config.run.seed, step=step)
        learner.forget_episodes_in_progress()
    return collector.collect(learner.policy, learner.moments, seed=config.run.seed, step=step)


def _kept(config: ControlConfig, learner: Learner, fault: NonFiniteStep) -> Kept:
    """Lay out what the faulty step was to be taken on; earlier steps of its update have been applied, and stay so."""
    evidence = evidence_of(fault)
    assert isinstance(evidence.units, Transitions | Sequences)
    tensors, report = of_evidence(evidence, units_to(evidence.units))

    def save_weights(folder: Path) -> None:
        (folder / "policy").mkdir()
        save_policy(folder / "policy", learner.agent, config.network, env=config.env)

    return Kept(tensors=tensors, save_weights=save_weights, report=report)


def _judge(
    config: ControlConfig, learner: Learner, judge: World, session: Session, *, step: int, last: bool
) -> dict[str, float]:
    """Evaluate with the most likely actions and with drawn ones, and keep the best policy."""
    settings = config.evaluation
    when = "final" if last else "evaluation"
    metrics: dict[str, float] = {}
    for name, deterministic in (("deterministic", True), ("sampled", False)):
        try:
            with _drawing(learner.policy, config.run.seed, "judge", step):
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
        except NonFiniteWorld as fault:
            leave_evaluation_out(config, session, step, fault, which=when, how=name)
            continue
        metrics |= score.metrics(f"{when}/{name}")
        if deterministic:
            learner.keep_if_best(score.mean, session, step=step)
            session.say(f"{when} after {learner.progress.actions} actions: {score}")
    return metrics


def default_config(
    env: str, *, preset: str = "auto", algorithm: Algorithm = "ppo", world: WorldSettings | None = None
) -> ControlConfig:
    """Settings to start from in ``env``: those of ``preset``, in a run directory that is still free.

    Args:
        env: id of the environment.
        preset: "auto" takes the environment's own row of the table, else its kind's; "none" is the plain defaults; any
            other name is a row.
        algorithm: of another than "ppo" the settings leave out what a row says of PPO alone.
        world: arguments and wrappers, which may change the kind.

    Raises:
        ConfigError: there is no such preset.
        WorldError: the environment cannot be made.
    """
    config = ControlConfig(env=env, preset="none", algorithm=algorithm, run=RunSettings(dir=_free_directory(env)))
    known = ("auto", "none", *KINDS, *PRESETS)
    if preset not in known:
        near = get_close_matches(preset, known, 1)
        raise ConfigError.of("preset", preset, "one of " + ", ".join(known), f"did you mean {near[0]}?" if near else "")
    if preset == "none":
        return config
    kind = preset if preset in KINDS else kind_of(env, world or config.world)
    name = env if preset == "auto" and env in PRESETS else kind if preset == "auto" else preset
    row = merged(KINDS[kind], PRESETS.get(name, {}))
    changes = {field: value for field, value in row.items() if algorithm == "ppo" or field not in PPO_ONLY}
    return from_dict(ControlConfig, merged(to_dict(config), {**changes, "preset": name}))


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What the command line looks at before the rest: it decides what the other options stand at."""

    env: str | None = None
    """Id of the environment."""
    preset: str = "auto"
    """A row of the table of presets."""
    algorithm: Algorithm = "ppo"
    """What learns; a row's settings of PPO are for PPO alone."""
    world: WorldSettings = field(default_factory=WorldSettings)
    """The environments."""

    def settings(self) -> ControlConfig | None:
        """Return the preset's settings; None without an environment."""
        if self.env is None:
            return None
        return default_config(self.env, preset=self.preset, algorithm=self.algorithm, world=self.world)


def kind_of(env: str, settings: WorldSettings) -> str:
    """Say which kind of world ``env`` is, by its spaces: a key of :data:`bridle.jobs.presets.KINDS`."""
    if is_atari(env):
        return "atari"
    with closing(make_world(env, replace(settings, num_envs=1, vectorization="sync", on_death="fail"))) as world:
        if world.observations.images:
            return "image"
        return "box" if isinstance(world.actions, BoxActions) else "vector"


def _free_directory(env: str) -> Path:
    """Return runs/ENV, or runs/ENV-2, -3, … where something is there already."""
    name = re.sub(r"[^\w.-]+", "-", env)
    numbered = (Path("runs") / (name if n == 1 else f"{name}-{n}") for n in count(1))
    return next(path for path in numbered if not path.exists())


def train(
    env: str | GivenWorld, *, preset: str = "auto", resume: bool = False, force: bool = False, **settings: Any
) -> Agent:
    """Train an agent and return it, ready to act; its run, with the same agent in ``policy``, lies in ``run["dir"]``.

        agent = bridle.train("CartPole-v1", total_steps=50_000, run={"dir": "runs/first"})

    Args:
        env: id of an environment, a vector environment, or a function that makes one.
        preset: what to start from, as ``bridle train --preset``; without an id, a kind or "none" (the default then).
        resume: go on with the run at ``run["dir"]``.
        force: do so also where it cannot be the same run to the bit.
        **settings: fields of :class:`ControlConfig`; groups as mappings, ``ppo={"clip": 0.1}``.

    Raises:
        UserError: what the caller can mend, in one line.
        TrainingError: a loss is not finite, or sampler and trainer disagree.
    """
    name = env if isinstance(env, str) else "given"
    if name == "given" and preset == "auto":
        preset = "none"
    if isinstance(env, str) and not env:
        raise ConfigError.of("env", env, "the id of an environment", "CartPole-v1, for instance")
    try:
        asked = json.loads(json.dumps(settings, default=str))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"settings are names and plain values, groups of them mappings: {error}") from error
    world = from_dict(WorldSettings, asked["world"]) if isinstance(asked.get("world"), dict) else None
    start = to_dict(default_config(name, preset=preset, algorithm=asked.get("algorithm", "ppo"), world=world))
    config = from_dict(ControlConfig, merged(start, asked))
    require_sane(config)
    path = run(config, resume=resume, force=force, world=None if isinstance(env, str) else env)
    own = None if config.network.factory is None else partial(build_policy, settings=config.network, seed=0)
    return load_policy(path / "policy", build=own)
