"""The natural gradient step: curvature–vector products, conjugate gradients, and the step length of a trust region.

With g the gradient of an objective to be raised and H the second derivative of the mean KL(old ‖ new) at new = old,
which is the Fisher information matrix, the best first-order step inside ½ dᵀHd ≤ δ is

    d = √(2δ / xᵀHx) x,   Hx = g

H is never formed: it is only multiplied with vectors, and g = Hx is solved by conjugate gradients.

Sources: Schulman, Levine, Moritz, Jordan & Abbeel 2015, "Trust Region Policy Optimization" (arXiv:1502.05477), Appendix C;
Hestenes & Stiefel 1952, "Methods of Conjugate Gradients for Solving Linear Systems"; Pearlmutter 1994, "Fast Exact
Multiplication by the Hessian".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bridle.core._checks import check_range

__all__ = ["Solution", "conjugate_gradient", "curvature_product", "flat_gradient", "trust_region_length"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What conjugate gradients have found of H x = b."""

    x: Float[Tensor, " P"]
    """[P] the approximate solution."""
    residual: Float[Tensor, " P"]
    """[P] b − H x, as the recurrence keeps it; so H x = b − residual costs no further product."""
    iterations: int
    """Products with H that were taken."""


def conjugate_gradient(
    product: Callable[[Tensor], Tensor], b: Float[Tensor, " P"], *, iterations: int, tolerance: float = 0.0
) -> Solution:
    """Solve H x = b for a symmetric positive definite H that is only known by its products with vectors.

        x_0 = 0, r_0 = p_0 = b;   α = rᵀr / pᵀHp;   x ← x + αp;   r ← r − αHp;   p ← r + (r_newᵀr_new / rᵀr) p

    Every iterate minimises ½xᵀHx − bᵀx over the first Krylov spaces, so bᵀx > 0 from the first one on: stopped early, x
    is still a direction of ascent for the objective whose gradient is b. Without rounding P iterations are enough.

    Args:
        product: v [P] → H v [P].
        b: [P] right-hand side.
        iterations: products to take at most, ≥ 1.
        tolerance: stop once ‖b − Hx‖ ≤ tolerance · ‖b‖; in [0, 1).

    Raises:
        ValueError: ``iterations`` or ``tolerance`` out of range.

    Source: Hestenes & Stiefel 1952, §3; for the trust region Schulman et al. 2015, Appendix C, where 10
    iterations are taken.
    """
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: expected a whole number ≥ 1")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance={tolerance!r}: expected 0 ≤ tolerance < 1")
    x, residual, search = torch.zeros_like(b), b.clone(), b.clone()
    squared = residual @ residual
    enough = tolerance**2 * float(squared)
    taken = 0
    while taken < iterations and float(squared) > enough:
        curved = product(search)
        taken += 1
        alpha = squared / (search @ curved)
        x = x + alpha * search
        residual = residual - alpha * curved
        before, squared = squared, residual @ residual
        search = residual + (squared / before) * search
    return Solution(x=x, residual=residual, iterations=taken)


def flat_gradient(
    value: Float[Tensor, ""], parameters: Sequence[Tensor], *, create_graph: bool = False
) -> Float[Tensor, " P"]:
    """Return d value / d parameters as one vector, in the order of ``parameters``; 0 where ``value`` does not depend on one.

    Args:
        value: what to differentiate; its graph is kept.
        parameters: P numbers together.
        create_graph: whether the gradient shall be differentiable itself.
    """
    parts = torch.autograd.grad(
        value, list(parameters), retain_graph=True, create_graph=create_graph, materialize_grads=True
    )
    return torch.cat([part.reshape(-1) for part in parts])


def curvature_product(
    divergence: Float[Tensor, ""], parameters: Sequence[Tensor], *, damping: float = 0.0
) -> Callable[[Tensor], Tensor]:
    """Return v → (H + cI) v, H the second derivative of ``divergence``, exactly, without forming H.

        H v = ∇(vᵀ ∇ divergence)

    At the parameters where a mean KL(old ‖ new) is 0, H is the Fisher information matrix E[∇log π ∇log πᵀ], the mean over
    the same states, the expectation over the policy's own actions.

    Args:
        divergence: differentiable twice in ``parameters``; its graph is kept as long as the product is.
        parameters: P numbers together; vectors are laid out in their order.
        damping: c ≥ 0, which keeps H + cI positive definite where some parameters hardly matter.

    Raises:
        ValueError: ``damping`` is negative or not finite.

    Source: Schulman et al. 2015, Appendix C.1; the product itself Pearlmutter 1994.
    """
    if not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping={damping!r}: expected a finite number ≥ 0")
    slope = flat_gradient(divergence, parameters, create_graph=True)

    def product(v: Tensor) -> Tensor:
        return flat_gradient(slope @ v, parameters) + damping * v

    return product


def trust_region_length(curvature: float, *, radius: float) -> float:
    """Return how far the direction x can be followed before the quadratic model of the KL reaches its bound.

        β = √(2δ / xᵀHx), so that ½ (βx)ᵀ H (βx) = δ

    Args:
        curvature: xᵀHx > 0, nats per squared length of x.
        radius: δ > 0, nats.

    Raises:
        ValueError: either is not a positive finite number.

    Source: Schulman et al. 2015, Appendix C.
    """
    check_range("curvature", curvature, 0.0, math.inf, closed=False)
    check_range("radius", radius, 0.0, math.inf, closed=False)
    return math.sqrt(2.0 * radius / curvature)
