"""PPO's clipped surrogate and its gradient against the ratio, for a good action and for a bad one.

python docs/learn/experiments/clipped_surrogate.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from learn_page import BLACK, BLUE, GREY, ORANGE, Experiment, Value, panels, run

from bridle.core.losses import clipped_surrogate_loss, clipped_surrogate_loss_grad, importance_ratio, ratio_loss

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIP = 0.2
RATIOS = 181


def measure() -> dict[str, Value]:
    """The objective (the loss with its sign turned) and its derivative in log π, over ratios from 0.2 to 2."""
    ratio = torch.linspace(0.2, 2.0, RATIOS, dtype=torch.float64)
    logp, old = ratio.log(), torch.zeros(RATIOS, dtype=torch.float64)
    figures: dict[str, Value] = {"ratio": importance_ratio(logp, old).tolist()}
    for name, advantage in (("A = +1", 1.0), ("A = −1", -1.0)):
        advantages = torch.full_like(ratio, advantage)
        figures[name] = {
            "objective": (-clipped_surrogate_loss(logp, old, advantages, clip=CLIP)).tolist(),
            "gradient": (-clipped_surrogate_loss_grad(logp, old, advantages, clip=CLIP)).tolist(),
            "unclipped": (-ratio_loss(logp, old, advantages)).tolist(),
        }
    return figures


def draw(figures: Mapping[str, Value]) -> Figure:
    """One panel for each sign of the advantage."""
    figure, axes = panels(2)
    for ax, name in zip(axes, ("A = +1", "A = −1"), strict=True):
        of, ratio = figures[name], figures["ratio"]
        ax.axvspan(1 - CLIP, 1 + CLIP, color="#F0F0F0", zorder=0, label="1 ± ε")
        ax.plot(ratio, of["unclipped"], "--", color=GREY, linewidth=1.2, label="ρ A, not clipped")
        ax.plot(ratio, of["objective"], color=BLUE, linewidth=2, label="clipped objective")
        ax.plot(ratio, of["gradient"], ":", color=ORANGE, linewidth=2, label="its gradient in log π")
        ax.plot([1], [1 if name == "A = +1" else -1], "o", color=BLACK, markersize=5, label="before the first step")
        ax.set(xlabel="ratio ρ = π(a|s) / π_old(a|s)", title=f"{name}, ε = {CLIP}")
        ax.axhline(0, color=BLACK, linewidth=0.6)
    axes[0].set_ylabel("units of return")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=7.5, frameon=False
    )
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    dead = {
        name: [r for r, g in zip(figures["ratio"], figures[name]["gradient"], strict=True) if g == 0]
        for name in ("A = +1", "A = −1")
    }
    return (
        f"For a good action the gradient is 0 at every ratio above {min(dead['A = +1']) - 0.01:.1f} and nowhere else; for a "
        f"bad one at every ratio below {max(dead['A = −1']) + 0.01:.1f} and nowhere else. On the other side, where the policy "
        "has moved the wrong way, the objective is not clipped and pulls it back."
    )


EXPERIMENT = Experiment(name="clipped_surrogate", measure=measure, draw=draw, seen=seen, tolerance=1e-6)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
