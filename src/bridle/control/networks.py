"""The policy: an actor and a critic over encoded observations, on one trunk or on two."""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bridle.batch import Evaluation
from bridle.control.distributions import Categorical, DiagonalGaussian, Distribution
from bridle.control.spaces import ActionSpec, BoxActions, ObservationSpec
from bridle.errors import ConfigError
from bridle.random import torch_rng

__all__ = [
    "ActorCritic",
    "CategoricalHead",
    "ControlPolicy",
    "GaussianHead",
    "NetworkSettings",
    "Transitions",
    "build_policy",
    "perceptron",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """The units of this world: one action in one state each."""

    observations: Float[Tensor, "N D"]
    """[N, D] encoded and normalised observations."""
    actions: Tensor
    """[N] int64 for discrete actions, [N, A] float32 for a box: the policy's own, before clipping."""

    def __len__(self) -> int:
        """Return the number of units, N."""
        return len(self.observations)

    @property
    def sizes(self) -> Int[Tensor, " N"]:
        """[N] one action each."""
        return torch.ones(len(self), dtype=torch.int64)

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """[N] all cost alike."""
        return self.sizes

    def select(self, index: Int[Tensor, " M"] | slice) -> Self:
        """Return the transitions at ``index``, in that order; a stretch of them shares memory."""
        if isinstance(index, Tensor):
            index = index.to(self.observations.device)
        return type(self)(observations=self.observations[index], actions=self.actions[index])


class ControlPolicy(nn.Module, ABC):
    """What collecting and learning ask of a policy."""

    @abstractmethod
    def forward(self, units: Transitions) -> Evaluation:
        """Evaluate the actions taken."""

    @abstractmethod
    def distribution(self, observations: Float[Tensor, "n D"]) -> Distribution:
        """π(· | s) for n states."""

    @abstractmethod
    def values(self, observations: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """The shape of actor and critic."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers."""
    activation: Literal["tanh", "relu"] = "tanh"
    """What follows each hidden layer."""
    shared_trunk: bool = False
    """Actor and critic share the hidden layers; otherwise each has its own."""
    initial_log_std: float = 0.0
    """log σ of a box's actions at the start, the same in every state, learned; in units of half the box's width."""
    factory: str | None = None
    """"module:function" that builds another policy from (observations, actions); the other fields are then unused."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if any(width < 1 for width in self.hidden):
            raise ConfigError.of("hidden", self.hidden, "widths >= 1")
        if self.activation not in ("tanh", "relu"):
            raise ConfigError.of("activation", self.activation, '"tanh" or "relu"')
        if not math.isfinite(self.initial_log_std):
            raise ConfigError.of("initial_log_std", self.initial_log_std, "a finite number")
        if self.factory is not None and (self.factory.count(":") != 1 or not all(self.factory.split(":"))):
            raise ConfigError.of("factory", self.factory, '"module:function"')


class CategoricalHead(nn.Module):
    """From the actor's output to a distribution over discrete actions."""

    def forward(self, logits: Float[Tensor, "n A"]) -> Categorical:
        """Take the output for the logits."""
        return Categorical(logits=logits)


class GaussianHead(nn.Module):
    """From the actor's output to a distribution over a box; the deviation is a parameter, the same in every state."""

    def __init__(self, width: int, initial_log_std: float) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((width,), initial_log_std))

    def forward(self, mean: Float[Tensor, "n A"]) -> DiagonalGaussian:
        """Take the output for the mean."""
        return DiagonalGaussian(mean=mean, log_std=self.log_std.expand_as(mean))


class ActorCritic(ControlPolicy):
    """A trunk (or none), an actor and a critic on it, and the head that makes the actor's output a distribution.

    Weights are touched only inside the ``forward`` of this module's parts.
    """

    def __init__(self, *, actor: nn.Module, critic: nn.Module, head: nn.Module, trunk: nn.Module | None = None) -> None:
        """Join the parts: trunk [n, D] → [n, F] (None: the identity), actor [n, F] → [n, A], critic [n, F] → [n, 1]."""
        super().__init__()
        self.trunk = nn.Identity() if trunk is None else trunk
        self.actor = actor
        self.critic = critic
        self.head = head

    def forward(self, units: Transitions) -> Evaluation:
        """Evaluate the actions taken, with one pass through the trunk."""
        features = self.trunk(units.observations)
        distribution = cast(Distribution, self.head(self.actor(features)))
        return Evaluation(
            logp=distribution.log_prob(units.actions),
            entropy=distribution.entropy(),
            value=self.critic(features).squeeze(-1),
        )

    def distribution(self, observations: Float[Tensor, "n D"]) -> Distribution:
        """π(· | s) for n states."""
        return cast(Distribution, self.head(self.actor(self.trunk(observations))))

    def values(self, observations: Float[Tensor, "n D"]) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return."""
        return cast(Tensor, self.critic(self.trunk(observations)).squeeze(-1))


def perceptron(widths: tuple[int, ...], activation: Literal["tanh", "relu"], *, output_gain: float | None) -> nn.Module:
    """Linear layers of the given widths, input first, with the activation between them.

    Weights are orthogonal with gain √2 and biases 0, the last layer's gain is ``output_gain``; None: all layers are
    hidden ones, each with its activation (Andrychowicz et al. 2021, §3.2: a small last actor layer matters).
    """
    layers: list[nn.Module] = []
    for number, (inputs, outputs) in enumerate(pairwise(widths)):
        last = output_gain is not None and number == len(widths) - 2
        layer = nn.Linear(inputs, outputs)
        nn.init.orthogonal_(layer.weight, output_gain if last and output_gain is not None else math.sqrt(2))
        nn.init.zeros_(layer.bias)
        layers.append(layer)
        if not last:
            layers.append(nn.Tanh() if activation == "tanh" else nn.ReLU())
    return nn.Sequential(*layers)


def build_policy(
    observations: ObservationSpec, actions: ActionSpec, settings: NetworkSettings, *, seed: int
) -> ControlPolicy:
    """Build the policy with weights drawn from the key (seed, "network").

    Raises:
        ConfigError: ``settings.factory`` cannot be imported or does not give a :class:`ControlPolicy`.
    """
    with torch_rng(seed, "network"):
        if settings.factory is not None:
            return _from_factory(settings.factory, observations, actions)
        return _perceptrons(observations, actions, settings)


def _perceptrons(observations: ObservationSpec, actions: ActionSpec, settings: NetworkSettings) -> ActorCritic:
    layers, kind = (observations.width, *settings.hidden), settings.activation
    trunk: nn.Module | None = None
    if settings.shared_trunk:
        trunk = perceptron(layers, kind, output_gain=None)
        layers = layers[-1:]
    head: nn.Module = CategoricalHead()
    if isinstance(actions, BoxActions):
        head = GaussianHead(actions.width, settings.initial_log_std)
    return ActorCritic(
        trunk=trunk,
        actor=perceptron((*layers, actions.width), kind, output_gain=0.01),
        critic=perceptron((*layers, 1), kind, output_gain=1.0),
        head=head,
    )


def _from_factory(name: str, observations: ObservationSpec, actions: ActionSpec) -> ControlPolicy:
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError.of("factory", name, "an importable module:function", str(error)) from error
    policy = build(observations, actions)
    if not isinstance(policy, ControlPolicy):
        expected = "a function that returns a bridle.control.ControlPolicy (ActorCritic takes any modules)"
        raise ConfigError.of("factory", name, expected, f"it returned {type(policy).__name__}")
    return policy
