"""Conjugate gradients against a direct solver, curvature products against the enumerated Fisher matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.core.natural import conjugate_gradient, curvature_product, flat_gradient, trust_region_length
from bridle.random import generator


def spd(size: int, seed: int, condition: float) -> tuple[np.ndarray, np.ndarray]:
    """A symmetric positive definite matrix of a known condition number, and a right-hand side."""
    draws = generator(seed, "spd", size)
    basis, _ = np.linalg.qr(draws.standard_normal((size, size)))
    eigenvalues = np.geomspace(1.0, condition, size)
    return basis @ np.diag(eigenvalues) @ basis.T, draws.standard_normal(size)


def product_of(matrix: np.ndarray):
    return lambda v: torch.from_numpy(matrix) @ v


@given(size=st.integers(1, 12), seed=st.integers(0, 1000), condition=st.sampled_from([1.0, 10.0, 1000.0]))
def test_conjugate_gradient_is_the_direct_solution(size: int, seed: int, condition: float) -> None:
    matrix, b = spd(size, seed, condition)
    found = conjugate_gradient(product_of(matrix), torch.from_numpy(b), iterations=4 * size, tolerance=1e-13)
    np.testing.assert_allclose(found.x.numpy(), np.linalg.solve(matrix, b), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("distinct", [1, 2, 3, 4])
def test_as_many_iterations_as_distinct_eigenvalues(distinct: int) -> None:
    basis, _ = np.linalg.qr(generator(0, "basis").standard_normal((8, 8)))
    eigenvalues = np.array([1.0, 2.0, 5.0, 7.0])[np.arange(8) % distinct]
    matrix, b = basis @ np.diag(eigenvalues) @ basis.T, generator(1, "b").standard_normal(8)
    found = conjugate_gradient(product_of(matrix), torch.from_numpy(b), iterations=distinct)
    np.testing.assert_allclose(found.x.numpy(), np.linalg.solve(matrix, b), rtol=1e-10)
    assert found.iterations == distinct


@given(iterations=st.integers(1, 6), seed=st.integers(0, 1000))
def test_stopped_early_it_is_the_best_of_its_krylov_space(iterations: int, seed: int) -> None:
    """x_k minimises ½xᵀHx − bᵀx over span(b, Hb, …, H^{k−1}b): solved here by projecting onto that space."""
    matrix, b = spd(6, seed, 50.0)
    space, _ = np.linalg.qr(np.stack([np.linalg.matrix_power(matrix, k) @ b for k in range(iterations)], axis=1))
    best = space @ np.linalg.solve(space.T @ matrix @ space, space.T @ b)
    found = conjugate_gradient(product_of(matrix), torch.from_numpy(b), iterations=iterations)
    np.testing.assert_allclose(found.x.numpy(), best, rtol=1e-5, atol=1e-7)
    assert float(found.x @ torch.from_numpy(b)) > 0


def test_the_residual_is_what_is_left() -> None:
    matrix, b = spd(10, 3, 100.0)
    found = conjugate_gradient(product_of(matrix), torch.from_numpy(b), iterations=5)
    np.testing.assert_allclose(found.residual.numpy(), b - matrix @ found.x.numpy(), atol=1e-12)
    assert found.iterations == 5


def test_it_stops_where_it_may() -> None:
    matrix, b = spd(10, 3, 100.0)
    found = conjugate_gradient(product_of(matrix), torch.from_numpy(b), iterations=100, tolerance=0.1)
    assert np.linalg.norm(b - matrix @ found.x.numpy()) <= 0.1 * np.linalg.norm(b)
    assert found.iterations < 10
    nothing = conjugate_gradient(product_of(matrix), torch.zeros(10, dtype=torch.float64), iterations=5)
    assert nothing.iterations == 0
    assert not nothing.x.any()


STATES = torch.from_numpy(generator(0, "states").standard_normal((7, 3)))


def softmax_parameters() -> list[torch.Tensor]:
    """A hidden layer of tanh and three logits, [4, 3], [4], [3, 4], [3]."""
    draws = generator(0, "softmax")
    return [torch.from_numpy(draws.standard_normal(s)).requires_grad_() for s in ((4, 3), (4,), (3, 4), (3,))]


def softmax_logp(parameters: list[torch.Tensor]) -> torch.Tensor:
    hidden = torch.tanh(STATES @ parameters[0].T + parameters[1])
    return torch.log_softmax(hidden @ parameters[2].T + parameters[3], dim=-1)


def softmax_fisher(parameters: list[torch.Tensor]) -> torch.Tensor:
    """mean_s Σ_a π(a|s) ∇log π(a|s) ∇log π(a|s)ᵀ, action by action."""
    logp = softmax_logp(parameters)
    size = sum(p.numel() for p in parameters)
    fisher = torch.zeros(size, size, dtype=torch.float64)
    for row in logp:
        for entry in row:
            score = flat_gradient(entry, parameters)
            fisher += entry.detach().exp() * torch.outer(score, score) / len(logp)
    return fisher


def columns(product, size: int) -> torch.Tensor:
    return torch.stack([product(unit) for unit in torch.eye(size, dtype=torch.float64)], dim=1)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_curvature_of_the_kl_is_the_enumerated_fisher_matrix_of_a_softmax(damping: float) -> None:
    parameters = softmax_parameters()
    fisher = softmax_fisher(parameters)
    logp = softmax_logp(parameters)
    frozen = logp.detach()
    kl = (frozen.exp() * (frozen - logp)).sum(-1).mean()
    found = columns(curvature_product(kl, parameters, damping=damping), len(fisher))
    torch.testing.assert_close(found, fisher + damping * torch.eye(len(fisher), dtype=torch.float64))


def test_curvature_of_the_kl_is_the_closed_form_fisher_matrix_of_a_gaussian() -> None:
    """μ = Ws, log σ free: the Fisher matrix is σ⁻² ⊗ mean ssᵀ for W and 2I for log σ, and nothing between them."""
    draws = generator(0, "gaussian")
    weight = torch.from_numpy(draws.standard_normal((2, 3))).requires_grad_()
    log_std = torch.from_numpy(draws.standard_normal(2)).requires_grad_()
    mean = STATES @ weight.T
    old_mean, old_log_std = mean.detach(), log_std.detach()
    variance = torch.exp(2 * log_std)
    kl = (log_std - old_log_std + (torch.exp(2 * old_log_std) + (old_mean - mean) ** 2) / (2 * variance) - 0.5).sum(-1)
    found = columns(curvature_product(kl.mean(), [weight, log_std]), 8)
    second = (STATES.T @ STATES / len(STATES)).numpy()
    expected = np.zeros((8, 8))
    expected[:6, :6] = np.kron(np.diag(np.exp(-2 * old_log_std.numpy())), second)
    expected[6:, 6:] = 2 * np.eye(2)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10, atol=1e-12)


def test_the_step_reaches_the_bound_to_second_order() -> None:
    """KL(δ)/δ − 1 is of the order of the step, √δ: a hundredth of δ leaves a tenth of the error."""
    start = softmax_parameters()
    fisher = softmax_fisher(start)
    direction = torch.linspace(-1, 1, len(fisher), dtype=torch.float64)
    frozen = softmax_logp(start).detach()
    curvature = float(direction @ fisher @ direction)
    errors = []
    for radius in (1e-4, 1e-6, 1e-8):
        step = trust_region_length(curvature, radius=radius) * direction
        parts = step.split([p.numel() for p in start])
        logp = softmax_logp([(p + d.view_as(p)).detach() for p, d in zip(start, parts, strict=True)])
        errors.append(abs(float((frozen.exp() * (frozen - logp)).sum(-1).mean()) / radius - 1))
    assert errors[0] < 0.1
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.2)
    assert errors[1] / errors[2] == pytest.approx(10, rel=0.2)


def test_a_parameter_that_does_not_matter_has_no_gradient() -> None:
    a, b = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([[3.0]], requires_grad=True)
    assert flat_gradient((a**2).sum(), [a, b]).tolist() == [2.0, 4.0, 0.0]


@pytest.mark.parametrize("curvature", [0.0, -1.0, math.nan, math.inf])
def test_a_direction_without_curvature_has_no_length(curvature: float) -> None:
    with pytest.raises(ValueError, match="curvature"):
        trust_region_length(curvature, radius=0.01)
    with pytest.raises(ValueError, match="radius"):
        trust_region_length(1.0, radius=curvature)


def test_arguments_out_of_range_are_refused() -> None:
    b = torch.ones(2)
    with pytest.raises(ValueError, match="iterations"):
        conjugate_gradient(lambda v: v, b, iterations=0)
    with pytest.raises(ValueError, match="tolerance"):
        conjugate_gradient(lambda v: v, b, iterations=1, tolerance=1.0)
    with pytest.raises(ValueError, match="damping"):
        curvature_product((b.requires_grad_() ** 2).sum(), [b], damping=-0.1)
