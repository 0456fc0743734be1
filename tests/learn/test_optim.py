"""AdamW's first steps by hand, schedules by hand, and a state that comes back bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from bridle.errors import ConfigError, NonFiniteStep, RunError
from bridle.learn.optim import Group, Optimiser, OptimSettings, learning_rate

Made = tuple[dict[str, nn.Parameter], Optimiser]


@pytest.fixture(params=[False, True], ids=["separate", "flat"])
def make(request: pytest.FixtureRequest) -> Callable[..., Made]:
    def build(lr: float = 0.1, **options: object) -> Made:
        parameters = {"b": nn.Parameter(torch.tensor([0.5])), "w": nn.Parameter(torch.tensor([[1.0, -2.0]]))}
        settings = OptimSettings(lr=lr, **{"max_grad_norm": None, **options})
        groups = [Group(name="all", parameters=parameters, settings=settings)]
        return parameters, Optimiser(groups, total_steps=10, flat=request.param)

    return build


def test_first_step_is_lr_times_sign(make: Callable[..., Made]) -> None:
    """Adam's bias correction makes the first step lr · g/(|g| + eps) (Kingma & Ba 2015, Algorithm 1 with t = 1)."""
    parameters, optimiser = make(lr=0.1)
    parameters["w"].grad = torch.tensor([[3.0, -0.001]])
    optimiser.step()
    torch.testing.assert_close(parameters["w"].data, torch.tensor([[0.9, -1.9]]), atol=1e-5, rtol=0)
    torch.testing.assert_close(parameters["b"].data, torch.tensor([0.5]))


def test_weight_decay_is_decoupled_and_spares_vectors(make: Callable[..., Made]) -> None:
    parameters, optimiser = make(lr=0.1, weight_decay=0.5)
    for p in parameters.values():
        p.grad = torch.zeros_like(p)
    optimiser.step()
    torch.testing.assert_close(parameters["w"].data, torch.tensor([[0.95, -1.9]]))
    torch.testing.assert_close(parameters["b"].data, torch.tensor([0.5]))


def test_schedules_by_hand() -> None:
    linear = OptimSettings(lr=1.0, schedule="linear", warmup_steps=2, min_lr_share=0.1)
    assert [learning_rate(linear, s, 12) for s in (0, 1, 2, 7, 12)] == pytest.approx([0.5, 1.0, 1.0, 0.55, 0.1])
    cosine = OptimSettings(lr=2.0, schedule="cosine")
    assert [learning_rate(cosine, s, 4) for s in (0, 1, 2, 4)] == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 0.0])
    assert learning_rate(OptimSettings(lr=0.3), 999, 10) == 0.3


@pytest.mark.parametrize("flat", [False, True])
def test_each_group_is_clipped_by_its_own_norm(flat: bool) -> None:
    """Adam's second moment after one step is (1 − β₂) g² of the gradient it was given."""
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    groups = [
        Group(name="a", parameters={"a": a}, settings=OptimSettings(max_grad_norm=1.0)),
        Group(name="b", parameters={"b": b}, settings=OptimSettings(max_grad_norm=None)),
    ]
    optimiser = Optimiser(groups, total_steps=1, flat=flat)
    a.grad, b.grad = torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0])
    assert optimiser.step() == pytest.approx({"a": 5.0, "b": 50.0})
    given = {name: (optimiser.state()[f"{name}/{name}/exp_avg_sq"] / 0.001).sqrt() for name in "ab"}
    torch.testing.assert_close(given["a"], torch.tensor([0.6, 0.8]), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(given["b"], torch.tensor([30.0, 40.0]))
    assert a.grad is None or not bool(a.grad.any())


def test_a_flat_group_moves_as_pytorchs_adamw_does() -> None:
    """PyTorch's own AdamW is the oracle, with decay, over steps of changing learning rate."""
    torch.manual_seed(0)
    shapes = {"w": (5, 3), "b": (5,), "head": (2, 5)}
    start = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    mine = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    theirs = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    settings = OptimSettings(lr=0.05, schedule="linear", weight_decay=0.1, max_grad_norm=None, beta2=0.99, eps=1e-5)
    optimiser = Optimiser([Group(name="g", parameters=mine, settings=settings)], total_steps=20, flat=True)
    oracle = torch.optim.AdamW(
        [
            {"params": [theirs["w"], theirs["head"]], "weight_decay": 0.1},
            {"params": [theirs["b"]], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.99),
        eps=1e-5,
    )
    for k in range(20):
        optimiser.schedule(k)
        for group in oracle.param_groups:
            group["lr"] = learning_rate(settings, k, 20)
        for name, shape in shapes.items():
            gradient = torch.randn(shape, dtype=torch.float64)
            mine[name].grad.copy_(gradient)
            theirs[name].grad = gradient
        optimiser.step()
        oracle.step()
    for name in shapes:
        torch.testing.assert_close(mine[name].data, theirs[name].data, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: a flat group on one is not tested here")
def test_a_flat_group_moves_alike_on_every_device() -> None:
    found = []
    for device in ("cpu", "cuda"):
        parameter = nn.Parameter(torch.tensor([[1.0, -2.0]], device=device))
        group = Group(name="g", parameters={"w": parameter}, settings=OptimSettings(lr=0.1, weight_decay=0.1))
        optimiser = Optimiser([group], total_steps=1, flat=True)
        for k in range(3):
            parameter.grad = torch.tensor([[math.sin(k), math.cos(k)]], device=device)
            optimiser.step()
        found.append(parameter.detach().cpu())
    torch.testing.assert_close(*found)


def test_a_flat_group_is_still_a_module_of_named_parts() -> None:
    """Autograd adds into the buffer, and loading a state dict fills it."""
    model = nn.Linear(3, 2)
    group = Group(name="g", parameters=dict(model.named_parameters()), settings=OptimSettings(lr=0.1))
    optimiser = Optimiser([group], total_steps=1, flat=True)
    model.load_state_dict({"weight": torch.ones(2, 3), "bias": torch.zeros(2)})
    model(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert optimiser.step()["g"] == pytest.approx(math.sqrt(2 * 14 + 2))
    torch.testing.assert_close(model.weight.data, torch.full((2, 3), 0.9), atol=1e-5, rtol=0)


def test_a_gradient_that_is_not_finite_moves_nothing(make: Callable[..., Made]) -> None:
    parameters, optimiser = make()
    parameters["w"].grad, parameters["b"].grad = torch.tensor([[float("nan"), 0.0]]), torch.tensor([1.0])
    with pytest.raises(NonFiniteStep, match="all") as caught:
        optimiser.step(torch.tensor([7, 8]))
    assert caught.value.rows == (7, 8)
    assert parameters["b"].item() == 0.5
    assert parameters["b"].grad is None or not bool(parameters["b"].grad.any())


def test_state_comes_back_bit_for_bit(make: Callable[..., Made]) -> None:
    def steps(parameters: dict[str, nn.Parameter], optimiser: Optimiser, start: int, stop: int) -> None:
        for k in range(start, stop):
            optimiser.schedule(k)
            parameters["w"].grad = torch.tensor([[math.sin(k), math.cos(k)]])
            parameters["b"].grad = torch.tensor([math.sin(2 * k)])
            optimiser.step()

    whole, optimiser = make(schedule="linear", warmup_steps=3)
    steps(whole, optimiser, 0, 9)
    first, before = make(schedule="linear", warmup_steps=3)
    steps(first, before, 0, 4)
    second, after = make(schedule="linear", warmup_steps=3)
    for name, p in second.items():
        p.data.copy_(first[name].data)
    after.load_state(before.state())
    steps(second, after, 4, 9)
    for name in whole:
        assert torch.equal(whole[name], second[name])


def test_a_state_of_another_model_is_refused(make: Callable[..., Made]) -> None:
    parameters, optimiser = make()
    parameters["w"].grad = torch.ones(1, 2)
    optimiser.step()
    state = optimiser.state()
    with pytest.raises(RunError, match="does not fit"):
        make()[1].load_state({**state, "all/w/exp_avg": torch.zeros(3)})
    with pytest.raises(RunError, match="lacks"):
        make()[1].load_state({**state, "all/other/exp_avg": torch.zeros(3)})


def test_parameters_belong_to_one_group() -> None:
    p = nn.Parameter(torch.zeros(1))
    with pytest.raises(ValueError, match="shares"):
        Optimiser([Group(name=n, parameters={"p": p}, settings=OptimSettings()) for n in "ab"], total_steps=1)


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"lr": float("nan")}, {"warmup_steps": -1}, {"beta1": 1.0}, {"eps": 0.0}, {"max_grad_norm": 0.0}],
)
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        OptimSettings(**bad)
