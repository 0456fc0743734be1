"""A model's folder says before its weights are read what the open model says: words, context, what ends an answer."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import transformers

from bridle.errors import ConfigError, ModelError
from bridle.language.descriptions import describe_causal_lm, describe_reward_model
from bridle.language.models import (
    ModelSettings,
    context_length,
    load_causal_lm,
    load_reward_model,
    save_model,
    stop_ids,
)
from tests.language.tiny import FAMILIES, byte_tokenizer, tiny_model


@pytest.fixture(autouse=True)
def no_hub() -> object:
    with mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True):
        yield


@pytest.mark.parametrize(
    ("family", "generation"), [*((family, [2, 5]) for family in FAMILIES[1:]), ("llama", None), ("llama", 5)]
)
def test_it_agrees_with_the_open_model(tmp_path: Path, family: str, generation: object) -> None:
    network = tiny_model(family, vocab_size=260)
    save_model(tmp_path, network, byte_tokenizer())
    (tmp_path / "generation_config.json").unlink()
    if generation is not None:
        transformers.GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path)
    settings = ModelSettings(path=str(tmp_path), pad_token="<|pad|>")
    described = describe_causal_lm(settings)
    model, tokenizer = load_causal_lm(settings)
    assert described.stops == stop_ids(model, tokenizer)
    assert described.context == context_length(model.config) == 64
    assert described.tokenizer.get_vocab() == tokenizer.get_vocab()
    described.require_like(model, tokenizer)


def test_it_agrees_with_the_open_reward_model(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(vocab_size=260), byte_tokenizer())
    settings = ModelSettings(path=str(tmp_path))
    described = describe_reward_model(settings)
    model, tokenizer = load_reward_model(settings)
    assert described.stops == stop_ids(model, tokenizer)
    described.require_like(model, tokenizer)


def test_a_model_that_ends_its_answers_otherwise_once_it_is_open_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(vocab_size=260), byte_tokenizer())
    described = describe_causal_lm(ModelSettings(path=str(tmp_path)))
    model, tokenizer = load_causal_lm(ModelSettings(path=str(tmp_path)))
    model.generation_config.eos_token_id = [2, 7]
    with pytest.raises(ModelError, match=r"with the ids \[2, 7\] and its folder says \[2\]"):
        described.require_like(model, tokenizer)


def test_more_than_the_context_is_no_room(tmp_path: Path) -> None:
    save_model(tmp_path, tiny_model(vocab_size=260), byte_tokenizer())
    described = describe_causal_lm(ModelSettings(path=str(tmp_path)))
    assert (described.room(None), described.room(10)) == (64, 10)
    with pytest.raises(ConfigError, match="max_tokens=65: expected at most the model's context of 64 tokens"):
        described.room(65)
