"""Small networks by hand, compiled: the same as :mod:`bridle.control.perceptrons` in fewer calls, where it was built.

``small.c`` is compiled when Bridle is installed, if there is a C compiler then (:mod:`bridle.native.compiling`). It holds
no numbers of its own: weights, gradients and layers are PyTorch's and lie where they lay.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from operator import is_
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.control.buffers import Buffers
from bridle.native.loading import library_of, load_library

__all__ = [
    "Frozen",
    "Normal",
    "Run",
    "Softmax",
    "Stack",
    "library",
    "load",
    "net_of",
    "point_at",
    "require_shape",
    "serves",
]

_LAYERS = 8
"""The most layers of one net, as in small.c."""
_WIDEST = 512
"""Beyond this width the machine's own products are as fast."""


class _Net(ctypes.Structure):
    """See ``perceptron`` in small.c."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("layers", ctypes.c_int64),
        ("tanh", ctypes.c_int64),
        ("transposed", ctypes.c_int64),
        ("width", ctypes.c_int64 * (_LAYERS + 1)),
        ("weight", ctypes.c_void_p * _LAYERS),
        ("bias", ctypes.c_void_p * _LAYERS),
        ("weight_gradient", ctypes.c_void_p * _LAYERS),
        ("bias_gradient", ctypes.c_void_p * _LAYERS),
        ("hidden", ctypes.c_void_p * _LAYERS),
        ("out", ctypes.c_void_p),
        ("across", ctypes.c_int64),
        ("along", ctypes.c_int64),
        ("work", ctypes.c_void_p),
    )


_SOURCE = Path(__file__).with_name("small.c")


def load(place: Path) -> Any:
    """Open what was compiled of small.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    net, at, count = ctypes.POINTER(_Net), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "perceptron_work": (count, [net]),
        "perceptron_forward": (None, [net, at]),
        "perceptron_backward": (None, [net, at, at]),
        "softmax_forward": (count, [count, count, *[at] * 6]),
        "softmax_backward": (None, [count, count, *[at] * 7]),
        "normal_forward": (None, [count, count, *[at] * 5]),
        "normal_backward": (None, [count, count, *[at] * 6]),
        "clipped_descent": (count, [net, net, at]),
    }
    return load_library(place, _SOURCE, functions, "perceptron_source")


library: Any = load(library_of(_SOURCE))
"""The compiled code; None where it was not built."""


def serves(nets: Sequence[Sequence[Tensor]]) -> bool:
    """Whether nets of these weights and biases, in turn, can run compiled."""
    return library is not None and all(
        len(net) <= 2 * _LAYERS
        and max(net[0].shape[-1], *(len(tensor) for tensor in net)) <= _WIDEST
        and all(t.is_contiguous() and t.dtype is torch.float32 and t.device.type == "cpu" for t in net)
        for net in nets
    )


class Stack:
    """Some nets of weights and biases in turn, and runs of them whose buffers are free."""

    def __init__(self, nets: list[list[Tensor]], *, tanh: bool) -> None:
        self.nets = nets
        self.tanh = tanh
        self.free = Buffers(partial(Run, self))
        self._width = nets[0][0].shape[1]
        self._known: list[Tensor | None] = []
        self.gradients: list[list[Tensor]] = []

    def run(self, vector: Float[Tensor, "n D"]) -> Run:
        """Run forward over n states, in free buffers if there are any."""
        rows = len(vector)
        require_shape(vector, rows, self._width)
        run = self.free.take(rows)
        run.forward(vector)
        return run

    def find_gradients(self) -> None:
        """Follow gradients that have moved; where there are none there are zeros then."""
        present = [parameter.grad for net in self.nets for parameter in net]
        if self._known and all(map(is_, present, self._known)):
            return
        for parameter in [parameter for net in self.nets for parameter in net]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
        self.gradients = [[cast(Tensor, parameter.grad) for parameter in net] for net in self.nets]
        self._known = [gradient for net in self.gradients for gradient in net]


class Run:
    """What some nets write in n states, there and back."""

    def __init__(self, stack: Stack, rows: int) -> None:
        self.rows = rows
        self._stack = stack
        self._vector: Tensor | None = None
        self._gradients: list[list[Tensor]] = []
        self.outputs: list[Float[Tensor, "A n"]] = []
        """[A, n] of each, of the last forward run"""
        self._buffers: list[Tensor] = []
        self._nets: list[_Net] = []
        self._pointers: list[Any] = []
        for net in stack.nets:
            hidden = [bias.new_empty(rows, len(bias)) for bias in net[1:-2:2]]
            out = net[-1].new_empty(len(net[-1]), rows)
            own = net_of(net, rows, tanh=stack.tanh, hidden=hidden)
            own.out, own.across, own.along = out.data_ptr(), rows, 1
            work = net[-1].new_empty(library.perceptron_work(own))
            own.work = work.data_ptr()
            self._buffers += [*hidden, work]
            self.outputs.append(out)
            self._nets.append(own)
            self._pointers.append(ctypes.byref(own))

    def forward(self, vector: Float[Tensor, "n D"]) -> None:
        """Fill the hidden layers and the outputs; ``vector`` must lie row by row and stay until the run is over."""
        self._vector = vector
        for net in self._pointers:
            library.perceptron_forward(net, vector.data_ptr())

    def pull_back(self, slopes: Sequence[Float[Tensor, "A n"]]) -> None:
        """Add to the weights' gradients what ``slopes`` of each net's outputs come to; the run is over then.

        They are float32 and lie row by row.
        """
        stack = self._stack
        stack.find_gradients()
        if self._gradients is not stack.gradients:
            self._gradients = stack.gradients
            for net, gradients in zip(self._nets, self._gradients, strict=True):
                point_at(net, gradients)
        assert self._vector is not None
        for net, own in zip(self._pointers, slopes, strict=True):
            library.perceptron_backward(net, self._vector.data_ptr(), own.data_ptr())
        stack.free.let_go(self)


class Frozen:
    """One net whose weights stand still, for many runs over as many states."""

    def __init__(self, net: Sequence[Tensor], *, tanh: bool, rows: int) -> None:
        turned = [
            tensor.detach().T.contiguous() if tensor.ndim == 2 else tensor.detach().clone() for tensor in net[:-2]
        ]
        turned += [tensor.detach().clone() for tensor in net[-2:]]
        hidden = [bias.new_empty(rows, len(bias)) for bias in net[1:-2:2]]
        self._net = net_of(turned, rows, tanh=tanh, hidden=hidden, transposed=True)
        self._net.across, self._net.along = 1, len(net[-1])
        work = net[-1].new_empty(library.perceptron_work(self._net))
        self._net.work = work.data_ptr()
        self._kept = [*turned, *hidden, work]
        self._pointer = ctypes.byref(self._net)
        self._shape = rows, net[0].shape[1]

    def outputs(self, vector: Float[Tensor, "n D"], out: Float[Tensor, "n A"]) -> None:
        """Write the outputs in n states to ``out``, which lies row by row."""
        require_shape(vector, *self._shape)
        self._net.out = out.data_ptr()
        library.perceptron_forward(self._pointer, vector.data_ptr())


def require_shape(vector: Tensor, rows: int, width: int) -> None:
    """Refuse states that compiled code would read beyond."""
    if vector.shape != (rows, width):
        raise ValueError(f"states of shape {tuple(vector.shape)}, expected {(rows, width)}")


def net_of(
    tensors: Sequence[Tensor], rows: int, *, tanh: bool, hidden: Sequence[Tensor], transposed: bool = False
) -> _Net:
    """Describe a net of weights and biases in turn."""
    own = _Net(rows=rows, layers=len(tensors) // 2, tanh=tanh, transposed=transposed)
    own.width[0] = tensors[0].shape[0 if transposed else 1]
    for place, (weight, bias) in enumerate(zip(tensors[::2], tensors[1::2], strict=True)):
        own.width[place + 1] = len(bias)
        own.weight[place], own.bias[place] = weight.data_ptr(), bias.data_ptr()
    for place, layer in enumerate(hidden):
        own.hidden[place] = layer.data_ptr()
    return own


def point_at(net: _Net, gradients: Sequence[Tensor]) -> None:
    """Say where the gradients of a net's weights and biases, in turn, are added to."""
    for place, gradient in enumerate(gradients):
        (net.bias_gradient if place % 2 else net.weight_gradient)[place // 2] = gradient.data_ptr()


class Softmax:
    """π = softmax(z) of n states, and the actions chosen there."""

    __slots__ = ("_chosen", "_logs", "_p", "entropy", "logp")

    def __init__(self, z: Float[Tensor, "A n"], chosen: Int[Tensor, " n"]) -> None:
        self._chosen = chosen.contiguous()
        if chosen.dtype is not torch.int64 or chosen.shape != z.shape[1:]:
            raise ValueError(f"actions of {chosen.dtype} and shape {tuple(chosen.shape)}, expected int64 {z.shape[1:]}")
        self._logs, self._p = torch.empty_like(z), torch.empty_like(z)
        self.logp, self.entropy = z.new_empty(z.shape[1]), z.new_empty(z.shape[1])
        wrong = library.softmax_forward(
            z.shape[1],
            z.shape[0],
            z.data_ptr(),
            self._chosen.data_ptr(),
            self._logs.data_ptr(),
            self._p.data_ptr(),
            self.logp.data_ptr(),
            self.entropy.data_ptr(),
        )
        if wrong:
            raise IndexError(f"action {int(chosen[wrong - 1])} of {z.shape[0]}")

    def gradient(self, logp: Float[Tensor, " n"] | None, entropy: Float[Tensor, " n"] | None) -> Float[Tensor, "A n"]:
        """Return ∂/∂z: of log π(a) it is e_a − π, of H it is −π (log π + H)."""
        to_z = torch.empty_like(self._p)
        library.softmax_backward(
            to_z.shape[1],
            to_z.shape[0],
            self._chosen.data_ptr(),
            self._logs.data_ptr(),
            self._p.data_ptr(),
            self.entropy.data_ptr(),
            _where(logp),
            _where(entropy),
            to_z.data_ptr(),
        )
        return to_z


class Normal:
    """N(μ, σ²) of n actions of A coordinates."""

    __slots__ = ("_log_std", "_z", "entropy", "logp", "spread")

    def __init__(self, mean: Float[Tensor, "A n"], actions: Float[Tensor, "n A"], log_std: Float[Tensor, " A"]) -> None:
        if actions.dtype is not torch.float32 or actions.shape != mean.T.shape:
            raise ValueError(
                f"actions of {actions.dtype} and shape {tuple(actions.shape)}, expected float32 {mean.T.shape}"
            )
        self._log_std = log_std.contiguous()
        self._z = torch.empty_like(mean)
        self.logp = mean.new_empty(mean.shape[1])
        drawn = actions.contiguous()
        library.normal_forward(
            mean.shape[1],
            mean.shape[0],
            mean.data_ptr(),
            drawn.data_ptr(),
            self._log_std.data_ptr(),
            self._z.data_ptr(),
            self.logp.data_ptr(),
        )
        self.entropy = (log_std + _ENTROPY).sum().expand(mean.shape[1]).clone()
        self.spread = torch.zeros_like(log_std)
        """[A] ∂/∂ log σ, once :meth:`gradient` has been called"""

    def gradient(self, logp: Float[Tensor, " n"] | None, entropy: Float[Tensor, " n"] | None) -> Float[Tensor, "A n"]:
        """Return ∂/∂μ and fill ``spread``: of log π they are z/σ and z² − 1, of H 0 and 1."""
        to_mean = torch.empty_like(self._z)
        library.normal_backward(
            to_mean.shape[1],
            to_mean.shape[0],
            self._z.data_ptr(),
            self._log_std.data_ptr(),
            _where(logp),
            _where(entropy),
            to_mean.data_ptr(),
            self.spread.data_ptr(),
        )
        return to_mean


_ENTROPY = 1.4189385332046727
"""½ log 2πe, nats: the entropy of one coordinate at σ = 1."""


def _where(slope: Tensor | None) -> int | None:
    return None if slope is None else slope.data_ptr()
