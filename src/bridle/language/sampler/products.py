"""Products that a CPU makes faster than its plain linear layer does, with the same numbers up to the order of sums.

Two cases. The vocabulary projection of a step has few rows and very many weights: arranging these anew for every product takes
a third of its time, so they are packed once per rollout. And a CPU without bfloat16 instructions makes bfloat16 products ten
times slower than float32 ones: there operands are rounded to bfloat16, multiplied in float32 (where a product of two
bfloat16 numbers is exact), and the sum is rounded once, which is what bfloat16 hardware does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bridle.language.causal import CausalModel
from bridle.random import generator

__all__ = ["WideProducts", "bfloat16_is_slow", "computed_in", "projection", "swift_products"]

_PACKED_FROM = 2**20
_PAYS_FROM = 8
"""Weights that are packed have at least so many numbers; it costs a few steps' gain, so there must be more."""
_ROWS = 64
"""Rows that packing is told to expect; any other number works."""


def bfloat16_is_slow(device: torch.device) -> bool:
    """Whether products of bfloat16 numbers are emulated there: a CPU with AVX2 and no wider vectors."""
    return device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"


def computed_in(x: Tensor) -> torch.dtype:
    """The dtype of a linear layer's product with ``x``: autocast's, where that is on, else its own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class WideProducts(TorchFunctionMode):
    """Within it, linear layers that would multiply in bfloat16 do so in float32; holds until the weights move."""

    def __init__(self) -> None:
        super().__init__()
        self._wide: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Take over ``linear`` where it would be slow; leave everything else as it is."""
        if func is nn.functional.linear and not kwargs and computed_in(args[0]) is torch.bfloat16:
            return self._linear(*args)
        return func(*args, **(kwargs or {}))

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            if id(weight) not in self._wide:
                self._wide[id(weight)] = (weight, _rounded(weight))  # held, so that no other tensor gets its id
            _, wide = self._wide[id(weight)]
            found = nn.functional.linear(_rounded(x), wide, None if bias is None else _rounded(bias))
            return found.bfloat16()


def swift_products(weight: Tensor) -> AbstractContextManager[object]:
    """The block in which layers of weights like this one run: in float32 where they are in bfloat16 and that is slow.

    The block costs a microsecond for every call of PyTorch, so it is not entered for nothing.
    """
    slow = computed_in(weight) is torch.bfloat16 and bfloat16_is_slow(weight.device)
    return WideProducts() if slow else nullcontext()


def projection(actor: CausalModel, steps: int) -> Callable[[Float[Tensor, "n F"]], Float[Tensor, "n V"]]:
    """Return ``actor.logits``, or the same with its weights packed, where ``steps`` products are worth packing them for.

    Where autocast would round the weights for every product they are rounded once. The packed or rounded copy is as large as
    the output weights and holds until these move: take it anew for each rollout.
    """
    head = actor.model.get_output_embeddings()
    if actor.form is None or not isinstance(head, nn.Linear):
        return actor.logits
    weight: Tensor = head.weight
    bias: Tensor | None = head.bias
    kind = computed_in(weight)
    if kind is not weight.dtype and not bfloat16_is_slow(actor.device):
        return partial(actor.form.logits, weight=weight.to(kind), bias=bias)
    if actor.device.type != "cpu":
        return actor.logits
    narrow = kind is torch.bfloat16 and bfloat16_is_slow(actor.device)
    if not narrow and (kind is not torch.float32 or weight.dtype is not torch.float32):
        return actor.logits
    if narrow:
        weight, bias = _rounded(weight), None if bias is None else _rounded(bias)
    packs = weight.numel() >= _PACKED_FROM and steps >= _PAYS_FROM and _packing_works()
    if not packs and not narrow:
        return actor.logits
    multiply, form = _packed_linear if packs else nn.functional.linear, actor.form
    held = _pack(weight) if packs else weight

    def logits(features: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            if narrow:
                return form.finish(multiply(_rounded(features), held, bias).bfloat16())
            return form.finish(multiply(features, held, bias))

    return logits


def _rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@cache
def _packing_works() -> bool:
    """Whether oneDNN's packed linear layer is there and right: compiled models use it, but it has no public name."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    draws = generator(0, "packed-product")
    x, weight = (torch.from_numpy(draws.standard_normal(shape, dtype="float32")) for shape in ((3, 32), (48, 32)))
    try:
        found = _packed_linear(x, _pack(weight), None)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.allclose(found, nn.functional.linear(x, weight), atol=1e-4)


def _pack(weight: Float[Tensor, "V D"]) -> Any:
    return torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)


def _packed_linear(x: Float[Tensor, "n D"], packed: Any, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x.contiguous(), packed, bias, "none", [], "")
    return found
