"""Texts written by compiled layers: the formula of whole texts in float64, no trace of other texts, draws from a softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bridle.core.head import VocabularyHead
from bridle.errors import NonFiniteLogits
from bridle.language import backbones, decoding
from bridle.language.causal import CausalModel
from bridle.language.decoding import Choice, Stack, StackWeights, Texts
from bridle.language.layers import Shape
from bridle.language.sampler import Sampled, SamplingSettings
from bridle.language.sampler.drawing import LARGEST_UNIFORM
from bridle.language.sampler.serving import embedded_sampler
from bridle.random import generator, torch_rng, uniforms
from tests.language.layered import Case, draw, formula, inputs, quick

pytestmark = pytest.mark.usefixtures("compiled")

SIZES: list[tuple[int, int, int, int, int, bool]] = [  # W, H, h, D, F, biases
    (16, 4, 2, 8, 24, True),
    (8, 1, 1, 8, 7, False),
    (40, 6, 3, 16, 52, True),
    (24, 3, 3, 24, 33, False),
    (72, 3, 1, 72, 20, False),
]
LENGTHS = (1, 60, 9, 17, 8, 33, 300)
AFTER = 11
"""Tokens that each text is given after its prompt."""


def stack_of(size: tuple[int, int, int, int, int, bool]) -> tuple[Stack, Any]:
    """Two layers whose weights differ and the norm after them, packed; and what they make of whole texts, in float64."""
    width, heads, few, head, hidden, biased = size
    case: Case = (1, max(LENGTHS) + AFTER, width, heads, few, head, hidden, biased)
    shape, (_, cosine, sine), first = inputs(case)
    weights = [[None if w is None else w + 0.1 * draw(*w.shape, seed=100 * at) for w in first] for at in range(2)]
    norm = 1 + draw(width, seed=7, size=0.1)

    def whole(x: Tensor) -> Tensor:
        for own in weights:
            x = formula(shape, x, cosine[:, : x.shape[1]], sine[:, : x.shape[1]], own)
        return norm * x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt()

    single = [[None if w is None else w.float() for w in own] for own in weights]
    turned = {"cosine": cosine[0].float(), "sine": sine[0].float()}
    shapes: list[Shape] = [shape, shape]
    given = StackWeights(shapes=shapes, weights=single, norm=norm.float(), eps=1e-2, **turned)
    return Stack(given), whole


def embedded(width: int) -> list[Tensor]:
    """The embeddings of some texts: prompts of ``LENGTHS``, then ``AFTER`` tokens."""
    return [draw(length + AFTER, width, seed=i) for i, length in enumerate(LENGTHS)]


def written(stack: Stack, given: Sequence[Tensor], rows: Sequence[int], places: Sequence[int]) -> Tensor:
    """The states of texts ``rows`` at their prompts' ends and after, written together in slots ``places``: [text, token, W]."""
    texts, sizes, order = Texts(stack, len(places)), [LENGTHS[row] for row in rows], np.argsort(places)
    ends = stack.read(torch.cat([given[row][: LENGTHS[row]] for row in rows]).float(), texts, places, sizes)
    found = [ends]
    for t in range(AFTER):
        x = torch.stack([given[rows[i]][sizes[i] + t] for i in order]).float()
        after = torch.empty_like(ends)
        after[torch.from_numpy(order)] = stack.step(x, texts)
        found.append(after)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("size", SIZES)
def test_prompts_and_single_tokens_are_what_the_formula_makes_of_whole_texts(
    size: tuple[int, int, int, int, int, bool], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the memory held before: it is filled with what is not a number."""
    monkeypatch.setattr(decoding, "_numbers", lambda count: torch.full((count,), math.nan))
    (stack, whole), given, places = stack_of(size), embedded(size[0]), (3, 0, 6, 1, 5, 2, 4)
    found = written(stack, given, range(len(LENGTHS)), places)
    for row, length in enumerate(LENGTHS):
        exact = whole(given[row][None])[0, length - 1 :]
        assert (found[row] - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("size", SIZES[:3])
def test_a_text_is_the_same_to_the_bit_beside_any_others(
    size: tuple[int, int, int, int, int, bool], threads: int
) -> None:
    (stack, _), given = stack_of(size), embedded(size[0])
    together = written(stack, given, [*range(len(LENGTHS))] * 15, range(15 * len(LENGTHS)))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = [written(stack, given, [row], [0])[0] for row in range(len(LENGTHS))]
    torch.set_num_threads(before)
    assert torch.equal(together, torch.stack(alone * 15))


def test_texts_share_a_prompt_and_change_places() -> None:
    """Three ways on from a prompt of 17 tokens; the last text comes to stand first, where the next one is given to it alone."""
    size = SIZES[2]
    (stack, whole), x = stack_of(size), draw(17, size[0], seed=1)
    ways, texts = [draw(40, size[0], seed=at) for at in range(2, 5)], Texts(stack, 4)
    stack.read(draw(60, size[0], seed=9).float(), texts, [3, 2], [40, 20])  # who was there before
    stack.read(x.float(), texts, [1], [17])
    texts.share(1, [0, 2])
    found = [stack.step(torch.stack([way[t] for way in ways]).float(), texts) for t in range(39)]
    texts.order([2, 1, 3, 0])
    last = stack.step(ways[2][39:].float(), texts)
    for at, way in enumerate(ways):
        exact = whole(torch.cat([x, way])[None])[0, 17:]
        assert (torch.stack([one[at] for one in found]) - exact[:39]).abs().max() <= 1e-5 * exact.abs().max()
    assert (last[0] - exact[39]).abs().max() <= 1e-5 * exact.abs().max()


def test_places_that_are_not_known_are_refused() -> None:
    stack, _ = stack_of(SIZES[1])
    texts = Texts(stack, 1)
    stack.read(torch.zeros(310, 8), texts, [0], [310])
    stack.step(torch.zeros(1, 8), texts)
    with pytest.raises(ValueError, match="a text of 311 tokens is followed, and places are known for 311"):
        stack.step(torch.zeros(1, 8), texts)


def choice(vocabulary: int, width: int = 8, *, biased: bool = True, **changes: float) -> tuple[Choice, Any]:
    """A head at τ = 0.7, and the logits that it stands for, in float64."""
    weight, bias = draw(vocabulary, width, seed=1), draw(vocabulary, seed=2) if biased else None
    scale = changes.get("scale", 1.0)
    head = VocabularyHead(weight=weight.float(), bias=None if bias is None else bias.float(), scale=scale, softcap=None)
    return Choice(head, temperature=0.7), lambda h: nn.functional.linear(h.double(), weight, bias) * scale / 0.7


@pytest.mark.parametrize(
    ("vocabulary", "states", "scale"), [(5, 3, 1.0), (200, 40, 0.5), (1001, 70, 1.0), (70_001, 62, 1.0)]
)
def test_tokens_are_the_inverse_cdf_of_a_softmax(vocabulary: int, states: int, scale: float, threads: int) -> None:
    """Up to rounding: a token of another place than float64 says lies at the boundary. The last case is done in two parts."""
    own, logits_of = choice(vocabulary, biased=scale == 1.0, scale=scale)
    h, draws = draw(states, 8, seed=3).float(), generator(0, "test-choice")
    picks, u = draws.integers(0, states, size=2 * states), draws.random(2 * states).astype(np.float32)
    token, logp = own.draw(h, picks, u)
    logits = logits_of(h)
    exact = torch.softmax(logits, -1).cumsum(-1)[picks]
    plain = torch.searchsorted(exact, torch.from_numpy(u).double()[:, None], right=True)[:, 0]
    at = exact.gather(1, torch.minimum(token, plain)[:, None])[:, 0] - torch.from_numpy(u)
    assert bool(((token == plain) | (at.abs() < 1e-6)).all())
    assert int((token != plain).sum()) <= states // 25
    expected = torch.log_softmax(logits, -1)[picks].gather(1, token[:, None])[:, 0]
    torch.testing.assert_close(logp, expected.float(), atol=2e-6, rtol=1e-6)
    alone = [own.draw(h[p : p + 1], np.zeros(1, dtype=np.int64), u[i : i + 1]) for i, p in enumerate(picks)]
    assert torch.equal(token, torch.cat([one for one, _ in alone]))
    assert torch.equal(logp, torch.cat([one for _, one in alone]))


def test_a_grid_of_draws_has_the_frequencies_of_the_softmax() -> None:
    own, logits_of = choice(777)
    h, n = draw(1, 8, seed=4, size=0.5).float(), 20_000
    u = ((np.arange(n) + 0.5) / n).astype(np.float32)
    token, _ = own.draw(h, np.zeros(n, dtype=np.int64), u)
    shares = torch.bincount(token, minlength=777) / n
    torch.testing.assert_close(shares, torch.softmax(logits_of(h)[0], 0).float(), atol=2 / n, rtol=0)


@pytest.mark.parametrize("places", [[0], [511], [3, 127, 191, 192, 300], [383, 384], [499, 500]])
def test_what_is_impossible_is_never_drawn(places: list[int]) -> None:
    bias = torch.full((512,), -math.inf)
    bias[places] = 1.0
    own = Choice(VocabularyHead(weight=torch.zeros(512, 8), bias=bias, scale=1.0, softcap=None), temperature=1.0)
    u = np.array([0.0, 1e-9, 0.25, 0.4999999, 0.5, 0.75, LARGEST_UNIFORM], dtype=np.float32)
    token, logp = own.draw(torch.zeros(1, 8), np.zeros(7, dtype=np.int64), u)
    assert set(token.tolist()) <= set(places)
    assert {token[0].item(), token[-1].item()} == {places[0], places[-1]}
    torch.testing.assert_close(logp, torch.full((7,), -math.log(len(places))))


def test_the_largest_draw_is_of_the_last_token_that_is_possible() -> None:
    """Also where the sum of a block, rounded, is larger than that of its tokens."""
    bias = torch.zeros(192)
    bias[190:] = -math.inf
    own = Choice(
        VocabularyHead(weight=draw(192, 8, seed=1).float(), bias=bias, scale=1.0, softcap=None), temperature=1.0
    )
    picks, u = np.arange(1000), np.full(1000, LARGEST_UNIFORM, dtype=np.float32)
    token, logp = own.draw(draw(1000, 8, seed=2).float(), picks, u)
    assert int(token.max()) == 189
    assert bool(logp.isfinite().all())


def test_states_that_are_not_numbers_are_told_by_their_log_probabilities() -> None:
    own, _ = choice(400)
    h = torch.ones(3, 8)
    h[1, 3] = math.nan
    token, logp = own.draw(h, np.array([0, 1, 2]), np.full(3, 0.5, dtype=np.float32))
    assert logp.isnan().tolist() == [False, True, False]
    assert bool(((token >= 0) & (token < 400)).all())


PROMPTS = [torch.from_numpy(generator(0, "test-prompts", n).integers(3, 96, size=n)) for n in (3, 11, 1, 7, 7, 12, 2)]


def answers(model: Any, *, rows: int = 4, **given: Any) -> list[Sampled]:
    """Answers of several lengths to each prompt twice, fewer slots than prompts."""
    asked = [prompt for prompt in PROMPTS for _ in range(2)]
    settings = SamplingSettings(max_new_tokens=17, rows=rows, **given)
    return embedded_sampler(CausalModel(model), range(5, 12))(
        asked, uniforms(0, "test-draws", 0, range(14), 17), settings
    )


@pytest.mark.parametrize(
    ("family", "joined", "served"),
    [
        ("llama", True, True),
        ("llama", False, False),
        ("qwen2", True, True),
        ("mistral", True, False),
        ("qwen3", True, False),
    ],
)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_engine_writes_the_same_over_compiled_layers(
    family: str, joined: bool, served: bool, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window, and layers that do not all run compiled, are left to the model itself."""
    model, own = quick(family)
    seen: list[int] = []
    step = Stack.step
    monkeypatch.setattr(Stack, "step", lambda *given: seen.append(len(given[1])) or step(*given))
    if not joined:
        del own.base_model.__dict__[backbones._KNOWN]
    ours, theirs = answers(own, temperature=temperature), answers(model, temperature=temperature)
    assert bool(seen) == served
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.logp, other.logp, atol=2e-5, rtol=0)
    assert len({len(one.ids) for one in ours}) > 2


def test_a_sample_is_the_same_to_the_bit_with_any_number_of_slots() -> None:
    _, own = quick("llama")
    whole = answers(own, rows=64)
    for rows in (1, 3, 8):
        for one, other in zip(answers(own, rows=rows), whole, strict=True):
            assert torch.equal(one.ids, other.ids)
            assert torch.equal(one.logp, other.logp)


def test_moved_weights_are_the_next_answers_weights() -> None:
    model, own = quick("llama")
    sampler, chance, settings = (
        embedded_sampler(CausalModel(own), (5,)),
        uniforms(0, "d", 0, range(7), 9),
        SamplingSettings(max_new_tokens=9),
    )
    before = sampler(PROMPTS, chance, settings)
    with torch.no_grad():
        for one in (own, model):
            for parameter in one.parameters():
                parameter.mul_(1.2)
    after, plain = (
        sampler(PROMPTS, chance, settings),
        embedded_sampler(CausalModel(model), (5,))(PROMPTS, chance, settings),
    )
    assert [a.ids.tolist() for a in before] != [a.ids.tolist() for a in after]
    assert [a.ids.tolist() for a in plain] == [a.ids.tolist() for a in after]


def test_cut_tails_values_and_half_precision_are_served_beside_compiled_layers() -> None:
    model, own = quick("llama")
    with torch_rng(0, "test-head"):
        head = nn.Linear(32, 1)
    chance, settings = uniforms(0, "d", 0, range(7), 9), SamplingSettings(max_new_tokens=9, rows=3, top_p=0.7)
    ours, theirs = (
        embedded_sampler(CausalModel(m), (5,), value_head=head)(PROMPTS, chance, settings) for m in (own, model)
    )
    for one, other in zip(ours, theirs, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.values, other.values, atol=1e-5, rtol=0)
        torch.testing.assert_close(one.plain_logp, other.plain_logp, atol=1e-5, rtol=0)
    assert answers(own.bfloat16(), rows=3)


def test_weights_that_have_diverged_are_told() -> None:
    _, own = quick("llama")
    sampler = embedded_sampler(CausalModel(own), (5,))
    with torch.no_grad():
        own.base_model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLogits):
        sampler(PROMPTS, uniforms(0, "d", 0, range(7), 9), SamplingSettings(max_new_tokens=9))


def test_without_compiled_code_the_model_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = answers(quick("llama")[1])
    monkeypatch.setattr(decoding, "library", None)
    for one, other in zip(ours, answers(quick("llama")[1]), strict=True):
        assert one.ids.tolist() == other.ids.tolist()
