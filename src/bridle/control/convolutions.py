"""Convolutions over images, each with a rectifier behind it, compiled: there and back as two calls of ``convolutions.c``.

Images are shared out among PyTorch's threads, and the parts' gradients summed in their order. What is not served here
(another device or precision, padding, dilation, groups, another activation) runs as PyTorch runs it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from bridle.guards import is_observed, is_plain, is_watched
from bridle.native.loading import library_of, load_library
from bridle.native.sharing import for_each, shares, threads

__all__ = ["convolved", "library", "load", "served"]

_LAYERS = 8
"""The most layers, as in convolutions.c."""


class _Convolution(ctypes.Structure):
    """See ``convolution`` in convolutions.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "height", "width")),
        *((name, ctypes.c_int64) for name in ("filters", "tall", "wide", "down", "right")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "weight_gradient", "bias_gradient", "kept")),
    )


class _Stack(ctypes.Structure):
    """See ``stack`` in convolutions.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("images", "layers", "keep")),
        ("layer", _Convolution * _LAYERS),
        *((name, ctypes.c_void_p) for name in ("seen", "features", "work")),
    )


_SOURCE = Path(__file__).with_name("convolutions.c")


def load(place: Path) -> Any:
    """Open what was compiled of convolutions.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    stack, at = ctypes.POINTER(_Stack), ctypes.c_void_p
    functions: dict[str, tuple[Any, list[Any]]] = {
        "convolutions_work": (ctypes.c_int64, [stack]),
        "convolutions_forward": (None, [stack]),
        "convolutions_backward": (None, [stack, at]),
    }
    return load_library(place, _SOURCE, functions, "convolutions_source")


library: Any = load(library_of(_SOURCE))
"""The compiled code; None where it was not built."""


def served(layers: nn.Sequential, images: Tensor) -> list[nn.Conv2d]:
    """Return the convolutions that ``layers`` begin with, each with a rectifier behind it, if all of it can run compiled.

    Empty where the images are no bytes on the CPU, or a layer among the convolutions and rectifiers is more than
    that: padded, dilated, in groups, without bias, subclassed, hooked or in another precision.
    """
    if library is None or torch.is_autocast_enabled("cpu") or is_observed():
        return []
    bytes_here = type(images) is Tensor and images.dtype is torch.uint8 and images.is_cpu and images.ndim == 4
    if not bytes_here or is_watched(layers):
        return []
    modules, found = list(layers), list[nn.Conv2d]()
    while 2 * len(found) + 1 < len(modules) and isinstance(modules[2 * len(found)], nn.Conv2d):
        convolution, rectifier = modules[2 * len(found) : 2 * len(found) + 2]
        if type(rectifier) is not nn.ReLU or is_watched(rectifier) or not _plain(cast(nn.Conv2d, convolution)):
            return []
        found.append(cast(nn.Conv2d, convolution))
    if not 0 < len(found) <= _LAYERS:
        return []
    channels, *sides = images.shape[1:]
    for layer in found:
        sides = _sides(sides, layer)
        if channels != layer.in_channels or min(sides) < 1:
            return []  # PyTorch says what is wrong
        channels = layer.out_channels
    return found if images[:1].numel() < _FARTHEST else []


_FARTHEST = 2**30
"""Numbers of an image, whose places are counted in 32 bits."""


def _plain(layer: nn.Conv2d) -> bool:
    return (
        type(layer) is nn.Conv2d
        and not is_watched(layer)
        and layer.padding in ("valid", (0, 0))
        and layer.dilation == (1, 1)
        and layer.groups == 1
        and layer.weight.shape == (layer.out_channels, layer.in_channels, *layer.kernel_size)
        and layer.bias is not None
        and all(is_plain(one) and one.is_contiguous() for one in (layer.weight, layer.bias))
    )


def _sides(sides: Sequence[int], layer: nn.Conv2d) -> list[int]:
    """Height and width behind a layer."""
    geometry = zip(sides, layer.kernel_size, layer.stride, strict=True)
    return [(side - kernel) // stride + 1 for side, kernel, stride in geometry]


def convolved(layers: Sequence[nn.Conv2d], images: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n F"]:
    """Return the features [n, filters · rows · columns] of images of 0 … 255 behind :func:`served` layers."""
    weights = [tensor for layer in layers for tensor in (layer.weight, cast(Tensor, layer.bias))]
    strides = tuple(cast("tuple[int, int]", layer.stride) for layer in layers)
    images = images.contiguous()
    if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
        return cast(Tensor, _Convolved.apply(images, strides, *weights))  # type: ignore[no-untyped-call]
    return _Pass(images, strides, weights, keep=False).forward()


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, strides: Sequence[tuple[int, int]], *weights: Tensor) -> Tensor:
        run = _Pass(images, strides, weights, keep=True)
        features = run.forward()
        ctx.strides, ctx.layers = strides, len(run.kept)
        ctx.save_for_backward(images, features, *run.kept, *weights)
        return features

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor | None, ...]:
        images, features, *saved = ctx.saved_tensors
        kept, weights, wanted = saved[: ctx.layers], saved[ctx.layers :], ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():  # somebody asks for a second derivative
            return None, None, *_differentiable(images, ctx.strides, weights, slopes, wanted)
        run = _Pass(images, ctx.strides, weights, keep=True, kept=kept)
        return None, None, *run.backward(features, slopes.contiguous(), wanted)


def _differentiable(
    images: Tensor,
    strides: Sequence[tuple[int, int]],
    weights: Sequence[Tensor],
    slopes: Tensor,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Return the weights' gradients as PyTorch finds them, with a graph behind them."""
    x = images.float() / 255
    for stride, weight, bias in zip(strides, weights[::2], weights[1::2], strict=True):
        x = functional.conv2d(x, weight, bias, stride=stride).relu()
    asked = [weight for weight, ask in zip(weights, wanted, strict=True) if ask]
    found = iter(torch.autograd.grad(x.flatten(1), asked, slopes, create_graph=True))
    return [next(found) if ask else None for ask in wanted]


class _Pass:
    """One pass over some images, in as many parts as there are threads."""

    def __init__(
        self,
        images: Tensor,
        strides: Sequence[tuple[int, int]],
        weights: Sequence[Tensor],
        *,
        keep: bool,
        kept: Sequence[Tensor] | None = None,
    ) -> None:
        self._images, self._weights = images, weights
        self._own = _Stack(layers=len(strides), keep=keep)
        channels, height, width = images.shape[1:]
        self._sizes = []
        for place, (weight, (down, right)) in enumerate(zip(weights[::2], strides, strict=True)):
            filters, _, tall, wide = weight.shape
            self._own.layer[place] = _Convolution(
                channels=channels,
                height=height,
                width=width,
                filters=filters,
                tall=tall,
                wide=wide,
                down=down,
                right=right,
            )
            channels, height, width = filters, (height - tall) // down + 1, (width - wide) // right + 1
            self._sizes.append(channels * height * width)
        if kept is None:
            kept = [_room(len(images), size) for size in self._sizes[:-1]] if keep else []
        self.kept = kept
        self._parts = shares(len(images), threads())

    def forward(self) -> Tensor:
        """Run there; return the features."""
        features = _room(len(self._images), self._sizes[-1])
        self._share(lambda at, own: library.convolutions_forward(own), features, [])
        return features

    def backward(self, features: Tensor, slopes: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
        """Run back; return the gradients of the weights that are wanted."""
        sums = [[torch.zeros_like(weight) for weight in self._weights] for _ in self._parts or (0,)]
        self._share(lambda at, own: library.convolutions_backward(own, _at(slopes, at)), features, sums)
        for others in sums[1:]:
            for total, other in zip(sums[0], others, strict=True):
                total.add_(other)
        return [total if ask else None for total, ask in zip(sums[0], wanted, strict=True)]

    def _share(self, call: Callable[[int, _Stack], None], features: Tensor, sums: Sequence[Sequence[Tensor]]) -> None:
        """Call for each part: its first image, and the layers as it sees them."""
        parts = [self._part(part, features, sums[place] if sums else ()) for place, part in enumerate(self._parts)]
        works = [_room(library.convolutions_work(part)) for part in parts]
        for part, work in zip(parts, works, strict=True):
            part.work = work.data_ptr()
        for_each(len(parts), lambda number: call(self._parts[number].start, parts[number]))

    def _part(self, images: range, features: Tensor, sums: Sequence[Tensor]) -> _Stack:
        own = _Stack.from_buffer_copy(self._own)
        own.images = len(images)
        own.seen, own.features = _at(self._images, images.start), _at(features, images.start)
        for place in range(own.layers):
            layer = own.layer[place]
            layer.weight, layer.bias = (one.data_ptr() for one in self._weights[2 * place : 2 * place + 2])
            if sums:
                layer.weight_gradient, layer.bias_gradient = (one.data_ptr() for one in sums[2 * place : 2 * place + 2])
            if place < len(self.kept):
                layer.kept = _at(self.kept[place], images.start)
        return own


def _room(*sizes: int) -> Tensor:
    """Numbers of float32 on the CPU, whatever is the default."""
    return torch.empty(*sizes, dtype=torch.float32, device="cpu")


def _at(tensor: Tensor, row: int) -> int:
    """Where a row of a tensor lies."""
    return tensor.data_ptr() + tensor.element_size() * row * tensor.stride(0)
