"""A policy of a user's own modules, for the path that knows nothing of their insides."""

from __future__ import annotations

import torch
from torch import nn

from bridle.control import ActionSpec, ActorCritic, CategoricalHead, ObservationSpec


class Tower(nn.Module):
    """A user's own network, written as users write them."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 64)
        self.second = nn.Linear(64, 64)
        self.last = nn.Linear(64, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def build(observations: ObservationSpec, actions: ActionSpec) -> ActorCritic:
    actor, critic = Tower(observations.width, actions.width), Tower(observations.width, 1)
    return ActorCritic(actor=actor, critic=critic, head=CategoricalHead())
