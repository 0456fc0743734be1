"""Compiled decoder layers: what the formula says in float64, PyTorch's own layers, and what is not served."""

from __future__ import annotations

import copy
import ctypes
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.language import layers, quickening
from bridle.language.attention import attend_narrowly
from bridle.language.layers import Shape, decoder_layer
from bridle.language.models import ModelSettings, load_causal_lm, recompute_layers, save_model
from bridle.language.quickening import plainly, quicken, speed_notes
from tests.language.layered import CASES, Case, doubling, draw, formula, inputs, quick
from tests.language.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.usefixtures("compiled")


def gradients(layer: Any, case: Case, dtype: torch.dtype, *, shared: bool = True) -> tuple[Tensor, list[Tensor]]:
    """A layer's answer, and the gradient of a sum of it that weighs each number differently: of x, and of every weight."""
    shape, (x, cosine, sine), weights = inputs(case, shared=shared)
    x, cosine, sine = x.to(dtype).requires_grad_(), cosine.to(dtype), sine.to(dtype)
    own = [None if w is None else w.to(dtype).requires_grad_() for w in weights]
    y = layer(shape, x, cosine, sine, own)
    (y * draw(*y.shape, seed=5).to(dtype)).sum().backward()
    return y.detach(), [t.grad for t in (x, *own) if t is not None and t.grad is not None]


def test_the_formula_has_the_gradient_of_finite_differences() -> None:
    shape, (x, cosine, sine), weights = inputs((1, 3, 8, 2, 1, 8, 3, True))
    held = [w.requires_grad_() for w in weights if w is not None]
    assert torch.autograd.gradcheck(lambda x, *w: formula(shape, x, cosine, sine, list(w)), (x.requires_grad_(), *held))


@pytest.mark.parametrize("case", CASES)
def test_a_layer_there_and_back_is_the_formula_in_float64(case: Case, threads: int) -> None:
    y, slopes = gradients(decoder_layer, case, torch.float32)
    exact, exact_slopes = gradients(formula, case, torch.float64)
    assert (y - exact).abs().max() <= 2e-6 * exact.abs().max()
    assert len(slopes) == len(exact_slopes)
    for slope, expected in zip(slopes, exact_slopes, strict=True):
        assert (slope - expected).abs().max() <= 1e-5 * expected.abs().max() + 1e-6


@pytest.mark.parametrize("length", [9, 17, 33])
@pytest.mark.parametrize("low", [128.0, 384.0])
def test_scores_far_below_0_have_finite_slopes(length: int, low: float) -> None:
    """Every score is −low · log 2, and the last queries do not fill a register: what stands for the rest must not reach inf."""
    shape = Shape(heads=1, key_heads=1, first_eps=1e-6, second_eps=1e-6, scale=1.0)
    size, one = math.sqrt(low * math.log(2.0) / 8), torch.eye(8)
    linears = [size * one, -size * one, one, one, *(draw(8, 8, seed=i, size=0.1).float() for i in range(3))]
    weights = [w.requires_grad_() for w in (torch.ones(8), torch.ones(8), *linears)]
    given = [*weights[:2], *(part for w in weights[2:] for part in (w, None))]
    x, turned = torch.ones(1, length, 8, requires_grad=True), (torch.ones(1, length, 8), torch.zeros(1, length, 8))
    decoder_layer(shape, x, *turned, given).square().sum().backward()
    assert all(t.grad is not None and torch.isfinite(t.grad).all() for t in (x, *weights))


def test_texts_may_stand_at_places_of_their_own(threads: int) -> None:
    y, slopes = gradients(decoder_layer, CASES[0], torch.float32, shared=False)
    exact, exact_slopes = gradients(formula, CASES[0], torch.float64, shared=False)
    torch.testing.assert_close(y, exact.float(), rtol=1e-5, atol=1e-5)
    for slope, expected in zip(slopes, exact_slopes, strict=True):
        torch.testing.assert_close(slope, expected.float(), rtol=1e-4, atol=1e-5)


def test_a_pass_without_a_gradient_is_the_same_to_the_bit(threads: int) -> None:
    shape, given, weights = inputs(CASES[5])
    single = [None if w is None else w.float() for w in weights]
    x, cosine, sine = (t.float() for t in given)
    alone = decoder_layer(shape, x, cosine, sine, single)
    assert torch.equal(alone, decoder_layer(shape, x.requires_grad_(), cosine, sine, single).detach())


def test_the_same_twice_is_the_same_to_the_bit(threads: int) -> None:
    first, second = (gradients(decoder_layer, CASES[5], torch.float32) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_a_text_does_not_depend_on_its_company_or_on_what_comes_after() -> None:
    shape, given, weights = inputs(CASES[3])
    x, cosine, sine = (t.float() for t in given)
    single = [None if w is None else w.float() for w in weights]
    whole = decoder_layer(shape, x, cosine, sine, single)
    assert torch.equal(decoder_layer(shape, x[1:], cosine, sine, single), whole[1:])
    cut = decoder_layer(shape, x[:, :9], cosine[:, :9], sine[:, :9], single)
    torch.testing.assert_close(cut, whole[:, :9], rtol=1e-6, atol=1e-6)


def test_only_what_learns_gets_a_gradient() -> None:
    shape, given, weights = inputs(CASES[1])
    x, cosine, sine = (t.float() for t in given)
    single = [None if w is None else w.float().requires_grad_(at % 3 == 0) for at, w in enumerate(weights)]
    decoder_layer(shape, x, cosine, sine, single).sum().backward()
    assert [w is not None and w.grad is not None for w in single] == [at % 3 == 0 for at in range(16)]
    whole = [None if w is None else w.detach().requires_grad_() for w in single]
    decoder_layer(shape, x, cosine, sine, whole).sum().backward()
    for some, every in zip(single, whole, strict=True):
        if some is not None and some.grad is not None:
            assert every is not None
            assert every.grad is not None
            assert torch.equal(some.grad, every.grad)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["x", 0, 1, 2, 4, 6, 8, 10, 12, 14])
def test_what_is_not_finite_is_still_seen(wrong: float, place: str | int) -> None:
    shape, given, weights = inputs(CASES[0])
    x, cosine, sine = (t.float() for t in given)
    single = [None if w is None else w.float() for w in weights]
    spoilt = x if place == "x" else single[int(place)]
    assert spoilt is not None
    spoilt.view(-1)[3] = wrong
    y = decoder_layer(shape, x, cosine, sine, single)
    assert not bool(y.isfinite().all())
    assert place != "x" or bool(y[1].isfinite().all())


def test_a_slope_that_is_not_finite_is_still_seen() -> None:
    shape, given, weights = inputs(CASES[0])
    x, cosine, sine = (t.float() for t in given)
    single = [None if w is None else w.float().requires_grad_() for w in weights]
    slope = torch.zeros_like(x)
    slope[1, 4, 2] = math.nan
    decoder_layer(shape, x.requires_grad_(), cosine, sine, single).backward(slope)
    assert x.grad is not None
    assert bool(x.grad[0].isfinite().all())
    assert not any(bool(t.grad.isfinite().all()) for t in (x, *single) if t is not None and t.grad is not None)


def test_large_scores_do_not_overflow() -> None:
    shape, given, weights = inputs(CASES[0])
    for at in (2, 4):
        weight = weights[at]
        assert weight is not None
        weight.mul_(100.0)
    exact = formula(shape, *given, weights)
    single = [None if w is None else w.float() for w in weights]
    found = decoder_layer(shape, *(t.float() for t in given), single)
    torch.testing.assert_close(found, exact.float(), rtol=1e-3, atol=1e-3)


def exponential(x: Tensor) -> Tensor:
    y = torch.empty_like(x)
    layers.library.layer_exponential(ctypes.c_int64(len(x)), x.data_ptr(), y.data_ptr())
    return y


def test_the_exponential_is_within_its_bound() -> None:
    x = torch.cat([torch.linspace(-86.9, 0.0, 200_000), torch.linspace(-1, 0, 200_000)])
    exact = x.double().exp()
    assert ((exponential(x) - exact).abs() / exact).max() <= 2e-7
    ends = torch.tensor([0.0, -0.0, -87.1, -1e30, -math.inf, math.nan, -math.nan, -1.0])
    found = exponential(ends)
    assert found[:5].tolist() == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert found[5:7].isnan().all()


def compiled_layers(model: Any) -> list[bool]:
    return [isinstance(layer, quickening._Quick) for layer in model.base_model.layers]


def answers(model: Any, ids: Tensor, **more: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the gradient of a sum of them that weighs each differently."""
    logits = model(input_ids=ids, use_cache=False, **more).logits
    (logits * draw(*logits.shape, seed=7).float()).sum().backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("family", "served"),
    [
        ("llama", True),
        ("qwen2", True),
        ("mistral", True),
        ("qwen3", False),  # norms of queries and keys
        ("gemma2", False),
        ("granite", False),  # the same parts, but what is added is scaled: the trial sees it
        ("cohere", False),
        ("olmo2", False),
        ("gpt2", False),
    ],
)
def test_a_whole_model_answers_and_learns_the_same(family: str, served: bool) -> None:
    model, own = quick(family)
    if family != "gpt2":
        assert compiled_layers(own) == [served] * 2
    ids = torch.arange(1, 31).view(5, 6)  # mistral's window is 6 tokens
    (logits, slopes), (found, own_slopes) = answers(model, ids), answers(own, ids)
    torch.testing.assert_close(found, logits, rtol=1e-5, atol=1e-5)
    assert slopes.keys() == own_slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(own_slopes[name], slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()))


@pytest.mark.parametrize("changes", [{"rms_norm_eps": 1e-2}, {"hidden_act": "gelu"}, {"attention_bias": True}])
def test_what_a_layer_is_made_of_is_read_or_seen(changes: dict[str, Any]) -> None:
    model, own = quick("llama", **changes)
    assert compiled_layers(own) == ["hidden_act" not in changes] * 2
    ids = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(answers(own, ids)[0], answers(model, ids)[0], rtol=1e-5, atol=1e-5)


def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fill with one entry for every layer that runs compiled."""
    seen: list[int] = []

    def noted(*given: Any) -> Tensor:
        seen.append(1)
        return decoder_layer(*given)

    monkeypatch.setattr(quickening, "decoder_layer", noted)
    return seen


def test_what_is_not_served_goes_to_the_layer_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, own), long = quick("llama"), quick("mistral")[1]
    ids, seen = torch.arange(1, 13).view(2, 6), calls(monkeypatch)
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    with torch.no_grad():
        torch.testing.assert_close(own(ids, attention_mask=mask).logits[1], model(ids, attention_mask=mask).logits[1])
        torch.testing.assert_close(own(ids, use_cache=True).logits, model(ids).logits)
        with torch.autocast("cpu", dtype=torch.float16):
            own(ids, use_cache=False)
        copy.deepcopy(own).double()(ids, use_cache=False)
        copy.deepcopy(own).bfloat16()(ids, use_cache=False)
        eager = copy.deepcopy(own)
        eager.set_attn_implementation("eager")
        eager(ids, use_cache=False)
        long(torch.arange(1, 9)[None], use_cache=False)  # beyond its window of 6
    assert not seen
    hooked = copy.deepcopy(own)
    handle = hooked.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *given: None)
    hooked(ids, use_cache=False)
    assert len(seen) == 1
    handle.remove()
    hooked(ids, use_cache=False)
    assert len(seen) == 3
    hooked.model.layers[1].self_attn.q_proj = nn.Sequential(hooked.model.layers[1].self_attn.q_proj)
    torch.testing.assert_close(hooked(ids, use_cache=False).logits, model(ids).logits)
    assert len(seen) == 4


def doubled(module: nn.Module) -> None:
    module.register_forward_hook(lambda own, given, found: 2 * found)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "the gate's function": lambda layer: setattr(layer.mlp, "act_fn", nn.GELU()),
    "a hook on it": lambda layer: doubled(layer.mlp.act_fn),
    "the factor on the scores": lambda layer: setattr(layer.self_attn, "scaling", 0.9),
    "an ε": lambda layer: setattr(layer.input_layernorm, "variance_epsilon", 0.5),
    "another norm": lambda layer: setattr(layer, "input_layernorm", Centred()),
    "what is seen": lambda layer: setattr(layer.self_attn, "is_causal", False),
    "a forward": lambda layer: setattr(layer.mlp, "forward", lambda x: 2 * layer.mlp.up_proj(x)[..., :32]),
    "a linear layer's class": lambda layer: doubling(layer.mlp.down_proj),
    "the gate's class": lambda layer: doubling(layer.mlp.act_fn),
    "a norm's class": lambda layer: doubling(layer.post_attention_layernorm),
    "its own class": lambda layer: doubling(layer),
    "a weight's kind": lambda layer: setattr(
        layer.mlp.up_proj, "weight", nn.Parameter(Doubled(layer.mlp.up_proj.weight))
    ),
}


class Centred(nn.Module):
    """What has the parts of a norm, and is another."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.full((32,), 0.3)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.weight) * (x - x.mean(-1, keepdim=True))


class Doubled(Tensor):
    """Stands for weights that are packed: a product with them is another than with their numbers."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, given: Any = (), more: Any = None) -> Any:
        if function is nn.functional.linear:
            return function(given[0], 2 * given[1].as_subclass(Tensor), *given[2:])
        return super().__torch_function__(function, types, given, more or {})


@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_that_is_no_longer_what_was_tried_runs_as_it_is(change: str) -> None:
    (model, own), ids = quick("llama"), torch.arange(1, 13).view(2, 6)
    with torch.no_grad():
        before = own(ids, use_cache=False).logits
        for each in (model, own):
            CHANGES[change](each.model.layers[0])
        expected, found = model(ids, use_cache=False).logits, own(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 0.01


def test_a_layer_that_is_asked_not_to_be_causal_is_not() -> None:
    (model, own), ids = quick("llama"), torch.arange(1, 13).view(2, 6)
    expected = model(ids, use_cache=False, is_causal=False).logits
    torch.testing.assert_close(own(ids, use_cache=False, is_causal=False).logits, expected)


def test_new_weights_are_served_and_those_of_another_shape_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    (_, own), ids, seen = quick("llama"), torch.arange(1, 13).view(2, 6), calls(monkeypatch)
    other = tiny_model("llama", seed=3, hidden_size=32, num_attention_heads=4)
    own.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    expected = other(ids, use_cache=False).logits
    torch.testing.assert_close(own(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 2
    mlp = own.model.layers[1].mlp
    with torch.no_grad():
        for linear, axis in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            linear.weight.data = linear.weight.data.narrow(axis, 0, 24)
    own(ids, use_cache=False)
    assert len(seen) == 3


def test_a_layer_names_only_classes_that_can_be_found_again() -> None:
    """So that who keeps whole models, or hands them to other processes, still can."""
    layer = quick("llama")[1].model.layers[0]
    made, given, state = layer.__reduce_ex__(2)
    assert all(getattr(importlib.import_module(one.__module__), one.__qualname__) is one for one in (made, *given))
    assert type(made(*given)) is type(layer)
    assert state["_modules"]["mlp"] is layer.mlp


def test_layers_may_be_run_again_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = quick("llama")
    ids, seen = torch.arange(1, 13).view(2, 6), calls(monkeypatch)
    expected = answers(own, ids)[1]
    own.zero_grad()
    recompute_layers(own)
    own.train()
    found = answers(own, ids)[1]
    assert len(seen) == 2 + 4
    assert all(torch.equal(slope, expected[name]) for name, slope in found.items())


def test_a_models_folder_knows_nothing_of_it(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model = tiny_model("llama", hidden_size=32, num_attention_heads=4, vocab_size=260)
    save_model(folder, model, byte_tokenizer())
    loaded = load_causal_lm(ModelSettings(path=str(folder)))[0]
    assert compiled_layers(loaded) == [True, True]
    save_model(tmp_path / "again", loaded, byte_tokenizer())
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (folder / "config.json").read_text()
    )
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_layers_can_run_as_they_are_again() -> None:
    model, own = quick("llama")
    assert [type(layer) for layer in plainly(own).model.layers] == [type(layer) for layer in model.model.layers]
    ids = torch.arange(1, 13).view(2, 6)
    assert torch.equal(own(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_run_says_that_compiled_code_is_missing_where_it_would_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny_model(family, hidden_size=32, num_attention_heads=4) for family in ("llama", "gemma2")]
    assert [speed_notes(model) for model in models] == [(), ()]
    monkeypatch.setattr(layers, "library", None)
    assert [len(speed_notes(model)) for model in models] == [1, 0]
    assert compiled_layers(quicken(models[0])) == [False, False]


def test_narrow_heads_and_compiled_layers_agree() -> None:
    model, own = quick("llama")
    attend_narrowly(model)
    ids = torch.arange(1, 91).view(1, 90) % 96
    torch.testing.assert_close(answers(own, ids)[0], answers(model, ids)[0], rtol=1e-5, atol=1e-5)


def test_no_texts_come_back_as_none() -> None:
    shape, given, weights = inputs(CASES[0])
    x, cosine, sine = (t.float() for t in given)
    single = [None if w is None else w.float().requires_grad_() for w in weights]
    y = decoder_layer(shape, x[:0].requires_grad_(), cosine, sine, single)
    y.sum().backward()
    assert y.shape == (0, *x.shape[1:])
