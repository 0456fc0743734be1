"""How environments are made: anything that ``gymnasium.make_vec`` makes."""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import Literal

import gymnasium
from gymnasium.vector import AutoresetMode

from bridle.control.environments import World, foreign
from bridle.errors import ConfigError, WorldError

__all__ = ["WorldSettings", "make_world"]

_MODES = {
    "same_step": AutoresetMode.SAME_STEP,
    "next_step": AutoresetMode.NEXT_STEP,
    "disabled": AutoresetMode.DISABLED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSettings:
    """How many copies of the environment run, and how."""

    num_envs: int = 8
    """Copies that run side by side, B."""
    vectorization: Literal["auto", "sync", "async", "vector_entry_point"] = "auto"
    """One process ("sync"), a process each ("async"), or the environment's own vector form.

    "auto" takes the environment's own where there is one, else "sync".
    """
    autoreset: Literal["same_step", "next_step", "disabled"] | None = None
    """Gymnasium's autoreset mode, for "sync" and "async"; None is "same_step", which wastes no step.

    Learning sees the same valid transitions in all three.
    """

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.num_envs < 1:
            raise ConfigError.of("num_envs", self.num_envs, "a whole number >= 1")
        if self.autoreset is not None and self.vectorization == "vector_entry_point":
            remedy = "an environment's own vector form has its own mode"
            raise ConfigError.of("autoreset", self.autoreset, 'vectorization "sync" or "async"', remedy)


def make_world(env: str, settings: WorldSettings) -> World:
    """Make ``settings.num_envs`` copies of the environment ``env``, an id such as "CartPole-v1" or "module:Name-v0".

    Raises:
        WorldError: there is no such environment, it cannot be made, or its spaces are not supported.
    """
    module, _, name = env.rpartition(":")
    if module:
        with foreign(env, f"import of {module}"):
            importlib.import_module(module)
    if name not in gymnasium.registry:
        raise WorldError(f"{env}: no such environment;{_close_matches(name)} gymnasium.pprint_registry() lists all")
    own = gymnasium.registry[name].vector_entry_point is not None
    vectorization = settings.vectorization
    if vectorization == "auto":
        vectorization = "vector_entry_point" if own and settings.autoreset is None else "sync"
    choice = {"autoreset_mode": _MODES[settings.autoreset or "same_step"]}
    if vectorization == "vector_entry_point":
        choice = {}
    with foreign(env, "making it"):
        envs = gymnasium.make_vec(name, settings.num_envs, vectorization_mode=vectorization, vector_kwargs=choice)
    try:
        return World(env, envs)
    except WorldError:
        envs.close()
        raise


def _close_matches(name: str) -> str:
    known = {known.lower(): known for known in gymnasium.registry}
    matches = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
    return f" did you mean {' or '.join(matches)}?" if matches else ""
