"""Writing texts with decoder layers of the usual kind, compiled, on a CPU in float32, by ``decoding.c``.

A step of a small model takes a thousand operations of PyTorch's, or five calls a layer's worth of Python; here it is one call.
Weights are packed once for as many steps as they stay the same. Each text keeps its keys and values in a block of its own,
which grows with it, so that nothing is read in vain and an ended text leaves its block to the next. What is computed
for a text does not depend on the others, to the bit, nor on the number of threads, among which the texts are shared out.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from bridle.core.head import VocabularyHead
from bridle.language.layers import Layer, Shape, described
from bridle.native.compiling import compiled_from
from bridle.native.loading import load_library
from bridle.native.sharing import for_each, shares

__all__ = ["Choice", "Stack", "Texts", "library", "load"]

_ALONE = 8
"""Texts that a thread is not started for."""


class _Stack(ctypes.Structure):
    """See ``stack`` in decoding.c."""

    _fields_ = (
        ("layers", ctypes.c_int64),
        ("layer", ctypes.POINTER(Layer)),
        *((name, ctypes.c_void_p) for name in ("cosine", "sine", "norm", "packed")),
        ("eps", ctypes.c_float),
    )


class _Choice(ctypes.Structure):
    """See ``choice`` in decoding.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("width", "vocabulary")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "packed")),
        ("by", ctypes.c_float),
    )


_SOURCE = Path(__file__).with_name("decoding.c")


def load(place: Path) -> Any:
    """Open what was compiled of decoding.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    stack, choice, at, count = ctypes.POINTER(_Stack), ctypes.POINTER(_Choice), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "stack_numbers": (count, [stack]),
        "stack_pack": (None, [stack]),
        "stack_work": (count, [stack, count]),
        "text_copy": (None, [stack, at, at, count]),
        "stack_step": (None, [stack, count, at, at, at, at]),
        "stack_read": (None, [stack, count, at, at, at, at]),
        "choice_numbers": (count, [choice]),
        "choice_pack": (None, [choice]),
        "choice_work": (count, [choice, count]),
        "choose": (None, [choice, count, at, count, at, at, at, at, at]),
    }
    return load_library(place, _SOURCE, functions, "decoding_source")


library: Any = load(compiled_from(_SOURCE))
"""The compiled code; None where it was not built."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StackWeights:
    """Layers, one or more, of one width and with heads of one width, and the norm that follows the last."""

    shapes: Sequence[Shape]
    weights: Sequence[Sequence[Tensor | None]]
    """of each layer, as :func:`bridle.language.layers.decoder_layer` takes them"""
    norm: Float[Tensor, " W"]
    eps: float
    cosine: Float[Tensor, "P D"]
    sine: Float[Tensor, "P D"]
    """of tokens 0 … P − 1 of a text"""


class Stack:
    """Layers packed for many steps: a copy of their weights, which holds until these move. All is float32 on the CPU."""

    def __init__(self, given: StackWeights) -> None:
        self._held = [None if w is None else w.detach().contiguous() for own in given.weights for w in own]
        self._last = [t.detach().contiguous() for t in (given.cosine, given.sine, given.norm)]
        places, head = given.cosine.shape
        each, count = len(given.weights[0]), len(given.shapes)
        layers = (Layer * count)(
            *(described(shape, head, self._held[i * each : (i + 1) * each]) for i, shape in enumerate(given.shapes))
        )
        self._stack = _Stack(count, layers, *(t.data_ptr() for t in self._last), None, given.eps)
        self._packed = _numbers(library.stack_numbers(self._stack))
        self._stack.packed = self._packed.data_ptr()
        library.stack_pack(self._stack)
        self.places = places
        self.numbers = sum(2 * shape.key_heads * head for shape in given.shapes)
        """Numbers that a token's keys and values are."""
        self._work: list[Tensor] = []
        self._longest = 0

    def step(
        self, x: Float[Tensor, "n W"], texts: Texts, lengths: Int[NDArray[np.int64], " n"]
    ) -> Float[Tensor, "n W"]:
        """Put one token behind the ``lengths[i]`` ≥ 0 tokens of each of texts 0 … n−1; return their last states.

        x holds their embeddings and is written over.
        """
        rows = texts.rows(range(len(x)), lengths, lengths + 1)
        parts = shares(len(x), max(1, min(torch.get_num_threads(), len(x) // _ALONE)))
        firsts = [part.start for part in parts]
        return self._run(library.stack_step, x, rows, parts, firsts)

    def read(
        self, x: Float[Tensor, "t W"], texts: Texts, which: Sequence[int], lengths: Sequence[int]
    ) -> Float[Tensor, "m W"]:
        """Read prompts of ``lengths[i]`` ≥ 1 tokens, laid end to end, into texts ``which[i]``; return their last states.

        x holds their embeddings and is written over.
        """
        sizes = np.asarray(lengths)
        rows = texts.rows(which, sizes, sizes)
        parts = shares(len(rows), torch.get_num_threads())
        firsts = [int(sizes[: part.start].sum()) for part in parts]
        return self._run(library.stack_read, x, rows, parts, firsts)

    def copy(self, source: NDArray[np.int64], target: NDArray[np.int64], length: int) -> None:
        """Copy the first ``length`` tokens from one row of a table of texts to another."""
        library.text_copy(self._stack, source.ctypes.data, target.ctypes.data, length)

    def _run(
        self,
        call: Callable[..., None],
        x: Tensor,
        rows: NDArray[np.int64],
        parts: Sequence[range],
        firsts: Sequence[int],
    ) -> Tensor:
        """Call for each part of the texts, whose embeddings begin at ``firsts``."""
        longest = int(rows[:, 2].max()) + 1
        if longest > self.places:
            raise ValueError(f"a text of {longest - 1} tokens is followed, and places are known for {self.places}")
        if longest > self._longest or len(parts) > len(self._work):
            self._longest = max(longest + longest // 2, self._longest)
            self._work = [_numbers(library.stack_work(self._stack, self._longest)) for _ in parts]
        y = x.new_empty(len(rows), x.shape[1])

        def one(number: int) -> None:
            part = parts[number]
            at, own = rows.ctypes.data + part.start * rows.strides[0], x.data_ptr() + 4 * x.shape[1] * firsts[number]
            call(self._stack, len(part), at, own, y[part.start :].data_ptr(), self._work[number].data_ptr())

        for_each(len(parts), one)
        return y


class Texts:
    """The keys and values of up to ``count`` texts of one stack."""

    def __init__(self, stack: Stack, count: int) -> None:
        self._stack = stack
        self._blocks: list[Tensor | None] = [None] * count
        # where a text's block is, tokens it has room for, tokens it holds
        self._table = np.zeros((count, 3), dtype=np.int64)

    def rows(self, which: Sequence[int], holding: NDArray[np.int64], needed: NDArray[np.int64]) -> NDArray[np.int64]:
        """Describe texts that hold so many tokens, with room for as many as are needed; it holds until the next call."""
        slots = np.asarray(which)
        for i in np.nonzero(self._table[slots, 1] < needed)[0]:
            self._grow(int(slots[i]), int(holding[i]), int(needed[i]))
        self._table[slots, 2] = holding
        found: NDArray[np.int64] = self._table[slots]
        return found

    def copy(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copy the first ``length`` tokens of a text into others."""
        sizes = np.full(len(targets), length)
        rows = self.rows(targets, 0 * sizes, sizes + 1)
        for row in rows:
            self._stack.copy(self._table[source], row, length)

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Let texts change places, source by source with its target."""
        for source, target in zip(sources, targets, strict=True):
            self._table[[source, target]] = self._table[[target, source]]
            self._blocks[source], self._blocks[target] = self._blocks[target], self._blocks[source]

    def _grow(self, which: int, holding: int, needed: int) -> None:
        """Take a larger block, half as large again as is needed, and keep what the text holds."""
        capacity = -(-(needed + needed // 2) // 8) * 8
        block = _numbers(capacity * self._stack.numbers)
        row = np.array([block.data_ptr(), capacity, holding])
        kept = min(holding, int(self._table[which, 1]))
        if kept:
            self._stack.copy(self._table[which], row, kept)
        self._table[which], self._blocks[which] = row, block


class Choice:
    """The vocabulary's head, packed for many steps; a copy of the output weights, which holds until these move."""

    def __init__(self, head: VocabularyHead, *, temperature: float) -> None:
        """``head``: float32 on the CPU, without a cap on its logits; ``temperature``: τ."""
        self._held = (head.weight.detach().contiguous(), None if head.bias is None else head.bias.detach().contiguous())
        weight, bias = self._held
        vocabulary, width = weight.shape
        places = (weight.data_ptr(), None if bias is None else bias.data_ptr(), None)
        self._choice = _Choice(width, vocabulary, *places, head.scale / temperature)
        self._packed = _numbers(library.choice_numbers(self._choice))
        self._choice.packed = self._packed.data_ptr()
        library.choice_pack(self._choice)
        self._work: dict[int, Tensor] = {}

    def draw(
        self,
        hidden: Float[Tensor, "m W"],
        picks: Int[NDArray[np.int64], " n"],
        uniforms: Float[NDArray[np.float32], " n"],
    ) -> tuple[Int[Tensor, " n"], Float[Tensor, " n"]]:
        """Draw token i from what state ``picks[i]`` says, by the inverse CDF at ``uniforms[i]`` in [0, 1).

        It is the first whose cumulative probability is above the draw: none of probability 0. Its log-prob is in nats.
        """
        tokens, logp = torch.empty(len(picks), dtype=torch.int64), hidden.new_empty(len(picks))
        parts = shares(len(hidden), max(1, min(torch.get_num_threads(), len(hidden) // _ALONE)))
        picks, uniforms = np.ascontiguousarray(picks), np.ascontiguousarray(uniforms)

        def one(number: int) -> None:
            part = parts[number]
            own = picks - part.start if part.start else picks
            given = (len(part), hidden[part.start :].data_ptr(), len(picks), own.ctypes.data, uniforms.ctypes.data)
            library.choose(self._choice, *given, tokens.data_ptr(), logp.data_ptr(), self._room(number, len(part)))

        for_each(len(parts), one)
        return tokens, logp

    def _room(self, number: int, states: int) -> int:
        needed = library.choice_work(self._choice, states)
        if number not in self._work or len(self._work[number]) < needed:
            self._work[number] = _numbers(needed)
        return self._work[number].data_ptr()


def _numbers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")
