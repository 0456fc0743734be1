"""What a judge is shown and what it says, and the weighted sum of several judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from jaxtyping import Int
from torch import Tensor

from bridle.errors import ConfigError
from bridle.language.sampler import Stop
from bridle.language.scorers.asking import Mishap

__all__ = ["JSON", "LARGEST_SCORE", "Answers", "Scorer", "Scores", "WeightedSum"]

JSON: TypeAlias = "bool | int | float | str | list[JSON] | dict[str, JSON] | None"
"""A value out of a data file's column."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """B finished answers, as a judge sees them."""

    prompts: list[str]
    """[B] each answer's prompt as text, as a judge should read it."""
    completions: list[str]
    """[B] the answers, decoded without special tokens."""
    prompt_ids: list[Int[Tensor, " P"]]
    """[B] each prompt's token ids, exactly as the policy saw them (int64, on the CPU)."""
    completion_ids: list[Int[Tensor, " T"]]
    """[B] each answer's token ids, exactly as sampled, a sampled stop token included (int64, on the CPU)."""
    stops: list[Stop]
    """[B] how each answer ended."""
    groups: list[int]
    """[B] answers to the same prompt share a number."""
    columns: Mapping[str, list[JSON]]
    """name → [B], the other fields of each answer's prompt in the data."""

    def __post_init__(self) -> None:
        """Refuse fields of different lengths, and a group whose prompts differ."""
        for name in ("completions", "prompt_ids", "completion_ids", "stops", "groups"):
            if len(getattr(self, name)) != len(self):
                raise ValueError(f"{name} has length {len(getattr(self, name))}, prompts {len(self)}")
        for name, values in self.columns.items():
            if len(values) != len(self):
                raise ValueError(f"column {name!r} has length {len(values)}, prompts {len(self)}")
        first: dict[int, str] = {}
        for group, prompt in zip(self.groups, self.prompts, strict=True):
            if first.setdefault(group, prompt) != prompt:
                raise ValueError(f"group {group} holds answers to different prompts")

    def __len__(self) -> int:
        """Return the number of answers B."""
        return len(self.prompts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """What one judge, or several together, gave to B answers."""

    total: list[float]
    """[B] the score of each answer, finite but where dropped, in units of reward."""
    components: dict[str, list[float]]
    """judge's name → [B] its own score before weighing, for the record."""
    dropped: frozenset[int] = frozenset()
    """answers that a judge has no score for, to be left out; theirs is NaN."""


LARGEST_SCORE = 1e15
"""Sums of squares of scores up to here stay finite in float32, in which rewards, values and advantages are computed."""


class Scorer(Protocol):
    """Anything that can judge whole answers."""

    @property
    def name(self) -> str:
        """What the records call this judge."""
        ...

    def __call__(self, answers: Answers) -> Scores:
        """Judge every answer; raise :class:`~bridle.errors.ScorerError` where the judge fails."""
        ...


class WeightedSum:
    """Several judges as one: total_b = Σ_j w_j · score_j(b); every judge's own score is kept as a component."""

    def __init__(
        self,
        scorers: Sequence[Scorer],
        weights: Sequence[float],
        *,
        name: str = "reward",
        mishaps: list[Mishap] | None = None,
    ) -> None:
        """``mishaps`` is where the judges note their failures; whoever asks them empties it."""
        self.mishaps = [] if mishaps is None else mishaps
        if len(weights) != len(scorers):
            raise ConfigError.of("weights", tuple(weights), f"one weight for each of {len(scorers)} judges")
        names = [scorer.name for scorer in scorers]
        if len(set(names)) != len(names):
            raise ConfigError.of("names", names, "a different name for each judge")
        self.name = name
        self.scorers = tuple(scorers)
        self.weights = tuple(float(weight) for weight in weights)

    def __call__(self, answers: Answers) -> Scores:
        """Ask every judge and add up."""
        total = [0.0] * len(answers)
        components: dict[str, list[float]] = {}
        dropped: frozenset[int] = frozenset()
        for scorer, weight in zip(self.scorers, self.weights, strict=True):
            scores = scorer(answers)
            total = [t + weight * s for t, s in zip(total, scores.total, strict=True)]
            components |= scores.components
            dropped |= scores.dropped
        return Scores(total=total, components=components, dropped=dropped)
