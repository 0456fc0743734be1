"""The policy: an actor and a critic over what is observed, on one trunk or on two, picked from the spaces."""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.batch import Evaluation
from bridle.control.distributions import (
    Bernoulli,
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
    SquashedGaussian,
)
from bridle.control.images import NATURE_WIDTH, ImageEncoder
from bridle.control.observations import Observations
from bridle.control.policy import ControlPolicy, Transitions
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
    "ActorCritic",
    "BernoulliHead",
    "CategoricalHead",
    "GaussianHead",
    "MultiCategoricalHead",
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
    factory: str | None = None
    """"module:function" that builds another policy from (observations, actions); the other fields are then unused."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if any(width < 1 for width in self.hidden):
            raise ConfigError.of("hidden", self.hidden, "widths >= 1")
        if self.activation not in ("tanh", "relu"):
            raise ConfigError.of("activation", self.activation, '"tanh" or "relu"')
        if self.std not in ("parameter", "state"):
            raise ConfigError.of("std", self.std, '"parameter" or "state"')
        if not math.isfinite(self.initial_log_std):
            raise ConfigError.of("initial_log_std", self.initial_log_std, "a finite number")
        if self.factory is not None and (self.factory.count(":") != 1 or not all(self.factory.split(":"))):
            raise ConfigError.of("factory", self.factory, '"module:function"')


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


class ActorCritic(ControlPolicy):
    """A memoryless policy made of any modules.

    ``trunk`` (or, without one, ``actor`` and ``critic``) is given the vector [n, D] where the observations hold no images, and
    the :class:`Observations` whole where they do: images as uint8, which a network divides by 255 itself. ``actor`` and
    ``critic`` [n, 1] read what the trunk gives; ``head`` makes a distribution of what the actor gives and the action mask.

        policy = ActorCritic(actor=nn.Linear(4, 2), critic=nn.Linear(4, 1), head=CategoricalHead())
    """

    def __init__(self, *, actor: nn.Module, critic: nn.Module, head: nn.Module, trunk: nn.Module | None = None) -> None:
        super().__init__()
        self.trunk = trunk if trunk is not None else nn.Identity()
        self.actor = actor
        self.critic = critic
        self.head = head

    def forward(self, units: Transitions) -> Evaluation:
        """Evaluate the actions taken, with one pass through the trunk."""
        features = self.trunk(units.observations.inputs)
        distribution = cast(Distribution, self.head(self.actor(features), units.observations.mask))
        return Evaluation(
            logp=distribution.log_prob(units.actions),
            entropy=distribution.entropy(),
            value=self.critic(features).squeeze(-1),
        )

    def distribution(self, observations: Observations, state: Tensor | None) -> tuple[Distribution, Tensor | None]:
        """π(· | s) for n states."""
        outputs = self.actor(self.trunk(observations.inputs))
        return cast(Distribution, self.head(outputs, observations.mask)), state

    def values(self, observations: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return."""
        return cast(Tensor, self.critic(self.trunk(observations.inputs)).squeeze(-1))

    def play(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Squash the actions if the head says so."""
        return squashed(self.head, actions)


def squashed(head: nn.Module, actions: NDArray[Any]) -> NDArray[Any]:
    """Return what is played of the actions of ``head``."""
    return np.tanh(actions) if isinstance(head, GaussianHead) and head.squash else actions


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
        shared = settings.shared_trunk if settings.shared_trunk is not None else bool(observations.images)
        if observations.images:
            return _on_images(observations, settings, head, width, shared=shared)
        layers, kind = (observations.width, *settings.hidden), settings.activation
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
        return ActorCritic(trunk=trunk, actor=actor, critic=critic, head=head)
    own, other = encoder(), encoder()
    actor = nn.Sequential(own, perceptron((own.width, width), settings.activation, output_gain=0.01))
    critic = nn.Sequential(other, perceptron((other.width, 1), settings.activation, output_gain=1.0))
    return ActorCritic(actor=actor, critic=critic, head=head)


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
    except (ImportError, AttributeError) as error:
        raise ConfigError.of("factory", name, "an importable module:function", str(error)) from error
    policy = build(observations, actions)
    if not isinstance(policy, ControlPolicy):
        expected = "a function that returns a bridle.control.ControlPolicy (ActorCritic takes any modules)"
        raise ConfigError.of("factory", name, expected, f"it returned {type(policy).__name__}")
    return policy
