"""Tiny environments whose every number is known."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

MODES = ("same_step", "next_step", "disabled")


class Counter(gymnasium.Env[np.ndarray, int]):
    """Shows (a number drawn at reset, t); the number's residue picks the length 1 … 5 and whether the end is a cut."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = spaces.Discrete(2)

    def _show(self) -> np.ndarray:
        return np.array([self.number, self.t], dtype=np.float64)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.number, self.t = int(self.np_random.integers(1000)), 0
        return self._show(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        end = self.t == 1 + self.number % 5
        cut = self.number % 2 == 0
        return self._show(), self.number + 0.25 * self.t, end and not cut, end and cut, {}


class Endless(gymnasium.Env[np.ndarray, int]):
    """One state, reward 1, no end; only its time limit cuts it."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (1,), np.float32)
        self.action_space = spaces.Discrete(2)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.ones(1, np.float32), 1.0, False, False, {}


class Faulty(Endless):
    """Goes wrong at its third step in the way it is told to."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.t = fault, 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        show, reward = np.ones(1, np.float32), 1.0
        if self.t == 3:
            if self.fault == "raises":
                raise KeyError("the\nbattery is empty")
            if self.fault == "nan_observation":
                show = np.full(1, np.nan, np.float32)
            if self.fault == "infinite_reward":
                reward = float("inf")
        return show, reward, False, False, {}


class Strange(Endless):
    """Has a space of the kind it is told to have."""

    def __init__(
        self, observation: gymnasium.Space[Any] | None = None, action: gymnasium.Space[Any] | None = None
    ) -> None:
        super().__init__()
        self.observation_space = self.observation_space if observation is None else observation
        self.action_space = self.action_space if action is None else action


class Target(gymnasium.Env[np.ndarray, np.ndarray]):
    """Box actions in [1, 5] × [−10, 0] and a one-hot state; the reward is −distance² to a point that the state picks."""

    def __init__(self) -> None:
        self.observation_space = spaces.Discrete(2, start=3)
        self.action_space = spaces.Box(np.array([1, -10], np.float32), np.array([5, 0], np.float32))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[int, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = int(self.np_random.integers(2))
        return 3 + self.state, {}

    def step(self, action: np.ndarray) -> tuple[int, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        assert action.dtype == np.float32
        goal = np.array([2.0, -7.0]) if self.state else np.array([4.0, -3.0])
        reward = -float(np.square((action - goal) / np.array([2.0, 5.0])).sum())
        return 3 + self.state, reward, True, False, {}


_TEXT_INSIDE = spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), spaces.Text(3)))})

WORLDS: dict[str, dict[str, Any]] = {
    "Counter-v0": {"entry_point": Counter},
    "Endless-v0": {"entry_point": Endless, "max_episode_steps": 4},
    "NeverCut-v0": {"entry_point": Endless},
    "Raises-v0": {"entry_point": Faulty, "kwargs": {"fault": "raises"}},
    "NaN-v0": {"entry_point": Faulty, "kwargs": {"fault": "nan_observation"}},
    "Infinite-v0": {"entry_point": Faulty, "kwargs": {"fault": "infinite_reward"}},
    "TextSeen-v0": {"entry_point": Strange, "kwargs": {"observation": spaces.Text(3)}},
    "TextInside-v0": {"entry_point": Strange, "kwargs": {"observation": _TEXT_INSIDE}},
    "Nothing-v0": {"entry_point": Strange, "kwargs": {"observation": spaces.Dict({})}},
    "DictActions-v0": {"entry_point": Strange, "kwargs": {"action": spaces.Dict({"a": spaces.Discrete(2)})}},
    "WholeBox-v0": {"entry_point": Strange, "kwargs": {"action": spaces.Box(0, 3, (2,), np.int64)}},
    "Target-v0": {"entry_point": Target},
}


def register() -> None:
    for name, arguments in WORLDS.items():
        if f"BridleTest/{name}" not in gymnasium.registry:
            gymnasium.register(f"BridleTest/{name}", disable_env_checker=True, **arguments)


register()
