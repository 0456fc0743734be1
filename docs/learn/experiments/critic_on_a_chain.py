"""A learned critic against the exact V of a chain: TD, n-step and Monte Carlo targets, error against episodes.

    python docs/learn/experiments/critic_on_a_chain.py [--check]

Each critic is a table that is regressed on its targets until it stays where it is, so there is no learning rate to choose.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from learn_page import BLACK, BLUE, GREEN, ORANGE, Experiment, Value, panels, run
from learn_world import Episodes, World, chain
from torch import Tensor

from bridle.core.returns import discounted_returns, n_step_returns
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS: dict[str, int | None] = {"TD": 1, "4-step": 4, "Monte Carlo": None}
"""Steps before the target bootstraps; None: never."""
EPISODES = (1, 2, 5, 10, 20, 50, 100)
SHOWN = 10
"""After so many episodes the learnt values are shown."""
LEARNERS = 60
SWEEPS = 500


def targets_of(e: Episodes, values: Float[Tensor, "R S+1"], world: World, steps: int | None) -> Float[Tensor, "B T"]:
    """Return what each V(s_t) is regressed on; row b of the episodes belongs to learner b mod R."""
    row = torch.arange(len(e.states)) % len(values)
    following = values[row.unsqueeze(1), e.successors]
    ends = (e.terminated, e.truncated)
    if steps is None:
        return discounted_returns(e.rewards, following, *ends, gamma=world.gamma, mask=e.mask)
    return n_step_returns(e.rewards, following, *ends, gamma=world.gamma, n=steps, mask=e.mask)


def fit(e: Episodes, learners: int, world: World, steps: int | None) -> Float[Tensor, "R S"]:
    """Start at 0 and regress again and again: V(s) becomes the mean of its targets, until nothing moves."""
    width = len(world.start) + 1
    place = (torch.arange(len(e.states)) % learners).unsqueeze(1) * width + e.states
    cell = place[e.mask]
    visits = torch.bincount(cell, minlength=learners * width).clamp(min=1)
    values = torch.zeros(learners, width, dtype=torch.float64)
    for _ in range(SWEEPS):
        targets = targets_of(e, values, world, steps)[e.mask]
        mean = torch.zeros(learners * width, dtype=torch.float64).scatter_add_(0, cell, targets) / visits
        moved = float((mean.view_as(values) - values).abs().max())
        values = mean.view_as(values)
        if moved < 1e-5:
            break
    return values[:, :-1]


def measure(episodes: tuple[int, ...] = EPISODES, learners: int = LEARNERS) -> dict[str, Value]:
    """Error of every method after so many episodes, all methods on the same ones; root mean square over learners."""
    world, policy = chain()
    exact = world.values(policy)
    figures: dict[str, Value] = {"exact": exact.tolist(), "episodes": list(episodes)}
    errors: dict[str, list[float]] = {name: [] for name in METHODS}
    shown: dict[str, Value] = {}
    for count in episodes:
        everyone = policy.expand(count * learners, *policy.shape)
        e = world.draw(everyone, steps=1000, rng=generator(0, "learn.critic", count))
        for name, steps in METHODS.items():
            values = fit(e, learners, world, steps)
            errors[name].append(float((values - exact).square().mean().sqrt()))
            if count == SHOWN:
                shown[name] = {"mean": values.mean(0).tolist(), "deviation": values.std(0).tolist()}
    return {**figures, "error": errors, "values": shown}


def draw(figures: Mapping[str, Value]) -> Figure:
    """Left, what the learners believe after some episodes; right, how far they are from the truth."""
    figure, (left, right) = panels(2)
    exact = figures["exact"]
    places = np.arange(1, len(exact) + 1)
    left.plot(places, exact, color=BLACK, linewidth=2, label="exact V", zorder=1)
    looks = zip(METHODS, (BLUE, GREEN, ORANGE), "o^s", (-0.2, 0.0, 0.2), strict=True)
    for name, colour, marker, shift in looks:
        of = figures["values"][name]
        left.errorbar(
            places + shift, of["mean"], of["deviation"], fmt=marker, color=colour, markersize=3.5, linewidth=1,
            label=f"{name} ± 1 deviation",
        )  # fmt: skip
        right.plot(figures["episodes"], figures["error"][name], f"{marker}-", color=colour, markersize=3.5, label=name)
    left.set(xlabel="state", ylabel="value (units of return)", title=f"values learnt from {SHOWN} episodes")
    right.set(xlabel="episodes", ylabel="root mean square error", title="error of the learnt V", xscale="log")
    right.set(yscale="log", xticks=figures["episodes"], yticks=(0.05, 0.1, 0.2, 0.4))
    right.set_xticklabels([str(n) for n in figures["episodes"]])
    right.set_yticklabels(["0.05", "0.1", "0.2", "0.4"])
    right.minorticks_off()
    for ax in (left, right):
        ax.legend(fontsize=8, frameon=False)
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    counts = figures["episodes"]

    def row(count: int) -> str:
        return ", ".join(f"{figures['error'][name][counts.index(count)]:.3f}" for name in METHODS)

    return (
        f"The error of V from TD, 4-step and Monte Carlo targets is {row(10)} after 10 episodes and {row(100)} after 100 "
        f"(values of V lie between {min(figures['exact']):.2f} and {max(figures['exact']):.2f}). On the same episodes TD "
        "is the most accurate: it uses that the states follow each other, while Monte Carlo takes every return's luck as it is."
    )


EXPERIMENT = Experiment(name="critic_on_a_chain", measure=measure, draw=draw, seen=seen)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
