"""Whatever is not finite in a step, the step moves nothing, not by a bit, and the next one is as if it had not been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from bridle.batch import Batch
from bridle.errors import NonFiniteStep
from bridle.learn import a2c, ppo
from bridle.learn.a2c import A2CSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.record import UpdateStep
from bridle.learn.step import Evidence
from tests.learn.tabular import Table, batch_of, singles

ACTIONS = [0, 1, 2, 1]
ADVANTAGES = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)


def whole(table: Table, optimiser: Optimiser) -> dict[str, Tensor]:
    """Weights and optimiser state, as they are."""
    state = {name: parameter.detach().clone() for name, parameter in table.named_parameters()}
    return state | optimiser.state()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def spoilt(batch: Batch, column: str, value: float) -> Batch:
    tensor = getattr(batch, column).clone()
    tensor[2] = value
    return replace(batch, **{column: tensor})


def take(table: Table, batch: Batch, optimiser: Optimiser, algorithm: str) -> list[UpdateStep]:
    steps: Iterator[UpdateStep]
    if algorithm == "ppo":
        settings = PPOSettings(epochs=1, minibatches=2)
        steps = ppo.update(table, batch, optimiser, settings, seed=0, step=0)
    else:
        steps = a2c.update(table, batch, optimiser, A2CSettings())
    return list(steps)


class Ill(Table):
    """A table whose answers or gradients can be spoilt."""

    ill: Callable[[Any], Any] | None = None

    def forward(self, units: Any) -> Any:
        found = super().forward(units)
        return found if self.ill is None else self.ill(found)


def spoil_gradient(found: Any) -> Any:
    found.logp.register_hook(lambda gradient: gradient * float("nan"))
    return found


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
@pytest.mark.parametrize(
    ("disease", "what"),
    [
        (("advantages", float("nan")), "advantage"),
        (("returns", float("inf")), "return"),
        (lambda e: replace(e, logp=e.logp * float("nan")), "log-probability"),
        (lambda e: replace(e, logp=e.logp - float("inf")), "log-probability"),
        (lambda e: replace(e, value=e.value + float("inf")), "value"),
        (spoil_gradient, "gradient"),
    ],
)
def test_a_faulty_step_moves_nothing(disease: Any, what: str, algorithm: str, flat: bool) -> None:
    tables = [Ill([0.3, -0.2, 0.1]) for _ in range(2)]
    settings = OptimSettings(lr=0.1)
    optimisers = [
        Optimiser(
            [Group(name="policy", parameters=dict(t.named_parameters()), settings=settings)], total_steps=9, flat=flat
        )
        for t in tables
    ]
    batches = [batch_of(t, singles(ACTIONS), ADVANTAGES) for t in tables]
    for table, optimiser, batch in zip(tables, optimisers, batches, strict=True):
        take(table, batch, optimiser, algorithm)
    ill, optimiser = tables[0], optimisers[0]
    before = whole(ill, optimiser)
    batch = spoilt(batches[0], *disease) if isinstance(disease, tuple) else batches[0]
    ill.ill = None if isinstance(disease, tuple) else disease
    with pytest.raises(NonFiniteStep) as raised:
        take(ill, batch, optimiser, algorithm)
    assert same(whole(ill, optimiser), before)
    ill.ill = None
    assert isinstance(raised.value.evidence, Evidence)
    assert raised.value.rows
    if algorithm == "ppo" or not isinstance(disease, tuple):
        assert what in raised.value.what
    if what == "gradient":
        assert raised.value.parameters == ("logits",)
    for table, own, kept in zip(tables, optimisers, batches, strict=True):
        take(table, kept, own, algorithm)
    assert same(whole(tables[0], optimisers[0]), whole(tables[1], optimisers[1]))


def test_only_the_units_that_hold_it_are_kept() -> None:
    table = Table([0.0, 0.0, 0.0])
    batch = spoilt(batch_of(table, singles(ACTIONS), ADVANTAGES), "advantages", float("nan"))
    own = Optimiser(
        [Group(name="p", parameters=dict(table.named_parameters()), settings=OptimSettings())], total_steps=1
    )
    with pytest.raises(NonFiniteStep) as raised:
        take(table, batch, own, "ppo")
    assert raised.value.rows == (2,)
    evidence = raised.value.evidence
    assert isinstance(evidence, Evidence)
    assert evidence.minibatch is not None
    assert evidence.minibatch.actions.tolist() == [2]
    assert torch.isnan(evidence.minibatch.advantages).all()
