"""One normaliser per minibatch, whatever the cut."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.batch import Batch, Evaluation
from bridle.errors import ConfigError, NonFiniteStep
from bridle.learn import ppo
from bridle.learn.a2c import A2CObjective, A2CSettings
from bridle.learn.minibatches import epoch_order, minibatches
from bridle.learn.ppo import PPOObjective, PPOSettings
from bridle.learn.step import (
    Minibatch,
    Objective,
    Seen,
    Slopes,
    accumulate,
    action_weights,
    micro_batches,
    padding_share,
)
from bridle.random import generator
from tests.learn.tabular import Draws, Table, batch_of, optimiser_of, singles


def ragged() -> Draws:
    return Draws(tuple(torch.arange(n) % 3 for n in (1, 7, 2, 5, 3, 4)))


def parts_of(batch: Batch, count: int, order: torch.Tensor | None = None, **kinds: Any) -> list[Any]:
    return list(minibatches(batch, count, orders=[order], **{"whiten_here": False, "per": "action", **kinds}))


def learn_from(
    table: Table, batch: Batch, units: list[int], objective: Plain, budget: int | None, **kinds: Any
) -> Seen:
    """One minibatch of the units named."""
    ((_, own, part),) = parts_of(chosen(batch, units), 1, **kinds)
    return accumulate(table, own, part, objective, micro_budget=budget)


def chosen(batch: Batch, units: list[int]) -> Batch:
    at = batch.actions_of(torch.tensor(units))
    columns = {name: getattr(batch, name)[at] for name in ("old_logp", "old_value", "advantages", "returns", "episode")}
    return Batch(units=batch.units.select(torch.tensor(units)), **columns)


class Plain:
    """A loss by name; its derivatives by autograd."""

    def __init__(self, loss: Callable[[Any, Minibatch], torch.Tensor]) -> None:
        self.loss = loss

    def derivatives(self, seen: Seen, m: Minibatch) -> Slopes:
        answers = {name: getattr(seen, name).clone().requires_grad_() for name in ("logp", "value")}
        total = self.loss(SimpleNamespace(**answers), m).sum()
        logp, value = torch.autograd.grad(total, [answers["logp"], answers["value"]], allow_unused=True)
        return Slopes(logp=logp, value=value)


@given(st.integers(1, 40), st.integers(1, 40))
def test_minibatches_take_every_unit_once_and_differ_by_one(units: int, count: int) -> None:
    table = Table([0.0, 0.0, 0.0])
    batch = batch_of(table, singles([i % 3 for i in range(units)]), torch.arange(units, dtype=torch.float64))
    if count > units:
        with pytest.raises(ConfigError, match="minibatches"):
            parts_of(batch, count)
        return
    parts = parts_of(batch, count, epoch_order(units, seed=0, step=0, epoch=0))
    assert len(parts) == count
    assert sorted(torch.cat([rows for rows, _, _ in parts]).tolist()) == list(range(units))
    sizes = [len(rows) for rows, _, _ in parts]
    assert max(sizes) - min(sizes) <= 1


def test_columns_and_units_of_a_part_belong_to_its_actions() -> None:
    batch = batch_of(Table([0.3, 0.0, -0.4]), ragged(), torch.arange(22, dtype=torch.float64))
    taken = torch.cat(batch.units.actions)
    for rows, units, part in parts_of(batch, 4, torch.tensor([4, 0, 3, 1, 5, 2])):
        assert part.actions.tolist() == batch.actions_of(rows).tolist()
        assert part.advantages.tolist() == part.actions.tolist()
        assert torch.cat(units.actions).tolist() == taken[part.actions].tolist()
        assert torch.equal(part.old_logp, batch.old_logp[part.actions])
        assert float(part.weights.sum()) == pytest.approx(1.0)


def test_a_unit_without_actions_beside_one_of_two() -> None:
    """As many actions as units, and yet not one each."""
    units = Draws((torch.tensor([], dtype=torch.int64), torch.tensor([0, 1])))
    batch = batch_of(Table([0.3, 0.0, -0.4]), units, torch.arange(2, dtype=torch.float64))
    parts = parts_of(batch, 2, torch.tensor([1, 0]))
    assert [part.actions.tolist() for _, _, part in parts] == [[0, 1], []]


def test_order_is_a_function_of_seed_step_and_epoch() -> None:
    def order(seed: int, step: int, epoch: int) -> tuple[int, ...]:
        return tuple(epoch_order(50, seed=seed, step=step, epoch=epoch).tolist())

    assert order(0, 3, 1) == order(0, 3, 1)
    assert len({order(*key) for key in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4


@given(st.lists(st.integers(1, 30), min_size=1, max_size=30), st.integers(1, 100))
def test_micro_batches_cover_and_keep_the_budget(lengths: list[int], budget: int) -> None:
    groups = micro_batches(torch.tensor(lengths), budget)
    assert sorted(torch.cat(groups).tolist()) == list(range(len(lengths)))
    for group in groups:
        longest = max(lengths[i] for i in group.tolist())
        assert len(group) == 1 or len(group) * longest <= budget


def test_padding_is_a_few_per_cent_of_ragged_answers_and_none_of_equal_ones() -> None:
    """Lengths drawn evenly from 40 to 168: in one group a third would be padding; every cut keeps all units."""
    lengths = torch.from_numpy(generator(0, "ragged").integers(40, 168, size=256))
    assert padding_share(lengths, None) > 0.3
    for budget in (2048, 16_384, 1_000_000):
        assert padding_share(lengths, budget) < 0.06
    assert padding_share(torch.full((64,), 96), 2048) == 0.0


@given(st.lists(st.integers(1, 400), min_size=1, max_size=7), st.integers(400, 3000))
def test_the_cut_costs_least_of_all(lengths: list[int], budget: int) -> None:
    """Against every way to cut the sorted units: units × longest, and 256 tokens a group."""
    ordered = sorted(lengths)

    def cost(groups: list[list[int]]) -> float:
        own = [len(group) * max(group) for group in groups]
        return sum(own) + 256 * len(groups) if max(own) <= budget else math.inf

    ways = []
    for cuts in itertools.product([False, True], repeat=len(ordered) - 1):
        groups = [[ordered[0]]]
        for cut, length in zip(cuts, ordered[1:], strict=True):
            if cut:
                groups.append([length])
            else:
                groups[-1].append(length)
        ways.append(cost(groups))
    found = [[lengths[i] for i in group.tolist()] for group in micro_batches(torch.tensor(lengths), budget)]
    assert cost(found) == min(ways)


def test_weights_by_hand() -> None:
    episode = torch.tensor([4, 4, 4, 9])
    torch.testing.assert_close(action_weights(episode, "action"), torch.full((4,), 0.25))
    torch.testing.assert_close(action_weights(episode, "episode"), torch.tensor([1 / 6, 1 / 6, 1 / 6, 1 / 2]))


@pytest.mark.parametrize("per", ["action", "episode"])
@pytest.mark.parametrize("whiten_here", [False, True])
def test_gradient_does_not_depend_on_the_cut(per: str, whiten_here: bool) -> None:
    """Sum over a ragged minibatch divided once: any micro-batch budget and any order of units give the same gradient."""
    units = ragged()
    advantages = torch.linspace(-1, 2, 22, dtype=torch.float64)
    gradients = []
    for budget, index in [(None, [0, 1, 3, 5]), (7, [0, 1, 3, 5]), (1, [5, 3, 1, 0]), (10, [3, 0, 5, 1])]:
        table = Table([0.3, -0.2, 0.1])
        batch = batch_of(table, units, advantages)
        objective = Plain(lambda e, m: -(e.logp - m.old_logp).exp() * m.advantages + (e.value - m.returns) ** 2)
        learn_from(table, batch, index, objective, budget, whiten_here=whiten_here, per=per)
        assert (len(table.calls) > 1) == (budget is not None)
        gradients.append(torch.cat([table.logits.grad, table.value.grad[None]]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-12, atol=1e-14)


def test_gradient_by_hand() -> None:
    """Two units of 1 and 3 actions, token mean: −(1/4) Σ A ∇log π, with ∇log π(a) = e_a − π."""
    table = Table([0.0, 0.0, 0.0])
    units = Draws((torch.tensor([0]), torch.tensor([1, 2, 1])))
    advantages = torch.tensor([1.0, 2.0, -1.0, 3.0], dtype=torch.float64)
    batch = batch_of(table, units, advantages)
    learn_from(table, batch, [1, 0], Plain(lambda e, m: -e.logp * m.advantages), None)
    credit = torch.tensor([1.0, 5.0, -1.0], dtype=torch.float64)
    expected = -(credit - 5.0 / 3.0) / 4
    torch.testing.assert_close(table.logits.grad, expected)


def test_what_is_seen_comes_back_in_place() -> None:
    table = Table([1.0, 0.0, -1.0])
    units = ragged()
    batch = batch_of(table, units, torch.arange(22, dtype=torch.float64))
    seen = learn_from(table, batch, [4, 1, 0], Plain(lambda e, m: e.logp * 0), 3)
    assert len(table.calls) > 1
    torch.testing.assert_close(seen.logp, chosen(batch, [4, 1, 0]).old_logp)


def test_a_loss_that_is_not_finite_names_its_units() -> None:
    table = Table([0.0, 0.0, 0.0])
    batch = batch_of(table, ragged(), torch.full((22,), float("inf"), dtype=torch.float64))
    with pytest.raises(NonFiniteStep) as caught:
        list(ppo.update(table, batch, optimiser_of(table), PPOSettings(minibatches=1, whiten="none"), seed=0, step=0))
    assert sorted(caught.value.rows) == [0, 1, 2, 3, 4, 5]


SETTINGS = [
    PPOSettings(),
    PPOSettings(clip=None, value_clip=0.1, entropy_coefficient=0.3),
    PPOSettings(clip_high=0.4, dual_clip=2.0, value_coefficient=0.3),
    PPOSettings(kl_loss="exact"),
    PPOSettings(kl_loss="k2", entropy_coefficient=0.1),
    PPOSettings(kl_loss="k3", clip=0.1),
]


@pytest.mark.parametrize(
    "objective",
    [
        *(PPOObjective(settings=s, kl_coefficient=0.7, critic_only=False) for s in SETTINGS),
        PPOObjective(settings=PPOSettings(value_clip=0.2), kl_coefficient=0.0, critic_only=True),
        A2CObjective(settings=A2CSettings(entropy_coefficient=0.2, value_coefficient=0.4)),
    ],
)
def test_derivatives_are_those_of_the_loss(objective: Objective) -> None:
    """Autograd through the plain loss is the oracle; ratios on both sides of the clip, advantages of both signs."""
    noise = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(200, generator=noise, dtype=torch.float64)  # noqa: E731
    part = Minibatch(
        actions=torch.arange(200),
        old_logp=-draw().abs(),
        old_value=draw(),
        advantages=draw(),
        returns=draw(),
        weights=torch.full((200,), 1 / 200),
        ref_logp=-draw().abs(),
    )
    answers = {
        "logp": part.old_logp + 0.5 * draw(),
        "entropy": draw().abs(),
        "value": draw(),
        "exact_kl": draw().abs(),
    }
    leaves = {name: value.clone().requires_grad_() for name, value in answers.items()}
    total = objective.loss(Evaluation(**leaves), part).sum()
    expected = torch.autograd.grad(total, [*leaves.values()], allow_unused=True)
    slopes = objective.derivatives(Seen(**answers), part)
    for name, gradient in zip(leaves, expected, strict=True):
        slope = getattr(slopes, name)
        if gradient is None or not bool(gradient.any()):
            assert slope is None or not bool(slope.any())
        else:
            torch.testing.assert_close(slope, gradient, rtol=1e-12, atol=1e-12)
