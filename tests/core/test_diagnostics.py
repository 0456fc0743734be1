"""Laws of the diagnostics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bridle.core.diagnostics import (
    clip_fraction,
    effective_sample_size,
    explained_variance,
    log_prob_gap,
    ratio_extremes,
)
from bridle.core.losses import clipped_surrogate_loss
from tests.core import oracles
from tests.core.cases import coin, normal


def f64(*xs: float) -> Tensor:
    return torch.tensor(xs, dtype=torch.float64)


def same(a: Tensor | float, b: float, tolerance: float = 1e-12) -> None:
    assert float(a) == pytest.approx(b, rel=tolerance, abs=tolerance)


def some(seed: int, n: int) -> Tensor:
    """A mask of n with at least two True."""
    mask = coin(seed, n)
    mask[:2] = True
    return mask


# ---- explained variance --------------------------------------------------------------------------------------------


def test_explained_variance_by_hand() -> None:
    g = f64(1.0, 2.0, 3.0)  # Var = ⅔
    same(explained_variance(g, g), 1.0)
    same(explained_variance(g + 5, g), 1.0)  # a constant error is not variance
    same(explained_variance(f64(2.0, 2.0, 2.0), g), 0.0)
    same(explained_variance(f64(1.0, 2.0, 2.0), g), 1 - (2 / 9) / (2 / 3))
    same(explained_variance(-g, g), -3.0)


def test_explained_variance_of_a_constant_return_is_undefined() -> None:
    assert math.isnan(explained_variance(f64(1.0, 2.0), f64(3.0, 3.0)))
    assert math.isnan(explained_variance(f64(1.0), f64(3.0)))
    equal = torch.full((8,), 1.0)
    rounded = equal.clone()
    rounded[::2] = torch.nextafter(equal, torch.tensor(2.0))[::2]  # what an advantage and a value give that add up to 1
    assert math.isnan(explained_variance(torch.linspace(0, 1, 8), rounded))
    same(explained_variance(0 * equal, 1.0 + 1e-5 * torch.arange(8.0)), 0.0)  # small is not rounding
    assert math.isnan(explained_variance(f64(1.0, 2.0, 3.0), f64(0.1, 0.1, 9.0), torch.tensor([True, True, False])))


# ---- clip fraction -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "cut"),
    [(1.5, 1.0, 1.0), (0.5, 1.0, 0.0), (1.5, -1.0, 0.0), (0.5, -1.0, 1.0), (1.1, 1.0, 0.0), (0.9, -1.0, 0.0)],
)
def test_clip_fraction_by_hand(ratio: float, advantage: float, cut: float) -> None:
    same(clip_fraction(f64(ratio), f64(advantage), clip=0.2), cut)


def test_clip_fraction_with_asymmetric_range() -> None:
    ratio, a = f64(1.25, 1.35, 0.85, 0.75), f64(1.0, 1.0, -1.0, -1.0)
    same(clip_fraction(ratio, a, clip=0.2, clip_high=0.3), 0.5)
    same(clip_fraction(ratio, a, clip=0.3, clip_high=0.2), 0.5)
    same(clip_fraction(ratio, a, clip=0.1, clip_high=0.5), 0.5)
    same(clip_fraction(ratio, a, clip=0.1), 1.0)
    same(clip_fraction(ratio, a, clip=0.1, mask=torch.tensor([False, False, False, True])), 1.0)


def test_clip_fraction_counts_the_actions_without_a_gradient() -> None:
    logp, old, a = normal(1, 400).requires_grad_(), normal(2, 400), normal(3, 400)
    (grad,) = torch.autograd.grad(clipped_surrogate_loss(logp, old, a, clip=0.3, clip_high=0.5).sum(), logp)
    dead = (grad == 0).double().mean().item()
    same(clip_fraction((logp - old).exp().detach(), a, clip=0.3, clip_high=0.5), dead)


# ---- ratios --------------------------------------------------------------------------------------------------------


def test_ratio_extremes_by_hand() -> None:
    low, high = ratio_extremes(f64(0.5, 2.0, 1.0))
    same(low, 0.5)
    same(high, 2.0)
    low, high = ratio_extremes(f64(0.5, 2.0, 1.0), torch.tensor([False, False, True]))
    same(low, 1.0)
    same(high, 1.0)


def test_effective_sample_size_by_hand() -> None:
    same(effective_sample_size(f64(1.0, 1.0, 1.0, 1.0)), 1.0)
    same(effective_sample_size(f64(1.0, 0.0, 0.0, 0.0)), 0.25)
    same(effective_sample_size(f64(1.0, 3.0)), 16 / 20)
    same(effective_sample_size(f64(1.0, 3.0, 100.0), torch.tensor([True, True, False])), 16 / 20)


def test_effective_sample_size_does_not_know_the_scale_of_the_weights() -> None:
    r = normal(4, 50).exp()
    same(effective_sample_size(7 * r), effective_sample_size(r).item())
    for magnitude in (1e-30, 1e30):
        same(effective_sample_size(torch.tensor([1.0, 3.0]) * magnitude), 0.8, 1e-6)


# ---- the gap between two log-probs ---------------------------------------------------------------------------------


def test_log_prob_gap_by_hand() -> None:
    b = normal(5, 101)
    sign = torch.where(coin(5, 101, share=0.5), 1.0, -1.0)
    gap = log_prob_gap(b + sign * torch.arange(101).double() / 100, b)
    same(gap.mean, 0.5)
    same(gap.p99, 0.99)
    same(gap.maximum, 1.0)


def test_log_prob_gap_of_one() -> None:
    gap = log_prob_gap(f64(-1.0), f64(-3.0))
    for x in (gap.mean, gap.p99, gap.maximum):
        same(x, 2.0)


# ---- all of them ---------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 999), n=st.integers(2, 30))
def test_equal_the_oracles_under_any_mask_with_any_garbage(seed: int, n: int) -> None:
    x, y, mask = normal(seed, n), normal(seed + 1, n), some(seed, n)
    r = x.exp()
    junk = f64(math.nan, math.inf, -math.inf)[torch.arange(n) % 3]
    m = mask.tolist()
    ev = oracles.explained_variance(x.tolist(), y.tolist(), m)
    clipped = oracles.clip_fraction(r.tolist(), y.tolist(), 0.2, 0.4, m)
    ess = oracles.effective_sample_size(r.tolist(), m)
    gaps = [abs(a - b) for a, b in zip(oracles.kept(x.tolist(), m), oracles.kept(y.tolist(), m), strict=True)]
    for p, q, w in ((x, y, r), tuple(torch.where(mask, t, junk) for t in (x, y, r))):
        same(explained_variance(p, q, mask), ev, 1e-10)
        same(clip_fraction(w, q, clip=0.2, clip_high=0.4, mask=mask), clipped)
        same(effective_sample_size(w, mask), ess)
        low, high = ratio_extremes(w, mask)
        same(low, min(oracles.kept(r.tolist(), m)))
        same(high, max(oracles.kept(r.tolist(), m)))
        gap = log_prob_gap(p, q, mask)
        same(gap.mean, oracles.mean(gaps))
        same(gap.p99, oracles.quantile(gaps, 0.99))
        same(gap.maximum, max(gaps))


def test_no_mask_is_a_full_mask() -> None:
    x, y = normal(6, 20), normal(7, 20)
    full = torch.ones(20, dtype=torch.bool)
    same(explained_variance(x, y), explained_variance(x, y, full).item())
    same(clip_fraction(x.exp(), y, clip=0.2), clip_fraction(x.exp(), y, clip=0.2, mask=full).item())
    same(effective_sample_size(x.exp()), effective_sample_size(x.exp(), full).item())


def test_over_nothing_everything_is_undefined_and_nothing_raises() -> None:
    x, nothing = normal(11, 5), torch.zeros(5, dtype=torch.bool)
    gap = log_prob_gap(x, x, nothing)
    undefined = [
        explained_variance(x, x, nothing),
        clip_fraction(x, x, clip=0.2, mask=nothing),
        effective_sample_size(x, nothing),
        *ratio_extremes(x, nothing),
        *(gap.mean, gap.p99, gap.maximum),
    ]
    assert all(math.isnan(u) for u in undefined)


def test_diagnostics_carry_no_graph() -> None:
    x = normal(8, 20).requires_grad_()
    y = normal(9, 20)
    assert not explained_variance(x, y).requires_grad
    assert not clip_fraction(x.exp(), y, clip=0.2).requires_grad
    assert not effective_sample_size(x.exp()).requires_grad
    assert not any(t.requires_grad for t in ratio_extremes(x.exp()))


@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_disagree_are_refused() -> None:
    x, mask = normal(10, 6), some(10, 6)
    for bad in (x[:5], x[:1]):
        with pytest.raises(ValueError, match="shape"):
            explained_variance(x, bad)
        with pytest.raises(ValueError, match="shape"):
            clip_fraction(x, bad, clip=0.2)
        with pytest.raises(ValueError, match="shape"):
            log_prob_gap(x, bad)
    for bad in (mask[:5], mask[:1]):
        for call in (
            lambda m: explained_variance(x, x, m),
            lambda m: clip_fraction(x, x, clip=0.2, mask=m),
            lambda m: ratio_extremes(x, m),
            lambda m: effective_sample_size(x, m),
            lambda m: log_prob_gap(x, x, m),
        ):
            with pytest.raises(ValueError, match="shape"):
                call(bad)


@pytest.mark.parametrize("settings", [{"clip": -0.1}, {"clip": math.nan}, {"clip": 0.2, "clip_high": -0.1}])
def test_clip_out_of_range_is_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="clip"):
        clip_fraction(f64(1.0), f64(1.0), **settings)
