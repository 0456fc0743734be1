"""Actor–critic against REINFORCE on a small grid: noise of the gradient, and learning curves.

    python docs/learn/experiments/actor_critic.py [--check]

Policy and critic are tables, and the return of every policy is exact. Many seeds and learning rates run side by side.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from learn_page import BLACK, BLUE, GREEN, ORANGE, Experiment, Value, panels, run
from learn_world import Episodes, World, grid
from torch import Tensor

from bridle.core.losses import policy_gradient_loss, value_loss_grad
from bridle.core.returns import discounted_returns, gae
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Method = Literal["REINFORCE", "return − critic", "actor–critic, GAE"]
METHODS: dict[Method, float | None] = {"REINFORCE": None, "return − critic": 1.0, "actor–critic, GAE": 0.9}
"""λ of the advantage estimate; None: the bare return, without a critic."""
RATES = (0.2, 0.4, 0.8, 1.6, 3.2, 6.4)
EPISODES = 8
"""Episodes of one update."""
STEPS = 100
CRITIC_RATE = 0.3
"""V(s) moves by this share to the mean of its targets of one update."""


def weights_of(e: Episodes, critic: Float[Tensor, "R S+1"], world: World, lam: float | None) -> Float[Tensor, "B T"]:
    """Return what multiplies log π of each action: the return, or an advantage from the critic of the row's learner."""
    row = (torch.arange(len(e.states)) // EPISODES).unsqueeze(1)
    ends = (e.terminated, e.truncated)
    if lam is None:
        return discounted_returns(e.rewards, torch.zeros_like(e.rewards), *ends, gamma=world.gamma, mask=e.mask)
    return gae(
        e.rewards, critic[row, e.states], critic[row, e.successors], *ends, gamma=world.gamma, lam=lam, mask=e.mask
    )


def gradients(logits: Float[Tensor, "R S A"], e: Episodes, weights: Float[Tensor, "B T"]) -> Float[Tensor, "R S A"]:
    """Return ∇ of (1/episodes) Σ −log π · weight for each of the R learners."""
    free = logits.clone().requires_grad_()
    row = (torch.arange(len(e.states)) // EPISODES).unsqueeze(1)
    logp = free.log_softmax(-1)[row, e.states, e.actions][e.mask]
    total = policy_gradient_loss(logp, weights[e.mask]).sum() / EPISODES
    (gradient,) = torch.autograd.grad(total, free)
    return gradient


def taught(critic: Float[Tensor, "R S+1"], e: Episodes, advantages: Float[Tensor, "B T"]) -> Float[Tensor, "R S+1"]:
    """Return the critic after one step on targets A_t + V(s_t)."""
    row = (torch.arange(len(e.states)) // EPISODES).unsqueeze(1).expand_as(e.states)
    cell = (row * critic.shape[1] + e.states)[e.mask]
    value = critic.flatten()[cell]
    slope = torch.zeros(critic.numel(), dtype=torch.float64)
    slope.scatter_add_(0, cell, value_loss_grad(value, advantages[e.mask] + value))
    visits = torch.bincount(cell, minlength=critic.numel()).clamp(min=1)
    return critic - CRITIC_RATE * (slope / visits).view_as(critic)


def train(
    world: World, lam: float | None, rates: tuple[float, ...], seeds: int, updates: int
) -> tuple[Float[Tensor, "K L R"], Float[Tensor, "L R S A"], Float[Tensor, "L R S+1"]]:
    """Run every rate on every seed; return J before each update, and the policies and critics in the end."""
    learners, states = len(rates) * seeds, len(world.start)
    logits = torch.zeros(learners, states, 4, dtype=torch.float64)
    critic = torch.zeros(learners, states + 1, dtype=torch.float64)
    rate = torch.tensor(rates, dtype=torch.float64).repeat_interleave(seeds).view(-1, 1, 1)
    history = []
    for k in range(updates):
        policy = logits.softmax(-1)
        history.append(world.expected_return(policy).view(len(rates), seeds))
        e = world.draw(policy.repeat_interleave(EPISODES, 0), steps=STEPS, rng=generator(0, "learn.actor", k))
        weights = weights_of(e, critic, world, lam)
        logits = logits - rate * gradients(logits, e, weights)
        if lam is not None:
            critic = taught(critic, e, weights)
    shape = (len(rates), seeds)
    return torch.stack(history), logits.view(*shape, states, 4), critic.view(*shape, states + 1)


def noise(
    world: World, logits: Float[Tensor, "S A"], critic: Float[Tensor, " S+1"], lam: float | None, batches: int
) -> tuple[float, float]:
    """Return (tr Cov, ‖mean‖²) of the gradient of one update over many updates' worth of fresh episodes."""
    many = logits.expand(batches, -1, -1)
    policy = many.softmax(-1).repeat_interleave(EPISODES, 0)
    e = world.draw(policy, steps=STEPS, rng=generator(0, "learn.actor.noise"))
    found = gradients(many, e, weights_of(e, critic.expand(batches, -1), world, lam)).flatten(1)
    variance = float(found.var(0).sum())
    return variance, float(found.mean(0).square().sum()) - variance / batches


def measure(seeds: int = 20, updates: int = 200, batches: int = 1000) -> dict[str, Value]:
    """Each method's curve at its best rate, and the noise of its gradient at one policy on its way."""
    world = grid()
    _, halfway, critics = train(world, METHODS["actor–critic, GAE"], (1.6,), 1, 25)
    figures: dict[str, Value] = {
        "halfway_return": float(world.expected_return(halfway[0, 0].softmax(-1))),
        "updates": updates,
    }
    for name, lam in METHODS.items():
        history, _, _ = train(world, lam, RATES, seeds, updates)
        best = int(history.mean((0, 2)).argmax())
        variance, signal = noise(world, halfway[0, 0], critics[0, 0], lam, batches)
        curve = history[:, best]
        figures[name] = {
            "rate": RATES[best],
            "variance": variance,
            "signal": signal,
            "mean": curve.mean(1).tolist(),
            "low": curve.quantile(0.1, 1).tolist(),
            "high": curve.quantile(0.9, 1).tolist(),
        }
    return figures


def draw(figures: Mapping[str, Value]) -> Figure:
    """Left, the gradient's noise; right, the learning curves."""
    figure, (left, right) = panels(2)
    for i, (name, colour) in enumerate(zip(METHODS, (ORANGE, GREEN, BLUE), strict=True)):
        of = figures[name]
        ratio = (of["variance"] / of["signal"]) ** 0.5
        left.bar(i, ratio, 0.6, color=colour)
        left.text(i, ratio, f"{ratio:.2f}", ha="center", va="bottom", fontsize=8)
        episodes = [EPISODES * k for k in range(len(of["mean"]))]
        style = ("--", "-.", "-")[i]
        right.plot(episodes, of["mean"], style, color=colour, label=f"{name} (rate {of['rate']})")
        right.fill_between(episodes, of["low"], of["high"], color=colour, alpha=0.13, linewidth=0)
    left.set_xticks(range(3), ["REINFORCE", "return\n− critic", "actor–critic,\nGAE"])
    left.set(ylabel="deviation / length of the mean", title=f"noise of the gradient of {EPISODES} episodes")
    left.grid(axis="x", visible=False)
    right.axhline(0, color=BLACK, linewidth=0.6)
    right.set(xlabel="episodes", ylabel="discounted return (exact)", title="mean and 10–90 % of 20 seeds")
    right.legend(fontsize=7.5, frameon=False, loc="lower right")
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    plain, critic, both = (figures[name] for name in METHODS)
    half = [next((EPISODES * k for k, j in enumerate(of["mean"]) if j >= 0.4), None) for of in (plain, critic, both)]
    return (
        f"At one policy on its way (return {figures['halfway_return']:.2f}) the gradient's variance falls from "
        f"{plain['variance']:.3f} with bare returns to {critic['variance']:.3f} when a learnt critic is taken off and "
        f"{both['variance']:.3f} with GAE (λ = {METHODS['actor–critic, GAE']}). A return of 0.4 is reached after {half[0]}, "
        f"{half[1]} and {half[2]} episodes, each method at the best of {len(RATES)} learning rates."
    )


EXPERIMENT = Experiment(name="actor_critic", measure=measure, draw=draw, seen=seen, tolerance=0.02)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
