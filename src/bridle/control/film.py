"""Filming: what an environment renders, as an MP4."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from gymnasium.vector import VectorEnv, VectorWrapper
from jaxtyping import UInt8

from bridle.control.environments import World, foreign
from bridle.control.evaluate import evaluate
from bridle.control.making import WorldSettings, make_vector
from bridle.control.saved import Agent
from bridle.errors import ConfigError, WorldError

__all__ = ["film"]

_RATE = 30
"""Frames a second where the environment does not say."""


def film(
    agent: Agent,
    env: str,
    settings: WorldSettings,
    path: Path,
    *,
    episodes: int,
    deterministic: bool,
    seed: int,
    max_steps: int,
) -> tuple[float, ...]:
    """Play whole episodes in one copy of ``env`` and film them; return their returns.

    Args:
        agent: who plays.
        env: id of the environment.
        settings: its arguments and wrappers; it runs as one copy in this process.
        path: the film, ``.mp4``, which appears when it is whole; or a folder to make, with one film an episode.
        episodes: how many.
        deterministic: take each state's most likely action.
        seed: key of resets and draws.
        max_steps: actions after which an episode is cut.

    Raises:
        ConfigError: there is something at ``path``, or it names another kind of film.
        WorldError: the environment cannot be drawn, or PyAV, which writes films, is not installed.
    """
    check_film(path)
    os.environ.setdefault(
        "SDL_VIDEODRIVER", "dummy"
    )  # no window is opened; where there is no screen SDL would complain
    folder = path.suffix == ""
    one = replace(settings, num_envs=1, vectorization="sync", autoreset="disabled")
    with closing(make_vector(env, one)[0]) as silent:
        modes = silent.metadata.get("render_modes", [])
    if "rgb_array" not in modes:
        raise WorldError(f"{env} cannot be filmed: it draws no pictures (its render_modes are {modes})")
    returns: list[float] = []
    with _drawing(), closing(make_vector(env, one, render_mode="rgb_array")[0]) as envs:
        if folder:
            path.mkdir()
        films = [(path / f"episode-{n}.mp4", 1) for n in range(episodes)] if folder else [(path, episodes)]
        for number, (place, share) in enumerate(films):
            with Film(place, envs.metadata.get("render_fps", _RATE)) as reel:
                world = World(env, Filmed(env, envs, reel))
                score = evaluate(
                    world,
                    agent.policy,
                    agent.moments,
                    episodes=share,
                    deterministic=deterministic,
                    seed=seed,
                    step=number,
                    max_steps=max_steps,
                )
            returns += score.returns
    return tuple(returns)


@contextmanager
def _drawing() -> Iterator[None]:
    """Say what MuJoCo needs for drawing where drawing fails: its own complaint does not."""
    try:
        yield
    except WorldError as error:
        if "mujoco" not in sys.modules:
            raise
        remedy = (
            "MuJoCo draws by OpenGL: set MUJOCO_GL=egl or osmesa where there is no screen, and install that library"
        )
        raise WorldError(f"{error}; {remedy}") from error


def check_film(path: Path) -> None:
    """Refuse what cannot become a film, before anything is played."""
    if path.suffix not in ("", ".mp4"):
        raise ConfigError.of("video", str(path), "a file ending in .mp4, or a folder to make")
    if path.exists():
        raise ConfigError.of("video", str(path), "a file or folder that does not exist yet")
    if not path.absolute().parent.is_dir():
        raise ConfigError.of("video", str(path), "a file or folder in a folder that exists")
    try:
        importlib.import_module("av")
    except ModuleNotFoundError as error:
        raise WorldError("filming needs more than is installed; pip install 'bridle[video]'") from error


class Film:
    """An MP4 that is written aside and appears when it is whole."""

    def __init__(self, path: Path, rate: int) -> None:
        """Begin a film of ``rate`` pictures a second."""
        self._path = path
        self._aside = path.with_name(f".{path.name}.partial")
        self._rate = rate
        self._stream: Any = None

    def __enter__(self) -> Self:
        """Open the file aside."""
        self._container = importlib.import_module("av").open(str(self._aside), "w", format="mp4")
        return self

    def add(self, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Add one picture; an odd last row or column is cut off, as H.264 asks."""
        height, width = (side - side % 2 for side in picture.shape[:2])
        if self._stream is None:
            self._stream = self._container.add_stream("libx264", rate=Fraction(self._rate))
            self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"
        av = importlib.import_module("av")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width, :3]), format="rgb24")
        self._container.mux(self._stream.encode(frame))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Finish the file; after an error nothing is left."""
        if kind is None and self._stream is not None:
            self._container.mux(self._stream.encode())
        self._container.close()
        if kind is None:
            self._aside.rename(self._path)
        else:
            self._aside.unlink(missing_ok=True)


class Filmed(VectorWrapper):
    """One environment whose every state is filmed, but for a last reset that nobody acts on."""

    def __init__(self, name: str, env: VectorEnv[Any, Any, Any], film: Film) -> None:
        super().__init__(env)
        self._name = name
        self._film = film
        self._first: Any = None

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        found = self.env.reset(**arguments)
        self._first = self._picture()
        return found

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take a step."""
        if self._first is not None:
            self._film.add(self._first)
            self._first = None
        found = self.env.step(actions)
        self._film.add(self._picture())
        return found

    def _picture(self) -> Any:
        with foreign(self._name, "render"):
            pictures = self.env.render()
        if pictures is None or pictures[0] is None:
            raise WorldError(f"{self._name} cannot be filmed: it draws no pictures")
        return pictures[0]
