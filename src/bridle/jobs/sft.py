"""Supervised fine-tuning: a language model learns to answer as demonstrated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bridle.errors import ConfigError, DataError, NonFiniteStep
from bridle.jobs.faults import Kept, contain, skipped
from bridle.jobs.session import RunSettings, Session, hold_place, resolve_device
from bridle.jobs.sources import of_data, of_model, packages_of
from bridle.language.adapters import Adapted, LoraSettings, open_adapted
from bridle.language.causal import CausalModel
from bridle.language.data import DataSettings, Encoded, Encoder, encode_demonstrations, read_demonstrations
from bridle.language.descriptions import Description, describe_causal_lm
from bridle.language.evidence import demonstrations_to
from bridle.language.likelihood import batch_of_step, held_out_loss, likelihood_step
from bridle.language.models import (
    ModelSettings,
    disable_dropout,
    load_causal_lm,
    save_model,
    tokenizer_notes,
)
from bridle.language.quickening import calm, speed_notes
from bridle.language.rooms import training
from bridle.language.sampler import ReferenceSampler, SamplingSettings
from bridle.language.shadow import masters_of
from bridle.learn.masters import Masters
from bridle.learn.memory import MicroBudget, RowBudget, within_rows
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.state import learnt_state
from bridle.random import permutation, uniforms
from bridle.runs.checkpoints import load_tensors, save_tensors
from bridle.runs.depends import Sources

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["EvaluationSettings", "SFTConfig", "open_model", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationSettings:
    """What the model is tried on, before the first step, every so often, and after the last."""

    path: str | None = None
    """File of held-out demonstrations, with the same columns; None holds ``share`` of the data out."""
    share: float = 0.05
    """Share of the demonstrations that is held out, in [0, 1); 0 evaluates nothing."""
    every: int = 50
    """Steps between evaluations."""
    samples: int = 8
    """Held-out prompts that are answered at each evaluation, to be read."""
    sampling: SamplingSettings = field(default_factory=SamplingSettings)
    """How they are answered."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if not 0 <= self.share < 1:
            raise ConfigError.of("evaluation.share", self.share, "a share in [0, 1)")
        if self.every < 1:
            raise ConfigError.of("evaluation.every", self.every, "a number of steps >= 1")
        if self.samples < 0:
            raise ConfigError.of("evaluation.samples", self.samples, "a number of prompts >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class SFTConfig:
    """Fine-tune a language model on demonstrated answers."""

    run: RunSettings
    """Where the run lies and what it runs on."""
    model: ModelSettings
    """The model to start from."""
    data: DataSettings
    """Demonstrations: prompts and answers, or chats."""
    lora: LoraSettings = field(default_factory=LoraSettings)
    """An adapter that learns in place of the model's weights."""
    epochs: int = 1
    """Passes over the demonstrations."""
    batch_size: int = 32
    """Demonstrations in one optimiser step."""
    max_tokens: int | None = None
    """Longest prompt with its answer, in tokens; the model's context if left out. See data.long for what is longer."""
    micro_batch_tokens: int = 4096
    """Tokens (rows × longest row) in one forward pass; a matter of memory and speed alone."""
    optim: OptimSettings = field(default_factory=lambda: OptimSettings(lr=2e-5, schedule="cosine", warmup_steps=10))
    """How the weights are moved."""
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
    """What the model is tried on."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        for name in ("epochs", "batch_size", "micro_batch_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number >= 1")
        if self.max_tokens is not None and self.max_tokens < 2:
            raise ConfigError.of("max_tokens", self.max_tokens, "a number of tokens >= 2")


def run(config: SFTConfig, *, resume: bool = False, force: bool = False) -> Path:
    """Train, evaluate and save; return the run's directory. ``RUN/policy`` opens with ``AutoModelForCausalLM``."""
    sources = partial(_sources, config)
    with (
        hold_place("sft", config.run, config=config, sources=sources, resume=resume, force=force) as place,
        nullcontext(_open(config)) as world,
        place.session(config) as session,
    ):
        steps_per_epoch = math.ceil(len(world.training) / config.batch_size)
        total = config.epochs * steps_per_epoch
        parameters = dict(world.model.named_parameters())
        group = Group(name="policy", parameters=parameters, settings=config.optim)
        optimiser = Optimiser([group], total_steps=total, masters=world.masters)
        _restore(world, optimiser, session)
        for note in world.notes:
            session.say(note)
        budget = session.micro_budget(config.micro_batch_tokens)
        rows = session.row_budget(config.evaluation.sampling.rows)
        if session.start == 0 and world.held_out:
            session.record(0, _evaluate(config, world, session, 0, budget, rows))
        with session.progress(total, "sft", start=session.start) as progress, training():
            for step in session.steps(total):
                began = time.perf_counter()
                optimiser.schedule(step - 1)
                chosen = batch_of_step(len(world.training), config.batch_size, seed=session.seed, step=step - 1)
                batch = [world.training[i] for i in chosen]
                try:
                    with calm(world.compiled):
                        seen = likelihood_step(
                            world.model, batch, optimiser, micro_tokens=budget, computing=world.computing
                        )
                except NonFiniteStep as fault:
                    contain(session, step, fault, config, _kept(world, batch))
                    metrics, shown = skipped(fault, optimiser.lrs), {"loss": math.nan}
                else:
                    session.run.timing(step, seconds=time.perf_counter() - began, tokens=seen.tokens)
                    shown = {"loss": seen.loss, "lr": optimiser.lrs["policy"], "grad_norm": seen.grad_norm}
                    metrics = {
                        "epoch": (step - 1) // steps_per_epoch,
                        **shown,
                        "target_tokens": seen.target_tokens,
                        "tokens": seen.tokens,
                    }
                if world.held_out and (step % config.evaluation.every == 0 or step == total):
                    metrics |= _evaluate(config, world, session, step, budget, rows)
                session.tell_memory(step, budget, rows)
                session.record(step, metrics)
                progress.advance(**shown)
                session.end_step(step, last=total, save=partial(_save, world, optimiser))
        with session.run.export("policy") as folder:
            world.save(folder)
        if world.adapted is not None and config.lora.merged:
            with session.run.export("merged") as folder:
                world.adapted.save_merged(folder)
        opens = "opens with AutoModelForCausalLM" if world.adapted is None else "an adapter; opens with peft.PeftModel"
        session.say(f"policy: {session.run.path / 'policy'} ({opens})")
    return config.run.dir


def _kept(world: _World, batch: list[Encoded]) -> Kept:
    with world.masters.in_place():
        weights = learnt_state(world.model)
    return Kept(
        tensors=demonstrations_to(batch),
        save_weights=lambda folder: save_tensors(folder / "weights.safetensors", weights),
        report={"places": [item.place for item in batch]},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _World:
    """Everything a run reads, opened and checked before anything is written."""

    model: CausalModel
    tokenizer: PreTrainedTokenizerBase
    sampler: ReferenceSampler
    computing: Callable[[], AbstractContextManager[None]]
    training: list[Encoded]
    held_out: list[Encoded]
    context: int | None
    notes: tuple[str, ...]
    adapted: Adapted | None
    masters: Masters
    compiled: bool
    """Whether the model runs in compiled code."""

    def save(self, folder: Path) -> None:
        """Write the policy: a model, or an adapter."""
        with self.masters.in_place():
            if self.adapted is None:
                save_model(folder, self.model.model, self.tokenizer)
            else:
                self.adapted.save(folder)


def _sources(config: SFTConfig) -> Sources:
    data = {"data.path": config.data}
    if config.evaluation.path is not None:
        data["evaluation.path"] = _held_out_data(config, config.evaluation.path)
    return replace(of_data(data), packages=packages_of(config.lora)).with_files(of_model("model", config.model))


def _held_out_data(config: SFTConfig, path: str) -> DataSettings:
    return replace(config.data, path=path, limit=None)


def open_model(
    config: SFTConfig, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Adapted | None]:
    """Open the model as it is before the first step, with the adapter that learns, if one does."""
    adapted = None
    if config.lora.rank is None:
        network, tokenizer = load_causal_lm(config.model, device=device)
    else:
        adapted = open_adapted(config.model, config.lora, seed=config.run.seed, device=device)
        network, tokenizer = adapted.model, adapted.tokenizer
    disable_dropout(network)
    return network, tokenizer, adapted


def _open(config: SFTConfig) -> _World:
    """Read all that can be wrong, and only then the weights."""
    device, dtype = resolve_device(config.run.device), getattr(torch, config.run.dtype)
    described = describe_causal_lm(config.model, grow=config.lora.rank is None)
    training, held_out, notes = _read_all(config, described)
    network, tokenizer, adapted = open_model(config, device)
    described.require_like(network, tokenizer)
    model = CausalModel(network)
    # entered anew for every block, since it caches the weights' casts until it is left
    computing = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return _World(
        model=model,
        tokenizer=tokenizer,
        sampler=ReferenceSampler(
            network,
            described.stops,
            decode=lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)),
            computing=computing,
        ),
        computing=computing,
        training=training,
        held_out=held_out,
        context=described.context,
        adapted=adapted,
        masters=masters_of([network.base_model], dtype),
        compiled=model.computes_compiled(dtype),
        notes=(
            *tokenizer_notes(tokenizer),
            *speed_notes(model.model),
            *notes,
            *(() if model.warning is None else (model.warning,)),
        ),
    )


def _read_all(config: SFTConfig, described: Description) -> tuple[list[Encoded], list[Encoded], tuple[str, ...]]:
    """Read and encode what is learnt and what is held out, and say what was left out."""
    read = partial(_read, encoder=described.encoder, limit=described.room(config.max_tokens))
    training, notes = read(config.data)
    if config.evaluation.path is not None:
        held_out, more = read(_held_out_data(config, config.evaluation.path))
        notes += more
    else:
        order = permutation(len(training), config.run.seed, "sft-held-out").tolist()
        away = math.ceil(len(training) * config.evaluation.share)
        held_out, training = [training[i] for i in order[:away]], [training[i] for i in sorted(order[away:])]
    if not training:
        raise DataError(f"{config.data.path}: nothing is left to learn; lower evaluation.share or give more records")
    return training, held_out, notes


def _read(source: DataSettings, *, encoder: Encoder, limit: int | None) -> tuple[list[Encoded], tuple[str, ...]]:
    records = read_demonstrations(source)
    items, notes = encode_demonstrations(records.items, encoder, context=limit, long=source.long)
    return items, (*records.notes, *notes)


def _evaluate(
    config: SFTConfig, world: _World, session: Session, step: int, budget: MicroBudget, rows: RowBudget
) -> dict[str, float]:
    """Measure the held-out demonstrations, answer some of their prompts, and keep the answers."""
    with calm(world.compiled):
        found = held_out_loss(world.model, world.held_out, micro_tokens=budget, computing=world.computing)
    asked = world.held_out[: config.evaluation.samples]
    if asked:
        session.run.samples(step, _answer(config, world, asked, rows), name="evaluation")
    session.tell_memory(step, budget, rows)
    session.say(f"held-out, step {step}: loss {found.loss:.4g} nats per token, perplexity {found.perplexity:.4g}")
    return {
        "evaluation/loss": found.loss,
        "evaluation/perplexity": found.perplexity,
        "evaluation/target_tokens": found.target_tokens,
    }


def _answer(config: SFTConfig, world: _World, asked: list[Encoded], rows: RowBudget) -> list[dict[str, str | int]]:
    """Answer the prompts of demonstrations, with the same draws at every step."""
    prompts = [item.ids[: item.prompt_length] for item in asked]
    sampling = config.evaluation.sampling
    if world.context is not None:
        room = world.context - max(len(prompt) for prompt in prompts)  # ≥ 1: a demonstration fits with its answer
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
    draws = uniforms(config.run.seed, "sft-samples", 0, range(len(asked)), sampling.max_new_tokens)
    decode = partial(world.tokenizer.decode, skip_special_tokens=True)
    answers = within_rows(
        rows, len(asked), lambda at_once: world.sampler(prompts, draws, replace(sampling, rows=at_once))
    )
    return [
        {
            "prompt": decode(prompt),
            "answer": decode(answer.ids),
            "demonstrated": decode(item.ids[len(prompt) :]),
            "stop": answer.stop.value,
            "length": len(answer.ids),
        }
        for item, prompt, answer in zip(asked, prompts, answers, strict=True)
    ]


def _save(world: _World, optimiser: Optimiser, folder: Path) -> None:
    world.save(folder / "policy")
    save_tensors(folder / "optimiser.safetensors", optimiser.state())


def _restore(world: _World, optimiser: Optimiser, session: Session) -> None:
    """Put weights and moments back as the checkpoint kept them."""
    if session.checkpoint is None:
        return
    folder, device = session.checkpoint.path, world.model.device
    if world.adapted is not None:
        world.adapted.restore(folder / "policy")
    else:
        saved, _ = load_causal_lm(ModelSettings(path=str(folder / "policy")), device=device)
        with world.masters.in_place():
            world.model.model.load_state_dict(saved.state_dict())
    optimiser.load_state(load_tensors(folder / "optimiser.safetensors", device=str(device)))
