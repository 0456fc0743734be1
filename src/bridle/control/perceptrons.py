"""A perceptron run, and differentiated, by hand.

In networks of two layers of 64 the machine spends its time between the operations, not in them. So the forward pass writes
into buffers that are kept, and the backward pass is the chain rule written out: one net at a time, for a minibatch of 512
and all its layers then fit a second-level cache. Products are NumPy's, which cost less to call; the activations are
PyTorch's, which are several times faster.
"""

from __future__ import annotations

from operator import is_
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

__all__ = ["Activation", "Array", "Perceptron", "Run"]

Array = NDArray[np.float32]
Activation = Literal["tanh", "relu"]

_MINUS_ONE = torch.tensor(-1.0)
_TANH_BACKWARD = torch.ops.aten.tanh_backward.grad_input
_RELU_BACKWARD = torch.ops.aten.threshold_backward.grad_input
_KEPT = 8
"""Runs whose buffers are kept for later ones of as many states."""


class Perceptron:
    """The linear layers of a module, each but the last followed by ``activation``, on the module's own float32 weights.

    h_0 = x,  h_k = f(h_{k−1} W_kᵀ + b_k),  outputs = h_{K−1} W_Kᵀ + b_K
    """

    def __init__(self, net: nn.Module, activation: Activation) -> None:
        self.tanh = activation == "tanh"
        # a module looks its parameters up here; asking the module itself would take most of a small run's time
        homes = [layer._parameters for layer in cast(nn.Sequential, net) if isinstance(layer, nn.Linear)]
        self._places = [(home, name) for home in homes for name in ("weight", "bias")]
        self._parameters: list[Tensor] = []
        self._addresses: list[int] = []
        self._known: list[Tensor | None] = []
        self._free: list[Run] = []
        self.weights: list[_Layer] = []
        self.gradients: list[_Layer] = []

    @property
    def learns(self) -> bool:
        """Whether no weight is frozen."""
        return all(cast(Tensor, home[name]).requires_grad for home, name in self._places)

    def run(self, vector: Array) -> Run:
        """Run forward over n states [n, D], to be pulled back through at most once."""
        self._hold()
        rows = len(vector)
        for place, kept in enumerate(self._free):
            if kept.rows == rows:
                run = self._free.pop(place)
                break
        else:
            run = Run(self, rows)
        run.forward(vector)
        return run

    def outputs(self, vector: Array) -> Array:
        """Return the outputs [A, n] in n states [n, D], and nothing else."""
        run = self.run(vector)
        self.release(run)
        return run.outputs.copy()

    def release(self, run: Run) -> None:
        """Keep a run's buffers for another one."""
        self._free.append(run)
        del self._free[:-_KEPT]

    def hold_gradients(self) -> list[_Layer]:
        """Return the gradients as they lie now, to add to; zero where there were none."""
        present = [parameter.grad for parameter in self._parameters]
        if not self.gradients or not all(map(is_, present, self._known)):
            for parameter in self._parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._known = [parameter.grad for parameter in self._parameters]
            self.gradients = _layers([cast(Tensor, gradient) for gradient in self._known])
        return self.gradients

    def _hold(self) -> None:
        """Follow weights that have moved in memory, as under a flat optimiser, or have been replaced."""
        present = [home[name] for home, name in self._places]
        same = len(self._parameters) == len(present) and all(map(is_, present, self._parameters))
        if same and [parameter.data_ptr() for parameter in self._parameters] == self._addresses:
            return
        self._parameters = [cast(Tensor, parameter) for parameter in present]
        self._addresses = [parameter.data_ptr() for parameter in self._parameters]
        self.weights = _layers([parameter.detach() for parameter in self._parameters])
        self.gradients = []


class Run:
    """What a perceptron writes in n states, there and back."""

    def __init__(self, net: Perceptron, rows: int) -> None:
        self.rows = rows
        self._net = net
        *widths, outputs = [len(layer.bias) for layer in net.weights]
        self._vector: Array = np.empty((0, 0), dtype=np.float32)
        self._ones: Array = np.ones(rows, dtype=np.float32)
        self._hidden = [_Matrix(np.empty((rows, width), dtype=np.float32)) for width in widths]
        self._doubled = [torch.empty(width) for width in widths]
        self._scratch: Array = np.empty(rows * max(widths), dtype=np.float32)
        self.outputs: Array = np.empty((outputs, rows), dtype=np.float32)
        """[A, n], of the last forward run"""

    def forward(self, vector: Array) -> None:
        """Fill the hidden layers and the outputs."""
        self._vector = below = vector
        layers, tanh = self._net.weights, self._net.tanh
        for layer, hidden, doubled in zip(layers, self._hidden, self._doubled, strict=False):
            np.matmul(below, layer.weight.T, out=hidden.array)
            if tanh:  # tanh y = 2 σ(2y) − 1: PyTorch's σ takes half the time of its tanh
                torch.add(layer.tensor, layer.tensor, out=doubled)
                torch.add(doubled, hidden.tensor, alpha=2, out=hidden.tensor).sigmoid_()
                torch.add(_MINUS_ONE, hidden.tensor, alpha=2, out=hidden.tensor)
            else:
                hidden.tensor.add_(layer.tensor).relu_()
            below = hidden.array
        np.matmul(layers[-1].weight, below.T, out=self.outputs)
        self.outputs += layers[-1].bias[:, None]

    def pull_back(self, slopes: Array) -> None:
        """Add to the weights' gradients what ``slopes`` [A, n] of the outputs come to; the run is over then.

        A hidden layer is written over by its own slopes, once nothing reads it any more.
        """
        layers, gradients, tanh = self._net.weights, self._net.hold_gradients(), self._net.tanh
        above: Array = slopes.T
        for depth in reversed(range(len(self._hidden))):
            hidden = self._hidden[depth]
            gradients[depth + 1].add(above, hidden.array, self._ones)
            slope = self._scratch[: hidden.array.size].reshape(hidden.array.shape)
            np.matmul(above, layers[depth + 1].weight, out=slope)
            if tanh:
                _TANH_BACKWARD(torch.from_numpy(slope), hidden.tensor, grad_input=hidden.tensor)
            else:
                _RELU_BACKWARD(torch.from_numpy(slope), hidden.tensor, 0, grad_input=hidden.tensor)
            above = hidden.array
        gradients[0].add(above, self._vector, self._ones)
        self._net.release(self)


class _Layer:
    """A linear layer's weight [out, in] and bias [out], or their gradients, in the parameters' own memory."""

    __slots__ = ("bias", "tensor", "weight")

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight: Array = weight.numpy()
        self.bias: Array = bias.numpy()
        self.tensor = bias

    def add(self, above: Array, below: Array, ones: Array) -> None:
        """Add Σ_n above_n below_nᵀ and Σ_n above_n: the gradients, if ``above`` are the slopes of what the layer gives."""
        self.weight += above.T @ below
        self.bias += ones @ above


class _Matrix:
    """One memory as NumPy and as PyTorch see it."""

    __slots__ = ("array", "tensor")

    def __init__(self, array: Array) -> None:
        self.array = array
        self.tensor = torch.from_numpy(array)


def _layers(tensors: list[Tensor]) -> list[_Layer]:
    return [_Layer(weight, bias) for weight, bias in zip(tensors[::2], tensors[1::2], strict=True)]
