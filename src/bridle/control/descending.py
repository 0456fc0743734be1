"""Steps of PPO on a small agent in one compiled call, all minibatches there and back and AdamW after each; and steps on any
modules, which autograd runs there and back, with compiled code for the rest.

The oracle of both is the general path, step by step: :func:`bridle.learn.step.accumulate` and
:meth:`bridle.learn.optim.Optimiser.step`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from bridle.control import compiled
from bridle.control.laying import LaidNet, point_at
from bridle.control.observations import Observations
from bridle.control.policy import Transitions
from bridle.guards import is_plain
from bridle.learn.descent import ClippedTerms, Descended
from bridle.learn.minibatches import Minibatches
from bridle.learn.optim import FlatAdam
from bridle.learn.step import Minibatch, Seen

__all__ = ["Descending", "descend_by_autograd"]

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
        task, answers, norms = _task(parts, actions, log_std, terms, adam)
        task.minibatches, task.lengths = len(parts), lengths.data_ptr()
        task.vector, task.work = vector.data_ptr(), self._work.data_ptr()
        if log_std is not None:
            if log_std.grad is None:
                log_std.grad = torch.zeros_like(log_std)
            task.log_std_gradient = log_std.grad.data_ptr()
        taken = adam.steps = compiled.library.clipped_descent(*map(ctypes.byref, self._nets), ctypes.byref(task))
        return Descended(seen=_seen(answers), norms=norms[:taken].tolist())

    def _reads(self, whole: Minibatch, vector: Tensor, actions: Tensor, *, gaussian: bool) -> bool:
        """Whether all of it lies as compiled code reads it."""
        known = _lies(vector, torch.float32, (len(actions), self._inputs))
        return known and _readable(whole, actions, self._outputs if gaussian else None)


def descend_by_autograd(
    before: Callable[[], Callable[[], None]],
    answer: Callable[[Observations], tuple[Tensor, Tensor]],
    units: Transitions,
    parts: Minibatches,
    log_std: Tensor | None,
    terms: ClippedTerms,
    adam: FlatAdam,
) -> Descended | None:
    """Take steps on modules that autograd runs there and back; see :meth:`bridle.learn.descent.Descends.descend`.

    It stops before a step whose answers are not finite, too, or not of the shape and kind that compiled code reads, and
    where somebody has put a gradient of their own beside the optimiser's.

    Args:
        before: called before each minibatch; what it returns puts back what the modules have drawn and kept since, where
            the minibatch is left to somebody else.
        answer: outputs [n, A] of the actor and values [n, 1] in n states, with their graph.
        units: states, and int64 actions [N], or float32 ones [N, A] with ``log_std``.
        parts: the minibatches.
        log_std: [A] of Gaussian actions.
        terms: the loss.
        adam: the optimiser.
    """
    whole, actions = parts.whole, units.actions
    width = None if log_std is None else log_std.numel()
    held = _lies(adam.weights, torch.float32, adam.weights.shape)
    held &= log_std is None or _lies(log_std, torch.float32, (log_std.numel(),))
    if compiled.library is None or not held or not _readable(whole, actions, width):
        return None
    task, answers, norms = _task(parts, actions, log_std, terms, adam)
    there, begun = ctypes.byref(task), 0
    work: Tensor | None = None
    for part, n in zip(parts.parts, parts.lengths, strict=True):
        back = before()
        outputs, values = answer(units.observations.select(part.actions))
        width = outputs.shape[-1] if width is None else width
        if not (_answered(outputs, n, width) and _answered(values, n, 1)):
            back()
            break
        if work is None:
            work = outputs.new_empty(5 * _ROWS * width)
            task.work = work.data_ptr()
        told = [outputs.detach().contiguous(), values.detach().contiguous()]
        slopes = [outputs.new_empty(n, width), values.new_empty(n, 1)]
        if log_std is not None:  # a hook may have put another in its place
            slopes.append(torch.zeros_like(log_std))
            task.log_std, task.log_std_gradient = log_std.data_ptr(), slopes[-1].data_ptr()
        where = [tensor.data_ptr() for tensor in (*told, *slopes[:2])]
        if not compiled.library.clipped_slopes(there, width, begun, n, *where):
            back()
            break
        answered = (outputs, values) if log_std is None else (outputs, values, log_std)
        pulled = [(one, slope) for one, slope in zip(answered, slopes, strict=True) if one.requires_grad]
        if pulled:
            torch.autograd.backward([one for one, _ in pulled], [slope for _, slope in pulled])
        if not (adam.untouched() and compiled.library.descent_step(there, adam.steps)):
            back()
            break
        begun += n
        adam.steps += 1
    return Descended(seen=_seen(answers), norms=norms[: adam.steps].tolist())


def _task(
    parts: Minibatches, actions: Tensor, log_std: Tensor | None, terms: ClippedTerms, adam: FlatAdam
) -> tuple[_Descent, Float[Tensor, "3 K"], Float[Tensor, " S"]]:
    """Describe steps, less the states and where to work; return what is written to, too: answers, and norms of gradients."""
    whole = parts.whole
    answers, norms = adam.weights.new_empty(3, len(whole.actions)), adam.weights.new_empty(len(parts))
    at = {name: getattr(whole, name).data_ptr() for name in ("old_logp", "advantages", "returns")}
    at |= {name: row.data_ptr() for name, row in zip(("logp", "entropies", "values"), answers, strict=True)}
    at |= {name: getattr(adam, name).data_ptr() for name in ("weights", "gradient", "m", "v")}
    task = _Descent(
        states=len(actions),
        gaussian=log_std is not None,
        numbers=len(adam.weights),
        decayed=adam.decayed,
        taken=adam.taken,
        actions=actions.data_ptr(),
        order=whole.actions.data_ptr(),
        shares=whole.weights.data_ptr(),
        low=terms.low,
        high=terms.high,
        value=terms.value,
        entropy=terms.entropy,
        log_std=None if log_std is None else log_std.data_ptr(),
        lr=adam.lr,
        beta1=adam.beta1,
        beta2=adam.beta2,
        eps=adam.eps,
        decay=adam.weight_decay,
        limit=adam.max_grad_norm or 0.0,
        norms=norms.data_ptr(),
        **at,
    )
    return task, answers, norms


def _seen(answers: Float[Tensor, "3 K"]) -> Seen:
    logp, entropy, value = answers.unbind()
    return Seen(logp=logp, entropy=entropy, value=value)


def _readable(whole: Minibatch, actions: Tensor, coordinates: int | None) -> bool:
    """Whether minibatches, and actions that are discrete without ``coordinates``, lie as compiled code reads them."""
    K, N = len(whole.actions), len(actions)
    columns = (whole.old_logp, whole.advantages, whole.returns, whole.weights)
    drawn = (
        _lies(actions, torch.int64, (N,)) if coordinates is None else _lies(actions, torch.float32, (N, coordinates))
    )
    return drawn and _lies(whole.actions, torch.int64, (K,)) and all(_lies(c, torch.float32, (K,)) for c in columns)


def _answered(answers: Tensor, n: int, width: int) -> bool:
    return is_plain(answers) and answers.shape == (n, width)


def _lies(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether compiled code can read a tensor: row by row in this machine's own memory."""
    return tensor.dtype is dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.is_cpu
