"""One optimiser step's gradient: a minibatch of units, evaluated in micro-batches, normalised once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from bridle.batch import Batch, Evaluation, Policy, Units
from bridle.errors import NonFiniteStep

__all__ = [
    "Averaging",
    "Evidence",
    "HandDifferentiated",
    "Minibatch",
    "Objective",
    "OnePass",
    "Pullback",
    "Seen",
    "Slopes",
    "accumulate",
    "action_weights",
    "add_loss",
    "micro_batches",
    "padding_share",
    "pieces",
    "plain_vjp",
    "require_finite",
]

_PASS_TOKENS = 256
"""What a pass costs however little it reads, in tokens: some hundred calls, and every weight's gradient added to."""

Averaging = Literal["action", "episode"]
"""Mean over all actions (long answers weigh more), or over episodes of each episode's mean (an action in a long
answer weighs less)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What the objective reads of n actions besides the policy's own answer: all constants, in one order."""

    actions: Int[Tensor, " n"]
    """[n] positions in the rollout's flat batch."""
    old_logp: Float[Tensor, " n"]
    """[n] log-probability under the policy that acted, nats."""
    old_value: Float[Tensor, " n"]
    """[n] V(s_t) when the batch was prepared, in units of return."""
    advantages: Float[Tensor, " n"]
    """[n] as the objective sees them, whitened if so asked."""
    returns: Float[Tensor, " n"]
    """[n] the critic's targets, in units of return."""
    weights: Float[Tensor, " n"]
    """[n] what each action weighs in the mean; they sum to 1 over the minibatch."""
    ref_logp: Float[Tensor, " n"] | None
    """[n] log-probability under the reference, nats; None in a world without one."""

    def select(self, index: Int[Tensor, " m"] | slice) -> Self:
        """Return the actions at ``index``, in that order; a stretch of them shares memory."""
        return type(self)(
            actions=self.actions[index],
            old_logp=self.old_logp[index],
            old_value=self.old_value[index],
            advantages=self.advantages[index],
            returns=self.returns[index],
            weights=self.weights[index],
            ref_logp=None if self.ref_logp is None else self.ref_logp[index],
        )

    def split(self, lengths: Sequence[int]) -> list[Self]:
        """Return minibatches of so many actions each, which share memory with this one."""
        columns = [pieces(c, lengths) for c in (self.actions, self.old_logp, self.old_value, self.advantages)]
        columns += [pieces(self.returns, lengths), pieces(self.weights, lengths)]
        refs = [None] * len(lengths) if self.ref_logp is None else pieces(self.ref_logp, lengths)
        return [
            type(self)(
                actions=actions,
                old_logp=old_logp,
                old_value=old_value,
                advantages=advantages,
                returns=returns,
                weights=weights,
                ref_logp=ref_logp,
            )
            for actions, old_logp, old_value, advantages, returns, weights, ref_logp in zip(*columns, refs, strict=True)
        ]

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join minibatches end to end."""
        return cls(
            actions=torch.cat([p.actions for p in parts]),
            old_logp=torch.cat([p.old_logp for p in parts]),
            old_value=torch.cat([p.old_value for p in parts]),
            advantages=torch.cat([p.advantages for p in parts]),
            returns=torch.cat([p.returns for p in parts]),
            weights=torch.cat([p.weights for p in parts]),
            ref_logp=_joined([p.ref_logp for p in parts]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the forward passes over a minibatch answered, detached, in the minibatch's order."""

    logp: Float[Tensor, " n"]
    """[n] log π_new(a_t | s_t), nats."""
    entropy: Float[Tensor, " n"]
    """[n] nats."""
    value: Float[Tensor, " n"]
    """[n] V(s_t), in units of return."""
    exact_kl: Float[Tensor, " n"] | None = None
    """[n] KL to the reference over all actions, nats; None without a reference."""

    @classmethod
    def of(cls, e: Evaluation) -> Self:
        """Take an evaluation without its graph; copied, since an answer may be a view of a weight that is about to move."""
        kl = None if e.exact_kl is None else e.exact_kl.detach().clone()
        logp, entropy, value = e.logp.detach().clone(), e.entropy.detach().clone(), e.value.detach().clone()
        return cls(logp=logp, entropy=entropy, value=value, exact_kl=kl)

    @classmethod
    def cat(cls, parts: Sequence[Self]) -> Self:
        """Join what several passes saw end to end."""
        if len(parts) == 1:
            return parts[0]
        return cls(
            logp=torch.cat([p.logp for p in parts]),
            entropy=torch.cat([p.entropy for p in parts]),
            value=torch.cat([p.value for p in parts]),
            exact_kl=_joined([p.exact_kl for p in parts]),
        )

    def split(self, lengths: Sequence[int]) -> list[Self]:
        """Return the answers for so many actions each, which share memory with these."""
        columns = [pieces(column, lengths) for column in (self.logp, self.entropy, self.value)]
        kls = [None] * len(lengths) if self.exact_kl is None else pieces(self.exact_kl, lengths)
        return [
            type(self)(logp=logp, entropy=entropy, value=value, exact_kl=kl)
            for logp, entropy, value, kl in zip(*columns, kls, strict=True)
        ]

    def select(self, index: Int[Tensor, " m"]) -> Self:
        """Return the actions at ``index``, in that order."""
        kl = None if self.exact_kl is None else self.exact_kl[index]
        return type(self)(logp=self.logp[index], entropy=self.entropy[index], value=self.value[index], exact_kl=kl)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slopes:
    """∂ loss / ∂ each of the policy's answers, per action; None where the loss does not hold the answer."""

    logp: Float[Tensor, " n"] | None = None
    """[n] units of loss per nat."""
    entropy: Float[Tensor, " n"] | None = None
    """[n] units of loss per nat."""
    value: Float[Tensor, " n"] | None = None
    """[n] units of loss per unit of return."""
    exact_kl: Float[Tensor, " n"] | None = None
    """[n] units of loss per nat."""


Pullback = Callable[[Slopes], None]
"""Given ∂ loss / ∂ each answer, adds the gradient of Σ_i loss_i to that of the weights; to be called once at most."""


class HandDifferentiated(ABC):
    """A policy that writes its own backward pass, rather than leave it to autograd."""

    @abstractmethod
    def vjp(self, units: Any) -> tuple[Seen, Pullback]:
        """Evaluate the units' actions, and return the vector–Jacobian product that carries slopes to the weights.

        The answers carry no graph and share no memory with anything that changes.
        """


Weighed = Callable[[Seen, slice], Slopes]
"""Given answers to a stretch of the actions, ∂ loss / ∂ each of them, the actions' weights included. A slope depends on
the answer of its own name alone, so an answer that is not there yet may be any number."""


class OnePass(ABC):
    """A policy that takes the loss's slopes while it answers, so that it need keep nothing for a backward pass."""

    @abstractmethod
    def differentiate(self, units: Any, slopes: Weighed) -> Seen:
        """Add the gradient of Σ_i loss_i over the units' actions to that of the weights; return the answers."""


class Objective(Protocol):
    """A loss per action as a function of the policy's answers, with its closed-form derivatives.

    ``loss`` is the oracle of ``derivatives``: what autograd makes of the one is the other. Training reads the second.
    It is a sum of terms that read one of the answers each.
    """

    def loss(self, e: Evaluation, m: Minibatch) -> Float[Tensor, " n"]:
        """The loss of each action, before weights."""
        ...

    def derivatives(self, seen: Seen, m: Minibatch) -> Slopes:
        """Its derivatives with respect to what the policy answered."""
        ...

    def policy_loss(self, seen: Seen, m: Minibatch) -> Float[Tensor, " n"]:
        """The part of the loss that is the policy's, without entropy and KL terms."""
        ...

    def clipped(self, seen: Seen, m: Minibatch) -> Bool[Tensor, " n"]:
        """Where a clip has cut the action's gradient."""
        ...

    def kl_penalty(self, seen: Seen, m: Minibatch) -> Float[Tensor, " n"] | None:
        """The KL to a reference in the loss before its coefficient, nats; None without one."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a step that is not finite was to be taken on: with the weights, all that it takes to see it again."""

    units: Units
    """M units, in the order of ``rows``."""
    minibatch: Minibatch | None
    """Their actions; None where the fault was there before the update."""
    objective: Objective | None
    """What was to be minimised."""
    taken: int = 0
    """Optimiser steps taken before it in the same update."""


def require_finite(batch: Batch, per: Averaging = "action") -> None:
    """Refuse a batch that holds anything not finite, before any step is taken on it; one check in the usual case.

    Raises:
        NonFiniteStep: naming what is not finite, with the units that hold it as evidence.
    """
    columns = {
        "old log-probability": batch.old_logp,
        "value": batch.old_value,
        "advantage": batch.advantages,
        "return": batch.returns,
    }
    if bool(torch.isfinite(torch.stack([column.sum() for column in columns.values()]).sum())):
        return
    finite = {name: torch.isfinite(column) for name, column in columns.items()}
    wrong = [name for name, ok in finite.items() if not bool(ok.all())]
    if not wrong:  # the sums alone overflowed
        return
    bad = ~torch.stack(list(finite.values())).all(dim=0)
    unit = torch.arange(len(batch.units)).repeat_interleave(batch.units.sizes)
    rows = unit[bad.cpu()].unique()  # type: ignore[no-untyped-call]
    own = batch.actions_of(rows).to(batch.old_logp.device)
    fault = NonFiniteStep("the batch's " + " and ".join(wrong), tuple(rows.tolist()))
    minibatch = Minibatch(
        actions=own,
        old_logp=batch.old_logp[own],
        old_value=batch.old_value[own],
        advantages=batch.advantages[own],
        returns=batch.returns[own],
        weights=action_weights(batch.episode[own], per),
        ref_logp=None if batch.ref_logp is None else batch.ref_logp[own],
    )
    fault.evidence = Evidence(units=batch.units.select(rows), minibatch=minibatch, objective=None)
    raise fault


def micro_batches(lengths: Int[Tensor, " M"], budget: int | None) -> list[Int[Tensor, " m"]]:
    """Positions 0 … M−1 grouped so that (units × longest unit) stays within ``budget``; None puts all in one group.

    Units are sorted by length and cut where it costs least: the sum over groups of units × longest unit, and for each group
    what one more forward and backward pass costs, in tokens. So padding stays at a few per cent also where all would fit
    in one group. A unit longer than the budget gets a group of its own.
    """
    count = len(lengths)
    if budget is None or count == 0:
        return [torch.arange(count)]
    order = torch.argsort(lengths, stable=True)
    sizes = lengths[order].numpy().astype(np.int64)
    if sizes[0] == sizes[-1] and sizes[0] * count <= budget:
        return [torch.arange(count)]
    best, back = np.zeros(count + 1, dtype=np.int64), np.zeros(count, dtype=np.int64)
    low = 0
    for last, longest in enumerate(sizes):  # the group that ends here begins at ``low`` at the earliest
        low = max(low, last + 1 - max(1, int(budget // longest)))
        costs = best[low : last + 1] + np.arange(last + 1 - low, 0, -1) * longest + _PASS_TOKENS
        back[last] = low + int(costs.argmin())
        best[last + 1] = costs.min()
    groups, end = [], count
    while end > 0:
        groups.append(order[back[end - 1] : end])
        end = int(back[end - 1])
    return groups[::-1]


def padding_share(lengths: Int[Tensor, " M"], budget: int | None) -> float:
    """Share of padding among the positions that :func:`micro_batches` of these units have evaluated, in [0, 1)."""
    laid_out = sum(len(group) * int(lengths[group].max()) for group in micro_batches(lengths, budget))
    return 1.0 - int(lengths.sum()) / laid_out if laid_out else 0.0


def pieces(column: Shaped[Tensor, " K *rest"], lengths: Sequence[int]) -> Sequence[Tensor]:
    """Return stretches of so many numbers each of a column, which share memory with it."""
    parts: Sequence[Tensor] = column.split(list(lengths))  # type: ignore[no-untyped-call]
    return parts


def action_weights(episode: Int[Tensor, " n"], per: Averaging) -> Float[Tensor, " n"]:
    """Weights that sum to 1 over the minibatch: 1/n each, or 1/(episodes · actions of that episode here)."""
    n = episode.shape[0]
    if per == "action":
        return torch.full((n,), 1.0 / max(n, 1), device=episode.device)
    _, inverse, counts = torch.unique(episode, return_inverse=True, return_counts=True)
    weights: Tensor = 1.0 / (len(counts) * counts[inverse].to(torch.float32))
    return weights


def accumulate(
    policy: Policy, units: Units, minibatch: Minibatch, objective: Objective, *, micro_budget: int | None
) -> Seen:
    """Add to the parameters' gradients that of Σ_i w_i loss_i over a minibatch; return what was seen on the way.

    The gradient enters the policy by its answers: ∂ loss / ∂ (logp, entropy, value, KL) in closed form, and from there
    by the policy's own backward pass. It does not depend on the cut into micro-batches beyond rounding. A loss that is not
    finite shows in the gradient, and the optimiser refuses it.

    Raises:
        NonFiniteStep: an answer of the policy's is not finite, though a clip may have kept that from the gradient. One
            that differentiates by hand is not asked: it is small and quick, and its gradient tells.
    """
    if micro_budget is None:
        return _backward(policy, units, minibatch, objective)
    groups = micro_batches(units.lengths, micro_budget)
    if len(groups) == 1:
        return _backward(policy, units, minibatch, objective)
    sizes = units.sizes
    starts = sizes.cumsum(0) - sizes
    places = [torch.cat([torch.arange(int(sizes[u])) + starts[u] for u in group.tolist()]) for group in groups]
    device = minibatch.weights.device
    seen = Seen.cat(
        [
            _backward(policy, units.select(group), minibatch.select(place.to(device)), objective)
            for group, place in zip(groups, places, strict=True)
        ]
    )
    return seen.select(torch.argsort(torch.cat(places)).to(device))


def add_loss(parts: Iterable[Tensor], rows: Int[Tensor, " M"]) -> float:
    """Add to the parameters' gradients that of a mean loss from elsewhere, which comes in parts, and return the loss.

    Raises:
        NonFiniteStep: a part is not finite.
    """
    total = 0.0
    for loss in parts:
        if not bool(torch.isfinite(loss)):
            raise NonFiniteStep("the extra loss", tuple(rows.tolist()))
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def plain_vjp(policy: Policy, units: Units) -> tuple[Seen, Pullback]:
    """Evaluate by the policy's forward pass; pull back by autograd."""
    evaluation = policy(units)

    def pull_back(slopes: Slopes) -> None:
        wanted = [
            (answer, slope.to(answer.dtype))
            for name in ("logp", "entropy", "value", "exact_kl")
            if (slope := getattr(slopes, name)) is not None and (answer := getattr(evaluation, name)).requires_grad
        ]
        if wanted:
            torch.autograd.backward([answer for answer, _ in wanted], [slope for _, slope in wanted])

    return Seen.of(evaluation), pull_back


def _backward(policy: Policy, units: Units, part: Minibatch, objective: Objective) -> Seen:
    def weighed(seen: Seen, rows: slice) -> Slopes:
        own = part if rows == slice(None) else part.select(rows)
        slopes = objective.derivatives(seen, own)
        return Slopes(
            logp=None if slopes.logp is None else slopes.logp * own.weights,
            entropy=None if slopes.entropy is None else slopes.entropy * own.weights,
            value=None if slopes.value is None else slopes.value * own.weights,
            exact_kl=None if slopes.exact_kl is None else slopes.exact_kl * own.weights,
        )

    if isinstance(policy, OnePass):
        seen = policy.differentiate(units, weighed)
        _require_answers(seen)
        return seen
    if isinstance(policy, HandDifferentiated):
        seen, pull_back = policy.vjp(units)
    else:
        seen, pull_back = plain_vjp(policy, units)
        _require_answers(seen)
    pull_back(weighed(seen, slice(None)))
    return seen


def _require_answers(seen: Seen) -> None:
    if bool(torch.isfinite(seen.logp.sum() + seen.value.sum())):
        return
    for name, answer in (("log-probability", seen.logp), ("value", seen.value)):
        if not bool(torch.isfinite(answer).all()):
            raise NonFiniteStep(f"the policy's {name}", ())


def _joined(columns: Sequence[Tensor | None]) -> Tensor | None:
    return torch.cat([c for c in columns if c is not None]) if columns[0] is not None else None
