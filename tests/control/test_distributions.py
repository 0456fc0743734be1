from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, special, stats

from bridle.control.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
)

finite = st.floats(-20, 20, allow_nan=False)


def double(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


@given(st.lists(st.lists(finite, min_size=3, max_size=3), min_size=1, max_size=5))
def test_categorical_agrees_with_scipy(rows: list[list[float]]) -> None:
    ours = Categorical(logits=double(*rows))
    for i, row in enumerate(rows):
        p = special.softmax(row)
        for action in range(3):
            logp = float(ours.log_prob(torch.full((len(rows),), action))[i])
            assert logp == pytest.approx(special.log_softmax(row)[action], rel=1e-12, abs=1e-12)
        assert float(ours.entropy()[i]) == pytest.approx(float(stats.entropy(p)), rel=1e-9, abs=1e-12)


@given(st.lists(finite, min_size=4, max_size=4), st.lists(st.booleans(), min_size=4, max_size=4).filter(any))
def test_a_masked_categorical_is_the_categorical_over_the_allowed_actions(row: list[float], bits: list[bool]) -> None:
    ours = Categorical(logits=double(row), mask=torch.tensor([bits]))
    kept = [a for a in range(4) if bits[a]]
    p = special.softmax([row[a] for a in kept])
    for place, action in enumerate(kept):
        assert float(ours.log_prob(torch.tensor([action])).exp()) == pytest.approx(p[place], rel=1e-10)
    for action in set(range(4)) - set(kept):
        assert float(ours.log_prob(torch.tensor([action]))) == -math.inf
    assert float(ours.entropy()) == pytest.approx(float(stats.entropy(p)), rel=1e-9, abs=1e-12)
    assert int(ours.mode()) in kept
    for uniform in (0.0, 0.3, 0.9, 1 - 2**-53):
        assert int(ours.at_quantile(torch.tensor([uniform], dtype=torch.float64))) in kept


@pytest.mark.parametrize("mask", [None, torch.tensor([[True, False, True, False, True]])])
def test_a_masked_categoricals_gradients_are_finite_and_pass_the_forbidden_by(mask: torch.Tensor | None) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0, 0.0, 40.0]], dtype=torch.float64, requires_grad=True)
    ours = Categorical(logits=logits, mask=mask)
    other = Categorical(logits=torch.zeros(1, 5, dtype=torch.float64), mask=mask)
    (ours.log_prob(torch.tensor([2])) + ours.entropy() + ours.kl(other) + other.kl(ours)).sum().backward()
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())
    if mask is not None:
        assert logits.grad[0, [1, 3]].tolist() == [0, 0]


@given(st.lists(st.tuples(finite, finite, st.floats(-5, 3)), min_size=2, max_size=6))
def test_diagonal_gaussian_agrees_with_scipy(numbers: list[tuple[float, float, float]]) -> None:
    action, mean, log_std = torch.tensor(numbers, dtype=torch.float64).T.reshape(3, 1, -1)
    ours = DiagonalGaussian(mean=mean, log_std=log_std)
    theirs = stats.norm(mean.numpy(), log_std.exp().numpy())
    assert float(ours.log_prob(action)) == pytest.approx(theirs.logpdf(action.numpy()).sum(), rel=1e-10, abs=1e-10)
    assert float(ours.entropy()) == pytest.approx(theirs.entropy().sum(), rel=1e-10, abs=1e-10)
    assert torch.equal(ours.mode(), mean)


SIZES = (3, 1, 2)
MULTI = [0.5, -1.0, 2.0, 0.7, 0.0, 1.5]
MULTI_MASK = [True, False, True, True, False, True]


@pytest.mark.parametrize("masked", [False, True])
def test_several_choices_are_the_product_of_their_categoricals(masked: bool) -> None:
    mask = torch.tensor([MULTI_MASK]) if masked else None
    ours = MultiCategorical(logits=double(MULTI), sizes=SIZES, mask=mask)
    z = np.where(MULTI_MASK, MULTI, -np.inf) if masked else np.array(MULTI)
    choices = [special.softmax(part) for part in np.split(z, np.cumsum(SIZES)[:-1])]
    table = {a: math.prod(p[i] for p, i in zip(choices, a, strict=True)) for a in product(*map(range, SIZES))}
    for action, p in table.items():
        assert float(ours.log_prob(torch.tensor([action])).exp()) == pytest.approx(p, rel=1e-12)
    assert sum(table.values()) == pytest.approx(1)
    assert float(ours.entropy()) == pytest.approx(float(stats.entropy(list(table.values()))), rel=1e-12)
    assert tuple(ours.mode()[0].tolist()) == max(table, key=lambda a: table[a])
    many = MultiCategorical(
        logits=double(MULTI).expand(20_000, 6), sizes=SIZES, mask=None if mask is None else mask.expand(20_000, 6)
    )
    drawn = [tuple(row) for row in many.draw(np.random.default_rng(2)).tolist()]
    for action, p in table.items():
        assert abs(drawn.count(action) / 20_000 - p) <= 5 * math.sqrt(p * (1 - p) / 20_000)


def test_switches_are_the_product_of_their_bernoullis() -> None:
    z = [0.0, 2.0, -3.0]
    ours = Bernoulli(logits=double(z))
    p = special.expit(z)
    table = {a: math.prod(q if bit else 1 - q for q, bit in zip(p, a, strict=True)) for a in product((0, 1), repeat=3)}
    for action, chance in table.items():
        assert float(ours.log_prob(torch.tensor([action])).exp()) == pytest.approx(chance, rel=1e-12)
    assert float(ours.entropy()) == pytest.approx(float(stats.entropy(list(table.values()))), rel=1e-12)
    assert ours.mode().tolist() == [[0, 1, 0]]
    drawn = Bernoulli(logits=double(z).expand(20_000, 3)).draw(np.random.default_rng(0)).double().mean(0)
    assert bool(((drawn - torch.from_numpy(p)).abs() < 5 * torch.from_numpy(np.sqrt(p * (1 - p) / 20_000))).all())


def test_extreme_switches_stay_finite() -> None:
    ours = Bernoulli(logits=torch.tensor([[200.0, -200.0]], requires_grad=True))
    assert float(ours.log_prob(torch.tensor([[1, 0]])).detach()) == 0
    assert float(ours.log_prob(torch.tensor([[0, 1]])).detach()) == -400
    assert float(ours.entropy().detach()) == 0
    (ours.log_prob(torch.tensor([[0, 1]])) + ours.entropy()).sum().backward()
    assert ours.logits.grad is not None
    assert bool(ours.logits.grad.isfinite().all())


def squashed(mean: float, std: float) -> SquashedGaussian:
    return SquashedGaussian(gaussian=DiagonalGaussian(mean=double([mean]), log_std=double([math.log(std)])))


def density(mean: float, std: float, a: float) -> float:
    """Of tanh(u): the derivative of its distribution function Φ((atanh a − μ)/σ), taken numerically."""
    step = 1e-6
    below, above = (stats.norm.cdf(math.atanh(a + s), mean, std) for s in (-step, step))
    return float(above - below) / (2 * step)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.7, 0.4), (-1.5, 1.0)])
def test_the_squashed_gaussians_log_prob_is_the_density_of_what_is_played(mean: float, std: float) -> None:
    for a in (-0.9, -0.3, 0.0, 0.5, 0.95):
        logp = float(squashed(mean, std).log_prob(double([math.atanh(a)])))
        assert math.exp(logp) == pytest.approx(density(mean, std, a), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    ("mean", "std", "error"), [(0, 0.1, 1e-9), (0, 1, 1e-6), (2, 1, 1e-6), (-1, 3, 3e-3), (5, 0.5, 1e-6)]
)
def test_the_squashed_gaussians_entropy_against_numeric_integration(mean: float, std: float, error: float) -> None:
    def integrand(u: float) -> float:
        logp = stats.norm.logpdf(u, mean, std) - 2 * (math.log(2) - abs(u) - math.log1p(math.exp(-2 * abs(u))))
        return float(-stats.norm.pdf(u, mean, std) * logp)

    exact = integrate.quad(integrand, mean - 12 * std, mean + 12 * std, points=[0.0, mean], limit=200)[0]
    assert float(squashed(mean, std).entropy()) == pytest.approx(exact, abs=error)


def test_the_squashed_gaussian_is_finite_where_tanh_is_flat() -> None:
    ours = SquashedGaussian(
        gaussian=DiagonalGaussian(mean=torch.zeros(1, 1, requires_grad=True), log_std=torch.zeros(1, 1))
    )
    logp = ours.log_prob(torch.tensor([[50.0]]))  # tanh(50) is 1 in float64 too
    # −½ 50² − ½ log 2π + 2 (50 − log 2), up to e^{−100}
    assert float(logp.detach()) == pytest.approx(-1250 - 0.5 * math.log(2 * math.pi) + 100 - 2 * math.log(2), rel=1e-6)
    logp.sum().backward()
    assert ours.gaussian.mean.grad is not None
    assert float(ours.gaussian.mean.grad) == 50


def pairs() -> dict[str, tuple[Distribution, Distribution, list[tuple[float, ...]]]]:
    """Two distributions of each discrete family, and all actions."""
    three, five = [(0.0,), (1.0,), (2.0,)], list(product(range(3), range(1), range(2)))
    mask, multi = torch.tensor([[True, False, True]]), torch.tensor([MULTI_MASK])
    other = [1.0, 0.0, -1.0, 0.1, 0.4, -0.3]
    return {
        "categorical": (Categorical(logits=double(MULTI[:3])), Categorical(logits=double(other[:3])), three),
        "masked": (
            Categorical(logits=double(MULTI[:3]), mask=mask),
            Categorical(logits=double(other[:3]), mask=mask),
            three,
        ),
        "choices": (
            MultiCategorical(logits=double(MULTI), sizes=SIZES, mask=multi),
            MultiCategorical(logits=double(other), sizes=SIZES, mask=multi),
            five,
        ),
        "switches": (
            Bernoulli(logits=double(MULTI[:3])),
            Bernoulli(logits=double(other[:3])),
            list(product((0, 1), repeat=3)),
        ),
    }


@pytest.mark.parametrize("family", ["categorical", "masked", "choices", "switches"])
def test_kl_by_enumeration(family: str) -> None:
    p, q, actions = pairs()[family]
    expected = 0.0
    for action in actions:
        chosen = torch.tensor([action]).long()
        chosen = chosen[:, 0] if family in ("categorical", "masked") else chosen
        logp, logq = float(p.log_prob(chosen)), float(q.log_prob(chosen))
        expected += math.exp(logp) * (logp - logq) if logp > -math.inf else 0.0
    assert expected > 0.1
    assert float(p.kl(q)) == pytest.approx(expected, rel=1e-10)
    assert float(p.kl(p.detach())) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("squash", [False, True])
def test_kl_of_gaussians_by_integration(squash: bool) -> None:
    p, q = ((0.5, 0.7), (-0.3, 1.2))
    expected = integrate.quad(
        lambda x: stats.norm.pdf(x, *p) * (stats.norm.logpdf(x, *p) - stats.norm.logpdf(x, *q)), -8, 8
    )[0]
    ours, other = squashed(*p), squashed(*q)
    found = ours.kl(other) if squash else ours.gaussian.kl(other.gaussian)
    assert float(found) == pytest.approx(expected, rel=1e-8)


def test_kls_second_derivative_at_itself_is_the_fisher_information() -> None:
    # of a categorical's logits: diag(p) − p pᵀ; of a Gaussian's mean: 1/σ²
    logits = torch.tensor([[0.2, -0.5, 1.0]], dtype=torch.float64)
    frozen = Categorical(logits=logits)
    hessian = torch.autograd.functional.hessian(lambda z: frozen.kl(Categorical(logits=z[None])).sum(), logits[0])
    p = torch.softmax(logits[0], 0)
    torch.testing.assert_close(hessian, torch.diag(p) - torch.outer(p, p))
    gaussian = squashed(0.3, 0.5).gaussian
    curvature = torch.autograd.functional.hessian(
        lambda m: gaussian.kl(DiagonalGaussian(mean=m[None], log_std=gaussian.log_std)).sum(), gaussian.mean[0]
    )
    torch.testing.assert_close(curvature, double([4.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_even_grid_of_quantiles_gives_each_action_its_probability(dtype: torch.dtype) -> None:
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=dtype)
    count = 10_000
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    actions = Categorical(logits=probabilities.log().expand(count, 4)).at_quantile(grid)
    shares = torch.bincount(actions, minlength=4) / count
    torch.testing.assert_close(shares.to(dtype), probabilities, rtol=0, atol=1.01 / count)
    assert (actions.diff() >= 0).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("impossible", [0, 1, 2])
def test_an_impossible_action_is_never_drawn(uniform: float, impossible: int) -> None:
    logits = torch.tensor([[0.3, -1.0, 2.0]]).index_fill(1, torch.tensor([impossible]), -math.inf)
    action = Categorical(logits=logits).at_quantile(torch.tensor([uniform], dtype=torch.float64))
    assert 0 <= int(action) <= 2
    assert int(action) != impossible


def test_draws_have_the_distributions_moments_and_depend_on_the_generator_alone() -> None:
    mean, log_std = torch.tensor([[1.0, -2.0]]).expand(20_000, 2), torch.tensor([[0.0, -1.0]]).expand(20_000, 2)
    gaussian = DiagonalGaussian(mean=mean, log_std=log_std)
    draws = gaussian.draw(np.random.default_rng(0))
    assert torch.equal(draws, gaussian.draw(np.random.default_rng(0)))
    assert torch.equal(draws, SquashedGaussian(gaussian=gaussian).draw(np.random.default_rng(0)))
    # 5 standard errors of mean and deviation
    deviation = log_std[0].exp()
    assert ((draws.mean(0) - mean[0]).abs() < 5 * deviation / math.sqrt(20_000)).all()
    assert ((draws.std(0) - deviation).abs() < 5 * deviation / math.sqrt(40_000)).all()
    categorical = Categorical(logits=torch.tensor([[0.0, 1.0, 2.0]]).expand(20_000, 3))
    actions = categorical.draw(np.random.default_rng(1))
    p = torch.softmax(torch.tensor([0.0, 1.0, 2.0]), 0)
    shares = torch.bincount(actions, minlength=3) / 20_000
    assert ((shares - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()
    assert torch.equal(categorical.mode(), torch.full((20_000,), 2))
