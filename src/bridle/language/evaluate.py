"""Judging a policy on held-out prompts: scores, distance from the reference, and whether the text is still text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from bridle.language.causal import CausalModel
from bridle.language.collect import Decode, Episode, PromptTokens, collect
from bridle.language.policy import LanguagePolicy
from bridle.language.prepare import look
from bridle.language.sampler import Sampler, SamplingSettings, Stop
from bridle.language.scorers import Answers, Scorer, Scores
from bridle.language.segments import Segments
from bridle.learn.memory import MicroBudget, RowBudget, within_memory
from bridle.native.sharing import calm

__all__ = ["Assessment", "WithGold", "assess", "distinct_n", "mean_and_half_width"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Assessment:
    """Answers to held-out prompts, and what was measured on each."""

    episodes: tuple[Episode, ...]
    """B answers; their scores and components are what the judges gave."""
    exact_kl: tuple[float, ...]
    """[B] Σ_t KL(policy ‖ reference) over the whole vocabulary, nats per answer."""
    sampled_kl: tuple[float, ...]
    """[B] Σ_t log(policy/reference) of the sampled tokens, nats per answer."""
    entropy: float
    """Mean entropy of the policy, nats per token."""

    def metrics(self) -> dict[str, float]:
        """Means over the answers, with the half-width of a normal 95 % interval over the prompts."""
        mean, half = mean_and_half_width(self.per_prompt([e.score for e in self.episodes]))
        found = {"score": mean, "score_ci95": half}
        for name in self.episodes[0].components:
            mean, half = mean_and_half_width(self.per_prompt([e.components[name] for e in self.episodes]))
            found[f"score/{name}"] = mean
            found[f"score/{name}_ci95"] = half
        mean, half = mean_and_half_width(self.per_prompt(self.exact_kl))
        return found | {
            "exact_kl": mean,
            "exact_kl_ci95": half,
            "sampled_kl": mean_and_half_width(self.sampled_kl)[0],
            "entropy": self.entropy,
            "length": sum(len(e.ids) for e in self.episodes) / len(self.episodes),
            "eos_share": sum(e.stop is Stop.EOS for e in self.episodes) / len(self.episodes),
            "distinct_2": distinct_n([e.text for e in self.episodes], 2),
        }

    def per_prompt(self, values: Sequence[float]) -> list[float]:
        """Means over the answers to each prompt: these are independent draws, the answers to one prompt are not."""
        own: dict[int, list[float]] = {}
        for e, value in zip(self.episodes, values, strict=True):
            own.setdefault(e.group, []).append(value)
        return [sum(group) / len(group) for group in own.values()]

    def rows(self) -> Iterator[dict[str, str | float | int | dict[str, float] | list[int] | list[float]]]:
        """One row per answer, for the run's samples; with its ids, so that others can hold a saved model against it."""
        for e, exact, sampled in zip(self.episodes, self.exact_kl, self.sampled_kl, strict=True):
            yield {
                "prompt": e.prompt.text,
                "answer": e.text,
                "score": e.score,
                "components": dict(e.components),
                "exact_kl": exact,
                "sampled_kl": sampled,
                "length": len(e.ids),
                "stop": e.stop.value,
                "prompt_ids": e.prompt.ids.tolist(),
                "ids": e.ids.tolist(),
                "sampler_logp": [float(f"{x:.8g}") for x in e.sampler_logp.tolist()],
            }


class WithGold:
    """The judges of training, and beside them judges whose word is only recorded: the gold score."""

    def __init__(self, scorer: Scorer, gold: Sequence[Scorer]) -> None:
        self.name = scorer.name
        self._scorer = scorer
        self._gold = tuple(gold)

    def __call__(self, answers: Answers) -> Scores:
        """Judge for training's total, with every judge's own score as a component."""
        scores = self._scorer(answers)
        components = dict(scores.components)
        dropped = scores.dropped
        for judge in self._gold:
            own = judge(answers)
            components |= {f"gold/{name}": values for name, values in own.components.items()}
            dropped |= own.dropped
        return Scores(total=scores.total, components=components, dropped=dropped)


def assess(
    policy: LanguagePolicy,
    reference: CausalModel,
    sampler: Sampler,
    scorer: Scorer,
    decode: Decode,
    prompts: Sequence[PromptTokens],
    settings: SamplingSettings,
    *,
    seed: int,
    budget: MicroBudget | int | None,
    rows: RowBudget | None = None,
    answers_per_prompt: int = 1,
) -> Assessment:
    """Answer each prompt, once or as often as judges of groups need, and measure the answers.

    The draws are keyed by the prompt's place alone, so two policies of one seed are compared on common random numbers.
    ``budget`` [tokens of a forward pass] and ``rows`` (as in :func:`collect`) shrink where memory runs out.
    """
    episodes = collect(
        sampler,
        scorer,
        decode,
        prompts,
        settings,
        answers_per_prompt=answers_per_prompt,
        seed=seed,
        stream="evaluation",
        step=0,
        rows=rows,
    )
    segments = Segments.of([e.prompt.ids for e in episodes], [e.ids for e in episodes])
    everyone = torch.arange(len(segments))
    with calm(policy.computes_compiled() and reference.computes_compiled(policy.compute_dtype)):
        seen = within_memory(
            budget, segments.lengths, lambda tokens: look(policy, reference, segments, everyone, budget=tokens)
        )
    exact, own, theirs = (seen.per_answer(name, segments.sizes) for name in ("exact_kl", "logp", "ref_logp"))
    return Assessment(
        episodes=tuple(episodes),
        exact_kl=tuple(exact.tolist()),
        sampled_kl=tuple((own - theirs).tolist()),
        entropy=float(seen.entropy.mean()),
    )


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """Sample mean and 1.96 standard errors (unbiased variance); the half-width is NaN for a single value."""
    x = torch.tensor(values, dtype=torch.float64)
    half = 1.96 * float(x.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(x.mean()), half


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Distinct n-grams of words over all n-grams, pooled over the texts (Li et al. 2016, §5.3); NaN if there is none."""
    grams = [tuple(words[i : i + n]) for words in (t.lower().split() for t in texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
