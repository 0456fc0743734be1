"""A memoryless policy made of any modules: an actor and a critic, on one trunk or on two."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.batch import Evaluation
from bridle.control.descending import descend_by_autograd
from bridle.control.distributions import Distribution
from bridle.control.heads import CategoricalHead, GaussianHead, by_hand, squashed
from bridle.control.observations import Observations
from bridle.control.policy import Acted, ControlPolicy, Transitions
from bridle.guards import is_observed, is_watched
from bridle.learn.descent import ClippedTerms, Descended, Descends
from bridle.learn.minibatches import Minibatches
from bridle.learn.optim import FlatAdam
from bridle.learn.step import OnePass

__all__ = ["ActorCritic", "ImageActorCritic"]


class ActorCritic(ControlPolicy, Descends):
    """A memoryless policy made of any modules.

    ``trunk`` (or, without one, ``actor`` and ``critic``) is given the vector [n, D] where the observations hold no images, and
    the :class:`Observations` whole where they do: images as uint8, which a network divides by 255 itself. ``actor`` and
    ``critic`` [n, 1] read what the trunk gives; ``head`` makes a distribution of what the actor gives and the action mask.

        policy = ActorCritic(actor=nn.Linear(4, 2), critic=nn.Linear(4, 1), head=CategoricalHead())
    """

    _known_vjp: ClassVar[Any] = None
    """The way to the gradient by hand, if there is one, that gives what autograd does."""

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

    def descend(self, units: Transitions, parts: Minibatches, terms: ClippedTerms, adam: FlatAdam) -> Descended | None:
        """Take steps with autograd for the modules, and compiled code for the rest; see :class:`bridle.learn.descent.Descends`.

        None where :meth:`forward`, the way to the gradient or the head is another one, actions are masked, or somebody looks
        on at either.
        """
        known = self._evaluates_plainly() and type(self.head) in (CategoricalHead, GaussianHead)
        watched = is_observed() or is_watched(self) or is_watched(self.head) or not torch.is_grad_enabled()
        if not known or watched or not by_hand(self.head) or units.observations.mask is not None:
            return None
        spread = self.head._parameters.get("log_std")
        return descend_by_autograd(self._as_before, self._answers, units, parts, spread, terms, adam)

    def _evaluates_plainly(self) -> bool:
        """Whether what :meth:`forward` gives, by autograd, is what this policy learns from."""
        kind = type(self)
        called = kind.__call__ is nn.Module.__call__ and self._compiled_call_impl is None
        forward, vjp = kind.forward is ActorCritic.forward, getattr(kind, "vjp", None) is kind._known_vjp
        return called and forward and vjp and not isinstance(self, OnePass)

    def _as_before(self) -> Callable[[], None]:
        """Return what puts PyTorch's draws and the buffers back to what they are now."""
        draws, buffers = torch.get_rng_state(), [(own, own.clone()) for own in self.buffers()]

        def back() -> None:
            torch.set_rng_state(draws)
            for own, was in buffers:
                own.copy_(was)

        return back

    def _answers(self, observations: Observations) -> tuple[Float[Tensor, "n A"], Float[Tensor, "n 1"]]:
        """Return outputs of actor and critic in n states."""
        features = self.trunk(observations.inputs)
        return self.actor(features), self.critic(features)

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


class ImageActorCritic(ActorCritic):
    """An actor and a critic on one trunk over images, which is nearly all that a pass costs: acting says values as well."""

    def act(self, observations: Observations, state: Tensor | None, draws: np.random.Generator | None) -> Acted:
        """Act in n states, as :meth:`ControlPolicy.act` does, and say what they are worth."""
        features = self.trunk(observations.inputs)
        distribution = cast(Distribution, self.head(self.actor(features), observations.mask))
        actions = distribution.mode() if draws is None else distribution.draw(draws)
        logp, value = distribution.log_prob(actions), self.critic(features).squeeze(-1)
        return Acted(actions=actions, logp=logp, state=state, value=value)
