"""What a PPO step leaves behind: metrics of the rollout, and every answer with its per-token quantities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.language.collect import Episode
from bridle.language.prepare import Prepared
from bridle.language.sampler import Stop
from bridle.language.segments import pad_flat
from bridle.learn.record import UpdateStep, last_logp

__all__ = ["rollout_metrics", "sample_rows"]

Field = str | float | int | list[float] | list[int] | list[bool] | dict[str, float]


def rollout_metrics(episodes: Sequence[Episode], prepared: Prepared, kl_coefficient: float) -> dict[str, float]:
    """Means over a rollout; KL, length and score per answer, everything else per token."""
    scores = torch.tensor([e.score for e in episodes], dtype=torch.float64)
    sizes = torch.tensor([len(e.ids) for e in episodes])
    batch, reading = prepared.batch, prepared.reading
    exact, _ = pad_flat(reading.exact_kl, sizes)
    sampled, _ = pad_flat(reading.logp - reading.ref_logp, sizes)
    metrics = {"score": float(scores.mean()), "score_std": float(scores.std(correction=0))}
    for name in episodes[0].components:
        metrics[f"score/{name}"] = sum(e.components[name] for e in episodes) / len(episodes)
    return metrics | {
        "exact_kl": float(exact.sum(dim=1).mean()),
        "sampled_kl": float(sampled.sum(dim=1).mean()),
        "kl_coefficient": kl_coefficient,
        "policy_entropy": float(reading.entropy.mean()),
        "length": float(sizes.double().mean()),
        "eos_share": sum(e.stop is Stop.EOS for e in episodes) / len(episodes),
        "score_length_correlation": _correlation(scores, sizes.double()),
        "value": float(batch.old_value.mean()),
        "return": float(batch.returns.mean()),
        "advantage_std": float(batch.advantages.std(correction=0)),
        "sampler_gap_mean": float(prepared.gap.mean),
        "sampler_gap_p99": float(prepared.gap.p99),
        "sampler_gap_max": float(prepared.gap.maximum),
        "old_logp_recomputed": float(prepared.recomputed),
    }


def _correlation(a: Float[Tensor, " B"], b: Float[Tensor, " B"]) -> float:
    """Pearson's r = Σ âb̂ / √(Σ â² Σ b̂²) of the deviations from the means; NaN where either does not vary."""
    a, b = a - a.mean(), b - b.mean()
    norm = float((a.square().sum() * b.square().sum()).sqrt())
    return float((a * b).sum()) / norm if norm > 0 else math.nan


def sample_rows(
    episodes: Sequence[Episode], prepared: Prepared, steps: Sequence[UpdateStep]
) -> Iterator[dict[str, Field]]:
    """One row per answer: what was said, how it was scored, and each token's log-probs, KL, reward, value, advantage,
    ratio and whether the clip cut its gradient, both as the update's last look at the token saw them.
    """
    batch, reading = prepared.batch, prepared.reading
    new_logp = last_logp(steps, batch.old_logp)
    columns = {
        "sampler_logp": torch.cat([e.sampler_logp for e in episodes]),
        "old_logp": batch.old_logp,
        "new_logp": new_logp,
        "ref_logp": reading.ref_logp,
        "exact_kl": reading.exact_kl,
        "entropy": reading.entropy,
        "reward": prepared.rewards,
        "value": batch.old_value,
        "advantage": batch.advantages,
        "return": batch.returns,
        "ratio": (new_logp - batch.old_logp).exp(),
    }
    lists = {name: [float(f"{x:.6g}") for x in column.tolist()] for name, column in columns.items()}
    clipped = _ever_clipped(steps, batch.old_logp).tolist()
    start = 0
    for e in episodes:
        stop = start + len(e.ids)
        yield {
            "prompt": e.prompt.text,
            "answer": e.text,
            "group": e.group,
            "score": e.score,
            "components": dict(e.components),
            "stop": e.stop.value,
            "prompt_ids": e.prompt.ids.tolist(),
            "ids": e.ids.tolist(),
            **{name: column[start:stop] for name, column in lists.items()},
            "clipped": clipped[start:stop],
        }
        start = stop


def _ever_clipped(steps: Sequence[UpdateStep], like: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether the clip cut each action's gradient when the update last looked at it."""
    clipped = torch.zeros_like(like, dtype=torch.bool)
    for step in steps:
        clipped[step.actions] = step.clipped
    return clipped
