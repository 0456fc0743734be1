"""Reading a user's own modules: those that compute a perceptron can run as ours do.

What a module computes is seen by running it on a few states and looking at each operation. Whatever is not a linear layer
on weights of its own, followed by tanh or ReLU, makes it a module like any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bridle.control.perceptrons import Activation, Place
from bridle.guards import has_followed_slopes, is_observed, is_plain, is_watched

__all__ = ["Reading", "can_be_read", "read"]

_ACTIVATIONS: dict[object, Activation] = {
    torch.tanh: "tanh",
    Tensor.tanh: "tanh",
    functional.tanh: "tanh",
    torch.relu: "relu",
    Tensor.relu: "relu",
    functional.relu: "relu",
}

_KNOWN = (nn.Linear, nn.Tanh, nn.ReLU, nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""PyTorch's modules that a perceptron is made of; with another inside, it is not run to be read, for that may change it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A module that is a perceptron: linear layers, two at least, each but the last followed by the activation."""

    activation: Activation
    """What follows each hidden layer."""
    places: tuple[Place, ...]
    """Where weights and biases are kept, in turn."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Weights and biases, in turn."""
        return [home[name] for home, name in self.places]

    def same(self, other: Reading | None) -> bool:
        """Whether the other one is the same perceptron of the same weights."""
        if other is None or other.activation != self.activation or len(other.places) != len(self.places):
            return False
        return all(
            home is its and name == called
            for (home, name), (its, called) in zip(self.places, other.places, strict=True)
        )


def read(module: nn.Module, vector: Float[Tensor, "n D"]) -> Reading | None:
    """Run a module on n states and say which perceptron it is; None if it is none, or somebody would notice.

    It is none where it holds buffers, parametrised or shared weights or other modules, where anything but linear layers and
    activations is called on the way, and where running it changes what it keeps. That it prints, or writes to what others
    keep, is not seen.
    """
    modules = list(module.modules())
    if is_observed() or any(is_watched(own) or has_followed_slopes(own) for own in modules):
        return None
    foreign = any(type(own).__module__.startswith("torch.") and type(own) not in _KNOWN for own in modules)
    if foreign or any(own._buffers for own in modules):
        return None
    before = [_kept(own) for own in modules]
    recorder = _Recorder()
    try:
        with torch.enable_grad(), recorder:
            outputs = module(vector)
    except Exception:  # a user's own code may raise anything; it will again where it is run in earnest
        return None
    if [_kept(own) for own in modules] != before:
        return None
    return _chain(module, vector, recorder.calls, outputs)


def can_be_read(module: nn.Module, vector: Float[Tensor, "n D"]) -> bool:
    """Whether a copy of a module is read as a perceptron: what the module keeps, and what draws come next, stays as it was."""
    try:
        own = copy.deepcopy(module)
    except Exception:  # what a user's own code keeps may refuse in any way
        return False
    with torch.random.fork_rng(devices=()):
        return read(own, vector) is not None


class _Recorder(TorchFunctionMode):
    """Writes down each of PyTorch's functions that is called, with what was given and what came of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, found))
        return found


def _chain(
    module: nn.Module,
    vector: Tensor,
    calls: Sequence[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]],
    outputs: object,
) -> Reading | None:
    """Return what the calls come to if each works on what the one before it gave, and the last gives the outputs."""
    homes: dict[int, Place] = {
        id(parameter): (own._parameters, name)
        for own in module.modules()
        for name, parameter in own._parameters.items()
        if parameter is not None
    }
    places: list[Place] = []
    kinds: list[Activation] = []
    below: object = vector
    for func, args, named, found in calls:
        layers = len(places) // 2
        if func is functional.linear and len(args) == 3 and not named and layers == len(kinds):
            own = [homes.get(id(weight)) for weight in args[1:]]
            if None in own or not all(map(is_plain, args[1:])):
                return None
            places += cast(list[Place], own)
        elif func in _ACTIVATIONS and len(args) == 1 and not named.keys() - {"inplace"} and layers == len(kinds) + 1:
            kinds.append(_ACTIVATIONS[func])
        else:
            return None
        if args[0] is not below:
            return None
        below = found
    whole = below is outputs and is_plain(cast(Tensor, below)) and len(places) == 2 * len(kinds) + 2
    held = [home[name] for home, name in places]
    follows = whole and cast(Tensor, below).requires_grad == any(weight.requires_grad for weight in held)
    if not follows or len({id(weight) for weight in held}) < len(held) or len(set(kinds)) != 1:
        return None
    return Reading(activation=kinds[0], places=tuple(places))


def _kept(module: nn.Module) -> list[tuple[str, int, int]]:
    """Tell what a module keeps apart from what it keeps later: names, identities and sizes."""
    return [
        (name, id(value), len(value) if isinstance(value, Sized) and not isinstance(value, Tensor) else 0)
        for name, value in (*module.__dict__.items(), *module._parameters.items())
    ]
