"""Perceptrons run, and differentiated, by hand.

In networks of two layers of 64 the machine spends its time between the operations, not in them: each call finds the caches
full of layers. So there are few calls. Perceptrons of the same hidden layers run side by side in one stack, the forward
pass writes into buffers that are kept, and the backward pass is the chain rule written out. Products are NumPy's, which
cost less to call; the activations are PyTorch's, which are several times faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import islice
from operator import is_
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from bridle.control import compiled
from bridle.control.buffers import Buffers
from bridle.control.forms import Form, Net, Place, activation_of

__all__ = ["Array", "Frozen", "Perceptrons", "Run"]

Array = NDArray[np.float32]

_MINUS_ONE = torch.tensor(-1.0)
_TANH_BACKWARD = torch.ops.aten.tanh_backward.grad_input
_RELU_BACKWARD = torch.ops.aten.threshold_backward.grad_input


class Perceptrons:
    """P perceptrons on their modules' own float32 parameters.

        h_0 = x,  h_k = f_k(h_{k−1} W_kᵀ + b_k),  outputs = h_{K−1} W_Kᵀ + b_K

    Compiled they may be of any form. By NumPy each f is one activation, tanh or ReLU, and where nets are of the same hidden
    layers and their weights lie evenly spaced in one memory, as under a flat optimiser, they run as one.
    """

    def __init__(self, nets: Sequence[tuple[Form, Sequence[Place]]]) -> None:
        """Take each net's form, and where its parameters are kept, in their order."""
        self._forms = [form for form, _ in nets]
        self._counts = [len(places) for _, places in nets]
        self._places = [place for _, places in nets for place in places]
        self._activations = [activation_of(form) for form in self._forms]
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []
        self._alone: list[_Stack] | list[compiled.Stack] = []
        self._together: list[_Stack] | list[compiled.Stack] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what points at the weights of this one."""
        return self.__dict__ | {"_parameters": [], "_addresses": [], "_alone": [], "_together": []}

    @property
    def learn(self) -> bool:
        """Whether no weight is frozen."""
        return all([home[name].requires_grad for home, name in self._places])  # noqa: C419 (a list is faster)

    def outputs(self, net: int, vector: Float[Tensor, "n D"]) -> Float[Tensor, "A n"]:
        """Return the outputs of one perceptron in n states, and nothing else."""
        self._hold()
        stack = self._alone[net]
        run = stack.run(vector)
        stack.free.let_go(run)  # type: ignore[arg-type]
        return run.outputs[0].clone()

    @property
    def able(self) -> bool:
        """Whether they can run as they lie now."""
        self._hold()
        return bool(self._alone)

    def frozen(self, net: int, rows: int) -> Frozen | compiled.Frozen:
        """Return one perceptron as its weights are now, for many runs over ``rows`` states each."""
        self._hold()
        own = self._nets()[net]
        if compiled.serves([own]):
            return compiled.Frozen(own, rows)
        arrays = [tensor.detach().numpy() for tensor in own.parameters]
        return Frozen(arrays[::2], arrays[1::2], tanh=self._activations[net] == "tanh", rows=rows)

    def run(self, vector: Float[Tensor, "n D"]) -> Sequence[Run | compiled.Run]:
        """Run all of them over n states; each run holds some, in their order. ``vector`` lies row by row."""
        self._hold()
        return [stack.run(vector) for stack in self._together]

    def stack(self) -> compiled.Stack | None:
        """Return all of them as compiled code runs them; None where it does not."""
        self._hold()
        stack = self._together[0] if self._together else None
        return stack if isinstance(stack, compiled.Stack) else None

    def _hold(self) -> None:
        """Follow weights that have moved in memory or have been replaced."""
        present = [home[name] for home, name in self._places]
        same = len(self._parameters) == len(present) and all(map(is_, present, self._parameters))
        if same and [parameter.data_ptr() for parameter in self._parameters] == self._addresses:
            return
        self._parameters = present
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        nets = self._nets()
        if compiled.serves(nets):
            self._alone = [compiled.Stack([net]) for net in nets]
            self._together = [compiled.Stack(nets)]
            return
        self._alone = self._together = []
        if None in self._activations:
            return
        owned = [list(net.parameters) for net in nets]
        kinds = [activation == "tanh" for activation in self._activations]
        self._alone = [_Stack([net], tanh=tanh) for net, tanh in zip(owned, kinds, strict=True)]
        hidden = [[tensor.shape for tensor in net[:-2]] for net in owned]
        alike = all(shapes == hidden[0] for shapes in hidden) and len(set(kinds)) == 1
        even = alike and all(len(_stacked(same)) == 1 for same in zip(*(net[:-2] for net in owned), strict=True))
        self._together = [_Stack(owned, tanh=kinds[0])] if even else self._alone

    def _nets(self) -> list[Net]:
        """Return the nets on the parameters that are held."""
        left = iter(self._parameters)
        return [Net(form, list(islice(left, count))) for form, count in zip(self._forms, self._counts, strict=True)]


class Run:
    """What perceptrons of one stack write in n states, there and back."""

    def __init__(self, stack: _Stack, rows: int) -> None:
        self.rows = rows
        self._stack = stack
        widths = [layer.bias.shape[-1] for layer in stack.hidden]
        P = len(stack.last)
        self._vector: Array = np.empty((0, 0), dtype=np.float32)
        self._ones: Array = np.ones((1, rows), dtype=np.float32)
        self._hidden = [_Matrices(np.empty((P, rows, width), dtype=np.float32)) for width in widths]
        scratch = np.empty(P * rows * max(widths), dtype=np.float32)
        self._scratch = [_Matrices(scratch[: P * rows * width].reshape(P, rows, width)) for width in widths]
        self._outputs = [_Matrices(np.empty((len(layer.bias), rows), dtype=np.float32)) for layer in stack.last]
        self.outputs: list[Float[Tensor, "A n"]] = [outputs.tensor for outputs in self._outputs]
        """[A, n] of each, of the last forward run"""

    def forward(self, vector: Float[Tensor, "n D"]) -> None:
        """Fill the hidden layers and the outputs."""
        self._vector = below = vector.numpy()
        for layer, hidden in zip(self._stack.hidden, self._hidden, strict=True):
            np.matmul(below, layer.weight_t, out=hidden.array)
            seen = hidden.tensor
            if self._stack.tanh:  # tanh y = 2 σ(2y) − 1: PyTorch's σ takes half the time of its tanh
                np.add(layer.bias, layer.bias, out=layer.doubled.array)
                torch.add(layer.doubled.tensor, seen, alpha=2, out=seen).sigmoid_()
                torch.add(_MINUS_ONE, seen, alpha=2, out=seen)
            else:
                seen.add_(layer.tensor).relu_()
            below = hidden.array
        for top, last, outputs in zip(below, self._stack.last, self._outputs, strict=True):
            np.matmul(last.weight, top.T, out=outputs.array)
            outputs.array += last.bias[:, None]

    def pull_back(self, slopes: Sequence[Float[Tensor, "A n"]]) -> None:
        """Add to the weights' gradients what ``slopes`` of each one's outputs come to; the run is over then.

        A hidden layer is written over by its own slopes, once nothing reads it any more.
        """
        stack, ones = self._stack, self._ones
        to_hidden, to_last = stack.gradients()
        above = self._scratch[-1]
        for own, top, last, gradient, under in zip(
            [slope.numpy() for slope in slopes], self._hidden[-1].array, stack.last, to_last, above.array, strict=True
        ):
            gradient.weight += own @ top
            gradient.bias += np.add.reduce(own, axis=1)
            np.dot(own.T, last.weight, out=under)  # matmul leaves one output's outer product to plain loops
        for depth in reversed(range(len(self._hidden))):
            slope = self._hidden[depth]
            if stack.tanh:
                _TANH_BACKWARD(above.tensor, slope.tensor, grad_input=slope.tensor)
            else:
                _RELU_BACKWARD(above.tensor, slope.tensor, 0, grad_input=slope.tensor)
            below = self._hidden[depth - 1].array if depth else self._vector
            weights, biases = to_hidden[depth]
            _add(np.matmul(slope.array.transpose(0, 2, 1), below), weights)
            _add(np.matmul(ones, slope.array), biases)
            if depth:
                above = self._scratch[depth - 1]
                np.matmul(slope.array, stack.hidden[depth].weight, out=above.array)
        stack.free.let_go(self)


class Frozen:
    """One perceptron whose weights stand still, arranged so that a run over a few states is as few calls as can be.

    With tanh y = 2 σ(2y) − 1, a layer of tanh hands s = σ(2y) on, and the next one, W (2s − 1) + b = (2W) s + (b − W·1),
    has taken the rest into its weights; so have weights before a σ their factor 2.
    """

    def __init__(self, weights: Sequence[Array], biases: Sequence[Array], *, tanh: bool, rows: int) -> None:
        self._activation = torch.Tensor.sigmoid_ if tanh else torch.Tensor.relu_
        *self._hidden, self._last = [
            _arranged(weight, bias, onto=tanh and place > 0, into=tanh and place + 1 < len(weights))
            for place, (weight, bias) in enumerate(zip(weights, biases, strict=True))
        ]
        self._layers = [_Matrices(np.empty((rows, len(bias)), dtype=np.float32)) for _, bias in self._hidden]

    def outputs(self, vector: Float[Tensor, "n D"], out: Float[Tensor, "n A"]) -> None:
        """Write the outputs in n states to ``out``."""
        below, found = vector.numpy(), out.numpy()
        for (weight_t, bias), layer in zip(self._hidden, self._layers, strict=True):
            np.matmul(below, weight_t, out=layer.array)
            np.add(layer.array, bias, out=layer.array)
            self._activation(layer.tensor)
            below = layer.array
        weight_t, bias = self._last
        np.matmul(below, weight_t, out=found)
        found += bias


def _arranged(weight: Array, bias: Array, *, onto: bool, into: bool) -> tuple[Array, Array]:
    """Return a layer's weights [in, out] and biases, as they follow ``onto`` a σ and lead ``into`` one."""
    if onto:
        weight, bias = 2 * weight, bias - weight.sum(axis=1)
    if into:
        weight, bias = 2 * weight, 2 * bias
    return np.array(weight.T, order="C"), np.array(bias)


class _Stack:
    """The weights of some perceptrons, layer upon layer, and runs of them whose buffers are free."""

    def __init__(self, nets: list[list[Tensor]], *, tanh: bool) -> None:
        self.tanh = tanh
        self.free = Buffers(partial(Run, self))
        self._nets = nets
        *pairs, weights, biases = [list(same) for same in zip(*nets, strict=True)]
        self.hidden = [
            _Hidden(_stacked(weight)[0], _stacked(bias)[0])
            for weight, bias in zip(pairs[::2], pairs[1::2], strict=True)
        ]
        self.last = [_Last(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        self._known: list[Tensor | None] = []
        self._gradients: tuple[list[tuple[list[Array], list[Array]]], list[_Last]] = ([], [])

    def run(self, vector: Float[Tensor, "n D"]) -> Run:
        """Run forward over n states, in free buffers if there are any."""
        run = self.free.take(len(vector))
        run.forward(vector)
        return run

    def gradients(self) -> tuple[list[tuple[list[Array], list[Array]]], list[_Last]]:
        """Return where gradients lie now, of the hidden layers and of the last ones; zero where there were none."""
        present = [parameter.grad for net in self._nets for parameter in net]
        if self._known and all(map(is_, present, self._known)):
            return self._gradients
        for parameter in [parameter for net in self._nets for parameter in net]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._known = [parameter.grad for net in self._nets for parameter in net]
        nets = [[cast(Tensor, parameter.grad) for parameter in net] for net in self._nets]
        *pairs, weights, biases = [list(same) for same in zip(*nets, strict=True)]
        places = [[part.numpy() for part in _stacked(same)] for same in pairs]
        hidden = [
            (weight, [part[:, None] for part in bias]) for weight, bias in zip(places[::2], places[1::2], strict=True)
        ]
        self._gradients = hidden, [_Last(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
        return self._gradients


class _Hidden:
    """One hidden layer of P nets: weights [P, out, in] and [P, in, out], biases [P, 1, out]."""

    __slots__ = ("bias", "doubled", "tensor", "weight", "weight_t")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight: Array = weight.detach().numpy()
        self.weight_t: Array = self.weight.transpose(0, 2, 1)
        self.tensor = bias.detach()[:, None]
        self.bias: Array = self.tensor.numpy()
        self.doubled = _Matrices(np.empty_like(self.bias))


class _Last:
    """One net's last layer, or the gradients of it: weight [A, in] and bias [A]."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight: Array = weight.detach().numpy()
        self.bias: Array = bias.detach().numpy()


class _Matrices:
    """One memory as NumPy and as PyTorch see it."""

    __slots__ = ("array", "tensor")

    def __init__(self, array: Array) -> None:
        self.array = array
        self.tensor = torch.from_numpy(array)


def _stacked(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return one view [P, …] of tensors of one shape that lie evenly spaced in one memory; else a view [1, …] of each."""
    first, *others = tensors
    same = all(other.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for other in others)
    gaps = {(other.storage_offset() - first.storage_offset()) / n for n, other in enumerate(others, start=1)}
    if not others or not same or len(gaps) > 1 or min(gaps) <= 0:
        return [tensor.detach()[None] for tensor in tensors]
    gap = others[0].storage_offset() - first.storage_offset()
    return [first.detach().as_strided((len(tensors), *first.shape), (gap, *first.stride()))]


def _add(found: Array, places: list[Array]) -> None:
    """Add the gradients [P, …] of all nets where they belong: to one stack, or to a place each."""
    if len(places) == 1:
        places[0] += found
        return
    for net, place in enumerate(places):
        place += found[net : net + 1]
