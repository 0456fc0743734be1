"""Means, variances, whitening and running moments, over what a mask keeps.

Variances are population variances (divided by n). What a tensor holds where the mask is False, NaN included, has no
influence. Half-precision inputs are computed and returned in float32, float64 stays float64. The mean and the variance
of nothing are NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.core._checks import at_least_float32, check_bool, check_range, check_same_shape

__all__ = ["Moments", "masked_mean", "masked_var", "whiten"]


def masked_mean(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None, dim: int | tuple[int, ...] | None = None
) -> Float[Tensor, "*rest"]:
    """Return the mean of the elements that count.

        mean = Σ x / n

    Args:
        x: any shape.
        mask: the shape of x, True where an element counts; all of them by default.
        dim: dimension or dimensions to reduce; all of them by default.

    Returns:
        x's shape without ``dim``; NaN where nothing counts.

    Raises:
        ValueError: the mask is not bool or not of x's shape.

    Source: the definition.
    """
    total, count = _sum_and_count(x, mask, dim)
    return total / count


def masked_var(
    x: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None = None, dim: int | tuple[int, ...] | None = None
) -> Float[Tensor, "*rest"]:
    """Return the population variance of the elements that count; exactly 0 for a constant.

        var = Σ (x − mean)² / n

    Args:
        x: any shape.
        mask: the shape of x, True where an element counts; all of them by default.
        dim: dimension or dimensions to reduce; all of them by default.

    Returns:
        x's shape without ``dim``, in squared units of x; NaN where nothing counts.

    Raises:
        ValueError: the mask is not bool or not of x's shape.

    Source: the definition, by the two-pass algorithm.
    """
    if x.numel() == 0:
        return masked_mean(x, mask, dim)
    check_same_shape("x", x, mask=mask)
    check_bool(mask=mask)
    x = x.to(at_least_float32(x))
    # Measured from an element, a constant is all zeros; measured from its rounded mean it would not be.
    kept = x.detach() if mask is None else x.detach().masked_fill(~mask, math.inf)
    x = x - kept.amin(() if dim is None else dim, keepdim=True)
    total, count = _sum_and_count(x, mask, dim, keepdim=True)
    return masked_mean((x - total / count).square(), mask, dim)


def whiten(
    x: Float[Tensor, "*shape"],
    mask: Bool[Tensor, "*shape"] | None = None,
    *,
    dim: int | None = None,
    shift: bool = True,
) -> Float[Tensor, "*shape"]:
    """Scale x to population variance 1 and, if ``shift``, to mean 0.

        y = (x − mean)/σ, plus the mean again if not ``shift``

    There is no ε: any spread, however small or large, is scaled to 1. Without spread (one element, or a constant) y is
    0, or x if not ``shift``.

    Args:
        x: any shape.
        mask: the shape of x, True where an element counts; all of them by default.
        dim: dimension along which mean and σ are taken, apart for each place in the others; over all of x by default.
        shift: False keeps the mean, and with it the sign of what is far from 0.

    Returns:
        x's shape, without unit; 0 where masked out.

    Raises:
        ValueError: the mask is not bool or not of x's shape.

    Source: the definition.
    """
    check_same_shape("x", x, mask=mask)
    check_bool(mask=mask)
    x = x.to(at_least_float32(x))
    if x.numel() == 0:
        return x
    if mask is None:
        return _whiten_all(x, dim, shift=shift)
    counts, over = mask, () if dim is None else dim
    low = x.masked_fill(~counts, math.inf).amin(over, keepdim=True)
    spread = x.masked_fill(~counts, -math.inf).amax(over, keepdim=True) - low
    # In units of the spread, from the lowest: squares neither overflow nor vanish, and a constant is all zeros.
    place = torch.where(counts & (spread > 0.0), (x - low) / spread, 0.0)
    total, count = _sum_and_count(place, counts, dim, keepdim=True)
    mean = total / count
    centred = place - mean
    squares, count = _sum_and_count(centred.square(), counts, dim, keepdim=True)
    white = torch.where(spread > 0.0, centred / (squares / count).sqrt(), 0.0)
    return torch.where(counts, white if shift else white + (low + mean * spread), 0.0)


def _whiten_all(x: Tensor, dim: int | None, *, shift: bool) -> Tensor:
    """Return :func:`whiten` where every element counts, in fewer calls: small minibatches are whitened often."""
    if dim is None:
        return _whiten_all(x.reshape(-1), 0, shift=shift).view_as(x)
    low, high = torch.aminmax(x, dim=dim, keepdim=True)
    spread = high - low
    some = spread > 0.0
    place = (x - low) / torch.where(some, spread, 1.0)
    variance, mean = torch.var_mean(place, dim=dim, correction=0, keepdim=True)
    white = (place - mean) / torch.where(some, variance, 1.0).sqrt()
    return white if shift else white + (low + mean * spread)


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Count, mean and sum of squared deviations of all samples so far, kept in float64."""

    count: Float[Tensor, ""]
    """[] n, samples so far."""
    mean: Float[Tensor, "*shape"]
    """[*shape] mean of each feature, in its unit; 0 before any sample."""
    m2: Float[Tensor, "*shape"]
    """[*shape] Σ (x − mean)² of each feature, in its squared unit."""
    _scale: Float[Tensor, "*shape"] = field(init=False, repr=False, compare=False)
    """[*shape] what :meth:`standardise` divides by, found once."""

    def __post_init__(self) -> None:
        """Refuse a count that is not one number, and moments of different shapes."""
        if self.count.ndim != 0:
            raise ValueError(f"count has shape {tuple(self.count.shape)}, expected ()")
        check_same_shape("mean", self.mean, m2=self.m2)
        deviation = self.deviation
        object.__setattr__(self, "_scale", torch.where(deviation > 0.0, deviation, 1.0))

    @classmethod
    def empty(cls, shape: tuple[int, ...] = (), *, device: torch.device | str | None = None) -> Moments:
        """Return the moments of no samples, each sample of ``shape``: () for single numbers, (D,) for D features."""
        zero = torch.zeros(shape, dtype=torch.float64, device=device)
        return cls(count=torch.zeros((), dtype=torch.float64, device=device), mean=zero, m2=zero.clone())

    @torch.no_grad()
    def updated(self, x: Float[Tensor, ...], mask: Bool[Tensor, ...] | None = None) -> Moments:
        """Return the moments of the samples so far and those in x together.

            δ = mean_x − mean;   mean ← mean + δ n_x/(n + n_x);   m2 ← m2 + m2_x + δ² n n_x/(n + n_x)

        Args:
            x: [*samples, *shape] with any number of leading dimensions; all of them count samples.
            mask: [*samples] True where a sample counts; all of them by default.

        Returns:
            New moments; equal ones if no sample counts.

        Raises:
            ValueError: x does not end in the moments' shape, or the mask is not bool or not [*samples].

        Source: Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample Variances"
        (STAN-CS-79-773), §2, the general formula; taken up in their "Algorithms for Computing the Sample Variance", 1983.
        """
        shape = self.mean.shape
        leading = x.ndim - len(shape)
        if leading < 0 or x.shape[leading:] != shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected it to end in the moments' shape {tuple(shape)}")
        if mask is not None and mask.shape != x.shape[:leading]:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, expected {tuple(x.shape[:leading])}")
        check_bool(mask=mask)
        samples = x.reshape(-1, *shape) if mask is None else x[mask]
        if samples.shape[0] == 0:
            return self
        samples = samples.to(self.mean)
        mean = samples.mean(0)
        n, total = samples.shape[0], self.count + samples.shape[0]
        delta = mean - self.mean
        return Moments(
            count=total,
            mean=self.mean + delta * (n / total),
            m2=self.m2 + (samples - mean).square().sum(0) + delta.square() * (self.count * n / total),
        )

    @property
    def variance(self) -> Float[Tensor, "*shape"]:
        """[*shape] population variance of each feature, in its squared unit; 0 before any sample."""
        return self.m2 / self.count.clamp(min=1.0)

    @property
    def deviation(self) -> Float[Tensor, "*shape"]:
        """[*shape] standard deviation of each feature, in its unit; 0 before any sample."""
        return self.variance.sqrt()

    def standardise(
        self, x: Float[Tensor, ...], *, shift: bool = True, bound: float | None = None
    ) -> Float[Tensor, ...]:
        """Return x in deviations from the mean so far.

            y = clamp((x − mean)/σ, −bound, bound);   without ``shift``: clamp(x/σ, …)

        A feature without spread so far is not divided (σ counts as 1).

        Args:
            x: [*samples, *shape].
            shift: False leaves the mean where it is, so that signs stay, as for rewards.
            bound: > 0, in deviations; none by default.

        Returns:
            x's shape, without unit; at least float32.

        Raises:
            ValueError: x does not end in the moments' shape, or the bound is out of range.

        Source: the definition; for rewards without the mean, Engstrom et al. 2020 (arXiv:2005.12729), §3.
        """
        if bound is not None:
            check_range("bound", bound, 0.0, math.inf, closed=False)
        shape = self.mean.shape
        if x.ndim < len(shape) or x.shape[x.ndim - len(shape) :] != shape:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected it to end in the moments' shape {tuple(shape)}")
        exact = x.to(self.mean.dtype)
        y = (exact - self.mean if shift else exact) / self._scale
        return (y if bound is None else y.clamp(-bound, bound)).to(at_least_float32(x))


def _sum_and_count(
    x: Tensor, mask: Tensor | None, dim: int | tuple[int, ...] | None, *, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    """Return Σ x over what counts, at least float32, and how many that are, in x's device and precision."""
    check_same_shape("x", x, mask=mask)
    check_bool(mask=mask)
    dims = tuple(range(x.ndim)) if dim is None else dim
    x = x.to(at_least_float32(x))
    if mask is None:
        shape = [x.shape[d] for d in ((dims,) if isinstance(dims, int) else dims)]
        return x.sum(dims, keepdim=keepdim), x.new_tensor(math.prod(shape))
    return x.masked_fill(~mask, 0.0).sum(dims, keepdim=keepdim), mask.sum(dims, keepdim=keepdim).to(x.dtype)
