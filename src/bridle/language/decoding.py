"""Writing texts with decoder layers of the usual kind, compiled, on a CPU in float32, by ``decoding.c``.

A step of a small model takes a thousand operations of PyTorch's, or five calls a layer's worth of Python; here it is one call.
Weights are packed once for as many steps as they stay the same. Texts that begin with one prompt share its keys and values, and
these are near when the next of them is looked at; what follows is in a block of each text's own, which grows with it, so that
nothing is read in vain. What is computed for a text does not depend on the others, to the bit, nor on the number of threads,
among which the texts are shared out.
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
from bridle.native.loading import computing_now, halved_library_of, library_of, load_library
from bridle.native.sharing import for_each, shares, threads

__all__ = ["Choice", "Stack", "Texts", "code", "halved", "library", "load"]

_ALONE = 8
"""Texts that a thread is not started for."""
_MORE = 32
"""Tokens that a text's own block is first for; a multiple of 8."""


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


def load(place: Path | None) -> Any:
    """Open what was compiled of decoding.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    stack, choice, at, count = ctypes.POINTER(_Stack), ctypes.POINTER(_Choice), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "stack_numbers": (count, [stack]),
        "stack_pack": (None, [stack]),
        "stack_work": (count, [stack, count]),
        "cache_copy": (None, [stack, at, at]),
        "stack_step": (None, [stack, count, at, at, at, at]),
        "stack_read": (None, [stack, count, at, at, at, at]),
        "choice_numbers": (count, [choice]),
        "choice_pack": (None, [choice]),
        "choice_work": (count, [choice, count]),
        "choose": (None, [choice, count, at, count, at, at, at, at, at]),
    }
    return load_library(place, _SOURCE, functions, "decoding_source")


library: Any = load(library_of(_SOURCE))
"""The compiled code; None where it was not built."""
halved: Any = load(halved_library_of(_SOURCE))
"""The same with products of weights in bfloat16, summed in float32; None where the processor has none, or it was not built."""


def code() -> Any:
    """Return the compiled code for what is computed in now, float32 or, under autocast, bfloat16; None where there is none."""
    return computing_now(library, halved)


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
        self._library = code()
        self._held = [None if w is None else w.detach().contiguous() for own in given.weights for w in own]
        self._last = [t.detach().contiguous() for t in (given.cosine, given.sine, given.norm)]
        places, head = given.cosine.shape
        each, count = len(given.weights[0]), len(given.shapes)
        layers = (Layer * count)(
            *(described(shape, head, self._held[i * each : (i + 1) * each]) for i, shape in enumerate(given.shapes))
        )
        self._stack = _Stack(count, layers, *(t.data_ptr() for t in self._last), None, given.eps)
        self._packed = _numbers(self._library.stack_numbers(self._stack))
        self._stack.packed = self._packed.data_ptr()
        self._library.stack_pack(self._stack)
        self.places = places
        self.numbers = sum(2 * shape.key_heads * head for shape in given.shapes)
        """Numbers that a token's keys and values are."""
        self._work: list[Tensor] = []
        self._longest = 0

    def step(self, x: Float[Tensor, "n W"], texts: Texts) -> Float[Tensor, "n W"]:
        """Put one token behind each of texts 0 … n−1; return their last states.

        x holds the tokens' embeddings and is written over.
        """
        rows = texts.longer(len(x))
        parts = shares(len(x), max(1, min(threads(), len(x) // _ALONE)))
        y = self._run(self._library.stack_step, x, rows, parts, [part.start for part in parts])
        rows[:, _BLOCK + _LENGTH] += 1
        return y

    def read(
        self, x: Float[Tensor, "t W"], texts: Texts, which: Sequence[int], lengths: Sequence[int]
    ) -> Float[Tensor, "m W"]:
        """Begin texts ``which[i]`` with prompts of ``lengths[i]`` ≥ 1 tokens, laid end to end; return their last states.

        x holds their embeddings and is written over.
        """
        rows = texts.begin(which, lengths)
        parts = shares(len(rows), threads())
        return self._run(self._library.stack_read, x, rows, parts, [sum(lengths[: part.start]) for part in parts])

    def copy(self, source: NDArray[np.int64], target: NDArray[np.int64]) -> None:
        """Copy what one block of tokens holds to another."""
        self._library.cache_copy(self._stack, source.ctypes.data, target.ctypes.data)

    def _run(
        self,
        call: Callable[..., None],
        x: Tensor,
        rows: NDArray[np.int64],
        parts: Sequence[range],
        firsts: Sequence[int],
    ) -> Tensor:
        """Call for each part of the texts, whose embeddings begin at ``firsts``."""
        longest = int(rows[:, _LENGTH::_BLOCK].sum(1).max()) + 1
        if longest > self.places:
            raise ValueError(f"a text of {longest - 1} tokens is followed, and places are known for {self.places}")
        if longest > self._longest or len(parts) > len(self._work):
            self._longest = max(longest + longest // 2, self._longest)
            self._work = [_numbers(self._library.stack_work(self._stack, self._longest)) for _ in parts]
        y = x.new_empty(len(rows), x.shape[1])
        width, places = 4 * x.shape[1], (rows.ctypes.data, x.data_ptr(), y.data_ptr())

        def one(number: int) -> None:
            start, first = parts[number].start, firsts[number]
            own = (places[0] + start * rows.strides[0], places[1] + first * width, places[2] + start * width)
            call(self._stack, len(parts[number]), *own, self._work[number].data_ptr())

        for_each(len(parts), one)
        return y


_BLOCK = 3
_LENGTH = 2
"""What says where tokens are held: the address, the tokens there is room for, the tokens there are."""


class Texts:
    """The keys and values of up to ``count`` texts of one stack."""

    def __init__(self, stack: Stack, count: int) -> None:
        self._stack = stack
        self._prompts: list[Tensor | None] = [None] * count
        self._own: list[Tensor | None] = [None] * count
        # the prompt's block, then the text's own
        self._table = np.zeros((count, 2 * _BLOCK), dtype=np.int64)

    def begin(self, which: Sequence[int], lengths: Sequence[int]) -> NDArray[np.int64]:
        """Let texts begin with prompts of so many tokens, which are not held yet; return their blocks."""
        for slot, length in zip(which, lengths, strict=True):
            capacity = -(-length // 8) * 8
            self._prompts[slot] = block = _numbers(capacity * self._stack.numbers)
            self._table[slot, :_BLOCK] = block.data_ptr(), capacity, length
            self._table[slot, _BLOCK + _LENGTH] = 0
        found: NDArray[np.int64] = self._table[list(which), :_BLOCK]
        return found

    def share(self, source: int, targets: Sequence[int]) -> None:
        """Let texts begin with the prompt of another one."""
        for slot in targets:
            self._prompts[slot] = self._prompts[source]
            self._table[slot, :_BLOCK] = self._table[source, :_BLOCK]
            self._table[slot, _BLOCK + _LENGTH] = 0

    def order(self, slots: Sequence[int]) -> None:
        """Put texts in the order of ``slots``, each of which is named once."""
        self._table = self._table[list(slots)]
        self._prompts, self._own = ([held[slot] for slot in slots] for held in (self._prompts, self._own))

    def longer(self, count: int) -> NDArray[np.int64]:
        """Make room for one token more in each of texts 0 … ``count`` − 1; return what says where they are, to be kept up."""
        rows: NDArray[np.int64] = self._table[:count]
        for slot in np.nonzero(rows[:, _BLOCK + _LENGTH] >= rows[:, _BLOCK + _LENGTH - 1])[0]:
            self._grow(int(slot))
        return rows

    def _grow(self, slot: int) -> None:
        """Take a larger block, half as large again and a little more, and keep what the text holds."""
        row = self._table[slot, _BLOCK:]
        capacity = int(row[1]) * 3 // 2 // 8 * 8 + _MORE
        block = _numbers(capacity * self._stack.numbers)
        larger = np.array([block.data_ptr(), capacity, row[_LENGTH]])
        if row[_LENGTH]:
            self._stack.copy(row, larger)
        self._own[slot], self._table[slot, _BLOCK:] = block, larger


class Choice:
    """The vocabulary's head, packed for many steps; a copy of the output weights, which holds until these move."""

    def __init__(self, head: VocabularyHead, *, temperature: float) -> None:
        """``head``: float32 on the CPU, without a cap on its logits; ``temperature``: τ."""
        self._library = code() or library
        self._held = (head.weight.detach().contiguous(), None if head.bias is None else head.bias.detach().contiguous())
        weight, bias = self._held
        vocabulary, width = weight.shape
        places = (weight.data_ptr(), None if bias is None else bias.data_ptr(), None)
        self._choice = _Choice(width, vocabulary, *places, head.scale / temperature)
        self._packed = _numbers(self._library.choice_numbers(self._choice))
        self._choice.packed = self._packed.data_ptr()
        self._library.choice_pack(self._choice)
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
        parts = shares(len(hidden), max(1, min(threads(), len(hidden) // _ALONE)))
        picks, uniforms = np.ascontiguousarray(picks), np.ascontiguousarray(uniforms)

        def one(number: int) -> None:
            part = parts[number]
            own = picks - part.start if part.start else picks
            given = (len(part), hidden[part.start :].data_ptr(), len(picks), own.ctypes.data, uniforms.ctypes.data)
            self._library.choose(
                self._choice, *given, tokens.data_ptr(), logp.data_ptr(), self._room(number, len(part))
            )

        for_each(len(parts), one)
        return tokens, logp

    def _room(self, number: int, states: int) -> int:
        needed = self._library.choice_work(self._choice, states)
        if number not in self._work or len(self._work[number]) < needed:
            self._work[number] = _numbers(needed)
        return self._work[number].data_ptr()


def _numbers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.float32, device="cpu")
