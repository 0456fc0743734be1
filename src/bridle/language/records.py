"""What a PPO step leaves behind: metrics of the rollout, and every answer with its per-token quantities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridle.language.collect import Episode
from bridle.language.prepare import Look, Prepared
from bridle.language.sampler import Stop
from bridle.language.segments import pad_flat
from bridle.learn.record import UpdateStep, last_logp

__all__ = ["rollout_metrics", "sample_rows"]

Field = str | float | int | Tensor | dict[str, float] | None


def rollout_metrics(episodes: Sequence[Episode], prepared: Prepared, kl_coefficient: float) -> dict[str, float]:
    """Means over a rollout; KL, length and score per answer, everything else per token."""
    scores = torch.tensor([e.score for e in episodes], dtype=torch.float64)
    sizes = torch.tensor([len(e.ids) for e in episodes])
    batch, seen = prepared.batch, prepared.look
    if batch.ref_logp is None:
        sampled = seen.per_answer("logp", sizes) - seen.per_answer("ref_logp", sizes)
    else:
        sampled = pad_flat(batch.old_logp - batch.ref_logp, sizes)[0].sum(dim=1)
    metrics = {"score": float(scores.mean()), "score_std": float(scores.std(correction=0))}
    for name in episodes[0].components:
        metrics[f"score/{name}"] = sum(e.components[name] for e in episodes) / len(episodes)
    return metrics | {
        "exact_kl": float(seen.per_answer("exact_kl", sizes).mean()),
        "sampled_kl": float(sampled.mean()),
        "kl_coefficient": kl_coefficient,
        "policy_entropy": float(seen.entropy.mean()),
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

    Entropy and exact KL (and the reference's log-probs, where no leash reads them) are None for an answer that was not
    looked at over the whole vocabulary.
    """
    batch, seen = prepared.batch, prepared.look
    new_logp = last_logp(steps, batch.old_logp)
    columns = {
        "sampler_logp": torch.cat([e.sampler_logp for e in episodes]),
        "old_logp": batch.old_logp,
        "new_logp": new_logp,
        "ref_logp": _spread(seen.ref_logp, seen, batch.old_logp) if batch.ref_logp is None else batch.ref_logp,
        "exact_kl": _spread(seen.exact_kl, seen, batch.old_logp),
        "entropy": _spread(seen.entropy, seen, batch.old_logp),
        "reward": prepared.rewards,
        "value": batch.old_value,
        "advantage": batch.advantages,
        "return": batch.returns,
        "ratio": (new_logp - batch.old_logp).exp(),
    }
    sizes = [len(e.ids) for e in episodes]
    lists = {name: torch.split(column.float().cpu(), sizes) for name, column in columns.items()}
    clipped = torch.split(_ever_clipped(steps, batch.old_logp).cpu(), sizes)
    looked = set(seen.units.tolist())
    partial = {"exact_kl", "entropy"} | ({"ref_logp"} if batch.ref_logp is None else set())
    for u, e in enumerate(episodes):
        unknown = partial if u not in looked else set()
        yield {
            "prompt": e.prompt.text,
            "answer": e.text,
            "group": e.group,
            "score": e.score,
            "components": dict(e.components),
            "stop": e.stop.value,
            "prompt_ids": e.prompt.ids,
            "ids": e.ids,
            **{name: None if name in unknown else answers[u] for name, answers in lists.items()},
            "clipped": clipped[u],
        }


def _spread(values: Float[Tensor, " n"], seen: Look, like: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Lay what is known of some actions out over all of them, 0 elsewhere."""
    return torch.zeros_like(like).index_copy(0, seen.actions.to(like.device), values.to(like.dtype))


def _ever_clipped(steps: Sequence[UpdateStep], like: Float[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether the clip cut each action's gradient when the update last looked at it."""
    clipped = torch.zeros_like(like, dtype=torch.bool)
    for step in steps:
        clipped[step.actions] = step.clipped
    return clipped
