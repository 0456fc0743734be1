"""Decoder layers of the usual kind, compiled, on a CPU in float32: there and back by ``layers.c``; with products in bfloat16
under autocast, where the processor has them.

A small model's layer is some fifty operations of PyTorch's, each of which takes its numbers from memory and puts them back;
here a text goes through a layer in pieces that stay in the nearest caches. What is kept for the way back is the
queries, keys and values, what was read, the sum after attention and the two factors of the gate. Several layers are one
operation to autograd; of the last one, only the tokens that are asked for are computed beyond their keys and values.

Texts are shared out among PyTorch's threads, and the parts' gradients summed in their order. Which layers of a model run
here is :mod:`bridle.language.quickening`'s to say.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.language.rooms import gradient_of, room
from bridle.native.loading import computing_now, halved_library_of, library_of, load_library
from bridle.native.sharing import for_each, shares, threads

__all__ = [
    "Layer",
    "Shape",
    "code",
    "decoder_layer",
    "decoder_stack",
    "described",
    "halved",
    "library",
    "load",
    "norm_at",
]

_LINEARS = 7
"""Of a layer: query, key, value, out, gate, up and down."""
_WEIGHTS = 2 + 2 * _LINEARS
"""Of a layer: its norms, and weight and bias of each linear."""
_KEPT = 5
"""Blocks that a layer keeps: qkv, read, sums, h and gate_up."""
_Sizes, _Norms, _Kept = ctypes.c_int64 * 9, ctypes.c_void_p * 4, ctypes.c_void_p * _KEPT
_Linears = ctypes.c_void_p * (4 * _LINEARS)


class Layer(ctypes.Structure):
    """See ``layer`` in layers.c."""

    _fields_ = (
        ("sizes", _Sizes),
        *((name, ctypes.c_void_p) for name in ("begins", "ends")),
        *((name, ctypes.c_float) for name in ("first_eps", "second_eps", "scale")),
        ("norms", _Norms),
        ("linears", _Linears),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "x", "y")),
        ("kept", _Kept),
        ("work", ctypes.c_void_p),
    )


_SOURCE = Path(__file__).with_name("layers.c")


def load(place: Path | None) -> Any:
    """Open what was compiled of layers.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    layer, at, count = ctypes.POINTER(Layer), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "layer_work": (count, [layer]),
        "layer_forward": (None, [layer]),
        "layer_backward": (None, [layer, at, at]),
        "layer_exponential": (None, [count, at, at]),
        "norm_at": (None, [count, count, ctypes.c_float, at, at, at, at]),
        "norm_at_back": (None, [count, count, ctypes.c_float, at, at, at, at, at, at]),
    }
    return load_library(place, _SOURCE, functions, "layers_source")


library: Any = load(library_of(_SOURCE))
"""The compiled code; None where it was not built."""
halved: Any = load(halved_library_of(_SOURCE))
"""The same with products of weights in bfloat16, summed in float32; None where the processor has none, or it was not built."""


def code() -> Any:
    """Return the compiled code for what is computed in now, float32 or, under autocast, bfloat16; None where there is none."""
    return computing_now(library, halved)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a layer's weights do not say."""

    heads: int
    key_heads: int
    """the query heads are a multiple of them; head i reads key head ⌊i · key_heads / heads⌋."""
    first_eps: float
    second_eps: float
    """what the norms add to the mean square, before attention and before the gated part."""
    scale: float
    """factor on the scores."""


def decoder_layer(
    shape: Shape,
    x: Float[Tensor, "B L W"],
    cosine: Float[Tensor, "b L D"],
    sine: Float[Tensor, "b L D"],
    weights: Sequence[Tensor | None],
) -> Float[Tensor, "B L W"]:
    """Return y = h + (silu(m W_gᵀ) ∘ m W_uᵀ) W_dᵀ with m = norm(h), h = x + attention(norm(x)) W_oᵀ, differentiable once.

    Args:
        shape: heads and constants.
        x: [B, L, W], W a multiple of 8; token i of a text sees its tokens 0 … i.
        cosine: [b, L, D], b = B, or 1 where all texts share them; D a multiple of 8.
        sine: [b, L, D]; queries and keys become q cos + (−second half, first half of q) sin.
        weights: of both norms [W]; then weight [out, in] and bias [out] or None of query, key, value, out, gate, up and down.

    All are float32 on the CPU. Under autocast to bfloat16 weights, and what meets them, are rounded for the products, there and
    back, and nothing else is.

    Source: Touvron et al. 2023 (LLaMA), §2.2; Su et al. 2021 for the turning; Ainslie et al. 2023 for the shared key heads.
    """
    return decoder_stack((shape,), x, cosine, sine, (weights,))


def decoder_stack(
    shapes: Sequence[Shape],
    x: Float[Tensor, "B L W"],
    cosine: Float[Tensor, "b L D"],
    sine: Float[Tensor, "b L D"],
    weights: Sequence[Sequence[Tensor | None]],
    asked: Int[Tensor, "2 B"] | None = None,
) -> Float[Tensor, "B L W"]:
    """Return what layers make of x one after another, each a :func:`decoder_layer`, differentiable once; K ≥ 1 of them.

    ``asked`` holds where the tokens of each text begin and end whose y is asked for, 0 ≤ begin ≤ end ≤ L; all of them by
    default. Other numbers of y may be any, and their slopes are not read.
    """
    held = [None if weight is None else weight.contiguous() for own in weights for weight in own]
    given = (
        None if asked is None else asked.contiguous(),
        x.contiguous(),
        cosine.contiguous(),
        sine.contiguous(),
        *held,
    )
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return cast("Tensor", _Compiled.apply(shapes, *given))  # type: ignore[no-untyped-call]
    return _Pass(code(), shapes, given, keep=False).forward()


def norm_at(
    x: Float[Tensor, "B L W"], places: Int[Tensor, " n"], weight: Float[Tensor, " W"], eps: float
) -> Float[Tensor, "n W"]:
    """Return weight ∘ x / √(mean x² + ε) of the tokens at ``places``, counted through all texts; differentiable once.

    x and weight are float32 on the CPU, W a multiple of 8, and 0 ≤ place < B · L, which is not looked at.
    """
    return cast("Tensor", _NormAt.apply(x.contiguous(), places.contiguous(), weight.contiguous(), eps))  # type: ignore[no-untyped-call]


def described(shape: Shape, head: int, weights: Sequence[Tensor | None]) -> Layer:
    """Say to compiled code what a layer is, without texts; ``head`` is the width of one. The weights must lie row by row."""
    sizes = (
        0,
        0,
        len(cast("Tensor", weights[0])),
        shape.heads,
        shape.key_heads,
        head,
        len(cast("Tensor", weights[10])),
    )
    found = Layer(_Sizes(*sizes), None, None, shape.first_eps, shape.second_eps, shape.scale)
    found.norms, found.linears = _Norms(*map(_at, weights[:2])), _linears(weights)
    return found


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shapes: Sequence[Shape], *given: Tensor | None) -> Tensor:
        run = _Pass(code(), shapes, given, keep=True)
        y = run.forward()
        ctx.run = (run.library, shapes)
        ctx.save_for_backward(*given, *run.kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        saved, count, (library, shapes) = ctx.saved_tensors, _KEPT + 1, ctx.run
        run = _Pass(library, shapes, saved[:-count], keep=True, kept=saved[-count:])
        x_slope, gradients = run.backward(slope.contiguous(), ctx.needs_input_grad[5:])
        return None, None, x_slope, None, None, *gradients


class _NormAt(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, weight: Tensor, eps: float) -> Tensor:
        found = room(len(places), x.shape[2])
        library.norm_at(len(places), x.shape[2], eps, _at(x), places.data_ptr(), _at(weight), _at(found))
        ctx.eps = eps
        ctx.save_for_backward(x, places, weight)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        x, places, weight = ctx.saved_tensors
        slope, x_slope, direct = slope.contiguous(), room(*x.shape).zero_(), gradient_of(weight)
        gradient = torch.zeros_like(weight) if direct is None else direct
        given = (len(places), x.shape[2], ctx.eps, _at(x), places.data_ptr(), _at(weight))
        library.norm_at_back(*given, _at(slope), _at(x_slope), _at(gradient))
        return x_slope, None, gradient if direct is None else None, None


class _Pass:
    """One pass of some texts through some layers, in as many parts as there are threads."""

    def __init__(
        self,
        library: Any,
        shapes: Sequence[Shape],
        given: Sequence[Tensor | None],
        *,
        keep: bool,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        """``given`` holds what is asked for, x, cosines and sines, then each layer's weights."""
        self.library, self._asked = library, given[0]
        x, cosine, sine = (cast("Tensor", tensor) for tensor in given[1:4])
        self._shapes, self._x, self._turned, self._keep = shapes, x, (cosine, sine), keep
        self._weights = [given[at : at + _WEIGHTS] for at in range(4, len(given), _WEIGHTS)]
        self._hidden = [len(cast("Tensor", weights[10])) for weights in self._weights]
        self._parts = shares(len(x), threads())
        self.kept = self._room() if kept is None else list(kept)

    def _room(self) -> list[Tensor]:
        """What each layer keeps of each text, and what lies between layers; without ``keep`` they are written over."""
        (texts, length, width), head = self._x.shape, self._turned[0].shape[2]
        queries = max(shape.heads for shape in self._shapes)
        both = max(shape.heads + 2 * shape.key_heads for shape in self._shapes)
        sizes = (both * head, queries * head, 2 * queries, width, 2 * (-(-max(self._hidden) // 8) * 8))
        layers = len(self._shapes)
        rows = (layers, texts) if self._keep else (1, len(self._parts))
        between = layers - 1 if self._keep else min(layers - 1, 2)
        return [
            *(room(*rows, length * size) for size in sizes),
            room(between, *self._x.shape),
        ]

    def forward(self) -> Tensor:
        """Run there; return y."""
        y = room(*self._x.shape)
        between = self._between(y)

        def there(number: int) -> None:
            layers = range(len(self._shapes))
            owns = [self._own(layer, number, between[layer], between[layer + 1]) for layer in layers]
            work = self._working(owns)
            for own in owns:
                own.work = work.data_ptr()
                self.library.layer_forward(own)

        for_each(len(self._parts), there)
        return y

    def backward(self, slope: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """Run back; return the slopes of x and of the weights that are wanted, but for those added to their gradients here."""
        weights = [weight for own in self._weights for weight in own]
        direct = [gradient_of(w) if ask and w is not None else None for ask, w in zip(wanted, weights, strict=True)]
        asked = [w if ask else None for ask, w in zip(wanted, weights, strict=True)]
        sums = [_Sums(asked, direct if first else None) for first in (True, *[False] * (len(self._parts) - 1))]
        between, slopes = self._between(None), (room(*slope.shape), room(*slope.shape))

        def back(number: int) -> None:
            gradients, last, start = sums[number].views, slope, self._parts[number].start
            layers = range(len(self._shapes))
            owns = [
                self._own(at, number, between[at], None, gradients[at * _WEIGHTS : (at + 1) * _WEIGHTS])
                for at in layers
            ]
            work = self._working(owns)
            for layer in reversed(layers):
                owns[layer].work, to = work.data_ptr(), slopes[layer % 2]
                self.library.layer_backward(owns[layer], _at(last, start), _at(to, start))
                last = to

        for_each(len(self._parts), back)
        first, *others = sums
        for other in others:
            first.add(other)
        return slopes[0], [None if there is not None else view for there, view in zip(direct, first.views, strict=True)]

    def _between(self, y: Tensor | None) -> list[Tensor | None]:
        """What each layer reads, then y."""
        inner = self.kept[-1]
        return [self._x, *(inner[layer % len(inner)] for layer in range(len(self._shapes) - 1)), y]

    def _working(self, owns: Sequence[Layer]) -> Tensor:
        """Room for a part's layers to work in, one after another."""
        return room(max(map(self.library.layer_work, owns)))

    def _own(
        self,
        layer: int,
        number: int,
        x: Tensor | None,
        y: Tensor | None,
        gradients: Sequence[Tensor | None] = (None,) * _WEIGHTS,
    ) -> Layer:
        """A layer as one part sees it, without room to work in."""
        shape, texts, (cosine, sine) = self._shapes[layer], self._parts[number], self._turned
        kept_at, row = (layer, texts.start) if self._keep else (0, number)
        turning = cosine.stride(0) if len(cosine) > 1 else 0
        turned_at = texts.start if turning else 0
        (_, length, width), head, hidden = self._x.shape, cosine.shape[2], self._hidden[layer]
        asked = None if self._asked is None else self._asked.data_ptr() + 8 * texts.start
        begins = None if asked is None or layer + 1 < len(self._shapes) else asked
        ends = None if asked is None else asked + 8 * len(self._x)
        weights = self._weights[layer]
        return Layer(
            _Sizes(len(texts), length, width, shape.heads, shape.key_heads, head, hidden, self._keep, turning),
            *(begins, ends, shape.first_eps, shape.second_eps, shape.scale),
            _Norms(*map(_at, (*weights[:2], *gradients[:2]))),
            _linears(weights, gradients),
            *(_at(cosine, turned_at), _at(sine, turned_at), _at(x, texts.start), _at(y, texts.start)),
            _Kept(*[_at(room[kept_at], row) for room in self.kept[:_KEPT]]),
        )


def _linears(
    weights: Sequence[Tensor | None], gradients: Sequence[Tensor | None] = (None,) * _WEIGHTS
) -> ctypes.Array[ctypes.c_void_p]:
    """Where weight and bias of each linear lie, and their gradients."""
    places = range(2, _WEIGHTS, 2)
    return _Linears(*[_at(two[at]) for place in places for two in (weights, gradients) for at in (place, place + 1)])


class _Sums:
    """Gradients of some weights, from 0 or where they are added to."""

    def __init__(self, weights: Sequence[Tensor | None], direct: Sequence[Tensor | None] | None) -> None:
        """Take the weights that are asked for, and for each of them where its gradient lies, if it does; no two share one."""
        there = [None] * len(weights) if direct is None else direct
        fresh = [0 if w is None or to is not None else w.numel() for w, to in zip(weights, there, strict=True)]
        pieces = room(sum(fresh)).zero_().split(fresh)  # type: ignore[no-untyped-call]
        self.views: list[Tensor | None] = [
            to if to is not None else None if w is None else piece.view_as(w)
            for w, to, piece in zip(weights, there, pieces, strict=True)
        ]

    def add(self, other: _Sums) -> None:
        """Add another part's."""
        for mine, its in zip(self.views, other.views, strict=True):
            if mine is not None and its is not None:
                mine.add_(its)


def _at(tensor: Tensor | None, row: int = 0) -> int | None:
    """Where a row of a tensor lies."""
    return None if tensor is None else tensor.data_ptr() + 4 * row * tensor.stride(0)
