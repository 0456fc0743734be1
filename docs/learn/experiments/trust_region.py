"""Why TRPO bounds the KL: along the natural gradient, the surrogate against the return that the policy really gets.

    python docs/learn/experiments/trust_region.py [--check]

Everything is exact: the return comes from linear algebra, and so do gradient and Fisher matrix. The policy is linear in
the row and the column of the grid, so that, as in a network, what it learns for one cell changes others.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from learn_page import BLACK, BLUE, GREY, ORANGE, Experiment, Value, panels, run
from learn_world import World, grid
from torch import Tensor

from bridle.core.divergence import exact_kl
from bridle.core.losses import ratio_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRUST = 0.01
"""TRPO's bound on the mean KL in the paper's experiments, nats."""
BEFORE = (3, 0.02)
"""The policy has already taken so many steps of so many nats each from the uniform one."""
KLS = tuple(10 ** (-4 + i / 8) for i in range(37))


def features(world: World) -> Float[Tensor, "S 3"]:
    """Return 1, row and column of each cell, the last two from 0 to 1."""
    size = int(len(world.start) ** 0.5)
    cells = torch.arange(size * size, dtype=torch.float64)
    row, column = (cells / size).floor() / (size - 1), (cells % size) / (size - 1)
    return torch.stack([torch.ones_like(row), row, column], 1)


def surrogate(world: World, old: Float[Tensor, "S A"], new: Float[Tensor, "S A"]) -> Float[Tensor, ""]:
    """Return L(π) − J(π_old) = Σ_s visits_old(s) Σ_a π_old(a|s) ρ(s, a) A_old(s, a) with ρ = π/π_old, from logits."""
    policy = old.softmax(1)
    weights = (world.visits(policy).unsqueeze(1) * policy).flatten()
    logp, old_logp = (logits.log_softmax(1).flatten() for logits in (new, old))
    return -(weights * ratio_loss(logp, old_logp, world.advantages(policy).flatten())).sum()


def mean_kl(world: World, old: Float[Tensor, "S A"], new: Float[Tensor, "S A"]) -> float:
    """Return the mean KL(π_old ‖ π) over the states that π_old visits, nats, from logits."""
    visits = world.visits(old.softmax(1))
    return float((visits / visits.sum() * exact_kl(old, new)).sum())


def natural_gradient(world: World, x: Float[Tensor, "S F"], theta: Float[Tensor, "F A"]) -> Float[Tensor, "F A"]:
    """Return F⁻¹ ∇L, with the Fisher matrix F = Σ_s visits(s) x xᵀ ⊗ (diag π − π πᵀ), visits summing to 1."""
    new = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(surrogate(world, x @ theta, x @ new), new)
    policy = (x @ theta).softmax(1)
    visits = world.visits(policy)
    spread = torch.diag_embed(policy) - policy.unsqueeze(2) * policy.unsqueeze(1)
    fisher = torch.einsum("s,sf,sg,sab->fagb", visits / visits.sum(), x, x, spread)
    inverse = torch.linalg.pinv(fisher.reshape(theta.numel(), theta.numel()), rtol=1e-8, hermitian=True)
    solved: Tensor = inverse @ gradient.flatten()
    return solved.view_as(theta)


def step(
    world: World, x: Float[Tensor, "S F"], theta: Float[Tensor, "F A"], direction: Float[Tensor, "F A"], kl: float
) -> Float[Tensor, "F A"]:
    """Return the parameters ``kl`` nats along ``direction``, by bisection of the step's length."""
    low, high = 0.0, 1.0
    while mean_kl(world, x @ theta, x @ (theta + high * direction)) < kl:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        if mean_kl(world, x @ theta, x @ (theta + middle * direction)) < kl:
            low = middle
        else:
            high = middle
    return theta + high * direction


def measure(kls: tuple[float, ...] = KLS) -> dict[str, Value]:
    """Gain promised by the surrogate and gain in return, at each KL."""
    world = grid()
    x = features(world)
    theta = torch.zeros(3, 4, dtype=torch.float64)
    for _ in range(BEFORE[0]):
        theta = step(world, x, theta, natural_gradient(world, x, theta), BEFORE[1])
    start = world.expected_return((x @ theta).softmax(1))
    direction = natural_gradient(world, x, theta)
    promised, got = [], []
    for kl in kls:
        new = x @ step(world, x, theta, direction, kl)
        promised.append(float(surrogate(world, x @ theta, new)))
        got.append(float(world.expected_return(new.softmax(1)) - start))
    return {"kl": list(kls), "promised": promised, "got": got, "start": float(start)}


def draw(figures: Mapping[str, Value]) -> Figure:
    """The two gains against the KL of the step."""
    figure, (ax,) = panels(1)
    ax.plot(
        figures["kl"], figures["promised"], "--", color=ORANGE, linewidth=2, label="gain that the surrogate promises"
    )
    ax.plot(figures["kl"], figures["got"], color=BLUE, linewidth=2, label="gain that the new policy gets")
    ax.axhline(0, color=GREY, linewidth=1)
    ax.axvline(TRUST, color=BLACK, linestyle=":", linewidth=1.2, label=f"trust region, δ = {TRUST} nats")
    ax.set(xscale="log", xlabel="mean KL(π_old ‖ π) of the step (nats)", ylabel="gain in discounted return")
    ax.set_title("one step along the natural gradient, everything exact")
    ax.legend(fontsize=8, frameon=False)
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""

    def at(kl: float) -> tuple[float, float]:
        i = min(range(len(figures["kl"])), key=lambda i: abs(figures["kl"][i] - kl))
        return figures["promised"][i], figures["got"][i]

    near, far = at(TRUST), at(1.0)
    return (
        f"{TRUST} nats away the surrogate promises {near[0]:+.3f} of return and the policy gets {near[1]:+.3f}; 1 nat away "
        f"it promises {far[0]:+.2f} and the policy gets {far[1]:+.2f}: it is worse than before, though every figure that went "
        "into the step was exact."
    )


EXPERIMENT = Experiment(name="trust_region", measure=measure, draw=draw, seen=seen)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
