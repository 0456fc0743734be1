"""Which sampler serves a model: the embedded engine where it gives the model's own answers, else the plain one."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from torch import nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from bridle.errors import ModelError, NonFiniteLogits
from bridle.language.causal import CausalModel
from bridle.language.models import quiet
from bridle.language.sampler.engine import EmbeddedSampler
from bridle.language.sampler.protocol import Sampler, SamplingSettings
from bridle.language.sampler.reference import ReferenceSampler
from bridle.language.sampler.tape import Tapes
from bridle.random import generator, uniforms

__all__ = ["SamplerKind", "choose_sampler", "embedded_sampler", "require_servable"]

SamplerKind = Literal["auto", "engine", "reference"]

_GAP = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.1}
"""Largest |engine's log-prob − the model's own| on the trial texts, nats, by the weights' dtype."""


def choose_sampler(
    kind: SamplerKind,
    actor: CausalModel,
    stop_ids: Collection[int],
    *,
    value_head: nn.Linear | None = None,
    decode: Callable[[list[int]], str] | None = None,
    computing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[Sampler, str | None]:
    """Return a sampler, and a warning where "auto" had to take the plain one.

    Raises:
        ModelError: "engine" was asked for and cannot serve the model.
    """
    plain = ReferenceSampler(actor.model, stop_ids, decode=decode, computing=computing)
    if kind == "reference":
        return plain, None
    try:
        engine = embedded_sampler(actor, stop_ids, value_head=value_head, decode=decode, computing=computing)
    except ModelError as reason:
        if kind == "engine":
            raise
        return plain, f"{reason}: the plain sampler is used, which is slower"
    return engine, None


def embedded_sampler(
    actor: CausalModel,
    stop_ids: Collection[int],
    *,
    value_head: nn.Linear | None = None,
    decode: Callable[[list[int]], str] | None = None,
    computing: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> EmbeddedSampler:
    """Return the embedded engine for ``actor``; raise ModelError, saying why, where it cannot serve that model."""
    tapes = Tapes(actor)
    windows = require_servable(actor, tapes)
    return EmbeddedSampler(
        actor, windows, stop_ids, tapes=tapes, value_head=value_head, decode=decode, computing=computing
    )


def require_servable(actor: CausalModel, tapes: Tapes | None = None) -> tuple[int | None, ...]:
    """Return how far each layer looks back (None: on everything) if the engine gives the model's own log-probs.

    What cannot be seen from outside, a trial shows: a few random texts are written, slots changing hands, and their
    log-probs compared with the model's plain forward.

    Raises:
        ModelError: the engine cannot serve the model; the text says why.
    """
    name = type(actor.model).__name__
    try:
        windows = _windows(actor.model.config.get_text_config(decoder=True))
        with quiet():
            gap = _trial(actor, windows, tapes)
    except (ModelError, NonFiniteLogits, AttributeError, TypeError, ValueError, RuntimeError, LookupError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"the embedded engine cannot serve {name}: {reason[:200]}") from error
    if not gap <= _GAP[actor.model.dtype]:
        raise ModelError(
            f"the embedded engine cannot serve {name}: on trial its log-probabilities are off by {gap:.2g} nats"
        )
    return windows


def _windows(config: Any) -> tuple[int | None, ...]:
    """Read off the configuration how far each layer looks back; refuse layers that keep anything but keys and values."""
    kinds = {kind for kind in _rope_kinds(config) if kind in ("dynamic", "longrope")}
    if kinds:
        raise ModelError(f"its {min(kinds)} rotary positions depend on the longest text in the batch")
    if getattr(config, "attention_chunk_size", None) is not None:
        raise ModelError("its attention is cut into chunks")
    found: list[int | None] = []
    for layer in DynamicCache(config=config).layers:
        if type(layer) is DynamicSlidingWindowLayer:
            found.append(int(layer.sliding_window))
        elif type(layer) is DynamicLayer:
            found.append(None)
        else:
            raise ModelError(f"it has layers that are not plain attention ({type(layer).__name__})")
    return tuple(found)


def _rope_kinds(config: Any) -> list[str]:
    """Every kind of rotary positions in use: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [value for value in parameters.values() if isinstance(value, dict)]
    return [str(one.get("rope_type")) for one in (parameters, *each)]


def _trial(actor: CausalModel, windows: tuple[int | None, ...], tapes: Tapes | None) -> float:
    """The largest difference between the engine's log-probs of random texts and those of a plain forward, nats."""
    draws = generator(0, "engine-trial")
    vocabulary = actor.model.get_input_embeddings().weight.shape[0]
    prompts = [torch.from_numpy(draws.integers(0, vocabulary, size=n)) for n in (2, 7, 7, 1, 4)]
    prompts.append(prompts[1])
    settings = SamplingSettings(max_new_tokens=4, rows=3)
    engine = EmbeddedSampler(actor, windows, (), tapes=tapes)
    answers = engine(prompts, uniforms(0, "engine-trial", 1, range(len(prompts)), 4), settings)
    gap = 0.0
    with torch.no_grad():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids = torch.cat([prompt, answer.ids]).to(actor.device)
            columns = torch.arange(len(prompt) - 1, len(ids) - 1, device=actor.device)
            states = actor.states(ids[None], torch.zeros_like(columns), columns)
            logp, _ = actor.logprobs(states.features, ids[columns + 1], with_entropy=False)
            gap = max(gap, float((logp.cpu() - answer.logp).abs().max()))
    return gap
