"""Compiled layers and head with products in bfloat16: operands are rounded, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.core.head import HeadAnswers, HeadSlopes, VocabularyHead
from bridle.language import decoding, layers, vocabulary
from bridle.language.backbones import computes_compiled
from bridle.language.layers import decoder_layer
from bridle.language.models import ModelSettings, save_model
from bridle.language.roles import CriticSettings, open_roles
from bridle.language.sampler import SamplingSettings
from bridle.language.segments import Segments
from bridle.native.compiling import BFLOAT16
from bridle.native.loading import halved_library_of
from bridle.random import uniforms
from tests.built import HERE, built, source_named
from tests.language.layered import CASES, Case, draw, formula, inputs
from tests.language.tiny import byte_tokenizer, tiny_model

BFLOAT = torch.bfloat16
ROOMS = {"layers.c": layers, "decoding.c": decoding, "vocabulary.c": vocabulary}


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Any]:
    if halved_library_of(source_named("layers.c")) is None:
        pytest.skip("this processor does not multiply in bfloat16")
    place, found = tmp_path_factory.mktemp("compiled"), {}
    for name, room in ROOMS.items():
        (place / name).mkdir()
        found |= {(name, level): built(name, room.load, place / name, level) for level in (HERE[0], BFLOAT16)}
    return found


@pytest.fixture(autouse=True)
def compiled(libraries: dict[tuple[str, str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, room in ROOMS.items():
        for level, place in ((HERE[0], "library"), (BFLOAT16, "halved")):
            found = libraries[name, level]
            if isinstance(found, str):
                pytest.skip(f"not compiled: {found}")
            monkeypatch.setattr(room, place, found)


def rounded(x: Tensor) -> Tensor:
    return x.to(BFLOAT).to(x.dtype)


class RoundedLinear(torch.autograd.Function):
    """x Wᵀ of rounded operands, there and back: what a processor with such products does, but for the order of sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rounded(x), rounded(weight))
        return rounded(x) @ rounded(weight).T

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        own = rounded(slope)
        return own @ weight, own.flatten(0, -2).T @ x.flatten(0, -2)


def with_rounded_products(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = RoundedLinear.apply(x, weight)  # type: ignore[no-untyped-call]
    return found if bias is None else found + bias


def gradients(layer: Any, case: Case, dtype: torch.dtype) -> list[Tensor]:
    shape, (x, cosine, sine), weights = inputs(case)
    x, cosine, sine = x.to(dtype).requires_grad_(), cosine.to(dtype), sine.to(dtype)
    own = [None if w is None else w.to(dtype).requires_grad_() for w in weights]
    with torch.autocast("cpu", dtype=BFLOAT, enabled=dtype == torch.float32):
        y = layer(shape, x, cosine, sine, own)
    (y * draw(*y.shape, seed=5).to(dtype)).sum().backward()
    return [y.detach(), *(t.grad for t in (x, *own) if t is not None and t.grad is not None)]


def apart(found: Tensor, expected: Tensor) -> float:
    """The distance over the size, root mean squares; the distance itself from what is 0."""
    return float((found.double() - expected).norm() / (expected.norm() or 1.0))


@pytest.mark.parametrize("case", [*CASES, (2, 9, 16, 2, 1, 8, 1030, True), (1, 5, 8, 1, 1, 8, 2063, False)])
def test_a_layer_there_and_back_rounds_what_it_multiplies(
    case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sum in another order may round an operand the other way, so the oracle is met up to a fraction of its own rounding."""
    found = gradients(decoder_layer, case, torch.float32)
    exact = gradients(formula, case, torch.float64)
    monkeypatch.setattr(nn.functional, "linear", with_rounded_products)
    expected = gradients(formula, case, torch.float64)
    assert len(found) == len(expected) == len(exact)
    noises = [apart(oracle, truth) for oracle, truth in zip(expected, exact, strict=True)]
    assert 2e-3 < max(noises) < 5e-2
    for ours, oracle, noise in zip(found, expected, noises, strict=True):
        assert apart(ours, oracle) <= 0.2 * noise + 1e-5


def test_other_passes_of_the_same_are_the_same_to_the_bit(threads: int) -> None:
    """A text does not depend on its company, nor a pass on whether its gradient is asked for."""
    shape, (x, cosine, sine), weights = inputs(CASES[7])
    given = [x.float(), cosine.float(), sine.float(), [None if w is None else w.float() for w in weights]]
    with torch.autocast("cpu", dtype=BFLOAT):
        whole = decoder_layer(shape, *given)
        given[0].requires_grad_()
        assert torch.equal(decoder_layer(shape, *given).detach(), whole)
        alone = decoder_layer(shape, x[3:4].float(), *given[1:])
    assert torch.equal(alone, whole[3:4])


@pytest.mark.parametrize(("rows", "width", "count"), [(13, 64, 512), (29, 40, 1001), (7, 9, 203)])
def test_a_head_there_and_back_rounds_what_it_multiplies(rows: int, width: int, count: int, threads: int) -> None:
    hidden, weight, bias = (draw(*size, seed=sum(size)).float() for size in ((rows, width), (count, width), (count,)))
    theirs, other = draw(rows, 24, seed=1).float(), draw(count, 24, seed=2).float()
    head, targets = VocabularyHead(weight=weight, bias=bias), torch.arange(rows) * 7 % count
    along, grad = draw(rows, seed=8).float(), torch.zeros_like(weight)

    def weighing(part: slice, found: HeadAnswers) -> HeadSlopes:
        return HeadSlopes(logp=along[part], entropy=0.3 * along[part])

    with torch.autocast("cpu", dtype=BFLOAT):
        answers, slope = vocabulary.head_answers(
            hidden,
            head,
            targets,
            reference=(theirs, VocabularyHead(weight=other)),
            weighing=weighing,
            weight_grad=grad,
        )
    assert slope is not None
    assert answers.kl is not None
    assert answers.ref_logp is not None
    at = [rounded(t.double()) for t in (hidden, weight, theirs, other)]
    logs, ref = (at[0] @ at[1].T + bias).log_softmax(-1), (at[2] @ at[3].T).log_softmax(-1)
    p, entropy, rows_of = logs.exp(), -(logs.exp() * logs).sum(-1), torch.arange(rows)
    for ours, oracle in (
        (answers.logp, logs[rows_of, targets]),
        (answers.entropy, entropy),
        (answers.kl, (p * (logs - ref)).sum(-1)),
        (answers.ref_logp, ref[rows_of, targets]),
    ):
        torch.testing.assert_close(ours.double(), oracle, rtol=1e-5, atol=2e-5)
    chosen = nn.functional.one_hot(targets, count).double()
    d = along[:, None] * (chosen - p) - 0.3 * along[:, None] * p * (logs + entropy[:, None])
    own = rounded(d)
    for ours, oracle, truth in ((slope, own @ at[1], d @ at[1]), (grad, own.T @ at[0], d.T @ at[0])):
        noise = apart(oracle, truth)
        assert 5e-4 < noise < 1e-2
        assert apart(ours, oracle) <= 0.2 * noise


def test_backbones_that_compute_so_hold_float32_alone_and_their_sampler_writes_as_they_read(tmp_path: Path) -> None:
    """No shadow: what is multiplied is rounded where it is packed. Sampler and trainer multiply alike."""
    save_model(tmp_path / "m", tiny_model(vocab_size=260), byte_tokenizer())
    roles = open_roles(
        ModelSettings(path=str(tmp_path / "m")), CriticSettings(), None,
        temperature=1.0, device=torch.device("cpu"), compute_dtype=BFLOAT, lora=None,
    )  # fmt: skip
    assert computes_compiled(roles.policy.actor.model.base_model, BFLOAT)
    assert not computes_compiled(roles.policy.actor.model.base_model, torch.float16)
    assert {p.dtype for p in (*roles.policy.parameters(), *roles.reference.parameters())} == {torch.float32}
    assert all(roles.masters.of(p) is p for p in roles.policy.parameters())
    prompts = [torch.arange(3, 9), torch.arange(40, 44)]
    drawn = roles.sampler(prompts, uniforms(0, "halves", 1, range(2), 12), SamplingSettings(max_new_tokens=12))
    units = Segments.of(prompts, [one.ids for one in drawn])
    with torch.no_grad():
        logp = roles.policy(units).logp
        roles.policy.compute_dtype = torch.float32
        in_float32 = roles.policy(units).logp
    gap = (logp - torch.cat([one.logp for one in drawn])).abs()
    assert gap.max() < 0.2 * (logp - in_float32).abs().max()
    assert gap.mean() < 0.2 * (logp - in_float32).abs().mean()
