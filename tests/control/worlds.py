"""Tiny environments whose every number is known."""

from __future__ import annotations

import os
import signal
from pathlib import Path
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


class Worn(Counter):
    """A Counter whose rewards grow with all the steps of its life, which no reset takes back."""

    def __init__(self) -> None:
        super().__init__()
        self.life = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.life += 1
        shown, reward, terminated, truncated, info = super().step(action)
        return shown, reward + self.life, terminated, truncated, info


class Mortal(Counter):
    """A Counter whose process dies at the last step of every episode instead of ending it; reward as a Counter's."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        shown, reward, terminated, truncated, info = super().step(action)
        if terminated or truncated:
            os.kill(os.getpid(), signal.SIGKILL)
        return shown, reward, False, False, info


class Fated(Counter):
    """A Counter that dies at its third step, or where it begins an episode by itself, once for each file that it finds.

    ``how``: "kill", "raise", "leave" or "hang".
    """

    def __init__(self, tickets: str, where: str = "step", how: str = "kill") -> None:
        super().__init__()
        self.tickets, self.where, self.how = Path(tickets), where, how

    def _die(self) -> None:
        for ticket in sorted(self.tickets.iterdir()):
            try:
                ticket.unlink()
            except FileNotFoundError:
                continue
            if self.how == "raise":
                raise KeyError("the\nbattery is empty")
            if self.how == "leave":
                raise SystemExit(7)
            if self.how == "hang":
                os.read(os.pipe()[0], 1)  # of a pipe whose other end it holds itself: for ever
            os.kill(os.getpid(), signal.SIGKILL)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        if seed is None and self.where == "reset":
            self._die()
        return super().reset(seed=seed)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.t == 2 and self.where == "step":
            self._die()
        return super().step(action)


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


class Glitching(Counter):
    """A Counter without an end that gives what is not finite at its 40th step if the number that it drew is below ``below``."""

    def __init__(self, below: int, what: str) -> None:
        super().__init__()
        self.below, self.what = below, what

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        wrong = self.t == 40 and self.number < self.below
        shown = np.array([np.inf, self.t]) if wrong and self.what == "observation" else self._show() / 1000
        return shown, float("nan") if wrong and self.what == "reward" else 1.0, False, False, {}


class Frail(Endless):
    """The endless world, whose process dies with one step in twenty, drawn from its seed."""

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.np_random.random() < 0.05:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().step(action)


class Restless(Endless):
    """Shows how often any of its kind has been stepped, whatever its seed: the same actions never lead to the same place."""

    steps = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        Restless.steps += 1
        return np.full(1, 1 / (1 + Restless.steps), np.float32), 1.0, False, False, {}


class Generous(Endless):
    """Shows always the same and gives more with every step that any of its kind has ever taken."""

    steps = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        Generous.steps += 1
        return np.ones(1, np.float32), float(Generous.steps), False, False, {}


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


class SeenCounter(Counter):
    """A Counter that shows the same two numbers in another kind of space."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        image = spaces.Box(0, 255, (36, 37, 3), np.uint8)
        everything = {
            "eye": image,
            "numbers": spaces.Tuple((spaces.Box(-np.inf, np.inf, (1, 2), np.float64), spaces.Discrete(5, start=2))),
            "bits": spaces.MultiBinary(10),
            "digits": spaces.MultiDiscrete([10, 10, 10]),
        }
        self.observation_space = image if kind == "image" else spaces.Dict(everything)

    def _show(self) -> Any:
        eye = np.zeros((36, 37, 3), np.uint8)
        eye[0, 0], eye[35, 36] = (self.number // 256, self.number % 256, self.t), 255
        if self.kind == "image":
            return eye
        return {
            "eye": eye,
            "numbers": (np.array([[self.number, self.t]], np.float64), 2 + self.t % 5),
            "bits": np.array([int(bit) for bit in f"{self.number:010b}"], np.int8),
            "digits": np.array([int(digit) for digit in f"{self.number:03d}"]),
        }


class SeenEndless(Endless):
    """The endless world, shown in another kind of space."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        image = spaces.Box(0, 255, (36, 36), np.uint8)
        inside = spaces.Dict({"eye": image, "bits": spaces.MultiBinary(2), "one": spaces.Box(0, 1, (1,), np.float32)})
        plain = spaces.Dict({"bits": spaces.MultiBinary(2), "one": spaces.Box(0, 1, (1,), np.float32)})
        self.observation_space = {"image": image, "dict": plain, "image in a dict": inside}[kind]

    def _show(self) -> Any:
        parts = {
            "eye": np.full((36, 36), 128, np.uint8),
            "bits": np.array([0, 1], np.int8),
            "one": np.ones(1, np.float32),
        }
        if self.kind == "image":
            return parts["eye"]
        return {key: parts[key] for key in self.observation_space.spaces}

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**arguments)
        return self._show(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._show(), 1.0, False, False, {}


class Masked(gymnasium.Env[Any, Any]):
    """Allows some actions only, others in each state, and raises on any other; no action is allowed where it ends.

    ``where`` its mask is told: "info", or "key" of its Dict observation. ``fault`` spoils the mask of the third step.
    """

    def __init__(self, where: str = "info", multi: bool = False, fault: str = "") -> None:
        self.where, self.multi, self.fault = where, multi, fault
        self.action_space = spaces.MultiDiscrete([3, 2], start=[1, 0]) if multi else spaces.Discrete(5, start=7)
        self.sizes = (3, 2) if multi else (5,)
        seen = spaces.Box(-np.inf, np.inf, (2,), np.float32)
        mask = spaces.Box(0, 1, (5,), np.int8)
        self.observation_space = spaces.Dict({"action_mask": mask, "seen": seen}) if where == "key" else seen

    def _show(self, end: bool = False) -> tuple[Any, dict[str, Any]]:
        chances = self.np_random.random(5)
        mask: Any = chances < 0.5
        mask[0] |= not mask[: self.sizes[0]].any()
        mask[4] |= not mask[5 - self.sizes[-1] :].any()
        self.mask = mask.astype(np.int8) * (not end)
        seen = np.array([self.t, self.length], np.float32)
        told: Any = self.mask.copy()
        if self.fault and self.t == 3:
            told = {"nothing": told * 0, "shape": told[:4], "numbers": told * 2, "missing": None}[self.fault]
        if self.where == "key":
            return {"action_mask": told, "seen": seen}, {}
        return seen, {} if told is None or (end and self.fault == "") else {"action_mask": told}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.t, self.length = 0, 9 if self.fault else int(self.np_random.integers(1, 5))
        return self._show()

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen = np.asarray(action).reshape(-1) - np.asarray(self.action_space.start).reshape(-1)
        allowed = [bool(part[i]) for part, i in zip(np.split(self.mask, [self.sizes[0]]), chosen, strict=False)]
        assert all(allowed), f"{action} is forbidden by {self.mask}"
        self.t += 1
        end = self.t == self.length
        seen, info = self._show(end)
        return seen, 1.0, end, False, info


class Match(gymnasium.Env[Any, Any]):
    """Pays the share of the action's parts that equal what is seen; one step an episode."""

    def __init__(self, space: gymnasium.Space[Any]) -> None:
        self.observation_space, self.action_space = space, space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        nvec = self.observation_space.nvec if isinstance(self.observation_space, spaces.MultiDiscrete) else 2
        self.seen = self.np_random.integers(0, nvec, self.observation_space.shape).astype(self.observation_space.dtype)
        return self.seen, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        return self.seen, float((action == self.seen).mean()), True, False, {}


class Cue(gymnasium.Env[np.ndarray, int]):
    """Shows one of two cues, then nothing for two steps; the last action is worth 1 if it names the cue."""

    def __init__(self) -> None:
        self.observation_space = spaces.Box(0, 1, (3,), np.float32)
        self.action_space = spaces.Discrete(2)

    def _show(self) -> np.ndarray:
        return np.array([self.t == 0 and self.cue == 0, self.t == 0 and self.cue == 1, self.t == 2], np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.cue, self.t = int(self.np_random.integers(2)), 0
        return self._show(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        end = self.t == 3
        return self._show(), float(end and action == self.cue), end, False, {}


_TEXT_INSIDE = spaces.Dict({"a": spaces.Tuple((spaces.Discrete(2), spaces.Text(3)))})

WORLDS: dict[str, dict[str, Any]] = {
    "Counter-v0": {"entry_point": Counter},
    "Worn-v0": {"entry_point": Worn},
    "Mortal-v0": {"entry_point": Mortal},
    "Fated-v0": {"entry_point": Fated},
    "Glitching-v0": {"entry_point": Glitching},
    "Frail-v0": {"entry_point": Frail},
    "Endless-v0": {"entry_point": Endless, "max_episode_steps": 4},
    "Restless-v0": {"entry_point": Restless, "max_episode_steps": 5},
    "Generous-v0": {"entry_point": Generous, "max_episode_steps": 4},
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
    "ImageCounter-v0": {"entry_point": SeenCounter, "kwargs": {"kind": "image"}},
    "DictCounter-v0": {"entry_point": SeenCounter, "kwargs": {"kind": "dict"}},
    "EndlessImage-v0": {"entry_point": SeenEndless, "kwargs": {"kind": "image"}, "max_episode_steps": 4},
    "EndlessDict-v0": {"entry_point": SeenEndless, "kwargs": {"kind": "dict"}, "max_episode_steps": 4},
    "EndlessBoth-v0": {"entry_point": SeenEndless, "kwargs": {"kind": "image in a dict"}, "max_episode_steps": 4},
    "Masked-v0": {"entry_point": Masked},
    "MaskedKey-v0": {"entry_point": Masked, "kwargs": {"where": "key"}},
    "MaskedMulti-v0": {"entry_point": Masked, "kwargs": {"multi": True}},
    "MaskedMultiKey-v0": {"entry_point": Masked, "kwargs": {"where": "key", "multi": True}},
    "MatchDigits-v0": {"entry_point": Match, "kwargs": {"space": spaces.MultiDiscrete([[3, 2], [2, 4]])}},
    "MatchBits-v0": {"entry_point": Match, "kwargs": {"space": spaces.MultiBinary((2, 2))}},
    "Cue-v0": {"entry_point": Cue},
}


for _fault in ("nothing", "shape", "numbers", "missing"):
    WORLDS[f"Masked-{_fault}-v0"] = {"entry_point": Masked, "kwargs": {"fault": _fault}}


def register() -> None:
    for name, arguments in WORLDS.items():
        if f"BridleTest/{name}" not in gymnasium.registry:
            gymnasium.register(f"BridleTest/{name}", disable_env_checker=True, **arguments)


register()
