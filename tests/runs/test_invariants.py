"""Each invariant is crossed by its own disease and by nothing else; a run that is taken up again says nothing twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridle.runs.invariants import INVARIANTS, Watch, table

Record = dict[str, float | str | None]

HEALTHY: dict[str, Record] = {
    "ppo": {
        "first_ratio_gap_mean": 1e-6,
        "sampler_gap_mean": 1e-6,
        "eos_share": 0.9,
        "length": 20.0,
        "exact_kl": 3.0,
        "sampled_kl": 2.9,
        "explained_variance": 0.5,
        "policy_entropy": 1.0,
        "entropy": 1.0,
        "grad_norm/actor": 0.7,
        "grad_norm/critic": 0.3,
        "score_length_correlation": 0.4,
    },
    "control": {
        "first_ratio_gap_mean": 1e-7,
        "sampler_gap_mean": 1e-7,
        "explained_variance": 0.8,
        "entropy": 0.4,
        "grad_norm/policy": 0.6,
    },
    "sft": {"loss": 2.0, "grad_norm": 1.0},
    "reward": {"phase": "final", "loss": 0.6, "grad_norm": 5.0},
}

DISEASES: list[tuple[str, str, Record]] = [
    ("ppo", "first_ratio", {"first_ratio_gap_mean": 2e-4}),
    ("ppo", "sampler_agreement", {"sampler_gap_mean": 2e-5}),
    ("ppo", "eos_rate", {"eos_share": 1.0, "length": 1.2}),
    ("ppo", "cut_by_length", {"eos_share": 0.3}),
    ("ppo", "kl_sign", {"exact_kl": -0.01}),
    ("ppo", "kl_sign", {"sampled_kl": -0.6}),
    ("ppo", "explained_variance", {"explained_variance": -0.8}),
    ("ppo", "dead_critic", {"explained_variance": 3e-8}),
    ("ppo", "dead_critic", {"grad_norm/critic": 0.0}),
    ("ppo", "entropy_collapse", {"policy_entropy": 0.02}),
    ("ppo", "gradient_spike", {"grad_norm/actor": 40.0}),
    ("ppo", "gradient_zero", {"grad_norm/actor": 0.0}),
    ("ppo", "reward_length", {"score_length_correlation": -0.97}),
    ("control", "sampler_agreement", {"sampler_gap_mean": 2e-3}),
    ("control", "explained_variance", {"explained_variance": -0.8}),
    ("control", "dead_critic", {"explained_variance": 0.0}),
    ("control", "entropy_collapse", {"entropy": 0.001}),
    ("control", "gradient_spike", {"grad_norm/policy": 900.0}),
    ("control", "gradient_zero", {"grad_norm/policy": 0.0}),
    ("sft", "gradient_spike", {"grad_norm": 50.0}),
    ("sft", "gradient_zero", {"grad_norm": 0.0}),
    ("reward", "gradient_spike", {"grad_norm": 500.0}),
    ("reward", "gradient_zero", {"grad_norm": 0.0}),
]


def records(
    job: str, sick: Record, *, begins: int = 20, ends: int = 60, last: int = 90
) -> Iterator[tuple[int, Record]]:
    """A run that is healthy, falls ill, and recovers; its numbers tremble by a few percent."""
    for step in range(1, last + 1):
        tremble = 1 + 0.05 * math.sin(step)
        own = {n: v * tremble if isinstance(v, float) else v for n, v in HEALTHY[job].items()}
        yield step, own | (sick if begins <= step < ends else {})


def crossings(job: str, rows: Iterator[tuple[int, Record]] | list[tuple[int, Record]]) -> list[tuple[str, int, bool]]:
    watch = Watch(job)
    return [(c.invariant.name, c.step, c.crossed) for step, row in rows for c in watch.see(step, row)]


@pytest.mark.parametrize("job", HEALTHY)
def test_a_healthy_run_crosses_nothing(job: str) -> None:
    assert crossings(job, records(job, {})) == []


@pytest.mark.parametrize(("job", "name", "sick"), DISEASES)
def test_each_disease_crosses_its_own_invariant_once_and_comes_back_once(job: str, name: str, sick: Record) -> None:
    found = crossings(job, records(job, sick))
    assert [(n, crossed) for n, _, crossed in found] == [(name, True), (name, False)]
    (_, began, _), (_, over, _) = found
    assert 20 <= began <= 30
    # a gradient that stays at its new size becomes the median itself
    assert 60 <= over <= 80 or name == "gradient_spike"


def test_every_invariant_is_held_against_a_disease() -> None:
    assert {name for _, name, _ in DISEASES} | {"reward_against_gold"} == {invariant.name for invariant in INVARIANTS}


def evaluation(score: float, gold: float, width: float = 0.1) -> Record:
    names = {"evaluation/score": score, "evaluation/score/gold/true": gold}
    return names | {f"{name}_ci95": width for name in names}


@pytest.mark.parametrize(
    ("said", "crossed"),
    [
        ([(0.0, 0.5), (1.0, 0.9), (2.0, 0.2)], [2]),  # gold rose, then fell while the score went on rising
        ([(0.0, 0.5), (1.0, 0.9), (2.0, 0.85)], []),  # within the intervals
        ([(0.0, 0.5), (1.0, 0.9), (0.9, 0.2)], []),  # both fell: another disease
        ([(0.0, 0.5), (1.0, 0.2)], [1]),
    ],
)
def test_reward_and_gold_that_move_apart_are_told(said: list[tuple[float, float]], crossed: list[int]) -> None:
    rows = [(step, evaluation(*pair)) for step, pair in enumerate(said)]
    assert crossings("ppo", rows) == [("reward_against_gold", step, True) for step in crossed]


def test_a_watch_that_read_the_records_anew_goes_on_as_the_one_that_never_stopped() -> None:
    rows = list(records("ppo", {"eos_share": 0.1, "grad_norm/actor": 50.0}))
    whole = crossings("ppo", rows)
    assert len(whole) >= 3
    for cut in range(0, 90, 7):
        watch = Watch("ppo")
        for step, row in rows[:cut]:
            watch.see(step, row)
        after = [(c.invariant.name, c.step, c.crossed) for step, row in rows[cut:] for c in watch.see(step, row)]
        assert after == [found for found in whole if found[1] > cut]


def test_the_actor_may_stand_still_while_the_critic_warms_up_and_no_longer() -> None:
    watch = Watch("ppo", warmup=10)
    rows = [(step, HEALTHY["ppo"] | {"grad_norm/actor": 0.0}) for step in range(1, 20)]
    found = [(c.invariant.name, c.step) for step, row in rows for c in watch.see(step, row)]
    assert found == [("gradient_zero", 13)]


def test_half_precision_is_held_to_its_own_bounds() -> None:
    row = HEALTHY["ppo"] | {"sampler_gap_mean": 0.02, "first_ratio_gap_mean": 0.01}
    assert Watch("ppo", dtype="bfloat16").see(1, row) == []
    assert len(Watch("ppo").see(1, row)) == 2


def test_the_message_holds_name_number_bound_and_causes_in_one_line() -> None:
    (found,) = Watch("ppo").see(7, {"sampler_gap_mean": 0.5})
    assert "step 7: sampler_agreement is out of bounds at 0.5" in found.text
    assert found.invariant.bound in found.text
    assert found.invariant.causes in found.text
    assert "\n" not in found.text


def test_the_page_holds_the_table_of_the_code() -> None:
    page = (Path(__file__).parents[2] / "docs" / "INVARIANTS.md").read_text()
    assert table() in page, f"docs/INVARIANTS.md must hold:\n{table()}"
