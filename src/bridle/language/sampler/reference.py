"""The plain sampler: any Hugging Face causal LM with a key-value cache, one forward per token. The oracle of faster ones."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bridle.errors import NonFiniteLogits
from bridle.language.sampler.drawing import LARGEST_UNIFORM, inverse_cdf, warp
from bridle.language.sampler.protocol import Sampled, SamplingSettings, Stop
from bridle.language.sampler.stopping import Stopping

__all__ = ["ReferenceSampler"]


class ReferenceSampler:
    """Draws answers from ``model`` (weights are the trainer's own, nothing is copied), stopping at ``stop_ids``."""

    def __init__(
        self,
        model: PreTrainedModel,
        stop_ids: Collection[int],
        *,
        computing: Callable[[], AbstractContextManager[None]] = nullcontext,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        """Sample within ``computing()``, which sets the compute dtype; ``decode`` (ids → text) is what stop strings need."""
        self._model = model
        self._computing = computing
        self._text = decode
        self._stops = frozenset(stop_ids)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Int[Tensor, " P"]], uniforms: NDArray[np.float64], settings: SamplingSettings
    ) -> list[Sampled]:
        """Draw one answer per prompt; see :class:`bridle.language.sampler.protocol.Sampler`."""
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]))  # alike lengths decode together
        answers: dict[int, Sampled] = {}
        for start in range(0, len(order), settings.rows):
            chosen = order[start : start + settings.rows]
            with self._computing():
                drawn = self._decode([prompts[b] for b in chosen], uniforms[chosen], settings)
            answers |= dict(zip(chosen, drawn, strict=True))
        return [answers[b] for b in range(len(prompts))]

    def _decode(
        self, prompts: Sequence[Int[Tensor, " P"]], uniforms: NDArray[np.float64], settings: SamplingSettings
    ) -> list[Sampled]:
        device = self._model.device
        draws = torch.from_numpy(uniforms).to(device=device, dtype=torch.float32).clamp_(max=LARGEST_UNIFORM)
        count, limit = len(prompts), settings.max_new_tokens
        ids = torch.zeros(count, limit, dtype=torch.int64, device=device)
        logps = torch.zeros(count, limit, dtype=torch.float32, device=device)
        plain = torch.zeros_like(logps)
        lengths, stops = [limit] * count, [Stop.LENGTH] * count
        watch = Stopping(self._stops, settings.stop_strings, self._text)
        rows = torch.arange(count, device=device)  # the answers still being written
        state = _Decoding(self._model, prompts)
        for t in range(limit):
            scaled = state.logits / settings.temperature
            token, logp = inverse_cdf(warp(scaled, settings), draws[rows, t])
            ids[rows, t], logps[rows, t] = token, logp
            plain[rows, t] = scaled.log_softmax(-1).gather(1, token[:, None])[:, 0] if settings.warped else logp
            ended = watch.ended(rows.tolist(), token.tolist())
            for b, stop in ended.items():
                lengths[b], stops[b] = t + 1, stop
            if ended:
                staying = torch.tensor([b not in ended for b in rows.tolist()], device=device)
                rows, token = rows[staying], token[staying]
                if len(rows) == 0:
                    break
                state.keep(staying)
            if t + 1 < limit:
                state.advance(token)
        if not bool(torch.isfinite(logps).all()):
            raise NonFiniteLogits("the policy's logits are not finite while sampling; its weights have diverged")
        return [
            Sampled(ids=ids[b, :n].cpu(), logp=logps[b, :n].cpu(), plain_logp=plain[b, :n].cpu(), stop=stop)
            for b, (n, stop) in enumerate(zip(lengths, stops, strict=True))
        ]


class _Decoding:
    """The key-value cache of the rows still being written, and the logits of each one's next token."""

    def __init__(self, model: PreTrainedModel, prompts: Sequence[Int[Tensor, " P"]]) -> None:
        self._model = model
        device = model.device
        longest = max(len(p) for p in prompts)
        tokens = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        real = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
        for b, prompt in enumerate(prompts):  # padded on the left, so that every row's next token is in one column
            tokens[b, longest - len(prompt) :] = prompt.to(device)
            real[b, longest - len(prompt) :] = 1
        self._mask = None if bool(real.all()) else real
        self._position = (real.cumsum(1) - 1).clamp(min=0)
        self._cache = DynamicCache(config=model.config)
        self.logits = self._forward(tokens)
        self._position = self._position[:, -1:]

    def advance(self, token: Int[Tensor, " b"]) -> None:
        """Append each row's token and compute the logits of the next one."""
        self._position = self._position + 1
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._mask[:, :1])], dim=1)
        self.logits = self._forward(token[:, None])

    def keep(self, rows: Tensor) -> None:
        """Drop the rows where ``rows`` is False."""
        self._cache.batch_select_indices(rows.nonzero()[:, 0])
        self._position = self._position[rows]
        if self._mask is not None:
            self._mask = self._mask[rows]

    def _forward(self, tokens: Int[Tensor, "b L"]) -> Float[Tensor, "b V"]:
        out = self._model(
            input_ids=tokens,
            attention_mask=self._mask,
            position_ids=self._position,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = out.logits[:, -1]
        return logits.float()
