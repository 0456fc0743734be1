"""Policies of a user's own modules: one of tanh, one of layer norms and SiLU, one with a residual sum, one on a trunk."""

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


class NormedTower(nn.Module):
    """Another, with layer norms and SiLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 64)
        self.second = nn.Linear(64, 64)
        self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])
        self.last = nn.Linear(64, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            x = nn.functional.silu(norm(layer(x)))
        return self.last(x)


def build_normed(observations: ObservationSpec, actions: ActionSpec) -> ActorCritic:
    actor, critic = NormedTower(observations.width, actions.width), NormedTower(observations.width, 1)
    return ActorCritic(actor=actor, critic=critic, head=CategoricalHead())


class ResidualTower(nn.Module):
    """A third, with a residual sum, which is no perceptron."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 64)
        self.last = nn.Linear(64, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.first(x))
        return self.last(x + nn.functional.silu(self.second(self.norm(x))))


def build_plain(observations: ObservationSpec, actions: ActionSpec) -> ActorCritic:
    actor, critic = ResidualTower(observations.width, actions.width), ResidualTower(observations.width, 1)
    return ActorCritic(actor=actor, critic=critic, head=CategoricalHead())


def build_trunk(observations: ObservationSpec, actions: ActionSpec) -> ActorCritic:
    trunk = nn.Sequential(nn.Linear(observations.width, 128), nn.SiLU(), nn.LayerNorm(128))
    return ActorCritic(
        trunk=trunk, actor=nn.Linear(128, actions.width), critic=nn.Linear(128, 1), head=CategoricalHead()
    )
