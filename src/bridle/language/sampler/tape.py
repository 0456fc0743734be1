"""A decoding step played from tape: the model's forward as a flat list of tensor operations, recorded once.

A small model's step takes a thousand operations of a few microseconds each, and Python between them (modules, keyword
arguments, decorators) takes as long again. So the forward of n tokens, one per text, is recorded with fake tensors, which
run no kernel and refuse to look at data, and is played as one straight function: the same operations on the same
weights, hence the same numbers to the last bit. What depends on weights alone (transposes, casts to bfloat16) is computed
once per rollout. A model that cannot be recorded, because its path depends on data, runs as it is.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import make_fx

from bridle.language.causal import CausalModel
from bridle.language.sampler.slots import Recorder, Slots, serving

__all__ = ["Tapes"]

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
}
"""Python's own bindings of frequent operations: the same positional arguments, at less than a dispatcher call's cost."""


class Tapes:
    """The recorded steps of one model, one for each dtype that it computes in."""

    def __init__(self, actor: CausalModel) -> None:
        self._actor = actor
        self._found: dict[torch.dtype | None, _Tape | None] = {}

    def over(self, slots: Slots) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Return the step ``hidden [n, D] = f(tokens [n], positions [n])`` over ``slots``; None if there is no tape.

        It holds until the weights move, and in the dtype that is computed in now.
        """
        kind = self._actor.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        if dtype not in self._found:
            self._found[dtype] = _record(self._actor)
        tape = self._found[dtype]
        return None if tape is None else tape.over(slots)


def _record(actor: CausalModel) -> _Tape | None:
    """Record a step; None for a model that is not fused, is not on the CPU, writes in place, or looks at data on its way."""
    if not actor.fused or actor.device.type != "cpu":
        return None
    backbone = actor.model.base_model

    def step(tokens: Tensor, positions: Tensor) -> Tensor:
        hidden = backbone(input_ids=tokens, position_ids=positions, use_cache=False).last_hidden_state
        return hidden[:, 0]  # type: ignore[no-any-return]

    tokens, positions = torch.zeros(2, _ROWS, 1, dtype=torch.int64).unbind()
    with serving(actor.model, Recorder()), torch.no_grad(), _unlogged():
        try:
            recorded = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(tokens, positions)
        except RuntimeError:  # fake tensors refuse to look at data
            return None
    calls = [node.target for node in recorded.graph.nodes if node.op == "call_function"]
    if any(
        isinstance(call, OpOverload) and call._schema.is_mutable for call in calls
    ):  # then operations could not be dropped or shared
        return None
    return _Tape(recorded)


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


class _Tape:
    """Two functions made of a recorded graph: what depends on weights alone, and the step itself."""

    def __init__(self, recorded: fx.GraphModule) -> None:
        self._names: dict[fx.Node, str] = {}
        self._fixed: set[str] = set()
        self._roots: dict[fx.Node, fx.Node] = {}
        self._known: dict[str, str] = {}
        self._scope: dict[str, Any] = {}
        weights: list[str] = []
        step: list[str] = []
        recorded.graph.eliminate_dead_code()
        inputs = [node for node in recorded.graph.nodes if node.op == "placeholder"]
        for node in recorded.graph.nodes:
            if node.op == "placeholder":
                self._names[node] = ("tokens", "positions")[inputs.index(node)]
            elif node.op == "get_attr":
                self._names[node] = self._constant(getattr(recorded, str(node.target)))
            elif node.op == "call_function":
                self._write(node, weights, step)
            else:
                step.append(f"return {self._text(node.args[0])}")
        lines = [f"    {line}" for line in weights]
        lines += ["    def step(tokens, positions):", "        n = len(tokens)"]
        lines += [f"        {line}" for line in _needed(step)]
        source = "\n".join(["def over(attend):", *lines, "    return step"])
        exec(compile(source, "<tape>", "exec"), self._scope)

    def over(self, slots: Slots) -> Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, "n D"]]:
        """The step with ``slots`` for its attention and the weights as they are now."""
        play: Callable[[Tensor, Tensor], Tensor] = self._scope["over"](slots.decode)
        return lambda tokens, positions: play(tokens[:, None], positions[:, None])

    def _write(self, node: fx.Node, weights: list[str], step: list[str]) -> None:
        """Append one operation, unless an equal one stands there already."""
        call = self._call(node)
        if call in self._known:
            self._names[node] = self._known[call]
            return
        name = f"v{len(self._known)}"
        self._known[call] = self._names[node] = name
        inputs = {self._names[used] for used in node.all_input_nodes}
        if inputs <= self._fixed and inputs:
            self._fixed.add(name)
            weights.append(f"{name} = {call}")
        else:
            step.append(f"{name} = {call}")

    def _call(self, node: fx.Node) -> str:
        target, arguments = str(node.target), list(node.args)
        if target in _AS_VIEW:
            root = cast("fx.Node", arguments[0])
            while root in self._roots:
                root = self._roots[root]
            self._roots[node] = root
            return f"{self._text(root)}.view({self._text(arguments[1])})"
        if target == "bridle.attend.default":
            return f"attend({', '.join(self._text(a) for a in arguments)})"
        if target == "aten.transpose.int":
            return f"{self._text(arguments[0])}.transpose({arguments[1]}, {arguments[2]})"
        if target == "aten.unsqueeze.default":
            return f"{self._text(arguments[0])}.unsqueeze({arguments[1]})"
        named = [f"{name}={self._text(value)}" for name, value in node.kwargs.items()]
        function = _PLAIN.get(target, node.target) if not named else node.target
        return f"{self._constant(function)}({', '.join([*(self._text(a) for a in arguments), *named])})"

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self._names[value]
        if isinstance(value, list | tuple):
            return f"[{', '.join(self._text(x) for x in value)}]"
        if (
            isinstance(value, int)
            and not isinstance(value, bool)
            and value
            and abs(value) < 2**40
            and value % _ROWS == 0
        ):
            return f"{value // _ROWS} * n"
        if value is None or isinstance(value, bool | int | float | str):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: Any) -> str:
        for name, held in self._scope.items():
            if held is value:
                return name
        name = f"c{len(self._scope)}"
        self._scope[name] = value
        if isinstance(value, Tensor):
            self._fixed.add(name)
        return name


def _needed(lines: list[str]) -> list[str]:
    """Drop assignments that nothing after them reads: views of views, once these start from the same root."""
    read: set[str] = set()
    kept = []
    for line in reversed(lines):
        name, _, value = line.partition(" = ")
        if value and name not in read:
            continue
        read |= set(re.findall(r"\bv\d+\b", value or line))
        kept.append(line)
    return kept[::-1]
