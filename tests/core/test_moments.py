"""Laws of means, variances, whitening and running moments."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bridle.core.moments import Moments, masked_mean, masked_var, whiten
from tests.core import oracles
from tests.core.cases import coin, normal


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def f64(*xs: float) -> Tensor:
    return torch.tensor(xs, dtype=torch.float64)


def dirty(x: Tensor, mask: Tensor) -> Tensor:
    """The same where the mask is True, NaN and infinities elsewhere."""
    junk = f64(math.nan, math.inf, -math.inf)[torch.arange(x.numel()) % 3].reshape(x.shape).to(x.dtype)
    return torch.where(mask, x, junk)


# ---- mean and variance ---------------------------------------------------------------------------------------------


def test_mean_and_variance_by_hand() -> None:
    x, mask = f64(1.0, 2.0, 3.0, 100.0), torch.tensor([True, True, True, False])
    close(masked_mean(x, mask), f64(2.0)[0])
    close(masked_var(x, mask), f64(2 / 3)[0])  # population: divided by 3, not 2
    close(masked_mean(x), f64(26.5)[0])


def test_mean_and_variance_along_a_dimension() -> None:
    x, mask = normal(1, 4, 6), coin(1, 4, 6)
    mask[:, 0] = True
    mask[0] = True
    for dim in (0, 1, -1):
        columns = zip(x.movedim(dim, -1).tolist(), mask.movedim(dim, -1).tolist(), strict=True)
        want = [(oracles.mean(c, m), oracles.variance(c, m)) for c, m in columns]
        close(masked_mean(dirty(x, mask), mask, dim=dim), f64(*(w[0] for w in want)))
        close(masked_var(dirty(x, mask), mask, dim=dim), f64(*(w[1] for w in want)))
        close(masked_mean(x, dim=dim), x.mean(dim))
        close(masked_var(x, dim=dim), x.var(dim, correction=0))


@given(seed=st.integers(0, 999), n=st.integers(1, 30), offset=st.sampled_from([0.0, 1e3, -1e6]))
def test_mean_and_variance_equal_the_oracle(seed: int, n: int, offset: float) -> None:
    x, mask = normal(seed, n) + offset, coin(seed, n)
    mask[0] = True
    tolerance = 1e-12 + 1e-15 * offset**2  # the square of an offset leaves its rounding behind
    for values in (x, dirty(x, mask)):
        close(masked_mean(values, mask), f64(oracles.mean(x.tolist(), mask.tolist()))[0])
        close(masked_var(values, mask), f64(oracles.variance(x.tolist(), mask.tolist()))[0], min(tolerance, 1e-9))


# ---- whitening -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("n", [2, 3, 100])
def test_whitening_gives_mean_zero_and_population_variance_one(n: int, offset: float) -> None:
    out = whiten(3 * normal(2, n) + offset)
    assert abs(out.mean().item()) < 1e-11
    assert out.var(correction=0).item() == pytest.approx(1.0, rel=1e-10)


def test_whitening_by_hand() -> None:
    r = math.sqrt(1.5)
    close(whiten(f64(1.0, 2.0, 3.0)), f64(-r, 0.0, r))
    close(whiten(f64(1.0, 2.0, 3.0), shift=False), f64(2 - r, 2.0, 2 + r))
    close(whiten(f64(1.0, 5.0)), f64(-1.0, 1.0))


def test_without_shift_the_mean_stays_and_the_variance_is_one() -> None:
    x = 3 * normal(3, 100) + 7
    out = whiten(x, shift=False)
    assert out.mean().item() == pytest.approx(x.mean().item(), rel=1e-12)
    assert out.var(correction=0).item() == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4, 1e-6])
def test_one_element_or_a_constant_becomes_zero(constant: float, dtype: torch.dtype) -> None:
    # 0.1 has no exact mean: a constant must be recognised although x − mean(x) may round to something.
    for n in (1, 3, 7, 1000):
        x = torch.full((n,), constant, dtype=dtype)
        assert (whiten(x) == 0).all()
        assert torch.equal(whiten(x, shift=False), x)
    x = torch.tensor([constant, 5.0, constant], dtype=dtype)
    mask = torch.tensor([True, False, True])
    assert (whiten(x, mask) == 0).all()


@given(seed=st.integers(0, 999), B=st.integers(1, 4), T=st.integers(1, 8), shift=st.booleans())
def test_whitening_equals_the_oracle_over_the_whole_batch(seed: int, B: int, T: int, shift: bool) -> None:
    x, mask = normal(seed, B, T), coin(seed, B, T)
    mask[0, 0] = True
    want = oracles.whiten(x.reshape(-1).tolist(), mask.reshape(-1).tolist(), shift)
    for values in (x, dirty(x, mask)):
        out = whiten(values, mask, shift=shift)
        close(out, f64(*want).reshape(B, T), 1e-11)
        assert (out[~mask] == 0).all()


@pytest.mark.parametrize("shift", [True, False])
def test_whitening_along_a_dimension_is_whitening_each_apart(shift: bool) -> None:
    x, mask = normal(2, 5, 7), coin(2, 5, 7)
    x[3] = 4.5  # a constant among others
    x[1] *= 1e6
    for dim in (0, 1, -1):
        rows, kept = x.movedim(dim, -1), mask.movedim(dim, -1)
        want = torch.stack([whiten(row, shift=shift) for row in rows])
        close(whiten(x, dim=dim, shift=shift).movedim(dim, -1), want)
        want = torch.stack([whiten(row, m, shift=shift) for row, m in zip(rows, kept, strict=True)])
        close(whiten(dirty(x, mask), mask, dim=dim, shift=shift).movedim(dim, -1), want)


def test_whitening_knows_neither_scale_nor_place_nor_padding() -> None:
    x = normal(4, 50)
    close(whiten(5 * x - 3), whiten(x), 1e-11)
    order = torch.arange(49, -1, -1)
    close(whiten(x[order]), whiten(x)[order])
    padded, mask = torch.cat([x, torch.full((9,), math.nan).double()]), torch.arange(59) < 50
    close(whiten(padded, mask)[:50], whiten(x))


def test_the_moments_of_nothing_are_undefined() -> None:
    nothing = torch.zeros(3, dtype=torch.bool)
    assert masked_mean(torch.ones(3), nothing).isnan()
    assert masked_var(torch.ones(3), nothing).isnan()
    assert masked_mean(torch.ones(0)).isnan()
    assert masked_var(torch.ones(0)).isnan()


def test_whitening_nothing() -> None:
    assert whiten(torch.zeros(0)).shape == (0,)
    assert (whiten(torch.full((3,), math.nan), torch.zeros(3, dtype=torch.bool)) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whitening_in_lower_precision(dtype: torch.dtype) -> None:
    x = (2 * normal(5, 1000) + 3).to(dtype)
    out = whiten(x)
    assert out.dtype == torch.float32
    assert (out.double() - whiten(x.double())).abs().max() <= 1e-5


@pytest.mark.parametrize("magnitude", [1e-30, 1e-12, 1e12, 1e30])
def test_whitening_any_magnitude(magnitude: float) -> None:
    # In float32 the square of 1e±30 is not a number one can hold.
    out = whiten(torch.tensor([1.0, 2.0, 3.0]) * magnitude).double()
    close(out, f64(-math.sqrt(1.5), 0.0, math.sqrt(1.5)), 1e-5)


# ---- running moments -----------------------------------------------------------------------------------------------


def merged(*parts: Tensor) -> Moments:
    m = Moments.empty()
    for part in parts:
        m = m.updated(part)
    return m


def test_running_moments_by_hand() -> None:
    m = merged(f64(1.0, 2.0), f64(3.0))
    assert float(m.count) == 3
    close(torch.as_tensor(m.mean).double(), f64(2.0)[0])
    close(torch.as_tensor(m.m2).double(), f64(2.0)[0])
    close(torch.as_tensor(m.variance).double(), f64(2 / 3)[0])
    close(torch.as_tensor(m.deviation).double(), f64(2 / 3)[0].sqrt())


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_merged_in_any_order_they_are_the_batch_moments(offset: float) -> None:
    x = normal(6, 60) * 3 + offset
    parts = [x[:1], x[1:1], x[1:20], x[20:60]]
    for order in itertools.permutations(parts):
        m = merged(*order)
        assert float(m.count) == 60
        close(torch.as_tensor(m.mean).double(), x.mean(), 1e-11)
        close(torch.as_tensor(m.variance).double(), x.var(correction=0), 1e-10)


def test_running_moments_count_only_what_the_mask_keeps() -> None:
    x, mask = normal(7, 5, 8), coin(7, 5, 8)
    m = Moments.empty().updated(dirty(x, mask), mask)
    assert float(m.count) == mask.sum()
    close(torch.as_tensor(m.mean).double(), x[mask].mean())
    close(torch.as_tensor(m.variance).double(), x[mask].var(correction=0))
    nothing = m.updated(dirty(x, mask), torch.zeros_like(mask))
    assert float(nothing.count) == float(m.count)
    close(torch.as_tensor(nothing.mean), torch.as_tensor(m.mean), 0.0)


def test_running_moments_of_features_keep_them_apart() -> None:
    # [*samples, D] with a mask over samples: what an observation normaliser sees.
    x, mask = normal(11, 5, 8, 3) * f64(1.0, 10.0, 0.1) + f64(0.0, -5.0, 100.0), coin(11, 5, 8)
    junk = torch.where(mask[..., None], x, math.nan)
    m = Moments.empty((3,)).updated(junk[:2], mask[:2]).updated(junk[2:], mask[2:])
    assert float(m.count) == mask.sum()
    for d in range(3):
        column = x[..., d][mask].tolist()
        assert m.mean[d].item() == pytest.approx(oracles.mean(column), rel=1e-12, abs=1e-12)
        assert m.variance[d].item() == pytest.approx(oracles.variance(column), rel=1e-10)
    close(m.standardise(x)[..., 1], (x[..., 1] - m.mean[1]) / m.deviation[1], 1e-11)


def test_running_moments_do_not_change_in_place() -> None:
    m = merged(f64(1.0, 2.0))
    m.updated(f64(50.0))
    assert float(m.count) == 2
    close(torch.as_tensor(m.mean).double(), f64(1.5)[0])


def test_standardising_by_the_moments_of_the_same_batch_is_whitening() -> None:
    x = 3 * normal(8, 40) + 2
    m = merged(x)
    close(m.standardise(x), whiten(x), 1e-11)
    close(m.standardise(x, shift=False), x / x.std(correction=0), 1e-11)
    close(m.standardise(x, bound=0.5), whiten(x).clamp(-0.5, 0.5), 1e-11)


def test_standardising_by_a_constant_stays_finite() -> None:
    assert merged(f64(2.0, 2.0)).standardise(f64(2.0, 5.0)).isfinite().all()
    assert merged(f64(2.0)).standardise(f64(2.0), shift=False).isfinite().all()


def test_running_moments_keep_small_spreads_on_large_offsets() -> None:
    # The sum of squares would lose this in float32: 1e4² · 2^-24 > 1.
    x = (normal(9, 4000) * 0.1 + 1e4).float()
    m = merged(*x.split(100))
    assert float(m.variance) == pytest.approx(x.double().var(correction=0).item(), rel=1e-2)


@pytest.mark.usefixtures("unchecked_shapes")
def test_masks_of_another_shape_are_refused() -> None:
    x, mask = normal(10, 6), coin(10, 6)
    for bad in (mask[:5], mask[:1], mask[:, None]):
        for call in (masked_mean, masked_var, whiten, Moments.empty().updated):
            with pytest.raises(ValueError, match="shape"):
                call(x, bad)


@pytest.mark.usefixtures("unchecked_shapes")
def test_samples_of_another_shape_are_refused() -> None:
    m = Moments.empty((3,))
    for bad in (normal(12, 5, 2), normal(12, 3, 5), normal(12, 1)):
        for call in (m.updated, m.standardise):
            with pytest.raises(ValueError, match="shape"):
                call(bad)
    with pytest.raises(ValueError, match="shape"):
        m.updated(normal(12, 5, 3), coin(12, 5, 3))


@pytest.mark.parametrize("bound", [0.0, -1.0, math.nan])
def test_a_bound_out_of_range_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="bound"):
        merged(f64(1.0, 2.0)).standardise(f64(1.0), bound=bound)
