from __future__ import annotations

import warnings
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from bridle.control.environments import World
from bridle.control.making import WorldSettings, make_world
from bridle.errors import ConfigError, NonFiniteWorld, WorldError
from tests.control.worlds import MODES, Counter, Worn

Transition = tuple[tuple[float, ...], float, tuple[float, ...], bool, bool]


def transitions(mode: str, *, num_envs: int, steps: int, vectorization: str = "sync") -> list[list[Transition]]:
    """Every valid transition of each environment, in order."""
    world = make_world(
        "BridleTest/Counter-v0",
        WorldSettings(num_envs=num_envs, autoreset=mode, vectorization=vectorization),
    )
    seen: list[list[Transition]] = [[] for _ in range(num_envs)]
    observations = world.reset(seed=7)
    for _ in range(steps):
        taken = world.step(np.zeros(num_envs, dtype=np.int64))
        for i in np.flatnonzero(taken.acted):
            seen[i].append(
                (
                    tuple(observations.vector[i].tolist()),
                    float(taken.rewards[i]),
                    tuple(taken.successors.vector[i].tolist()),
                    bool(taken.terminated[i]),
                    bool(taken.truncated[i]),
                )
            )
        observations = taken.observations
    world.close()
    return seen


@pytest.mark.parametrize(
    "given",
    ["sync", "async", lambda: SyncVectorEnv([Worn] * 2, autoreset_mode=AutoresetMode.SAME_STEP)],
    ids=["sync", "async", "function"],
)
def test_seed_and_actions_determine_what_follows_also_where_an_environment_keeps_its_past(given: Any) -> None:
    settings = WorldSettings(num_envs=2, vectorization=given) if isinstance(given, str) else WorldSettings()
    world = make_world("BridleTest/Worn-v0" if isinstance(given, str) else given, settings)
    seen = []
    for _ in range(3):
        world.reset(seed=7)
        seen.append([world.step(np.zeros(2, dtype=np.int64)).rewards.tolist() for _ in range(9)])
    world.close()
    assert seen[0] == seen[1] == seen[2]


def test_a_function_that_hands_out_the_same_environments_again_keeps_them() -> None:
    envs = SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    world = make_world(lambda: envs, WorldSettings())
    for _ in range(2):
        world.reset(seed=7)
        assert world.step(np.zeros(2, dtype=np.int64)).acted.all()
    world.close()


@pytest.mark.parametrize("num_envs", [1, 3])
@pytest.mark.parametrize("mode", MODES)
def test_every_autoreset_mode_gives_the_transitions_that_a_plain_loop_gives(mode: str, num_envs: int) -> None:
    for i, seen in enumerate(transitions(mode, num_envs=num_envs, steps=60)):
        env = gymnasium.make("BridleTest/Counter-v0")
        state, _ = env.reset(seed=7 + i)
        expected: list[Transition] = []
        for _ in seen:
            successor, reward, terminated, truncated, _ = env.step(0)
            expected.append((tuple(state), reward, tuple(successor), terminated, truncated))
            state = env.reset()[0] if terminated or truncated else successor
        assert seen == expected
        assert any(t[3] for t in seen)
        assert any(t[4] for t in seen)


def test_only_next_step_loses_steps_and_never_with_one_environment() -> None:
    for mode in MODES:
        assert [len(seen) for seen in transitions(mode, num_envs=1, steps=60)] == [60]
        counts = [len(seen) for seen in transitions(mode, num_envs=3, steps=60)]
        if mode == "next_step":
            assert all(30 <= count < 60 for count in counts)
        else:
            assert counts == [60, 60, 60]


def test_processes_give_the_same_transitions() -> None:
    with warnings.catch_warnings():
        # from CPython 3.12 on, multiprocessing warns of any fork while threads run; torch has some
        warnings.simplefilter("ignore", DeprecationWarning)
        alone = transitions("same_step", num_envs=2, steps=20, vectorization="async")
    assert alone == transitions("same_step", num_envs=2, steps=20)


def test_the_environments_own_vector_form_is_taken_by_default() -> None:
    world = make_world("CartPole-v1", WorldSettings(num_envs=2))
    assert type(world._envs.unwrapped).__name__ == "CartPoleVectorEnv"
    world.close()
    world = make_world("CartPole-v1", WorldSettings(num_envs=2, autoreset="disabled"))
    assert isinstance(world._envs.unwrapped, SyncVectorEnv)
    world.close()


def test_cartpoles_own_vector_form_keeps_the_terminal_observation() -> None:
    world = make_world("CartPole-v1", WorldSettings(num_envs=4))
    world.reset(seed=0)
    ended = 0
    for _ in range(100):
        taken = world.step(np.ones(4, dtype=np.int64))
        for i in np.flatnonzero(taken.terminated):
            assert abs(taken.successors.vector[i][0]) > 2.4 or abs(taken.successors.vector[i][2]) > 12 * np.pi / 180
            ended += 1
        assert (taken.rewards[~taken.acted] == 0).all()
    assert ended > 20
    world.close()


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("cartpole-v1", "did you mean CartPole-v1"),
        ("CartPole", "no such environment"),
        ("no_such_module:X-v0", "no_such_module"),
        ("BridleTest/TextSeen-v0", "observations of Text are not supported"),
        ("BridleTest/TextInside-v0", r"observations of Text \(at an observation\['a'\]\[1\]\) are not supported"),
        ("BridleTest/Nothing-v0", "nothing to see"),
        ("BridleTest/DictActions-v0", "actions of Dict are not supported"),
        ("BridleTest/WholeBox-v0", r"actions of Box\(int64\) are not supported"),
    ],
)
def test_a_world_that_cannot_serve_is_refused_in_one_line(env: str, words: str) -> None:
    with pytest.raises(WorldError, match=words) as refusal:
        make_world(env, WorldSettings(num_envs=1))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ("BridleTest/Raises-v0", "step of environment 0, after action 0, raised KeyError: .*battery is empty"),
        ("BridleTest/NaN-v0", "environment 0 showed an observation that is not finite"),
        ("BridleTest/Infinite-v0", "the reward inf of environment 0, after action 0, is not a finite number"),
    ],
)
def test_a_world_that_goes_wrong_is_told_in_one_line(env: str, words: str) -> None:
    world = make_world(env, WorldSettings(num_envs=1))
    world.reset(seed=0)
    world.step(np.zeros(1, dtype=np.int64))
    world.step(np.zeros(1, dtype=np.int64))
    with pytest.raises(WorldError, match=words) as refusal:
        world.step(np.zeros(1, dtype=np.int64))
    assert "\n" not in str(refusal.value)
    world.close()


class Lopsided(Counter):
    """Ends at its second step, and shows what is not finite there if it is not ``sound``."""

    def __init__(self, sound: bool) -> None:
        super().__init__()
        self.sound = sound

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        shown, reward, *_ = super().step(action)
        over = self.t == (3 if self.sound else 2)
        return (shown if self.sound or not over else np.full_like(shown, np.nan)), reward, over, False, {}


@pytest.mark.parametrize("mode", MODES)
def test_the_environment_whose_last_observation_is_not_finite_is_named(mode: str) -> None:
    """Also where another one goes on: in SAME_STEP what ended shows its last observation apart."""
    resets = AutoresetMode[mode.upper()]
    envs = SyncVectorEnv([lambda i=i: Lopsided(sound=i != 2) for i in range(3)], autoreset_mode=resets)
    world = World("here", envs)
    world.reset(0)
    world.step(np.zeros(3, np.int64))
    with pytest.raises(NonFiniteWorld, match="environment 2 showed an observation that is not finite") as found:
        world.step(np.zeros(3, np.int64))
    assert found.value.rows == (2,)
    assert isinstance(found.value.given, torch.Tensor)
    assert torch.isfinite(found.value.given).all(dim=1).tolist() == [True, True, False]


def test_a_world_that_does_not_say_how_it_resets_is_refused() -> None:
    envs = SyncVectorEnv([lambda: gymnasium.make("CartPole-v1")])
    del envs.metadata["autoreset_mode"]
    with pytest.raises(WorldError, match="autoreset_mode"):
        World("mine", envs)
    envs.close()


def test_an_autoreset_mode_is_refused_where_it_cannot_be_chosen() -> None:
    with pytest.raises(ConfigError, match="autoreset='disabled'"):
        WorldSettings(vectorization="vector_entry_point", autoreset="disabled")
    with pytest.raises(ConfigError, match="num_envs=0"):
        WorldSettings(num_envs=0)
