"""Decoder layers of the usual kind, compiled, on a CPU in float32: there and back as two calls of ``layers.c``.

A small model's layer is some fifty operations of PyTorch's, each of which takes its numbers from memory and puts them back;
here a text goes through a layer in pieces that stay in the nearest caches. What is kept for the way back is the
queries, keys and values, what was read, the sum after attention and the two factors of the gate.

Texts are shared out among PyTorch's threads, and the parts' gradients summed in their order. Which layers of a model run
here is :mod:`bridle.language.quickening`'s to say.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.native.compiling import compiled_from
from bridle.native.loading import load_library

__all__ = ["Held", "Shape", "decoder_layer", "layer_step", "library", "load"]

_LINEARS = ("query", "key", "value", "out", "gate", "up", "down")


class _Linear(ctypes.Structure):
    """See ``linear`` in layers.c."""

    _fields_ = tuple((name, ctypes.c_void_p) for name in ("weight", "bias", "weight_gradient", "bias_gradient"))


_SIZES = ("texts", "length", "width", "heads", "key_heads", "head", "hidden", "keep", "turning")
_KEPT = ("qkv", "read", "sums", "h", "gate_up")


class _Layer(ctypes.Structure):
    """See ``layer`` in layers.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_float) for name in ("first_eps", "second_eps", "scale")),
        *((name, ctypes.c_void_p) for name in ("first_norm", "second_norm", "first_gradient", "second_gradient")),
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "x", "y", *_KEPT, "work")),
    )


_SOURCE = Path(__file__).with_name("layers.c")


def load(place: Path) -> Any:
    """Open what was compiled of layers.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    layer, at, count = ctypes.POINTER(_Layer), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "layer_work": (count, [layer]),
        "layer_forward": (None, [layer]),
        "layer_backward": (None, [layer, at, at]),
        "layer_step": (None, [layer, at, at, count, count, at]),
        "layer_exponential": (None, [count, at, at]),
    }
    return load_library(place, _SOURCE, functions, "layers_source")


library: Any = load(compiled_from(_SOURCE))
"""The compiled code; None where it was not built."""


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

    All are float32 on the CPU.

    Source: Touvron et al. 2023 (LLaMA), §2.2; Su et al. 2021 for the turning; Ainslie et al. 2023 for the shared key heads.
    """
    held = [None if weight is None else weight.contiguous() for weight in weights]
    given = (x.contiguous(), cosine.contiguous(), sine.contiguous(), *held)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return cast("Tensor", _Compiled.apply(shape, *given))  # type: ignore[no-untyped-call]
    return _Pass(shape, given, keep=False).forward()


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """Keys and values of the texts in some slots, into which a step writes those of one token more."""

    keys: Float[Tensor, "s h D C"]
    """[s ≥ n, h, D, C], turned already."""
    values: Tensor
    """[s, h, C, D]; [s, h, D, C] if ``across``."""
    across: bool
    places: Int[Tensor, " n"]
    """[n] how many tokens slot i holds: where the new one goes, < C."""


def layer_step(
    shape: Shape,
    x: Float[Tensor, "n 1 W"],
    cosine: Float[Tensor, "b 1 D"],
    sine: Float[Tensor, "b 1 D"],
    weights: Sequence[Tensor | None],
    held: Held,
) -> Float[Tensor, "n 1 W"]:
    """Return :func:`decoder_layer` of one token more in each of slots 0 … n−1, without a gradient; ``held`` is written to."""
    given = [None if t is None else t.contiguous() for t in (x, cosine, sine, *weights)]
    return _Pass(shape, given, keep=True, threads=1).step(held)


class _Compiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shape: Shape, *given: Tensor | None) -> Tensor:
        run = _Pass(shape, given, keep=True)
        y = run.forward()
        ctx.shape = shape
        ctx.save_for_backward(*given, *run.kept)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        run = _Pass(ctx.shape, saved[: -len(_KEPT)], keep=True, kept=saved[-len(_KEPT) :])
        x_slope, gradients = run.backward(slope.contiguous(), ctx.needs_input_grad[4:])
        return None, x_slope, None, None, *gradients


class _Pass:
    """One pass over some texts, in as many parts as there are threads."""

    def __init__(
        self,
        shape: Shape,
        given: Sequence[Tensor | None],
        *,
        keep: bool,
        kept: Sequence[Tensor] | None = None,
        threads: int | None = None,
    ) -> None:
        x, cosine, sine = (cast("Tensor", tensor) for tensor in given[:3])
        self._x, self._weights, self._turned = x, given[3:], (cosine, sine)
        texts, length, width = x.shape
        head, hidden = cosine.shape[2], cast("Tensor", given[13]).shape[0]
        self._own = _Layer(
            length=length,
            width=width,
            heads=shape.heads,
            key_heads=shape.key_heads,
            head=head,
            hidden=hidden,
            keep=keep,
            turning=length * head if len(cosine) > 1 else 0,
            first_eps=shape.first_eps,
            second_eps=shape.second_eps,
            scale=shape.scale,
        )
        self._parts = _shares(texts, threads or torch.get_num_threads())
        self._own.texts = max(map(len, self._parts), default=0)
        rows = texts if keep else len(self._parts)
        queries = shape.heads * head
        stride, padded = queries + 2 * shape.key_heads * head, -(-hidden // 8) * 8
        sizes = [length * size for size in (stride, queries, 2 * shape.heads, width, 2 * padded)]
        self.kept = [x.new_empty(rows, size) for size in sizes] if kept is None else kept
        self._work = [x.new_empty(library.layer_work(self._own)) for _ in self._parts]

    def forward(self) -> Tensor:
        """Run there; return y."""
        y = torch.empty_like(self._x)
        self._share(lambda at, own: library.layer_forward(own), y, [])
        return y

    def step(self, held: Held) -> Tensor:
        """Run there for one token in each slot; return y."""
        y, capacity = torch.empty_like(self._x), held.keys.shape[3]
        if not self._parts:
            return y
        self._work = [self._x.new_empty(self._work[0].numel() + capacity + 8)]
        own = self._part(0, self._parts[0], y, [None] * len(self._weights))
        library.layer_step(own, _at(held.keys), _at(held.values), capacity, held.across, held.places.data_ptr())
        return y

    def backward(self, slope: Tensor, wanted: Sequence[bool]) -> tuple[Tensor, list[Tensor | None]]:
        """Run back; return the slopes of x and of the weights that are wanted."""
        x_slope = torch.empty_like(self._x)
        sums = [
            [
                torch.zeros_like(w) if ask and w is not None else None
                for ask, w in zip(wanted, self._weights, strict=True)
            ]
            for _ in self._parts
        ]
        self._share(lambda at, own: library.layer_backward(own, _at(slope, at), _at(x_slope, at)), None, sums)
        for others in sums[1:]:
            for total, other in zip(sums[0], others, strict=True):
                if total is not None:
                    total.add_(cast("Tensor", other))
        return x_slope, sums[0] if sums else [None] * len(wanted)

    def _share(
        self, call: Callable[[int, _Layer], None], y: Tensor | None, sums: Sequence[Sequence[Tensor | None]]
    ) -> None:
        """Call for each part: its first text, and the layer as it sees it."""
        owns = [
            self._part(number, part, y, sums[number] if sums else [None] * len(self._weights))
            for number, part in enumerate(self._parts)
        ]
        starts = [part.start for part in self._parts]
        if len(owns) == 1:
            call(starts[0], owns[0])
        elif owns:
            list(_pool(len(owns)).map(call, starts, owns))

    def _part(self, number: int, texts: range, y: Tensor | None, sums: Sequence[Tensor | None]) -> _Layer:
        own = _Layer.from_buffer_copy(self._own)
        own.texts = len(texts)
        for place, name in enumerate(("first", "second")):
            setattr(own, f"{name}_norm", _at(self._weights[place]))
            setattr(own, f"{name}_gradient", _at(sums[place]))
        for place, name in enumerate(_LINEARS):
            two = slice(2 + 2 * place, 4 + 2 * place)
            pointers = [_at(t) for t in (*self._weights[two], *sums[two])]
            setattr(own, name, _Linear(*pointers))
        own.cosine, own.sine = (_at(turned, texts.start if len(turned) > 1 else 0) for turned in self._turned)
        own.x, own.y = _at(self._x, texts.start), _at(y, texts.start)
        for name, tensor in zip(_KEPT, self.kept, strict=True):
            setattr(own, name, _at(tensor, texts.start if self._own.keep else number))
        own.work = _at(self._work[number])
        return own


def _at(tensor: Tensor | None, row: int = 0) -> int | None:
    """Where a row of a tensor lies."""
    return None if tensor is None else tensor.data_ptr() + 4 * row * tensor.stride(0)


def _shares(texts: int, threads: int) -> list[range]:
    """Texts in as many neighbouring parts as there are threads, or texts."""
    parts = min(texts, threads)
    bounds = [texts * i // parts for i in range(parts + 1)] if parts else [0]
    return [range(start, stop) for start, stop in pairwise(bounds)]


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)
