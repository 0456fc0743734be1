"""Activations and layer norms of small networks in compiled code, against float64 autograd of PyTorch's own modules."""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bridle.control import ActorCritic, CategoricalHead, GaussianHead
from bridle.control.own import OwnPerceptrons, quickened
from bridle.control.perceptrons import Perceptrons
from bridle.control.reading import read
from bridle.errors import NonFiniteStep
from tests.control.test_descending import PLAIN, batch_of, learn, optimiser_of, require_alike

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU(approximate="tanh"),
    "elu": nn.ELU,
    "elu of 2.5": lambda: nn.ELU(2.5),
    "leaky relu": lambda: nn.LeakyReLU(0.2),
    "softplus": nn.Softplus,
}

NORMS: dict[str, tuple[Callable[[int], list[nn.Module]], Callable[[int], list[nn.Module]]]] = {
    "no norm": (lambda width: [], lambda width: []),
    "in front": (lambda width: [nn.LayerNorm(width, eps=1e-3)], lambda width: []),
    "behind": (lambda width: [], lambda width: [nn.LayerNorm(width, bias=False)]),
    "both": (lambda width: [nn.LayerNorm(width, elementwise_affine=False)], lambda width: [nn.LayerNorm(width)]),
}


pytestmark = pytest.mark.usefixtures("small_code")


def tower(activation: str, norms: str, widths: tuple[int, ...], outputs: int, *, bias: bool = True) -> nn.Sequential:
    """A user's network with parameters away from where they begin."""
    torch.manual_seed(len(activation) + len(norms))
    before, behind = NORMS[norms]
    layers: list[nn.Module] = []
    for inputs, width in pairwise(widths):
        linear = nn.Linear(inputs, width, bias=bias)
        layers += [linear, *before(width), ACTIVATIONS[activation](), *behind(width)]
    net = nn.Sequential(*layers, nn.Linear(widths[-1], outputs, bias=bias))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return net


def perceptrons_of(net: nn.Module, inputs: int) -> Perceptrons:
    reading = read(net, torch.zeros(2, inputs))
    assert reading is not None
    found = Perceptrons([(reading.form, reading.places)])
    assert found.able
    return found


def by_hand(net: nn.Module, x: Tensor, along: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs [n, A] of the compiled net, those of it frozen, and gradients along slopes [n, A]."""
    net.zero_grad()
    own = perceptrons_of(net, x.shape[1])
    (run,) = own.run(x)
    outputs, frozen = run.outputs[0].T.clone(), torch.empty(along.shape)
    run.pull_back([along.T.contiguous()])
    own.frozen(0, len(x)).outputs(x, frozen)
    return outputs, frozen, [parameter.grad.clone() for parameter in net.parameters() if parameter.grad is not None]


def by_autograd(net: nn.Module, x: Tensor, along: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs and gradients of the same in float64."""
    exact = copy.deepcopy(net).double()
    outputs = exact(x.double())
    exact.zero_grad()
    outputs.backward(along.double())
    return outputs.detach(), [parameter.grad for parameter in exact.parameters() if parameter.grad is not None]


def require_close(found: Tensor, expected: Tensor, share: float) -> None:
    """Each within a share of the largest that there is."""
    assert expected.isfinite().all()
    assert float((found - expected).abs().max()) <= share * max(1e-3, float(expected.abs().max()))


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_there_and_back_it_computes_what_the_module_does(activation: str, norms: str) -> None:
    for widths, rows, bias in (
        ((5, 19, 33), 1, True),
        ((3, 7, 64, 10), 97, False),
        ((9, 1), 4, True),
        ((2, 48), 300, True),
    ):
        net = tower(activation, norms, widths, 3, bias=bias)
        x, along = 2 * torch.randn(rows, widths[0]), torch.randn(rows, 3)
        outputs, frozen, gradients = by_hand(net, x, along)
        exact, expected = by_autograd(net, x, along)
        require_close(outputs, exact, 2e-6)
        require_close(frozen, exact, 2e-6)
        for mine, theirs in zip(gradients, expected, strict=True):
            require_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_and_its_slope_at_any_number(activation: str) -> None:
    """One state, 1, and weights that are the numbers: h is the last layer's gradient and f' that of the first one's bias."""
    ends = torch.tensor([0.0, 1e-30, -1e-30, 87.5, -87.5, 1e4, -1e4, 3e18, -3e18])
    numbers = torch.cat([torch.linspace(-12, 12, 401), torch.linspace(-100, 100, 90), ends])
    net = nn.Sequential(nn.Linear(1, len(numbers)), ACTIVATIONS[activation](), nn.Linear(len(numbers), 1))
    with torch.no_grad():
        net[0].weight.copy_(numbers[:, None])  # type: ignore[union-attr, operator]
        net[0].bias.zero_()  # type: ignore[union-attr, operator]
        net[2].weight.fill_(1.0)  # type: ignore[union-attr, operator]
    one = torch.ones(1, 1)
    _, _, (_, slopes, values, _) = by_hand(net, one, one)
    _, (_, exact_slopes, exact_values, _) = by_autograd(net, one, one)
    large = 1 + exact_values.abs()
    assert float(((values - exact_values).abs() / large).max()) < 4e-7
    assert float((slopes - exact_slopes).abs().max()) < 2e-6


@pytest.mark.parametrize("norms", ["in front", "both"])
def test_rows_without_variance_or_far_from_0_come_out_right(norms: str) -> None:
    net = tower("silu", norms, (1, 24, 19), 1)
    with torch.no_grad():
        net[0].weight[:] = 1.0  # type: ignore[union-attr, operator, index]
        net[0].bias[:] = 0.0  # type: ignore[union-attr, operator, index]
    x = torch.tensor([[0.0], [1.0], [-3.0], [1e4]])  # all numbers of the first layer are the same
    outputs, frozen, gradients = by_hand(net, x, torch.ones(4, 1))
    exact, expected = by_autograd(net, x, torch.ones(4, 1))
    assert torch.equal(outputs, frozen)
    require_close(outputs, exact, 2e-6)
    for mine, theirs in zip(gradients, expected, strict=True):
        require_close(mine, theirs, 2e-5)
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(0.9, 1.1, 24)[:, None])  # type: ignore[union-attr, operator]
    for far in (1e5, 1e15):
        outputs, _, _ = by_hand(net, torch.tensor([[far]]), torch.ones(1, 1))
        require_close(outputs, by_autograd(net, torch.tensor([[far]]), torch.ones(1, 1))[0], 1e-5)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_not_a_number_comes_through_in_its_own_row(activation: str, norms: str) -> None:
    net = tower(activation, norms, (4, 19), 2)
    x = torch.randn(5, 4)
    x[3, 1] = float("nan")
    for outputs in by_hand(net, x, torch.zeros(5, 2))[:2]:
        assert torch.equal(outputs.isnan(), (torch.arange(5) == 3)[:, None].expand(5, 2))


def policy_of(activation: str, norms: str, kind: str, widths: tuple[int, ...] = (6, 19, 33)) -> ActorCritic:
    head = CategoricalHead() if kind == "discrete" else GaussianHead(3, -0.3)
    actor, critic = tower(activation, norms, widths, 3), tower("silu", "behind", (widths[0], 40), 1)  # not alike
    return ActorCritic(actor=actor, critic=critic, head=head)


@pytest.mark.parametrize("kind", ["discrete", "box"])
@pytest.mark.parametrize(
    ("activation", "norms"),
    [("silu", "in front"), ("gelu", "both"), ("tanh", "behind"), ("elu", "no norm"), ("relu", "in front")],
)
def test_steps_in_one_call_are_those_of_the_plain_policy(
    activation: str, norms: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autograd and PyTorch's AdamW, with decay of weights alone; and the same steps one by one, on the fast path."""
    plain = policy_of(activation, norms, kind)
    batch = batch_of(plain, 6, kind, 3, 300)  # type: ignore[arg-type]
    together, single = (quickened(copy.deepcopy(plain), 6) for _ in range(2))
    called: list[Any] = []
    descend = OwnPerceptrons.descend
    for policy in (together, single):
        assert isinstance(policy, OwnPerceptrons)
        policy.acting(batch.units.observations, 1, np.random.default_rng(0))  # type: ignore[attr-defined]
        called.clear()
        way = descend if policy is together else lambda *_: None
        monkeypatch.setattr(OwnPerceptrons, "descend", lambda *a, way=way: called.append(way(*a)) or called[-1])
        own = copy.deepcopy(plain)
        optimisers = optimiser_of(policy), optimiser_of(own, flat=False)
        require_alike(learn(policy, batch, PLAIN, optimisers[0]), learn(own, batch, PLAIN, optimisers[1]), 1e-3, 1e-4)
        assert any(called) is (policy is together)
        for mine, theirs in zip(policy.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
        state, expected = (optimiser.state() for optimiser in optimisers)
        assert state.keys() == expected.keys()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name].to(value), rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("norms", ["in front", "both"])
def test_each_parameter_that_is_nan_stops_it(norms: str) -> None:
    for spoilt in range(len(list(policy_of("silu", norms, "box").parameters()))):
        plain = policy_of("silu", norms, "box")
        policy = quickened(plain, 6)
        batch, optimiser = batch_of(plain, 6, "box", 3, 30), optimiser_of(plain)  # type: ignore[arg-type]
        policy.acting(batch.units.observations, 1, np.random.default_rng(0))  # type: ignore[attr-defined]
        with torch.no_grad():
            list(policy.parameters())[spoilt].view(-1)[0] = float("nan")
        with pytest.raises(NonFiniteStep):
            learn(policy, batch, PLAIN, optimiser)  # type: ignore[arg-type]
        assert not optimiser.state()


def test_two_passes_before_their_gradients_do_not_mix() -> None:
    """What norms and activations keep for the way back belongs to its own run."""
    net = tower("silu", "both", (4, 19, 12), 2)
    own = perceptrons_of(net, 4)
    one, other = torch.randn(7, 4), torch.randn(7, 4)
    runs = [own.run(x)[0] for x in (one, other)]
    for run in runs:
        run.pull_back([torch.ones(2, 7)])
    expected = by_autograd(net, torch.cat([one, other]), torch.ones(14, 2))[1]
    for parameter, theirs in zip(net.parameters(), expected, strict=True):
        assert parameter.grad is not None
        require_close(parameter.grad, theirs, 1e-5)
