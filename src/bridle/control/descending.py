"""Steps of PPO on a small agent in one compiled call: all minibatches there and back, and AdamW after each.

The oracle is the general path, step by step: :func:`bridle.learn.step.accumulate` and
:meth:`bridle.learn.optim.Optimiser.step`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bridle.control import compiled
from bridle.control.laying import LaidNet, point_at
from bridle.control.policy import Transitions
from bridle.learn.descent import ClippedTerms, Descended
from bridle.learn.minibatches import Minibatches
from bridle.learn.optim import FlatAdam
from bridle.learn.step import Minibatch, Seen

__all__ = ["Descending"]

_ROWS = 96
"""States at a time, as in small.c."""


class _Descent(ctypes.Structure):
    """See ``descent`` in small.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("states", "gaussian", "minibatches", "numbers", "decayed", "taken")),
        *((name, ctypes.c_void_p) for name in ("vector", "actions", "order", "lengths")),
        *((name, ctypes.c_void_p) for name in ("old_logp", "advantages", "returns", "shares")),
        *((name, ctypes.c_double) for name in ("low", "high", "value", "entropy")),
        *((name, ctypes.c_void_p) for name in ("log_std", "log_std_gradient", "logp", "entropies", "values")),
        *((name, ctypes.c_void_p) for name in ("weights", "gradient", "m", "v")),
        *((name, ctypes.c_double) for name in ("lr", "beta1", "beta2", "eps", "decay", "limit")),
        *((name, ctypes.c_void_p) for name in ("norms", "work")),
    )


class Descending:
    """An actor and a critic, of which the layers of a few states at a time are kept."""

    def __init__(self, stack: compiled.Stack) -> None:
        """Take the stack of an actor and a critic."""
        self.stack = stack
        self._nets: list[LaidNet] = []
        self._buffers: list[Tensor] = []
        for net in stack.nets:
            own, buffers, _ = compiled.laid_out(net, _ROWS)
            self._nets.append(own)
            self._buffers += buffers
        actor = self._nets[0]
        self._inputs, self._outputs = actor.inputs, actor.layer[actor.layers - 1].width
        self._work = stack.nets[0].parameters[0].new_empty(_ROWS * (self._inputs + 4 * self._outputs))

    def steps(
        self, units: Transitions, parts: Minibatches, log_std: Tensor | None, terms: ClippedTerms, adam: FlatAdam
    ) -> Descended | None:
        """Take a step on each of the minibatches; see :meth:`bridle.learn.descent.Descends.descend`.

        Args:
            units: states, and int64 actions [N], or float32 ones [N, A] with ``log_std``.
            parts: the minibatches.
            log_std: [A] of Gaussian actions.
            terms: the loss.
            adam: the optimiser, whose gradient is 0 and has those of all weights for its parts.
        """
        whole, vector, actions = parts.whole, units.observations.vector, units.actions
        if not self._reads(whole, vector, actions, gaussian=log_std is not None):
            return None
        self.stack.find_gradients()
        for own, net, gradients in zip(self._nets, self.stack.nets, self.stack.gradients, strict=True):
            point_at(own, net, gradients)
        lengths = torch.tensor(parts.lengths)
        answers, norms = vector.new_empty(3, len(whole.actions)), vector.new_empty(len(parts))
        at = {name: getattr(whole, name).data_ptr() for name in ("old_logp", "advantages", "returns")}
        at |= {name: row.data_ptr() for name, row in zip(("logp", "entropies", "values"), answers, strict=True)}
        at |= {name: getattr(adam, name).data_ptr() for name in ("weights", "gradient", "m", "v")}
        if log_std is not None:
            if log_std.grad is None:
                log_std.grad = torch.zeros_like(log_std)
            at |= {"log_std": log_std.data_ptr(), "log_std_gradient": log_std.grad.data_ptr()}
        task = _Descent(
            states=len(actions),
            gaussian=log_std is not None,
            minibatches=len(parts),
            numbers=len(adam.weights),
            decayed=adam.decayed,
            taken=adam.taken,
            vector=vector.data_ptr(),
            actions=actions.data_ptr(),
            order=whole.actions.data_ptr(),
            lengths=lengths.data_ptr(),
            shares=whole.weights.data_ptr(),
            low=terms.low,
            high=terms.high,
            value=terms.value,
            entropy=terms.entropy,
            lr=adam.lr,
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            decay=adam.weight_decay,
            limit=adam.max_grad_norm or 0.0,
            norms=norms.data_ptr(),
            work=self._work.data_ptr(),
            **at,
        )
        taken = compiled.library.clipped_descent(*map(ctypes.byref, self._nets), ctypes.byref(task))
        logp, entropy, value = answers.unbind()
        return Descended(seen=Seen(logp=logp, entropy=entropy, value=value), norms=norms[:taken].tolist())

    def _reads(self, whole: Minibatch, vector: Tensor, actions: Tensor, *, gaussian: bool) -> bool:
        """Whether all of it lies as compiled code reads it."""
        K, N = len(whole.actions), len(actions)
        columns = (whole.old_logp, whole.advantages, whole.returns, whole.weights)
        return (
            all(_lies(column, torch.float32, (K,)) for column in columns)
            and _lies(whole.actions, torch.int64, (K,))
            and _lies(vector, torch.float32, (N, self._inputs))
            and _lies(actions, torch.float32 if gaussian else torch.int64, (N, self._outputs) if gaussian else (N,))
        )


def _lies(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether compiled code can read a tensor: row by row in this machine's own memory."""
    return tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu
