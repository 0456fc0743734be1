"""The mean TD residual of each action against its exact advantage, with a right critic and with a wrong one.

python docs/learn/experiments/td_residual.py [--check]
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from learn_page import BLACK, BLUE, ORANGE, Experiment, Value, panels, run
from learn_world import chain
from torch.nn.functional import pad

from bridle.core.returns import td_residuals
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CRITIC_ERROR = 0.1
"""Deviation of the wrong critic's error, in units of return."""


def measure(episodes: int = 10_000) -> dict[str, Value]:
    """Mean and standard error of δ for every state and action."""
    world, policy = chain()
    exact = world.values(policy)
    wrong = exact + CRITIC_ERROR * torch.from_numpy(generator(0, "learn.td.critic").standard_normal(len(exact)))
    e = world.draw(policy.expand(episodes, *policy.shape), steps=1000, rng=generator(0, "learn.td"))
    figures: dict[str, Value] = {"advantages": world.advantages(policy).tolist()}
    for name, values in (("exact critic", exact), ("wrong critic", wrong)):
        table = pad(values, (0, 1))
        residuals = td_residuals(
            e.rewards, table[e.states], table[e.successors], e.terminated, gamma=world.gamma, mask=e.mask
        )
        means, errors = [], []
        for s in range(len(exact)):
            of = [residuals[e.mask & (e.states == s) & (e.actions == a)] for a in (0, 1)]
            means.append([float(d.mean()) for d in of])
            errors.append([float(d.std() / len(d) ** 0.5) for d in of])
        figures[name] = {"mean": means, "standard_error": errors, "values": values.tolist()}
    return figures


def draw(figures: Mapping[str, Value]) -> Figure:
    """One panel a critic: the exact advantage as a bar, the mean residual as a point with its interval."""
    figure, axes = panels(2)
    exact = np.array(figures["advantages"])
    places = np.arange(1, len(exact) + 1)
    for ax, name in zip(axes, ("exact critic", "wrong critic"), strict=True):
        mean, error = (np.array(figures[name][what]) for what in ("mean", "standard_error"))
        for action, (way, colour, shift) in enumerate((("left", BLUE, -0.2), ("right", ORANGE, 0.2))):
            ax.bar(places + shift, exact[:, action], 0.36, color=colour, alpha=0.35, label=f"exact A(s, {way})")
            ax.errorbar(
                places + shift, mean[:, action], 1.96 * error[:, action], fmt="o", color=colour, markersize=3.5,
                linewidth=1, capsize=2, label=f"mean δ of {way}",
            )  # fmt: skip
        ax.axhline(0, color=BLACK, linewidth=0.8)
        ax.set(xlabel="state", title=name)
    axes[0].set_ylabel("units of return")
    axes[0].sharey(axes[1])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    exact = np.array(figures["advantages"])
    off = {name: np.array(figures[name]["mean"]) - exact for name in ("exact critic", "wrong critic")}
    scores = off["exact critic"] / np.array(figures["exact critic"]["standard_error"])
    return (
        "With the exact critic the mean δ of an action is its advantage: the farthest of the 18 is "
        f"{np.abs(off['exact critic']).max():.4f} off, {np.abs(scores).max():.1f} standard errors at most. With a critic that "
        f"is wrong by {CRITIC_ERROR} in deviation it is up to {np.abs(off['wrong critic']).max():.2f} off, and no number of "
        "episodes mends that."
    )


EXPERIMENT = Experiment(name="td_residual", measure=measure, draw=draw, seen=seen)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
