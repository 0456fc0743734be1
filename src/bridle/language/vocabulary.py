"""The vocabulary's head, compiled, on a CPU in float32: :func:`bridle.core.head.head_answers` by ``vocabulary.c``.

A block of the vocabulary at a time, all positions' logits of it are made, summed up while they lie in the near caches
and, where a gradient is asked for, put away: one [chunk, V] block in memory, two with a reference, none without a
gradient. The vocabulary is shared out among PyTorch's threads, and the parts' sums joined in their order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridle.core import head as plain
from bridle.core import logprobs as plainer
from bridle.core._vocabulary import Shaping
from bridle.core.head import HeadAnswers, HeadSlopes, VocabularyHead, Weighing
from bridle.language.rooms import room
from bridle.native.loading import computing_now, halved_library_of, library_of, load_library
from bridle.native.sharing import for_each, shares, threads

__all__ = ["halved", "head_answers", "library", "load", "token_logprobs"]

_KEPT_NUMBERS = 16 * 1024 * 1024
"""Logits that are kept at a time: 64 MiB."""
_ROWS = 256
"""Positions at a time at most: their hidden states stay in a near cache."""


class _Side(ctypes.Structure):
    """See ``side`` in vocabulary.c."""

    _fields_ = (
        ("width", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("hidden", "weight", "bias", "logits")),
    )


_POINTERS = ("targets", "sums", "logp", "entropy", "kl", "ref_logp", "a", "b", "c", "weight_gradient", "bias_gradient")


class _Head(ctypes.Structure):
    """See ``head`` in vocabulary.c."""

    _fields_ = (
        ("rows", ctypes.c_int64),
        ("vocabulary", ctypes.c_int64),
        ("own", _Side),
        ("other", _Side),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    )


_SOURCE = Path(__file__).with_name("vocabulary.c")


def load(place: Path | None) -> Any:
    """Open what was compiled of vocabulary.c to ``place``; None as :func:`bridle.native.loading.load_library`."""
    own, at, count = ctypes.POINTER(_Head), ctypes.c_void_p, ctypes.c_int64
    functions: dict[str, tuple[Any, list[Any]]] = {
        "head_block": (count, []),
        "head_columns": (count, []),
        "head_work": (count, [own]),
        "head_forward": (None, [own, count, count, count, at]),
        "head_join": (None, [own, count]),
        "head_backward": (None, [own, count, count, at, at]),
    }
    return load_library(place, _SOURCE, functions, "head_source")


library: Any = load(library_of(_SOURCE))
"""The compiled code; None where it was not built."""
halved: Any = load(halved_library_of(_SOURCE))
"""The same with products in bfloat16, summed in float32; None where the processor has none, or it was not built."""


@torch.no_grad()
def head_answers(
    hidden: Float[Tensor, "N D"],
    head: VocabularyHead,
    targets: Int[Tensor, " N"],
    *,
    reference: tuple[Float[Tensor, "M E"], VocabularyHead] | None = None,
    temperature: float = 1.0,
    weighing: Weighing | None = None,
    weight_grad: Float[Tensor, "V D"] | None = None,
    bias_grad: Float[Tensor, " V"] | None = None,
) -> tuple[HeadAnswers, Float[Tensor, "N D"] | None]:
    """Answer as :func:`bridle.core.head.head_answers` does, compiled where that is served, else by it.

    Served are plain float32 tensors on the CPU whose logits are not capped; what does not fit together is refused there. Under
    autocast to bfloat16 hidden states, weights and slopes of logits are rounded for the products, there and back, where the
    processor has such; nothing else is. Elsewhere all is of float32, whatever the caller computes in.
    """
    sides = [(hidden, head)] if reference is None else [(hidden, head), reference]
    if not (temperature > 0 and _served(sides, targets, (weight_grad, bias_grad))):
        return plain.head_answers(
            hidden,
            head,
            targets,
            reference=reference,
            temperature=temperature,
            weighing=weighing,
            weight_grad=weight_grad,
            bias_grad=bias_grad,
        )
    run = _Run([_Given.of(*side, temperature) for side in sides], targets.contiguous(), len(head.weight), weight_grad)
    slope = None if weighing is None else room(*hidden.shape)
    inner = head.scale / temperature
    bias_sum = None if bias_grad is None else torch.zeros_like(bias_grad)
    for rows in run.chunks(keep=weighing is not None):
        found = run.forward(rows, keep=weighing is not None)
        if weighing is not None and slope is not None:
            run.backward(rows, weighing(rows, found), slope[rows], bias_sum)
    if slope is not None:
        slope.mul_(inner)
    if bias_grad is not None:
        bias_grad.add_(cast("Tensor", bias_sum), alpha=inner)
    return run.answers(slice(None)), slope


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    head: VocabularyHead,
    targets: Int[Tensor, " N"],
    *,
    temperature: float = 1.0,
    with_entropy: bool = True,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Answer as :func:`bridle.core.logprobs.token_logprobs` does; compiled where it is served and no gradient is asked for."""
    if not torch.is_grad_enabled() and temperature > 0 and _served([(hidden, head)], targets, (None, None)):
        found, _ = head_answers(hidden, head, targets, temperature=temperature)
        return found.logp, found.entropy if with_entropy else torch.zeros_like(found.logp)
    return plainer.token_logprobs(
        hidden,
        head.weight,
        targets,
        bias=head.bias,
        temperature=temperature,
        scale=head.scale,
        softcap=head.softcap,
        with_entropy=with_entropy,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Given:
    """One side's numbers, the factor on its logits folded in."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None

    @classmethod
    def of(cls, hidden: Tensor, head: VocabularyHead, temperature: float) -> _Given:
        inner = Shaping(temperature=temperature, scale=head.scale, softcap=None).inner
        lowest = torch.finfo(torch.float32).min / 4  # −inf forbids a token; as a large finite number it still does
        bias = None if head.bias is None else head.bias.detach().clamp(min=lowest).mul_(inner).clamp_(min=lowest)
        scaled = hidden.detach() if inner == 1.0 else hidden.detach() * inner
        return cls(hidden=scaled.contiguous(), weight=head.weight.detach(), bias=bias)

    def side(self, rows: slice, logits: Tensor | None) -> _Side:
        return _Side(self.hidden.shape[1], *map(_at, (self.hidden[rows], self.weight, self.bias, logits)))


class _Run:
    """A head over its positions, some of them at a time, in as many parts of the vocabulary as there are threads."""

    def __init__(self, sides: Sequence[_Given], targets: Tensor, vocabulary: int, weight_grad: Tensor | None) -> None:
        self._sides, self._targets, self._vocabulary, self._weight_grad = sides, targets, vocabulary, weight_grad
        self._library = computing_now(library, halved) or library
        self._block = self._library.head_block()
        self._blocks = -(-vocabulary // self._block)
        self._parts = shares(self._blocks, threads())
        self._found = sides[0].hidden.new_zeros(2 * len(sides), len(targets))
        self._kept: list[Tensor | None] = [None, None]
        self._own = _Head()

    def chunks(self, *, keep: bool) -> list[slice]:
        """Positions in parts of alike size; set room aside for the largest."""
        count = len(self._targets)
        most = min(_ROWS, max(1, _KEPT_NUMBERS // (self._blocks * self._block))) if keep else _ROWS
        parts = shares(count, -(-count // most))
        rows = max(map(len, parts), default=0)
        if keep:
            numbers = rows * self._blocks * self._block
            self._kept = [room(numbers) for _ in self._sides] + [None] * (2 - len(self._sides))
        sizes = _Head(rows, self._vocabulary, *self._both(slice(0, rows)))
        self._work = [room(self._library.head_work(sizes)) for _ in self._parts]
        self._sums = torch.empty(
            len(self._parts), rows, self._library.head_columns(), dtype=torch.float64, device="cpu"
        )
        width = self._sides[0].hidden.shape[1]
        self._slopes = [self._found.new_empty(rows, width) for _ in self._parts[1:]] if keep else []
        return [slice(part.start, part.stop) for part in parts]

    def answers(self, rows: slice) -> HeadAnswers:
        """What was found at some positions."""
        logp, entropy, *theirs = self._found[:, rows]
        kl, ref_logp = theirs or (None, None)
        return HeadAnswers(logp=logp, entropy=entropy, kl=kl, ref_logp=ref_logp)

    def forward(self, rows: slice, *, keep: bool) -> HeadAnswers:
        """Answer at some positions; ``keep`` their logits."""
        found = self.answers(rows)
        columns = (self._targets[rows], self._sums, found.logp, found.entropy, found.kl, found.ref_logp)
        self._own = _Head(rows.stop - rows.start, self._vocabulary, *self._both(rows), *map(_at, columns))
        for_each(
            len(self._parts),
            lambda part: self._library.head_forward(
                self._own, part, self._parts[part].start, self._parts[part].stop, _at(self._work[part])
            ),
        )
        self._library.head_join(self._own, len(self._parts))
        return found

    def backward(self, rows: slice, slopes: HeadSlopes, into: Tensor, bias_sum: Tensor | None) -> None:
        """Write what the positions gone through last give to the slopes of hidden, and add to those of weight and bias."""
        given = [slopes.logp, slopes.entropy, slopes.kl]
        if all(slope is None for slope in given):
            into.zero_()
            return
        if slopes.kl is not None and len(self._sides) == 1:
            raise ValueError("slopes.kl is given without a reference to be far from")
        held = [None if slope is None else _column(slope, rows.stop - rows.start) for slope in given]
        for name, tensor in zip(_POINTERS[-5:], (*held, self._weight_grad, bias_sum), strict=True):
            setattr(self._own, name, _at(tensor))
        outs = [into, *(slope[: rows.stop - rows.start] for slope in self._slopes)]
        for_each(
            len(self._parts),
            lambda part: self._library.head_backward(
                self._own, self._parts[part].start, self._parts[part].stop, _at(outs[part]), _at(self._work[part])
            ),
        )
        for other in outs[1:]:
            into.add_(other)

    def _both(self, rows: slice) -> tuple[_Side, _Side]:
        sides = [side.side(rows, kept) for side, kept in zip(self._sides, self._kept, strict=False)]
        return sides[0], sides[1] if len(sides) > 1 else _Side()


def _served(sides: Sequence[tuple[Tensor, VocabularyHead]], targets: Tensor, grads: Sequence[Tensor | None]) -> bool:
    """Whether all is plain, of float32 and on the CPU, and fits together."""
    weight = sides[0][1].weight
    if library is None or targets.dtype is not torch.int64 or targets.ndim != 1 or targets.device.type != "cpu":
        return False
    count, vocabulary = len(targets), len(weight)
    if count == 0 or int(targets.min()) < 0 or int(targets.max()) >= vocabulary:
        return False
    for hidden, head in sides:
        if head.softcap is not None or not _fits(hidden, (count, head.weight.shape[-1])):
            return False
        if not (_fits(head.weight, (vocabulary, hidden.shape[1])) and head.weight.is_contiguous()):
            return False
        if head.bias is not None and not _fits(head.bias, (vocabulary,)):
            return False
    sizes = (weight.shape, weight.shape[:1])
    return all(
        grad is None or (_fits(grad, size) and grad.is_contiguous()) for grad, size in zip(grads, sizes, strict=True)
    )


def _fits(tensor: Tensor, shape: Sequence[int]) -> bool:
    return (
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tuple(tensor.shape) == tuple(shape)
    )


def _column(slope: Tensor, count: int) -> Tensor:
    if slope.shape != (count,):
        raise ValueError(
            f"slopes have shape {tuple(slope.shape)}: expected ({count},), one for each position of the chunk"
        )
    return slope.detach().to("cpu", torch.float32).contiguous()


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
