"""How compiled code finds a small net: where its parameters lie, and buffers for what its layers write."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import get_args

from torch import Tensor

from bridle.control.forms import Activation, Net, parts_of

__all__ = ["LAYERS", "LaidNet", "lay", "point_at"]

LAYERS = 8
"""The most layers of one net, as in small.c."""


class _Norm(ctypes.Structure):
    """See ``norm`` in between.h."""

    _fields_ = (
        ("there", ctypes.c_int64),
        ("eps", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("scale", "shift", "scale_gradient", "shift_gradient")),
        *((name, ctypes.c_void_p) for name in ("standard", "share")),
    )


class _Layer(ctypes.Structure):
    """See ``layer`` in small.c."""

    _fields_ = (
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "weight_gradient", "bias_gradient")),
        ("activation", ctypes.c_int64),
        ("strength", ctypes.c_double),
        ("before", _Norm),
        ("behind", _Norm),
        *((name, ctypes.c_void_p) for name in ("hidden", "slopes")),
    )


class LaidNet(ctypes.Structure):
    """See ``perceptron`` in small.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "layers", "transposed", "inputs")),
        ("layer", _Layer * LAYERS),
        ("out", ctypes.c_void_p),
        ("across", ctypes.c_int64),
        ("along", ctypes.c_int64),
        ("work", ctypes.c_void_p),
    )


def lay(net: Net, rows: int, *, learns: bool, transposed: bool = False) -> tuple[LaidNet, list[Tensor]]:
    """Describe a net over n states; return what its layers write, too, which lives as long as it is asked to.

    Args:
        net: parameters that lie row by row.
        rows: n.
        learns: whether there is a way back.
        transposed: whether weights of hidden layers are given as [in, out].
    """
    parts, kept = parts_of(net.form, net.parameters), list[Tensor]()
    own = LaidNet(rows=rows, layers=len(parts), transposed=transposed)
    own.inputs = parts[0].weight.shape[0 if transposed else 1]

    def room(*shape: int) -> int:
        kept.append(net.parameters[0].new_empty(shape))
        return kept[-1].data_ptr()

    for depth, (form, part) in enumerate(zip(net.form, parts, strict=True)):
        layer = own.layer[depth]
        hidden = form.activation is not None
        layer.width = width = part.weight.shape[1 if transposed and hidden else 0]
        layer.weight, layer.bias = part.weight.data_ptr(), _where(part.bias)
        if form.activation is None:
            continue
        layer.activation, layer.strength = get_args(Activation).index(form.activation), form.strength
        layer.hidden = room(rows, width)
        for norm, said, tensors in (
            (layer.before, form.before, part.before),
            (layer.behind, form.behind, part.behind),
        ):
            if said is None:
                continue
            norm.there, norm.eps = True, said.eps
            norm.scale, norm.shift = map(_where, tensors)
            if learns:
                norm.standard, norm.share = room(rows, width), room(rows)
        told = form.activation in ("relu", "tanh") and form.behind is None
        if learns and not told:
            layer.slopes = room(rows, width)
    return own, kept


def point_at(own: LaidNet, net: Net, gradients: Sequence[Tensor]) -> None:
    """Say where the gradients of a net's parameters are added to."""
    for layer, part in zip(own.layer, parts_of(net.form, gradients), strict=False):
        layer.weight_gradient, layer.bias_gradient = part.weight.data_ptr(), _where(part.bias)
        for norm, tensors in ((layer.before, part.before), (layer.behind, part.behind)):
            norm.scale_gradient, norm.shift_gradient = map(_where, tensors)


def _where(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
