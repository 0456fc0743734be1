"""A head's answers and their gradient in one pass, against the plain formulas and autograd in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bridle.core.head import HeadAnswers, HeadSlopes, VocabularyHead, head_answers

N, D, E, V = 11, 5, 3, 17


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(hidden: Tensor, head: VocabularyHead, temperature: float) -> Tensor:
    raw = head.scale * (hidden @ head.weight.t() + (0.0 if head.bias is None else head.bias))
    z = raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)
    return torch.log_softmax(z / temperature, -1)


@pytest.mark.parametrize("softcap", [None, 2.5])
@pytest.mark.parametrize("parts", ["logp", "entropy", "kl", "logp entropy", "logp entropy kl"])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_answers_and_gradient_are_those_of_the_plain_formula(softcap: float | None, parts: str, chunk: int) -> None:
    """Σ a·log π(target) + b·H + c·KL, differentiated by autograd through whole float64 logits."""
    hidden, weight, bias = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(N, D), (V, D), (V,)]))
    theirs, ref = draw(N, E, seed=4), VocabularyHead(weight=draw(V, E, seed=5), scale=0.7)
    head = VocabularyHead(weight=weight, bias=bias, scale=1.3, softcap=softcap)
    targets = torch.arange(N) % V
    a, b, c = (
        draw(N, seed=6 + i) if name in parts.split() else None for i, name in enumerate(("logp", "entropy", "kl"))
    )

    log_pi = plain(hidden, head, 0.8)
    expected = HeadAnswers(
        logp=log_pi[torch.arange(N), targets],
        entropy=-(log_pi.exp() * log_pi).sum(-1),
        kl=(log_pi.exp() * (log_pi - plain(theirs, ref, 0.8))).sum(-1),
        ref_logp=plain(theirs, ref, 0.8)[torch.arange(N), targets],
    )
    loss = sum(
        (slope * answer).sum()
        for slope, answer in ((a, expected.logp), (b, expected.entropy), (c, expected.kl))
        if slope is not None and answer is not None
    )
    by_autograd = torch.autograd.grad(loss, [hidden, weight, bias])

    def weighing(rows: slice, found: HeadAnswers) -> HeadSlopes:
        cut = [None if slope is None else slope[rows] for slope in (a, b, c)]
        return HeadSlopes(logp=cut[0], entropy=cut[1], kl=cut[2])

    grads = torch.ones(V, D, dtype=torch.float64), torch.ones(V, dtype=torch.float64)  # added to, not written over
    found, hidden_grad = head_answers(
        hidden,
        head,
        targets,
        reference=(theirs, ref),
        temperature=0.8,
        chunk=chunk,
        weighing=weighing,
        weight_grad=grads[0],
        bias_grad=grads[1],
    )
    for name in ("logp", "entropy", "kl", "ref_logp"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name).detach(), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(hidden_grad, by_autograd[0], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(grads[0] - 1, by_autograd[1], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(grads[1] - 1, by_autograd[2], atol=1e-12, rtol=1e-10)


def test_slopes_may_be_a_function_of_the_answers() -> None:
    """The loss ½(log π + 1)² has the slope log π + 1, known only when the log-probability is."""
    hidden, weight = draw(N, D, seed=0).requires_grad_(), draw(V, D, seed=1)
    targets = torch.arange(N)
    log_pi = plain(hidden, VocabularyHead(weight=weight), 1.0)[torch.arange(N), targets]
    (expected,) = torch.autograd.grad((0.5 * (log_pi + 1) ** 2).sum(), [hidden])
    _, found = head_answers(
        hidden,
        VocabularyHead(weight=weight),
        targets,
        chunk=3,
        weighing=lambda rows, answers: HeadSlopes(logp=answers.logp + 1),
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-10)


def test_without_slopes_nothing_is_added_and_no_gradient_returned() -> None:
    hidden, head = draw(N, D, seed=0), VocabularyHead(weight=draw(V, D, seed=1))
    added = torch.zeros(V, D, dtype=torch.float64)
    _, none = head_answers(hidden, head, torch.zeros(N, dtype=torch.int64), weight_grad=added)
    _, zero = head_answers(
        hidden, head, torch.zeros(N, dtype=torch.int64), weighing=lambda *_: HeadSlopes(), weight_grad=added
    )
    assert none is None
    assert zero is not None
    assert not zero.any()
    assert not added.any()


def test_half_precision_is_computed_in_float32() -> None:
    hidden, weight = draw(N, D, seed=0).bfloat16(), draw(V, D, seed=1).float()
    found, _ = head_answers(hidden, VocabularyHead(weight=weight), torch.arange(N))
    whole, _ = head_answers(hidden.float(), VocabularyHead(weight=weight), torch.arange(N))
    assert found.logp.dtype is torch.float32
    torch.testing.assert_close(found.logp, whole.logp, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"targets": torch.full((N,), V)}, "targets range"),
        ({"head": VocabularyHead(weight=torch.zeros(V, D + 1))}, "weight has shape"),
        ({"reference": (torch.zeros(N - 1, E), VocabularyHead(weight=torch.zeros(V, E)))}, "other positions"),
        ({"chunk": 0}, "at least 1 row"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_shapes_and_ranges_are_checked(bad: dict[str, object], says: str) -> None:
    given = {"head": VocabularyHead(weight=torch.zeros(V, D)), "targets": torch.zeros(N, dtype=torch.int64), **bad}
    with pytest.raises(ValueError, match=says):
        head_answers(torch.zeros(N, D), **given)
