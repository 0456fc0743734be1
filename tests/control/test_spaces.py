from __future__ import annotations

import json
from typing import Any

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
from bridle.errors import ModelError, WorldError


def image(*shape: int) -> spaces.Box:
    return spaces.Box(0, 255, shape, np.uint8)


EVERYTHING = spaces.Dict(
    {
        "inner": spaces.Tuple((spaces.Box(-1, 1, (2, 1)), spaces.Dict({"eye": image(40, 36, 3)}))),
        "door": spaces.Discrete(3, start=-1),
        "bits": spaces.MultiBinary((2, 2)),
        "digits": spaces.MultiDiscrete([2, 3], start=[0, 5]),
        "action_mask": spaces.MultiBinary(4),
    }
)


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


@pytest.mark.parametrize(
    ("space", "own", "world"),
    [
        (spaces.MultiDiscrete([3, 2, 2], start=[1, 0, -5]), [2, 0, 1], [3, 0, -4]),
        (spaces.MultiDiscrete([[3, 2], [2, 2]]), [2, 0, 1, 1], [[2, 0], [1, 1]]),
        (spaces.MultiBinary(3), [1, 0, 1], [1, 0, 1]),
        (spaces.MultiBinary((2, 2)), [1, 0, 0, 1], [[1, 0], [0, 1]]),
    ],
)
def test_choices_and_switches_take_the_worlds_shape(space: spaces.Space[Any], own: list[int], world: list[Any]) -> None:
    (found,) = action_spec(space, "w").to_world(np.array([own]))
    assert found.tolist() == world
    assert space.contains(found)


def test_encoding_flattens_to_float32_and_never_shares_memory() -> None:
    spec = observation_spec(spaces.Box(-1, 1, (2, 3), np.float32), "w")
    raw = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    encoded = spec.encode(raw).vector
    raw[:] = -1
    np.testing.assert_array_equal(encoded, np.arange(12).reshape(2, 6))


@pytest.mark.parametrize(
    ("shape", "size", "axes"),
    [
        ((84, 80), (1, 84, 80), "hw"),
        ((84, 80, 3), (3, 84, 80), "hwc"),
        ((3, 84, 80), (3, 84, 80), "chw"),
        ((4, 84, 84), (4, 84, 84), "chw"),
        ((36, 40, 36), (36, 36, 40), "hwc"),
        ((4, 84, 80, 3), (12, 84, 80), "fhwc"),
        ((4, 3, 84, 80), (12, 84, 80), "fchw"),
    ],
)
def test_images_come_as_bytes_with_channels_first(shape: tuple[int, ...], size: tuple[int, ...], axes: str) -> None:
    spec = observation_spec(image(*shape), "w")
    raw = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    seen = spec.encode(raw)
    assert seen.vector.shape == (2, 0)
    (found,) = seen.images
    assert found.dtype == torch.uint8
    assert tuple(found.shape) == (2, *size)
    assert spec.images[0].size == size
    for at in np.random.default_rng(1).integers(0, shape, (50, len(shape))):
        place = dict(zip(axes, at.tolist(), strict=True))
        channels = shape[axes.index("c")] if "c" in axes else 1
        channel = place.get("f", 0) * channels + place.get("c", 0)
        assert int(found[1, channel, place["h"], place["w"]]) == raw[1, *at]
    raw[:] = 0
    assert bool(found.any())


@pytest.mark.parametrize("space", [image(35, 84), image(7, 7, 3), image(128), spaces.Box(0, 1, (84, 84, 3))])
def test_what_is_too_small_or_not_made_of_bytes_is_numbers(space: spaces.Box) -> None:
    spec = observation_spec(space, "w")
    assert spec.images == ()
    assert spec.width == np.prod(space.shape)


def test_the_parts_of_a_nested_space_stand_side_by_side() -> None:
    spec = observation_spec(EVERYTHING, "w")
    eye = np.zeros((40, 36, 3), np.uint8)
    eye[39, 0, 2] = 200
    one = {
        "inner": (np.array([[0.5], [-0.5]], np.float32), {"eye": eye}),
        "door": np.int64(1),
        "bits": np.array([[0, 1], [1, 1]], np.int8),
        "digits": np.array([1, 5]),
        "action_mask": np.array([1, 0, 0, 1], np.int8),
    }
    assert EVERYTHING.contains(one)
    seen = spec.encode_each([one, one])
    # Gymnasium orders a Dict by its keys: bits, digits, door, inner
    expected = [*(0, 1, 1, 1), *(0, 1), *(1, 0, 0), *(0, 0, 1), *(0.5, -0.5)]
    assert seen.vector.tolist() == [expected] * 2
    assert spec.width == len(expected)
    assert spec.measured.tolist() == [False] * 12 + [True] * 2
    assert seen.mask is not None
    assert seen.mask.tolist() == [[True, False, False, True]] * 2
    assert seen.images[0].nonzero().tolist() == [[0, 2, 39, 0], [1, 2, 39, 0]]
    batch = {
        "inner": (np.stack([one["inner"][0]] * 2), {"eye": np.stack([eye] * 2)}),
        **{key: np.stack([one[key]] * 2) for key in ("door", "bits", "digits", "action_mask")},
    }
    again = spec.encode(batch)
    assert torch.equal(again.vector, seen.vector)
    assert torch.equal(again.images[0], seen.images[0])


def test_an_action_mask_deeper_inside_is_no_mask() -> None:
    spec = observation_spec(spaces.Dict({"a": spaces.Dict({"action_mask": spaces.MultiBinary(2)})}), "w")
    assert spec.mask is None
    assert spec.width == 2


def test_a_number_outside_its_space_is_told() -> None:
    with pytest.raises(WorldError, match="option 3"):
        observation_spec(spaces.Discrete(3), "w").encode(np.array([0, 3]))
    with pytest.raises(WorldError, match="option -1"):
        observation_spec(spaces.MultiDiscrete([2, 2]), "w").encode(np.array([[0, -1]]))


@pytest.mark.parametrize(
    "wrong", [{}, {"door": 0}, 5, None, {**dict.fromkeys(EVERYTHING.keys(), 0), "bits": [[1], [2, 3]]}]
)
def test_a_single_observation_of_another_shape_is_told(wrong: Any) -> None:
    with pytest.raises(ModelError) as refusal:
        observation_spec(EVERYTHING, "w").encode_each([wrong])
    assert "\n" not in str(refusal.value)


SEEN = [
    spaces.Discrete(4, start=2),
    spaces.Box(-np.inf, np.array([1.0, np.inf], np.float32)),
    spaces.MultiDiscrete([[3, 2], [2, 2]], start=[[1, 0], [0, 0]]),
    spaces.MultiBinary((2, 3)),
    image(4, 84, 84),
    EVERYTHING,
]


@pytest.mark.parametrize("space", SEEN)
def test_observation_specs_survive_json(space: spaces.Space[Any]) -> None:
    spec = observation_spec(space, "w")
    assert observation_spec_from_json(json.loads(json.dumps(spec_to_json(spec), allow_nan=False))) == spec


@pytest.mark.parametrize("space", SEEN[:4])
def test_action_specs_survive_json(space: spaces.Space[Any]) -> None:
    spec = action_spec(space, "w")
    assert action_spec_from_json(json.loads(json.dumps(spec_to_json(spec), allow_nan=False))) == spec


def parts(*parts: Any) -> dict[str, Any]:
    return {"kind": "Observations", "parts": list(parts)}


@pytest.mark.parametrize(
    "damaged",
    [
        {},
        {"kind": "Nonsense"},
        {"kind": ["Observations"]},
        {"kind": "Observations"},
        {"kind": "Observations", "parts": 3},
        parts(),
        parts({"kind": "MaskPart", "path": ["action_mask"], "shape": [3]}),
        parts(None),
        parts({"kind": "Nonsense", "path": []}),
        parts({"kind": "BoxPart", "path": [], "shape": [-1]}),
        parts({"kind": "BoxPart", "path": [], "shape": [1e400]}),
        parts({"kind": "DiscretePart", "path": [], "n": "x", "start": 0}),
        parts({"kind": "ImagePart", "path": [], "shape": [84, 84], "layout": "chw"}),
        parts({"kind": "ImagePart", "path": [], "shape": [84, 84], "layout": "wh"}),
        parts({"kind": "ImagePart", "path": [], "shape": [8, 84], "layout": "hw"}),
        {"kind": "DiscreteActions", "n": "x"},
        {"kind": "DiscreteActions", "n": 0, "start": 0},
        {"kind": "DiscreteActions", "n": 2, "start": 2**63},
        {"kind": "MultiDiscreteActions", "nvec": [2, 0], "start": [0, 0], "shape": [2], "dtype": "int64"},
        {"kind": "MultiDiscreteActions", "nvec": [2, 2], "start": [0], "shape": [2], "dtype": "int64"},
        {"kind": "MultiDiscreteActions", "nvec": [2, 2], "start": [0, 0], "shape": [3], "dtype": "int64"},
        {"kind": "MultiBinaryActions", "shape": [2], "dtype": "nonsense"},
        {"kind": "BoxActions", "low": [0], "high": [1, 2], "shape": [1], "dtype": "float32"},
    ],
)
def test_a_damaged_description_is_refused(damaged: dict[str, Any]) -> None:
    for read in (observation_spec_from_json, action_spec_from_json):
        with pytest.raises(ModelError) as refusal:
            read(damaged)
        assert "\n" not in str(refusal.value)
