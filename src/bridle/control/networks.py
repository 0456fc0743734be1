"""Networks picked from the spaces: what is built unless one brings one's own."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import nn

from bridle.control.actor_critic import ActorCritic, ImageActorCritic
from bridle.control.heads import BernoulliHead, CategoricalHead, GaussianHead, MultiCategoricalHead, by_hand
from bridle.control.images import NATURE_WIDTH, ImageEncoder
from bridle.control.own import quickened
from bridle.control.policy import ControlPolicy
from bridle.control.recurrent import RecurrentActorCritic
from bridle.control.small import SmallActorCritic
from bridle.control.spaces import (
    ActionSpec,
    BoxActions,
    DiscreteActions,
    MultiBinaryActions,
    MultiDiscreteActions,
    ObservationSpec,
)
from bridle.errors import ConfigError
from bridle.random import torch_rng

__all__ = [
    "NetworkSettings",
    "build_policy",
    "perceptron",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSettings:
    """The shape of actor and critic; the rest is picked from the spaces."""

    hidden: tuple[int, ...] = (64, 64)
    """Widths of the hidden layers. An image goes through the Nature CNN (512 features); hidden layers follow it only where
    there are numbers beside images."""
    activation: Literal["tanh", "relu"] = "tanh"
    """What follows each hidden layer; the Nature CNN has its own."""
    shared_trunk: bool | None = None
    """Actor and critic share all but their last layer; otherwise each has its own. None shares where there are images."""
    std: Literal["parameter", "state"] = "parameter"
    """σ of a box's actions: one learned vector, or the actor's word in each state."""
    initial_log_std: float = 0.0
    """log σ of a box's actions at the start, in units of half the box's width."""
    squash: bool = False
    """Play tanh of a box's Gaussian action, which stays inside the box; otherwise what is outside is clipped."""
    recurrent: Literal["lstm", "gru"] | None = None
    """A memory behind the hidden layers, for worlds that do not show all that matters; actor and critic share it."""
    recurrent_width: int = 64
    """H, the width of the memory."""
    factory: str | None = None
    """"module:function" that builds another policy from (observations, actions); the other fields are then unused."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if any(width < 1 for width in self.hidden):
            raise ConfigError.of("hidden", self.hidden, "widths >= 1")
        if self.activation not in ("tanh", "relu"):
            raise ConfigError.of("activation", self.activation, '"tanh" or "relu"')
        if self.recurrent not in (None, "lstm", "gru"):
            raise ConfigError.of("recurrent", self.recurrent, '"lstm", "gru" or None')
        if self.recurrent_width < 1:
            raise ConfigError.of("recurrent_width", self.recurrent_width, "a width >= 1")
        if self.recurrent is not None and self.shared_trunk is False:
            remedy = "leave shared_trunk out"
            raise ConfigError.of(
                "shared_trunk", False, "True or None with a memory, which actor and critic share", remedy
            )
        if self.std not in ("parameter", "state"):
            raise ConfigError.of("std", self.std, '"parameter" or "state"')
        if not math.isfinite(self.initial_log_std):
            raise ConfigError.of("initial_log_std", self.initial_log_std, "a finite number")
        if self.factory is not None and (self.factory.count(":") != 1 or not all(self.factory.split(":"))):
            raise ConfigError.of("factory", self.factory, '"module:function"')

    def shares(self, observations: ObservationSpec) -> bool:
        """Say whether actor and critic share all but their last layer where this is seen."""
        return self.shared_trunk if self.shared_trunk is not None else bool(observations.images)


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
    """Build the policy that the spaces and ``settings`` ask for, with weights drawn from the key (seed, "network").

    Raises:
        ConfigError: ``settings.factory`` cannot be imported or does not give a :class:`ControlPolicy`, or the settings do
            not suit the spaces.
    """
    with torch_rng(seed, "network"):
        if settings.factory is not None:
            return _from_factory(settings.factory, observations, actions)
        head, width = _head(actions, settings)
        if settings.recurrent is not None:
            return _with_memory(observations, settings, head, width)
        shared = settings.shares(observations)
        if observations.images:
            return _on_images(observations, settings, head, width, shared=shared)
        layers, kind = (observations.width, *settings.hidden), settings.activation
        if not shared and settings.hidden and by_hand(head):
            return SmallActorCritic(
                actor=perceptron((*layers, width), kind, output_gain=0.01),
                critic=perceptron((*layers, 1), kind, output_gain=1.0),
                head=head,
                activation=kind,
            )
        trunk = perceptron(layers, kind, output_gain=None) if shared else None
        layers = layers[-1:] if shared else layers
        return ActorCritic(
            trunk=trunk,
            actor=perceptron((*layers, width), kind, output_gain=0.01),
            critic=perceptron((*layers, 1), kind, output_gain=1.0),
            head=head,
        )


def _head(actions: ActionSpec, settings: NetworkSettings) -> tuple[nn.Module, int]:
    """Return the head for these actions, and how many outputs of the actor it reads."""
    match actions:
        case DiscreteActions():
            return CategoricalHead(), actions.width
        case MultiDiscreteActions():
            return MultiCategoricalHead(actions.nvec), actions.width
        case MultiBinaryActions():
            return BernoulliHead(), actions.width
        case BoxActions():
            if settings.squash and not actions.bounded:
                remedy = "this world's actions are unbounded: leave squash out"
                raise ConfigError.of("squash", settings.squash, "a box with bounds on every side", remedy)
            per_state = settings.std == "state"
            head = GaussianHead(actions.width, settings.initial_log_std, per_state=per_state, squash=settings.squash)
            return head, actions.width * (2 if per_state else 1)


def _on_images(
    observations: ObservationSpec, settings: NetworkSettings, head: nn.Module, width: int, *, shared: bool
) -> ActorCritic:
    def encoder() -> ImageEncoder:
        return image_encoder(observations, settings)

    if shared:
        trunk = encoder()
        actor = perceptron((trunk.width, width), settings.activation, output_gain=0.01)
        critic = perceptron((trunk.width, 1), settings.activation, output_gain=1.0)
        return ImageActorCritic(trunk=trunk, actor=actor, critic=critic, head=head)
    own, other = encoder(), encoder()
    actor = nn.Sequential(own, perceptron((own.width, width), settings.activation, output_gain=0.01))
    critic = nn.Sequential(other, perceptron((other.width, 1), settings.activation, output_gain=1.0))
    return ActorCritic(actor=actor, critic=critic, head=head)


def _with_memory(
    observations: ObservationSpec, settings: NetworkSettings, head: nn.Module, width: int
) -> RecurrentActorCritic:
    encoder: nn.Module
    if observations.images:
        encoder = image_encoder(observations, settings)
        features = encoder.width
    else:
        layers = (observations.width, *settings.hidden)
        encoder, features = perceptron(layers, settings.activation, output_gain=None), layers[-1]
    kind = nn.LSTM if settings.recurrent == "lstm" else nn.GRU
    memory = kind(features, settings.recurrent_width, batch_first=True)
    for name, parameter in memory.named_parameters():
        if name.startswith("weight"):
            nn.init.orthogonal_(parameter)
        else:
            nn.init.zeros_(parameter)
    H = settings.recurrent_width
    return RecurrentActorCritic(
        encoder=encoder,
        memory=memory,
        actor=perceptron((H, width), settings.activation, output_gain=0.01),
        critic=perceptron((H, 1), settings.activation, output_gain=1.0),
        head=head,
    )


def image_encoder(observations: ObservationSpec, settings: NetworkSettings) -> ImageEncoder:
    """Return the encoder of images, and of the numbers beside them."""
    numbers = observations.width
    before = NATURE_WIDTH * len(observations.images) + numbers
    hidden = perceptron((before, *settings.hidden), settings.activation, output_gain=None) if numbers else None
    width = settings.hidden[-1] if numbers and settings.hidden else before
    return ImageEncoder(sizes=tuple(image.size for image in observations.images), hidden=hidden, width=width)


def _from_factory(name: str, observations: ObservationSpec, actions: ActionSpec) -> ControlPolicy:
    module, _, function = name.partition(":")
    try:
        build = getattr(importlib.import_module(module), function)
    except (Exception, SystemExit) as error:  # a module runs the user's code when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError.of("network.factory", name, "an importable module:function", reason) from error
    try:
        policy = build(observations, actions)
    except (Exception, SystemExit) as error:
        reason = f"it raised {type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError.of("network.factory", name, "a function of (observations, actions)", reason) from error
    if not isinstance(policy, ControlPolicy):
        expected = "a function that returns a bridle.control.ControlPolicy (ActorCritic takes any modules)"
        raise ConfigError.of("network.factory", name, expected, f"it returned {type(policy).__name__}")
    return policy if observations.images else quickened(policy, observations.width)
