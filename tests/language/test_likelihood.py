from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from bridle.errors import NonFiniteStep
from bridle.language.causal import CausalModel
from bridle.language.data import Encoded, Encoder
from bridle.language.likelihood import HeldOut, batch_of_step, held_out_loss, likelihood_step
from bridle.learn.optim import Group, Optimiser, OptimSettings

from .tiny import byte_tokenizer, tiny_model

VOCABULARY = 260


def items() -> list[Encoded]:
    encoder = Encoder.of(byte_tokenizer(), (2,))
    return [encoder.answer(*pair) for pair in (("ab", "c"), ("d", "efghijkl"), ("mnopqrst", "uv"), ("", "wx"))]


def own_losses(model: PreTrainedModel, encoded: list[Encoded]) -> Tensor:
    """Sequence by sequence, from the model's own logits: −log π of what is learnt."""
    parts = []
    for item in encoded:
        logits = model(input_ids=item.ids[None]).logits[0, :-1]
        losses = cross_entropy(logits, item.ids[1:], reduction="none")
        parts.append(losses[item.learnt[1:]])
    return torch.cat(parts)


def almost_plain_descent(model: PreTrainedModel) -> Optimiser:
    """AdamW whose ε drowns the second moment: its first step moves by −gradient, to 1e-6."""
    settings = OptimSettings(lr=1e6, eps=1e6, max_grad_norm=None)
    return Optimiser([Group(name="p", parameters=dict(model.named_parameters()), settings=settings)], total_steps=1)


@pytest.mark.parametrize(("micro_tokens", "fused"), [(1, True), (24, True), (10_000, True), (24, False)])
def test_the_gradient_is_that_of_the_mean_over_all_target_tokens(micro_tokens: int, fused: bool) -> None:
    oracle = tiny_model("llama", vocab_size=VOCABULARY)
    losses = own_losses(oracle, items())
    losses.mean().backward()
    losses = losses.detach()
    model = tiny_model("llama", vocab_size=VOCABULARY)
    causal = CausalModel(model)
    if not fused:
        causal.form = None
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen = likelihood_step(
        causal, items(), almost_plain_descent(model), micro_tokens=micro_tokens, computing=nullcontext
    )
    assert seen.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert (seen.target_tokens, seen.tokens) == (len(losses), sum(len(item) for item in items()))
    norms = [float(p.grad.norm()) for p in oracle.parameters() if p.grad is not None]
    assert seen.grad_norm == pytest.approx(math.sqrt(sum(norm**2 for norm in norms)), rel=1e-4)
    for name, parameter in oracle.named_parameters():
        assert parameter.grad is not None
        moved = before[name] - dict(model.named_parameters())[name].detach()
        torch.testing.assert_close(moved, parameter.grad, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("micro_tokens", [1, 24, 10_000])
def test_held_out_tokens_count_alike_whatever_the_batching(micro_tokens: int) -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY)
    found = held_out_loss(CausalModel(model), items(), micro_tokens=micro_tokens, computing=nullcontext)
    with torch.no_grad():
        losses = own_losses(model, items())
    assert found.loss == pytest.approx(float(losses.mean()), abs=1e-5)
    assert found.target_tokens == len(losses)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert HeldOut(loss=1e4, target_tokens=1).perplexity == math.inf


def test_every_epoch_sees_everything_once_in_an_order_of_its_own() -> None:
    epochs = [[i for step in range(3) for i in batch_of_step(10, 4, seed=3, step=3 * e + step)] for e in range(2)]
    assert [sorted(order) for order in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert batch_of_step(10, 4, seed=3, step=4) == batch_of_step(10, 4, seed=3, step=4)
    assert [len(batch_of_step(10, 4, seed=3, step=s)) for s in range(3)] == [4, 4, 2]


def test_a_step_that_is_not_finite_moves_nothing() -> None:
    model = tiny_model("llama", vocab_size=VOCABULARY)
    causal = CausalModel(model)
    optimiser = almost_plain_descent(model)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(NonFiniteStep, match="the loss") as error:
        likelihood_step(causal, items(), optimiser, micro_tokens=24, computing=nullcontext)
    assert error.value.rows == (0, 1, 2, 3)
    assert torch.equal(model.model.embed_tokens.weight, before)
    assert all(p.grad is None for p in model.parameters())
