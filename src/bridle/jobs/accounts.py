"""The account of a language PPO step: what its parts cost, and what share of the machine they used."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TypeVar

import torch

from bridle.language.account import Work, peak_memory, product_rate
from bridle.language.policy import Critic
from bridle.language.prepare import Prepared
from bridle.language.roles import Roles
from bridle.language.scorers import Answers, Scorer, Scores
from bridle.language.segments import Segments
from bridle.learn.record import UpdateStep

__all__ = ["Accounts", "StepAccount", "TimedScorer"]

_T = TypeVar("_T")


class TimedScorer:
    """A judge, and how long it has taken."""

    def __init__(self, scorer: Scorer) -> None:
        self.name = scorer.name
        self.seconds = 0.0
        self._scorer = scorer

    def __call__(self, answers: Answers) -> Scores:
        """Judge as the judge does."""
        began = time.perf_counter()
        scores = self._scorer(answers)
        self.seconds += time.perf_counter() - began
        return scores


class Accounts:
    """What is fixed for a run: its models' work, the machine's rate of products, and the memory held before they came."""

    def __init__(self, roles: Roles, *, compute_dtype: torch.dtype, before: int) -> None:
        """``before`` is the process's resident memory in bytes before anything was opened."""
        actor, critic = roles.policy.actor.model, roles.policy.critic
        self.rate = product_rate(actor, compute_dtype)
        """Floating-point operations a second that this machine makes of the actor's largest layer."""
        self.actor, self.reference = Work.of(actor), Work.of(roles.reference.model)
        self.critic = Work.of(critic.backbone, projection=False) if isinstance(critic, Critic) else None
        self.device, self.before = roles.policy.device, before

    def step(self, scorer: TimedScorer) -> StepAccount:
        """Begin a step."""
        return StepAccount(self, scorer)


class StepAccount:
    """One step's seconds and work."""

    def __init__(self, accounts: Accounts, scorer: TimedScorer) -> None:
        self._accounts, self._scorer = accounts, scorer
        self._scoring = -scorer.seconds
        self._laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str, result: _T) -> _T:
        """Note what has passed since the last lap, and hand ``result`` on."""
        now = time.perf_counter()
        self._laps[name] = now - self._last
        self._last = now
        return result

    def row(self, prepared: Prepared, updates: Sequence[UpdateStep], *, critic_only: bool) -> dict[str, float]:
        """What timing.jsonl keeps of the step; laps "collect", "prepare" and "training" have been taken."""
        a, laps = self._accounts, self._laps
        tokens, scoring = len(prepared.batch), self._scoring + self._scorer.seconds
        parts = {
            "generation": laps["collect"] - scoring,
            "scoring": scoring,
            **prepared.seconds,
            "training": laps["training"],
        }
        generation, other, training = self._work(prepared, updates, critic_only)
        seconds = sum(laps.values())
        return {
            **{f"{name}_seconds": value for name, value in parts.items()},
            "tokens": tokens,
            "generated_per_second": tokens / parts["generation"],
            "tokens_per_second": tokens / seconds,
            "flops": generation + other + training,
            "flops_per_second": (generation + other + training) / seconds,
            "training_flops_per_second": training / laps["training"],
            "product_flops_per_second": a.rate,
            "training_share_of_rate": training / laps["training"] / a.rate,
            "peak_memory_bytes": peak_memory(a.device, above=a.before),
        }

    def _work(self, prepared: Prepared, updates: Sequence[UpdateStep], critic_only: bool) -> tuple[float, float, float]:
        """Useful floating-point operations of generation, of reading (judges not counted) and of training."""
        a, batch = self._accounts, prepared.batch
        assert isinstance(batch.units, Segments)
        lengths, tokens = batch.units.lengths, len(batch)
        looked, seen = lengths[prepared.look.units], len(prepared.look.actions)
        reading = a.actor.forward(looked, seen) + a.reference.forward(looked, seen)
        if a.critic is not None:
            reading += a.critic.forward(lengths, 0)
        kept = batch.units.ref_features is not None
        if batch.ref_logp is not None or kept:
            reading += a.reference.forward(lengths, tokens if batch.ref_logp is not None else 0)
        actor = a.actor.forward(lengths, tokens) if critic_only else a.actor.training(lengths, tokens)
        passes = sum(len(step.actions) for step in updates) / tokens
        training = actor + (0.0 if a.critic is None else a.critic.training(lengths, 0))
        if kept:
            training += 2.0 * a.reference.projection * tokens
        return a.actor.forward(lengths, tokens), reading, passes * training
