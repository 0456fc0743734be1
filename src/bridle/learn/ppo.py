"""Proximal policy optimisation: epochs of clipped minibatch steps on a rollout (Schulman et al. 2017, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridle.batch import Batch, Evaluation, Policy, Units
from bridle.core.divergence import kl_k2, kl_k2_grad, kl_k3, kl_k3_grad
from bridle.core.losses import (
    clipped_surrogate_loss,
    clipped_surrogate_loss_grad,
    clipped_value_loss,
    clipped_value_loss_grad,
    ratio_loss,
    ratio_loss_grad,
    value_loss,
    value_loss_grad,
)
from bridle.core.moments import masked_var, whiten
from bridle.errors import ConfigError, NonFiniteStep
from bridle.learn.descent import ClippedTerms, steps_ahead
from bridle.learn.memory import MicroBudget, within_memory
from bridle.learn.minibatches import epoch_order, minibatches
from bridle.learn.optim import Optimiser
from bridle.learn.record import UpdateStep
from bridle.learn.step import (
    Averaging,
    Evidence,
    Minibatch,
    Seen,
    Slopes,
    accumulate,
    add_loss,
    padding_share,
    require_finite,
)

__all__ = ["PPOObjective", "PPOSettings", "update"]

_LEAST_DEVIATION = 1e-6
"""Advantages that deviate by less than this share of their size carry no signal, only rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOSettings:
    """The clipped objective and how often each rollout is passed over."""

    epochs: int = 4
    """Passes over each rollout."""
    minibatches: int = 4
    """Optimiser steps per pass; every one is taken."""
    micro_batch_tokens: int | None = None
    """At most this many tokens (units × longest unit) in one forward pass; None takes a minibatch whole. The result
    does not depend on it beyond rounding."""
    clip: float | None = 0.2
    """ε: the ratio is held to [1 − ε, 1 + ε]; None is the unclipped objective."""
    clip_high: float | None = None
    """Upper ε, where it should differ from the lower one."""
    dual_clip: float | None = None
    """c > 1: bounds the loss of an action with negative advantage by c·|A| (Ye et al. 2020, eq. 5)."""
    value_clip: float | None = None
    """The critic's clip range around its old value, in units of return; None for the plain squared error."""
    value_coefficient: float = 1.0
    """Weight of ½(V − R)² beside the policy's loss."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus per nat, beside advantages as they are used: whitened ones, by default."""
    target_kl: float | None = None
    """The update ends before a step once the mean k3 KL(old ‖ new) of its minibatch exceeds this, nats per action."""
    whiten: Literal["batch", "minibatch", "none"] = "batch"
    """Over what the advantages are whitened."""
    per: Averaging = "action"
    """Mean over actions, or over episodes of each one's mean."""
    kl_loss: Literal["none", "exact", "k2", "k3"] = "none"
    """KL to the reference inside the loss. "exact" sums over all actions; "k2" has the right gradient on policy; "k3"
    is biased; k1 is not offered, since its on-policy gradient is zero on average."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ConfigError.of(name, getattr(self, name), "a whole number >= 1")
        if self.micro_batch_tokens is not None and self.micro_batch_tokens < 1:
            raise ConfigError.of("micro_batch_tokens", self.micro_batch_tokens, "a number of tokens >= 1")
        for name in ("clip", "clip_high", "value_clip", "target_kl"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError.of(name, value, "a number > 0", "leave it out to switch it off")
        if self.clip is not None and self.clip >= 1:
            raise ConfigError.of("clip", self.clip, "a number in (0, 1)")
        if self.clip is None and (self.clip_high is not None or self.dual_clip is not None):
            raise ConfigError.of("clip", None, "a number when clip_high or dual_clip is set", "set clip, e.g. 0.2")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ConfigError.of("dual_clip", self.dual_clip, "a number > 1")
        for name in ("value_coefficient", "entropy_coefficient"):
            if getattr(self, name) < 0:
                raise ConfigError.of(name, getattr(self, name), "a number >= 0")


def update(
    policy: Policy,
    batch: Batch,
    optimiser: Optimiser,
    settings: PPOSettings,
    *,
    seed: int,
    step: int,
    kl_coefficient: float = 0.0,
    critic_only: bool = False,
    extra_loss: Callable[[int, int | None], Iterable[Tensor]] | None = None,
    epochs: Sequence[int] | None = None,
    budget: MicroBudget | None = None,
) -> Iterator[UpdateStep]:
    """Take epochs × minibatches optimiser steps, yielding a record of each; a policy that :class:`Descends` takes them at once.

    Per action the loss is
    −min(r A, clip(r, 1−ε, 1+ε) A) + c_v ½(V − R)² − c_H H + β KL(π ‖ reference), averaged once over the minibatch.

    Args:
        policy: evaluated under gradients.
        batch: one rollout.
        optimiser: holds the policy's parameters, already scheduled for this run step.
        settings: the objective.
        seed: the run's seed; with ``step`` it keys the order of minibatches.
        step: the run's step, from 0.
        kl_coefficient: β of the KL in the loss, units of reward per nat whether or not advantages are whitened.
        critic_only: leave the policy's terms out (critic warm-up).
        extra_loss: given the count of steps taken so far in this update, and the tokens that one forward pass may hold, a
            mean loss to add (an SFT mix), in parts that are added up.
        epochs: the passes to take, numbered from 0; all of ``settings.epochs`` by default. A caller that prepares the
            batch anew between passes takes them one at a time.
        budget: in place of ``settings.micro_batch_tokens``: it shrinks where memory runs out.

    Raises:
        NonFiniteStep: a loss or gradient is not finite; that step was not applied.
    """
    require_finite(batch, settings.per)
    if settings.whiten != "none":
        kl_coefficient /= _unit(batch.advantages)
    if settings.whiten == "batch":
        batch = replace(batch, advantages=whiten(batch.advantages))
    objective = PPOObjective(settings=settings, kl_coefficient=kl_coefficient, critic_only=critic_only)
    optimiser.zero_grad()
    epochs = range(settings.epochs) if epochs is None else epochs
    parts = minibatches(
        batch,
        settings.minibatches,
        orders=[epoch_order(len(batch.units), seed=seed, step=step, epoch=epoch) for epoch in epochs],
        whiten_here=settings.whiten == "minibatch",
        per=settings.per,
    )
    held = settings.micro_batch_tokens if budget is None else budget
    looks = extra_loss is not None or settings.target_kl is not None  # between one step and the next
    terms = objective.clipped_terms if held is None and not looks else None
    ahead = steps_ahead(policy, batch.units, parts, terms, optimiser)
    stepping = _Stepping(
        policy=policy,
        optimiser=optimiser,
        objective=objective,
        budget=held,
        extra_loss=None if critic_only else extra_loss,
    )
    for taken, (epoch, number) in enumerate(product(epochs, range(settings.minibatches))):
        record = partial(UpdateStep, epoch=epoch, minibatch=number, objective=objective)
        if taken < len(ahead):
            seen, norms = ahead[taken]
            yield record(part=parts.parts[taken], seen=seen, grad_norms=norms)
            continue
        done = stepping.take(record, taken, *parts.at(taken))
        yield done
        if not done.applied:
            return


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stepping:
    """What steps are taken with that a policy does not take by itself."""

    policy: Policy
    optimiser: Optimiser
    objective: PPOObjective
    budget: MicroBudget | int | None
    extra_loss: Callable[[int, int | None], Iterable[Tensor]] | None

    def take(
        self, record: Callable[..., UpdateStep], taken: int, rows: Int[Tensor, " M"], units: Units, part: Minibatch
    ) -> UpdateStep:
        """Step on a minibatch, or leave the weights where the target KL is passed; ``taken`` steps went before."""
        backward = partial(self._accumulate, units, part)
        try:
            seen = within_memory(self.budget, units.lengths, backward, self.optimiser.zero_grad)
            tokens = self.budget.tokens if isinstance(self.budget, MicroBudget) else self.budget
            padding = None if tokens is None else padding_share(units.lengths, tokens)
            record = partial(record, part=part, seen=seen, padding_share=padding)
            if self._passed(record):
                self.optimiser.zero_grad()
                return record(applied=False)
            extra = self._add_extra(taken, rows, units, backward)
            return record(extra_loss=extra, grad_norms=self.optimiser.step(rows))
        except NonFiniteStep as fault:
            self.optimiser.zero_grad()
            evidence = Evidence(units=units, minibatch=part, objective=self.objective, taken=taken)
            raise fault.seen_on(tuple(rows.tolist()), evidence) from None

    def _accumulate(self, units: Units, part: Minibatch, tokens: int | None) -> Seen:
        return accumulate(self.policy, units, part, self.objective, micro_budget=tokens)

    def _passed(self, record: Callable[..., UpdateStep]) -> bool:
        most = self.objective.settings.target_kl
        return most is not None and not self.objective.critic_only and record().old_kl > most

    def _add_extra(
        self, taken: int, rows: Int[Tensor, " M"], units: Units, backward: Callable[[int | None], Seen]
    ) -> float:
        """Add the extra loss's gradient to that of the minibatch, which is taken anew where memory runs out meanwhile."""
        if self.extra_loss is None:
            return 0.0
        extra_loss, whole = self.extra_loss, True

        def attempt(tokens: int | None) -> float:
            nonlocal whole
            if not whole:
                backward(tokens)
            whole = False
            return add_loss(extra_loss(taken, tokens), rows)

        return within_memory(self.budget, units.lengths, attempt, self.optimiser.zero_grad)


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOObjective:
    """−min(r A, clip(r, 1−ε, 1+ε) A) + c_v ½(V − R)² − c_H H + β KL(π ‖ reference) for each action.

    Source: Schulman et al. 2017, eqs. (7) and (9), with their signs turned.
    """

    settings: PPOSettings
    """ε, coefficients and kinds of terms."""
    kl_coefficient: float
    """β, units of the advantages as they are used per nat."""
    critic_only: bool
    """Only the critic's term."""

    def loss(self, e: Evaluation, m: Minibatch) -> Float[Tensor, " n"]:
        """Return the loss as written; see :class:`bridle.learn.step.Objective`."""
        s = self.settings
        if s.value_clip is None:
            critic = value_loss(e.value, m.returns)
        else:
            critic = clipped_value_loss(e.value, m.old_value, m.returns, clip=s.value_clip)
        total = s.value_coefficient * critic
        if self.critic_only:
            return total
        total = total + self._surrogate(e.logp, m) - s.entropy_coefficient * e.entropy
        if self._leashed:
            total = total + self.kl_coefficient * self._kl(e.logp, e.exact_kl, m)
        return total

    def derivatives(self, seen: Seen, m: Minibatch) -> Slopes:
        """Return the loss's derivatives in closed form."""
        s = self.settings
        if s.value_clip is None:
            value = value_loss_grad(seen.value, m.returns)
        else:
            value = clipped_value_loss_grad(seen.value, m.old_value, m.returns, clip=s.value_clip)
        value = s.value_coefficient * value
        if self.critic_only:
            return Slopes(value=value)
        logp = self._surrogate_grad(seen.logp, m)
        entropy = torch.full_like(seen.entropy, -s.entropy_coefficient) if s.entropy_coefficient else None
        exact = None
        if self._leashed and s.kl_loss == "exact":
            exact = torch.full_like(_needed(seen.exact_kl), self.kl_coefficient)
        elif self._leashed:
            estimator = kl_k2_grad if s.kl_loss == "k2" else kl_k3_grad
            logp = logp + self.kl_coefficient * estimator(seen.logp, _reference(m))
        return Slopes(logp=logp, entropy=entropy, value=value, exact_kl=exact)

    def policy_loss(self, seen: Seen, m: Minibatch) -> Float[Tensor, " n"]:
        """Return the surrogate's loss."""
        return self._surrogate(seen.logp, m)

    def clipped(self, seen: Seen, m: Minibatch) -> Bool[Tensor, " n"]:
        """Where the clip has cut the action's gradient: the closed form is 0 though the advantage is not."""
        if self.settings.clip is None:
            return torch.zeros_like(seen.logp, dtype=torch.bool)
        return (self._surrogate_grad(seen.logp, m) == 0) & (m.advantages != 0)

    def kl_penalty(self, seen: Seen, m: Minibatch) -> Float[Tensor, " n"] | None:
        """Return the KL term before its coefficient, nats; None without one."""
        return None if self.settings.kl_loss == "none" else self._kl(seen.logp, seen.exact_kl, m)

    @property
    def clipped_terms(self) -> ClippedTerms | None:
        """The loss as three terms; None where the policy's is clipped twice or not at all, the critic's is, or a KL is in."""
        s = self.settings
        if s.clip is None or s.dual_clip is not None or s.value_clip is not None or self.critic_only or self._leashed:
            return None
        high = s.clip if s.clip_high is None else s.clip_high
        return ClippedTerms(low=1.0 - s.clip, high=1.0 + high, value=s.value_coefficient, entropy=s.entropy_coefficient)

    @property
    def _leashed(self) -> bool:
        return self.settings.kl_loss != "none" and self.kl_coefficient != 0.0

    def _surrogate(self, logp: Float[Tensor, " n"], m: Minibatch) -> Float[Tensor, " n"]:
        s = self.settings
        if s.clip is None:
            return ratio_loss(logp, m.old_logp, m.advantages)
        return clipped_surrogate_loss(
            logp, m.old_logp, m.advantages, clip=s.clip, clip_high=s.clip_high, dual_clip=s.dual_clip
        )

    def _surrogate_grad(self, logp: Float[Tensor, " n"], m: Minibatch) -> Float[Tensor, " n"]:
        s = self.settings
        if s.clip is None:
            return ratio_loss_grad(logp, m.old_logp, m.advantages)
        return clipped_surrogate_loss_grad(
            logp, m.old_logp, m.advantages, clip=s.clip, clip_high=s.clip_high, dual_clip=s.dual_clip
        )

    def _kl(self, logp: Float[Tensor, " n"], exact: Float[Tensor, " n"] | None, m: Minibatch) -> Float[Tensor, " n"]:
        if self.settings.kl_loss == "exact":
            return _needed(exact)
        estimator = kl_k2 if self.settings.kl_loss == "k2" else kl_k3
        return estimator(logp, _reference(m))


def _unit(advantages: Float[Tensor, " N"]) -> float:
    """Units of reward in one unit of whitened advantage, their deviation, so that β stays reward per nat; 1 without signal."""
    if len(advantages) == 0:
        return 1.0
    deviation = float(masked_var(advantages)) ** 0.5
    return deviation if deviation > _LEAST_DEVIATION * float(advantages.abs().max()) else 1.0


def _needed(exact: Tensor | None) -> Tensor:
    if exact is None:
        raise ValueError("kl_loss='exact' needs a policy that evaluates the KL to its reference")
    return exact


def _reference(m: Minibatch) -> Tensor:
    if m.ref_logp is None:
        raise ValueError("kl_loss='k2' and 'k3' need ref_logp in the batch")
    return m.ref_logp
