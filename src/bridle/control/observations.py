"""What a policy sees of n states: one vector of all numbers, the images, and which actions are allowed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

__all__ = ["Observations", "pick"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Encoded observations over any leading dimensions ``*n``, such as [B] or [B, T]."""

    vector: Float[Tensor, "*n D"]
    """[*n, D] float32, all numbers of the space side by side; D is 0 where there are none."""
    images: tuple[UInt8[Tensor, "*n C H W"], ...] = ()
    """Of each image of the space, [*n, C, H, W] uint8, 0 … 255."""
    mask: Bool[Tensor, "*n A"] | None = None
    """[*n, A] True where an action is allowed; None where all are."""

    def __len__(self) -> int:
        """Return the first leading dimension."""
        return len(self.vector)

    @property
    def inputs(self) -> Tensor | Self:
        """What a network is given: the plain vector where there are no images, else all of this."""
        return self if self.images else self.vector

    def select(self, index: Int[Tensor, " M"] | Bool[Tensor, "*n"] | slice) -> Self:
        """Return what stands at ``index``: positions in the first dimension, a stretch of it, or a mask over leading ones.

        A stretch shares memory with this, and so may what a mask selects.
        """
        return type(self)(
            vector=pick(self.vector, index),
            images=tuple(pick(image, index) for image in self.images),
            mask=None if self.mask is None else pick(self.mask, index),
        )

    def to(self, device: torch.device) -> Self:
        """Return the same on ``device``; itself if it is there."""
        if self.vector.device == device:
            return self
        return type(self)(
            vector=self.vector.to(device),
            images=tuple(image.to(device) for image in self.images),
            mask=None if self.mask is None else self.mask.to(device),
        )

    def flatten(self) -> Self:
        """Join the first two leading dimensions, [B, T, …] to [B·T, …]."""
        return type(self)(
            vector=self.vector.flatten(0, 1),
            images=tuple(image.flatten(0, 1) for image in self.images),
            mask=None if self.mask is None else self.mask.flatten(0, 1),
        )

    def with_vector(self, vector: Float[Tensor, "*n D"]) -> Self:
        """Return the same images and mask beside another vector."""
        return type(self)(vector=vector, images=self.images, mask=self.mask)

    def with_mask(self, mask: Bool[Tensor, "*n A"] | None) -> Self:
        """Return the same vector and images with another mask, or with none."""
        return type(self)(vector=self.vector, images=self.images, mask=mask)

    def with_rows(self, index: Int[Tensor, " M"], rows: Self) -> Self:
        """Return a copy in which ``rows`` stand at ``index``, with a mask if both have one."""
        images = zip(self.images, rows.images, strict=True)
        mask = None
        if self.mask is not None and rows.mask is not None:
            mask = self.mask.index_copy(0, index, rows.mask)
        return type(self)(
            vector=self.vector.index_copy(0, index, rows.vector),
            images=tuple(image.index_copy(0, index, other) for image, other in images),
            mask=mask,
        )

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join end to end along the first dimension; all parts carry masks, or none does."""
        return cls(
            vector=torch.cat([part.vector for part in parts]),
            images=tuple(torch.cat(images) for images in zip(*(part.images for part in parts), strict=True)),
            mask=_all([part.mask for part in parts], torch.cat),
        )

    @classmethod
    def stack(cls, parts: Sequence[Self], dim: int) -> Self:
        """Lay side by side along a new leading dimension ``dim``; all parts carry masks, or none does."""
        return cls(
            vector=torch.stack([part.vector for part in parts], dim),
            images=tuple(torch.stack(images, dim) for images in zip(*(part.images for part in parts), strict=True)),
            mask=_all([part.mask for part in parts], lambda masks: torch.stack(masks, dim)),
        )


def pick(tensor: Tensor, index: Int[Tensor, " M"] | Bool[Tensor, "*n"] | slice) -> Tensor:
    """Return ``tensor[index]``: by rows, which for images is ten times as fast, and as it is where a mask says all."""
    if isinstance(index, slice):
        return tensor[index]
    if index.dtype is torch.bool:
        tensor, index = tensor.flatten(0, index.ndim - 1), index.flatten().nonzero()[:, 0]
        if len(index) == len(tensor):
            return tensor
    return tensor.index_select(0, index)


def _all(masks: list[Tensor | None], join: Callable[[list[Tensor]], Tensor]) -> Tensor | None:
    present = [mask for mask in masks if mask is not None]
    if not present:
        return None
    if len(present) != len(masks):
        raise ValueError(f"{len(present)} of {len(masks)} observations carry an action mask; all must, or none")
    return join(present)
