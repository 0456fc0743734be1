"""Preparing: from judged answers to a batch of advantages and returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.batch import Batch, Trajectories
from bridle.core.diagnostics import LogProbGap, log_prob_gap
from bridle.core.moments import Moments
from bridle.errors import NonFiniteStep, SamplerMismatch
from bridle.language.causal import CausalModel
from bridle.language.collect import Episode
from bridle.language.policy import LanguagePolicy
from bridle.language.segments import Segments, layout, pad_flat
from bridle.language.shaping import KLSettings, ShapingSettings, score_rewards, token_rewards
from bridle.learn.advantages import AdvantageSettings, estimate
from bridle.learn.step import Evidence, micro_batches

__all__ = ["GAP_BOUNDS", "GapBound", "Prepared", "Reading", "prepare", "read"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GapBound:
    """What |trainer's log-prob − sampler's| may be, nats."""

    mean: float
    """Above this mean the trainer's log-probs replace the sampler's as the old ones."""
    maximum: float
    """Above this maximum too."""
    stop_mean: float
    """Above this mean the run stops: sampler and trainer are not the same policy."""


GAP_BOUNDS = {
    torch.float32: GapBound(mean=1e-5, maximum=1e-4, stop_mean=1e-2),
    torch.bfloat16: GapBound(mean=0.0, maximum=0.0, stop_mean=0.25),
}
"""Per compute dtype. In bfloat16 recomputing is the rule: the two paths round differently at every layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What the trainer's models say about a rollout before the first step; N actions, U episodes."""

    logp: Float[Tensor, " N"]
    """[N] log-probabilities under the policy, nats."""
    entropy: Float[Tensor, " N"]
    """[N] nats."""
    value: Float[Tensor, " N"]
    """[N] V(s_t), in units of return."""
    last_value: Float[Tensor, " U"]
    """[U] V of the state after each answer's last token."""
    ref_logp: Float[Tensor, " N"]
    """[N] log-probabilities under the reference, nats."""
    exact_kl: Float[Tensor, " N"]
    """[N] KL(policy ‖ reference) over the whole vocabulary, nats."""
    ref_features: tuple[Float[Tensor, "T F"], ...] | None
    """U matrices of what the reference's vocabulary projection reads at each action; None unless asked for."""


@torch.no_grad()
def read(
    policy: LanguagePolicy,
    reference: CausalModel,
    segments: Segments,
    *,
    budget: int | None,
    keep_features: bool = False,
) -> Reading:
    """Evaluate policy, critic and reference over a rollout, in micro-batches of at most ``budget`` tokens."""
    sizes = segments.sizes
    starts = sizes.cumsum(0) - sizes
    device, total = policy.device, int(sizes.sum())
    columns = {name: torch.zeros(total, device=device) for name in ("logp", "entropy", "value", "ref_logp", "kl")}
    last_value = torch.zeros(len(segments), device=device)
    features: dict[int, Tensor] = {}
    for group in micro_batches(segments.lengths, budget):
        part = segments.select(group)
        place = layout(part, device)
        with policy.computing():
            theirs = reference.states(place.input_ids, place.rows, place.columns).features
            ref_logp, _ = reference.logprobs(theirs, place.targets, temperature=policy.temperature, with_entropy=False)
        per_unit = torch.split(theirs, part.sizes.tolist())
        found = policy(replace(part, ref_features=per_unit), last_value=True)
        at = torch.cat([torch.arange(int(starts[u]), int(starts[u] + sizes[u])) for u in group]).to(device)
        values = (found.logp, found.entropy, found.value, ref_logp, found.exact_kl)
        for name, value in zip(columns, values, strict=True):
            columns[name][at] = value
        last_value[group.to(device)] = found.last_value
        if keep_features:
            features |= dict(zip(group.tolist(), per_unit, strict=True))
    return Reading(
        logp=columns["logp"],
        entropy=columns["entropy"],
        value=columns["value"],
        last_value=last_value,
        ref_logp=columns["ref_logp"],
        exact_kl=columns["kl"],
        ref_features=tuple(features[u] for u in range(len(segments))) if keep_features else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A batch to learn from, and what is worth recording about it; N actions, B episodes of up to T."""

    batch: Batch
    """What the update reads."""
    reading: Reading
    """What the models said."""
    rewards: Float[Tensor, " N"]
    """[N] reward of each action, KL penalty included, in units of reward."""
    moments: Moments
    """Of all scores so far."""
    gap: LogProbGap
    """|trainer's log-prob − sampler's| over the whole rollout, nats."""
    recomputed: bool
    """Whether the trainer's log-probs replaced the sampler's as the old ones."""


def prepare(
    episodes: Sequence[Episode],
    policy: LanguagePolicy,
    reference: CausalModel,
    moments: Moments,
    *,
    shaping: ShapingSettings,
    kl: KLSettings,
    kl_coefficient: float,
    advantage: AdvantageSettings,
    micro_batch_tokens: int | None,
) -> Prepared:
    """Evaluate a rollout with policy, critic and reference, shape its rewards, and estimate advantages.

    Raises:
        NonFiniteStep: a log-probability or a value is not finite.
        SamplerMismatch: sampler and trainer disagree by more than the bound that stops a run.
    """
    segments = Segments.of([e.prompt.ids for e in episodes], [e.ids for e in episodes])
    # on the plain path features are whole logits: there the policy asks the reference again instead of keeping them
    exact = kl.where == "loss" and kl.estimator == "exact" and reference.fused
    reading = read(policy, reference, segments, budget=micro_batch_tokens, keep_features=exact)
    _require_finite(reading, segments)
    sampler_logp = torch.cat([e.sampler_logp for e in episodes]).to(policy.device)
    gap = log_prob_gap(reading.logp, sampler_logp)
    recomputed = _must_recompute(gap, policy.compute_dtype)
    old_logp = reading.logp if recomputed else sampler_logp

    score, bootstrapped, moments = score_rewards(
        [e.score for e in episodes], [e.stop for e in episodes], shaping, moments
    )
    sizes = segments.sizes
    old_rows, mask = pad_flat(old_logp, sizes)
    ref_rows, _ = pad_flat(reading.ref_logp, sizes)
    leash = kl_coefficient if kl.where == "reward" else 0.0
    rewards = token_rewards(score.to(policy.device), old_rows, ref_rows, mask, leash)
    trajectories = _trajectories(reading, rewards, mask, sizes, bootstrapped.to(policy.device))
    advantages, returns = estimate(trajectories, advantage)
    batch = Batch(
        units=replace(segments, ref_features=reading.ref_features),
        old_logp=old_logp,
        old_value=reading.value,
        advantages=advantages[mask],
        returns=returns[mask],
        episode=torch.arange(len(episodes)).repeat_interleave(sizes).to(policy.device),
        ref_logp=reading.ref_logp,
    )
    return Prepared(
        batch=batch, reading=reading, rewards=rewards[mask], moments=moments, gap=gap, recomputed=recomputed
    )


def _trajectories(
    reading: Reading,
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    sizes: Tensor,
    bootstrapped: Bool[Tensor, " B"],
) -> Trajectories:
    """Lay answers out as rows: the successor of an answer's last action is worth 0, or V if it is bootstrapped."""
    values, _ = pad_flat(reading.value, sizes)
    last = (sizes.to(values.device) - 1)[:, None]
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    next_values = next_values.scatter(1, last, reading.last_value[:, None])
    final = torch.zeros_like(mask).scatter(1, last, torch.ones_like(mask[:, :1]))
    return Trajectories(
        rewards=rewards,
        values=values,
        next_values=next_values,
        terminated=final & ~bootstrapped[:, None],
        truncated=final & bootstrapped[:, None],
        mask=mask,
    )


def _require_finite(reading: Reading, segments: Segments) -> None:
    columns = {
        "the policy's log-probability": reading.logp,
        "the policy's value": reading.value,
        "the reference's log-probability": reading.ref_logp,
    }
    finite = {name: torch.isfinite(column) for name, column in columns.items()}
    wrong = [name for name, ok in finite.items() if not bool(ok.all())]
    if not wrong:
        return
    bad = ~torch.stack(list(finite.values())).all(dim=0)
    rows = torch.arange(len(segments)).repeat_interleave(segments.sizes)[bad.cpu()].unique()  # type: ignore[no-untyped-call]
    fault = NonFiniteStep(" and ".join(wrong), tuple(rows.tolist()))
    fault.evidence = Evidence(units=segments.select(rows), minibatch=None, objective=None)
    raise fault


def _must_recompute(gap: LogProbGap, dtype: torch.dtype) -> bool:
    bound = GAP_BOUNDS[dtype]
    if not float(gap.mean) <= bound.stop_mean:  # also where it is NaN
        raise SamplerMismatch(
            f"sampler and trainer disagree by {float(gap.mean):.3g} nats per token on average (bound {bound.stop_mean}); "
            "likely causes: dropout left on, a model whose logits the cache changes, or different weights"
        )
    return float(gap.mean) > bound.mean or float(gap.maximum) > bound.maximum
