"""From what the actor gives to a distribution over actions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.control.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    MultiCategorical,
    SquashedGaussian,
)

__all__ = ["BernoulliHead", "CategoricalHead", "GaussianHead", "MultiCategoricalHead", "by_hand", "squashed"]


class CategoricalHead(nn.Module):
    """From the actor's output, A logits, to a distribution over discrete actions."""

    def forward(self, outputs: Float[Tensor, "n A"], mask: Bool[Tensor, "n A"] | None = None) -> Categorical:
        """Take the outputs for logits, of the allowed actions alone."""
        return Categorical(logits=outputs, mask=mask)


class MultiCategoricalHead(nn.Module):
    """From the actor's output, a logit for each option of each choice, to a distribution over several choices at once."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, outputs: Float[Tensor, "n A"], mask: Bool[Tensor, "n A"] | None = None) -> MultiCategorical:
        """Take the outputs for logits, of the allowed options alone."""
        return MultiCategorical(logits=outputs, sizes=self.sizes, mask=mask)


class BernoulliHead(nn.Module):
    """From the actor's output, A log-odds, to a distribution over switches."""

    def forward(self, outputs: Float[Tensor, "n A"], mask: Bool[Tensor, "n A"] | None = None) -> Bernoulli:
        """Take the outputs for log-odds; no mask reaches this kind of action."""
        return Bernoulli(logits=outputs)


class GaussianHead(nn.Module):
    """From the actor's output to a distribution over a box's A coordinates.

    Without ``per_state`` the output is the mean [n, A], and log σ a parameter; with it, the output [n, 2A] is the mean and
    what is added to ``initial_log_std``. With ``squash`` the action played is tanh of the Gaussian one.
    """

    def __init__(
        self, width: int, initial_log_std: float = 0.0, *, per_state: bool = False, squash: bool = False
    ) -> None:
        super().__init__()
        self.squash = squash
        self.initial_log_std = initial_log_std
        self.log_std = None if per_state else nn.Parameter(torch.full((width,), initial_log_std))

    def forward(
        self, outputs: Float[Tensor, "n W"], mask: Bool[Tensor, "n A"] | None = None
    ) -> DiagonalGaussian | SquashedGaussian:
        """Take the outputs for the mean, and for log σ where it depends on the state; no mask reaches this kind."""
        if self.log_std is None:
            mean, shift = outputs.chunk(2, dim=-1)
            gaussian = DiagonalGaussian(mean=mean, log_std=self.initial_log_std + shift)
        else:
            gaussian = DiagonalGaussian(mean=outputs, log_std=self.log_std.expand_as(outputs))
        return SquashedGaussian(gaussian=gaussian) if self.squash else gaussian


def squashed(head: nn.Module, actions: NDArray[Any]) -> NDArray[Any]:
    """Return what is played of the actions of ``head``."""
    return np.tanh(actions) if isinstance(head, GaussianHead) and head.squash else actions


def by_hand(head: nn.Module) -> bool:
    """Whether actions of this head can be taken and differentiated by hand: discrete ones, or a plain Gaussian's."""
    gaussian = isinstance(head, GaussianHead) and head.log_std is not None and not head.squash
    return gaussian or isinstance(head, CategoricalHead)
