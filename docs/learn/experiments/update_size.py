"""The size of a PPO update with and without the clip: many epochs on one batch, over seeds.

    python docs/learn/experiments/update_size.py [--check]

The update is Bridle's own (``bridle.learn.ppo``) on a table of logits; KL and return are exact.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch
from jaxtyping import Float, Int
from learn_page import BLACK, BLUE, ORANGE, Experiment, Value, panels, run
from learn_world import World, grid
from torch import Tensor, nn

from bridle.batch import Batch, Evaluation
from bridle.core.diagnostics import ratio_extremes
from bridle.core.divergence import exact_kl
from bridle.core.losses import importance_ratio
from bridle.core.returns import gae, lambda_returns
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings, update
from bridle.random import generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CLIPS: dict[str, float | None] = {"no clip": None, "clip 0.2": 0.2}
EPISODES, EPOCHS, LAM = 8, 60, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Visits:
    """The units: one visit to a state with the action taken there."""

    states: Int[Tensor, " U"]
    """[U] s_t."""
    actions: Int[Tensor, " U"]
    """[U] a_t."""

    def __len__(self) -> int:
        """Return U."""
        return len(self.states)

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        """[U] one action each."""
        return torch.ones(len(self), dtype=torch.int64)

    @property
    def lengths(self) -> Int[Tensor, " U"]:
        """[U] all cost alike."""
        return self.sizes

    def select(self, index: Int[Tensor, " M"] | slice) -> Self:
        """Return the visits at ``index``."""
        return type(self)(states=self.states[index], actions=self.actions[index])


class Table(nn.Module):
    """A policy and a critic that are tables."""

    def __init__(self, logits: Float[Tensor, "S A"], values: Float[Tensor, " S"]) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits.clone())
        self.values = nn.Parameter(values.clone())

    def forward(self, units: Visits) -> Evaluation:
        """Evaluate the visits' actions under the present tables."""
        logp = self.logits.log_softmax(1)[units.states]
        return Evaluation(
            logp=logp.gather(1, units.actions.unsqueeze(1)).squeeze(1),
            entropy=-(logp.exp() * logp).sum(1),
            value=self.values[units.states],
        )


def batch_of(world: World, table: Table, seed: int) -> Batch:
    """Collect episodes of the table's policy and estimate their advantages by GAE with its critic."""
    policy = table.logits.detach().softmax(1)
    e = world.draw(policy.expand(EPISODES, -1, -1), steps=100, rng=generator(seed, "learn.update"))
    values = torch.cat([table.values.detach(), torch.zeros(1, dtype=torch.float64)])
    facts = (e.rewards, values[e.states], values[e.successors], e.terminated, e.truncated)
    units = Visits(states=e.states[e.mask], actions=e.actions[e.mask])
    with torch.no_grad():
        said = table(units)
    return Batch(
        units=units,
        old_logp=said.logp,
        old_value=said.value,
        advantages=gae(*facts, gamma=world.gamma, lam=LAM, mask=e.mask)[e.mask],
        returns=lambda_returns(*facts, gamma=world.gamma, lam=LAM, mask=e.mask)[e.mask],
        episode=torch.arange(EPISODES).unsqueeze(1).expand_as(e.states)[e.mask],
    )


def one_update(world: World, logits: Float[Tensor, "S A"], clip: float | None, seed: int) -> dict[str, list[float]]:
    """Figures after every epoch of one update from ``logits`` with their exact critic."""
    table = Table(logits, world.values(logits.softmax(1)))
    batch = batch_of(world, table, seed)
    units = batch.units
    assert isinstance(units, Visits)
    settings = OptimSettings(lr=0.03, max_grad_norm=None)
    groups = [Group(name=n, parameters={n: p}, settings=settings) for n, p in table.named_parameters()]
    optimiser = Optimiser(groups, total_steps=1)
    found: dict[str, list[float]] = {"kl": [], "largest": [], "smallest": [], "return": []}
    chosen = PPOSettings(epochs=EPOCHS, minibatches=4, clip=clip)
    for count, _ in enumerate(update(table, batch, optimiser, chosen, seed=seed, step=0)):
        if (count + 1) % 4:
            continue
        new = table.logits.detach()
        with torch.no_grad():
            low, high = ratio_extremes(importance_ratio(table(units).logp, batch.old_logp))
        found["kl"].append(float(exact_kl(logits, new)[units.states].mean()))
        found["largest"].append(float(high))
        found["smallest"].append(float(low))
        found["return"].append(float(world.expected_return(new.softmax(1))))
    return found


def half_trained(world: World) -> Float[Tensor, "S A"]:
    """Return logits of a policy on its way: a temperature of the exact action values of the uniform policy."""
    uniform = torch.full((len(world.start), 4), 0.25, dtype=torch.float64)
    return world.action_values(uniform) / 0.25


def measure(seeds: int = 20) -> dict[str, Value]:
    """Median and range over seeds after each epoch, with and without the clip."""
    world = grid()
    logits = half_trained(world)
    figures: dict[str, Value] = {"start": float(world.expected_return(logits.softmax(1))), "seeds": seeds}
    for name, clip in CLIPS.items():
        runs = [one_update(world, logits, clip, seed) for seed in range(seeds)]
        stacked = {what: torch.tensor([r[what] for r in runs]) for what in runs[0]}
        figures[name] = {
            what: {q: x.quantile(level, 0).tolist() for q, level in (("low", 0.1), ("median", 0.5), ("high", 0.9))}
            for what, x in stacked.items()
        }
        worse = (stacked["return"][:, -1] < figures["start"]).float().mean()
        figures[name]["worse_share"] = float(worse)
    return figures


def draw(figures: Mapping[str, Value]) -> Figure:
    """KL, ratio extremes and return against epochs."""
    figure, axes = panels(3, height=3.0)
    epochs = range(1, EPOCHS + 1)
    for name, colour, style in (("no clip", ORANGE, "--"), ("clip 0.2", BLUE, "-")):
        of = figures[name]
        for ax, what in zip((axes[0], axes[1], axes[1], axes[2]), ("kl", "largest", "smallest", "return"), strict=True):
            label = name if what != "smallest" else None
            ax.plot(epochs, of[what]["median"], style, color=colour, label=label)
            ax.fill_between(epochs, of[what]["low"], of[what]["high"], color=colour, alpha=0.15, linewidth=0)
    axes[0].set(yscale="log", ylabel="nats", title="mean KL(old ‖ new)")
    axes[1].set(yscale="log", ylabel="π / π_old", title="largest and smallest ratio")
    axes[2].axhline(figures["start"], color=BLACK, linewidth=0.8, linestyle=":", label="before")
    axes[2].set(ylabel="discounted return", title="return (exact)")
    for ax in axes:
        ax.set_xlabel("epochs on one batch")
    figure.legend(*axes[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def seen(figures: Mapping[str, Value]) -> str:
    """The page's sentences."""
    free, held = figures["no clip"], figures["clip 0.2"]

    def last(of: Mapping[str, Value], what: str) -> float:
        return float(of[what]["median"][-1])

    best = max(range(EPOCHS), key=lambda i: free["return"]["median"][i])
    return (
        f"After {EPOCHS} epochs on one batch of {EPISODES} episodes the KL is {last(free, 'kl'):.2f} nats without the clip and "
        f"{last(held, 'kl'):.3f} with it, the largest ratio {last(free, 'largest'):.1f} and {last(held, 'largest'):.2f} "
        f"(medians of {figures['seeds']} seeds). Before the update the return is {figures['start']:.2f}. Without the clip it "
        f"rises to {free['return']['median'][best]:.2f} after {best + 1} epochs and falls again, to "
        f"{last(free, 'return'):.2f}, and {100 * free['worse_share']:.0f} % of the seeds end worse than they began; with the "
        f"clip it is {last(held, 'return'):.2f} and stays there, and {100 * held['worse_share']:.0f} % end worse."
    )


EXPERIMENT = Experiment(name="update_size", measure=measure, draw=draw, seen=seen, tolerance=0.02)

if __name__ == "__main__":
    sys.exit(run(EXPERIMENT))
