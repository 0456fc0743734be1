"""The embedded engine: the model's own text and log-probs, whatever shares its cache, and no trace of who came before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bridle.errors import NonFiniteLogits
from bridle.language.causal import CausalModel
from bridle.language.sampler import ReferenceSampler, Sampled, SamplingSettings, Stop, tape
from bridle.language.sampler.engine import EmbeddedSampler, _Work
from bridle.language.sampler.serving import embedded_sampler
from bridle.language.sampler.slots import Prefill, Slots
from bridle.random import generator, torch_rng, uniforms
from tests.language.tiny import VOCABULARY, tiny_model

STOP = 5
SERVED = (
    "llama",
    "qwen2",
    "qwen3",
    "gpt2",
    "mistral",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "olmo",
    "olmo2",
    "cohere",
    "granite",
    "gpt_neox",
    "opt",
    "mixtral",
)
_OWN = {"phi3": {"sliding_window": 5}, "opt": {"word_embed_proj_dim": 32}}


@pytest.fixture(autouse=True)
def _from_tape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are played from tape from the first one on, as they are in a long run."""
    monkeypatch.setattr(tape, "PAYS_FROM", 1)


def model_of(family: str) -> PreTrainedModel:
    return tiny_model(family, **_OWN.get(family, {}))


def ragged(count: int, *, longest: int = 12, seed: int = 0) -> list[Tensor]:
    draws = generator(seed, "test-prompts")
    lengths = draws.integers(1, longest + 1, size=count)
    return [torch.from_numpy(draws.integers(3, VOCABULARY, size=n)) for n in lengths]


def engine(model: PreTrainedModel, stops: tuple[int, ...] = (STOP,), **kwargs: object) -> EmbeddedSampler:
    return embedded_sampler(CausalModel(model), stops, **kwargs)  # type: ignore[arg-type]


def draws(count: int, limit: int, seed: int = 0) -> np.ndarray:
    return uniforms(seed, "test-draws", 0, range(count), limit)


def same_answers(a: list[Sampled], b: list[Sampled], *, atol: float = 1e-5) -> None:
    for x, y in zip(a, b, strict=True):
        assert x.ids.tolist() == y.ids.tolist()
        assert x.stop is y.stop
        torch.testing.assert_close(x.logp, y.logp, atol=atol, rtol=0)


def own_logp(model: PreTrainedModel, prompt: Tensor, answer: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probs of an answer by the model's own plain forward, without cache, padding or neighbours."""
    with torch.no_grad():
        logits = model(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0].float() / temperature
    return torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, answer[:, None])[:, 0]


@pytest.mark.parametrize("family", SERVED)
def test_greedy_text_is_that_of_generate(family: str) -> None:
    model, asked = model_of(family), ragged(9)
    settings = SamplingSettings(max_new_tokens=14, rows=4, top_k=1)
    answers = engine(model)(asked, draws(9, 14), settings)
    for prompt, answer in zip(asked, answers, strict=True):
        out = model.generate(
            prompt[None],
            attention_mask=torch.ones_like(prompt)[None],
            max_new_tokens=14,
            do_sample=False,
            eos_token_id=STOP,
            pad_token_id=0,
        )
        assert answer.ids.tolist() == out[0, len(prompt) :].tolist()
        assert answer.logp.abs().max() == 0.0  # one token is left: it has probability 1


@pytest.mark.parametrize("family", SERVED)
def test_log_probs_are_those_of_a_plain_forward(family: str) -> None:
    model, asked = model_of(family), ragged(12, longest=20)
    settings = SamplingSettings(max_new_tokens=16, rows=5, temperature=0.8)
    gaps = []
    for prompt, answer in zip(asked, engine(model)(asked, draws(12, 16), settings), strict=True):
        gaps.append((answer.logp - own_logp(model, prompt, answer.ids, 0.8)).abs())
        assert torch.equal(answer.logp, answer.plain_logp)
    assert torch.cat(gaps).mean() < 1e-5
    assert torch.cat(gaps).max() < 1e-4


def test_the_plain_sampler_draws_the_same() -> None:
    model, asked = tiny_model(), ragged(20)
    settings = SamplingSettings(max_new_tokens=20, rows=6, temperature=1.2)
    plain = ReferenceSampler(model, [STOP])(asked, draws(20, 20), settings)
    same_answers(engine(model)(asked, draws(20, 20), settings), plain)
    assert {a.stop for a in plain} == {Stop.EOS, Stop.LENGTH}


def test_a_sample_does_not_depend_on_batch_size_or_order() -> None:
    model, asked = tiny_model(), ragged(23)
    sampler, settings = engine(model), SamplingSettings(max_new_tokens=24, rows=64)
    key = draws(23, 24, seed=3)
    whole = sampler(asked, key, settings)
    for rows in (1, 2, 7):
        same_answers(sampler(asked, key, replace(settings, rows=rows)), whole)
    order = generator(0, "test-order").permutation(23)
    turned = sampler([asked[i] for i in order], key[order], replace(settings, rows=5))
    same_answers(turned, [whole[i] for i in order])


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
def test_samples_of_one_prompt_are_those_of_prompts_read_apart(rows: int) -> None:
    """K samples share one prefill: by copying, from a slot under way, or by reading again; each is what it would be alone."""
    model, asked = tiny_model(), [p for p in ragged(5) for _ in range(6)]
    settings, key = SamplingSettings(max_new_tokens=10, rows=rows), draws(30, 10, seed=1)
    shared = engine(model)(asked, key, settings)
    alone = [engine(model)([p], key[b : b + 1], settings)[0] for b, p in enumerate(asked)]
    same_answers(shared, alone)
    assert len({tuple(a.ids.tolist()) for a in shared[:6]}) > 1


def tokens_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each step of the engine reads, from now on."""
    read: list[int] = []
    plan = Slots.plan

    def counting(self: Slots, positions: Tensor, prefills: Sequence[Prefill]) -> None:
        read.append(len(positions) + sum(len(p.slots) * p.length for p in prefills))
        plan(self, positions, prefills)

    monkeypatch.setattr(Slots, "plan", counting)
    return read


def test_a_prompt_is_read_once_for_all_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model, read = tiny_model(), tokens_read(monkeypatch)
    sampler = engine(model, stops=())
    read.clear()
    sampler([torch.arange(3, 23)] * 8, draws(8, 6), SamplingSettings(max_new_tokens=6))
    assert read == [20, 8, 8, 8, 8, 8]  # the last token drawn is never read


def test_no_token_is_read_for_an_answer_that_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens through the model: each prompt once, and each token of an answer but its last once."""
    model, read = tiny_model(), tokens_read(monkeypatch)
    sampler, asked = engine(model), ragged(30)
    read.clear()
    answers = sampler(asked, draws(30, 40), SamplingSettings(max_new_tokens=40, rows=8))
    assert min(len(a.ids) for a in answers) < 10
    assert sum(read) == sum(len(p) + len(a.ids) - 1 for p, a in zip(asked, answers, strict=True))


def successors(model: PreTrainedModel) -> tuple[list[Sampled], list[Sampled]]:
    """Answers through few slots, so that most follow another one in theirs; and the same answers each alone."""
    asked, key = ragged(24, longest=16, seed=2), draws(24, 20, seed=2)
    settings = SamplingSettings(max_new_tokens=20, rows=3)
    sampler = engine(model, stops=tuple(range(5, 20)))
    return sampler(asked, key, settings), [sampler([p], key[b : b + 1], settings)[0] for b, p in enumerate(asked)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_an_ended_row_leaves_no_trace_in_its_successor(family: str) -> None:
    crowded, alone = successors(tiny_model(family))
    assert min(len(a.ids) for a in crowded) < 5
    same_answers(crowded, alone)


def test_the_test_above_sees_a_slot_whose_length_was_not_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    model, begin, seen = tiny_model(), _Work._begin, {"longest": 0}

    def forgetful(self: _Work, start: object) -> None:
        begin(self, start)  # type: ignore[arg-type]
        seen["longest"] = max(seen["longest"], int(self._length.max()))
        if len(self._drawn._places) > 5:
            self._length[-1] = min(seen["longest"], self._reader._slots.capacity - 1)

    monkeypatch.setattr(_Work, "_begin", forgetful)
    crowded, alone = successors(model)
    with pytest.raises(AssertionError):
        same_answers(crowded, alone)


def test_garbage_behind_an_answer_is_never_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a slot holds beyond its text may be anything finite: fill it with large numbers at each step."""
    model, asked, key = tiny_model(), ragged(12), draws(12, 16)
    settings = SamplingSettings(max_new_tokens=16, rows=4)
    clean = engine(model)(asked, key, settings)
    plan = Slots.plan

    def dirty(self: Slots, positions: Tensor, prefills: object) -> None:
        plan(self, positions, prefills)  # type: ignore[arg-type]
        for slot in range(self.count):
            used = int(positions[slot]) if slot < len(positions) else 0
            for store in (*self._keys.values(), *self._values.values()):
                behind = (slot, ..., slice(used, None)) if store.across else (slot, slice(None), slice(used, None))
                store.held[behind] = 1e4

    monkeypatch.setattr(Slots, "plan", dirty)
    same_answers(engine(model)(asked, key, settings), clean)


def test_values_are_those_of_the_head_on_the_trunk() -> None:
    model, asked = tiny_model(), ragged(10)
    with torch_rng(0, "test-head"):
        head = nn.Linear(32, 1)
        nn.init.normal_(head.weight, std=0.1)  # so that V is of size one
    actor = CausalModel(model)
    sampler = embedded_sampler(actor, (STOP,), value_head=head)
    for prompt, answer in zip(
        asked, sampler(asked, draws(10, 9), SamplingSettings(max_new_tokens=9, rows=4)), strict=True
    ):
        ids = torch.cat([prompt, answer.ids])
        columns = torch.arange(len(prompt) - 1, len(ids) - 1)
        with torch.no_grad():
            expected = head(actor.states(ids[None], torch.zeros_like(columns), columns).hidden)[:, 0]
        assert answer.values is not None
        torch.testing.assert_close(answer.values, expected, atol=1e-5, rtol=1e-5)


def test_the_plain_path_serves_a_head_that_bridle_does_not_know() -> None:
    """Without a known formula the model's own logits are drawn from; the reference has no value head here either."""
    model = tiny_model()
    actor = CausalModel(model)
    actor.form = None
    asked, key, settings = ragged(8), draws(8, 8), SamplingSettings(max_new_tokens=8, rows=3)
    same_answers(embedded_sampler(actor, (STOP,))(asked, key, settings), engine(model)(asked, key, settings))


def test_weights_are_the_trainers_own() -> None:
    """An answer after the weights have moved is the moved model's; nothing was copied or cached."""
    model, asked, key = tiny_model(), ragged(6), draws(6, 8)
    settings = SamplingSettings(max_new_tokens=8)
    sampler = engine(model)
    before = sampler(asked, key, settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    after = sampler(asked, key, settings)
    assert [a.ids.tolist() for a in before] != [a.ids.tolist() for a in after]
    same_answers(after, engine(model)(asked, key, settings), atol=0)


def test_the_models_own_attention_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    own = model.config._attn_implementation
    sampler = engine(model)
    sampler(ragged(3), draws(3, 4), SamplingSettings(max_new_tokens=4))
    assert model.config._attn_implementation == own
    monkeypatch.setattr(Slots, "plan", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sampler(ragged(3), draws(3, 4), SamplingSettings(max_new_tokens=4))
    assert model.config._attn_implementation == own


def test_a_policy_that_has_diverged_is_told() -> None:
    model = tiny_model()
    sampler = engine(model)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLogits):
        sampler(ragged(3), draws(3, 4), SamplingSettings(max_new_tokens=4))


def test_longest_answer_of_one_token_and_prompt_of_one() -> None:
    (answer,) = engine(tiny_model())([torch.tensor([7])], np.array([[0.5]]), SamplingSettings(max_new_tokens=1))
    assert len(answer.ids) == 1
    assert answer.stop in (Stop.LENGTH, Stop.EOS)


def test_bfloat16_answers_are_near_the_trainers() -> None:
    model, asked = tiny_model(), ragged(8)
    sampler = engine(model, computing=lambda: torch.autocast("cpu", torch.bfloat16))
    answers = sampler(asked, draws(8, 12), SamplingSettings(max_new_tokens=12, rows=3))
    gaps = []
    for prompt, answer in zip(asked, answers, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            gaps.append((answer.logp - own_logp(model, prompt, answer.ids)).abs())
    assert torch.cat(gaps).mean() < 0.1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the graphed step is not tested here")
def test_on_cuda_a_graphed_step_draws_what_the_plain_sampler_draws() -> None:
    model, asked = tiny_model().to("cuda"), ragged(20)
    settings, key = SamplingSettings(max_new_tokens=20, rows=6), draws(20, 20)
    same_answers(engine(model)(asked, key, settings), ReferenceSampler(model, [STOP])(asked, key, settings), atol=1e-4)
