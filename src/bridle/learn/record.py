"""What one optimiser step leaves behind for the job to record; its statistics are computed when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridle.core.diagnostics import (
    LogProbGap,
    effective_sample_size,
    explained_variance,
    log_prob_gap,
    ratio_extremes,
)
from bridle.core.divergence import kl_k3
from bridle.core.losses import importance_ratio, value_loss
from bridle.learn.step import Minibatch, Objective, Seen

__all__ = ["TrustRegion", "UpdateStep", "last_logp", "summarise"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRegion:
    """How the actor's step within a trust region was found, and how far it went."""

    kl: float
    """Mean KL(old ‖ new) reached, nats per action, over all actions; 0 if no step was taken."""
    improvement: float
    """Rise of the mean surrogate, in units of the advantages as used; 0 if no step was taken."""
    predicted_improvement: float
    """What the full step would have raised it by to first order."""
    share: float
    """Share of the full step that was taken, in [0, 1]; 0 if none."""
    lengths_tried: int
    """Lengths that the line search looked at."""
    residual: float
    """‖g − Hx‖ / ‖g‖ of the direction, in [0, ∞); 0 is exact."""
    iterations: int
    """Products with the Fisher matrix that the direction took."""


@dataclass(frozen=True, kw_only=True)
class UpdateStep:
    """One optimiser step, or the refusal to take it.

    What is asked for twice is found once; slots leave no room for that.
    """

    epoch: int
    """Pass over the rollout, from 0."""
    minibatch: int
    """Minibatch within the epoch, from 0."""
    objective: Objective
    """What was minimised."""
    part: Minibatch
    """The actions it was minimised on."""
    seen: Seen
    """What the policy answered for them, before this step."""
    applied: bool = True
    """False if the step was not taken: the target KL was passed, and the update ended, or no length of the actor's step
    stayed within its trust region and improved."""
    extra_loss: float = 0.0
    """The loss added from elsewhere, weighted as it was added (an SFT mix); 0 without one."""
    grad_norms: Mapping[str, float] = field(default_factory=dict)
    """L2 norm of each group's gradient before clipping; empty if not applied."""
    padding_share: float | None = None
    """Share of padding among the positions evaluated, in [0, 1); None where units are not cut into micro-batches."""
    trust_region: TrustRegion | None = None
    """The actor's step within its trust region; None for a step of the optimiser."""

    @property
    def actions(self) -> Int[Tensor, " n"]:
        """[n] positions in the flat batch of the minibatch's actions."""
        return self.part.actions

    @property
    def logp(self) -> Float[Tensor, " n"]:
        """[n] log-probabilities before this step, nats."""
        return self.seen.logp

    @cached_property
    def ratio(self) -> Float[Tensor, " n"]:
        """[n] importance ratio before this step."""
        return importance_ratio(self.seen.logp, self.part.old_logp)

    @property
    def clipped(self) -> Bool[Tensor, " n"]:
        """[n] where the clip has cut the action's gradient."""
        return self.objective.clipped(self.seen, self.part)

    @property
    def policy_loss(self) -> float:
        """Mean surrogate loss."""
        return self._mean(self.objective.policy_loss(self.seen, self.part))

    @property
    def value_loss(self) -> float:
        """Mean ½(V − R)², in units of return squared."""
        return self._mean(value_loss(self.seen.value, self.part.returns))

    @property
    def entropy(self) -> float:
        """Mean entropy of the policy, nats."""
        return self._mean(self.seen.entropy)

    @property
    def kl_penalty(self) -> float:
        """Mean KL term to the reference in the loss before its coefficient, nats per action; 0 without one."""
        kl = self.objective.kl_penalty(self.seen, self.part)
        return 0.0 if kl is None else self._mean(kl)

    @property
    def old_kl(self) -> float:
        """Mean k3 estimate of KL(old policy ‖ new policy), nats per action: the actions are the old policy's samples."""
        return self._mean(kl_k3(self.part.old_logp, self.seen.logp))

    @property
    def explained_variance(self) -> float:
        """1 − Var(R − V)/Var(R) under the critic before this step; NaN where the returns are constant."""
        return float(explained_variance(self.seen.value, self.part.returns))

    @cached_property
    def gap(self) -> LogProbGap | None:
        """|first forward − old log-probability| on the first minibatch, before any step; None afterwards."""
        first = self.epoch == 0 and self.minibatch == 0
        return log_prob_gap(self.seen.logp, self.part.old_logp) if first else None

    def _mean(self, values: Tensor) -> float:
        return float((self.part.weights * values).sum())


def summarise(steps: Sequence[UpdateStep]) -> dict[str, float]:
    """Metrics of one update: means over its optimiser steps, extremes where they matter, the first minibatch's gap."""
    first, last = steps[0], steps[-1]
    applied = [s for s in steps if s.applied]
    part = Minibatch.cat([s.part for s in steps])
    together = UpdateStep(
        epoch=0, minibatch=0, objective=first.objective, part=part, seen=Seen.cat([s.seen for s in steps])
    )
    # weights sum to 1 in each step, so a sum over all of them is the sum of the steps' means
    count = len(steps)
    low, high = ratio_extremes(together.ratio)
    metrics = {
        "optimiser_steps": float(len(applied)),
        "policy_loss": together.policy_loss / count,
        "value_loss": together.value_loss / count,
        "entropy": together.entropy / count,
        "kl_penalty": together.kl_penalty / count,
        "extra_loss": sum(s.extra_loss for s in steps) / count,
        "old_kl": last.old_kl,
        "clip_fraction": float(together.clipped.float().mean()),
        "ratio_min": float(low),
        "ratio_max": float(high),
        "effective_sample_size": float(effective_sample_size(last.ratio)),
        "explained_variance": first.explained_variance,
        "stopped_by_target_kl": float(not last.applied),
    }
    for name in {name: None for s in applied for name in s.grad_norms}:
        norms = [s.grad_norms[name] for s in applied if name in s.grad_norms]
        metrics[f"grad_norm/{name}"] = sum(norms) / len(norms)
    padding = [s.padding_share for s in steps if s.padding_share is not None]
    if padding:
        metrics["padding_share"] = sum(padding) / len(padding)
    if first.trust_region is not None:
        metrics |= {f"trust_region/{name}": float(value) for name, value in asdict(first.trust_region).items()}
    gap = first.gap
    if gap is not None:
        metrics["first_ratio_gap_mean"] = float(gap.mean)
        metrics["first_ratio_gap_max"] = float(gap.maximum)
    return metrics


def last_logp(steps: Sequence[UpdateStep], old_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Each action's log-probability when the update last looked at it; ``old_logp`` where it never did."""
    logp = old_logp.clone()
    for step in steps:
        logp[step.actions.to(logp.device)] = step.logp
    return logp
