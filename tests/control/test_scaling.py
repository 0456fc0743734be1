from __future__ import annotations

import math
import statistics

import pytest
import torch

from bridle.control.observations import Observations
from bridle.control.scaling import RewardScale, normalise
from bridle.core.moments import Moments

REWARDS = [[1.0, 2.0, 4.0, 8.0, 16.0], [3.0, 0.0, 5.0, -1.0, 2.0]]
ENDED = [[False, True, False, False, True], [False, False, False, False, False]]
MASK = [[True, True, False, True, True], [True, True, True, True, True]]


def returns_so_far(gamma: float) -> list[float]:
    """G_t = γ G_{t−1} + r_t of each environment from the definition, a fresh sum after each end, reset steps left out."""
    seen = []
    for rewards, ended, mask in zip(REWARDS, ENDED, MASK, strict=True):
        episode: list[float] = []
        for reward, end, counts in zip(rewards, ended, mask, strict=True):
            if not counts:
                continue
            episode.append(reward)
            seen.append(sum(gamma**age * r for age, r in enumerate(reversed(episode))))
            if end:
                episode = []
    return seen


@pytest.mark.parametrize("pieces", [1, 5])
def test_rewards_are_divided_by_the_deviation_of_the_discounted_return(pieces: int) -> None:
    rewards, ended, mask = torch.tensor(REWARDS), torch.tensor(ENDED), torch.tensor(MASK)
    scale = RewardScale.fresh(2)
    for part in zip(rewards.chunk(pieces, 1), ended.chunk(pieces, 1), mask.chunk(pieces, 1), strict=True):
        scale = scale.updated(*part, gamma=0.5)
    deviation = statistics.pstdev(returns_so_far(0.5))
    torch.testing.assert_close(scale.apply(rewards), rewards / deviation)
    # the second environment's episode goes on: 2 − ½ + 5/4 + 0/8 + 3/16; the first one's has ended
    assert scale.running.tolist() == [0.0, 2 - 0.5 + 1.25 + 3 / 16]
    assert scale.restarted().running.tolist() == [0.0, 0.0]
    assert scale.restarted().moments is scale.moments


def test_rewards_stay_as_they_are_before_anything_was_seen() -> None:
    rewards = torch.tensor(REWARDS)
    assert torch.equal(RewardScale.fresh(2).apply(rewards), rewards)


def test_observations_are_standardised_feature_by_feature_and_bounded() -> None:
    seen = torch.tensor([[1.0, -10.0], [3.0, -10.0], [2.0, -40.0]])
    moments = Moments.empty((2,)).updated(seen)
    found = normalise(Observations(vector=torch.tensor([[2.0, -20.0], [3.0, -20.0], [1e6, -1e6]])), moments).vector
    expected = torch.tensor([[0.0, 0.0], [1 / math.sqrt(2 / 3), 0.0], [10.0, -10.0]])
    torch.testing.assert_close(found, expected)
    raw = Observations(vector=seen)
    assert normalise(raw, None) is raw
