"""Drawing tokens: inverse CDF, plain and in blocks, and what cutting off the tail does to a distribution."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.language.sampler.protocol import SamplingSettings

__all__ = ["LARGEST_UNIFORM", "blocked_inverse_cdf", "draw", "inverse_cdf", "warp"]

LARGEST_UNIFORM = 1.0 - 2.0**-23
"""The largest float32 whose product with a float32 total stays below that total."""

_BLOCK = 128
_PIECE = 2**22
"""Logits drawn from at once: beyond that rows are taken in parts, since much larger arrays are new memory every time."""
_SMALL = 2048
"""Below this vocabulary one cumulative sum is faster than a dozen operations on blocks."""


def draw(
    logits: Float[Tensor, "b V"], uniform: Float[Tensor, " b"], settings: SamplingSettings
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Draw a token per row; also its log-prob as drawn, and its log-prob under softmax(z/τ), both in nats.

    Args:
        logits: z, in float32.
        uniform: draws in [0, ``LARGEST_UNIFORM``].
        settings: τ, and the cuts if any.
    """
    if logits.numel() > _PIECE and len(logits) > 1:
        rows = max(1, _PIECE // logits.shape[1])
        starts = range(0, len(logits), rows)
        parts = [draw(logits[i : i + rows], uniform[i : i + rows], settings) for i in starts]
        token, logp, plain = (torch.cat(column) for column in zip(*parts, strict=True))
        return token, logp, plain
    scaled = logits if settings.temperature == 1.0 else logits / settings.temperature
    if not settings.warped:
        token, logp = blocked_inverse_cdf(scaled, uniform)
        return token, logp, logp
    token, logp = inverse_cdf(warp(scaled, settings), uniform)
    plain = scaled.gather(1, token[:, None])[:, 0] - scaled.logsumexp(-1)
    return token, logp, plain


def inverse_cdf(
    logits: Float[Tensor, "b V"], uniform: Float[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """Draw from softmax(logits): the first token whose cumulative probability exceeds ``uniform``, with its log-probability.

    A token of probability 0 is never drawn: the cumulative sum does not grow there.
    """
    logp = torch.log_softmax(logits, dim=-1)
    cumulative = logp.exp().cumsum_(dim=-1)
    threshold = uniform[:, None] * cumulative[:, -1:]
    token = torch.searchsorted(cumulative, threshold, right=True).clamp_(max=logits.shape[-1] - 1)
    return token[:, 0], logp.gather(1, token)[:, 0]


def blocked_inverse_cdf(
    logits: Float[Tensor, "b V"], uniform: Float[Tensor, " b"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, " b"]]:
    """Draw as :func:`inverse_cdf` does, up to rounding at the boundaries, in a third of the time of a large vocabulary.

    One cumulative sum over the blocks' totals finds the block, another inside it the token; V numbers are only summed.
    """
    rows, size = logits.shape
    if size < _SMALL:
        return inverse_cdf(logits, uniform)
    blocks = size // _BLOCK
    p = torch.softmax(logits, dim=-1)
    totals = p[:, : blocks * _BLOCK].view(rows, blocks, _BLOCK).sum(-1)
    if size % _BLOCK:
        totals = torch.cat([totals, p[:, blocks * _BLOCK :].sum(-1, keepdim=True)], dim=-1)
    reached = totals.cumsum(-1)
    threshold = uniform[:, None] * reached[:, -1:]
    block = torch.searchsorted(reached, threshold, right=True).clamp_(max=totals.shape[-1] - 1)
    rest = threshold - (reached.gather(1, block) - totals.gather(1, block))
    places = block * _BLOCK + torch.arange(_BLOCK, device=logits.device)
    inside = p.gather(1, places.clamp(max=size - 1)).masked_fill_(places >= size, 0.0)
    cumulative = inside.cumsum(-1)
    # rounding can put `rest` at or beyond the block's own total: stay on the last token that has probability
    rest = torch.minimum(rest, cumulative[:, -1:] * LARGEST_UNIFORM)
    token = block * _BLOCK + torch.searchsorted(cumulative, rest, right=True).clamp_(max=_BLOCK - 1)
    return token[:, 0], p.gather(1, token)[:, 0].log()


def warp(logits: Float[Tensor, "b V"], settings: SamplingSettings) -> Float[Tensor, "b V"]:
    """Put −∞ on the tokens that top-k, then top-p, then min-p cut off; softmax of what is left is drawn from.

    top-k keeps every token at least as likely as the k-th; top-p (Holtzman et al. 2020) the smallest set of
    likeliest tokens that holds a share p of what top-k left; min-p (Nguyen et al. 2024, arXiv:2407.01082) those
    with a probability of at least p times the largest. The likeliest token always stays.
    """
    if settings.top_k is not None and settings.top_k < logits.shape[-1]:
        least = logits.topk(settings.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    if settings.top_p is not None and settings.top_p < 1.0:
        ordered, places = logits.sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(ordered, dim=-1)
        before = p.cumsum(-1) - p
        cut = before >= settings.top_p
        cut[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(cut).scatter(1, places, cut), float("-inf"))
    if settings.min_p is not None:
        least = logits.amax(-1, keepdim=True) + torch.log(torch.tensor(settings.min_p, device=logits.device))
        logits = logits.masked_fill(logits < least, float("-inf"))
    return logits
