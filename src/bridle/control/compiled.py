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
from bridle.control.forms import Net, parts_of
from bridle.control.laying import LAYERS, LaidNet, lay, point_at
from bridle.native.loading import library_of, load_library

__all__ = [
    "Frozen",
    "Normal",
    "Run",
    "Softmax",
    "Stack",
    "laid_out",
    "library",
    "load",
    "require_shape",
    "serves",
]

_WIDEST = 512
"""Beyond this width the machine's own products are as fast."""


_SOURCE = Path(__file__).with_name("small.c")


def load(place: Path) -> Any:
    """Open what was compiled of small.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    net, at, count = ctypes.POINTER(LaidNet), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "perceptron_work": (count, [net]),
        "perceptron_forward": (None, [net, at]),
        "perceptron_backward": (None, [net, at, at]),
        "softmax_forward": (count, [count, count, *[at] * 6]),
        "softmax_backward": (None, [count, count, *[at] * 7]),
        "normal_forward": (None, [count, count, *[at] * 5]),
        "normal_backward": (None, [count, count, *[at] * 6]),
        "clipped_descent": (count, [net, net, at]),
        "clipped_slopes": (count, [at, count, count, count, *[at] * 4]),
        "descent_step": (count, [at, count]),
    }
    return load_library(place, _SOURCE, functions, "perceptron_source")


library: Any = load(library_of(_SOURCE))
"""The compiled code; None where it was not built."""


def serves(nets: Sequence[Net]) -> bool:
    """Whether nets can run compiled."""
    return library is not None and all(
        len(net.form) <= LAYERS
        and max(net.parameters[0].shape[-1], *map(len, net.parameters)) <= _WIDEST
        and all(t.is_contiguous() and t.dtype is torch.float32 and t.device.type == "cpu" for t in net.parameters)
        for net in nets
    )


class Stack:
    """Some nets, and runs of them whose buffers are free."""

    def __init__(self, nets: Sequence[Net]) -> None:
        self.nets = nets
        self.free = Buffers(partial(Run, self))
        self._width = nets[0].parameters[0].shape[1]
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
        present = [parameter.grad for net in self.nets for parameter in net.parameters]
        if self._known and all(map(is_, present, self._known)):
            return
        for parameter in [parameter for net in self.nets for parameter in net.parameters]:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            elif not parameter.grad.is_contiguous():
                parameter.grad = parameter.grad.contiguous()
        self.gradients = [[cast(Tensor, parameter.grad) for parameter in net.parameters] for net in self.nets]
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
        self._nets: list[LaidNet] = []
        self._pointers: list[Any] = []
        for net in stack.nets:
            own, buffers, outputs = laid_out(net, rows)
            own.across, own.along = rows, 1
            self._buffers += buffers
            self.outputs.append(outputs)
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
            for own, net, gradients in zip(self._nets, stack.nets, self._gradients, strict=True):
                point_at(own, net, gradients)
        assert self._vector is not None
        for at, slope in zip(self._pointers, slopes, strict=True):
            library.perceptron_backward(at, self._vector.data_ptr(), slope.data_ptr())
        stack.free.let_go(self)


class Frozen:
    """One net whose weights stand still, for many runs over as many states."""

    def __init__(self, net: Net, rows: int) -> None:
        *hidden, last = parts_of(net.form, range(len(net.parameters)))
        turned = {part.weight for part in hidden}
        tensors = [
            tensor.detach().T.contiguous() if place in turned else tensor.detach().clone()
            for place, tensor in enumerate(net.parameters)
        ]
        self._net, buffers = lay(Net(net.form, tensors), rows, learns=False, transposed=True)
        self._net.across, self._net.along = 1, len(tensors[last.weight])
        self._kept = [*tensors, *buffers, _work(self._net, tensors[0])]
        self._pointer = ctypes.byref(self._net)
        self._shape = rows, net.parameters[0].shape[1]

    def outputs(self, vector: Float[Tensor, "n D"], out: Float[Tensor, "n A"]) -> None:
        """Write the outputs in n states to ``out``, which lies row by row."""
        require_shape(vector, *self._shape)
        self._net.out = out.data_ptr()
        library.perceptron_forward(self._pointer, vector.data_ptr())


def require_shape(vector: Tensor, rows: int, width: int) -> None:
    """Refuse states that compiled code would read beyond."""
    if vector.shape != (rows, width):
        raise ValueError(f"states of shape {tuple(vector.shape)}, expected {(rows, width)}")


def laid_out(net: Net, rows: int) -> tuple[LaidNet, list[Tensor], Float[Tensor, "A n"]]:
    """Describe a net over n states that learns; return all that it writes to, and its outputs, a part of that."""
    own, buffers = lay(net, rows, learns=True)
    outputs = net.parameters[0].new_empty(own.layer[own.layers - 1].width, rows)
    own.out = outputs.data_ptr()
    return own, [*buffers, outputs, _work(own, outputs)], outputs


def _work(net: LaidNet, like: Tensor) -> Tensor:
    """Give a net the room that it works in."""
    work = like.new_empty(library.perceptron_work(net))
    net.work = work.data_ptr()
    return work


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
