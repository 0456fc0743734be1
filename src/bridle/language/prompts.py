"""Prompts to answer and demonstrations to keep in mind, from the user's files to tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor

from bridle.errors import ConfigError
from bridle.language.collect import PromptTokens
from bridle.language.data import DataSettings, Encoded, read_demonstrations, read_prompts
from bridle.language.data.encoding import encode_demonstrations, encode_prompts
from bridle.language.data.records import Prompt, Text
from bridle.language.descriptions import Description
from bridle.language.likelihood import token_losses
from bridle.language.policy import LanguagePolicy
from bridle.language.scorers import JSON
from bridle.random import generator

__all__ = ["DemonstrationMix", "MixSettings", "load_mix", "load_prompts"]


def load_prompts(
    settings: DataSettings, described: Description, answer_tokens: int
) -> tuple[list[PromptTokens], tuple[str, ...]]:
    """Read and encode prompts that leave room for an answer; also return notes on what was left out.

    Raises DataError naming the record that cannot serve.
    """
    records = read_prompts(settings)
    kept, notes = encode_prompts(
        records.items,
        described.encoder,
        context=described.context,
        answer_tokens=answer_tokens,
        long=settings.long,
    )
    prompts = [
        PromptTokens(ids=item.ids, text=_as_text(item.prompt.prompt), columns=_columns(item.prompt)) for item in kept
    ]
    return prompts, (*records.notes, *notes)


def _as_text(prompt: Text) -> str:
    """What a judge reads: the text itself, or a chat's turns, one block each."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message.role}: {message.content}" for message in prompt)


def _columns(prompt: Prompt) -> dict[str, JSON]:
    columns = cast("dict[str, JSON]", dict(prompt.columns))
    if not isinstance(prompt.prompt, str):
        columns["messages"] = [{"role": m.role, "content": m.content} for m in prompt.prompt]
    return columns


@dataclass(frozen=True, slots=True, kw_only=True)
class MixSettings:
    """Demonstrations whose likelihood is raised beside the reward (Ouyang et al. 2022, eq. 2, "PPO-ptx")."""

    path: str | None = None
    """File of demonstrations; None mixes in nothing."""
    coefficient: float = 0.0
    """Weight of the mean negative log-likelihood, units of reward per nat."""
    batch: int = 32
    """Demonstrations beside each optimiser step."""
    long: Literal["refuse", "drop", "truncate_left"] = "refuse"
    """What to do with what is longer than the context: an error, leave it out, or cut the prompt's beginning."""

    def __post_init__(self) -> None:
        """Refuse a coefficient without demonstrations and the other way round."""
        if (self.path is None) != (self.coefficient == 0.0) or self.coefficient < 0:
            remedy = "set both mix.path and mix.coefficient, or neither"
            raise ConfigError.of("mix.coefficient", self.coefficient, "a number > 0 with mix.path", remedy)
        if self.batch < 1:
            raise ConfigError.of("mix.batch", self.batch, "a number of demonstrations >= 1")


class DemonstrationMix:
    """Draws keyed batches of demonstrations and gives their mean loss."""

    def __init__(self, items: Sequence[Encoded], settings: MixSettings, notes: tuple[str, ...] = ()) -> None:
        self.notes = notes
        """one line each on demonstrations that were left out or cut."""
        self._items = tuple(items)
        self._settings = settings

    def of_step(self, policy: LanguagePolicy, *, seed: int, step: int) -> Callable[[int, int | None], Iterator[Tensor]]:
        """Return, for one update, (``taken``, tokens of a forward pass) → coefficient · mean over target tokens of −log π.

        The mean comes in parts, each of at most so many tokens, that add up to it.
        """

        def loss(taken: int, micro_tokens: int | None) -> Iterator[Tensor]:
            draw = generator(seed, "mix", step, taken).integers(0, len(self._items), size=self._settings.batch)
            batch = [self._items[i] for i in draw.tolist()]
            share = self._settings.coefficient / sum(int(item.learnt.sum()) for item in batch)
            for losses in token_losses(policy.actor, batch, micro_tokens, policy.computing):
                yield share * losses.sum()

        return loss


def load_mix(settings: MixSettings, described: Description) -> DemonstrationMix | None:
    """Read and encode the demonstrations to mix in; None if there are none."""
    if settings.path is None:
        return None
    items, notes = encode_demonstrations(
        read_demonstrations(DataSettings(path=settings.path)).items,
        described.encoder,
        context=described.context,
        long=settings.long,
        option="--mix.long",
    )
    return DemonstrationMix(items, settings, notes)
