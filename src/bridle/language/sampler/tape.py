"""A decoding step played from tape: the model's forward as a flat list of tensor operations, recorded once.

A small model's step takes a thousand operations of a few microseconds each, and Python between them (modules, keyword
arguments, decorators) takes as long again. So the forward of n tokens, one per text, is recorded with fake tensors, which
run no kernel and refuse to look at data, and is played as one straight list: the same operations on the same
weights, hence the same numbers to the last bit. What depends on weights alone (transposes, casts to bfloat16) is computed
once per rollout. A model that cannot be recorded, because its path depends on data, runs as it is; so does one that
is asked for too few tokens to be worth recording.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from bridle.language.causal import CausalModel
from bridle.language.sampler.products import computed_in, swift_products
from bridle.language.sampler.slots import Recorder, Slots, serving

__all__ = ["PAYS_FROM", "Tapes"]

PAYS_FROM = 400
"""Steps after which a tape is recorded: it saves some 0.3 ms a layer each, and costs 0.1 s a layer."""
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference between a played step and the model's own, relative; it is 0 but for kernels that pick another order."""
_FAILURES = (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError, LookupError, AssertionError)
"""What recording may raise: fake tensors refuse to look at data, and a model's own code may do anything to them."""
_log = logging.getLogger(__name__)

_ROWS = 7919
"""How many texts the recorded step has: a prime, so that a multiple of it in an operation's arguments means rows."""

_AS_VIEW = ("aten.view.default", "aten._unsafe_view.default")
_PLAIN: dict[str, Callable[..., Any]] = {
    "aten.mm.default": torch.mm,
    "aten.addmm.default": torch.addmm,
    "aten.mul.Tensor": torch.mul,
    "aten.add.Tensor": torch.add,
    "aten.neg.default": torch.neg,
    "aten.rsqrt.default": torch.rsqrt,
    "aten.mean.dim": torch.mean,
    "aten.pow.Tensor_Scalar": torch.pow,
    "aten.cat.default": torch.cat,
    "aten.silu.default": torch.nn.functional.silu,
    "aten.transpose.int": torch.transpose,
    "aten.unsqueeze.default": torch.unsqueeze,
    "aten.view.default": torch.Tensor.view,
    "aten._unsafe_view.default": torch.Tensor.view,
}
"""Python's own bindings of frequent operations: the same positional arguments, at less than a dispatcher call's cost."""


class Tapes:
    """The recorded steps of one model, one for each dtype that it computes in."""

    def __init__(self, actor: CausalModel) -> None:
        self._actor = actor
        self._found: dict[torch.dtype, _Tape | None] = {}
        self._steps: dict[torch.dtype, int] = {}

    def over(self, slots: Slots, steps: int) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return the step ``hidden [n, D] = f(tokens [n], positions [n])`` over ``slots``; None: run the model as it is.

        It holds until the weights move, and in the dtype that is computed in now. Recording costs some hundred
        times what a played step saves, so it waits until that many ``steps`` have been asked for in all.
        """
        if not self._actor.fused or self._actor.device.type != "cpu":
            return None
        dtype = computed_in(self._actor.model.get_input_embeddings().weight)
        self._steps[dtype] = self._steps.get(dtype, 0) + steps
        if dtype not in self._found:
            if self._steps[dtype] < PAYS_FROM:
                return None
            self._found[dtype] = _proven(self._actor, slots)
        tape = self._found[dtype]
        return None if tape is None else tape.over(slots)


def _proven(actor: CausalModel, slots: Slots) -> _Tape | None:
    """Record a step and play it beside the model's own; say so in a line, and return None, where that does not work out."""
    try:
        tape = _record(actor)
        gap = math.inf if tape is None else _gap(actor, tape, slots)
    except _FAILURES as error:
        reason = (" ".join(str(error).split()) or type(error).__name__)[:200]
    else:
        if gap <= _TOLERANCE[computed_in(actor.model.get_input_embeddings().weight)]:
            return tape
        reason = "it writes in place" if tape is None else f"played, it differs by {gap:.2g}"
    name = type(actor.model).__name__
    _log.warning("a step of %s cannot be recorded, so it runs as it is, which is slower: %s", name, reason)
    return None


def _record(actor: CausalModel) -> _Tape | None:
    """Record a step; None for a model that writes in place: then operations could not be dropped or shared."""
    backbone = actor.model.base_model

    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = backbone(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[:, 0]  # type: ignore[no-any-return]

    tokens, positions = torch.zeros(2, _ROWS, 1, dtype=torch.int64).unbind()
    with (
        serving(actor.model, Recorder()),
        torch.no_grad(),
        _unlogged(),
        swift_products(actor.model.get_input_embeddings().weight),
    ):
        recorded = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(tokens, positions)
    calls = [node.target for node in recorded.graph.nodes if node.op == "call_function"]
    if any(isinstance(call, OpOverload) and call._schema.is_mutable for call in calls):
        return None
    return _Tape(recorded)


def _gap(actor: CausalModel, tape: _Tape, like: Slots) -> float:
    """The largest difference of three steps in three slots between tape and model, as a share of the largest number."""
    tokens = torch.arange(9).view(3, 3) % actor.model.get_input_embeddings().weight.shape[0]
    rows, found = torch.arange(3), []
    for played in (True, False):
        slots = Slots(like.windows, 3, actor.device)
        slots.reserve(4, 0)
        with serving(actor.model, slots), torch.no_grad(), swift_products(actor.model.get_input_embeddings().weight):
            play = tape.over(slots)
            for t in range(3):
                positions = torch.full((3,), t)
                slots.plan(positions, ())
                if played:
                    found.append(play(tokens[t], positions))
                else:
                    states = actor.states(tokens[t][:, None], rows, 0 * rows, positions=positions[:, None])
                    found.append(states.hidden)
    ours, own = torch.stack(found[:3]).float(), torch.stack(found[3:]).float()
    return float((ours - own).abs().max() / own.abs().max())


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep quiet about operations that fake tensors cannot take: a model that has them runs as it is."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in the registers an operation finds an operand or leaves its result."""

    index: int


class _Tape:
    """A recorded graph as a list of operations on registers: what depends on weights alone, then the step itself."""

    def __init__(self, recorded: fx.GraphModule) -> None:
        self._held: list[Any] = [None, None]  # the first two are the step's tokens and positions
        self._sizes: dict[int, Any] = {}
        self._weights: list[tuple[Callable[..., Any], tuple[int, ...], int]] = []
        self._step: list[tuple[Callable[..., Any] | None, tuple[int, ...], int]] = []
        self._fixed: set[int] = set()
        self._known: dict[str, _Place] = {}
        self._roots: dict[fx.Node, fx.Node] = {}
        self._at: dict[fx.Node, _Place] = {}
        self._result = _Place(0)
        recorded.graph.eliminate_dead_code()
        inputs = 0
        for node in recorded.graph.nodes:
            if node.op == "placeholder":
                self._at[node] = _Place(inputs)
                inputs += 1
            elif node.op == "get_attr":
                self._at[node] = self._hold(getattr(recorded, str(node.target)))
                self._fixed.add(self._at[node].index)
            elif node.op == "call_function":
                self._at[node] = self._append(node)
            else:
                self._result = self._at[cast("fx.Node", node.args[0])]
        self._drop_unread()

    def over(self, slots: Slots) -> Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n D"]]:
        """The step with ``slots`` for its attention and the weights as they are now."""
        held, result, bound = list(self._held), self._result.index, 0
        for function, operands, target in self._weights:
            held[target] = function(*[held[i] for i in operands])
        step = [(slots.decode if f is None else f, operands, target) for f, operands, target in self._step]

        def play(tokens: Tensor, positions: Tensor) -> Tensor:
            nonlocal bound
            if len(tokens) != bound:
                bound = len(tokens)
                for place, size in self._sizes.items():
                    held[place] = _sized(size, bound)
            held[0], held[1] = tokens[:, None], positions[:, None]
            for function, operands, target in step:
                held[target] = function(*[held[i] for i in operands])
            return cast("Tensor", held[result])

        return play

    def _append(self, node: fx.Node) -> _Place:
        """Add one operation, unless an equal one stands there already; return where its result is."""
        target, arguments = str(node.target), list(node.args)
        if target in _AS_VIEW:  # a view of a view starts from what both look at
            root = cast("fx.Node", arguments[0])
            while root in self._roots:
                root = self._roots[root]
            self._roots[node], arguments[0] = root, root
        function = None if target == "bridle.attend.default" else _PLAIN.get(target, cast("Any", node.target))
        if node.kwargs:
            if any(isinstance(value, fx.Node | list | tuple) for value in node.kwargs.values()):
                raise NotImplementedError(f"{target} with named tensors")
            function = partial(cast("Any", node.target), **node.kwargs)
        first = arguments[0]
        if function is not None and isinstance(first, list | tuple) and any(isinstance(x, fx.Node) for x in first):
            function = partial(_with_list, function, len(first))
            arguments = [*first, *arguments[1:]]
        operands = tuple(self._operand(argument).index for argument in arguments)
        name = f"{target} {len(node.args)} {operands} {dict(node.kwargs)}"
        if name not in self._known:
            self._known[name] = place = self._hold(None)
            if function is not None and operands and set(operands) <= self._fixed | self._literals():
                self._fixed.add(place.index)
                self._weights.append((function, operands, place.index))
            else:
                self._step.append((function, operands, place.index))
        return self._known[name]

    def _operand(self, value: Any) -> _Place:
        if isinstance(value, fx.Node):
            return self._at[value]
        if isinstance(value, list | tuple) and any(isinstance(x, fx.Node) for x in value):
            raise NotImplementedError("a list of tensors that is not an operation's first argument")
        name = f"literal {type(value).__name__} {value!r}"
        if name not in self._known:
            self._known[name] = self._hold(value)
            if _sized(value, 1) != value:
                self._sizes[self._known[name].index] = value
        return self._known[name]

    def _literals(self) -> set[int]:
        """Places of plain numbers and sizes that do not depend on the number of rows."""
        return {
            at.index for name, at in self._known.items() if name.startswith("literal ") and at.index not in self._sizes
        }

    def _hold(self, value: Any) -> _Place:
        self._held.append(value)
        return _Place(len(self._held) - 1)

    def _drop_unread(self) -> None:
        """Leave out what nothing reads, and let results whose last reader has passed make room for later ones."""
        read, kept, last = {self._result.index}, [], {self._result.index: len(self._step)}
        for at, (function, operands, target) in reversed(list(enumerate(self._step))):
            if target in read:
                kept.append((function, operands, target))
                for i in operands:
                    last.setdefault(i, at)
                read |= set(operands)
        free: list[int] = []
        moved: dict[int, int] = {}
        own = {target for _, _, target in kept}
        order = {target: at for at, (_, _, target) in enumerate(self._step)}
        self._step = []
        for function, operands, target in reversed(kept):
            where = tuple(moved.get(i, i) for i in operands)
            place = moved[target] = free.pop() if free else target
            self._step.append((function, where, place))
            done = {i for i in operands if i in own and last[i] == order[target]}
            free += [moved[i] for i in done]
        self._result = _Place(moved[self._result.index])


def _with_list(function: Callable[..., Any], count: int, *arguments: Any) -> Any:
    """Call ``function`` with its first ``count`` arguments as one list, as ``cat`` wants them."""
    return function(list(arguments[:count]), *arguments[count:])


def _sized(value: Any, rows: int) -> Any:
    """Put the number of rows into an argument recorded with ``_ROWS`` of them."""
    if isinstance(value, list | tuple):
        return [_sized(x, rows) for x in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**40:
        return value // _ROWS * rows if value % _ROWS == 0 else value
    return value
