"""Chats: messages through the model's own template, to token ids that are those of sampling time, with who said what.

Only the template may write control tokens. Where a message contains the text of one ("<|im_end|>"), that text is
encoded as ordinary characters, so data cannot end a turn or open another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bridle.errors import DataError, ModelError
from bridle.language.rendering import render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Message",
    "continue_ids",
    "encode_dialogue",
    "encode_prompt",
    "encode_text",
    "encode_turn",
    "require_template",
]

_OPEN, _CLOSE = "\ufdd0", "\ufdd1"  # Unicode noncharacters, set around control tokens that a message contains
_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a dialogue."""

    role: str
    """who speaks: 'system', 'user', 'assistant' or whatever the template knows."""
    content: str
    """what is said."""


def require_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot write chats."""
    if not tokenizer.chat_template:
        raise ModelError(
            "the data are chats and the tokenizer has no chat template; give one: --model.chat-template FILE"
        )


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """Token ids of a dialogue up to where the assistant is to speak.

    Raises ModelError where there is no template, DataError where the template refuses the messages.
    """
    return encode_text(tokenizer, _render(tokenizer, messages, open_turn=True))


def encode_turn(
    tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], answer: str, stops: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt, as :func:`encode_prompt` gives them, and of the assistant's answer with its stop token."""
    before = _render(tokenizer, prompt, open_turn=True)
    after = _render(tokenizer, [*prompt, Message(role="assistant", content=answer)], open_turn=False)
    if not after.startswith(before):
        raise _rewrites()
    ids = encode_text(tokenizer, before)
    return ids, _up_to_stop(tokenizer, continue_ids(tokenizer, ids, before, after[len(before) :]), stops)


def encode_dialogue(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], stops: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Token ids of a whole dialogue, and which of them the assistant said: each of its turns with its stop token.

    The turns are found by rendering the dialogue prefix by prefix, or by the template's own ``{% generation %}`` marks
    where it has them. Raises ModelError where the template is missing, rewrites earlier turns when later ones are
    added, or ends the assistant's turn with none of ``stops``; DataError where it refuses the messages or nobody
    answers.
    """
    if not any(message.role == "assistant" for message in messages):
        raise DataError("the dialogue holds no message of the role 'assistant'")
    if messages[0].role == "assistant":
        raise DataError("the dialogue begins with the assistant; it must begin with the message that is answered")
    require_template(tokenizer)
    if _GENERATION.search(str(tokenizer.chat_template)):
        return _encode_by_marks(tokenizer, messages)
    whole = _render(tokenizer, messages, open_turn=False)
    ids: list[int] = []
    said: list[bool] = []
    text = ""
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        before = _render(tokenizer, messages[:index], open_turn=True)
        after = _render(tokenizer, messages[: index + 1], open_turn=False)
        if not (before.startswith(text) and after.startswith(before) and whole.startswith(after)):
            raise _rewrites()
        ids += continue_ids(tokenizer, ids, text, before[len(text) :])
        said += [False] * (len(ids) - len(said))
        turn = continue_ids(tokenizer, ids, before, after[len(before) :])
        said += [True] * len(_up_to_stop(tokenizer, turn, stops))
        ids += turn
        said += [False] * (len(ids) - len(said))
        text = after
    return ids, said


def _rewrites() -> ModelError:
    return ModelError(
        "the chat template rewrites earlier turns when later ones are added, so what the assistant says cannot be told "
        "apart; use a template with {% generation %} marks (--model.chat-template FILE), or one answer per record"
    )


def _up_to_stop(tokenizer: PreTrainedTokenizerBase, turn: list[int], stops: Sequence[int]) -> list[int]:
    """Cut what the template writes behind the stop token: nobody says that."""
    end = next((place for place, token in enumerate(turn) if token in stops), None)
    if end is None:
        named = ", ".join(repr(tokenizer.convert_ids_to_tokens(stop)) for stop in stops)
        raise ModelError(
            f"the chat template ends the assistant's turn with no stop token ({named}); "
            "name the token that it ends with: --model.eos-token '<|im_end|>'"
        )
    return turn[: end + 1]


def continue_ids(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, more: str, *, opening: Sequence[int] = ()
) -> list[int]:
    """Token ids that ``more`` adds to ``text``, whose ids (``opening`` first) are kept as they are.

    The two are tokenised jointly. Where that merges characters across the boundary, ``more`` is tokenised behind a
    newline instead: by itself, some tokenizers would give it a leading space.
    """
    for before, known in ((text, list(ids)), ("\n", [*opening, *encode_text(tokenizer, "\n")])):
        joint = [*opening, *encode_text(tokenizer, before + more)]
        if joint[: len(known)] == known:
            return joint[len(known) :]
    return encode_text(tokenizer, more)


def encode_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a text without the tokenizer's opening; what :func:`_defuse` has marked is read as characters."""
    ids: list[int] = []
    for place, piece in enumerate(re.split(f"[{_OPEN}{_CLOSE}]", text)):
        if piece:
            plain = place % 2 == 1
            ids += tokenizer.encode(piece, add_special_tokens=False, split_special_tokens=plain, verbose=False)
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, open_turn: bool) -> str:
    require_template(tokenizer)
    control = _control_tokens(tokenizer)
    conversation = [{"role": m.role, "content": _defuse(m.content, control)} for m in messages]
    return render(tokenizer, conversation, open_turn=open_turn).text


def _encode_by_marks(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
    control = _control_tokens(tokenizer)
    if any(control.search(message.content) for message in messages):
        raise DataError("a message contains a control token of the tokenizer, which this template would let through")
    rendered = render(tokenizer, [{"role": m.role, "content": m.content} for m in messages], marks=True)
    out = tokenizer(rendered.text, add_special_tokens=False, verbose=False)
    ids = list(out["input_ids"])
    said = [False] * len(ids)
    for start, end in rendered.spans:
        first, last = out.char_to_token(start), out.char_to_token(end - 1)
        if first is not None:
            stop = len(ids) if last is None else last + 1
            said[first:stop] = [True] * (stop - first)
    if not any(said):
        raise ModelError("the chat template's {% generation %} marks hold nothing that the assistant says")
    return ids, said


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Match the special tokens, and the other added tokens that the template writes."""
    template = str(tokenizer.chat_template)
    tokens = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special or (token.content in template and not token.content.isspace())
    ]
    alternatives = "|".join(re.escape(token) for token in sorted(tokens, key=len, reverse=True))
    return re.compile(alternatives or r"(?!)")


def _defuse(content: str, control: re.Pattern[str]) -> str:
    clean = content.replace(_OPEN, "").replace(_CLOSE, "")
    return control.sub(lambda found: f"{_OPEN}{found[0]}{_CLOSE}", clean)
