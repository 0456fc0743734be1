"""Memory that compiled code writes in while a model is trained: used again by the next pass, as are the weights' gradients.

A pass of a small model writes some hundred megabytes and forgets them. Taken from the system each time, they come page by page,
which took a seventh of a training step. In a block of :func:`training` what is given up is kept for who asks next, and compiled
code adds gradients where autograd would have added them afterwards. In a block of :func:`keeping` around several of those a
small model's rooms are kept from one to the next.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bridle.guards import is_plain

__all__ = ["gradient_of", "keeping", "room", "takes_directly", "training"]

_LEAST = 16 * 1024
"""Numbers; smaller rooms are PyTorch's to give."""
_MOST = 16 * 1024**2
"""Numbers kept between blocks of training: what a large model's rooms cost is little beside its training, and memory is not."""


@dataclass(slots=True)
class _Kept:
    """Rooms handed out since training began, and how many blocks of training and of keeping are open."""

    blocks: int = 0
    keepers: int = 0
    arrays: list[Any] = field(default_factory=list)
    """as NumPy sees them: a tensor made of one holds on to it until the last view of the tensor is gone"""


_kept = _Kept()
_taking = threading.Lock()


@contextmanager
def training() -> Iterator[None]:
    """Train in here: each backward pass adds to the weights' ``.grad``, as ``backward()`` does, and none asks for slopes alone.

    Compiled code may then add to ``.grad`` itself, and rooms are kept until the block ends. It is open for all threads of
    the process. Hooks on a weight are called; those on a node of autograd that gathers a gradient see nothing of it.
    """
    _kept.blocks += 1
    try:
        yield
    finally:
        _kept.blocks -= 1
        _let_go()


@contextmanager
def keeping() -> Iterator[None]:
    """Keep rooms between blocks of :func:`training` in here, where they are 64 MB at most."""
    _kept.keepers += 1
    try:
        yield
    finally:
        _kept.keepers -= 1
        _let_go()


def _let_go() -> None:
    if not _kept.blocks and not (_kept.keepers and sum(array.size for array in _kept.arrays) <= _MOST):
        _kept.arrays.clear()


def room(*shape: int) -> Float[Tensor, ...]:
    """Return a float32 tensor of that shape on the CPU, of any numbers, which nobody else has."""
    numbers = math.prod(shape)
    if not _kept.blocks or numbers < _LEAST:
        return torch.empty(shape, dtype=torch.float32, device="cpu")
    with _taking:  # the parts of a pass ask at once, and a room is held from when a tensor is made of it
        found = _free(numbers)
        if found is None:
            found = torch.empty(numbers, dtype=torch.float32, device="cpu").numpy()
            _kept.arrays.append(found)
        return torch.from_numpy(found)[:numbers].view(shape)


def gradient_of(weight: Tensor) -> Tensor | None:
    """Return the gradient of a weight, 0 where it has none yet, for compiled code to add to; None where autograd has to.

    Autograd has to where the weight :func:`takes_directly` no gradient.
    """
    if not takes_directly(weight):
        return None
    if weight.grad is None:
        weight.grad = room(*weight.shape).zero_()
    return weight.grad


def takes_directly(weight: Tensor) -> bool:
    """Whether compiled code may add to a weight's gradient, which need not be there yet.

    It may not outside :func:`training`, where the weight is computed of others, and where it has hooks.
    """
    if not _kept.blocks or not weight.requires_grad or not (weight.is_leaf and is_plain(weight)):
        return False
    if weight._backward_hooks or weight._post_accumulate_grad_hooks or not weight.is_contiguous():
        return False
    return weight.grad is None or (is_plain(weight.grad) and weight.grad.is_contiguous())


def _free(numbers: int) -> Any:
    """Return the smallest free room of that many numbers, of twice as many at most; without one, give up as much."""
    counts = _references(_kept.arrays)
    free = sorted(
        (array for array, count in zip(_kept.arrays, counts, strict=True) if count == _UNHELD),
        key=lambda array: array.size,
    )
    fits = [array for array in free if numbers <= array.size <= 2 * numbers]
    if fits:
        return fits[0]
    given_up = 0
    while free and given_up < numbers:
        last = free.pop()
        given_up += last.size
        _kept.arrays[:] = [array for array in _kept.arrays if array is not last]
    return None


def _references(arrays: Sequence[Any]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


_UNHELD = _references([np.empty(0)])[0]
"""What :func:`_references` says of an array that a list alone holds on to."""
