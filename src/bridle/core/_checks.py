"""First lines of the functions in ``core``: shapes, ranges, and the precision they compute in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = [
    "at_least_float32",
    "check_bool",
    "check_dim",
    "check_range",
    "check_same_shape",
    "check_targets",
    "constant",
    "in_dtype",
]


def check_same_shape(reference: str, expected: Tensor, **others: Tensor | None) -> None:
    """Raise ``ValueError`` unless every tensor given has the shape of ``expected``, whose name is ``reference``."""
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != expected.shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected that of {reference}: {tuple(expected.shape)}"
            )


def check_dim(name: str, tensor: Tensor, dim: int, shape: str) -> None:
    """Raise ``ValueError`` unless ``tensor`` has ``dim`` dimensions, written ``shape`` in the message."""
    if tensor.ndim != dim:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {dim} dimensions {shape}")


def check_bool(**masks: Tensor | None) -> None:
    """Raise ``ValueError`` unless every tensor given is of dtype bool."""
    for name, mask in masks.items():
        if mask is not None and mask.dtype is not torch.bool:
            raise ValueError(f"{name} has dtype {mask.dtype}, expected torch.bool")


def check_range(name: str, value: float, low: float, high: float, *, closed: bool = True) -> None:
    """Raise ``ValueError`` unless low ≤ value ≤ high (low < value < high if not ``closed``); NaN never passes."""
    inside = low <= value <= high if closed else low < value < high
    if not inside:
        bounds = f"{low:g} ≤ {name} ≤ {high:g}" if closed else f"{low:g} < {name} < {high:g}"
        raise ValueError(f"{name}={value!r}: expected {bounds}")


def at_least_float32(*tensors: Tensor) -> torch.dtype:
    """Return the dtype to compute in: float32, or float64 where one of the tensors is float64."""
    return torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32


def constant(tensor: Tensor) -> Tensor:
    """Return the tensor without a gradient; itself, if it has none: small losses are all calls."""
    return tensor.detach() if tensor.requires_grad else tensor


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in ``dtype``, without a call into PyTorch where it is so already: small losses are all calls."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def check_targets(targets: Tensor, count: int, vocabulary: int) -> None:
    """Raise ``ValueError`` unless ``targets`` are ``count`` ids of a vocabulary of that size."""
    if targets.shape != (count,) or targets.dtype is not torch.int64:
        raise ValueError(
            f"targets have shape {tuple(targets.shape)} and dtype {targets.dtype}, expected ({count},) and torch.int64"
        )
    if count:
        low, high = (int(bound) for bound in targets.aminmax())
        if low < 0 or high >= vocabulary:
            raise ValueError(f"targets range from {low} to {high}, expected ids from 0 to {vocabulary - 1}")
