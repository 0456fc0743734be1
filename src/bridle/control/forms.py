"""What small networks are made of: linear layers, layer norms and activations, and where a module keeps their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor, nn

__all__ = [
    "Activation",
    "Form",
    "Layer",
    "Net",
    "Norm",
    "Parts",
    "Place",
    "activation_of",
    "parts_of",
    "places_of",
    "plain",
]

Activation = Literal["relu", "tanh", "sigmoid", "silu", "gelu", "gelu by tanh", "elu", "leaky relu", "softplus"]

Place = tuple[dict[str, Any], str]
"""Where a module keeps a parameter, and its name there; asking the module itself would take most of a small run's time."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Norm:
    """A layer norm over a layer's width: γ x̂ + β."""

    eps: float
    """Added to the variance."""
    scale: bool = True
    """Whether there is a γ."""
    shift: bool = True
    """Whether there is a β."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One linear layer and what follows it: a norm, an activation, a norm."""

    bias: bool = True
    """Whether the linear layer adds one."""
    before: Norm | None = None
    """In front of the activation."""
    activation: Activation | None = None
    """None behind the last layer."""
    strength: float = 0.0
    """ELU's α, LeakyReLU's slope below 0."""
    behind: Norm | None = None
    """Behind the activation."""


Form = tuple[Layer, ...]
"""A net: linear layers, two at least, an activation behind each but the last."""


@dataclass(frozen=True, slots=True)
class Net:
    """A net on parameters of its own: of each layer weight, bias, and γ and β of each norm, those that there are."""

    form: Form
    parameters: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Parts(Generic[_T]):
    """What belongs to one layer: its parameters, or their gradients."""

    weight: _T
    bias: _T | None
    before: tuple[_T | None, _T | None]
    """γ and β."""
    behind: tuple[_T | None, _T | None]
    """γ and β."""


def parts_of(form: Form, owned: Sequence[_T]) -> list[Parts[_T]]:
    """Return what belongs to each layer of what lies in the order of a net's parameters."""
    left = iter(owned)

    def taken(there: bool) -> _T | None:
        return next(left) if there else None

    def norm(own: Norm | None) -> tuple[_T | None, _T | None]:
        return (None, None) if own is None else (taken(own.scale), taken(own.shift))

    return [Parts(next(left), taken(own.bias), norm(own.before), norm(own.behind)) for own in form]


def plain(activation: Activation, depth: int) -> Form:
    """Return the form of a perceptron of ``depth`` linear layers."""
    return (*[Layer(activation=activation)] * (depth - 1), Layer())


def activation_of(form: Form) -> Literal["tanh", "relu"] | None:
    """Return the activation of a perceptron with tanh or ReLU behind all hidden layers; None of what is none."""
    for activation in ("tanh", "relu"):
        if form == plain(activation, len(form)):
            return activation
    return None


def places_of(net: nn.Sequential) -> list[Place]:
    """Return where the weights and biases of linear layers are kept, in turn."""
    homes = [layer._parameters for layer in net if isinstance(layer, nn.Linear)]
    return [(home, name) for home in homes for name in ("weight", "bias")]
