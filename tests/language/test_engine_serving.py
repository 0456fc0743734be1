"""Which sampler serves which model, and stop strings wherever tokens cut them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bridle.errors import ConfigError, ModelError
from bridle.language.causal import CausalModel
from bridle.language.models import ModelSettings, load_causal_lm, stop_ids
from bridle.language.sampler import ReferenceSampler, SamplingSettings, Stop
from bridle.language.sampler.engine import EmbeddedSampler
from bridle.language.sampler.serving import choose_sampler, embedded_sampler, require_servable
from bridle.language.sampler.slots import Slots
from bridle.language.sampler.stopping import Stopping
from bridle.random import uniforms
from tests.language.tiny import byte_tokenizer, tiny_model

UNSERVED: dict[str, dict[str, Any]] = {
    "bloom": {},
    "falcon": {},
    "mamba": {},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}},
}


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("bloom", "cannot be replaced from outside"),
        ("falcon", "cannot be replaced from outside"),
        ("mamba", "not plain attention"),
        ("gpt_oss", "attention sinks"),
        ("llama", "dynamic rotary positions"),
    ],
)
def test_models_that_the_engine_cannot_serve_are_refused_by_name(family: str, why: str) -> None:
    model = tiny_model(family, **UNSERVED[family])
    actor = CausalModel(model)
    with pytest.raises(ModelError, match=f"cannot serve {type(model).__name__}: .*{why}"):
        choose_sampler("engine", actor, [5])
    sampler, warning = choose_sampler("auto", actor, [5])
    assert isinstance(sampler, ReferenceSampler)
    assert warning is not None
    assert type(model).__name__ in warning
    assert "plain sampler" in warning


def test_auto_takes_the_engine_where_it_serves_and_reference_is_honoured() -> None:
    actor = CausalModel(tiny_model())
    sampler, warning = choose_sampler("auto", actor, [5])
    assert isinstance(sampler, EmbeddedSampler)
    assert warning is None
    assert isinstance(choose_sampler("reference", actor, [5])[0], ReferenceSampler)


def test_the_trial_sees_attention_that_is_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that lets a row see one token too many, or one too few, is found before anything is sampled."""
    actor, mask = CausalModel(tiny_model()), Slots._mask
    require_servable(actor)

    def blind(self: Slots, window: int | None, heads: int, dtype: torch.dtype) -> torch.Tensor:
        out = mask(self, window, heads, dtype).clone()
        out[:, :, 0] = float("-inf")
        return out

    monkeypatch.setattr(Slots, "_mask", blind)
    with pytest.raises(ModelError, match="off by"):
        require_servable(actor)


def test_window_layers_are_read_off_the_configuration() -> None:
    assert require_servable(CausalModel(tiny_model("mistral"))) == (6, 6)
    assert require_servable(CausalModel(tiny_model("gemma2"))) == (16, None)


def alphabet(ids: list[int]) -> str:
    """Pieces of several characters, and one that is empty."""
    return "".join(("", "a", "b", "ab", "bc", "c", "\n", "\nUser", "User:", "\n\n")[i] for i in ids)


@pytest.mark.parametrize(
    ("tokens", "texts", "length"),
    [
        ([1, 2, 5, 1], ("bc",), 3),  # cut by the tokens: a|b|c
        ([3, 5, 1], ("abc",), 2),
        ([1, 4, 1], ("b",), 2),  # inside one token
        ([6, 8, 1], ("\nUser:",), 2),
        ([1, 0, 0, 2, 0, 5], ("abc",), 6),  # empty pieces between
        ([9, 1], ("\n\n", "a"), 1),
        ([1, 1, 1], ("b",), None),
        ([1, 1] * 200 + [2, 0, 5], ("abc",), 403),  # far into a long answer
        ([0] * 100 + [1] + [0] * 100 + [2], ("ab",), 202),
    ],
)
def test_stop_strings_are_seen_across_tokens(tokens: list[int], texts: tuple[str, ...], length: int | None) -> None:
    watch = Stopping((), texts, alphabet)
    for t, token in enumerate(tokens, start=1):
        ended = watch.ended([7], [token])
        assert ended == ({7: Stop.STRING} if t == length else {})
        if ended:
            break
    else:
        assert length is None


def test_answers_are_watched_apart_and_a_stop_token_comes_first() -> None:
    watch = Stopping((5,), ("ab", "c"), alphabet)
    assert watch.ended([0, 1], [1, 2]) == {}
    assert watch.ended([0, 1], [2, 1]) == {0: Stop.STRING}
    assert watch.ended([1, 2], [5, 1]) == {1: Stop.EOS}
    assert watch.ended([2], [2]) == {2: Stop.STRING}


def test_stop_strings_need_a_tokenizer() -> None:
    with pytest.raises(ConfigError, match="stop_strings"):
        Stopping((5,), ("ab",), None)


@pytest.mark.parametrize("kind", ["engine", "reference"])
def test_an_answer_ends_with_the_token_that_completes_a_stop_string(kind: Any) -> None:
    """The same answers without stop strings tell where each must end."""
    tokenizer = byte_tokenizer()
    actor = CausalModel(tiny_model(vocab_size=len(tokenizer)))
    decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    sampler, _ = choose_sampler(kind, actor, [2], decode=decode)
    asked, key = [torch.arange(3, 5 + b % 5) for b in range(24)], uniforms(0, "t", 0, range(24), 24)
    free = sampler(asked, key, SamplingSettings(max_new_tokens=24, rows=5))
    stops = ("a", "zq", decode(free[0].ids[3:6].tolist()))
    cut = sampler(asked, key, SamplingSettings(max_new_tokens=24, rows=5, stop_strings=stops))
    for whole, short in zip(free, cut, strict=True):
        texts = [decode(whole.ids[: n + 1].tolist()) for n in range(len(whole.ids))]
        first = next((n + 1 for n, text in enumerate(texts) if any(s in text for s in stops)), None)
        assert short.ids.tolist() == whole.ids[: first or len(whole.ids)].tolist()
        assert short.stop is (whole.stop if first is None else Stop.STRING)
    assert {a.stop for a in cut} >= {Stop.STRING, Stop.LENGTH}


def test_a_real_model_writes_the_story_it_is_known_for(shared_data: Any) -> None:
    """Greedy text after <s>, its log-probs as the trainer has them, and a stop string inside a sentence."""
    model, tokenizer = load_causal_lm(ModelSettings(path=str(shared_data / "models/stories260K")))
    actor = CausalModel(model)
    decode = lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))  # noqa: E731
    sampler = embedded_sampler(actor, stop_ids(model, tokenizer), decode=decode)
    greedy = SamplingSettings(max_new_tokens=60, top_k=1)
    (story,) = sampler([torch.tensor([1])], uniforms(0, "t", 0, [0], 60), greedy)
    assert decode(story.ids.tolist()).startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    )
    (cut,) = sampler(
        [torch.tensor([1])],
        uniforms(0, "t", 0, [0], 60),
        SamplingSettings(max_new_tokens=60, top_k=1, stop_strings=("named Lily",)),
    )
    assert decode(cut.ids.tolist()).endswith("named Lily")
    asked = [
        torch.tensor([1, *tokenizer("One day", add_special_tokens=False).input_ids][: 1 + b % 3]) for b in range(12)
    ]
    gaps = []
    for prompt, answer in zip(
        asked, sampler(asked, uniforms(1, "t", 0, range(12), 64), SamplingSettings(rows=5)), strict=True
    ):
        ids = torch.cat([prompt, answer.ids])
        columns = torch.arange(len(prompt) - 1, len(ids) - 1)
        with torch.no_grad():
            states = actor.states(ids[None], torch.zeros_like(columns), columns)
            logp, _ = actor.logprobs(states.features, answer.ids, with_entropy=False)
        gaps.append((logp - answer.logp).abs())
    assert torch.cat(gaps).mean() < 1e-5
    assert torch.cat(gaps).max() < 1e-4
