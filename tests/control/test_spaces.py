from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from gymnasium import spaces

from bridle.control.spaces import (
    action_spec,
    action_spec_from_json,
    observation_spec,
    observation_spec_from_json,
    spec_to_json,
)
from bridle.errors import ModelError


def test_a_bounded_box_is_addressed_in_half_widths_about_its_centre_and_clipped() -> None:
    box = spaces.Box(np.array([1, -10], np.float32), np.array([5, 0], np.float32))
    spec = action_spec(box, "w")
    actions = np.array([[0, 0], [1, -1], [-1, 1], [0.5, 0.2], [7, -9]], dtype=np.float32)
    kept = actions.copy()
    expected = np.array([[3, -5], [5, -10], [1, 0], [4, -4], [5, -10]])
    np.testing.assert_allclose(spec.to_world(actions), expected, rtol=1e-6)
    assert all(box.contains(action) for action in spec.to_world(actions))
    np.testing.assert_array_equal(actions, kept)


def test_an_unbounded_side_leaves_the_worlds_own_units() -> None:
    box = spaces.Box(np.array([-np.inf, 0, -np.inf]), np.array([np.inf, np.inf, 2]), dtype=np.float64)
    spec = action_spec(box, "w")
    world = spec.to_world(np.array([[-50, -1, 9], [50, 7, 1.5]]))
    np.testing.assert_allclose(world, [[-50, 0, 2], [50, 7, 1.5]])


def test_rounding_never_leaves_the_box() -> None:
    high = np.nextafter(np.float32(0.1), np.float32(1))
    box = spaces.Box(-high, high, (1, 2), np.float32)
    spec = action_spec(box, "w")
    for scale in (1.0, 3.0, -1.0, -3.0):
        assert box.contains(spec.to_world(np.full((1, 2), scale, np.float32))[0])


def test_discrete_actions_and_states_start_where_the_space_starts() -> None:
    assert action_spec(spaces.Discrete(3, start=-1), "w").to_world(np.array([0, 2])).tolist() == [-1, 1]
    encoded = observation_spec(spaces.Discrete(3, start=5), "w").encode(np.array([5, 7])).vector
    np.testing.assert_array_equal(encoded, [[1, 0, 0], [0, 0, 1]])
    assert encoded.dtype == torch.float32


def test_encoding_flattens_to_float32_and_never_shares_memory() -> None:
    spec = observation_spec(spaces.Box(-1, 1, (2, 3), np.float32), "w")
    raw = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    encoded = spec.encode(raw).vector
    raw[:] = -1
    np.testing.assert_array_equal(encoded, np.arange(12).reshape(2, 6))


@pytest.mark.parametrize(
    "space", [spaces.Discrete(4, start=2), spaces.Box(-np.inf, np.array([1.0, np.inf], np.float32))]
)
def test_specs_survive_json(space: spaces.Space[np.ndarray]) -> None:
    spec = action_spec(space, "w")
    assert action_spec_from_json(json.loads(json.dumps(spec_to_json(spec), allow_nan=False))) == spec
    seen = observation_spec(space, "w")
    assert observation_spec_from_json(json.loads(json.dumps(spec_to_json(seen), allow_nan=False))) == seen


@pytest.mark.parametrize(
    "damaged", [{}, {"kind": "Nonsense"}, {"kind": "Observations"}, {"kind": "DiscreteActions", "n": "x"}]
)
def test_a_damaged_description_is_refused(damaged: dict[str, object]) -> None:
    with pytest.raises(ModelError):
        observation_spec_from_json(damaged)
    with pytest.raises(ModelError):
        action_spec_from_json(damaged)
