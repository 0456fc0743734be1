"""What is unusual about a tokenizer's special tokens: what is handled, and what a reward model cannot do with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bridle.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["check_reward_padding", "tokenizer_notes"]


def check_reward_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a reward model's tokenizer whose pad token is missing or also ends a sequence.

    ``AutoModelForSequenceClassification`` reads its score at the last token that is not padding: with pad = eos that is
    the token before the end, and outside Bridle the model would give other scores than it was trained for.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "a reward model needs a pad token and this tokenizer has none; add one: --model.pad-token '<|pad|>'"
        )
    if tokenizer.pad_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        raise ModelError(
            f"pad = eos = {tokenizer.pad_token!r}: a reward model reads its score at the last token that is not "
            "padding, so pad needs a token of its own; add one: --model.pad-token '<|pad|>'"
        )


def tokenizer_notes(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Say what is unusual about a tokenizer's special tokens, and that it is handled; to be shown once per run."""
    notes = []
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id == tokenizer.bos_token_id:
        notes.append(
            f"bos = eos = {tokenizer.eos_token!r} (id {tokenizer.eos_token_id}): the first one opens the prompt, "
            "a later one ends the answer"
        )
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        notes.append(
            f"pad = eos = {tokenizer.pad_token!r}: harmless for a policy, whose masks come from lengths, not from ids"
        )
    return tuple(notes)
