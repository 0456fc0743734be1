"""A step of AdamW that would leave float32's range is known before it is taken, and not taken."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bridle.errors import NonFiniteStep
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.reach import after_step, reach

BETAS = [(0.9, 0.999), (0.9, 0.95), (0.0, 0.99), (0.5, 0.3), (0.99, 0.999), (0.0, 0.0)]


@pytest.mark.parametrize(("beta1", "beta2"), BETAS)
def test_no_step_of_adam_goes_further_than_its_reach(beta1: float, beta2: float) -> None:
    """PyTorch's AdamW in float64, on gradients that are alike, jump, grow, shrink, or come once in a while."""
    draws, steps = torch.Generator().manual_seed(0), 200
    growth = torch.arange(steps, dtype=torch.float64)[:, None]
    kinds = [
        torch.ones(steps, 1, dtype=torch.float64),
        torch.randn(steps, 8, generator=draws, dtype=torch.float64).exp(),
        torch.randn(steps, 8, generator=draws, dtype=torch.float64),
        torch.cat([(factor**growth).clamp(1e-60, 1e60) for factor in (0.5, 0.95, 1.1, beta2 or 1, beta1 or 1)], dim=1),
        (torch.rand(steps, 8, generator=draws, dtype=torch.float64) < 0.02).double(),
        1e-9 + (growth % 97 == 5).double(),
    ]
    gradients = torch.cat(kinds, dim=1)
    weights = nn.Parameter(torch.zeros(gradients.shape[1], dtype=torch.float64))
    adam = torch.optim.AdamW([weights], lr=1.0, betas=(beta1, beta2), eps=1e-300, weight_decay=0.0)
    furthest = 0.0
    for gradient in gradients:
        before, weights.grad = weights.detach().clone(), gradient
        adam.step()
        furthest = max(furthest, float((weights.detach() - before).abs().max()))
    assert 0.9 <= furthest <= reach(beta1, beta2)


def test_the_reach_of_plain_signs_is_one_and_some_decays_have_none() -> None:
    assert reach(0.0, 0.0) == 1.0
    assert reach(0.95, 0.9) == reach(0.9, 0.0) == math.inf


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_step_is_foreseen_as_pytorch_takes_it(decay: float) -> None:
    draws = torch.Generator().manual_seed(1)
    weights = nn.Parameter(torch.randn(5, 3, generator=draws, dtype=torch.float64))
    adam = torch.optim.AdamW([weights], lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=decay)
    nothing = torch.zeros_like(weights)
    for step in range(1, 6):
        weights.grad = torch.randn(5, 3, generator=draws, dtype=torch.float64)
        state = adam.state.get(weights, {})
        slots = {"value": weights.detach().clone(), "grad": weights.grad}
        slots |= {slot: state.get(slot, nothing).clone() for slot in ("exp_avg", "exp_avg_sq")}
        foreseen = after_step(slots, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-3, decay=decay, step=step)
        adam.step()
        assert torch.allclose(foreseen, weights.detach(), rtol=1e-12)


def made(flat: bool, settings: OptimSettings, largest: float) -> tuple[dict[str, nn.Parameter], Optimiser]:
    parameters = {"first": nn.Parameter(torch.ones(2, 3)), "second": nn.Parameter(torch.ones(4))}
    parameters["second"].data[2] = largest
    return parameters, Optimiser([Group(name="g", parameters=parameters, settings=settings)], total_steps=9, flat=flat)


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize(
    ("settings", "largest", "names"),
    [
        (OptimSettings(lr=1e38), 1.0, ("first", "second")),
        (OptimSettings(lr=1e37), -3.35e38, ("second",)),
        (OptimSettings(lr=1e37), 3.35e38, ()),
        (OptimSettings(lr=1e-3), math.nan, ("second",)),
        (OptimSettings(lr=1e-3, beta1=0.95, beta2=0.9), 1.0, ()),
        (OptimSettings(lr=1e20, weight_decay=1e20), 1.0, ("first",)),
    ],
)
def test_a_step_that_leaves_float32_moves_nothing_and_names_what_it_would_spoil(
    flat: bool, settings: OptimSettings, largest: float, names: tuple[str, ...]
) -> None:
    parameters, optimiser = made(flat, settings, largest)
    for _ in range(2):
        before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        state = optimiser.state()
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        if not names:
            optimiser.step()
            assert all(bool(torch.isfinite(p).all()) for p in parameters.values())
            continue
        with pytest.raises(NonFiniteStep, match="a weight of g after its step is not finite") as found:
            optimiser.step(torch.tensor([4, 2]))
        assert (found.value.parameters, found.value.rows) == (names, (4, 2))
        assert all(torch.equal(before[name], p) or math.isnan(largest) for name, p in parameters.items())
        assert {name: t.tolist() for name, t in optimiser.state().items()} == {n: t.tolist() for n, t in state.items()}
        assert all(p.grad is None or not p.grad.any() for p in parameters.values())


def test_weights_that_were_put_back_are_looked_at_anew() -> None:
    parameters, optimiser = made(True, OptimSettings(lr=1e37), 1.0)
    parameters["second"].grad = torch.ones(4)
    optimiser.step()
    with torch.no_grad():
        parameters["second"].fill_(-3.39e38)
    optimiser.load_state(optimiser.state())
    parameters["second"].grad = torch.ones(4)
    with pytest.raises(NonFiniteStep, match="a weight of g"):
        optimiser.step()
