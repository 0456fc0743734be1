"""GAE as a mixture: what it weighs each TD residual with, and each n-step advantage.

    python docs/learn/experiments/gae_weights.py [--check]

The weights are read off ``gae`` itself: it is linear in the TD residuals, so its answer to a single residual of 1 at
distance l is the weight of that residual.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from learn_page import BLUE, GREEN, ORANGE, PURPLE, Experiment, Value, panels, run

from bridle.core.returns import gae, n_step_returns
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAMMA = 0.99
LAMBDAS = (0.0, 0.5, 0.9, 0.95)
STEPS = 30
"""Steps to the cut."""


def residual_weights(lam: float) -> list[float]:
    """Weight of δ_{t+l} in A_t, l = 0 … STEPS − 1."""
    none = torch.zeros(STEPS, STEPS, dtype=torch.bool)
    zeros = torch.zeros(STEPS, STEPS, dtype=torch.float64)
    one_each = torch.eye(STEPS, dtype=torch.float64)  # row l: reward 1 at step l, values 0
    weights: list[float] = gae(one_each, zeros, zeros, none, none, gamma=GAMMA, lam=lam)[:, 0].tolist()
    return weights


def advantage_weights(lam: float) -> list[float]:
    """Weight of the n-step advantage in A_t, n = 1 … STEPS: (1 − λ) λ^{n−1}, the last one λ^{STEPS−1}."""
    return [(1 - lam) * lam**n for n in range(STEPS - 1)] + [lam ** (STEPS - 1)]


def measure() -> dict[str, Value]:
    """Both kinds of weights, and how far GAE is from its mixture of n-step advantages on a random row."""
    rng = generator(0, "learn.gae")
    rewards, values, following = (torch.from_numpy(rng.standard_normal((1, STEPS))) for _ in range(3))
    following[:, :-1] = values[:, 1:]
    none = torch.zeros(1, STEPS, dtype=torch.bool)
    farthest = 0.0
    for lam in LAMBDAS:
        n_step = [
            n_step_returns(rewards, following, none, none, gamma=GAMMA, n=n + 1)[0, 0] - values[0, 0]
            for n in range(STEPS)
        ]
        mixture = sum(w * a for w, a in zip(advantage_weights(lam), n_step, strict=True))
        whole = gae(rewards, values, following, none, none, gamma=GAMMA, lam=lam)[0, 0]
        farthest = max(farthest, float((whole - mixture).abs()))
    return {
        "lam": list(LAMBDAS),
        "residuals": [residual_weights(lam) for lam in LAMBDAS],
        "n_step": [advantage_weights(lam) for lam in LAMBDAS],
        "identity_error": farthest,
    }


def draw(figures: Mapping[str, Value]) -> Figure:
    """Left, the weights of the residuals; right, those of the n-step advantages, which sum to 1."""
    figure, (left, right) = panels(2)
    for i, (lam, colour) in enumerate(zip(figures["lam"], (BLUE, GREEN, ORANGE, PURPLE), strict=True)):
        style: dict[str, Any] = {"color": colour, "marker": "o^sD"[i], "markersize": 3, "linewidth": 1.2}
        style["label"] = f"λ = {lam:g}"
        left.plot(range(STEPS), figures["residuals"][i], **style)
        right.plot(range(1, STEPS + 1), figures["n_step"][i], **style)
    left.set(xlabel="l (steps ahead)", ylabel="weight", title=f"of the TD residual δₜ₊ₗ in Aₜ (γ = {GAMMA})")
    right.set(xlabel=f"n (steps; the row is cut after {STEPS})", title="of the n-step advantage in Aₜ")
    right.set(yscale="log", ylim=(0.003, 1.3))
    right.set_yticks((0.003, 0.01, 0.03, 0.1, 0.3, 1), ("0.003", "0.01", "0.03", "0.1", "0.3", "1"))
    right.minorticks_off()
    left.legend(fontsize=8, frameon=False)
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    row = dict(zip(figures["lam"], figures["n_step"], strict=True))
    half = {lam: next(n for n in range(1, STEPS + 1) if sum(row[lam][:n]) >= 0.5) for lam in (0.5, 0.9, 0.95)}
    return (
        f"Half of the weight lies on n ≤ {half[0.5]} at λ = 0.5, on n ≤ {half[0.9]} at λ = 0.9 and on n ≤ {half[0.95]} at "
        f"λ = 0.95, where {100 * row[0.95][-1]:.0f} % is left for the whole "
        f"{STEPS} steps to the cut: the point at the right end."
    )


EXPERIMENT = Experiment(name="gae_weights", measure=measure, draw=draw, seen=seen, tolerance=1e-6)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
