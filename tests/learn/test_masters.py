"""Float32 masters behind bfloat16 weights: Micikevicius et al. 2018, §3.1."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from bridle.learn.masters import Masters
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.random import generator

WIDTH = 6
SETTINGS = OptimSettings(lr=3e-3, weight_decay=0.1, max_grad_norm=0.5)


def a_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False))
    for name, p in net.named_parameters():
        p.data.copy_(torch.from_numpy(generator(0, "net", name).standard_normal(tuple(p.shape))))
    return net


def data(step: int) -> Tensor:
    return torch.from_numpy(generator(0, "data", step).standard_normal((8, WIDTH), dtype="float32"))


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (net(x).float() - x[:, :1]).square().mean()


def an_optimiser(net: nn.Module, masters: Masters | None = None, settings: OptimSettings = SETTINGS) -> Optimiser:
    group = Group(name="net", parameters=dict(net.named_parameters()), settings=settings)
    return Optimiser([group], total_steps=10, masters=masters)


def weights(net: nn.Module) -> list[nn.Parameter]:
    return [p for p in net.parameters() if p.ndim == 2]


def test_steps_below_half_an_ulp_are_lost_in_bfloat16_and_add_up_in_the_masters() -> None:
    """At 1 the next smaller bfloat16 number is 2⁻⁸ away; AdamW moves by lr = 2⁻¹² a step, an eighth of the half of it."""
    lr, steps = 2.0**-12, 24
    pure = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    held = nn.Parameter(torch.ones(4))
    masters = Masters([held])
    theirs = torch.optim.AdamW([pure], lr=lr, weight_decay=0.0)
    settings = OptimSettings(lr=lr, max_grad_norm=None)
    ours = Optimiser([Group(name="g", parameters={"w": held}, settings=settings)], total_steps=1, masters=masters)
    for step in range(1, steps + 1):
        for p in (pure, held):
            p.grad = None
            p.float().sum().backward()
        theirs.step()
        ours.step()
        assert torch.equal(pure, torch.ones(4, dtype=torch.bfloat16)), "a lost step was not lost"
        torch.testing.assert_close(masters.of(held), torch.full((4,), 1 - step * lr), rtol=1e-6, atol=0)
        assert torch.equal(held, (torch.ones(4) - step * lr).bfloat16())
    assert float(held.detach()[0]) == 1 - 2 * 2.0**-8  # 24 · 2⁻¹² = 1.5 · 2⁻⁸, a tie, to even


def test_training_on_a_shadow_is_training_under_autocast_to_the_bit() -> None:
    """Autocast rounds float32 weights in every pass; the shadow is that rounding, kept. PyTorch's own is the oracle."""
    plain = a_net()
    ours = copy.deepcopy(plain)
    masters = Masters(weights(ours))
    optimiser = an_optimiser(ours, masters)
    theirs = an_optimiser(plain)
    for step in range(6):
        for net in (plain, ours):
            for part in data(step).chunk(2):  # two micro-batches: gradients are summed in float32
                loss_of(net, part).backward()
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            assert q.grad is not None
            assert q.grad.dtype is torch.float32
            assert torch.equal(p.grad, q.grad)  # type: ignore[arg-type]
        assert theirs.step() == optimiser.step()
        for p, q in zip(plain.parameters(), ours.parameters(), strict=True):
            assert torch.equal(masters.of(q), p)
            assert torch.equal(q, p.to(q.dtype))
    assert [p.dtype for p in ours.parameters()] == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_what_is_saved_is_the_masters_and_what_is_loaded_is_rounded() -> None:
    net = a_net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    masters = Masters(weights(net))
    held = net[0].weight.data_ptr()
    with masters.in_place():
        saved = {name: t.clone() for name, t in net.state_dict().items()}
        assert all(p.dtype is torch.float32 for p in net.parameters())
    assert all(torch.equal(saved[name], before[name]) for name in before)
    other = {name: t * 1.7 for name, t in saved.items()}
    with masters.in_place():
        net.load_state_dict(other)
    assert net[0].weight.data_ptr() == held, "the shadow has moved, and a recorded step would read the old one"
    for name, p in net.named_parameters():
        assert torch.equal(masters.of(p), other[name])
        assert torch.equal(p, other[name].to(p.dtype))


def test_moments_come_back_and_the_next_step_is_the_same() -> None:
    nets = [a_net(), a_net()]
    masters = [Masters(weights(net)) for net in nets]
    first = an_optimiser(nets[0], masters[0])
    loss_of(nets[0], data(0)).backward()
    first.step()
    second = an_optimiser(nets[1], masters[1])
    with masters[0].in_place(), masters[1].in_place():
        nets[1].load_state_dict(nets[0].state_dict())
    second.load_state(first.state())
    for net, optimiser in zip(nets, (first, second), strict=True):
        loss_of(net, data(1)).backward()
        optimiser.step()
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(masters[0].of(p), masters[1].of(q))


def test_frozen_weights_are_rounded_and_have_no_master() -> None:
    layer = nn.Linear(4, 4).requires_grad_(False)
    masters = Masters([layer.weight])
    assert layer.weight.dtype is torch.bfloat16
    assert masters.of(layer.weight) is layer.weight


def test_a_flat_group_has_no_masters() -> None:
    net = a_net()
    group = Group(name="net", parameters=dict(net.named_parameters()), settings=SETTINGS)
    with pytest.raises(ValueError, match="without masters"):
        Optimiser([group], total_steps=1, flat=True, masters=Masters())
