"""The projection to the vocabulary, in chunks of rows, so that [N, V] never exists.

    z = softcap · tanh(scale · (h Wᵀ + b) / softcap)   or   scale · (h Wᵀ + b),   and then z/τ

Logits here are always those of softmax(z/τ), at least float32 whatever the inputs' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bridle.core._checks import at_least_float32, check_dim, check_range

__all__ = ["Projection", "ProjectionGrad", "Shaping", "check_projection", "chunks", "rows_per_chunk"]

_CHUNK_NUMBERS = 8 * 1024 * 1024
"""Numbers in one [chunk, V] block: 32 MiB of float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shaping:
    """How a model turns its projection into logits, and the temperature it is sampled at."""

    temperature: float
    """τ > 0."""
    scale: float
    """Factor on the projection, ≠ 0."""
    softcap: float | None
    """Bound of the tanh on the scaled projection, > 0; None for none."""

    def __post_init__(self) -> None:
        """Refuse values that give no distribution."""
        check_range("temperature", self.temperature, 0.0, math.inf, closed=False)
        if not (math.isfinite(self.scale) and self.scale != 0.0):
            raise ValueError(f"scale={self.scale!r}: expected a finite number other than 0")
        if self.softcap is not None:
            check_range("softcap", self.softcap, 0.0, math.inf, closed=False)

    @property
    def inner(self) -> float:
        """The factor on h Wᵀ + b: of the tanh's argument, or of the logits where there is no tanh."""
        return self.scale / (self.temperature if self.softcap is None else self.softcap)

    @property
    def outer(self) -> float:
        """The factor on the tanh."""
        return 1.0 if self.softcap is None else self.softcap / self.temperature


class Projection:
    """h ↦ logits of softmax(z/τ), and back from their gradient, one chunk of rows at a time."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, shaping: Shaping) -> None:
        self.dtype = at_least_float32(hidden, weight)
        self.hidden = hidden
        self.weight = weight.to(self.dtype)
        # −inf forbids a token; as a large finite number it still does, and 0 · log 0 stays 0.
        lowest = torch.finfo(self.dtype).min / 4
        self.bias = (
            None if bias is None else bias.to(self.dtype).clamp(min=lowest).mul_(shaping.inner).clamp_(min=lowest)
        )
        self.shaping = shaping

    def inputs(self, rows: slice) -> Tensor:
        """Return the chunk's hidden states with the inner factor folded in, [n, D]."""
        return self.hidden[rows].to(self.dtype) * self.shaping.inner

    def logits(self, inputs: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the [n, V] logits of π, in ``out`` or a new tensor."""
        if self.bias is None:
            z = torch.mm(inputs, self.weight.t(), out=out)
        else:
            z = torch.addmm(self.bias, inputs, self.weight.t(), out=out)
        return z if self.shaping.softcap is None else z.tanh_().mul_(self.shaping.outer)

    def through_softcap(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Turn ∂/∂logits into ∂/∂(argument of the tanh), in place in ``grad``; ``logits`` is spent."""
        if self.shaping.softcap is None:
            return grad
        slope = logits.div_(self.shaping.outer).square_().neg_().add_(1.0)
        return grad.mul_(slope).mul_(self.shaping.outer)


class ProjectionGrad:
    """The gradients of hidden, weight and bias, summed over chunks."""

    def __init__(self, projection: Projection, bias: Tensor | None, needed: tuple[bool, bool, bool]) -> None:
        self._projection = projection
        weight, hidden = projection.weight, projection.hidden
        self._hidden = torch.empty_like(hidden) if needed[0] else None
        self._weight = torch.zeros_like(weight) if needed[1] else None
        self._bias = torch.zeros_like(bias, dtype=weight.dtype) if needed[2] and bias is not None else None

    def add(self, rows: slice, grad: Tensor, inputs: Tensor) -> None:
        """Add one chunk: ``grad`` [n, V] with respect to :meth:`Projection.inputs` · Wᵀ, ``inputs`` [n, D]."""
        inner = self._projection.shaping.inner
        if self._hidden is not None:
            self._hidden[rows] = (grad @ self._projection.weight).mul_(inner)
        if self._weight is not None:
            self._weight.addmm_(grad.t(), inputs)
        if self._bias is not None:
            self._bias.add_(grad.sum(0), alpha=inner)

    def result(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients in the dtypes of hidden, weight and bias; None where not needed."""
        return (
            self._hidden,
            None if self._weight is None else self._weight.to(weight.dtype),
            None if self._bias is None or bias is None else self._bias.to(bias.dtype),
        )


def rows_per_chunk(chunk: int | None, vocabulary: int) -> int:
    """Return ``chunk``, or by default as many rows as make a block of 32 MiB in float32."""
    if chunk is None:
        return max(1, _CHUNK_NUMBERS // max(1, vocabulary))
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected at least 1 row")
    return chunk


def chunks(count: int, size: int) -> Iterator[slice]:
    """Yield the slices of 0 … count − 1 that hold ``size`` rows each, the last one what remains."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def check_projection(hidden: Tensor, weight: Tensor, bias: Tensor | None, prefix: str = "") -> None:
    """Raise ``ValueError`` unless hidden is [N, D], weight [V, D] with V ≥ 1, and bias [V]."""
    check_dim(f"{prefix}hidden", hidden, 2, "[N, D]")
    check_dim(f"{prefix}weight", weight, 2, "[V, D]")
    if weight.shape[0] < 1 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"{prefix}weight has shape {tuple(weight.shape)}, expected [V, D] with V ≥ 1 and {prefix}hidden's width "
            f"D={hidden.shape[1]}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{prefix}bias has shape {tuple(bias.shape)}, expected ({weight.shape[0]},)")
