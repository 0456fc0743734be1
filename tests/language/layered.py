"""What tests of compiled layers share: the formula of a layer, cases of its sizes, models with heads of eight."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor, nn

from bridle.language.backbones import join_layers
from bridle.language.layers import Shape
from bridle.language.quickening import quicken
from tests.language.tiny import tiny_model

Case = tuple[int, int, int, int, int, int, int, bool]
CASES: list[Case] = [
    (2, 5, 16, 2, 1, 8, 24, False),  # B, L, W, H, h, D, F, biases
    (3, 1, 8, 1, 1, 8, 7, True),
    (1, 53, 40, 6, 3, 16, 52, True),  # longer than a tile, than two blocks of queries
    (2, 25, 24, 3, 3, 24, 33, False),
    (1, 121, 16, 4, 1, 8, 19, True),
    (17, 7, 24, 4, 2, 40, 20, False),
    (1, 401, 8, 1, 1, 8, 12, True),  # learnt from in two parts, the second shorter
    (35, 23, 16, 2, 1, 8, 24, True),  # several texts at a time, the last time fewer
    (3, 65, 288, 6, 6, 48, 768, False),
    (5, 41, 272, 5, 1, 64, 300, True),
    (1, 50, 520, 13, 13, 40, 88, False),
]
SHAPE: dict[str, float] = {"first_eps": 1e-5, "second_eps": 1e-3, "scale": 0.6}


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(case: Case, *, shared: bool = True) -> tuple[Shape, list[Tensor], list[Tensor | None]]:
    """The shape; x, cosines and sines; the weights. Float64."""
    batch, length, width, heads, few, head, hidden, biased = case
    rows = 1 if shared else batch
    angles = draw(rows, length, head, seed=1)  # any angle for each number: the formula asks no more
    weights: list[Tensor | None] = [1 + draw(width, seed=2, size=0.1), 1 + draw(width, seed=3, size=0.1)]
    sizes = [(heads * head, width), *[(few * head, width)] * 2, (width, heads * head)]
    for at, size in enumerate([*sizes, (hidden, width), (hidden, width), (width, hidden)]):
        weights += [draw(*size, seed=10 + at, size=size[1] ** -0.5), draw(size[0], seed=20 + at) if biased else None]
    shape = Shape(heads=heads, key_heads=few, **SHAPE)
    return shape, [draw(batch, length, width, seed=4), angles.cos(), angles.sin()], weights


def formula(shape: Shape, x: Tensor, cosine: Tensor, sine: Tensor, weights: list[Tensor | None]) -> Tensor:
    """The layer as its papers write it, a head at a time, in whatever dtype."""
    w1, w2, *pairs = weights
    linears = [lambda z, w=w, b=b: nn.functional.linear(z, w, b) for w, b in zip(pairs[::2], pairs[1::2], strict=True)]
    query, key, value, out, gate, up, down = linears
    head = cosine.shape[2]

    def norm(z: Tensor, w: Tensor | None, eps: float) -> Tensor:
        assert w is not None
        return w * z / (z.square().mean(-1, keepdim=True) + eps).sqrt()

    def turned(z: Tensor) -> Tensor:
        first, second = z.chunk(2, -1)
        return z * cosine + torch.cat([-second, first], -1) * sine

    n, read = norm(x, w1, shape.first_eps), []
    q, k, v = query(n), key(n), value(n)
    future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    for h in range(shape.heads):
        own, its = slice(h * head, (h + 1) * head), h * shape.key_heads // shape.heads
        theirs = slice(its * head, (its + 1) * head)
        scores = shape.scale * turned(q[..., own]) @ turned(k[..., theirs]).transpose(1, 2)
        read.append(torch.softmax(scores.masked_fill(future, -math.inf), -1) @ v[..., theirs])
    h = x + out(torch.cat(read, -1))
    m = norm(h, w2, shape.second_eps)
    opened = gate(m)
    return h + down(opened * torch.sigmoid(opened) * up(m))


def quick(family: str, **changes: Any) -> tuple[Any, Any]:
    """A model with heads of eight, and the same with its layers compiled where they can be."""
    model = tiny_model(family, **{"hidden_size": 32, "num_attention_heads": 4, **changes})
    return model, join_layers(quicken(copy.deepcopy(model)))


def doubling(module: nn.Module) -> None:
    """Make it one of a class of somebody's own."""

    class Own(type(module)):  # type: ignore[misc]
        def forward(self, *given: Any, **named: Any) -> Any:
            return 2 * super().forward(*given, **named)

    module.__class__ = Own
