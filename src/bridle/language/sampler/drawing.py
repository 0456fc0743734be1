"""Drawing tokens: inverse CDF, plain and in blocks, and what cutting off the tail does to a distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from bridle.guards import is_plain
from bridle.language import decoding
from bridle.language.causal import CausalModel
from bridle.language.decoding import Choice
from bridle.language.sampler.products import projection
from bridle.language.sampler.protocol import SamplingSettings

__all__ = ["LARGEST_UNIFORM", "Chooser", "blocked_inverse_cdf", "chooser", "draw", "inverse_cdf", "warp"]

Chooser = Callable[[Tensor, NDArray[np.int64], NDArray[np.float32]], tuple[Tensor, Tensor, Tensor]]
"""(features [m, F], picks [n], uniforms [n]) → what :func:`draw` returns, token i drawn from features ``picks[i]``."""

LARGEST_UNIFORM = 1.0 - 2.0**-23
"""The largest float32 whose product with a float32 total stays below that total."""

_BLOCK = 128
_PIECE = 2**22
"""Logits drawn from at once: beyond that rows are taken in parts, since much larger arrays are new memory every time."""
_SMALL = 2048
"""Below this vocabulary one cumulative sum is faster than a dozen operations on blocks."""


def chooser(actor: CausalModel, settings: SamplingSettings, steps: int) -> Chooser:
    """Return what draws tokens of ``actor`` for so many steps, while its weights stay: compiled where that is served."""
    packed = _packed_choice(actor, settings)
    if packed is not None:

        def compiled(
            features: Tensor, picks: NDArray[np.int64], uniforms: NDArray[np.float32]
        ) -> tuple[Tensor, Tensor, Tensor]:
            token, logp = packed.draw(features.float(), picks, uniforms)
            return token, logp, logp

        return compiled
    project = projection(actor, steps)

    def plain(
        features: Tensor, picks: NDArray[np.int64], uniforms: NDArray[np.float32]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = project(features)
        if len(picks) != len(logits) or (picks != np.arange(len(picks))).any():
            logits = logits[torch.from_numpy(picks).to(logits.device)]
        return draw(logits, torch.from_numpy(uniforms).to(logits.device), settings)

    return plain


def _packed_choice(actor: CausalModel, settings: SamplingSettings) -> Choice | None:
    """The compiled head, of float32 as the trainer's; None where weights are others, logits capped or the distribution cut."""
    if actor.form is None or actor.form.softcap is not None or settings.warped or decoding.library is None:
        return None
    head = actor.head()
    if not is_plain(head.weight) or not (head.bias is None or is_plain(head.bias)):
        return None
    return Choice(head, temperature=settings.temperature)


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
