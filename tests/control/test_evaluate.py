from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from torch import nn

from bridle.control.actor_critic import ActorCritic
from bridle.control.evaluate import EvaluationSettings, Score, evaluate, student_t
from bridle.control.heads import CategoricalHead
from bridle.control.making import WorldSettings, make_world
from bridle.errors import ConfigError
from tests.control.worlds import MODES


def policy() -> ActorCritic:
    return ActorCritic(actor=nn.Linear(2, 2), critic=nn.Linear(2, 1), head=CategoricalHead())


def scored(mode: str, num_envs: int, episodes: int) -> Score:
    settings = WorldSettings(num_envs=num_envs, autoreset=mode, vectorization="sync")
    world = make_world("BridleTest/Counter-v0", settings)
    score = evaluate(world, policy(), None, episodes=episodes, deterministic=False, seed=0)
    world.close()
    return score


@pytest.mark.parametrize("num_envs", [1, 3, 8])
def test_every_autoreset_mode_scores_the_same_whole_episodes(num_envs: int) -> None:
    reference = scored("same_step", num_envs, 7)
    assert len(reference.returns) == 7
    for mode in MODES:
        assert scored(mode, num_envs, 7) == reference
    for total, length in zip(reference.returns, reference.lengths, strict=True):
        number = (total - length * (length + 1) / 8) / length
        assert length == 1 + number % 5


def test_each_environment_plays_its_share_however_short_its_episodes() -> None:
    # 40 environments' first episodes: the first 40 to finish would be the shortest ones of many
    score = scored("same_step", 40, 40)
    assert statistics.mean(score.lengths) == pytest.approx(3, abs=5 * math.sqrt(2 / 40))
    assert {1, 2, 3, 4, 5} == set(score.lengths)


def test_a_world_without_an_end_is_cut() -> None:
    world = make_world("BridleTest/NeverCut-v0", WorldSettings(num_envs=2))
    small = ActorCritic(actor=nn.Linear(1, 2), critic=nn.Linear(1, 1), head=CategoricalHead())
    score = evaluate(world, small, None, episodes=5, deterministic=True, seed=0, max_steps=30)
    assert score.returns == (30.0,) * 5
    world.close()


def test_mean_deviation_and_interval_of_known_numbers() -> None:
    score = Score(returns=(2.0, 4.0, 4.0, 4.0, 6.0), lengths=(1, 1, 1, 1, 6))
    assert score.mean == 4
    assert score.deviation == pytest.approx(math.sqrt(2))
    # t_{0.975, 4} = 2.776445
    assert score.half_width == pytest.approx(2.776445 * math.sqrt(2) / math.sqrt(5), rel=0.01)
    metrics = score.metrics("final/sampled")
    assert metrics["final/sampled/return_ci95"] == score.half_width
    assert metrics["final/sampled/length_mean"] == 2


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(4, 2.776445), (9, 2.262157), (19, 2.093024), (30, 2.042272), (99, 1.984217)]
)
def test_students_quantile_against_the_printed_table(degrees: int, quantile: float) -> None:
    assert student_t(degrees) == pytest.approx(quantile, rel=0.01 if degrees < 9 else 2e-4)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 10))
    scores = [Score(returns=tuple(row), lengths=(1,) * 10) for row in draws.tolist()]
    covered = statistics.mean(abs(score.mean) <= score.half_width for score in scores)
    assert covered == pytest.approx(0.95, abs=5 * math.sqrt(0.95 * 0.05 / 4000))


def test_settings_that_say_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="episodes=2"):
        EvaluationSettings(episodes=2)
    with pytest.raises(ConfigError, match="every=-1"):
        EvaluationSettings(every=-1)
