"""Atari games as they are usually shown to an agent: grey, small, four frames at a time (Mnih et al. 2015, Methods)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gymnasium
from gymnasium.vector import AutoresetMode
from gymnasium.wrappers import AtariPreprocessing, FrameStackObservation

from bridle.errors import ConfigError

__all__ = ["AtariSettings", "envpool_arguments", "preprocess", "vector_arguments"]

_FIRE = 1
"""The action FIRE, in every game that has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtariSettings:
    """What an Atari game shows, and when a return ends."""

    frame_skip: int = 4
    """Frames that each action is held; the observation is the maximum of the last two."""
    size: int = 84
    """Width and height of a frame, pixels."""
    frame_stack: int = 4
    """Frames that an observation holds, the newest last."""
    noop_max: int = 30
    """Each game begins with a random number of idle frames, up to this; 0 for none."""
    fire: bool = True
    """Press FIRE at the start of games that wait for it."""
    life_loss: bool = True
    """In training the loss of a life is a terminal state, though the game goes on and returns are the whole game's."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        for name, least in (("frame_skip", 1), ("size", 1), ("frame_stack", 1), ("noop_max", 0)):
            if getattr(self, name) < least:
                raise ConfigError.of(name, getattr(self, name), f"a whole number >= {least}")


def vector_arguments(settings: AtariSettings, max_episode_steps: int | None) -> dict[str, Any]:
    """Lay the settings out for ``ale_py``'s own vector form, which does all of it itself."""
    arguments = {
        "frameskip": settings.frame_skip,
        "img_height": settings.size,
        "img_width": settings.size,
        "stack_num": settings.frame_stack,
        "noop_max": settings.noop_max,
        "use_fire_reset": settings.fire,
        "reward_clipping": False,  # the job does it, so that returns stay the game's own
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }
    if max_episode_steps is not None:
        arguments["max_num_frames_per_episode"] = max_episode_steps * settings.frame_skip
    return arguments


def envpool_arguments(settings: AtariSettings) -> dict[str, Any]:
    """Lay the settings out for envpool."""
    return {
        "frame_skip": settings.frame_skip,
        "img_height": settings.size,
        "img_width": settings.size,
        "stack_num": settings.frame_stack,
        "noop_max": max(1, settings.noop_max),
        "use_fire_reset": settings.fire,
        "reward_clip": False,
        "episodic_life": False,
    }


def preprocess(env: gymnasium.Env[Any, Any], settings: AtariSettings) -> gymnasium.Env[Any, Any]:
    """Wrap one game, made with a frame skip of 1, so that it shows what the vector form shows."""
    env = AtariPreprocessing(env, noop_max=settings.noop_max, frame_skip=settings.frame_skip, screen_size=settings.size)
    if settings.fire:
        env = FireAtReset(env)
    return FrameStackObservation(env, settings.frame_stack, padding_type="zero")


class FireAtReset(gymnasium.Wrapper[Any, Any, Any, Any]):
    """Press FIRE once after each reset, where the game has it and stands still until then."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start a game and press FIRE."""
        observation, info = self.env.reset(seed=seed, options=options)
        meanings: list[str] = self.env.unwrapped.get_action_meanings()  # type: ignore[attr-defined]
        if len(meanings) > _FIRE and meanings[_FIRE] == "FIRE":
            observation, _, terminated, truncated, info = self.env.step(_FIRE)
            if terminated or truncated:
                observation, info = self.env.reset(options=options)
        return observation, info
