"""Faster products are the plain ones: packed weights, and bfloat16 products made in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bridle.language.causal import CausalModel
from bridle.language.sampler import products
from bridle.language.sampler.products import WideProducts, projection, swift_products
from bridle.random import generator
from tests.language.tiny import tiny_model


def normal(*shape: int, index: int = 0) -> Tensor:
    return torch.from_numpy(generator(0, "test-products", index).standard_normal(shape, dtype="float32"))


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "phi"])
@pytest.mark.parametrize("rows", [1, 7, 64, 100])
def test_packed_logits_are_the_plain_ones(family: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PACKED_FROM", 1)
    actor = CausalModel(tiny_model(family))
    x = normal(rows, 32)
    with torch.no_grad():
        logits = projection(actor, steps=100)
        assert logits != actor.logits
        torch.testing.assert_close(logits(x), actor.logits(x), atol=1e-5, rtol=1e-5)


def test_short_rollouts_and_small_vocabularies_pack_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = CausalModel(tiny_model())
    assert projection(actor, steps=100) == actor.logits
    monkeypatch.setattr(products, "_PACKED_FROM", 1)
    assert projection(actor, steps=1) == actor.logits


def test_operators_that_are_missing_or_wrong_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PACKED_FROM", 1)
    actor = CausalModel(tiny_model())
    monkeypatch.setattr(products, "_pack", lambda weight: 2 * weight)
    monkeypatch.setattr(products, "_packed_linear", lambda x, packed, bias: nn.functional.linear(x, packed, bias))
    products._packing_works.cache_clear()
    assert projection(actor, steps=100) == actor.logits
    monkeypatch.setattr(products, "_packed_linear", lambda x, packed, bias: torch.ops.mkldnn.no_such_operator(x))
    products._packing_works.cache_clear()
    assert projection(actor, steps=100) == actor.logits
    products._packing_works.cache_clear()


@pytest.mark.parametrize("autocast", [False, True])
def test_wide_products_round_as_bfloat16_products_do(autocast: bool) -> None:
    """Sums of exact products, rounded once: the float64 sum of the same operands, to within one rounding to bfloat16."""
    with torch.random.fork_rng():
        layer = nn.Linear(64, 48)
    x = normal(5, 64)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    exact = nn.functional.linear(*(t.bfloat16().double() for t in (x, layer.weight, layer.bias)))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast), WideProducts():
        found = layer(x)
    assert found.dtype is torch.bfloat16
    torch.testing.assert_close(found.double(), exact, atol=1e-6, rtol=2**-8)


def test_wide_products_leave_float32_alone() -> None:
    layer, x = nn.Linear(64, 48), normal(5, 64)
    with torch.no_grad(), WideProducts():
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_the_block_is_entered_only_where_bfloat16_products_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs every call of PyTorch a microsecond."""
    weight = torch.zeros(2, 2)
    for slow in (True, False):
        monkeypatch.setattr(products, "bfloat16_is_slow", lambda device, slow=slow: slow)
        assert not isinstance(swift_products(weight), WideProducts)
        assert isinstance(swift_products(weight.bfloat16()), WideProducts) == slow
        with torch.autocast("cpu", torch.bfloat16):
            assert isinstance(swift_products(weight), WideProducts) == slow
