"""Numbers that tell whether training is healthy; none of them carries a gradient.

What the tensors hold where ``mask`` is False has no influence. What is undefined (over nothing, say) is NaN, never an
error: a diagnostic must not stop a run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.core._checks import at_least_float32, check_bool, check_range, check_same_shape
from bridle.core.moments import masked_mean, masked_var

__all__ = [
    "LogProbGap",
    "clip_fraction",
    "effective_sample_size",
    "explained_variance",
    "log_prob_gap",
    "ratio_extremes",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbGap:
    """How far two log-probabilities of the same actions are apart."""

    mean: float
    """Mean of |a − b|, nats."""
    p99: float
    """Its 99th percentile, nats, linear between neighbours."""
    maximum: float
    """Its maximum, nats."""


@torch.no_grad()
def explained_variance(
    values: Float[Tensor, "*shape"], returns: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """Return the share of the returns' variance that the critic foresaw.

        EV = 1 − Var(R − V)/Var(R)

    Args:
        values: any shape, V(s), in units of return.
        returns: R, in units of return.
        mask: True where an action counts; all of them by default.

    Returns:
        [] 1 is perfect, 0 no better than a constant, below 0 worse; NaN where Var(R) is 0, or no more than what rounding makes
        of equal returns: (2 ε)² times their mean square, ε the dtype's.

    Raises:
        ValueError: shapes differ, or the mask is not bool.

    Source: the coefficient of determination with the mean error forgiven; as a critic's diagnostic in OpenAI Baselines.
    """
    check_same_shape("values", values, returns=returns, mask=mask)
    check_bool(mask=mask)
    dtype = at_least_float32(values, returns)
    total = masked_var(returns.to(dtype), mask)
    left = masked_var(returns.to(dtype) - values.to(dtype), mask)
    rounding = (2 * torch.finfo(dtype).eps) ** 2 * masked_mean(returns.to(dtype) ** 2, mask)
    return torch.where(total > rounding, 1.0 - left / total, math.nan)


@torch.no_grad()
def clip_fraction(
    ratio: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*shape"],
    *,
    clip: float,
    clip_high: float | None = None,
    mask: Bool[Tensor, "*shape"] | None = None,
) -> Float[Tensor, ""]:
    """Return the share of actions whose gradient PPO's clip has cut: where the clipped term is the smaller one.

        mean of [A > 0 and r > 1 + ε_high] or [A < 0 and r < 1 − ε]

    A ratio outside the range on the other side keeps its gradient and does not count.

    Args:
        ratio: any shape, r = π/π_old.
        advantages: A, in units of return.
        clip: ε ≥ 0.
        clip_high: ε_high ≥ 0 of the upper side; ε by default.
        mask: True where an action counts; all of them by default.

    Returns:
        [] in 0 … 1; NaN over nothing.

    Raises:
        ValueError: shapes differ, the mask is not bool, or a clip is out of range.

    Source: Schulman et al. 2017 (PPO), eq. (7) and figure 1.
    """
    check_same_shape("ratio", ratio, advantages=advantages, mask=mask)
    check_bool(mask=mask)
    high = clip if clip_high is None else clip_high
    check_range("clip", clip, 0.0, math.inf)
    check_range("clip_high", high, 0.0, math.inf)
    cut = ((advantages > 0.0) & (ratio > 1.0 + high)) | ((advantages < 0.0) & (ratio < 1.0 - clip))
    return masked_mean(cut.to(at_least_float32(ratio)), mask)


@torch.no_grad()
def ratio_extremes(
    ratio: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Return the smallest and the largest ratio π/π_old, both NaN over nothing.

    Raises:
        ValueError: the mask is not bool or not of the ratio's shape.

    Source: the definition.
    """
    kept = _kept(ratio, mask)
    if kept.numel() == 0:
        return kept.new_full((), math.nan), kept.new_full((), math.nan)
    low, high = kept.aminmax()
    return low, high


@torch.no_grad()
def effective_sample_size(
    ratio: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> Float[Tensor, ""]:
    """Return how many equally weighted samples the ratios are worth, as a share of their number.

        ESS/N = (Σ r)² / (N Σ r²)

    Args:
        ratio: any shape, importance weights r ≥ 0; their common factor does not matter.
        mask: True where an action counts; all of them by default.

    Returns:
        [] in 1/N … 1; NaN over nothing or where all ratios are 0. Infinite ratios share all of the weight.

    Raises:
        ValueError: the mask is not bool or not of the ratio's shape.

    Source: Kong 1992, "A note on importance sampling using standardized weights".
    """
    kept = _kept(ratio, mask)
    if kept.numel() == 0:
        return kept.new_full((), math.nan)
    top = kept.max()
    weight = torch.where(top == math.inf, (kept == math.inf).to(kept.dtype), kept / top)
    return weight.sum().square() / (kept.numel() * weight.square().sum())


@torch.no_grad()
def log_prob_gap(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None
) -> LogProbGap:
    """Return the mean, 99th percentile and maximum of |a − b|; NaN over nothing.

    Args:
        a: any shape, log-probabilities, nats; equal infinities are 0 apart.
        b: the same actions' log-probabilities from elsewhere, nats.
        mask: True where an action counts; all of them by default.

    Raises:
        ValueError: shapes differ, or the mask is not bool.

    Source: the definition; the percentile is Hyndman & Fan 1996, definition 7.
    """
    check_same_shape("a", a, b=b)
    dtype = at_least_float32(a, b)
    x, y = _kept(a.to(dtype), mask), _kept(b.to(dtype), mask)
    if x.numel() == 0:
        return LogProbGap(mean=math.nan, p99=math.nan, maximum=math.nan)
    gap = (x - y).abs().masked_fill(x == y, 0.0).sort().values
    rank = 0.99 * (gap.numel() - 1)
    below, above = gap[math.floor(rank)], gap[math.ceil(rank)]
    share = rank - math.floor(rank)
    p99 = float(below) if share == 0.0 else float(below + share * (above - below))
    return LogProbGap(mean=float(gap.mean()), p99=p99, maximum=float(gap[-1]))


def _kept(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return what counts, flat and at least float32."""
    check_same_shape("x", x, mask=mask)
    check_bool(mask=mask)
    x = x.to(at_least_float32(x))
    return x.reshape(-1) if mask is None else x[mask]
