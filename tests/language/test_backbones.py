"""Layers in one compiled step: the formula in float64, a backbone's own answers, and what is not served."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.language import backbones
from bridle.language.backbones import hidden_at, join_layers, packed_stack
from bridle.language.layers import Shape, decoder_stack, norm_at
from bridle.language.models import recompute_layers
from bridle.language.quickening import plainly, quicken
from tests.language.layered import Case, doubling, draw, formula, inputs, quick
from tests.language.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("compiled")

CASES: list[tuple[Case, list[list[int]]]] = [
    ((3, 5, 16, 4, 2, 8, 24, True), [[0, 3, 2], [5, 3, 4]]),  # all, none, some
    ((2, 121, 16, 2, 1, 8, 19, False), [[50, 120], [121, 121]]),
    ((1, 401, 8, 1, 1, 8, 12, True), [[11], [399]]),  # learnt from in two parts
    ((9, 47, 24, 6, 3, 24, 20, True), [[0, 46, 40, 9, 7, 5, 3, 0, 20], [47, 47, 41, 9, 40, 30, 47, 0, 30]]),
    ((35, 23, 16, 2, 1, 8, 24, False), [[i % 23 for i in range(35)], [23 - i % 5 for i in range(35)]]),
]


def stack(case: Case, dtype: torch.dtype) -> tuple[list[Shape], list[Tensor], list[list[Tensor | None]]]:
    """Three layers whose weights differ."""
    shape, given, first = inputs(case)
    weights = [[None if w is None else w + 0.1 * draw(*w.shape, seed=100 * at) for w in first] for at in range(3)]
    return (
        [shape] * 3,
        [t.to(dtype) for t in given],
        [[None if w is None else w.to(dtype) for w in own] for own in weights],
    )


def answers(
    case: Case, asked: Tensor, run: Callable[..., Tensor], dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    """y where it is asked for, the gradients of a weighted sum of that, and where it was asked for."""
    shapes, (x, cosine, sine), weights = stack(case, dtype)
    held = [w.requires_grad_() for own in weights for w in own if w is not None]
    y = run(shapes, x.requires_grad_(), cosine, sine, weights)
    place = torch.arange(case[1])
    where = (place >= asked[0][:, None]) & (place < asked[1][:, None])
    (y * draw(*y.shape, seed=5).to(dtype))[where].sum().backward()
    return y.detach()[where], [t.grad for t in (x, *held) if t.grad is not None], where


def plain(shapes: Any, x: Tensor, cosine: Tensor, sine: Tensor, weights: Any) -> Tensor:
    for shape, own in zip(shapes, weights, strict=True):
        x = formula(shape, x, cosine, sine, own)
    return x


@pytest.mark.parametrize(("case", "asked"), CASES)
def test_layers_in_one_step_are_the_formula_where_they_are_asked(
    case: Case, asked: list[list[int]], threads: int
) -> None:
    some = torch.tensor(asked)
    y, slopes, where = answers(case, some, lambda *given: decoder_stack(*given, some), torch.float32)
    exact, exact_slopes, _ = answers(case, some, plain, torch.float64)
    assert (y - exact).abs().max() <= 5e-6 * exact.abs().max()
    assert len(slopes) == len(exact_slopes) > 3
    for slope, expected in zip(slopes, exact_slopes, strict=True):
        assert (slope - expected).abs().max() <= 2e-5 * expected.abs().max()
    assert not slopes[0][torch.arange(case[1]) >= some[1][:, None]].any()
    shapes, given, weights = stack(case, torch.float32)
    with torch.no_grad():
        assert torch.equal(decoder_stack(shapes, *given, weights, some)[where], y)


def test_layers_in_one_step_are_those_one_by_one() -> None:
    case = CASES[3][0]
    whole = torch.tensor([[0] * case[0], [case[1]] * case[0]])
    shapes, given, weights = stack(case, torch.float32)
    y = given[0]
    for shape, own in zip(shapes, weights, strict=True):
        y = decoder_stack([shape], y, *given[1:], [own])
    assert torch.equal(decoder_stack(shapes, *given, weights), y)
    assert torch.equal(decoder_stack(shapes, *given, weights, whole), y)


def test_the_norm_of_some_tokens_is_that_of_all() -> None:
    x, weight, places = draw(3, 7, 24, seed=1), draw(24, seed=2), torch.tensor([0, 20, 6, 7])
    slope, found = draw(4, 24, seed=3), []
    for dtype in (torch.float64, torch.float32):
        own, w = (t.detach().to(dtype).requires_grad_() for t in (x, weight))
        if dtype == torch.float32:
            y = norm_at(own, places, w, 1e-2)
        else:
            y = (w * own / (own.square().mean(-1, keepdim=True) + 1e-2).sqrt()).flatten(0, 1)[places]
        y.backward(slope.to(dtype))
        found.append((y.detach(), own.grad, w.grad))
    for exact, own in zip(*found, strict=True):
        torch.testing.assert_close(own, exact.float(), rtol=1e-5, atol=1e-5)


ROWS, COLUMNS = torch.tensor([0, 0, 2, 2, 3]), torch.tensor([1, 2, 0, 5, 3])
IDS = torch.arange(1, 25).view(4, 6)


def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Fill with one entry for every time that layers ran in one step."""
    seen: list[int] = []

    def noted(*given: Any) -> Tensor:
        seen.append(len(given[0]))
        return decoder_stack(*given)

    monkeypatch.setattr(backbones, "decoder_stack", noted)
    return seen


@pytest.mark.parametrize(
    ("family", "served"),
    [("llama", True), ("qwen2", True), ("mistral", False), ("gemma2", False), ("granite", False), ("gpt2", False)],
)
def test_a_backbone_answers_and_learns_the_same(family: str, served: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """mistral sees a window, which a short trial would not tell."""
    model, own = quick(family)
    seen = joined(monkeypatch)
    found = []
    for each in (model, own):
        y = hidden_at(each.base_model, IDS, ROWS, COLUMNS)
        (y * draw(*y.shape, seed=7).float()).sum().backward()
        found.append((y.detach(), {name: p.grad for name, p in each.named_parameters() if p.grad is not None}))
    assert seen == ([2] if served else [])
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-5, atol=1e-5)
    assert found[0][1].keys() == found[1][1].keys()
    for name, slope in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], slope, rtol=1e-4, atol=1e-4 * float(slope.abs().max()))
    expected = model.base_model(input_ids=IDS, use_cache=False).last_hidden_state[ROWS, COLUMNS]
    torch.testing.assert_close(found[1][0], expected, rtol=1e-5, atol=1e-5)


def doubled(module: nn.Module) -> None:
    module.register_forward_hook(lambda own, given, found: 2 * found)


def tripled(backbone: nn.Module) -> None:
    def change(own: nn.Module, given: Any, found: Any) -> None:
        found.last_hidden_state = 3 * found.last_hidden_state

    backbone.register_forward_hook(change)


def turned_round(backbone: nn.Module) -> None:
    class Own(type(backbone)):  # type: ignore[misc]
        def forward(self, **given: Any) -> Any:
            found = super().forward(**given)
            found.last_hidden_state = -found.last_hidden_state
            return found

    backbone.__class__ = Own


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a hook on the whole": lambda backbone: tripled(backbone),
    "a hook on the norm": lambda backbone: doubled(backbone.norm),
    "a hook inside a layer": lambda backbone: doubled(backbone.layers[1].mlp.up_proj),
    "a norm of one number": lambda backbone: setattr(backbone.norm, "weight", nn.Parameter(torch.tensor([1.5]))),
    "a hook on a layer": lambda backbone: doubled(backbone.layers[1]),
    "the norm's ε": lambda backbone: setattr(backbone.norm, "variance_epsilon", 0.5),
    "another norm": lambda backbone: setattr(backbone, "norm", nn.LayerNorm(32)),
    "another embedding": lambda backbone: setattr(backbone, "embed_tokens", nn.Embedding(96, 32)),
    "a layer less": lambda backbone: backbone.layers.pop(1),
    "a layer twice": lambda backbone: backbone.layers.append(backbone.layers[1]),
    "layers turned round": lambda backbone: setattr(backbone, "layers", nn.ModuleList(list(backbone.layers)[::-1])),
    "a layer as it was": lambda backbone: plainly(backbone),
    "a forward": lambda backbone: setattr(backbone.norm, "forward", lambda x: 3 * x),
    "the norm's class": lambda backbone: doubling(backbone.norm),
    "the embedding's class": lambda backbone: doubling(backbone.embed_tokens),
    "a layer's class": lambda backbone: doubling(backbone.layers[1]),
    "its own class": lambda backbone: turned_round(backbone),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_backbone_that_is_no_longer_what_was_tried_runs_as_it_is(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = quick("llama")[1].base_model
    seen = joined(monkeypatch)
    with torch.no_grad():
        hidden_at(backbone, IDS, ROWS, COLUMNS)
        assert seen == [2]
        CHANGES[change](backbone)
        backbone.config.num_hidden_layers = len(backbone.layers)
        expected = backbone(input_ids=IDS, use_cache=False).last_hidden_state[ROWS, COLUMNS]
        assert torch.equal(hidden_at(backbone, IDS, ROWS, COLUMNS), expected)
    assert seen == [2]


@pytest.mark.parametrize("part", ["norm", "rotary_emb", "layers.1", "layers.0.mlp", "layers.0.self_attn"])
def test_a_class_that_is_given_another_forward_is_asked_for_it(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries of kernels do it, to a model that is there already."""
    backbone = quick("llama")[1].base_model
    kind = next(c for c in type(backbone.get_submodule(part)).__mro__ if c.__module__.startswith("transformers"))
    own, called = kind.forward, []

    def noted(self: Any, *given: Any, **named: Any) -> Any:
        called.append(self)
        return own(self, *given, **named)

    monkeypatch.setattr(kind, "forward", noted)
    seen = joined(monkeypatch)
    with torch.no_grad():
        hidden_at(backbone, IDS, ROWS, COLUMNS)
    assert called
    assert not seen
    assert packed_stack(backbone, 9) is None


def test_what_layers_in_one_step_do_not_serve_goes_to_the_backbone(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = quick("llama")[1].base_model
    seen = joined(monkeypatch)
    places = torch.arange(6).expand(4, 6) + 1
    shifted = backbone(input_ids=IDS, position_ids=places, use_cache=False).last_hidden_state[ROWS, COLUMNS]
    assert torch.equal(hidden_at(backbone, IDS, ROWS, COLUMNS, positions=places), shifted)
    with torch.autocast("cpu", dtype=torch.float16):
        hidden_at(backbone, IDS, ROWS, COLUMNS)
    hidden_at(copy.deepcopy(backbone).bfloat16(), IDS, ROWS, COLUMNS)
    again, other = copy.deepcopy(backbone), copy.deepcopy(backbone)
    recompute_layers(again)
    hidden_at(again.train(), IDS, ROWS, COLUMNS)
    assert not seen
    with torch.no_grad():  # a copy is served by its own weights
        other.norm.weight.mul_(2.0)
        twice, once = (hidden_at(each, IDS, ROWS, COLUMNS) for each in (other, backbone))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-5, atol=1e-6)
    assert seen == [2, 2]


def test_a_window_longer_than_the_trial_is_seen() -> None:
    own = quick("mistral", sliding_window=20)[1]
    assert backbones._KNOWN not in own.base_model.__dict__
    assert backbones._KNOWN in quick("mistral", sliding_window=None)[1].base_model.__dict__


SEEN = SimpleNamespace(num_hidden_layers=2, layer_types=["full_attention"] * 2)


@pytest.mark.parametrize(
    ("changed", "layers"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"]}, 2),
        ({"layer_types": ["chunked_attention"] * 2}, 2),
        ({"sliding_window": 4096}, 2),
        ({"attention_chunk_size": 8192}, 2),
        ({}, 3),
        ({"num_hidden_layers": 0, "layer_types": []}, 0),
    ],
)
def test_only_what_sees_each_text_in_full_is_joined(changed: dict[str, Any], layers: int) -> None:
    assert backbones._asks_all(SEEN, 2)
    assert not backbones._asks_all(SimpleNamespace(**{**vars(SEEN), **changed}), layers)


@pytest.mark.parametrize("more", ["a part", "a bias"])
def test_a_backbone_of_more_parts_is_not_joined(more: str) -> None:
    """In a trial they do nothing: they may later."""
    backbone = quick("llama")[1].base_model
    backbone.__dict__.pop(backbones._KNOWN)
    if more == "a part":
        backbone.more = nn.Linear(32, 32)
    else:
        backbone.norm.bias = nn.Parameter(torch.zeros(32))
    assert backbones._KNOWN not in join_layers(backbone).__dict__


def test_what_is_made_lies_where_the_tokens_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where PyTorch would put it by default."""
    backbone = quick("llama")[1].base_model
    seen = joined(monkeypatch)
    with torch.no_grad():
        expected = hidden_at(backbone, IDS, ROWS, COLUMNS)
        with torch.device("meta"):
            assert torch.equal(hidden_at(backbone, IDS, ROWS, COLUMNS), expected)
    assert seen == [2, 2]


def test_slopes_may_lie_anyhow() -> None:
    """A sum's slopes are one number for all, without a place of its own for each."""
    shapes, (x, cosine, sine), weights = stack((3, 5, 16, 4, 2, 8, 24, True), torch.float32)
    held, places = [x, *(w for own in weights for w in own if w is not None)], torch.tensor([0, 14, 6])
    for t in held:
        t.requires_grad_()
    found = []
    for slopes in (lambda y: torch.ones(()).expand(y.shape), torch.ones_like):
        y, normed = decoder_stack(shapes, x, cosine, sine, weights), norm_at(x, places, weights[0][0], 1e-5)
        found.append([*torch.autograd.grad(y, held, slopes(y)), *torch.autograd.grad(normed, held[:2], slopes(normed))])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_backbone_that_does_more_is_not_joined() -> None:
    model, own = quick("llama")

    class More(type(own.base_model)):  # type: ignore[misc]
        def forward(self, **given: Any) -> Any:
            found = super().forward(**given)
            found.last_hidden_state = 1.1 * found.last_hidden_state
            return found

    own = plainly(own)
    own.base_model.__dict__.pop(backbones._KNOWN)
    own.base_model.__class__ = More
    from bridle.language.quickening import quicken

    assert backbones._KNOWN not in join_layers(quicken(own)).base_model.__dict__
    assert backbones._KNOWN in join_layers(quicken(model)).base_model.__dict__


@pytest.mark.parametrize(
    ("rows", "columns"),
    [([0, 1], [-1, 3]), ([-1, 2], [0, 5]), ([0, 1], [60, 3]), ([0, 4], [1, 1])],
    ids=["from the end", "texts from the end", "no such column", "no such text"],
)
def test_places_are_pytorchs(rows: list[int], columns: list[int]) -> None:
    """Read where they lie in memory, such places would be others' memory."""
    model, own = quick("llama")
    found = []
    for backbone in (model.base_model, own.base_model):
        try:
            with torch.no_grad():
                found.append(hidden_at(backbone, IDS, torch.tensor(rows), torch.tensor(columns)))
        except IndexError:
            found.append(torch.zeros(0))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    assert len(found[0]) == (2 if max(rows) < 4 and max(columns) < 6 else 0)


def test_no_place_and_places_of_fewer_bits() -> None:
    backbone = quick("llama")[1].base_model
    with torch.no_grad():
        assert hidden_at(backbone, IDS, ROWS[:0], COLUMNS[:0]).shape == (0, 32)
        few = hidden_at(backbone, IDS, ROWS, COLUMNS.int())
        torch.testing.assert_close(few, hidden_at(backbone, IDS, ROWS, COLUMNS), rtol=1e-5, atol=1e-5)


def test_on_another_device_nothing_is_made_on_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are joined where a model is read, before it is moved: what there is to move must be left to the backbone."""
    backbone, asked = quick("llama")[1].base_model.to("meta"), []

    class Own(type(backbone)):  # type: ignore[misc]
        def forward(self, **given: Any) -> Any:
            asked.append(given)
            return SimpleNamespace(last_hidden_state=torch.empty(4, 6, 32, device="meta"))

    def never(*_: object) -> None:
        raise AssertionError("embedded or turned here")

    for part in (backbone.embed_tokens, backbone.rotary_emb):
        monkeypatch.setattr(type(part), "forward", never)
    backbone.__class__ = Own
    for positions in (None, torch.zeros(4, 6, dtype=torch.int64, device="meta")):
        places = (t.to("meta") for t in (IDS, ROWS, COLUMNS))
        assert hidden_at(backbone, *places, positions=positions).device.type == "meta"
    assert len(asked) == 2


def test_what_a_layer_drops_in_training_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", hidden_size=32, num_attention_heads=4)
    for layer in model.base_model.layers:
        layer.mlp.residual_dropout = 0.5  # as some families hold it, where no module says so
    backbone = join_layers(quicken(model)).base_model
    seen = joined(monkeypatch)
    with torch.no_grad():
        hidden_at(backbone.train(), IDS, ROWS, COLUMNS)
        assert not seen
        hidden_at(backbone.eval(), IDS, ROWS, COLUMNS)
    assert seen == [2]


ASKED: dict[str, Callable[[Any], Any]] = {
    "fewer layers": lambda backbone: setattr(backbone.config, "num_hidden_layers", 1),
    "a window": lambda backbone: setattr(backbone.config, "sliding_window", 3),
}


@pytest.mark.parametrize("asked", ASKED)
def test_what_is_asked_for_later_is_not_passed_over(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = quick("llama")[1].base_model
    seen = joined(monkeypatch)
    ASKED[asked](backbone)
    with torch.no_grad():
        hidden_at(backbone, IDS, ROWS, COLUMNS)
    assert not seen


def test_a_hook_on_all_modules_sees_them(monkeypatch: pytest.MonkeyPatch) -> None:
    backbone, seen = quick("llama")[1].base_model, []
    steps = joined(monkeypatch)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, found: seen.append(module))
    try:
        with torch.no_grad():
            hidden_at(backbone, IDS, ROWS, COLUMNS)
    finally:
        handle.remove()
    assert not steps
    assert {backbone.layers[0].mlp.up_proj, backbone.norm} <= set(seen)
