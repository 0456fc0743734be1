"""Bias and variance of advantage estimates against λ and against n, with an imperfect critic.

    python docs/learn/experiments/bias_and_variance.py [--check]

A critic that is wrong by e(s) moves the estimates of every action in s alike; that part is a baseline and cancels in the
policy gradient. So what counts as bias is what remains after each state's mean error over the policy's actions is taken
off.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from learn_page import BLACK, BLUE, ORANGE, Experiment, Value, panels, run
from learn_world import World, chain
from torch import Tensor
from torch.nn.functional import pad

from bridle.core.returns import gae, n_step_returns
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CRITIC_ERROR = 0.2
"""Deviation of the critic's error, in units of return."""
LAMBDAS = (0.0, 0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 1.0)
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
AVERAGED = 8
"""Samples of each action that are averaged, as a batch does: variance falls with them, bias does not."""


def imperfect(world: World, policy: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
    """Return the exact V plus a fixed random error."""
    exact = world.values(policy)
    return exact + CRITIC_ERROR * torch.from_numpy(generator(1, "learn.bias.critic").standard_normal(len(exact)))


def centred(error: Float[Tensor, "S A"], policy: Float[Tensor, "S A"]) -> Float[Tensor, "S A"]:
    """Take off each state's mean error over the policy's actions: the part that cancels in the gradient."""
    return error - (policy * error).sum(1, keepdim=True)


def exact_bias(
    world: World, policy: Float[Tensor, "S A"], values: Float[Tensor, " S"], lam: float
) -> Float[Tensor, "S A"]:
    """Return E[A^GAE | s, a] − A(s, a), centred: E[A^GAE] = δ(s, a) + γλ P x with x = (I − γλ P_π)^{-1} δ_π."""
    into = world.transitions[:, :, :-1]
    reward = (world.transitions * world.rewards).sum(-1)
    residual = reward + world.gamma * into @ values - values.unsqueeze(1)
    decay = world.gamma * lam
    along = torch.einsum("sa,sat->st", policy, into)
    later = torch.linalg.solve(torch.eye(len(values)).double() - decay * along, (policy * residual).sum(1))
    return centred(residual + decay * into @ later - world.advantages(policy), policy)


def measure(episodes: int = 2000) -> dict[str, Value]:
    """Estimates of the first action of ``episodes`` episodes from every state and action, for each λ and n."""
    world, policy = chain()
    states, actions = policy.shape
    values = imperfect(world, policy)
    pairs = torch.cartesian_prod(torch.arange(states), torch.arange(actions)).repeat_interleave(episodes, 0)
    first = (pairs[:, 0], pairs[:, 1])
    e = world.draw(policy.expand(len(pairs), -1, -1), steps=600, rng=generator(0, "learn.bias"), first=first)
    table = pad(values, (0, 1))
    now, following = table[e.states], table[e.successors]
    ends = (e.terminated, e.truncated)

    def by_lambda(lam: float) -> Tensor:
        return gae(e.rewards, now, following, *ends, gamma=world.gamma, lam=lam, mask=e.mask)[:, 0]

    def by_n(n: float) -> Tensor:
        return n_step_returns(e.rewards, following, *ends, gamma=world.gamma, n=int(n), mask=e.mask)[:, 0] - now[:, 0]

    figures: dict[str, Value] = {"cut": int(e.truncated.sum())}
    for name, grid, estimate in (("lam", LAMBDAS, by_lambda), ("n", STEPS, by_n)):
        figures[name] = _errors(world, policy, grid, estimate, episodes)
    figures["exact_squared_bias"] = [float(exact_bias(world, policy, values, lam).square().mean()) for lam in LAMBDAS]
    return figures


def _errors(
    world: World,
    policy: Float[Tensor, "S A"],
    grid: tuple[float, ...],
    estimate: Callable[[float], Float[Tensor, " B"]],
    episodes: int,
) -> dict[str, Value]:
    exact = world.advantages(policy)
    squared_bias, variance, noise = [], [], []
    for x in grid:
        samples = estimate(x).view(*policy.shape, episodes)
        spread = samples.var(-1)
        bias = centred(samples.mean(-1) - exact, policy)
        # Each squared mean holds its own sampling variance: of b_a − Σ π b it is this share of the actions' variances.
        share = (torch.eye(policy.shape[1]) - policy.unsqueeze(1)).square()
        own = (share @ spread.unsqueeze(-1)).squeeze(-1) / episodes
        squared_bias.append(float((bias.square() - own).mean()))
        noise.append(float((2 * own.square() + 4 * own * bias.square()).mean().sqrt() / bias.numel() ** 0.5))
        variance.append(float(spread.mean()))
    return {"x": list(grid), "squared_bias": squared_bias, "standard_error": noise, "variance": variance}


def draw(figures: Mapping[str, Value]) -> Figure:
    """Squared bias, variance of a mean over ``AVERAGED`` samples, and their sum; left against λ, right against n."""
    figure, axes = panels(2)
    for ax, name in zip(axes, ("lam", "n"), strict=True):
        of = figures[name]
        bias, variance, error = _parts(of)
        places = range(len(of["x"])) if name == "lam" else of["x"]
        bias, variance, error = ([1000 * x for x in part] for part in (bias, variance, error))
        ax.plot(places, bias, "o-", color=BLUE, markersize=3.5, label="squared bias")
        ax.plot(places, variance, "^-", color=ORANGE, markersize=3.5, label=f"variance of a mean of {AVERAGED}")
        ax.plot(places, error, "s-", color=BLACK, markersize=3.5, label="mean squared error")
        best = int(torch.tensor(error).argmin())
        ax.annotate(
            f"best: {'λ' if name == 'lam' else 'n'} = {of['x'][best]:g}", (places[best], error[best]),
            xytext=(26, 26), textcoords="offset points", ha="center", fontsize=8, arrowprops={"arrowstyle": "->"},
        )  # fmt: skip
        ax.set_ylim(0, None)
    axes[0].set_xticks(range(len(LAMBDAS)), [f"{lam:g}" for lam in LAMBDAS], fontsize=7)
    axes[0].set(xlabel="λ (not to scale)", ylabel="squared units of return, × 1000", title="GAE")
    axes[1].set(xlabel="n (steps)", title="n-step advantage", xscale="log")
    axes[1].set_xticks((1, 2, 4, 8, 16, 32, 64, 128), ("1", "2", "4", "8", "16", "32", "64", "128"))
    axes[1].minorticks_off()
    axes[1].sharey(axes[0])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _parts(of: Mapping[str, Value]) -> tuple[list[float], list[float], list[float]]:
    variance = [v / AVERAGED for v in of["variance"]]
    return of["squared_bias"], variance, [b + v for b, v in zip(of["squared_bias"], variance, strict=True)]


def _row(of: Mapping[str, Value], at: int) -> str:
    bias, variance, error = _parts(of)
    return f"{max(bias[at], 0):.4f} + {variance[at]:.4f} = {error[at]:.4f}"


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    lam, n = figures["lam"], figures["n"]
    best = {name: int(torch.tensor(_parts(figures[name])[2]).argmin()) for name in ("lam", "n")}
    return (
        f"Squared bias + variance of a mean of {AVERAGED} samples = mean squared error: {_row(lam, 0)} at λ = 0, "
        f"{_row(lam, -1)} at λ = 1, and {_row(lam, best['lam'])} at λ = {lam['x'][best['lam']]:g}, the best; "
        f"among the n-step estimates the best is n = {n['x'][best['n']]:g} with {_row(n, best['n'])}. "
        f"A single sample at λ = 1 has {lam['variance'][-1] / lam['variance'][0]:.1f} times the variance of one at λ = 0."
    )


EXPERIMENT = Experiment(name="bias_and_variance", measure=measure, draw=draw, seen=seen)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
