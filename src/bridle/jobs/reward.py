"""The reward job: a model learns, from answers that somebody compared, to score them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch

from bridle.errors import ConfigError, NonFiniteStep
from bridle.jobs.config import to_dict
from bridle.jobs.faults import Kept, contain, skipped
from bridle.jobs.phases import Phase, plan
from bridle.jobs.session import RunSettings, Session, hold_place, resolve_device
from bridle.jobs.sources import of_data, of_model, packages_of
from bridle.language.adapters import Adapted, LoraSettings, open_adapted
from bridle.language.backbones import computes_compiled
from bridle.language.comparisons import Comparison, encode_comparisons
from bridle.language.data import DataSettings, read_preferences, read_rankings
from bridle.language.descriptions import Description, describe_reward_model
from bridle.language.evidence import comparisons_to
from bridle.language.models import (
    ModelSettings,
    disable_dropout,
    load_reward_model,
    save_model,
    tokenizer_notes,
)
from bridle.language.quickening import calm, speed_notes
from bridle.language.reward_evaluation import Quality, judge_quality, length_rule
from bridle.language.reward_model import (
    LossSettings,
    batch_of_step,
    check_score_head,
    normalise_scores,
    score_sequences,
    steps_per_epoch,
    train_step,
)
from bridle.language.rooms import training
from bridle.language.shadow import masters_of
from bridle.learn.masters import Masters
from bridle.learn.memory import MicroBudget, within_memory
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.state import learnt_state, load_learnt
from bridle.runs.checkpoints import load_json, load_tensors, save_json, save_tensors
from bridle.runs.depends import Sources
from bridle.runs.files import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EvaluationSettings", "RewardConfig", "open_model", "run"]

SCORED_AT_ONCE = 16_384
"""Tokens of a forward pass that only scores, at most."""

Metric = float | int | str | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A model before its first step."""

    model: PreTrainedModel
    """In evaluation mode, without dropout."""
    tokenizer: PreTrainedTokenizerBase
    """Its tokenizer."""
    adapted: Adapted | None
    """Its adapter, where one learns in place of its weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What the model is tried on."""

    path: str | None = None
    """File of held-out comparisons, with the same columns; None holds ``share`` of the data's prompts out."""
    share: float = 0.1
    """Share of the prompts that is held out, in (0, 1)."""
    folds: int | None = None
    """≥ 2, cross-validation: train on all folds but one, judge that one, for each; then the final model on all the data."""
    every: int | None = None
    """≥ 1 steps between evaluations while training; None evaluates at the end of each training only."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if not 0 < self.share < 1:
            raise ConfigError.of("evaluation.share", self.share, "a share in (0, 1)")
        if self.folds is not None and self.folds < 2:
            raise ConfigError.of("evaluation.folds", self.folds, "at least 2 folds", "leave it out for one split")
        if self.folds is not None and self.path is not None:
            remedy = "leave one of evaluation.folds and evaluation.path out"
            raise ConfigError.of("evaluation.folds", self.folds, "no file of held-out comparisons beside it", remedy)
        if self.every is not None and self.every < 1:
            raise ConfigError.of("evaluation.every", self.every, "a whole number >= 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig:
    """Train a reward model from preference pairs or ranked answers."""

    run: RunSettings
    """Where the run lies and what it runs on."""
    model: ModelSettings
    """Where it starts: a causal language model (its head is new), or a reward model."""
    data: DataSettings
    """Comparisons to learn from."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """An adapter that learns, with the head, in place of the model's weights."""
    kind: Literal["pairs", "rankings"] = "pairs"
    """pairs: a chosen and a rejected answer (Bradley–Terry); rankings: K answers, best first (Plackett–Luce)."""
    epochs: int = 1
    """Passes over the comparisons."""
    batch_size: int = 64
    """Comparisons in one optimiser step."""
    max_tokens: int | None = None
    """Longest prompt with its answer, in tokens; the model's context if left out. See data.long for what is longer."""
    loss: LossSettings = field(default_factory=LossSettings)
    """What the scores are fitted to."""
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=1e-5, schedule="cosine"))
    """How the weights are moved."""
    normalise: bool = True
    """Rescale the finished model to mean 0 and deviation 1 over the training answers."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What the model is tried on."""

    def __post_init__(self) -> None:
        """Refuse combinations that cannot work."""
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number >= 1")
        if self.kind == "rankings" and self.loss.centering > 0:
            raise ConfigError.of("loss.centering", self.loss.centering, "0 with kind=rankings: it is defined for pairs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """The model of one phase and its optimiser."""

    optimiser: Optimiser
    """Of one group, "reward"."""
    opened: Opened
    """The model with what belongs to it."""
    masters: Masters
    """The float32 weights behind those that it holds in bfloat16."""

    @classmethod
    def of(cls, config: RewardConfig, opened: Opened, steps: int) -> Learner:
        """Give the model an optimiser for ``steps`` steps."""
        group = Group(name="reward", parameters=dict(opened.model.named_parameters()), settings=config.optim)
        masters = masters_of([opened.model.base_model], getattr(torch, config.run.dtype))
        optimiser = Optimiser([group], total_steps=steps, masters=masters)
        return cls(opened=opened, optimiser=optimiser, masters=masters)

    @property
    def model(self) -> PreTrainedModel:
        """In evaluation mode, without dropout."""
        return self.opened.model

    def export(self, folder: Path) -> None:
        """Write a folder that opens as a reward model: whole, or an adapter."""
        with self.masters.in_place():
            if self.opened.adapted is None:
                save_model(folder, self.model, self.opened.tokenizer)
            else:
                self.opened.adapted.save(folder)

    def save(self, folder: Path) -> None:
        """Write weights and moments."""
        with self.masters.in_place():
            save_tensors(folder / "model.safetensors", learnt_state(self.model))
        save_tensors(folder / "optimiser.safetensors", self.optimiser.state())

    def restore(self, folder: Path) -> None:
        """Put back what :meth:`save` wrote."""
        with self.masters.in_place():
            load_learnt(self.model, load_tensors(folder / "model.safetensors"))
        self.optimiser.load_state(load_tensors(folder / "optimiser.safetensors"))


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """All that was read before the first step."""

    config: RewardConfig
    """What was asked for."""
    comparisons: list[Comparison]
    """The data's, then those of the evaluation's own file."""
    phases: list[Phase]
    """The trainings, one after the other."""
    notes: tuple[str, ...]
    """What is to be said about tokenizer and data."""
    learner: Learner
    """The first phase's, before its first step."""

    def phase_of(self, step: int) -> Phase:
        """Return the training that the run's step belongs to."""
        return next(phase for phase in self.phases if step <= phase.last)


def run(config: RewardConfig, *, resume: bool = False, force: bool = False) -> Path:
    """Train, evaluate and save; return the run's directory.

    ``RUN/reward`` opens with ``AutoModelForSequenceClassification``; ``RUN/evaluation.json`` says what the held-out
    comparisons say of it, ``RUN/samples/held-out-N.jsonl`` how each of them was scored.
    """
    sources = partial(_sources, config)
    with (
        hold_place("reward", config.run, config=config, sources=sources, resume=resume, force=force) as place,
        nullcontext(_open(config)) as world,
        place.session(config) as session,
    ):
        total = world.phases[-1].last
        learner, scores = _restore(world, session)
        for note in world.notes:
            session.say(note)
        budget = session.micro_budget(config.loss.micro_tokens)
        with (
            session.progress(total, "reward", start=session.start) as progress,
            calm(computes_compiled(learner.opened.model.base_model, session.dtype)),
            training(),
        ):
            for step in session.steps(total):
                phase = world.phase_of(step)
                if step == phase.first and phase is not world.phases[0]:
                    learner = Learner.of(config, open_model(config, session.device), phase.steps)
                metrics = _train(world, learner, phase, step, session, budget)
                if phase.held_out and _is_due(config, phase, step):
                    own = _judge(world, learner, phase.held_out, session, budget)
                    metrics |= _flat(_quality(world, own, [phase]))
                    scores |= own if step == phase.last else {}
                session.tell_memory(step, budget)
                session.record(step, metrics)
                progress.advance(**_shown(metrics))
                session.end_step(step, last=total, save=partial(_save, learner, scores))
        _finish(world, learner, scores, session, budget)
    return config.run.dir


def _sources(config: RewardConfig) -> Sources:
    data = {"data.path": config.data}
    if config.evaluation.path is not None:
        data["evaluation.path"] = _held_out_data(config, config.evaluation.path)
    found = dataclasses.replace(of_data(data), packages=packages_of(config.lora))
    return found.with_files(of_model("model", config.model))


def _held_out_data(config: RewardConfig, path: str) -> DataSettings:
    return dataclasses.replace(config.data, path=path, limit=None)


def _open(config: RewardConfig) -> World:
    """Read all that can be wrong, and only then the weights."""
    device = resolve_device(config.run.device)
    described = describe_reward_model(config.model, grow=config.lora.rank is None)
    comparisons, phases, notes = _read_all(config, described)
    opened = open_model(config, device)
    described.require_like(opened.model, opened.tokenizer)
    first = Learner.of(config, opened, phases[0].steps)
    notes = (*tokenizer_notes(opened.tokenizer), *speed_notes(opened.model), *notes)
    return World(config=config, comparisons=comparisons, phases=phases, notes=notes, learner=first)


def _read_all(config: RewardConfig, described: Description) -> tuple[list[Comparison], list[Phase], tuple[str, ...]]:
    """Read and encode the comparisons and lay the trainings out, and say what was left out."""
    encoder, limit = described.encoder, described.room(config.max_tokens)
    read = read_preferences if config.kind == "pairs" else read_rankings
    sources = [config.data]
    if config.evaluation.path is not None:
        sources.append(_held_out_data(config, config.evaluation.path))
    parts: list[list[Comparison]] = []
    notes: tuple[str, ...] = ()
    for source in sources:
        records = read(source)
        comparisons, said = encode_comparisons(records.items, encoder, context=limit, long=source.long)
        parts.append(comparisons)
        notes += (*records.notes, *said)
    everything = [comparison for part in parts for comparison in part]
    phases = plan(config, [c.group for c in parts[0]], range(len(parts[0]), len(everything)))
    return everything, phases, notes


def open_model(config: RewardConfig, device: torch.device) -> Opened:
    """Open the model as it is before the first step; every phase begins with the same."""
    adapted = None
    if config.lora.rank is None:
        model, tokenizer = load_reward_model(config.model, seed=config.run.seed, device=device)
    else:
        adapted = open_adapted(config.model, config.lora, seed=config.run.seed, device=device, reward=True)
        model, tokenizer = adapted.model, adapted.tokenizer
    disable_dropout(model)
    check_score_head(model)
    return Opened(model=model.eval(), tokenizer=tokenizer, adapted=adapted)


def _train(
    world: World, learner: Learner, phase: Phase, step: int, session: Session, budget: MicroBudget
) -> dict[str, Metric]:
    """Take the run's step ``step``, counted from 1, and say what it saw."""
    began, within, size = time.perf_counter(), step - phase.first, world.config.batch_size
    learner.optimiser.schedule(within)
    chosen = batch_of_step(len(phase.training), size, seed=session.seed, step=within)
    batch = [world.comparisons[phase.training[i]] for i in chosen]
    try:
        with _computing(session):
            seen = train_step(learner.model, batch, learner.optimiser, world.config.loss, budget=budget)
    except NonFiniteStep as fault:
        contain(session, step, fault, world.config, _kept(learner, batch, phase))
        return {"phase": phase.name, **skipped(fault, learner.optimiser.lrs)}
    tokens = sum(len(answer) for comparison in batch for answer in comparison.answers)
    session.run.timing(step, seconds=round(time.perf_counter() - began, 4), tokens=tokens)
    epoch = within // steps_per_epoch(len(phase.training), size)
    return {"phase": phase.name, "epoch": epoch, "lr": learner.optimiser.lrs["reward"], **dataclasses.asdict(seen)}


def _kept(learner: Learner, batch: Sequence[Comparison], phase: Phase) -> Kept:
    with learner.masters.in_place():
        weights = learnt_state(learner.model)
    return Kept(
        tensors=comparisons_to(batch),
        save_weights=lambda folder: save_tensors(folder / "weights.safetensors", weights),
        report={"phase": phase.name},
    )


def _is_due(config: RewardConfig, phase: Phase, step: int) -> bool:
    every = config.evaluation.every
    return step == phase.last or (every is not None and (step - phase.first + 1) % every == 0)


def _computing(session: Session) -> torch.autocast:
    """Compute in the run's dtype; the weights stay float32."""
    return torch.autocast(session.device.type, dtype=session.dtype, enabled=session.dtype != torch.float32)


def _judge(
    world: World, learner: Learner, positions: Sequence[int], session: Session, budget: MicroBudget
) -> dict[int, list[float]]:
    """Score the comparisons at ``positions``: position → [K], best answer first."""
    answers = [world.comparisons[p].answers for p in positions]
    with _computing(session):
        texts = [answer for row in answers for answer in row]
        lengths = torch.tensor([len(text) for text in texts])
        flat = within_memory(
            budget, lengths, lambda tokens: score_sequences(learner.model, texts, micro_tokens=_for_scores(tokens))
        )
    rows = torch.split(flat, [len(row) for row in answers])
    return {p: row.tolist() for p, row in zip(positions, rows, strict=True)}


def _for_scores(tokens: int | None) -> int:
    """Tokens of a forward pass that only scores: no more than it needs to be fast, whatever training may hold."""
    return SCORED_AT_ONCE if tokens is None else min(tokens, SCORED_AT_ONCE)


def _quality(world: World, scores: Mapping[int, list[float]], phases: Sequence[Phase]) -> Quality:
    """Hold scores against the comparisons that the phases held out, each with the length rule of its own training."""
    rules: dict[int, float] = {}
    for phase in phases:
        rule = length_rule([world.comparisons[p] for p in phase.training])
        rules |= dict.fromkeys(phase.held_out, rule)
    positions = sorted(rules)
    judged = [world.comparisons[p] for p in positions]
    return judge_quality(judged, [scores[p] for p in positions], [rules[p] for p in positions])


def _flat(quality: Quality) -> dict[str, Metric]:
    flat: dict[str, Metric] = {}
    for name, value in dataclasses.asdict(quality).items():
        flat |= (
            {f"evaluation/{name}_{end}": v for end, v in value.items()}
            if isinstance(value, dict)
            else {f"evaluation/{name}": value}
        )
    return flat


def _shown(metrics: Mapping[str, Metric]) -> dict[str, float | int | str]:
    names = {
        "phase": "phase",
        "loss": "loss",
        "accuracy": "accuracy",
        "margin": "margin",
        "evaluation/accuracy": "held_out",
    }
    return {shown: value for name, shown in names.items() if (value := metrics.get(name)) is not None}


def _save(learner: Learner, scores: Mapping[int, list[float]], folder: Path) -> None:
    learner.save(folder)
    save_json(folder / "scores.json", {str(position): row for position, row in scores.items()})


def _restore(world: World, session: Session) -> tuple[Learner, dict[int, list[float]]]:
    """Return the learner to go on with, and the held-out scores so far."""
    checkpoint = session.checkpoint
    if checkpoint is None:
        return world.learner, {}
    opened = world.learner.opened  # its weights are replaced next
    learner = Learner.of(world.config, opened, world.phase_of(checkpoint.step).steps)
    learner.restore(checkpoint.path)
    saved = cast("dict[str, list[float]]", load_json(checkpoint.path / "scores.json"))
    return learner, {int(position): row for position, row in saved.items()}


def _finish(
    world: World, learner: Learner, scores: dict[int, list[float]], session: Session, budget: MicroBudget
) -> None:
    """Normalise the final model, judge it, and write both out."""
    final = world.phases[-1]
    summary: dict[str, Json] = {}
    if world.config.normalise:
        answers = [answer for p in final.training for answer in world.comparisons[p].answers]
        with _computing(session):
            lengths = torch.tensor([len(answer) for answer in answers])
            found = within_memory(
                budget,
                lengths,
                lambda tokens: normalise_scores(learner.model, answers, micro_tokens=_for_scores(tokens)),
            )
            summary["normalisation"] = to_dict(found)
    if final.held_out:
        scores |= _judge(world, learner, final.held_out, session, budget)
    session.tell_memory(final.last, budget)
    tried = [phase for phase in world.phases if phase.held_out]
    quality = _quality(world, scores, tried)
    summary["quality"] = to_dict(quality)
    if len(tried) > 1:
        summary["folds"] = [to_dict(_quality(world, scores, [phase])) for phase in tried]
    session.run.summary("evaluation.json", summary)
    session.run.samples(final.last, _rows(world, scores, tried), name="held-out")
    with session.run.export("reward") as folder:
        learner.export(folder)
    if learner.opened.adapted is not None and world.config.lora.merged:
        with session.run.export("merged") as folder:
            learner.opened.adapted.save_merged(folder)
    session.say(_verdict(quality))
    session.run.event("evaluation", _verdict(quality))
    opens = "AutoModelForSequenceClassification" if learner.opened.adapted is None else "peft.PeftModel: an adapter"
    session.say(f"reward model: {session.run.path / 'reward'} (opens with {opens})")


def _rows(
    world: World, scores: Mapping[int, list[float]], phases: Sequence[Phase]
) -> Iterator[dict[str, str | int | list[int] | list[float]]]:
    """One row per held-out comparison: who judged it, the answers' scores, best answer first, and their lengths."""
    for phase in phases:
        for p in phase.held_out:
            lengths = list(world.comparisons[p].lengths)
            yield {"phase": phase.name, "comparison": p, "scores": scores[p], "lengths": lengths}


def _verdict(quality: Quality) -> str:
    low, high = quality.advantage_interval.low, quality.advantage_interval.high
    than = "better than" if low > 0 else "worse than" if high < 0 else "not told apart from"
    return (
        f"held-out accuracy {100 * quality.accuracy:.1f} % "
        f"[{100 * quality.accuracy_interval.low:.1f}, {100 * quality.accuracy_interval.high:.1f}] "
        f"on {quality.comparisons} comparisons; {than} the length rule's {100 * quality.length_accuracy:.1f} % "
        f"(difference {100 * quality.advantage:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}])"
    )
