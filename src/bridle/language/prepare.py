"""Preparing: from judged answers to a batch of advantages and returns."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
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

__all__ = ["GAP_BOUNDS", "GapBound", "Look", "Prepared", "look", "prepare", "read_reference", "read_values"]

_LEAST_LOOKED_AT = 8
"""Answers that are looked at whatever their share: fewer say little about a mean KL."""


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
"""Per compute dtype. In bfloat16 recomputing is the rule: the two paths add up in other orders, and a rounding apart
goes on from layer to layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """What some of a rollout's answers look like to policy and reference over the whole vocabulary; E of U, n actions."""

    units: Int[Tensor, " E"]
    """[E] which answers, in order."""
    actions: Int[Tensor, " n"]
    """[n] positions of their actions in the rollout, in order."""
    logp: Float[Tensor, " n"]
    """[n] log-probabilities under the policy, nats."""
    entropy: Float[Tensor, " n"]
    """[n] of the policy, nats."""
    ref_logp: Float[Tensor, " n"]
    """[n] log-probabilities under the reference, nats."""
    exact_kl: Float[Tensor, " n"]
    """[n] KL(policy ‖ reference), nats."""

    def per_answer(self, name: str, sizes: Int[Tensor, " U"]) -> Float[Tensor, " E"]:
        """[E] sums over each answer's actions of one of the columns; ``sizes`` are those of the whole rollout."""
        rows, _ = pad_flat(getattr(self, name), sizes[self.units])
        return rows.sum(dim=1)


@torch.no_grad()
def look(
    policy: LanguagePolicy, reference: CausalModel, segments: Segments, units: Int[Tensor, " E"], *, budget: int | None
) -> Look:
    """Evaluate policy and reference on the answers ``units``, in micro-batches of at most ``budget`` tokens.

    This is the expensive look: an actor's forward that training would else not need, and two products with the vocabulary.
    """
    part, device = segments.select(units), policy.device
    starts = part.sizes.cumsum(0) - part.sizes
    columns = torch.zeros(4, int(part.sizes.sum()), device=device)
    for group in micro_batches(part.lengths, budget):
        own = part.select(group)
        place = layout(own, device)
        with policy.computing():
            features = policy.actor.states(place.input_ids, place.rows, place.columns).features
            theirs = reference.states(place.input_ids, place.rows, place.columns).features
            found, _ = policy.actor.answers(
                features, place.targets, reference=(reference, theirs), temperature=policy.temperature
            )
        assert found.kl is not None
        assert found.ref_logp is not None
        at = _places(starts, part.sizes, group).to(device)
        for column, values in zip(columns, (found.logp, found.entropy, found.ref_logp, found.kl), strict=True):
            column[at] = values.float()
    first = segments.sizes.cumsum(0) - segments.sizes
    logp, entropy, ref_logp, exact_kl = columns
    return Look(
        units=units,
        actions=_places(first, segments.sizes, units).to(device),
        logp=logp,
        entropy=entropy,
        ref_logp=ref_logp,
        exact_kl=exact_kl,
    )


@torch.no_grad()
def read_values(
    policy: LanguagePolicy, segments: Segments, *, budget: int | None
) -> tuple[Float[Tensor, " N"], Float[Tensor, " U"]]:
    """V(s_t) of every action, and V of the state after each answer's last token, in units of return."""
    sizes, device = segments.sizes, policy.device
    starts = sizes.cumsum(0) - sizes
    value, last_value = torch.zeros(int(sizes.sum()), device=device), torch.zeros(len(segments), device=device)
    for group in micro_batches(segments.lengths, budget):
        found, last = policy.values(segments.select(group))
        value[_places(starts, sizes, group).to(device)] = found
        last_value[group.to(device)] = last
    return value, last_value


@torch.no_grad()
def read_reference(
    policy: LanguagePolicy,
    reference: CausalModel,
    segments: Segments,
    *,
    budget: int | None,
    logp: bool,
    features: bool,
) -> tuple[Float[Tensor, " N"] | None, tuple[Float[Tensor, "T F"], ...] | None]:
    """The reference's log-probabilities of every action, and what its vocabulary projection reads there, as asked."""
    if not (logp or features):
        return None, None
    sizes, device = segments.sizes, policy.device
    starts = sizes.cumsum(0) - sizes
    ref_logp = torch.zeros(int(sizes.sum()), device=device)
    kept: dict[int, Tensor] = {}
    for group in micro_batches(segments.lengths, budget):
        part = segments.select(group)
        place = layout(part, device)
        with policy.computing():
            theirs = reference.states(place.input_ids, place.rows, place.columns).features
            if logp:
                said = reference.logprobs(theirs, place.targets, temperature=policy.temperature, with_entropy=False)
                ref_logp[_places(starts, sizes, group).to(device)] = said[0]
        if features:
            kept |= dict(zip(group.tolist(), torch.split(theirs, part.sizes.tolist()), strict=True))
    return ref_logp if logp else None, tuple(kept[u] for u in range(len(segments))) if features else None


def _places(starts: Int[Tensor, " U"], sizes: Int[Tensor, " U"], units: Int[Tensor, " M"]) -> Int[Tensor, " n"]:
    """Positions in a flat rollout of the actions of some units, unit by unit."""
    return torch.cat([torch.arange(int(starts[u]), int(starts[u] + sizes[u])) for u in units.tolist()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A batch to learn from, and what is worth recording about it; N actions, B episodes of up to T."""

    batch: Batch
    """What the update reads."""
    look: Look
    """What policy and reference say over the whole vocabulary, for some of the answers."""
    rewards: Float[Tensor, " N"]
    """[N] reward of each action, KL penalty included, in units of reward."""
    last_value: Float[Tensor, " B"]
    """[B] V of the state after each answer's last token; 0 where nothing asks for it."""
    moments: Moments
    """Of all scores so far."""
    gap: LogProbGap
    """|trainer's log-prob − sampler's| over the answers looked at, nats."""
    recomputed: bool
    """Whether the trainer's log-probs replaced the sampler's as the old ones."""
    seconds: Mapping[str, float]
    """Wall-clock seconds of the passes of policy (``look``), critic (``values``) and reference (``reference``)."""


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
    """Evaluate a rollout as far as its batch needs it, shape its rewards, and estimate advantages.

    What is not needed is not computed. The sampler's log-probabilities serve as the old ones, and its values where the
    critic sits on the actor's trunk; a share of the answers (``kl.exact_share``) is looked at by the trainer too, and if
    the two differ there by more than ``GAP_BOUNDS``, all are. The reference is asked for what the leash reads.

    Raises:
        NonFiniteStep: a log-probability or a value is not finite.
        SamplerMismatch: sampler and trainer disagree by more than the bound that stops a run.
    """
    segments = Segments.of([e.prompt.ids for e in episodes], [e.ids for e in episodes])
    clock = _Clock()
    sampler_logp = torch.cat([e.sampler_logp for e in episodes]).to(policy.device)
    seen, gap, recomputed = _look(policy, reference, segments, sampler_logp, kl, micro_batch_tokens)
    old_logp = seen.logp if recomputed else sampler_logp
    clock.lap("look")
    score, bootstrapped, moments = score_rewards(
        [e.score for e in episodes], [e.stop for e in episodes], shaping, moments
    )
    value, last_value = _values(episodes, policy, segments, bootstrapped, recomputed, micro_batch_tokens)
    clock.lap("values")
    # on the plain path features are whole logits: there the policy asks the reference again instead of keeping them
    asked, known = kl.reads_samples and kl_coefficient != 0, len(seen.units) == len(segments)
    ref_logp, features = read_reference(
        policy,
        reference,
        segments,
        budget=micro_batch_tokens,
        logp=asked and not known,
        features=kl.in_loss == "exact" and reference.fused,
    )
    if asked and known:
        ref_logp = seen.ref_logp
    clock.lap("reference")
    _require_finite(
        segments,
        {"the policy's value": (None, value)}
        | ({} if ref_logp is None else {"the reference's log-probability": (None, ref_logp)}),
    )
    sizes = segments.sizes
    old_rows, mask = pad_flat(old_logp, sizes)
    ref_rows = None if ref_logp is None else pad_flat(ref_logp, sizes)[0]
    leash = kl_coefficient if kl.where == "reward" else 0.0
    rewards = token_rewards(score.to(policy.device), old_rows, ref_rows, mask, leash)
    trajectories = _trajectories(value, last_value, rewards, mask, sizes, bootstrapped.to(policy.device))
    advantages, returns = estimate(trajectories, advantage)
    batch = Batch(
        units=replace(segments, ref_features=features),
        old_logp=old_logp,
        old_value=value,
        advantages=advantages[mask],
        returns=returns[mask],
        episode=torch.arange(len(episodes)).repeat_interleave(sizes).to(policy.device),
        ref_logp=ref_logp,
    )
    return Prepared(
        batch=batch,
        look=seen,
        rewards=rewards[mask],
        last_value=last_value,
        moments=moments,
        gap=gap,
        recomputed=recomputed,
        seconds=clock.laps,
    )


def _look(
    policy: LanguagePolicy,
    reference: CausalModel,
    segments: Segments,
    sampler_logp: Float[Tensor, " N"],
    kl: KLSettings,
    budget: int | None,
) -> tuple[Look, LogProbGap, bool]:
    """Look at a share of the answers; at all of them where the sampler's log-probs cannot serve as the old ones."""
    count = len(segments)
    share = max(math.ceil(count * kl.exact_share), min(count, _LEAST_LOOKED_AT))
    whole = policy.compute_dtype != torch.float32 or share == count
    units = torch.arange(count) if whole else torch.arange(share) * count // share
    seen = look(policy, reference, segments, units, budget=budget)
    _require_finite(segments, _numbers_of(seen))
    gap = log_prob_gap(seen.logp, sampler_logp[seen.actions])
    recomputed = _must_recompute(gap, policy.compute_dtype)
    if recomputed and not whole:
        seen = look(policy, reference, segments, torch.arange(count), budget=budget)
        _require_finite(segments, _numbers_of(seen))
        gap = log_prob_gap(seen.logp, sampler_logp)
        _must_recompute(gap, policy.compute_dtype)
    return seen, gap, recomputed


def _numbers_of(seen: Look) -> dict[str, tuple[Int[Tensor, " n"] | None, Tensor]]:
    return {
        "the policy's log-probability": (seen.actions, seen.logp),
        "the reference's log-probability": (seen.actions, seen.ref_logp),
    }


def _values(
    episodes: Sequence[Episode],
    policy: LanguagePolicy,
    segments: Segments,
    bootstrapped: Bool[Tensor, " B"],
    recomputed: bool,
    budget: int | None,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " B"]]:
    """V(s_t), the sampler's where it gave them and is the trainer's equal, and V after each answer where it is asked for."""
    known = [e.values for e in episodes if e.values is not None]
    apart = (
        recomputed and policy.compute_dtype == torch.float32
    )  # in bfloat16 it is rounding, which a baseline may have
    if apart or len(known) < len(episodes):
        return read_values(policy, segments, budget=budget)
    last_value = torch.zeros(len(segments), device=policy.device)
    asking = bootstrapped.nonzero()[:, 0]
    if len(asking) > 0:
        _, last = read_values(policy, segments.select(asking), budget=budget)
        last_value[asking.to(policy.device)] = last
    return torch.cat(known).to(policy.device), last_value


class _Clock:
    """Wall-clock seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = now - self._last
        self._last = now


def _trajectories(
    value: Float[Tensor, " N"],
    last_value: Float[Tensor, " B"],
    rewards: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    sizes: Tensor,
    bootstrapped: Bool[Tensor, " B"],
) -> Trajectories:
    """Lay answers out as rows: the successor of an answer's last action is worth 0, or V if it is bootstrapped."""
    values, _ = pad_flat(value, sizes)
    last = (sizes.to(values.device) - 1)[:, None]
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    next_values = next_values.scatter(1, last, last_value[:, None])
    final = torch.zeros_like(mask).scatter(1, last, torch.ones_like(mask[:, :1]))
    return Trajectories(
        rewards=rewards,
        values=values,
        next_values=next_values,
        terminated=final & ~bootstrapped[:, None],
        truncated=final & bootstrapped[:, None],
        mask=mask,
    )


def _require_finite(segments: Segments, columns: Mapping[str, tuple[Int[Tensor, " n"] | None, Tensor]]) -> None:
    """Refuse numbers that are not finite: by name, values with the positions of their actions (None: all, in order)."""
    wrong = {name: places for name, places in columns.items() if not bool(torch.isfinite(places[1]).all())}
    if not wrong:
        return
    unit = torch.arange(len(segments)).repeat_interleave(segments.sizes)  # which answer each action is of
    found = []
    for at, values in wrong.values():
        bad = (~torch.isfinite(values)).cpu().nonzero()[:, 0]
        found.append(unit[bad if at is None else at.cpu()[bad]])
    rows = torch.cat(found).unique()  # type: ignore[no-untyped-call]
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
