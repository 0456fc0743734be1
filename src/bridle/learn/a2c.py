"""Advantage actor–critic, the plain one of the textbook: one step on each rollout.

Sutton & Barto (2nd ed.), §13.5: θ moves along A ∇ log π(a|s), w along (R − V) ∇V. With ``n_steps=1`` and estimator "td"
this is one-step actor–critic; with a longer rollout it is the synchronous form of Mnih et al. 2016.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.batch import Batch, Evaluation, Policy
from bridle.core.losses import policy_gradient_loss, policy_gradient_loss_grad, value_loss, value_loss_grad
from bridle.errors import ConfigError, NonFiniteStep
from bridle.learn.minibatches import minibatches
from bridle.learn.optim import Optimiser
from bridle.learn.record import UpdateStep
from bridle.learn.step import Averaging, Evidence, Minibatch, Seen, Slopes, accumulate

__all__ = ["A2CObjective", "A2CSettings", "update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class A2CSettings:
    """The plain actor–critic objective."""

    micro_batch_tokens: int | None = None
    """At most this many tokens (units × longest unit) in one forward pass; None takes the rollout whole."""
    value_coefficient: float = 1.0
    """Weight of ½(V − R)² beside the policy's loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus per nat, beside advantages as they are used."""
    whiten: bool = False
    """Whiten the advantages over the rollout; a rollout of one action would lose its whole signal."""
    per: Averaging = "action"
    """Mean over actions, or over episodes of each one's mean."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("value_coefficient", "entropy_coefficient"):
            if getattr(self, name) < 0:
                raise ConfigError.of(name, getattr(self, name), "a number >= 0")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ConfigError.of("micro_batch_tokens", self.micro_batch_tokens, "a number of tokens >= 1")


def update(policy: Policy, batch: Batch, optimiser: Optimiser, settings: A2CSettings) -> Iterator[UpdateStep]:
    """Take the one optimiser step that a fresh rollout allows, and yield its record.

    Per action the loss is −A log π(a|s) + c_v ½(V − R)² − c_H H, averaged once over the rollout.

    Raises:
        NonFiniteStep: a loss or gradient is not finite; the step was not applied.
    """
    objective = A2CObjective(settings=settings)
    for rows, units, part in minibatches(batch, 1, orders=[None], whiten_here=settings.whiten, per=settings.per):
        optimiser.zero_grad()
        try:
            seen = accumulate(policy, units, part, objective, micro_budget=settings.micro_batch_tokens)
            norms = optimiser.step(rows)
        except NonFiniteStep as fault:
            optimiser.zero_grad()
            evidence = Evidence(units=units, minibatch=part, objective=objective)
            raise fault.seen_on(tuple(rows.tolist()), evidence) from None
        yield UpdateStep(epoch=0, minibatch=0, objective=objective, part=part, seen=seen, grad_norms=norms)


@dataclass(frozen=True, slots=True, kw_only=True)
class A2CObjective:
    """−A log π(a|s) + c_v ½(V − R)² − c_H H for each action."""

    settings: A2CSettings
    """The coefficients."""

    def loss(self, e: Evaluation, m: Minibatch) -> Float[Tensor, " n"]:
        """Return the loss as written; see :class:`bridle.learn.step.Objective`."""
        s = self.settings
        actor = policy_gradient_loss(e.logp, m.advantages) - s.entropy_coefficient * e.entropy
        return actor + s.value_coefficient * value_loss(e.value, m.returns)

    def derivatives(self, seen: Seen, m: Minibatch) -> Slopes:
        """Return the loss's derivatives in closed form."""
        s = self.settings
        return Slopes(
            logp=policy_gradient_loss_grad(seen.logp, m.advantages),
            entropy=torch.full_like(seen.entropy, -s.entropy_coefficient) if s.entropy_coefficient else None,
            value=s.value_coefficient * value_loss_grad(seen.value, m.returns),
        )

    def policy_loss(self, seen: Seen, m: Minibatch) -> Float[Tensor, " n"]:
        """Return −A log π(a|s)."""
        return policy_gradient_loss(seen.logp, m.advantages)

    def clipped(self, seen: Seen, m: Minibatch) -> Bool[Tensor, " n"]:
        """Nowhere: nothing is clipped."""
        return torch.zeros_like(seen.logp, dtype=torch.bool)

    def kl_penalty(self, seen: Seen, m: Minibatch) -> None:
        """There is no reference."""
        return
