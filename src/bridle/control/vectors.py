"""A vector environment that Gymnasium's own do not cover: envpool's threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from gymnasium.vector import VectorEnv

__all__ = ["Pool"]


class Pool(VectorEnv[Any, Any, Any]):
    """envpool's environments, which take their seed when they are made: each seeded reset makes them anew."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """Wrap ``make(seed=…)``, which makes the whole pool."""
        self._make = make
        self._start(0)

    def _start(self, seed: int) -> None:
        with warnings.catch_warnings():
            # envpool states the bounds of its float32 spaces in float64
            warnings.filterwarnings("ignore", r"[\s\S]*Box (low|high)'s precision lowered", UserWarning)
            pool = self._pool = self._make(seed=seed)
            self.num_envs = int(pool.config["num_envs"])
            self.single_observation_space = pool.single_observation_space
            self.single_action_space = pool.single_action_space
            self.metadata = dict(pool.metadata)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start all environments anew."""
        if seed is not None:
            self._pool.close()
            self._start(seed)
        observations, info = self._pool.reset()
        return observations, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments."""
        observations, rewards, terminated, truncated, info = self._pool.step(actions)
        return observations, rewards, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool.close()
