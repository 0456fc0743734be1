"""``bridle ppo``: a model answers prompts, judges score the answers, the model learns, a leash holds it to its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from bridle.errors import ConfigError, NonFiniteLogits, NonFiniteStep, ScorerError
from bridle.jobs.accounts import Accounts, TimedScorer
from bridle.jobs.asked import data_of, read_asked
from bridle.jobs.carried import State, restore, save
from bridle.jobs.faults import Kept, contain, evidence_of, of_evidence, skipped
from bridle.jobs.judging import tell_mishaps
from bridle.jobs.progress import format_number
from bridle.jobs.session import RunSettings, Session, hold_place, resolve_device
from bridle.jobs.sources import of_data, of_functions, of_model, packages_of
from bridle.language.account import resident_memory
from bridle.language.adapters import LoraSettings
from bridle.language.collect import Episode, PromptTokens, collect, prompts_of_step
from bridle.language.data import DataSettings
from bridle.language.evaluate import WithGold, assess
from bridle.language.evidence import segments_to, unsampled
from bridle.language.memory import MemoryEstimate, estimate_memory, require_memory
from bridle.language.models import ModelSettings, tokenizer_notes
from bridle.language.prepare import Prepared, prepare
from bridle.language.prompts import DemonstrationMix, MixSettings
from bridle.language.quickening import calm, speed_notes
from bridle.language.records import rollout_metrics, sample_rows
from bridle.language.roles import CriticSettings, Roles, open_roles
from bridle.language.rooms import keeping, training
from bridle.language.sampler import SamplingSettings
from bridle.language.sampler.serving import SamplerKind
from bridle.language.scorers import (
    Mishap,
    RewardModelScorer,
    RewardSettings,
    Scorer,
    build_scorer,
)
from bridle.language.segments import Segments
from bridle.language.shaping import KLSettings, ShapingSettings
from bridle.learn import ppo
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.memory import MicroBudget, RowBudget, within_memory
from bridle.learn.optim import Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.record import UpdateStep, summarise
from bridle.learn.state import learnt_state
from bridle.runs.checkpoints import save_tensors
from bridle.runs.depends import Sources

__all__ = ["EvaluationSettings", "PPOConfig", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """Held-out prompts, answered before the first step, every so often, and after the last."""

    path: str | None = None
    """File of held-out prompts; None takes ``held_out`` prompts off the training file."""
    held_out: int = 64
    """Prompts kept for evaluation (from the end of the training file if there is no file of their own)."""
    every: int = 10
    """Steps between evaluations."""
    gold: tuple[str, ...] = ()
    """Functions that judge held-out answers only, as module:function: what the reward stands for."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("held_out", "every"):
            if getattr(self, name) < 1:
                raise ConfigError.of(f"evaluation.{name}", getattr(self, name), "a whole number >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig:
    """Post-train a language model with PPO against whatever judges its answers."""

    run: RunSettings
    """Where the run lies and what it runs on."""
    model: ModelSettings
    """The model to train; its first state is the reference."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """Adapters that learn in place of the model's weights, which actor, critic and reference then share."""
    prompts: DataSettings
    """What it answers."""
    reward: RewardSettings
    """Who judges the answers."""
    steps: int = 100
    """Rollouts to learn from."""
    prompts_per_step: int = 64
    """Prompts in each rollout."""
    answers_per_prompt: int = 1
    """Answers to each prompt, K; group judges see them together."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How answers are drawn."""
    sampler: SamplerKind = "auto"
    """Who draws them: "engine" is fast, "reference" plain; "auto" takes the engine where it serves the model."""
    shaping: ShapingSettings = field(default_factory=ShapingSettings)
    """What becomes of a score."""
    kl: KLSettings = field(default_factory=KLSettings)
    """The leash to the reference."""
    advantage: AdvantageSettings = field(default_factory=lambda: AdvantageSettings(gamma=1.0, lam=1.0))
    """How credit is spread over an answer's tokens. λ = 1, for the score comes at the end and the critic starts at V = 0."""
    ppo: PPOSettings = field(
        default_factory=lambda: PPOSettings(epochs=2, value_coefficient=0.1, micro_batch_tokens=4_096)
    )
    """The clipped objective. The values' share is small: on a shared trunk large returns would drown the policy's gradient."""
    recompute: bool = False
    """Keep of each layer its input alone while training and run it again on the way back: less memory, a third more work."""
    actor: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-5))
    """How the actor is moved."""
    critic: CriticSettings = field(default_factory=CriticSettings)
    """Where the critic comes from."""
    critic_optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=5e-5))
    """How the critic (or its head, on a shared trunk) is moved."""
    mix: MixSettings = field(default_factory=MixSettings)
    """Demonstrations whose likelihood is kept up meanwhile."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """Held-out prompts."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        for name in ("steps", "prompts_per_step", "answers_per_prompt"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number >= 1")
        self.sampling.require_whole()
        answers = self.prompts_per_step * self.answers_per_prompt
        if self.ppo.minibatches > answers:
            raise ConfigError.of("ppo.minibatches", self.ppo.minibatches, f"at most the {answers} answers of a step")
        if self.ppo.kl_loss != "none":
            remedy = "leave ppo.kl_loss alone and set kl.where loss with kl.estimator"
            raise ConfigError.of("ppo.kl_loss", self.ppo.kl_loss, '"none": the leash is set in kl', remedy)
        if self.reward.sees_groups and self.answers_per_prompt < 2:
            raise ConfigError.of("answers_per_prompt", self.answers_per_prompt, "at least 2 with a judge of groups")
        if self.kl.target is not None and 5 * self.kl.horizon <= answers:
            expected = f"more than a fifth of the {answers} answers of a step, or one step could turn the leash off"
            raise ConfigError.of("kl.horizon", self.kl.horizon, expected)
        if self.critic.warmup_steps >= self.steps:
            raise ConfigError.of("critic.warmup_steps", self.critic.warmup_steps, f"fewer than steps={self.steps}")

    @property
    def objective(self) -> PPOSettings:
        """The clipped objective with the leash, where that is in the loss."""
        return replace(self.ppo, kl_loss=self.kl.in_loss)


def run(config: PPOConfig, *, resume: bool = False, force: bool = False) -> Path:
    """Train, evaluate and save; return the run's directory.

    Raises:
        UserError: a model, a file, a judge or a combination of settings cannot serve; nothing was written.
        TrainingError: a step is not finite, or sampler and trainer disagree; the last checkpoint stays.
    """
    sources = partial(_sources, config)
    with (
        hold_place("ppo", config.run, config=config, sources=sources, resume=resume, force=force) as place,
        nullcontext(_open(config)) as world,
        place.session(config) as session,
    ):
        groups, masters = world.roles.groups(config.actor, config.critic_optim), world.roles.masters
        optimiser = Optimiser(groups, total_steps=config.steps, masters=masters)
        state = restore(config.kl, world.roles, optimiser, session.checkpoint)
        for note in world.notes:
            session.say(note)
        budget, rows = session.micro_budget(config.ppo.micro_batch_tokens), session.row_budget(config.sampling.rows)
        judging = [session.take_up_budget(judge.budget) for judge in world.models]
        if session.start == 0:
            _evaluate(config, world, session, 0, budget, rows)
        with session.progress(config.steps, "ppo", start=session.start) as progress, keeping():
            for step in session.steps(config.steps):
                account, critic_only = world.accounts.step(world.scorer), step <= config.critic.warmup_steps
                optimiser.schedule(step - 1)
                try:
                    try:
                        episodes = account.lap("collect", _collect(config, world, session.seed, step, rows))
                    finally:
                        judged = tell_mishaps(world.mishaps, session, step)
                    prepared = account.lap("prepare", _prepare(config, world, state, episodes, budget))
                    _tell_gap(prepared, session, step)
                    took = _update(config, world, state, optimiser, prepared, session.seed, step, budget)
                    updates = account.lap("training", took)
                except NonFiniteStep as fault:
                    contain(session, step, fault, config, _kept(world, fault))
                    session.record(step, skipped(fault, optimiser.lrs))
                    progress.advance(skipped=fault.what)
                else:
                    metrics = rollout_metrics(episodes, prepared, state.kl_coefficient) | summarise(updates)
                    session.record(step, metrics | judged | {f"lr/{name}": lr for name, lr in optimiser.lrs.items()})
                    session.run.samples(step, sample_rows(episodes, prepared, updates))
                    session.run.timing(step, **account.row(prepared, updates, critic_only=critic_only))
                    progress.advance(**_shown(metrics))
                    state = state.after(prepared, metrics["exact_kl"], len(episodes))
                session.tell_memory(step, budget, rows, *judging)
                if step % config.evaluation.every == 0 or step == config.steps:
                    _evaluate(config, world, session, step, budget, rows)
                session.end_step(step, last=config.steps, save=partial(save, world.roles, optimiser, state))
        with session.run.export("policy") as folder:
            world.roles.save_policy(folder)
        if config.lora.merged:
            with session.run.export("merged") as folder:
                world.roles.save_merged(folder)
        session.say(f"policy: {session.run.path / 'policy'} ({world.roles.opens_with})")
    return session.run.path


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """Everything a run reads, opened and checked before anything is written."""

    roles: Roles
    accounts: Accounts
    scorer: TimedScorer
    mishaps: list[Mishap]
    models: list[RewardModelScorer]
    held_out_scorer: Scorer
    prompts: list[PromptTokens]
    held_out: list[PromptTokens]
    mix: DemonstrationMix | None
    decode: Callable[[Tensor], str]
    notes: tuple[str, ...]
    compiled: bool
    """Whether actor, critic and reference run in compiled code."""


def _sources(config: PPOConfig) -> Sources:
    judge, critic = config.reward.model, config.critic.reward_model
    files = of_model("model", config.model)
    for setting, folder in (("reward.model", judge), ("critic.reward_model", critic)):
        files |= {} if folder is None else of_model(setting, ModelSettings(path=folder))
    judges = {"functions": config.reward.functions, "groups": config.reward.groups, "rankings": config.reward.rankings}
    for setting, names in judges.items():
        files |= of_functions(f"reward.{setting}", names)
    files |= of_functions("evaluation.gold", config.evaluation.gold)
    return replace(of_data(data_of(config)), packages=packages_of(config.lora)).with_files(files)


def _open(config: PPOConfig) -> _World:
    """Read all that can be wrong, and only then the weights."""
    before = resident_memory()
    device = resolve_device(config.run.device)
    asked = read_asked(config)
    roles = open_roles(
        config.model,
        config.critic,
        config.reward.model,
        temperature=config.sampling.temperature,
        device=device,
        compute_dtype=getattr(torch, config.run.dtype),
        leashed=config.objective.kl_loss == "exact",
        recompute=config.recompute,
        sampler=config.sampler,
        lora=config.lora,
        seed=config.run.seed,
    )
    asked.described.require_like(roles.policy.actor.model, roles.tokenizer)
    scorer = build_scorer(config.reward, roles.tokenizer, functions=asked.functions, device=device, base=roles.base)
    models = [judge for judge in scorer.scorers if isinstance(judge, RewardModelScorer)]
    memory = _memory(config, roles, models, asked.longest)
    require_memory(memory, device, recomputed=config.recompute, on_trunk=config.critic.source == "trunk")
    warnings = tuple(note for note in (roles.policy.actor.warning, roles.warning) if note is not None)
    return _World(
        roles=roles,
        accounts=Accounts(roles, compute_dtype=roles.policy.compute_dtype, before=before),
        mishaps=scorer.mishaps,
        models=models,
        scorer=TimedScorer(scorer),
        held_out_scorer=WithGold(scorer, asked.functions.gold),
        prompts=asked.prompts,
        held_out=asked.held_out,
        mix=asked.mix,
        decode=lambda ids: str(roles.tokenizer.decode(ids, skip_special_tokens=True)),
        compiled=roles.policy.computes_compiled() and roles.reference.computes_compiled(roles.policy.compute_dtype),
        notes=(
            *tokenizer_notes(roles.tokenizer),
            *speed_notes(roles.policy.actor.model),
            *asked.notes,
            *(() if asked.mix is None else asked.mix.notes),
            *warnings,
            memory.sentence(),
        ),
    )


def _memory(config: PPOConfig, roles: Roles, models: list[RewardModelScorer], longest: int) -> MemoryEstimate:
    """What the run will hold, by its settings and the longest text that may come."""
    return estimate_memory(
        roles.policy,
        (roles.reference, *(judge.model for judge in models)),
        answers=config.prompts_per_step * config.answers_per_prompt,
        minibatches=config.ppo.minibatches,
        longest=longest,
        answer_tokens=config.sampling.max_new_tokens,
        rows=config.sampling.rows,
        micro_batch_tokens=config.ppo.micro_batch_tokens,
        keeps_features=config.objective.kl_loss == "exact" and roles.reference.fused,
    )


def _collect(config: PPOConfig, world: _World, seed: int, step: int, rows: RowBudget) -> list[Episode]:
    chosen = prompts_of_step(len(world.prompts), config.prompts_per_step, seed=seed, step=step - 1)
    prompts = [world.prompts[i] for i in chosen]
    try:
        episodes = collect(
            world.roles.sampler,
            world.scorer,
            world.decode,
            prompts,
            config.sampling,
            answers_per_prompt=config.answers_per_prompt,
            seed=seed,
            stream="rollout",
            step=step,
            rows=rows,
        )
    except NonFiniteLogits as error:
        raise unsampled([prompt.ids for prompt in prompts]) from error
    if len(episodes) < config.ppo.minibatches:
        raise ScorerError(
            f"step {step}: the judges left {len(episodes)} answers for {config.ppo.minibatches} minibatches; mend them"
        )
    return episodes


def _prepare(config: PPOConfig, world: _World, state: State, episodes: list[Episode], budget: MicroBudget) -> Prepared:
    lengths = torch.tensor([len(e.prompt.ids) + len(e.ids) for e in episodes])
    with calm(world.compiled):
        return within_memory(
            budget,
            lengths,
            lambda tokens: prepare(
                episodes,
                world.roles.policy,
                world.roles.reference,
                state.moments,
                shaping=config.shaping,
                kl=config.kl,
                kl_coefficient=state.kl_coefficient,
                advantage=config.advantage,
                micro_batch_tokens=tokens,
            ),
        )


def _update(
    config: PPOConfig,
    world: _World,
    state: State,
    optimiser: Optimiser,
    prepared: Prepared,
    seed: int,
    step: int,
    budget: MicroBudget,
) -> list[UpdateStep]:
    """Take all optimiser steps on one rollout; during the warm-up the critic's alone."""
    critic_only = step <= config.critic.warmup_steps
    policy = world.roles.policy
    with calm(world.compiled), training(), policy.frozen_actor() if critic_only else nullcontext():
        return list(
            ppo.update(
                policy,
                prepared.batch,
                optimiser,
                config.objective,
                seed=seed,
                step=step,
                kl_coefficient=state.kl_coefficient if config.kl.where == "loss" else 0.0,
                critic_only=critic_only,
                budget=budget,
                extra_loss=None if world.mix is None else world.mix.of_step(policy, seed=seed, step=step),
            )
        )


def _kept(world: _World, fault: NonFiniteStep) -> Kept:
    """Lay out what the faulty step was to be taken on; earlier steps of its update have been applied, and stay so."""
    evidence = evidence_of(fault)
    assert isinstance(evidence.units, Segments)
    tensors, report = of_evidence(evidence, segments_to(evidence.units))
    with world.roles.masters.in_place():
        weights = learnt_state(world.roles.policy)
    return Kept(
        tensors=tensors,
        save_weights=lambda folder: save_tensors(folder / "weights.safetensors", weights),
        report=report,
    )


def _evaluate(
    config: PPOConfig, world: _World, session: Session, step: int, budget: MicroBudget, rows: RowBudget
) -> None:
    """Answer the held-out prompts and keep answers and means."""
    try:
        found = assess(
            world.roles.policy,
            world.roles.reference,
            world.roles.sampler,
            world.held_out_scorer,
            world.decode,
            world.held_out,
            config.sampling,
            seed=session.seed,
            budget=budget,
            rows=rows,
            answers_per_prompt=config.answers_per_prompt if config.reward.sees_groups else 1,
        )
    finally:
        tell_mishaps(world.mishaps, session, step)
    session.tell_memory(step, budget, rows, *(judge.budget for judge in world.models))
    metrics = found.metrics()
    session.record(step, {f"evaluation/{name}": value for name, value in metrics.items()})
    session.run.samples(step, found.rows(), name="evaluation")
    gold = [name for name in metrics if name.startswith("score/gold/") and not name.endswith("_ci95")]
    names = ("score", *gold, "exact_kl", "entropy", "length")
    shown = " | ".join(f"{name} {format_number(float(metrics[name]))}" for name in names)
    session.say(f"held-out, step {step}: {shown}")


def _tell_gap(prepared: Prepared, session: Session, step: int) -> None:
    """Keep it as an event where sampler and trainer differ by more than rounding; in bfloat16 they always do."""
    if prepared.recomputed and session.dtype == torch.float32:
        text = (
            f"step {step}: sampler and trainer differ by {float(prepared.gap.mean):.2g} nats on average, "
            f"{float(prepared.gap.maximum):.2g} at most; the trainer's log-probabilities are used"
        )
        session.run.event("sampler_gap", text, step=step)
        session.say(text)


def _shown(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Pick the numbers that matter while it works."""
    return {
        "score": metrics["score"],
        "KL": metrics["exact_kl"],
        "entropy": metrics["policy_entropy"],
        "clip": f"{100 * metrics['clip_fraction']:.0f} %",
        "value_explained": metrics["explained_variance"],
        "length": metrics["length"],
    }
