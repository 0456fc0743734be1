"""The plain sampler: draws from the distribution it says, stops where it must, and does not care about its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bridle.errors import ConfigError, NonFiniteLogits
from bridle.language.sampler import ReferenceSampler, SamplingSettings, Stop
from bridle.language.sampler.drawing import inverse_cdf
from bridle.random import torch_rng, uniforms

STOP = 5


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    with torch_rng(0, "test-model"):
        return LlamaForCausalLM(config).eval()


def prompts(count: int) -> list[torch.Tensor]:
    return [torch.arange(1, 2 + b % 4) for b in range(count)]


def test_inverse_cdf_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.2, 0.0, 0.5, 0.3]])).expand(6, 4)
    u = torch.tensor([0.0, 0.19, 0.2, 0.69, 0.71, 1.0 - 2.0**-23])
    token, logp = inverse_cdf(logits, u)
    assert token.tolist() == [0, 0, 2, 2, 3, 3]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.2, 0.2, 0.5, 0.5, 0.3, 0.3]))


def test_inverse_cdf_never_draws_the_impossible_at_the_edges() -> None:
    logits = torch.full((1, 1000), float("-inf"))
    logits[0, [3, 500]] = 0.0
    for u in (0.0, 0.4999, 0.5, 1.0 - 2.0**-23):
        token, logp = inverse_cdf(logits, torch.tensor([u]))
        assert token.item() in (3, 500)
        assert torch.isfinite(logp).all()


def test_frequencies_are_those_of_softmax() -> None:
    """A grid of uniforms is a perfect sample: each token's share is its probability to within 1/n."""
    logits = torch.tensor([[1.0, -0.5, 0.3, 2.0, 0.0]])
    n = 20_000
    u = (torch.arange(n) + 0.5) / n
    token, _ = inverse_cdf(logits.expand(n, 5), u)
    shares = torch.bincount(token, minlength=5) / n
    torch.testing.assert_close(shares, torch.softmax(logits[0], 0), atol=2 / n, rtol=0)


def test_log_probs_are_those_of_a_plain_forward(model: LlamaForCausalLM) -> None:
    settings = SamplingSettings(max_new_tokens=12, temperature=0.7)
    asked = prompts(9)
    drawn = ReferenceSampler(model, [STOP])(asked, uniforms(0, "t", 0, range(9), 12), settings)
    for prompt, answer in zip(asked, drawn, strict=True):
        with torch.no_grad():
            logits = model(torch.cat([prompt, answer.ids])[None]).logits[0] / 0.7
        expected = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1].gather(1, answer.ids[:, None])[:, 0]
        torch.testing.assert_close(answer.logp, expected, atol=1e-5, rtol=0)


def test_an_answer_does_not_depend_on_its_neighbours(model: LlamaForCausalLM) -> None:
    """Same key, same prompt: the same answer alone, in a batch, in small batches and in another order."""
    asked, draws = prompts(11), uniforms(3, "t", 0, range(11), 16)
    sampler = ReferenceSampler(model, [STOP])
    whole = sampler(asked, draws, SamplingSettings(max_new_tokens=16))
    small = sampler(asked, draws, SamplingSettings(max_new_tokens=16, rows=3))
    turned = sampler(asked[::-1], draws[::-1], SamplingSettings(max_new_tokens=16))[::-1]
    assert {a.stop for a in whole} == {Stop.EOS, Stop.LENGTH}
    for a, b, c in zip(whole, small, turned, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.ids, c.ids)
        assert a.stop is b.stop is c.stop


def test_stop_tokens_end_answers_and_are_kept(model: LlamaForCausalLM) -> None:
    settings = SamplingSettings(max_new_tokens=20)
    drawn = ReferenceSampler(model, [STOP, 11])(prompts(40), uniforms(1, "t", 0, range(40), 20), settings)
    for answer in drawn:
        body, last = answer.ids[:-1].tolist(), int(answer.ids[-1])
        assert not {STOP, 11} & set(body)
        assert (answer.stop is Stop.EOS) == (last in (STOP, 11))
        assert len(answer.ids) == 20 or answer.stop is Stop.EOS
        assert len(answer.logp) == len(answer.ids)


def test_a_policy_that_has_diverged_is_told() -> None:
    config = LlamaConfig(
        vocab_size=17, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    broken = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteLogits):
        ReferenceSampler(broken, [STOP])(
            prompts(3), uniforms(0, "t", 0, range(3), 4), SamplingSettings(max_new_tokens=4)
        )


def test_longest_answer_of_one_token(model: LlamaForCausalLM) -> None:
    (answer,) = ReferenceSampler(model, [STOP])(
        [torch.tensor([2])], np.array([[0.5]]), SamplingSettings(max_new_tokens=1)
    )
    assert len(answer.ids) == 1


@pytest.mark.parametrize(
    "bad", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"temperature": float("nan")}, {"rows": 0}]
)
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingSettings(**bad)
