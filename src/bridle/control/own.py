"""A user's own networks on the fast path of small agents, where they have been read as perceptrons."""

from __future__ import annotations

from typing import Self

import numpy as np
import torch
from torch import nn

from bridle.control.actor_critic import ActorCritic
from bridle.control.heads import CategoricalHead, GaussianHead, by_hand
from bridle.control.observations import Observations
from bridle.control.policy import Acting, ControlPolicy
from bridle.control.reading import Reading, can_be_read, read
from bridle.control.small import SmallActorCritic
from bridle.guards import has_followed_slopes, is_watched

__all__ = ["OwnPerceptrons", "quickened"]


class OwnPerceptrons(SmallActorCritic):
    """An actor and a critic of a user's own modules that compute perceptrons.

    They are read again before each rollout: if what they compute has changed since, or somebody looks on, they are run as
    they are until the next one.
    """

    def __init__(
        self, *, actor: nn.Module, critic: nn.Module, head: nn.Module, readings: tuple[Reading, Reading]
    ) -> None:
        """Take modules, what they were read as, and a head that :func:`by_hand` is true of."""
        ActorCritic.__init__(self, actor=actor, critic=critic, head=head)
        self._readings = readings
        self._as_read = False
        self._begin([(reading.form, reading.places) for reading in readings])

    @classmethod
    def of(cls, policy: ActorCritic, inputs: int) -> Self | None:
        """Return the same policy on the fast path; None where its modules, which read ``inputs`` numbers, are none."""
        known = (type(policy), type(policy.trunk)) == (ActorCritic, nn.Identity)
        ours = type(policy.head) in (CategoricalHead, GaussianHead) and by_hand(policy.head)
        if not (known and ours) or _noticed(policy):
            return None
        some = torch.zeros(2, inputs)
        if not all(can_be_read(net, some) for net in (policy.actor, policy.critic)):
            return None
        actor, critic = (read(net, some) for net in (policy.actor, policy.critic))
        if actor is None or critic is None or not _agree(actor, critic, policy.head):
            return None
        own = cls(actor=policy.actor, critic=policy.critic, head=policy.head, readings=(actor, critic))
        return own if own._nets.able else None

    def acting(self, first: Observations, steps: int, draws: np.random.Generator) -> Acting:
        """Begin a rollout of ``steps`` steps; all states are of the form of the ``first`` ones."""
        some, nets = first.vector[:2], (self.actor, self.critic)
        self._as_read = not _noticed(self) and all(
            reading.same(read(net, some)) for reading, net in zip(self._readings, nets, strict=True)
        )
        return super().acting(first, steps, draws)

    def _by_hand(self, observations: Observations) -> bool:
        return self._as_read and super()._by_hand(observations) and self._nets.able


def _noticed(policy: ActorCritic) -> bool:
    """Whether somebody looks on at what is neither actor nor critic."""
    return any(is_watched(own) or has_followed_slopes(own) for own in (policy, policy.trunk, policy.head))


def quickened(policy: ControlPolicy, inputs: int) -> ControlPolicy:
    """Return a user's own policy, on the fast path where its modules compute perceptrons of ``inputs`` numbers."""
    own = OwnPerceptrons.of(policy, inputs) if isinstance(policy, ActorCritic) else None
    return policy if own is None else own


def _agree(actor: Reading, critic: Reading, head: nn.Module) -> bool:
    """Whether both have no weight in common, and as many outputs as are asked for."""
    mine, its = actor.parameters, critic.parameters
    spread = head._parameters.get("log_std")
    outputs = len(its[-1]) == 1 and (spread is None or spread.shape == mine[-1].shape[:1])
    return outputs and not set(map(id, mine)) & set(map(id, its))
