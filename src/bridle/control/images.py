"""Networks that look at images."""

from __future__ import annotations

import math
from itertools import islice
from typing import cast

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from bridle.control.convolutions import convolved, served
from bridle.control.observations import Observations

__all__ = ["NATURE_WIDTH", "ImageEncoder", "NatureCNN"]

NATURE_WIDTH = 512
"""Features that the Nature CNN makes of an image."""


class NatureCNN(nn.Module):
    """32 filters 8×8 with stride 4, 64 of 4×4 with stride 2, 64 of 3×3 with stride 1, 512 units; a rectifier after each.

    Source: Mnih et al. 2015, "Human-level control through deep reinforcement learning", Methods, model architecture.
    Weights are orthogonal with gain √2 and biases 0.
    """

    def __init__(self, size: tuple[int, int, int]) -> None:
        """Look at images of ``size`` (C, H, W), H and W at least 36."""
        super().__init__()
        channels, *sides = size
        for kernel, stride in ((8, 4), (4, 2), (3, 1)):
            sides = [(side - kernel) // stride + 1 for side in sides]
        self.layers = nn.Sequential(
            nn.Conv2d(channels, 32, 8, stride=4),
            nn.ReLU(),
            nn.Conv2d(32, 64, 4, stride=2),
            nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * math.prod(sides), NATURE_WIDTH),
            nn.ReLU(),
        )
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight, math.sqrt(2))
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, image: UInt8[Tensor, "n C H W"]) -> Float[Tensor, "n 512"]:
        """Look at n images of 0 … 255; the convolutions run compiled where :func:`served` says so."""
        convolutions = served(self.layers, image)
        if not convolutions:
            # channels last while still bytes: the convolutions' gradients are half again as fast on a CPU
            seen = image.contiguous(memory_format=torch.channels_last).float().div_(255)
            return cast(Tensor, self.layers(seen))
        features = convolved(convolutions, image)
        for layer in islice(self.layers, 2 * len(convolutions), None):
            features = layer(features)
        return features


class ImageEncoder(nn.Module):
    """A Nature CNN for each image; their features and the vector side by side, and then perhaps hidden layers."""

    def __init__(self, *, sizes: tuple[tuple[int, int, int], ...], hidden: nn.Module | None, width: int) -> None:
        """Encode images of ``sizes`` (C, H, W) and the vector into ``width`` features."""
        super().__init__()
        self.eyes = nn.ModuleList(NatureCNN(size) for size in sizes)
        self.hidden = hidden if hidden is not None else nn.Identity()
        self.width = width

    def forward(self, observations: Observations) -> Float[Tensor, "n F"]:
        """Encode n observations."""
        seen = [eye(image) for eye, image in zip(self.eyes, observations.images, strict=True)]
        features: Tensor = self.hidden(torch.cat([*seen, observations.vector], dim=-1))
        return features
