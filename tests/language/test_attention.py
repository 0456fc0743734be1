"""The attention of narrow heads: what the definition says of each token, and PyTorch's own where the models use it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from bridle.language import attention
from bridle.language.attention import attend_narrowly, narrow_attention
from bridle.language.models import ModelSettings, load_causal_lm, load_reward_model, save_model
from tests.language.tiny import byte_tokenizer, tiny_model

SHAPES = [(2, 4, 2, 7, 3), (1, 3, 3, 33, 4), (1, 4, 2, 66, 3), (1, 2, 1, 1, 8)]
"""B, H, h, L, D: groups of several heads and of one; rows shorter than a block, a little longer, of several."""


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(batch: int, heads: int, few: int, length: int, width: int) -> list[Tensor]:
    """Queries, keys and values as a model lays them: [B, L, H, D], seen with the heads before the tokens."""
    return [draw(batch, length, n, width, seed=i).transpose(1, 2) for i, n in enumerate((heads, few, few))]


def one_by_one(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Σ_j w_ij v_j with w_ij ∝ exp(scale · q_i·k_j), j ≤ i, number by number."""
    batch, heads, length, _ = query.shape
    found = torch.zeros(batch, length, heads, value.shape[3], dtype=query.dtype)
    for b in range(batch):
        for h in range(heads):
            own = h * key.shape[1] // heads
            for i in range(length):
                weights = [math.exp(scale * float(query[b, h, i] @ key[b, own, j])) for j in range(i + 1)]
                for j, weight in enumerate(weights):
                    found[b, i, h] += weight / sum(weights) * value[b, own, j]
    return found


@pytest.mark.parametrize("shape", SHAPES)
def test_each_token_reads_the_weighted_mean_of_what_came_before(shape: tuple[int, ...]) -> None:
    query, key, value = inputs(*shape)
    torch.testing.assert_close(narrow_attention(query, key, value, scale=0.6), one_by_one(query, key, value, 0.6))


@pytest.mark.parametrize("shape", [(2, 4, 2, 5, 3), (1, 2, 2, 36, 2), (1, 2, 1, 1, 4)])
def test_the_gradient_is_that_of_finite_differences(shape: tuple[int, ...]) -> None:
    query, key, value = (x.requires_grad_() for x in inputs(*shape))
    assert torch.autograd.gradcheck(lambda q, k, v: narrow_attention(q, k, v, scale=0.6), (query, key, value))


def test_a_large_score_does_not_overflow() -> None:
    query, key, value = (x.float() for x in inputs(1, 2, 1, 40, 4))
    found = narrow_attention(1e3 * query, 1e3 * key, value, scale=1.0)
    expected = narrow_attention(1e3 * query.double(), 1e3 * key.double(), value.double(), scale=1.0)
    torch.testing.assert_close(found, expected.float())


def test_half_precision_is_computed_in_float32() -> None:
    query, key, value = (x.bfloat16().requires_grad_() for x in inputs(1, 4, 2, 40, 4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = narrow_attention(query, key, value, scale=0.5)
    exact = narrow_attention(query.float(), key.float(), value.float(), scale=0.5)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16())
    found.sum().backward()
    assert key.grad is not None
    assert key.grad.dtype == torch.bfloat16


def answers(model: Any, ids: Tensor, **more: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of a sum of them that weighs each differently."""
    logits = model(input_ids=ids, use_cache=False, **more).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return logits.detach(), found


@pytest.mark.parametrize(
    "family", ["llama", "qwen2", "qwen3", "gpt2", "mistral", "granite", "olmo2", "phi", "gpt_neox"]
)
def test_models_say_the_same_with_it_as_with_pytorchs_own(family: str) -> None:
    model: Any = tiny_model(family)
    ids = torch.arange(3, 3 + 2 * 37).view(2, 37)
    logits, expected = answers(model, ids)
    attend_narrowly(model)
    with mock.patch.object(attention, "narrow_attention", side_effect=narrow_attention) as called:
        own, found = answers(model, ids)
    assert called.call_count == (0 if family == "mistral" else 2)  # mistral's window is 6 tokens: a mask
    torch.testing.assert_close(own, logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_window_longer_than_the_row_is_none() -> None:
    model: Any = tiny_model("mistral", sliding_window=40)
    attend_narrowly(model)
    with mock.patch.object(attention, "narrow_attention", side_effect=narrow_attention) as called, torch.no_grad():
        model(input_ids=torch.arange(3, 40)[None], use_cache=False)
        assert called.call_count == 2
        model(input_ids=torch.arange(3, 45)[None], use_cache=False)
        assert called.call_count == 2


def test_what_it_does_not_do_goes_to_pytorchs_own() -> None:
    model: Any = tiny_model("llama")
    plain: Any = tiny_model("llama")
    attend_narrowly(model)
    ids = torch.arange(3, 3 + 20).view(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padding on the left
    with torch.no_grad():
        torch.testing.assert_close(
            model(input_ids=ids, attention_mask=mask).logits[:, 4:],
            plain(input_ids=ids, attention_mask=mask).logits[:, 4:],
        )
        first = model(input_ids=ids[:, :6], use_cache=True)
        after = model(input_ids=ids[:, 6:], past_key_values=first.past_key_values)
        torch.testing.assert_close(after.logits, plain(input_ids=ids).logits[:, 6:], rtol=1e-5, atol=1e-5)


def test_only_narrow_heads_and_pytorchs_own_attention_are_replaced() -> None:
    wide: Any = tiny_model("llama", num_attention_heads=2)
    attend_narrowly(wide)
    assert wide.config._attn_implementation == "sdpa"
    capped: Any = tiny_model("gemma2")  # scores with a cap
    before = capped.config._attn_implementation
    attend_narrowly(capped)
    assert capped.config._attn_implementation == before == "eager"


def test_opened_models_have_it_and_folders_do_not_name_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_model("llama", vocab_size=259), byte_tokenizer())
    for load in (load_causal_lm, load_reward_model):
        model, tokenizer = load(ModelSettings(path=str(tmp_path / "model")))
        assert model.config._attn_implementation == "bridle_narrow"
        save_model(tmp_path / load.__name__, model, tokenizer)
        assert "narrow" not in json.dumps(json.loads((tmp_path / load.__name__ / "config.json").read_text()))
