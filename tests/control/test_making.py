"""How environments are made: every form gives the same facts, and says which form it is."""

from __future__ import annotations

import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.wrappers import TransformReward

from bridle.control.environments import World
from bridle.control.making import WorldSettings, make_world
from bridle.errors import ConfigError, WorldError
from tests.control import worlds

worlds.register()

SWIG = "ignore:builtin type:DeprecationWarning"  # Box2D's wrapper code, at its import


class Doomed(worlds.Endless):
    """Its process ends at the second step, as it is told to."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.t = how, 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        if self.t == 2 and self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.t == 2 and self.how == "raise":
            raise RuntimeError("the\nbattery is empty")
        return super().step(action)


class Lives(worlds.Endless):
    """Three lives, one lost at every second step; the game is over with the last one."""

    def reset(self, **arguments: Any) -> tuple[np.ndarray, dict[str, Any]]:
        self.t = 0
        return super().reset(**arguments)[0], {"lives": 3}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.ones(1, np.float32), 1.0, self.t == 6, False, {"lives": 3 - self.t // 2}


if "BridleTest/Doomed-v0" not in gymnasium.registry:
    gymnasium.register("BridleTest/Doomed-v0", entry_point=Doomed, disable_env_checker=True)


def doubled(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return TransformReward(env, lambda reward: 2 * reward)


def one_more(env: gymnasium.Env[Any, Any]) -> gymnasium.Env[Any, Any]:
    return TransformReward(env, lambda reward: reward + 1)


def rewards(env: Any, settings: WorldSettings, steps: int = 3) -> list[float]:
    world = make_world(env, settings)
    world.reset(0)
    found = [float(world.step(np.zeros(world.num_envs, np.int64)).rewards[0]) for _ in range(steps)]
    world.close()
    return found


@pytest.mark.parametrize(
    ("env", "settings", "form"),
    [
        ("CartPole-v1", WorldSettings(num_envs=2), "in its own vector form"),
        ("CartPole-v1", WorldSettings(num_envs=2, vectorization="sync"), "in one process"),
        ("CartPole-v1", WorldSettings(num_envs=2, autoreset="disabled"), "in one process"),
        ("CartPole-v1", WorldSettings(num_envs=2, wrappers=(f"{__name__}:doubled",)), "in one process"),
        ("Pendulum-v1", WorldSettings(num_envs=2), "in one process"),
        ("Pendulum-v1", WorldSettings(num_envs=2, vectorization="async"), "in a process each"),
    ],
)
def test_the_world_says_which_form_it_took(env: str, settings: WorldSettings, form: str) -> None:
    world = make_world(env, settings)
    world.close()
    assert world.form == form


def test_arguments_reach_the_environment_as_json_or_as_text() -> None:
    settings = WorldSettings(kwargs=("g=3.5", "flags=[1, true]", "name=any text", "nothing=null", "odd=NaN"))
    assert settings.arguments == {"g": 3.5, "flags": [1, True], "name": "any text", "nothing": None, "odd": "NaN"}
    played = []
    for kwargs in ((), ("g=10",), ("g=0",)):
        world = make_world("Pendulum-v1", WorldSettings(num_envs=1, kwargs=kwargs))
        played.append(random_play(world, 5)[1])
        world.close()
    assert played[0] == played[1] != played[2]  # 10 m/s² is the environment's own


def test_wrappers_are_applied_in_order() -> None:
    both = (f"{__name__}:doubled", f"{__name__}:one_more")
    assert rewards("CartPole-v1", WorldSettings(num_envs=1, wrappers=both)) == [3.0] * 3
    assert rewards("CartPole-v1", WorldSettings(num_envs=1, wrappers=both[::-1])) == [4.0] * 3


@pytest.mark.parametrize("vectorization", ["auto", "sync"])
def test_a_limit_cuts_and_does_not_terminate(vectorization: Any) -> None:
    world = make_world("CartPole-v1", WorldSettings(num_envs=2, max_episode_steps=3, vectorization=vectorization))
    world.reset(0)
    taken = [world.step(np.array([0, 1])) for _ in range(3)]
    world.close()
    assert [step.truncated.tolist() for step in taken] == [[False] * 2, [False] * 2, [True] * 2]
    assert not any(step.terminated.any() for step in taken)


@pytest.mark.parametrize(
    ("how", "form", "words"),
    [
        ("kill", "async", "the process of environment 0, after action 0, died, killed by signal 9"),
        ("raise", "async", "of environment 0, after action 0, raised RuntimeError: the battery is empty"),
        ("raise", "sync", "of environment 0, after action 0, raised RuntimeError: the battery is empty"),
    ],
)
def test_an_environment_that_dies_is_named_in_one_line_and_all_are_closed(how: str, form: Any, words: str) -> None:
    settings = WorldSettings(num_envs=2, vectorization=form, kwargs=(f"how={how}",))
    world = make_world("BridleTest/Doomed-v0", settings)
    world.reset(0)
    world.step(np.zeros(2, np.int64))
    with pytest.raises(WorldError, match=f"BridleTest/Doomed-v0: step.*{words}") as found:
        world.step(np.zeros(2, np.int64))
    assert "\n" not in str(found.value)
    world.close()


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_lost_life_terminates_without_ending_the_game(mode: AutoresetMode) -> None:
    world = World("lives", SyncVectorEnv([Lives] * 2, autoreset_mode=mode), life_loss=True)
    world.reset(0)
    taken = [step for step in (world.step(np.zeros(2, np.int64)) for _ in range(12)) if step.acted.all()]
    world.close()
    assert len(taken) == 12
    assert [bool(step.terminated[0]) for step in taken] == [False, True] * 6
    assert [bool(step.over[0]) for step in taken] == ([False] * 5 + [True]) * 2


class Reckless(Lives):
    """A life is lost at every step, the first one included."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        return np.ones(1, np.float32), 1.0, self.t == 3, False, {"lives": 3 - self.t}


@pytest.mark.parametrize("others", [Reckless, Lives])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_a_life_lost_at_a_games_first_step_counts(mode: AutoresetMode, others: type[Lives]) -> None:
    world = World("lives", SyncVectorEnv([Reckless, others], autoreset_mode=mode), life_loss=True)
    world.reset(0)
    taken = [step for step in (world.step(np.zeros(2, np.int64)) for _ in range(12)) if step.acted[0]]
    world.close()
    assert all(bool(step.terminated[0]) for step in taken)
    assert [bool(step.over[0]) for step in taken[:9]] == [False, False, True] * 3


def test_lives_that_are_not_told_are_asked_for() -> None:
    world = World("endless", SyncVectorEnv([worlds.Endless]), life_loss=True)
    with pytest.raises(WorldError, match="says nothing of lives"):
        world.reset(0)


@pytest.mark.parametrize("given", [SyncVectorEnv([worlds.Endless] * 3), lambda: SyncVectorEnv([worlds.Endless] * 3)])
def test_a_vector_environment_of_the_users_own(given: Any) -> None:
    world = make_world(given, WorldSettings())
    assert (world.name, world.num_envs, world.form) == ("SyncVectorEnv", 3, "as it was given")
    world.close()


def test_anything_else_given_is_refused() -> None:
    with pytest.raises(WorldError, match="is Endless; expected a gymnasium"):
        make_world(worlds.Endless, WorldSettings())  # type: ignore[arg-type]
    with pytest.raises(WorldError, match="is Endless; expected an id, a gymnasium"):
        make_world(worlds.Endless(), WorldSettings())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kwargs": ("gravity",)}, "name=value"),
        ({"kwargs": ("a b=1",)}, "name=value"),
        ({"wrappers": ("NoModule",)}, "module:Name"),
        ({"wrappers": ("m:W",), "vectorization": "vector_entry_point"}, "no single copies to wrap"),
        ({"wrappers": ("m:W",), "vectorization": "envpool"}, "no single copies to wrap"),
        ({"max_episode_steps": 0}, "max_episode_steps=0"),
    ],
)
def test_settings_that_cannot_work(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        WorldSettings(**changes)


@pytest.mark.parametrize(
    ("env", "changes", "words"),
    [
        ("Pendulum-v1", {"kwargs": ("gravty=1",)}, "unexpected keyword argument 'gravty'"),
        ("Pendulum-v1", {"vectorization": "vector_entry_point"}, "has no vector form of its own"),
        ("CartPole-v1", {"wrappers": ("gymnasium.wrappers:Nonsense",)}, "no attribute 'Nonsense'"),
        ("CartPole-v1", {"wrappers": ("no_such_module:Nonsense",)}, "No module named"),
        ("CartPole-v1", {"wrappers": ("gymnasium:__version__",)}, "can be called with an environment"),
    ],
)
def test_worlds_that_cannot_be_made(env: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises((WorldError, ConfigError), match=words):
        make_world(env, WorldSettings(**changes))


@pytest.mark.parametrize(
    ("env", "changes", "hidden", "extra"),
    [
        ("HalfCheetah-v5", {}, "mujoco", "mujoco"),
        ("LunarLander-v3", {}, "Box2D", "box2d"),
        ("ALE/Pong-v5", {}, "ale_py", "atari"),
        ("CartPole-v1", {"vectorization": "envpool"}, "envpool", "envpool"),
    ],
)
def test_a_missing_extra_is_named(
    env: str, changes: dict[str, Any], hidden: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith(("gymnasium.envs.mujoco", "gymnasium.envs.box2d"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(WorldError, match=rf"pip install 'bridle\[{extra}\]'"):
        make_world(env, WorldSettings(num_envs=1, **changes))


def random_play(world: World, steps: int, seed: int = 0) -> tuple[list[Any], list[float]]:
    world.reset(seed)
    rng = np.random.default_rng(0)
    taken = []
    for _ in range(steps):
        space = world._envs.single_action_space
        n = world.num_envs
        discrete = isinstance(space, spaces.Discrete)
        actions = rng.integers(0, space.n, n) if discrete else rng.normal(size=(n, *space.shape))
        taken.append(world.step(actions))
    return taken, [float(step.rewards.sum()) for step in taken]


@pytest.mark.filterwarnings(SWIG)
@pytest.mark.parametrize(("package", "env"), [("mujoco", "InvertedPendulum-v5"), ("Box2D", "LunarLander-v3")])
def test_extras_work_and_repeat(package: str, env: str) -> None:
    pytest.importorskip(package)
    played = []
    for _ in range(2):
        world = make_world(env, WorldSettings(num_envs=2))
        played.append(random_play(world, 30)[1])
        world.close()
    assert played[0] == played[1]


@pytest.mark.parametrize("vectorization", ["auto", "sync", "envpool"])
def test_atari_is_shown_alike_in_every_form(vectorization: Any) -> None:
    pytest.importorskip({"auto": "ale_py", "sync": "cv2", "envpool": "envpool"}[vectorization])
    pytest.importorskip("ale_py")
    world = make_world("ALE/Breakout-v5", WorldSettings(num_envs=1, vectorization=vectorization))
    envs = world._envs
    assert envs.single_observation_space.shape == (4, 84, 84)
    assert envs.single_observation_space.dtype == np.uint8
    taken, _ = random_play(world, 60)
    world.close()
    ends = [bool(step.terminated[0]) for step in taken]
    assert any(ends)  # a ball is lost soon
    assert not any(step.over[0] for step in taken)  # and four are left


def test_atari_games_that_were_played_begin_as_new_ones_do() -> None:
    """Random games, with the last action repeated at random and several ends; not made again for it."""
    pytest.importorskip("ale_py")
    used, new = (make_world("ALE/Breakout-v5", WorldSettings(num_envs=1)) for _ in range(2))
    envs = used._envs
    random_play(used, 100, seed=1)
    steps, others = (random_play(world, 300, seed=2)[0] for world in (used, new))
    assert any(step.over[0] for step in steps)
    for mine, its in zip(steps, others, strict=True):
        assert torch.equal(mine.observations.images[0], its.observations.images[0])
        assert (mine.rewards == its.rewards).all()
    assert used._envs is envs
    for world in (used, new):
        world.close()


def test_envpool_is_seeded_at_every_reset() -> None:
    pytest.importorskip("envpool")
    world = make_world("CartPole-v1", WorldSettings(num_envs=2, vectorization="envpool", max_episode_steps=20))
    first, again, other = ([step.over.tolist() for step in random_play(world, 40, seed=s)[0]] for s in (1, 1, 2))
    world.close()
    assert first == again != other


def test_envpool_has_no_such_environment() -> None:
    pytest.importorskip("envpool")
    with pytest.raises(WorldError, match="did you mean CartPole-v1"):
        make_world("CartPol-v1", WorldSettings(vectorization="envpool"))


def test_what_envpool_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []

    def make(name: str, **arguments: Any) -> VectorEnv[Any, Any, Any]:
        asked.append({"name": name, **arguments})
        envs: Any = SyncVectorEnv([worlds.Endless] * arguments["num_envs"], autoreset_mode=AutoresetMode.NEXT_STEP)
        envs.config = {"num_envs": arguments["num_envs"]}
        return envs

    fake = types.SimpleNamespace(make=make, list_all_envs=lambda: ["Endless-v0"])
    monkeypatch.setitem(sys.modules, "envpool", fake)
    settings = WorldSettings(num_envs=3, vectorization="envpool", kwargs=("depth=2",), max_episode_steps=5)
    world = make_world("Endless-v0", settings)
    world.reset(7)
    world.close()
    common = {"name": "Endless-v0", "env_type": "gymnasium", "num_envs": 3, "depth": 2, "max_episode_steps": 5}
    assert asked == [{**common, "seed": 0}, {**common, "seed": 7}]


def test_no_path_of_this_machine_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's environment in the working directory's module is found by its name."""
    (tmp_path / "own_world_of_mine.py").write_text(
        "import gymnasium\nfrom tests.control.worlds import Endless\n"
        "gymnasium.register('Mine-v0', entry_point=Endless, disable_env_checker=True)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert rewards("own_world_of_mine:Mine-v0", WorldSettings(num_envs=1)) == [1.0] * 3


def test_a_users_own_processes_are_closed_though_one_has_died() -> None:
    envs = AsyncVectorEnv([worlds.Endless] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    world = make_world(envs, WorldSettings())
    world.reset(0)
    envs.processes[1].kill()
    envs.processes[1].join()
    with pytest.raises(WorldError, match="AsyncVectorEnv: step: the process of an environment died"):
        world.step(np.zeros(2, np.int64))
    world.close()
    assert all(process.exitcode is not None for process in envs.processes)
