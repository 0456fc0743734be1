"""Compiled convolutions against PyTorch's on the same weights, in double precision where rounding is asked after."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn
from torch.autograd import forward_ad

from bridle.batch import Batch
from bridle.control import convolutions
from bridle.control.actor_critic import ActorCritic
from bridle.control.convolutions import convolved, served
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import Transitions
from bridle.control.spaces import action_spec, observation_spec
from bridle.errors import NonFiniteStep
from bridle.learn import ppo
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from tests.built import HERE, built


@pytest.fixture(scope="module", params=HERE, autouse=True)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    found = built("convolutions.c", convolutions.load, tmp_path_factory.mktemp("compiled"), request.param)
    if isinstance(found, str):
        pytest.skip(f"not compiled: {found}")
    before, convolutions.library = convolutions.library, found
    yield convolutions.library
    convolutions.library = before


Layer = tuple[int, tuple[int, int], tuple[int, int]]
"""Filters, kernel, strides."""
NATURE: list[Layer] = [(32, (8, 8), (4, 4)), (64, (4, 4), (2, 2)), (64, (3, 3), (1, 1))]


def stack(channels: int, layers: list[Layer], seed: int = 0) -> nn.Sequential:
    noise, modules = torch.Generator().manual_seed(seed), []
    for filters, kernel, stride in layers:
        layer = nn.Conv2d(channels, filters, kernel, stride=stride)
        with torch.no_grad():  # of a size that neither dies out nor grows from layer to layer
            for parameter in layer.parameters():
                spread = 1 / math.sqrt(channels * math.prod(kernel)) if parameter.ndim == 4 else 0.3
                parameter.copy_(spread * torch.randn(parameter.shape, generator=noise))
        modules += [layer, nn.ReLU()]
        channels = filters
    return nn.Sequential(*modules, nn.Flatten())


def drawn(number: int) -> tuple[int, int, tuple[int, int], list[Layer]]:
    """Images, channels, their sides and layers that fit them, drawn from ``number``."""
    draws = np.random.default_rng(number)
    sides, layers = draws.integers(9, 41, 2), []
    images, channels = int(draws.choice([1, 2, 3, 9, 20])), int(draws.choice([1, 2, 3, 4, 5, 16, 19]))
    size = (int(sides[0]), int(sides[1]))
    for _ in range(int(draws.integers(1, 4))):
        kernel = [int(draws.integers(1, min(side, 7) + 1)) for side in sides]
        stride = [int(draws.integers(1, 5)) for _ in sides]
        layers.append((int(draws.choice([1, 5, 8, 15, 16, 17, 32, 40])), tuple(kernel), tuple(stride)))
        sides = [(side - k) // s + 1 for side, k, s in zip(sides, kernel, stride, strict=True)]
    return images, channels, size, layers


def bytes_of(n: int, *size: int, seed: int = 1) -> Tensor:
    return torch.randint(256, (n, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def found(layers: nn.Sequential, images: Tensor) -> Tensor:
    compiled = served(layers, images)
    assert compiled
    return convolved(compiled, images)


def close(mine: Tensor, exact: Tensor, share: float) -> None:
    """Within a share of the largest: what cancels in a sum is rounded as its terms are."""
    scale = float(exact.abs().max())
    assert mine.shape == exact.shape
    assert float((mine.double() - exact).abs().max()) <= share * scale + 1e-30


def agree(images: Tensor, layers: nn.Sequential) -> None:
    features = found(layers, images)
    exact = copy.deepcopy(layers).double()
    expected = exact(images.double() / 255)
    close(features.detach(), expected.detach(), 1e-6)
    with torch.no_grad():
        assert torch.equal(found(layers, images), features)
    slopes = torch.randn(features.shape, generator=torch.Generator().manual_seed(2))
    # a rectifier within rounding of 0 may be on one side here and on the other there
    undecided = exact[:-2](images.double() / 255).detach().flatten(1).abs() < 1e-5
    slopes[undecided] = 0.0
    mine = torch.autograd.grad(features, list(layers.parameters()), slopes)
    theirs = torch.autograd.grad(expected, list(exact.parameters()), slopes.double())
    for one, other in zip(mine, theirs, strict=True):
        close(one, other, 3e-5)


@pytest.mark.parametrize("number", range(30))
def test_features_and_gradients_are_pytorchs(number: int) -> None:
    images, channels, size, layers = drawn(number)
    agree(bytes_of(images, channels, *size), stack(channels, layers, seed=number))


def test_the_nature_cnn_is_pytorchs(threads: int) -> None:
    agree(bytes_of(7, 4, 84, 84), stack(4, NATURE))


def test_an_images_features_do_not_depend_on_the_others() -> None:
    layers, images = stack(4, NATURE), bytes_of(21, 4, 40, 44)
    with torch.no_grad():
        whole = found(layers, images)
        for at in range(0, 21, 5):
            assert torch.equal(found(layers, images[at : at + 5]), whole[at : at + 5])
        assert found(layers, images[:0]).shape == (0, whole.shape[1])


def test_images_that_lie_otherwise_are_the_same_images() -> None:
    layers, images = stack(3, [(8, (3, 3), (2, 2))]), bytes_of(6, 3, 12, 10)
    with torch.no_grad():
        whole = found(layers, images)
        assert torch.equal(found(layers, images.contiguous(memory_format=torch.channels_last)), whole)
        assert torch.equal(found(layers, images[::2]), whole[::2])


def test_gradients_of_two_passes_add_up_and_no_images_have_none() -> None:
    layers, images = stack(4, [(9, (4, 3), (2, 1)), (5, (2, 2), (1, 1))]), bytes_of(6, 4, 13, 11)
    parameters = list(layers.parameters())
    whole = torch.autograd.grad(found(layers, images).sum(), parameters)
    for part in (images[:2], images[2:], images[:0]):
        found(layers, part).sum().backward()
    for parameter, expected in zip(parameters, whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-5, atol=1e-4)


def test_a_graph_that_is_kept_gives_the_same_gradient_twice() -> None:
    layers = stack(4, NATURE)
    features, parameters = found(layers, bytes_of(2, 4, 36, 36)), list(layers.parameters())
    once = torch.autograd.grad(features.sum(), parameters, retain_graph=True)
    again = torch.autograd.grad(features.sum(), parameters)
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))


def test_second_derivatives_are_pytorchs() -> None:
    """TRPO multiplies by the curvature: the gradient of a gradient."""
    layers, images = stack(4, [(6, (3, 3), (2, 2)), (5, (2, 2), (1, 1))]), bytes_of(3, 4, 9, 9)
    parameters, products = list(layers.parameters()), []
    for features in (found(layers, images), layers(images.float() / 255)):
        first = torch.autograd.grad((features**2).sum(), parameters, create_graph=True)
        products.append(torch.autograd.grad(sum((one**2).sum() for one in first), parameters))
    for mine, theirs in zip(*products, strict=True):
        close(mine, theirs.double(), 1e-4)


def test_frozen_weights_get_no_gradient() -> None:
    layers = stack(4, NATURE)
    layers[2].weight.requires_grad_(False)
    found(layers, bytes_of(2, 4, 36, 36)).sum().backward()
    assert all((p.grad is None) is not p.requires_grad for p in layers.parameters())
    layers.requires_grad_(False)
    assert not found(layers, bytes_of(2, 4, 36, 36)).requires_grad


@pytest.mark.parametrize("place", range(6))
def test_a_weight_that_is_nan_shows(place: int) -> None:
    """max(0, NaN) may be 0: a fault would be lost on its way to whoever looks for it."""
    layers, images = stack(4, NATURE), bytes_of(3, 4, 40, 40)
    parameters = list(layers.parameters())
    with torch.no_grad():
        parameters[place].view(-1)[0] = math.nan
    features, expected = found(layers, images), layers(images.float() / 255)
    assert bool(features.isnan().any())
    assert torch.equal(features.isnan(), expected.isnan())
    for mine, theirs in zip(*(torch.autograd.grad(f.sum(), parameters) for f in (features, expected)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3, equal_nan=True)


def test_slopes_that_are_nan_show() -> None:
    layers = stack(4, NATURE)
    features = found(layers, bytes_of(3, 4, 40, 40))
    slopes = torch.zeros_like(features)
    slopes[1, int(features[1].argmax())] = math.nan
    gradients = torch.autograd.grad(features, list(layers.parameters()), slopes)
    assert all(bool(one.isnan().any()) for one in gradients)


def test_threads_agree(threads: int) -> None:
    """The same at one number of threads; sums in other parts at another."""
    layers, images = stack(4, NATURE), bytes_of(5, 4, 44, 40)
    parameters = list(layers.parameters())
    runs = [torch.autograd.grad(found(layers, images).sum(), parameters) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))
    torch.set_num_threads(1)
    for mine, other in zip(runs[0], torch.autograd.grad(found(layers, images).sum(), parameters), strict=True):
        close(mine, other.double(), 1e-6)


def hooked(layers: nn.Sequential) -> None:
    layers[1].register_forward_hook(lambda module, given, answer: answer)


def put_aside(layers: nn.Sequential) -> None:
    layers[0].forward = lambda images: images  # type: ignore[method-assign]


def in_double(layers: nn.Sequential) -> None:
    layers.double()


def across(layers: nn.Sequential) -> None:
    layers.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def other(**changes: object) -> Callable[[nn.Sequential], None]:
    def change(layers: nn.Sequential) -> None:
        layers[0] = nn.Conv2d(4, 8, 3, **changes)  # type: ignore[arg-type]

    return change


def tanh(layers: nn.Sequential) -> None:
    layers[3] = nn.Tanh()


def subclassed(layers: nn.Sequential) -> None:
    class Other(nn.Conv2d):
        pass

    layers[0] = Other(4, 8, 3)


@pytest.mark.parametrize(
    "change",
    [
        hooked,
        put_aside,
        in_double,
        across,
        other(padding=1),
        other(padding="same"),
        other(dilation=2),
        other(groups=2),
        other(bias=False),
        tanh,
        subclassed,
    ],
)
def test_what_is_not_served_is_left_to_pytorch(change: Callable[[nn.Sequential], None]) -> None:
    layers, images = stack(4, [(8, (3, 3), (1, 1)), (5, (2, 2), (1, 1))]), bytes_of(2, 4, 9, 9)
    assert len(served(layers, images)) == 2
    change(layers)
    assert served(layers, images) == []


def test_other_images_are_left_to_pytorch() -> None:
    layers, images = stack(4, [(8, (3, 3), (1, 1))]), bytes_of(2, 4, 9, 9)
    assert served(layers, images.float()) == []
    assert served(layers, images[:, :3]) == []
    assert served(layers, images[:, :, :2]) == []
    assert served(nn.Sequential(nn.Flatten()), images) == []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert served(layers, images) == []


def agent(head: str, side: int = 36, **settings: object) -> ActorCritic:
    seen = observation_spec(spaces.Box(0, 255, (4, side, side), np.uint8), "here")
    acts = action_spec(spaces.Discrete(3) if head == "discrete" else spaces.Box(-1, 1, (2,)), "here")
    policy = build_policy(seen, acts, NetworkSettings(**settings), seed=1)  # type: ignore[arg-type]
    assert isinstance(policy, ActorCritic)
    with torch.no_grad():  # away from the small last layers
        for parameter in policy.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(noise / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1 * noise)
    return policy


def batch_of(policy: ActorCritic, n: int, side: int = 36) -> Batch:
    noise = torch.Generator().manual_seed(4)
    images = bytes_of(n, 4, side, side)
    shown = Observations(vector=torch.empty(n, 0), images=(images,))
    with torch.no_grad():
        acted = policy.act(shown, None, np.random.default_rng(3))
        values = policy.values(shown, None)
    return Batch(
        units=Transitions(observations=shown, actions=acted.actions),
        old_logp=acted.logp,
        old_value=values,
        advantages=torch.randn(n, generator=noise),
        returns=values + torch.randn(n, generator=noise),
        episode=torch.zeros(n, dtype=torch.int64),
    )


def updated(head: str, shared: bool | None) -> tuple[list[Tensor], list[float]]:
    policy = agent(head, shared_trunk=shared)
    batch = batch_of(policy, 32)
    parameters = dict(policy.named_parameters())
    # a step as long as the gradient: AdamW's first ones take each weight by its gradient's sign
    settings = OptimSettings(lr=1e-3, eps=1.0, max_grad_norm=None)
    optimiser = Optimiser([Group(name="policy", parameters=parameters, settings=settings)], total_steps=1, flat=True)
    steps = list(
        ppo.update(
            policy, batch, optimiser, PPOSettings(epochs=2, minibatches=2, entropy_coefficient=0.01), seed=0, step=0
        )
    )
    return [p.detach().clone() for p in policy.parameters()], [next(iter(s.grad_norms.values())) for s in steps]


@pytest.mark.parametrize(("head", "shared"), [("discrete", None), ("box", False)])
def test_an_update_is_the_plain_one_up_to_rounding(
    head: str, shared: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, norms = updated(head, shared)
    monkeypatch.setattr(convolutions, "library", None)
    theirs, expected = updated(head, shared)
    start = [p.detach() for p in agent(head, shared_trunk=shared).parameters()]
    np.testing.assert_allclose(norms, expected, rtol=1e-4)
    assert not all(torch.equal(one, two) for one, two in zip(mine, theirs, strict=True))  # two ways indeed
    for one, two, before in zip(mine, theirs, start, strict=True):
        close(one - before, (two - before).double(), 1e-3)


def test_an_update_on_weights_that_are_nan_is_refused() -> None:
    policy = agent("discrete")
    batch = batch_of(policy, 8)
    optimiser = Optimiser(
        [Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings())], total_steps=1
    )
    with torch.no_grad():
        policy.trunk.eyes[0].layers[2].weight.view(-1)[0] = math.nan  # type: ignore[index, union-attr]
    with pytest.raises(NonFiniteStep):
        list(ppo.update(policy, batch, optimiser, PPOSettings(epochs=1, minibatches=1), seed=0, step=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_default_precision_does_not_matter(dtype: torch.dtype) -> None:
    layers, images = stack(4, NATURE), bytes_of(3, 4, 40, 40)
    expected = found(layers, images)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        features = found(layers, images)
        features.sum().backward()
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(features, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_what_must_see_each_operation_sees_it() -> None:
    layers, images = stack(4, NATURE), bytes_of(3, 4, 40, 40)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, seen: Tensor) -> Tensor:
            convolutions_here = served(self.layers, seen)
            return convolved(convolutions_here, seen) if convolutions_here else self.layers(seen.float() / 255)

    with torch.no_grad():
        traced = torch.jit.trace(Net(), images)
        other = bytes_of(3, 4, 40, 40, seed=9)
        torch.testing.assert_close(traced(other), layers(other.float() / 255), rtol=1e-5, atol=1e-5)
    seen: list[bool] = []

    def asked(weight: Tensor) -> Tensor:
        seen.append(bool(served(layers, images)))
        return weight.sum()

    torch.func.grad(asked)(torch.ones(2))
    torch.func.jvp(asked, (torch.ones(2),), (torch.ones(2),))
    with forward_ad.dual_level():
        asked(torch.ones(2))
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, made: None)
    asked(torch.ones(2))
    handle.remove()
    assert seen == [False] * 4
    assert served(layers, images)
