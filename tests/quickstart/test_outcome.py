"""The table can say all three things: better, worse, and that nothing is shown."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from bridle.quickstart.outcome import Answered, Outcome, show
from bridle.quickstart.verdict import Verdict, paired_difference
from bridle.random import generator

N = 200
NOISE = generator(0, "test.outcome").normal(size=N)


def answered(gold: np.ndarray) -> Answered:
    values = tuple(float(value) for value in gold)
    return Answered(
        prompts=tuple(f"prompt {i}" for i in range(N)),
        answers=tuple(f"answer {i}" for i in range(N)),
        rewards=values,
        gold=values,
        kl=(1.0,) * N,
        lengths=(20,) * N,
        entropy=0.5,
        eos_share=1.0,
    )


def outcome(shift: float) -> Outcome:
    base = np.linspace(0, 0.5, N)
    return Outcome(sft=answered(base), ppo=answered(base + shift + 0.1 * (NOISE - NOISE.mean())), seed=0)


@pytest.mark.parametrize(
    ("shift", "verdict", "said"),
    [
        (0.1, Verdict.BETTER, "PPO is better than SFT by the gold score: +0.100 ["),
        (-0.1, Verdict.WORSE, "PPO is worse than SFT by the gold score: -0.100 ["),
        (0.0, Verdict.NO_DIFFERENCE, "No difference between PPO and SFT is shown by the gold score: "),
    ],
)
def test_all_three_verdicts(shift: float, verdict: Verdict, said: str) -> None:
    found = outcome(shift)
    assert found.difference("gold").verdict is verdict
    assert found.sentence().startswith(said)
    assert found.sentence().endswith("(paired, 95 %, 200 held-out prompts).")
    assert found.summary()["verdict"] == verdict.value
    buffer = io.StringIO()
    show(Console(file=buffer, width=160), found)
    text = buffer.getvalue()
    assert found.sentence() in text
    assert "answer 2" in text
    assert "answer 3" not in text


def test_a_mean_that_is_zero_but_for_rounding_has_no_sign() -> None:
    found = outcome(0.1)
    buffer = io.StringIO()
    show(Console(file=buffer, width=160), replace(found, sft=replace(found.sft, kl=(-1e-17,) * N)))
    (line,) = [line for line in buffer.getvalue().splitlines() if "KL to SFT" in line]
    assert [cell.strip() for cell in line.split("│")[2:4]] == ["0.000", "1.000"]


def test_the_interval_is_the_normal_one_where_that_holds() -> None:
    """For a mean over many pairs the bootstrap interval is mean ± 1.96 s/√n up to resampling noise."""
    before, after = np.zeros(N), 0.3 + NOISE
    found = paired_difference(before.tolist(), after.tolist(), seed=0)
    half = 1.96 * float(np.std(after, ddof=1)) / math.sqrt(N)
    assert found.mean == pytest.approx(float(after.mean()))
    assert found.low == pytest.approx(found.mean - half, abs=0.08 * half)
    assert found.high == pytest.approx(found.mean + half, abs=0.08 * half)
    assert found.count == N


def test_pairing_counts() -> None:
    """A small gain on every prompt is shown however much the prompts differ among each other."""
    before = 100 * NOISE
    assert paired_difference(before.tolist(), (before + 0.01).tolist(), seed=0).verdict is Verdict.BETTER


def test_equal_answers_show_nothing() -> None:
    found = paired_difference([0.2, 0.9, 0.4], [0.2, 0.9, 0.4], seed=0)
    assert (found.low, found.mean, found.high) == (0, 0, 0)
    assert found.verdict is Verdict.NO_DIFFERENCE


def test_what_cannot_be_paired_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2 pairs"):
        paired_difference([1.0], [1.0], seed=0)
    with pytest.raises(ValueError, match="at least 2 pairs"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0], seed=0)
    good = outcome(0.0)
    with pytest.raises(ValueError, match="different prompts"):
        replace(good, ppo=replace(good.ppo, prompts=tuple(reversed(good.ppo.prompts))))
