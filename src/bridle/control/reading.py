"""Reading a user's own modules: those that compute a perceptron can run as ours do.

What a module computes is seen by running it on a few states and looking at each operation. Whatever is not a linear layer
on weights of its own, followed by an activation and at most a layer norm on either side of that, makes it a module like
any other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bridle.control.forms import Form, Layer, Norm, Place
from bridle.control.operations import MODULES, Normed, Operation, Summed, operation_of
from bridle.guards import has_followed_slopes, is_observed, is_plain, is_watched

__all__ = ["Reading", "can_be_read", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """A module that is a perceptron: linear layers, two at least, each but the last followed by an activation."""

    form: Form
    """What follows on what."""
    places: tuple[Place, ...]
    """Where the parameters are kept, in their order."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, in their order."""
        return [home[name] for home, name in self.places]

    def same(self, other: Reading | None) -> bool:
        """Whether the other one is the same perceptron of the same weights."""
        if other is None or other.form != self.form or len(other.places) != len(self.places):
            return False
        return all(
            home is its and name == called
            for (home, name), (its, called) in zip(self.places, other.places, strict=True)
        )


def read(module: nn.Module, vector: Float[Tensor, "n D"]) -> Reading | None:
    """Run a module on n states and say which perceptron it is; None if it is none, or somebody would notice.

    It is none where it holds buffers, parametrised or shared weights or other modules, where anything but linear layers,
    activations and norms of a layer's whole width is called on the way, and where running it changes what it keeps. That it
    prints, or writes to what others keep, is not seen.
    """
    modules = list(module.modules())
    if is_observed() or any(is_watched(own) or has_followed_slopes(own) for own in modules):
        return None
    foreign = any(type(own).__module__.startswith("torch.") and type(own) not in MODULES for own in modules)
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
    chain = _Chain()
    below: object = vector
    for func, args, named, found in calls:
        operation = operation_of(func, args, named)
        if operation is None or operation.seen is not below or not chain.takes(operation):
            return None
        below = found
    form, held = chain.form, chain.held
    places = [homes.get(id(parameter)) for parameter in held]
    known = None not in places and len({id(parameter) for parameter in held}) == len(held)
    ended = len(form) > 1 and form[-1] == Layer(bias=form[-1].bias)
    if not (known and ended and below is outputs and all(map(is_plain, (*held, cast(Tensor, below))))):
        return None
    if cast(Tensor, below).requires_grad != any(parameter.requires_grad for parameter in held):
        return None
    return Reading(form=tuple(form), places=tuple(cast(list[Place], places)))


class _Chain:
    """The layers that operations come to, one after the other."""

    def __init__(self) -> None:
        self.form: list[Layer] = []
        self.held: list[Tensor] = []
        """Their parameters, in their order."""
        self._width = 0

    def takes(self, operation: Operation) -> bool:
        """Whether an operation can follow; if so, it does."""
        if isinstance(operation, Summed):
            return self._sum(operation)
        if not self.form:
            return False
        last = self.form[-1]
        if isinstance(operation, Normed):
            return self._norm(last, operation)
        self.form[-1] = replace(last, activation=operation.activation, strength=operation.strength)
        return last.activation is None

    def _sum(self, operation: Summed) -> bool:
        weight, bias = cast(Tensor, operation.weight), cast(Tensor | None, operation.bias)
        if (self.form and self.form[-1].activation is None) or weight.ndim != 2:
            return False
        self._width = len(weight)
        self.form.append(Layer(bias=bias is not None))
        self.held += [weight] if bias is None else [weight, bias]
        return bias is None or bias.shape == (self._width,)

    def _norm(self, last: Layer, operation: Normed) -> bool:
        scale, shift = cast(Tensor | None, operation.scale), cast(Tensor | None, operation.shift)
        own = Norm(eps=operation.eps, scale=scale is not None, shift=shift is not None)
        first = last.activation is None
        self.form[-1] = replace(last, before=own) if first else replace(last, behind=own)
        self.held += [parameter for parameter in (scale, shift) if parameter is not None]
        return (last.before if first else last.behind) is None and operation.shape == (self._width,)


def _kept(module: nn.Module) -> list[tuple[str, int, int]]:
    """Tell what a module keeps apart from what it keeps later: names, identities and sizes."""
    return [
        (name, id(value), len(value) if isinstance(value, Sized) and not isinstance(value, Tensor) else 0)
        for name, value in (*module.__dict__.items(), *module._parameters.items())
    ]
