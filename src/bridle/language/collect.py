"""Collecting: the policy answers prompts, the judges score the answers. Facts only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from bridle.errors import ScorerError
from bridle.language.sampler import Sampled, Sampler, SamplingSettings, Stop
from bridle.language.scorers import JSON, Answers, Scorer, Scores
from bridle.learn.memory import RowBudget, within_rows
from bridle.random import permutation, uniforms

__all__ = ["Episode", "PromptTokens", "collect", "judge", "prompts_of_step"]

Decode = Callable[[Int[Tensor, " T"]], str]
"""Token ids → text without special tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """A prompt, ready to be answered."""

    ids: Int[Tensor, " P"]
    """[P] token ids as the policy sees them (int64, on the CPU)."""
    text: str
    """The prompt as a judge reads it."""
    columns: Mapping[str, JSON]
    """The other fields of its row in the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """One answer to one prompt: what was seen, done and scored."""

    prompt: PromptTokens
    """What was answered."""
    group: int
    """Answers of one step to the same prompt share this number."""
    ids: Int[Tensor, " T"]
    """[T] the answer's token ids exactly as sampled, the stop token included."""
    sampler_logp: Float[Tensor, " T"]
    """[T] log-probabilities of the distribution that the sampler drew from, nats."""
    values: Float[Tensor, " T"] | None
    """[T] V(s_t) as the sampler saw it, in units of return; None where the critic has a trunk of its own."""
    stop: Stop
    """How it ended."""
    text: str
    """The answer as a judge reads it, without special tokens."""
    score: float
    """What the judges gave in all, in units of reward."""
    components: Mapping[str, float]
    """What each judge gave."""


def prompts_of_step(count: int, per_step: int, *, seed: int, step: int) -> list[int]:
    """Which of ``count`` prompts step ``step`` (from 0) answers: keyed epochs laid end to end, no prompt skipped."""
    first = step * per_step
    epochs: dict[int, list[int]] = {}
    chosen = []
    for position in range(first, first + per_step):
        epoch, place = divmod(position, count)
        if epoch not in epochs:
            epochs[epoch] = permutation(count, seed, "prompts", epoch).tolist()
        chosen.append(epochs[epoch][place])
    return chosen


def collect(
    sampler: Sampler,
    scorer: Scorer,
    decode: Decode,
    prompts: Sequence[PromptTokens],
    settings: SamplingSettings,
    *,
    answers_per_prompt: int,
    seed: int,
    stream: str,
    step: int,
    rows: RowBudget | None = None,
) -> list[Episode]:
    """Sample ``answers_per_prompt`` answers to each prompt and have them judged; B = prompts × answers episodes.

    Answer k to the i-th prompt is keyed (seed, stream, step, i · answers_per_prompt + k). Answers that a judge dropped are
    left out. ``rows``, in place of ``settings.rows``, shrinks where memory runs out.

    Raises:
        ScorerError: a judge failed, or the judges dropped every answer between them.
    """
    repeated = [prompt for prompt in prompts for _ in range(answers_per_prompt)]
    draws = uniforms(seed, stream, step, range(len(repeated)), settings.max_new_tokens)
    asked = [prompt.ids for prompt in repeated]
    sampled = within_rows(
        rows or settings.rows,
        len(asked),
        lambda at_once: sampler(asked, np.asarray(draws), replace(settings, rows=at_once)),
    )
    texts = [decode(answer.ids) for answer in sampled]
    groups = [position // answers_per_prompt for position in range(len(repeated))]
    scores = judge(scorer, repeated, sampled, texts, groups)
    if len(scores.dropped) == len(repeated):
        raise ScorerError("the judges left no answer that has a score of every judge; mend them")
    return [
        Episode(
            prompt=prompt,
            group=group,
            ids=answer.ids,
            sampler_logp=answer.logp,
            values=answer.values,
            stop=answer.stop,
            text=text,
            score=scores.total[b],
            components={name: values[b] for name, values in scores.components.items()},
        )
        for b, (prompt, group, answer, text) in enumerate(zip(repeated, groups, sampled, texts, strict=True))
        if b not in scores.dropped
    ]


def judge(
    scorer: Scorer,
    prompts: Sequence[PromptTokens],
    sampled: Sequence[Sampled],
    texts: Sequence[str],
    groups: Sequence[int],
) -> Scores:
    """Show finished answers to a judge."""
    names = sorted({name for prompt in prompts for name in prompt.columns})
    return scorer(
        Answers(
            prompts=[prompt.text for prompt in prompts],
            completions=list(texts),
            prompt_ids=[prompt.ids for prompt in prompts],
            completion_ids=[answer.ids for answer in sampled],
            stops=[answer.stop for answer in sampled],
            groups=list(groups),
            columns={name: [prompt.columns.get(name) for prompt in prompts] for name in names},
        )
    )
