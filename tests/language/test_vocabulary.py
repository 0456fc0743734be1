"""The compiled head against the definitions in float64, whose gradient autograd takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bridle.core.head import HeadAnswers, HeadSlopes, VocabularyHead
from bridle.language import vocabulary
from bridle.language.vocabulary import head_answers, token_logprobs
from tests.built import HERE, built

# N, D, V, D of the reference (0: none), bias
Case = tuple[int, int, int, int, bool]
CASES: list[Case] = [
    (1, 3, 1, 0, False),
    (7, 8, 9, 8, True),
    (13, 40, 192, 24, False),
    (5, 17, 193, 0, True),
    (29, 33, 1001, 48, True),
    (11, 288, 3207, 288, False),
]


@pytest.fixture(scope="module", params=HERE)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    return built("vocabulary.c", vocabulary.load, tmp_path_factory.mktemp("compiled"), request.param)


@pytest.fixture(autouse=True)
def compiled(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(library, str):
        pytest.skip(f"not compiled: {library}")
    monkeypatch.setattr(vocabulary, "library", library)

    def never(*_: object, **__: object) -> None:
        raise AssertionError("this ran as it is, not compiled")

    monkeypatch.setattr("bridle.core.head.head_answers", never)


def draw(*shape: int, seed: int, size: float = 1.0) -> Tensor:
    return size * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(case: Case) -> tuple[list[tuple[Tensor, VocabularyHead]], Tensor]:
    count, width, tokens, theirs, biased = case
    sides = []
    for at, size in enumerate([width, theirs] if theirs else [width]):
        bias = draw(tokens, seed=30 + at) if biased else None
        weight = draw(tokens, size, seed=10 + at, size=size**-0.5)
        sides.append((draw(count, size, seed=20 + at), VocabularyHead(weight=weight, bias=bias, scale=1.7)))
    targets = torch.randint(tokens, (count,), generator=torch.Generator().manual_seed(5))
    targets[0], targets[-1] = 0, tokens - 1
    return sides, targets


def definitions(sides: list[tuple[Tensor, VocabularyHead]], targets: Tensor, tau: float) -> list[Tensor]:
    """log π(target), H, KL and log ref(target) in the inputs' dtype."""
    logs = []
    for hidden, head in sides:
        z = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
        logs.append((head.scale * z / tau).log_softmax(-1))
    own, *other = logs
    p, finite = own.exp(), own.masked_fill(own == -math.inf, 0.0)
    kl = [(p * (finite - ref.masked_fill(own == -math.inf, 0.0))).sum(-1) for ref in other]
    at_targets = [log.gather(1, targets[:, None])[:, 0] for log in logs]
    return [at_targets[0], -(p * finite).sum(-1), *kl, *at_targets[1:]]


def in_float64(head: VocabularyHead) -> VocabularyHead:
    bias = None if head.bias is None else head.bias.double().requires_grad_()
    return VocabularyHead(weight=head.weight.double().requires_grad_(), bias=bias, scale=head.scale)


def closely(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 5e-6 * expected.abs().max() + 3e-6)


@pytest.mark.parametrize("case", CASES)
def test_answers_and_gradients_are_those_of_the_definitions(
    case: Case, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vocabulary, "_ROWS", 6)  # several chunks, some shorter
    sides, targets = drawn(case)
    (hidden, head), *reference = sides
    weights = [draw(case[0], seed=40 + at) for at in range(2 + len(reference))]

    def weighing(rows: slice, found: HeadAnswers) -> HeadSlopes:
        assert len(found.logp) == rows.stop - rows.start
        return HeadSlopes(**dict(zip(("logp", "entropy", "kl"), (w[rows] for w in weights), strict=False)))

    weight_grad = torch.ones_like(head.weight)
    bias_grad = None if head.bias is None else torch.ones_like(head.bias)
    found, slope = head_answers(
        hidden,
        head,
        targets,
        reference=reference[0] if reference else None,
        temperature=0.7,
        weighing=weighing,
        weight_grad=weight_grad,
        bias_grad=bias_grad,
    )
    exact = [(h.double(), in_float64(side)) for h, side in sides]
    exact[0][0].requires_grad_()
    expected = definitions(exact, targets, 0.7)
    sum((w * one).sum() for w, one in zip(weights, expected, strict=False)).backward()
    assert (found.kl is None) is not bool(reference)
    for one, what in zip(expected, (found.logp, found.entropy, found.kl, found.ref_logp), strict=False):
        assert what is not None
        assert closely(what, one.detach())
    assert slope is not None
    assert closely(slope, exact[0][0].grad)
    assert closely(weight_grad - 1, exact[0][1].weight.grad)
    if bias_grad is not None:
        assert exact[0][1].bias is not None
        assert closely(bias_grad - 1, exact[0][1].bias.grad)
    again = head_answers(hidden, head, targets, reference=reference[0] if reference else None, temperature=0.7)[0]
    assert closely(again.logp, expected[0].detach())
    assert closely(again.entropy, expected[1].detach())


@pytest.mark.parametrize("holding", [("logp",), ("entropy",), ("kl",), ("entropy", "kl"), ()])
def test_a_loss_may_hold_some_of_the_answers(holding: tuple[str, ...]) -> None:
    sides, targets = drawn((9, 16, 300, 16, False))
    weights = {name: draw(9, seed=50 + at) for at, name in enumerate(holding)}
    hidden, head = sides[0]
    weight_grad = torch.zeros_like(head.weight)
    _, slope = head_answers(
        hidden,
        head,
        targets,
        reference=sides[1],
        weighing=lambda rows, _: HeadSlopes(**{name: weight[rows] for name, weight in weights.items()}),
        weight_grad=weight_grad,
    )
    exact = [(h.double(), in_float64(side)) for h, side in sides]
    exact[0][0].requires_grad_()
    expected = dict(zip(("logp", "entropy", "kl", "ref_logp"), definitions(exact, targets, 1.0), strict=True))
    total = exact[0][0].sum() * 0 + exact[0][1].weight.sum() * 0
    (total + sum((weights[name] * expected[name]).sum() for name in holding)).backward()
    assert slope is not None
    assert closely(slope, exact[0][0].grad)
    assert closely(weight_grad, exact[0][1].weight.grad)


def test_logits_far_apart_stay_exact(threads: int) -> None:
    """The largest logit comes late, by hundreds: what was summed up before it has to fall away, not overflow."""
    hidden, tokens = torch.tensor([[1.0], [-1.0], [0.0]]), 1000
    weight = torch.linspace(-400, 400, tokens)[:, None].contiguous()
    targets = torch.tensor([tokens - 1, tokens - 1, 3])
    found = head_answers(hidden, VocabularyHead(weight=weight), targets)[0]
    logp, entropy = definitions([(hidden.double(), VocabularyHead(weight=weight.double()))], targets, 1.0)
    assert closely(found.logp, logp)
    assert closely(found.entropy, entropy)
    assert float(found.logp[2]) == pytest.approx(-math.log(tokens), rel=1e-6)


def test_forbidden_tokens_have_no_part(threads: int) -> None:
    """Whole blocks of the vocabulary among them, the first too."""
    (side, reference), targets = drawn((6, 8, 700, 8, True))
    allowed = torch.arange(700) % 3 == 0
    allowed[:200] = False
    targets = torch.nonzero(allowed)[targets % int(allowed.sum()), 0]
    slopes = {name: draw(6, seed=at) for at, name in enumerate(("logp", "entropy", "kl"))}
    found, grads = [], []
    for bias in (True, False):  # forbidden by the bias, or not there at all
        own, other = (
            VocabularyHead(weight=h.weight, bias=h.bias.masked_fill(~allowed, -math.inf))  # type: ignore[union-attr]
            if bias
            else VocabularyHead(weight=h.weight[allowed], bias=h.bias[allowed])  # type: ignore[index]
            for h in (side[1], reference[1])
        )
        grad = torch.zeros_like(own.weight)
        where = targets if bias else (allowed.cumsum(0) - 1)[targets]
        found.append(
            head_answers(
                side[0],
                own,
                where,
                reference=(reference[0], other),
                weighing=lambda rows, _: HeadSlopes(**{name: slope[rows] for name, slope in slopes.items()}),
                weight_grad=grad,
            )
        )
        grads.append(grad[allowed] if bias else grad)
    for one, two in zip((found[0][0].logp, found[0][0].kl), (found[1][0].logp, found[1][0].kl), strict=True):
        assert one is not None
        assert two is not None
        assert closely(one, two)
    assert closely(found[0][1], found[1][1])
    assert closely(grads[0], grads[1])


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_is_seen_at_its_position_alone(wrong: float, threads: int) -> None:
    sides, targets = drawn((5, 8, 500, 0, False))
    hidden, head = sides[0]
    expected = head_answers(hidden, head, targets)[0]
    hidden[2, 3] = wrong
    found = head_answers(hidden, head, targets)[0]
    assert not torch.isfinite(found.logp[2])
    rest = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(found.logp[rest], expected.logp[rest], rtol=0, atol=0)
    head.weight[1, 0] = math.nan  # in one of the vocabulary's first tokens: all that comes after it must not hide it
    assert not torch.isfinite(head_answers(expected.logp.new_ones(5, 8), head, targets)[0].logp).any()


def test_token_logprobs_are_the_same_and_keep_their_graph() -> None:
    (hidden, head), targets = drawn((8, 16, 260, 0, True))[0][0], drawn((8, 16, 260, 0, True))[1]
    with_graph, entropy = token_logprobs(hidden.requires_grad_(), head, targets, temperature=0.9)
    assert with_graph.requires_grad
    with torch.no_grad():
        logp, same = token_logprobs(hidden, head, targets, temperature=0.9)
        assert not token_logprobs(hidden, head, targets, with_entropy=False)[1].any()
    assert closely(logp, with_graph.detach())
    assert closely(same, entropy.detach())


class Own(Tensor):
    """A tensor that may mean something else by what is done to it."""


def head_of(weight: Tensor, bias: Tensor | None = None, softcap: float | None = None) -> VocabularyHead:
    return VocabularyHead(weight=weight, bias=bias, softcap=softcap)


Given = dict[str, Any]
UNSERVED: dict[str, Callable[[Given], Given]] = {
    "softcap": lambda g: {"head": head_of(g["head"].weight, softcap=30.0)},
    "float64": lambda g: {"hidden": g["hidden"].double(), "head": head_of(g["head"].weight.double())},
    "strided": lambda g: {"head": head_of(g["head"].weight.T.contiguous().T)},
    "temperature": lambda g: {"temperature": -1.0},
    "a target beyond the vocabulary": lambda g: {"targets": g["targets"].clamp(min=50)},
    "a target below it": lambda g: {"targets": g["targets"] - 50},
    "targets of fewer bits": lambda g: {"targets": g["targets"].int()},
    "targets in two dimensions": lambda g: {"targets": g["targets"][:, None]},
    "targets elsewhere": lambda g: {"targets": g["targets"].to("meta")},
    "no position": lambda g: {"hidden": g["hidden"][:0], "targets": g["targets"][:0]},
    "fewer states than targets": lambda g: {"hidden": g["hidden"][:3]},
    "states elsewhere": lambda g: {"hidden": g["hidden"].to("meta")},
    "states of another kind": lambda g: {"hidden": g["hidden"].as_subclass(Own)},
    "a bias too short": lambda g: {"head": head_of(g["head"].weight, torch.zeros(49))},
    "a reference of fewer tokens": lambda g: {"reference": (g["hidden"], head_of(g["head"].weight[:49]))},
    "a gradient too short": lambda g: {"weight_grad": torch.zeros(49, 8)},
    "a gradient across": lambda g: {"weight_grad": torch.zeros(8, 50).T},
    "a bias's gradient too short": lambda g: {"bias_grad": torch.zeros(49)},
}


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("kind", UNSERVED)
def test_what_is_not_served_runs_as_it_is(kind: str) -> None:
    """Compiled code would read it as something else, or where it does not lie."""
    ((hidden, head),), targets = drawn((4, 8, 50, 0, False))
    given = {"hidden": hidden, "head": VocabularyHead(weight=head.weight), "targets": targets}
    head_answers(**given)
    with pytest.raises(AssertionError, match="ran as it is"):
        head_answers(**{**given, **UNSERVED[kind](given)})


def test_where_nothing_is_compiled_it_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    ((hidden, head),), targets = drawn((4, 8, 50, 0, False))
    monkeypatch.setattr(vocabulary, "library", None)
    with pytest.raises(AssertionError, match="ran as it is"):
        head_answers(hidden, head, targets)


@pytest.mark.parametrize("lying", ["one number for all", "every second", "float64"])
def test_slopes_and_targets_may_lie_anyhow(lying: str) -> None:
    ((hidden, head), reference), targets = drawn((6, 8, 50, 8, True))
    slopes = {name: draw(6, seed=at) for at, name in enumerate(("logp", "entropy", "kl"))}
    if lying == "one number for all":
        slopes = dict.fromkeys(slopes, torch.full((6,), 0.7))
    laid: dict[str, Callable[[Tensor], Tensor]] = {
        "one number for all": lambda t: t[:1].expand(6),
        "every second": lambda t: torch.stack([t, t + 1], 1)[:, 0],
        "float64": lambda t: t.double(),
    }
    found = []
    for own in (lambda t: t, laid[lying]):
        weight_grad, bias_grad = torch.zeros(50, 8), torch.zeros(50)
        slope = head_answers(
            hidden,
            head,
            torch.stack([targets, targets - 1], 1)[:, 0] if own is laid[lying] else targets,
            reference=reference,
            weighing=lambda rows, _, own=own: HeadSlopes(**{name: own(slope) for name, slope in slopes.items()}),
            weight_grad=weight_grad,
            bias_grad=bias_grad,
        )[1]
        found.append((slope, weight_grad, bias_grad))
    assert all(torch.equal(mine, other) for mine, other in zip(*found, strict=True))


def test_a_vocabulary_larger_than_what_is_kept_is_taken_a_position_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ((hidden, head),), targets = drawn((6, 8, 50, 0, False))
    seen: list[int] = []

    def weighing(rows: slice, found: HeadAnswers) -> HeadSlopes:
        seen.append(rows.stop - rows.start)
        return HeadSlopes(logp=torch.ones_like(found.logp))

    expected = head_answers(hidden, head, targets, weighing=weighing)[1]
    monkeypatch.setattr(vocabulary, "_KEPT_NUMBERS", 100)
    found = head_answers(hidden, head, targets, weighing=weighing)[1]
    assert seen == [6] + [1] * 6
    assert found is not None
    assert expected is not None
    assert closely(found, expected)


def test_a_temperature_that_gives_no_distribution_is_refused_without_a_gradient_too() -> None:
    ((hidden, head),), targets = drawn((4, 8, 50, 0, False))
    with torch.no_grad(), pytest.raises(ValueError, match="temperature"):
        token_logprobs(hidden, head, targets, temperature=-1.0)


@pytest.mark.parametrize("count", [6, 600])
def test_hidden_states_that_lie_column_by_column_are_the_same(count: int) -> None:
    (hidden, head), targets = drawn((count, 8, 50, 0, False))[0][0], drawn((count, 8, 50, 0, False))[1]

    def slopes(rows: slice, found: HeadAnswers) -> HeadSlopes:
        return HeadSlopes(logp=torch.ones_like(found.logp))

    expected = head_answers(hidden, head, targets, weighing=slopes)[1]
    assert expected is not None
    found = head_answers(hidden.T.contiguous().T, head, targets, weighing=slopes)[1]
    assert found is not None
    assert torch.equal(found, expected)


def test_what_gives_no_distribution_or_fits_no_chunk_is_refused() -> None:
    (hidden, head), targets = drawn((6, 8, 50, 0, False))[0][0], drawn((6, 8, 50, 0, False))[1]
    with pytest.raises(ValueError, match="temperature"):
        head_answers(hidden, head, targets, temperature=math.inf)
    with pytest.raises(ValueError, match="scale"):
        head_answers(hidden, VocabularyHead(weight=head.weight, scale=0.0), targets)
    with pytest.raises(ValueError, match="reference"):
        head_answers(hidden, head, targets, weighing=lambda rows, found: HeadSlopes(kl=torch.ones(6)))
    with pytest.raises(ValueError, match="slopes have shape"):
        head_answers(hidden, head, targets, weighing=lambda rows, found: HeadSlopes(logp=torch.ones(5)))


def test_a_forbidden_token_stays_so_at_a_low_temperature() -> None:
    """−inf is put for a large finite number, which grows beyond all numbers again where it is divided by τ < 1/4."""
    (hidden, head), targets = drawn((6, 8, 50, 0, True))[0][0], drawn((6, 8, 50, 0, True))[1]
    bias = head.bias.clone()
    bias[3] = -math.inf
    kept = torch.arange(50) != 3
    targets = torch.where(targets == 3, 4, targets)
    found = head_answers(hidden, VocabularyHead(weight=head.weight, bias=bias), targets, temperature=0.1)[0]
    z = (hidden.double() @ head.weight.double().T + head.bias.double())[:, kept] / 0.1
    log_p = z.log_softmax(-1)
    places = targets - (targets > 3).long()
    assert closely(found.logp, log_p.gather(1, places[:, None])[:, 0].float())
    torch.testing.assert_close(found.entropy, -(log_p.exp() * log_p).sum(-1).float(), rtol=1e-4, atol=1e-4)
