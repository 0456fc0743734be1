"""Drawing: the blocked inverse CDF is the plain one, and a cut tail leaves exactly the tokens it should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from bridle.errors import ConfigError
from bridle.language.causal import CausalModel
from bridle.language.sampler import ReferenceSampler, SamplingSettings
from bridle.language.sampler.drawing import LARGEST_UNIFORM, blocked_inverse_cdf, draw, inverse_cdf, warp
from bridle.language.sampler.serving import embedded_sampler
from bridle.random import generator, uniforms
from tests.language.tiny import tiny_model


def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
    return torch.from_numpy(scale * generator(0, "test-logits", shape[-1]).standard_normal(shape)).float()


@pytest.mark.parametrize("size", [2048, 2100, 5000, 32_000])
def test_blocks_draw_what_one_cumulative_sum_draws(size: int) -> None:
    """Up to rounding: where they differ, the draw lies on a boundary of the float64 distribution."""
    logits = normal(64, size, scale=2.0)
    u = torch.from_numpy(generator(1, "test-u", size).random(64)).float()
    token, logp = blocked_inverse_cdf(logits, u)
    exact = torch.softmax(logits.double(), -1).cumsum(-1)
    plain = torch.searchsorted(exact, u.double()[:, None], right=True)[:, 0]
    at = exact.gather(1, torch.minimum(token, plain)[:, None])[:, 0]
    assert bool(((token == plain) | ((at - u).abs() < 1e-6)).all())
    assert int((token != plain).sum()) <= 1
    torch.testing.assert_close(
        logp, torch.log_softmax(logits, -1).gather(1, token[:, None])[:, 0], atol=2e-6, rtol=1e-6
    )


@pytest.mark.parametrize("size", [2048, 2300])
def test_blocks_have_the_frequencies_of_softmax(size: int) -> None:
    """A grid of uniforms is a perfect sample: each token's share is its probability to within 1/n."""
    logits, n = normal(1, size), 20_000
    u = (torch.arange(n) + 0.5) / n
    token, _ = blocked_inverse_cdf(logits.expand(n, size), u)
    shares = torch.bincount(token, minlength=size) / n
    torch.testing.assert_close(shares, torch.softmax(logits[0], 0), atol=2 / n, rtol=0)


def test_blocks_never_draw_the_impossible() -> None:
    for places in ([0], [511], [3, 127, 128, 300], [255, 256], [2049]):
        logits = torch.full((1, 2050), float("-inf"))
        logits[0, places] = 0.0
        for u in (0.0, 1e-9, 0.25, 0.4999999, 0.5, 0.75, LARGEST_UNIFORM):
            token, logp = blocked_inverse_cdf(logits, torch.tensor([u]))
            assert token.item() in places
            assert math.exp(logp) == pytest.approx(1 / len(places))


CASES = [
    {"top_k": 3},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 1},
    {"top_p": 1.0, "min_p": 1.0},
]


@pytest.mark.parametrize("cuts", CASES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_cut_tail_against_enumeration(cuts: dict[str, float], temperature: float) -> None:
    """Work out by hand, in plain Python, which tokens stay and with which probabilities."""
    settings = SamplingSettings(temperature=temperature, **cuts)  # type: ignore[arg-type]
    logits = normal(7, 11, scale=1.5)
    for row in logits:
        kept = {v: math.exp(float(z) / temperature) for v, z in enumerate(row)}
        total = sum(kept.values())
        whole = {v: p / total for v, p in kept.items()}
        ranked = sorted(kept, key=lambda v: -kept[v])
        if settings.top_k is not None:
            ranked = ranked[: settings.top_k]
        if settings.top_p is not None:
            held = sum(kept[v] for v in ranked)
            sums = itertools.accumulate(kept[v] / held for v in ranked)
            ranked = ranked[: next(i for i, s in enumerate(sums) if s >= settings.top_p - 1e-9) + 1]
        if settings.min_p is not None:
            ranked = [v for v in ranked if kept[v] >= settings.min_p * kept[ranked[0]] * (1 - 1e-6)]
        left = sum(kept[v] for v in ranked)
        u = (torch.arange(500) + 0.5) / 500
        token, logp, plain = draw(row.expand(500, 11), u, settings)
        assert set(token.tolist()) <= set(ranked)
        for v in ranked:
            share = float((token == v).float().mean())
            assert share == pytest.approx(kept[v] / left, abs=1 / 250)
        for v, a, b in zip(token.tolist(), logp.tolist(), plain.tolist(), strict=True):
            assert a == pytest.approx(math.log(kept[v] / left), abs=1e-5)
            assert b == pytest.approx(math.log(whole[v]), abs=1e-5)


def test_ties_at_the_k_th_place_all_stay() -> None:
    kept = warp(torch.tensor([[1.0, 0.5, 0.5, 0.0]]), SamplingSettings(top_k=2))
    assert torch.isfinite(kept).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("cuts", [{}, *CASES[:4]])
def test_engine_and_plain_sampler_cut_alike(cuts: dict[str, float]) -> None:
    model, settings = tiny_model(), SamplingSettings(max_new_tokens=8, temperature=1.3, rows=4, **cuts)  # type: ignore[arg-type]
    asked = [torch.arange(3, 5 + b) for b in range(9)]
    key = uniforms(0, "t", 0, range(9), 8)
    ours = embedded_sampler(CausalModel(model), [5])(asked, key, settings)
    plain = ReferenceSampler(model, [5])(asked, key, settings)
    for a, b in zip(ours, plain, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        torch.testing.assert_close(a.logp, b.logp, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.plain_logp, b.plain_logp, atol=1e-5, rtol=0)
        assert bool((a.logp >= a.plain_logp - 1e-5).all())


def test_one_cumulative_sum_is_used_for_a_small_vocabulary() -> None:
    logits, u = normal(5, 100), torch.linspace(0, 0.99, 5)
    for ours, plain in zip(blocked_inverse_cdf(logits, u), inverse_cdf(logits, u), strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize(
    "bad", [{"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": 2.0}, {"stop_strings": ("",)}]
)
def test_settings_out_of_range_are_refused_by_name(bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        SamplingSettings(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"stop_strings": ("x",)}])
def test_training_refuses_another_distribution_than_the_policy(cut: dict[str, object]) -> None:
    SamplingSettings().require_whole()
    with pytest.raises(ConfigError, match=f"sampling.{next(iter(cut))}"):
        SamplingSettings(**cut).require_whole()  # type: ignore[arg-type]
