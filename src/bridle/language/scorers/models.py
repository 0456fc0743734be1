"""A reward model as a judge, and the settings from which a job builds all its judges."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import torch
from jaxtyping import Int
from torch import Tensor

from bridle.errors import ConfigError, ModelError, ScorerError
from bridle.language.adapters import Base, adapted_reward_model
from bridle.language.chat import Message
from bridle.language.data import Encoder
from bridle.language.descriptions import describe_reward_model
from bridle.language.kinds import is_classifier
from bridle.language.models import (
    ModelSettings,
    adapter_of,
    check_reward_padding,
    disable_dropout,
    load_reward_model,
    load_tokenizer,
    stop_ids,
)
from bridle.language.reward_model import check_lengths, check_score_head, score_sequences
from bridle.language.sampler import Stop
from bridle.language.scorers.answers import Answers, Scorer, Scores, WeightedSum
from bridle.language.scorers.asking import JudgingSettings, Mishap
from bridle.language.scorers.functions import FunctionScorer, GroupScorer
from bridle.learn.memory import MicroBudget, within_memory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["RewardModelScorer", "RewardSettings", "build_scorer", "check_judge", "open_functions", "shares_ids"]


LARGEST_WEIGHT = 1e3
"""With the largest score, still far inside of float32."""


class RewardModelScorer:
    """A sequence classifier with one output as a judge; it reads its score at each text's last token.

    Without ``encode`` the model shares the policy's token ids: prompt and answer are scored exactly as sampled, stop
    token included, and never tokenised again. With it, ``encode(prompt, completion, stop)`` gives the model's own ids.

    Raises :class:`~bridle.errors.ModelError` for a text longer than the model's context, and
    :class:`~bridle.errors.ScorerError` for a score that is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        encode: Callable[[str, str, Stop], Int[Tensor, " L"]] | None = None,
        micro_tokens: int = 16_384,
        name: str = "reward_model",
    ) -> None:
        self.name = name
        self.model = model
        self.budget = MicroBudget(micro_tokens, name="judged_tokens", of="the judge's micro-batches")
        """how many tokens it reads at once: halved where memory runs out; whoever owns the judge tells it."""
        self._encode = encode
        disable_dropout(model)
        check_score_head(model)

    @property
    def reads_ids(self) -> bool:
        """Whether it scores the policy's ids as sampled."""
        return self._encode is None

    def __call__(self, answers: Answers) -> Scores:
        """Score every answer, batched by length, without gradients."""
        if self._encode is None:
            pairs = zip(answers.prompt_ids, answers.completion_ids, strict=True)
            sequences = [torch.cat([prompt, completion]) for prompt, completion in pairs]
        else:
            texts = zip(answers.prompts, answers.completions, answers.stops, strict=True)
            sequences = [self._encode(prompt, completion, stop) for prompt, completion, stop in texts]
        check_lengths(self.model, sequences, "ask for shorter answers, or take a reward model with a longer context")
        scored = within_memory(
            self.budget,
            torch.tensor([len(sequence) for sequence in sequences]),
            lambda tokens: score_sequences(self.model, sequences, micro_tokens=tokens),
        )
        values = scored.tolist()
        for position, value in enumerate(values):
            if not math.isfinite(value):
                raise ScorerError(f"{self.name} gave {value} for answer {position}; its weights are damaged")
        return Scores(total=values, components={self.name: values})


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSettings:
    """Who judges the answers; several judges are added up. Name at least one."""

    model: str | None = None
    """Folder or hub name of a reward model (a sequence classifier with one output)."""
    pad_token: str | None = None
    """Padding token for the reward model, if its tokenizer has none of its own."""
    functions: tuple[str, ...] = ()
    """Functions ``score(prompts, completions, **columns)``, each as module:function or file.py:function."""
    groups: tuple[str, ...] = ()
    """Functions ``rank(prompt, completions, **columns)`` that score the K answers to a prompt together."""
    rankings: tuple[str, ...] = ()
    """Functions like ``groups`` that return each answer's place, lower is better, instead of a score."""
    weights: tuple[float, ...] = ()
    """One weight per judge, in the order model, functions, groups, rankings; all 1 if left out."""
    judging: JudgingSettings = field(default_factory=JudgingSettings)
    """What follows when a function fails."""

    def __post_init__(self) -> None:
        """Refuse a jury without judges, and weights that do not fit it."""
        if self.judges == 0:
            remedy = "pass --reward.model FOLDER, or --reward.functions module:function"
            raise ConfigError(f"nobody judges the answers; {remedy}")
        if self.weights and len(self.weights) != self.judges:
            raise ConfigError.of("reward.weights", self.weights, f"one weight for each of {self.judges} judges")
        if not all(abs(weight) <= LARGEST_WEIGHT for weight in self.weights):
            raise ConfigError.of(
                "reward.weights", self.weights, f"numbers from −{LARGEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
            )
        specs = (*self.functions, *self.groups, *self.rankings)
        if len(set(specs)) < len(specs):
            raise ConfigError.of("reward.functions", specs, "each judge once", "a weight makes one count more")
        if self.pad_token is not None and self.model is None:
            raise ConfigError.of("reward.pad_token", self.pad_token, "a reward model to use it", "set reward.model")

    @property
    def sees_groups(self) -> bool:
        """Whether a judge looks at the K answers to a prompt together."""
        return bool(self.groups or self.rankings)

    @property
    def judges(self) -> int:
        """How many judges there are."""
        return (self.model is not None) + len(self.functions) + len(self.groups) + len(self.rankings)


@dataclass(frozen=True, slots=True, kw_only=True)
class Functions:
    """The judges that are functions, imported and their signatures read; make them with :func:`open_functions`."""

    scorers: tuple[FunctionScorer | GroupScorer, ...]
    """in the order functions, groups, rankings."""
    gold: tuple[FunctionScorer, ...]
    """those that judge held-out answers only."""
    mishaps: list[Mishap]
    """where all of them note their failures."""

    def require(self, columns: Collection[str]) -> None:
        """Refuse data that lack a column which one of them cannot do without; raises ScorerError."""
        for judge in (*self.scorers, *self.gold):
            judge.require(columns)


def open_functions(settings: RewardSettings, gold: Sequence[str] = ()) -> Functions:
    """Import the judges that are functions; raises ScorerError where one cannot be."""
    names = _names((*settings.functions, *settings.groups, *settings.rankings))
    mishaps: list[Mishap] = []
    how: _How = {"judging": settings.judging, "mishaps": mishaps}
    scorers: list[FunctionScorer | GroupScorer] = [
        *(FunctionScorer(spec, name=names[spec], **how) for spec in settings.functions),
        *(GroupScorer(spec, name=names[spec], **how) for spec in settings.groups),
        *(GroupScorer(spec, kind="ranks", name=names[spec], **how) for spec in settings.rankings),
    ]
    own = _names(gold)
    judges = tuple(FunctionScorer(spec, name=own[spec], **how) for spec in own)
    return Functions(scorers=tuple(scorers), gold=judges, mishaps=mishaps)


def check_judge(settings: RewardSettings, tokenizer: PreTrainedTokenizerBase, longest: int) -> None:
    """Refuse a reward model that cannot judge texts of the policy's tokenizer, up to ``longest`` tokens of it.

    Only its folder's descriptions are read. Raises ModelError: it cannot be opened, has no head, or, where it reads ids as
    sampled, a context that is too short.
    """
    if settings.model is None:
        return
    described = describe_reward_model(_model_settings(settings))
    if not described.scores:
        raise _headless(settings.model)
    room = described.context
    if shares_ids(tokenizer, described.tokenizer) and room is not None and longest > room:
        raise ModelError(
            f"prompt and answer may reach {longest} tokens and the reward model reads at most {room}; "
            "ask for shorter answers (--sampling.max-new-tokens), or take a reward model with a longer context"
        )


def _model_settings(settings: RewardSettings) -> ModelSettings:
    assert settings.model is not None
    return ModelSettings(path=settings.model, pad_token=settings.pad_token)


def _headless(name: str) -> ModelError:
    return ModelError(f"{name} is not a reward model, its head is missing; train one: bridle reward")


def build_scorer(
    settings: RewardSettings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    functions: Functions | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    base: Base | None = None,
) -> WeightedSum:
    """Open every judge that ``settings`` name; ``tokenizer`` is the policy's, ``functions`` what is imported already.

    A reward model whose tokenizer gives the policy's tokens the same ids scores the ids as sampled; any other reads the
    text through its own tokenizer. One that is an adapter on ``base``, the policy's own, shares its weights. Judges are
    called by their function's name, by the whole spec where two share it.

    Raises ModelError and ScorerError where a judge cannot be opened.
    """
    judges = open_functions(settings) if functions is None else functions
    scorers: list[Scorer] = []
    if settings.model is not None:
        model, own = _open_judge(_model_settings(settings), base, device, dtype)
        if not is_classifier(model.config):
            raise _headless(settings.model)
        encode = None if shares_ids(tokenizer, own) else _own_encoding(model, own)
        scorers.append(RewardModelScorer(model.eval(), encode=encode))
    scorers += judges.scorers
    return WeightedSum(scorers, settings.weights or (1.0,) * len(scorers), mishaps=judges.mishaps)


def _open_judge(
    where: ModelSettings, base: Base | None, device: torch.device | str, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a reward model; one that is an adapter on ``base`` without a second copy of the base's weights."""
    adapter = adapter_of(where)
    if base is None or adapter is None or not base.is_of(adapter):
        return load_reward_model(where, device=device, dtype=dtype)
    tokenizer = load_tokenizer(where)
    check_reward_padding(tokenizer)
    model = adapted_reward_model(base, adapter)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.requires_grad_(False), tokenizer


class _How(TypedDict):
    judging: JudgingSettings
    mishaps: list[Mishap]


def _names(specs: Sequence[str]) -> dict[str, str]:
    """Call judges by their function's name, by the whole spec where two share it."""
    short = [spec.rpartition(":")[2] for spec in specs]
    return dict(zip(specs, short if len(set(short)) == len(short) else specs, strict=True))


def shares_ids(policy: PreTrainedTokenizerBase, reward: PreTrainedTokenizerBase) -> bool:
    """Whether every token of the policy's tokenizer has the same id in the reward model's (which may know more)."""
    theirs = reward.get_vocab()
    return all(theirs.get(token) == index for token, index in policy.get_vocab().items())


def _own_encoding(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Callable[[str, str, Stop], Int[Tensor, " L"]]:
    """Encode a text as the reward model was trained to read it; an answer that was cut gets no stop token here either.

    For a model with a chat template the prompt is one message of the user.
    """
    encoder = Encoder.of(tokenizer, stop_ids(model, tokenizer))

    def encode(prompt: str, completion: str, stop: Stop) -> Int[Tensor, " L"]:
        asked = (Message(role="user", content=prompt),) if tokenizer.chat_template else prompt
        ids = encoder.answer(asked, completion).ids
        if stop is Stop.EOS or int(ids[-1]) not in encoder.stops:
            return ids
        return ids[:-1]

    return encode
