"""What small networks are made of, as calls of PyTorch's functions: modules, functions and methods come to the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bridle.control.forms import Activation

__all__ = ["MODULES", "Activated", "Normed", "Operation", "Summed", "operation_of"]

MODULES = (
    *(nn.Linear, nn.LayerNorm, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict),
    *(nn.Tanh, nn.ReLU, nn.Sigmoid, nn.SiLU, nn.GELU, nn.ELU, nn.LeakyReLU, nn.Softplus),
)
"""PyTorch's modules that call nothing else."""


@dataclass(frozen=True, slots=True)
class Summed:
    """A linear layer."""

    seen: object
    weight: object
    bias: object


@dataclass(frozen=True, slots=True)
class Normed:
    """A layer norm over the last axes, of this shape."""

    seen: object
    shape: tuple[int, ...]
    scale: object
    shift: object
    eps: float


@dataclass(frozen=True, slots=True)
class Activated:
    """An activation, of this strength where it has one."""

    seen: object
    activation: Activation
    strength: float = 0.0


Operation = Summed | Normed | Activated


def operation_of(func: object, args: Sequence[Any], named: Mapping[str, Any]) -> Operation | None:
    """Return what a call computes; None where it is something else, or asked for in an unknown way."""
    reader = _READERS.get(func)
    if reader is None:
        return None
    try:
        return reader(*args, **named)
    except (TypeError, ValueError):  # other arguments than are known here
        return None


def _linear(seen: object, weight: object, bias: object = None) -> Summed:
    return Summed(seen, weight, bias)


def _layer_norm(
    seen: object, normalized_shape: Sequence[int], weight: object = None, bias: object = None, eps: float = 1e-5
) -> Normed | None:
    shape = tuple(normalized_shape)
    return Normed(seen, shape, weight, bias, float(eps)) if 0 <= eps < math.inf else None


def _simple(activation: Activation) -> Callable[..., Activated]:
    def reader(seen: object, inplace: bool = False) -> Activated:
        return Activated(seen, activation)

    return reader


def _gelu(seen: object, *, approximate: str = "none") -> Activated:
    return Activated(seen, "gelu" if approximate == "none" else "gelu by tanh")


def _elu(seen: object, alpha: float = 1.0, inplace: bool = False) -> Activated | None:
    return _strong(seen, "elu", alpha)


def _leaky_relu(seen: object, negative_slope: float = 0.01, inplace: bool = False) -> Activated | None:
    return _strong(seen, "leaky relu", negative_slope)


def _strong(seen: object, activation: Activation, strength: object) -> Activated | None:
    """Take no strength below 0, which PyTorch refuses on the way back from what was written in place."""
    if not isinstance(strength, (int, float)) or not 0 <= strength < math.inf:
        return None
    return Activated(seen, activation, float(strength))


def _softplus(seen: object, beta: float = 1.0, threshold: float = 20.0) -> Activated | None:
    return Activated(seen, "softplus") if (beta, threshold) == (1.0, 20.0) else None


_READERS: dict[object, Callable[..., Operation | None]] = {
    functional.linear: _linear,
    functional.layer_norm: _layer_norm,
    **dict.fromkeys((torch.tanh, Tensor.tanh, functional.tanh), _simple("tanh")),
    **dict.fromkeys((torch.relu, Tensor.relu, functional.relu), _simple("relu")),
    **dict.fromkeys((torch.sigmoid, Tensor.sigmoid, functional.sigmoid), _simple("sigmoid")),
    functional.silu: _simple("silu"),
    functional.gelu: _gelu,
    functional.elu: _elu,
    functional.leaky_relu: _leaky_relu,
    functional.softplus: _softplus,
}
