"""Trust region policy optimisation: the method that clipping simplifies (Schulman et al. 2015).

Each rollout gives one step of the actor, the best one to first order inside a region of the old policy's distributions:

    maximise E[π(a|s)/π_old(a|s) · A]   subject to   E[KL(π_old(·|s) ‖ π(·|s))] ≤ δ        (eq. 14)

The direction solves Hx = g by conjugate gradients, H the Fisher information matrix; its length lets the quadratic model
of the KL reach δ; then it is shortened until the objective itself rises and the KL itself is within δ (Appendix C). The
critic learns apart from it, by regression on the returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bridle.batch import Batch, Policy, Units
from bridle.core.losses import ratio_loss
from bridle.core.moments import whiten
from bridle.core.natural import conjugate_gradient, curvature_product, flat_gradient, trust_region_length
from bridle.errors import ConfigError, NonFiniteStep
from bridle.learn import ppo
from bridle.learn.minibatches import minibatches
from bridle.learn.optim import Optimiser
from bridle.learn.ppo import PPOObjective, PPOSettings
from bridle.learn.record import TrustRegion, UpdateStep
from bridle.learn.step import Evidence, Seen, require_finite

__all__ = ["TRPOSettings", "TrustRegionPolicy", "update"]

_TOLERANCE = 1e-6
"""‖g − Hx‖ / ‖g‖ below which further products add rounding only."""

_SURROGATE = PPOSettings(clip=None, whiten="none")
"""The objective that the actor's record says: −E[r A]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TRPOSettings:
    """The trust region, how its step is found, and how the critic learns beside it."""

    max_kl: float = 0.01
    """δ: the mean KL(old ‖ new) that one update may reach, nats per action."""
    cg_iterations: int = 10
    """Products with the Fisher matrix that the direction may take."""
    cg_damping: float = 0.1
    """Added to the Fisher matrix's diagonal: shortens the step in directions that the policy hardly depends on."""
    line_search_steps: int = 10
    """Lengths to try, from the full step down; if none will do, the actor stays as it is."""
    line_search_shrink: float = 0.8
    """Each length over the one before it, in (0, 1)."""
    critic_epochs: int = 10
    """The critic's passes over each rollout."""
    critic_minibatches: int = 4
    """Its optimiser steps per pass."""
    whiten: bool = True
    """Whiten the advantages over the rollout. The step's length does not depend on their size, its direction does on
    their mean."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("cg_iterations", "line_search_steps", "critic_epochs", "critic_minibatches"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number >= 1")
        if not (math.isfinite(self.max_kl) and self.max_kl > 0):
            raise ConfigError.of("max_kl", self.max_kl, "a finite number of nats > 0", "0.01 is usual")
        if not (math.isfinite(self.cg_damping) and self.cg_damping >= 0):
            raise ConfigError.of("cg_damping", self.cg_damping, "a finite number >= 0")
        if not 0 < self.line_search_shrink < 1:
            raise ConfigError.of("line_search_shrink", self.line_search_shrink, "a number in (0, 1)")


class TrustRegionPolicy(Policy, Protocol):
    """A policy whose actor is apart from its critic, and which knows the KL between two states of itself."""

    def actor_parameters(self) -> Mapping[str, nn.Parameter]:
        """Name → parameter: all that π depends on; V depends on none of them."""
        ...

    def freeze(self, units: Units) -> Any:
        """The present π(· | s) in every state of ``units``, as constants."""
        ...

    def kl(self, units: Units, frozen: Any) -> Float[Tensor, " n"]:
        """KL(frozen ‖ present) in every state of ``units``, nats, over all actions; differentiable twice."""
        ...


def update(
    policy: TrustRegionPolicy, batch: Batch, optimiser: Optimiser, settings: TRPOSettings, *, seed: int, step: int
) -> Iterator[UpdateStep]:
    """Move the actor once inside the trust region, then the critic by epochs × minibatches optimiser steps.

    The first record is the actor's, with its ``trust_region``. It is not ``applied`` if no length raised the surrogate
    within the region, and then no parameter of the actor has changed. The others are the critic's.

    Args:
        policy: with its actor apart from its critic.
        batch: one rollout; the actor's step takes it whole.
        optimiser: holds the critic's parameters and none of the actor's, already scheduled for this run step.
        settings: the region, and the critic's passes.
        seed: the run's seed; with ``step`` it keys the order of the critic's minibatches.
        step: the run's step, from 0.

    Raises:
        ConfigError: the critic depends on the actor's parameters.
        ValueError: the optimiser holds a parameter of the actor.
        NonFiniteStep: the surrogate's gradient or a value loss is not finite; that step was not applied.
    """
    actor = list(policy.actor_parameters().values())
    still = [name for name, parameter in policy.actor_parameters().items() if not parameter.requires_grad]
    if still:
        raise ConfigError(
            f"{still[0]} of the actor is frozen (requires_grad is False), and TRPO moves the actor as a whole; "
            "unfreeze it, leave it out of the module, or take algorithm ppo"
        )
    moved = {id(parameter) for group in optimiser.groups for parameter in group.parameters.values()}
    if moved & {id(parameter) for parameter in actor}:
        raise ValueError("the optimiser holds a parameter of the actor, which moves by the trust region alone")
    require_finite(batch)
    if settings.whiten:
        batch = replace(batch, advantages=whiten(batch.advantages))
    yield _actor_step(policy, actor, batch, settings)
    critic = PPOSettings(
        epochs=settings.critic_epochs, minibatches=settings.critic_minibatches, clip=None, whiten="none"
    )
    # epoch 0 is the actor's
    epochs = range(1, settings.critic_epochs + 1)
    yield from ppo.update(policy, batch, optimiser, critic, seed=seed, step=step, critic_only=True, epochs=epochs)


def _actor_step(
    policy: TrustRegionPolicy, actor: Sequence[nn.Parameter], batch: Batch, settings: TRPOSettings
) -> UpdateStep:
    """Take the natural gradient step, shortened as far as it must be."""
    ((rows, units, part),) = minibatches(batch, 1, orders=[None], whiten_here=False, per="action")
    frozen = policy.freeze(units)
    _check_apart(policy(units).value, actor)
    evaluation = policy(units)
    before = ratio_loss(evaluation.logp, part.old_logp, part.advantages).mean()
    gradient = -flat_gradient(before, actor)
    if not bool(torch.isfinite(gradient).all()):
        sizes = [parameter.numel() for parameter in actor]
        names = [name for name, parameter in policy.actor_parameters().items()]
        pieces = zip(names, torch.split(gradient, sizes), strict=True)
        wrong = tuple(name for name, piece in pieces if not bool(torch.isfinite(piece).all()))
        fault = NonFiniteStep("the gradient of the actor", tuple(rows.tolist()), parameters=wrong)
        objective = PPOObjective(settings=_SURROGATE, kl_coefficient=0.0, critic_only=False)
        fault.evidence = Evidence(units=units, minibatch=part, objective=objective)
        raise fault
    product = curvature_product(policy.kl(units, frozen).mean(), actor, damping=settings.cg_damping)
    found = conjugate_gradient(product, gradient, iterations=settings.cg_iterations, tolerance=_TOLERANCE)
    curvature = float(found.x @ (gradient - found.residual))
    # without advantages, or where π depends on nothing, there is no direction to follow
    length = trust_region_length(curvature, radius=settings.max_kl) if curvature > 0 else 0.0
    full = length * found.x

    @torch.no_grad()
    def judge() -> tuple[float, float]:
        after = ratio_loss(policy(units).logp, part.old_logp, part.advantages).mean()
        return float(before - after), float(policy.kl(units, frozen).mean())

    taken = _line_search(actor, full, judge, settings)
    size = float(gradient.norm())
    return UpdateStep(
        epoch=0,
        minibatch=0,
        objective=PPOObjective(settings=_SURROGATE, kl_coefficient=0.0, critic_only=False),
        part=part,
        seen=Seen.of(evaluation),
        applied=taken.share > 0,
        grad_norms={"actor": size},
        trust_region=TrustRegion(
            kl=taken.kl,
            improvement=taken.improvement,
            predicted_improvement=float(gradient @ full),
            share=taken.share,
            lengths_tried=taken.tried,
            residual=float(found.residual.norm()) / size if size > 0 else 0.0,
            iterations=found.iterations,
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Taken:
    """Where the line search ended."""

    share: float = 0.0
    kl: float = 0.0
    improvement: float = 0.0
    tried: int


def _line_search(
    actor: Sequence[nn.Parameter],
    full: Float[Tensor, " P"],
    judge: Callable[[], tuple[float, float]],
    settings: TRPOSettings,
) -> _Taken:
    """Move the actor by the longest of ``full``, shrink · full, shrink² · full, … that improves within the region.

    ``judge`` says (improvement, KL) under the present parameters. If no length will do, they are put back as they were.
    """
    if not bool(full.any()):
        return _Taken(tried=0)
    start = [parameter.detach().clone() for parameter in actor]
    parts = torch.split(full, [parameter.numel() for parameter in actor])
    steps = [part.view_as(parameter) for part, parameter in zip(parts, actor, strict=True)]
    share = 1.0
    for tried in range(1, settings.line_search_steps + 1):
        _place(actor, [old + share * step for old, step in zip(start, steps, strict=True)])
        improvement, kl = judge()
        if improvement > 0 and kl <= settings.max_kl:
            return _Taken(share=share, kl=kl, improvement=improvement, tried=tried)
        share *= settings.line_search_shrink
    _place(actor, start)
    return _Taken(tried=settings.line_search_steps)


@torch.no_grad()
def _place(actor: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(actor, values, strict=True):
        parameter.copy_(value)


def _check_apart(value: Float[Tensor, " N"], actor: Sequence[nn.Parameter]) -> None:
    """Refuse a critic that moves when the actor does: its loss would change behind its back, and the KL behind the actor's."""
    if value.requires_grad and bool(flat_gradient(value.sum(), actor).any()):
        raise ConfigError(
            "the critic depends on the actor's parameters: TRPO moves the actor by the trust region alone; "
            "give actor and critic networks of their own (network.shared_trunk=False)"
        )
