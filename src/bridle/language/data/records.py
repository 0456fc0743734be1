"""Records of a known kind: demonstrations, prompts, preferences, rankings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from bridle.errors import DataError
from bridle.language.chat import Message
from bridle.language.data.readers import DataSettings, Row, read_rows

__all__ = [
    "Demonstration",
    "Dialogue",
    "Preference",
    "Prompt",
    "Ranking",
    "Records",
    "Text",
    "read_demonstrations",
    "read_preferences",
    "read_prompts",
    "read_rankings",
]

Text = str | tuple[Message, ...]
"""A prompt: plain text, or the messages so far."""

R = TypeVar("R")
LARGEST_MARGIN = 1e6
"""Scores are of size one: a larger margin is a slip, and no loss could be fitted to it."""
_TURN = "\n\nAssistant:"
_MESSAGES = 'a list of messages: [{"role": …, "content": …}, …]'


@dataclass(frozen=True, slots=True, kw_only=True)
class Demonstration:
    """A prompt and the answer that is to be learnt."""

    prompt: Text
    """what is asked; text may be empty."""
    answer: str
    """what is answered."""
    place: str = ""
    """where it was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialogue:
    """A whole chat, of which every turn of the assistant is to be learnt."""

    messages: tuple[Message, ...]
    """the turns in order."""
    place: str = ""
    """where it was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What a policy is asked."""

    prompt: Text
    """text or messages."""
    columns: Mapping[str, object] = field(default_factory=dict)
    """the record's other columns, which scorers receive."""
    place: str = ""
    """where it was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """Two answers to a prompt, of which one was preferred."""

    prompt: Text
    """what was asked."""
    chosen: str
    """the preferred answer."""
    rejected: str
    """the other one."""
    margin: float = 0.0
    """by how much it was preferred, in units of score, >= 0."""
    ended: tuple[bool, ...] | None = None
    """[2] False where the chosen, the rejected answer was cut by a limit; None if both ended by themselves."""
    place: str = ""
    """where it was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """K answers to a prompt, best first."""

    prompt: Text
    """what was asked."""
    answers: tuple[str, ...]
    """[K ≥ 2] the answers, best first."""
    ended: tuple[bool, ...] | None = None
    """[K] False where an answer was cut by a limit, so that no stop token follows it; None if all ended by themselves."""
    place: str = ""
    """where it was found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Records(Generic[R]):
    """The records of a source, and what is to be said about them."""

    items: tuple[R, ...]
    """the records in their order."""
    notes: tuple[str, ...] = ()
    """one line each, for example how many records were left out and why."""


def read_demonstrations(settings: DataSettings) -> Records[Demonstration | Dialogue]:
    """Read chats where the ``messages`` column exists, otherwise prompts and answers."""

    def one(row: Row) -> Demonstration | Dialogue:
        if settings.messages in row.values:
            return Dialogue(messages=_messages(row, settings.messages), place=row.place)
        return Demonstration(prompt=_prompt(row, settings.prompt), answer=row.text(settings.answer), place=row.place)

    return _read(settings, one)


def read_prompts(settings: DataSettings) -> Records[Prompt]:
    """Read prompts; of a chat, what comes before the assistant's last word. The other columns go to the scorers."""

    def one(row: Row) -> Prompt:
        column = settings.prompt
        if column not in row.values and settings.messages in row.values:
            column = settings.messages
        prompt = _prompt(row, column)
        while isinstance(prompt, tuple) and prompt and prompt[-1].role == "assistant":
            prompt = prompt[:-1]
        if not prompt and isinstance(prompt, tuple):
            raise DataError(f"{row.place}: nothing is said before the assistant speaks")
        columns = {name: value for name, value in row.values.items() if name != column}
        return Prompt(prompt=prompt, columns=columns, place=row.place)

    return _read(settings, one)


def read_preferences(settings: DataSettings) -> Records[Preference]:
    """Read prompt, chosen and rejected; without a prompt column, whole dialogues that share all but the last answer.

    Dialogues as text (hh-rlhf) are cut behind their last ``\\n\\nAssistant:``. Pairs whose prompts differ compare
    answers to different questions: they are left out, and counted in the notes.
    """

    def one(row: Row) -> Preference | None:
        if settings.chosen not in row.values and settings.answers in row.values:
            raise DataError(f"{row.place} holds ranked answers, not a pair; read rankings with --kind rankings")
        margin = _margin(row, settings.margin)
        if settings.prompt in row.values:
            prompt = _prompt(row, settings.prompt)
            first, second = (_answer(row, column) for column in (settings.chosen, settings.rejected))
            ended = _ended(row, settings.ended, 2)
            return Preference(prompt=prompt, chosen=first, rejected=second, margin=margin, ended=ended, place=row.place)
        asked, first = _split(row, settings.chosen)
        other, second = _split(row, settings.rejected)
        if asked != other:
            return None
        ended = _ended(row, settings.ended, 2)
        return Preference(prompt=asked, chosen=first, rejected=second, margin=margin, ended=ended, place=row.place)

    return _read(settings, one, "pairs left out because their prompts differ")


def read_rankings(settings: DataSettings) -> Records[Ranking]:
    """Read prompts with their ranked answers."""

    def one(row: Row) -> Ranking:
        if settings.answers not in row.values and {settings.chosen, settings.rejected} <= row.values.keys():
            raise DataError(f"{row.place} holds a pair, not ranked answers; read pairs with --kind pairs")
        answers = row[settings.answers]
        if not isinstance(answers, list | tuple) or not all(isinstance(answer, str) for answer in answers):
            raise row.wrong(settings.answers, answers, "a list of texts, best first")
        answers = [row.whole(settings.answers, answer) for answer in answers]
        if len(answers) < 2:
            raise DataError(
                f"{row.place}: {settings.answers!r} holds {len(answers)} answers; a ranking needs at least 2"
            )
        ended = _ended(row, settings.ended, len(answers))
        return Ranking(prompt=_prompt(row, settings.prompt), answers=tuple(answers), ended=ended, place=row.place)

    return _read(settings, one)


def _read(settings: DataSettings, one: Callable[[Row], R | None], left_out: str = "") -> Records[R]:
    rows = read_rows(settings)
    items = tuple(item for row in rows if (item := one(row)) is not None)
    if not items:
        raise DataError(f"{settings.path} holds no usable records: {len(rows)} {left_out}")
    missing = len(rows) - len(items)
    return Records(items=items, notes=(f"{settings.path}: {missing} of {len(rows)} {left_out}",) if missing else ())


def _ended(row: Row, column: str, count: int) -> tuple[bool, ...] | None:
    value = row.values.get(column)
    if value is None:
        return None
    if not isinstance(value, list | tuple) or len(value) != count or not all(isinstance(v, bool) for v in value):
        raise row.wrong(column, value, f"a list of {count} values true or false, one per answer in the answers' order")
    return tuple(value)


def _prompt(row: Row, column: str) -> Text:
    value = row[column]
    if isinstance(value, str):
        return row.whole(column, value)
    if not isinstance(value, list | tuple):
        raise row.wrong(column, value, f"text or {_MESSAGES}")
    return _messages(row, column)


def _messages(row: Row, column: str) -> tuple[Message, ...]:
    value = row[column]
    if not isinstance(value, list | tuple):
        raise row.wrong(column, value, _MESSAGES)
    if not value:
        raise DataError(f"{row.place}: {column!r} is an empty list, expected {_MESSAGES}")
    messages: list[Message] = []
    for turn in value:
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise DataError(f"{row.place}: turn {len(messages) + 1} of {column!r} is no message; expected {_MESSAGES}")
        messages.append(Message(role=row.whole(column, role), content=row.whole(column, content)))
    return tuple(messages)


def _margin(row: Row, column: str) -> float:
    value = row.values.get(column, 0.0)
    try:  # a CSV file holds text only
        margin = float(value) if isinstance(value, int | float | str) else -1.0
    except (ValueError, OverflowError):
        margin = -1.0
    if isinstance(value, bool) or not 0 <= margin <= LARGEST_MARGIN:
        raise row.wrong(column, value, f"a number from 0 to {LARGEST_MARGIN:g}, in units of score")
    return margin


def _answer(row: Row, column: str) -> str:
    value = _prompt(row, column)
    return value if isinstance(value, str) else value[-1].content


def _split(row: Row, column: str) -> tuple[Text, str]:
    """Tell a whole dialogue's last answer from what was said before."""
    if not isinstance(row[column], str):
        *asked, last = _messages(row, column)
        if last.role != "assistant" or not asked:
            raise DataError(f"{row.place}: {column!r} does not end with an answer of the assistant to something asked")
        return tuple(asked), last.content
    prompt, mark, answer = row.text(column).rpartition(_TURN)
    if not mark:
        raise DataError(
            f"{row.place}: {column!r} is no dialogue (it has no {_TURN!r}), and there is no prompt column; "
            "name it with --data.prompt"
        )
    return prompt + mark, answer
