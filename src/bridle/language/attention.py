"""Causal attention of narrow heads on a CPU, with its own backward pass.

Products with a side of eight or so run at a fifth of their rate unless the narrow side is laid across: so a head's queries,
keys, values and their gradients lie as ``[width, tokens]``. The query heads that share a key head lie side by side, which
repeats no key. Queries go in blocks, each over the keys up to its end: little more than the lower triangle is computed.

Models reach it through transformers' ``AttentionInterface``. What it does not do (masks, windows, dropout, caps) goes on to
PyTorch's own attention, which is its oracle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["attend_narrowly", "narrow_attention"]

_NAME = "bridle_narrow"
_WIDEST = 8
"""Heads up to this width: here it takes half the time of PyTorch's attention, at 12 as long, at 16 longer (docs/LOG.md)."""
_BLOCK = 32
"""Queries of a head that are computed together."""


def narrow_attention(
    query: Float[Tensor, "B H L D"], key: Float[Tensor, "B h L D"], value: Float[Tensor, "B h L D"], *, scale: float
) -> Float[Tensor, "B L H D"]:
    """Return softmax(scale · QKᵀ) V where token i sees tokens 0 … i, differentiable once.

    Args:
        query: [B, H, L, D] of H heads; head i reads key head ⌊i h/H⌋.
        key: [B, h, L, D], H a multiple of h.
        value: [B, h, L, D].
        scale: factor on the scores.

    Returns:
        [B, L, H, D], in value's dtype; half-precision inputs are computed in float32.

    The weights are computed again on the way back, so nothing of size L² is kept.

    Source: Dao et al. 2022 (FlashAttention), appendix B.2, for the gradient.
    """
    return cast("Tensor", _Narrow.apply(query, key, value, scale))  # type: ignore[no-untyped-call]


class _Narrow(torch.autograd.Function):
    """Everything is laid across, keys and values [B · h, D, L]: products are then made along the long side."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "B H L D"],
        key: Float[Tensor, "B h L D"],
        value: Float[Tensor, "B h L D"],
        scale: float,
    ) -> Float[Tensor, "B L H D"]:
        heads, length, group = query.shape[1], query.shape[2], query.shape[1] // key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            queries, keys, values = _across(query).mul_(scale), _across(key), _across(value)
            found = torch.empty_like(queries)
            for block in _blocks(length):
                weights = _weights(_folded(queries, group, block), keys[:, :, : block.stop], group)
                _unfold(torch.bmm(values[:, :, : block.stop], weights.transpose(1, 2)), found, group, block)
            answer = _along(found, heads)
        ctx.scale, ctx.group, ctx.dtypes = scale, group, (query.dtype, key.dtype, value.dtype)
        ctx.save_for_backward(queries, keys, values, answer)
        return answer.to(value.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Float[Tensor, "B L H D"]) -> tuple[Tensor, Tensor, Tensor, None]:
        """With P the weights, O = PV and dO = slope: dV = Pᵀ dO, dS = P ∘ (dO Vᵀ − rowsum(dO ∘ O)), dQ = dS K, dK = dSᵀ Q."""
        queries, keys, values, answer = ctx.saved_tensors
        (_, length, heads, width), group = slope.shape, ctx.group
        with torch.autocast(slope.device.type, enabled=False):
            # a row of ones below the values: dO Vᵀ takes on the way what is subtracted from it
            values = torch.cat([values, values.new_ones(len(values), 1, length)], dim=1)
            slopes = queries.new_empty(len(queries), width + 1, length)
            slopes[:, :width] = _across(slope.transpose(1, 2))
            slopes[:, width] = -(slope * answer).sum(-1).transpose(1, 2).flatten(0, 1)
            query_grad, key_grad, value_grad = torch.empty_like(queries), torch.zeros_like(keys), torch.zeros_like(keys)
            for block in _blocks(length):
                past = (slice(None), slice(None), slice(block.stop))
                own, down = _folded(queries, group, block), _folded(slopes, group, block)
                weights = _weights(own, keys[past], group)
                value_grad[past] += torch.bmm(down[:, :width], weights)
                scores = torch.bmm(down.transpose(1, 2), values[past]).mul_(weights)
                key_grad[past] += torch.bmm(own, scores)
                _unfold(torch.bmm(keys[past], scores.transpose(1, 2)), query_grad, group, block)
            few = heads // group
            grads = (_along(query_grad.mul_(ctx.scale), heads), _along(key_grad, few), _along(value_grad, few))
        given = [grad.transpose(1, 2).to(dtype) for grad, dtype in zip(grads, ctx.dtypes, strict=True)]
        return given[0], given[1], given[2], None


def _blocks(length: int) -> Iterator[slice]:
    for start in range(0, length, _BLOCK):
        yield slice(start, min(start + _BLOCK, length))


def _weights(queries: Float[Tensor, "c D n"], keys: Float[Tensor, "c D k"], group: int) -> Float[Tensor, "c n k"]:
    """How much the last n/group of k tokens read of each, for each head of a group; rows sum to 1."""
    scores = torch.bmm(queries.transpose(1, 2), keys)
    count, stop = scores.shape[1] // group, scores.shape[2]
    future = torch.full((count, count), -math.inf, dtype=scores.dtype, device=scores.device).triu_(1)
    scores.view(-1, group, count, stop)[..., stop - count :] += future
    return torch.softmax(scores, dim=-1)


def _across(x: Float[Tensor, "B H L D"]) -> Float[Tensor, "b D L"]:
    """[B · H, D, L], in float32 or wider."""
    batch, heads, length, width = x.shape
    laid = x.new_empty(batch, heads * width, length, dtype=torch.promote_types(x.dtype, torch.float32))
    laid.copy_(x.transpose(1, 2).flatten(2).transpose(1, 2))
    return laid.view(batch * heads, width, length)


def _along(x: Float[Tensor, "b D L"], heads: int) -> Float[Tensor, "B L H D"]:
    """Lay back what lies across."""
    _, width, length = x.shape
    laid = x.view(-1, heads * width, length).transpose(1, 2).contiguous()
    return laid.view(*laid.shape[:2], heads, width)


def _folded(x: Float[Tensor, "b E L"], group: int, block: slice) -> Float[Tensor, "c E n"]:
    """Lay a block of the query heads that read the same key head side by side: c = b / group, n = group · block."""
    if group == 1:
        return x[:, :, block]
    _, width, length = x.shape
    return x.view(-1, group, width, length)[..., block].transpose(1, 2).flatten(2)


def _unfold(x: Float[Tensor, "c D n"], into: Float[Tensor, "b D L"], group: int, block: slice) -> None:
    """Lay what :func:`_folded` has folded back into its place."""
    _, width, length = into.shape
    place = into.view(-1, group, width, length)[..., block].transpose(1, 2)
    place.copy_(x.view(place.shape))


def attend_narrowly(model: PreTrainedModel) -> PreTrainedModel:
    """Let a model's narrow heads attend as here while it is on a CPU, and return it; others stay as they are."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if width <= _WIDEST and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(_NAME)
    return model


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks its attention functions to, here or by PyTorch's own."""
    shapes = query.shape[2] == key.shape[2] > 1 and value.shape == key.shape and query.shape[3] == key.shape[3]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    extra = any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias", "cache"))
    here = query.device.type == "cpu" and dropout == 0.0
    if attention_mask is None and here and causal and shapes and not extra:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return narrow_attention(query, key, value, scale=scale), None
    found, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **more
    )
    return cast("Tensor", found), None


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, sdpa_mask)
