"""What an agent's step was taken on, as tensors for a file and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bridle.control.observations import Observations
from bridle.control.policy import Sequences, Transitions

__all__ = ["units_from", "units_to"]


def units_to(units: Transitions | Sequences) -> dict[str, Tensor]:
    """Name the tensors of the units."""
    seen = units.observations
    tensors = {"vector": seen.vector, "actions": units.actions}
    tensors |= {f"image/{number}": image for number, image in enumerate(seen.images)}
    tensors |= {} if seen.mask is None else {"allowed": seen.mask}
    if isinstance(units, Sequences):
        tensors |= {"state": units.state, "fresh": units.fresh, "mask": units.mask}
    return tensors


def units_from(tensors: Mapping[str, Tensor], device: torch.device) -> Transitions | Sequences:
    """Read what :func:`units_to` named."""
    own = {name: tensor.to(device) for name, tensor in tensors.items()}
    images = tuple(own[f"image/{number}"] for number in range(sum(name.startswith("image/") for name in own)))
    observations = Observations(vector=own["vector"], images=images, mask=own.get("allowed"))
    if "state" not in own:
        return Transitions(observations=observations, actions=own["actions"])
    return Sequences(
        observations=observations,
        actions=own["actions"],
        state=own["state"],
        fresh=own["fresh"],
        mask=own["mask"],
    )
