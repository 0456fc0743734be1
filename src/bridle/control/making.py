"""How environments are made: whatever ``gymnasium.make_vec`` makes, envpool's, or a vector environment of the user's."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import gymnasium
from gymnasium.envs.registration import EnvSpec
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from bridle.control.atari import AtariSettings, envpool_arguments, preprocess, vector_arguments
from bridle.control.environments import World, foreign
from bridle.control.processes import Processes, set_apart
from bridle.control.vectors import Pool
from bridle.errors import ConfigError, WorldError

__all__ = ["GivenWorld", "WorldSettings", "is_atari", "make_vector", "make_world"]

GivenWorld = VectorEnv[Any, Any, Any] | Callable[[], VectorEnv[Any, Any, Any]]
"""A vector environment of the user's own, or a function that makes one."""

_MODES = {
    "same_step": AutoresetMode.SAME_STEP,
    "next_step": AutoresetMode.NEXT_STEP,
    "disabled": AutoresetMode.DISABLED,
}

_EXTRAS = {"gymnasium.envs.mujoco": "mujoco", "gymnasium.envs.box2d": "box2d", "ale_py": "atari"}
"""Whose environments need what beyond Gymnasium itself."""

LONGEST = 1e6
"""Seconds, eleven days: no step is waited for longer, by the clock of poll(2) at least."""

_FORMS = {
    "sync": "in one process",
    "async": "in a process each",
    "vector_entry_point": "in its own vector form",
    "envpool": "in envpool's threads",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class WorldSettings:
    """How many copies of the environment run, and how."""

    num_envs: int = 8
    """Copies that run side by side, B."""
    vectorization: Literal["auto", "sync", "async", "vector_entry_point", "envpool"] = "auto"
    """One process ("sync"), a process each ("async"), the environment's own vector form, or envpool's.

    "auto" takes the environment's own where there is one and nothing else asks for single copies, else "sync".
    """
    autoreset: Literal["same_step", "next_step", "disabled"] | None = None
    """Gymnasium's autoreset mode, for "sync" and "async"; None is "same_step", which wastes no step.

    Learning sees the same valid transitions in all three.
    """
    kwargs: tuple[str, ...] = ()
    """Arguments of the environment itself as name=value, the value as in JSON: gravity=-5 wind=true "name=any text"."""
    wrappers: tuple[str, ...] = ()
    """Wrappers as module:Name, each called with one copy of the environment, in this order."""
    max_episode_steps: int | None = None
    """Actions after which an episode is cut; None leaves the environment's own limit."""
    atari: AtariSettings = field(default_factory=AtariSettings)
    """What an Atari game (ids "ALE/…") shows; other environments have no use for it."""
    on_death: Literal["fail", "restart"] = "fail"
    """What follows the death of an environment's process, or what its code raises there: the run ends, or that environment
    is made anew. Its episode is then cut where it was last seen, and the step that never came back counts for nothing."""
    death_limit: int = 10
    """≥ 1, how often training, and how often evaluation, may make one anew before the next death ends the run; a resume counts
    from 0 again."""
    step_timeout: float | None = 600.0
    """> 0 seconds that an environment in a process of its own ("async") may take for a step, for a reset or to be made.
    One that takes longer hangs: its process is ended, which is a death. None waits for ever."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.num_envs < 1:
            raise ConfigError.of("num_envs", self.num_envs, "a whole number >= 1")
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise ConfigError.of("max_episode_steps", self.max_episode_steps, "a number of actions >= 1")
        if self.death_limit < 1:
            raise ConfigError.of(
                "death_limit", self.death_limit, "a whole number >= 1", 'to allow none: on_death "fail"'
            )
        if self.step_timeout is not None and not 0 < self.step_timeout <= LONGEST:
            remedy = "leave it out to wait ten minutes"
            raise ConfigError.of("step_timeout", self.step_timeout, f"seconds in (0, {LONGEST:g}]", remedy)
        if self.on_death == "restart" and self.vectorization != "async":
            remedy = "elsewhere an environment that dies takes the run with it"
            raise ConfigError.of("on_death", self.on_death, '"fail", or vectorization "async"', remedy)
        if self.vectorization in ("vector_entry_point", "envpool"):
            form = _FORMS[self.vectorization].removeprefix("in ")
            if self.autoreset is not None:
                expected = 'vectorization "sync" or "async"'
                raise ConfigError.of("autoreset", self.autoreset, expected, f"{form} has its own mode")
            if self.wrappers:
                expected = 'none, or vectorization "sync" or "async"'
                raise ConfigError.of("wrappers", self.wrappers, expected, f"{form} has no single copies to wrap")
        for text in self.kwargs:
            if not text.partition("=")[0].isidentifier() or "=" not in text:
                raise ConfigError.of("kwargs", text, "name=value", "for instance: --world.kwargs gravity=-5")
        for name in self.wrappers:
            if name.count(":") != 1 or not all(name.split(":")):
                raise ConfigError.of("wrappers", name, '"module:Name"')

    @property
    def arguments(self) -> dict[str, Any]:
        """``kwargs`` read: what is not JSON is text."""
        return {name: _value(text) for name, _, text in (item.partition("=") for item in self.kwargs)}


def _value(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=lambda constant: constant)
    except ValueError:
        return text


def make_world(env: str | GivenWorld, settings: WorldSettings) -> World:
    """Make ``settings.num_envs`` copies of an environment and put them behind one face.

    Args:
        env: an id such as "CartPole-v1", "ALE/Pong-v5" or "module:Name-v0"; or a vector environment, or a function
            that makes one, which is taken as it is: no setting applies to it.
        settings: how many, and how.

    Raises:
        WorldError: there is no such environment, it cannot be made, or its spaces are not supported.
        ConfigError: a wrapper cannot be imported.
    """
    if not isinstance(env, str):
        return _given(env)
    envs, form = make_vector(env, settings)
    life_loss = settings.atari.life_loss and is_atari(env)
    # ale-py loads its games anew at each reset from a seed, which takes as long as making them
    anew = form in ("async", "envpool") or (form == "vector_entry_point" and is_atari(env))
    remake = None if anew else lambda: make_vector(env, settings)[0]
    try:
        return World(env, envs, form=_FORMS[form], life_loss=life_loss, remake=remake)
    except WorldError:
        envs.close()
        raise


def is_atari(env: str) -> bool:
    """Say whether ``env`` is the id of an Atari game."""
    return env.rpartition(":")[2].startswith("ALE/")


def make_vector(
    env: str, settings: WorldSettings, *, render_mode: str | None = None
) -> tuple[VectorEnv[Any, Any, Any], str]:
    """Make the copies; return them, and how they run side by side ("sync", "async", …).

    Raises:
        WorldError: there is no such environment, or it cannot be made.
        ConfigError: a wrapper cannot be imported.
    """
    if settings.vectorization == "envpool":
        return _make_pool(env, settings), "envpool"
    spec = _find(env)
    wrappers = [_load_wrapper(name) for name in settings.wrappers]
    form = _form(spec, settings)
    if form == "vector_entry_point" and spec.vector_entry_point is None:
        remedy = 'leave world.vectorization out, or take "sync" or "async"'
        raise WorldError(f"{env} has no vector form of its own; {remedy}")
    with foreign(env, "making it"):
        try:
            if form == "vector_entry_point":
                return _own_vector_form(spec, settings), form
            make = partial(_make_one, spec, settings, wrappers, render_mode)
            mode = _MODES[settings.autoreset or "same_step"]
            if form == "async":
                allowed = settings.death_limit if settings.on_death == "restart" else 0
                makes = [make] * settings.num_envs
                return Processes(makes, mode, allowed=allowed, timeout=settings.step_timeout), form
            # World encodes what it is shown into memory of its own
            return SyncVectorEnv([make] * settings.num_envs, copy=False, autoreset_mode=mode), form
        except (DependencyNotInstalled, ModuleNotFoundError) as error:
            entry = spec.entry_point if isinstance(spec.entry_point, str) else ""
            extra = next((extra for home, extra in _EXTRAS.items() if entry.startswith(home)), None)
            if extra is None:
                raise
            raise WorldError(f"{env} needs more than is installed; pip install 'bridle[{extra}]'") from error


def _find(env: str) -> EnvSpec:
    """Find what is registered as ``env``, importing its module first if it names one."""
    module, _, name = env.rpartition(":")
    if module:
        with foreign(env, f"import of {module}"):
            importlib.import_module(module)
    if is_atari(name):
        try:
            importlib.import_module("ale_py")  # importing it registers the games
        except ModuleNotFoundError as error:
            raise WorldError(f"{env} needs more than is installed; pip install 'bridle[atari]'") from error
    spec = gymnasium.registry.get(name)
    if spec is None:
        raise WorldError(f"{env}: no such environment;{_close_matches(name)} gymnasium.pprint_registry() lists all")
    return spec


def _form(spec: EnvSpec, settings: WorldSettings) -> str:
    if settings.vectorization != "auto":
        return settings.vectorization
    single = settings.autoreset is not None or settings.wrappers or spec.vector_entry_point is None
    return "sync" if single else "vector_entry_point"


def _own_vector_form(spec: EnvSpec, settings: WorldSettings) -> VectorEnv[Any, Any, Any]:
    arguments = settings.arguments
    if is_atari(spec.id):
        arguments = {**vector_arguments(settings.atari, settings.max_episode_steps), **arguments}
    elif settings.max_episode_steps is not None:
        arguments = {"max_episode_steps": settings.max_episode_steps, **arguments}
    return gymnasium.make_vec(spec.id, settings.num_envs, vectorization_mode="vector_entry_point", **arguments)


def _make_one(
    spec: EnvSpec,
    settings: WorldSettings,
    wrappers: list[Callable[[Any], Any]],
    render_mode: str | None,
) -> gymnasium.Env[Any, Any]:
    """Make one copy."""
    arguments = settings.arguments
    if is_atari(spec.id):
        arguments = {"frameskip": 1, **arguments}
    if render_mode is not None:
        arguments["render_mode"] = render_mode
    env: gymnasium.Env[Any, Any] = gymnasium.make(spec, max_episode_steps=settings.max_episode_steps, **arguments)
    if is_atari(spec.id):
        env = preprocess(env, settings.atari)
    for wrapper in wrappers:
        env = wrapper(env)
    return env


def _make_pool(env: str, settings: WorldSettings) -> VectorEnv[Any, Any, Any]:
    try:
        pool = importlib.import_module("envpool")
    except ModuleNotFoundError as error:
        raise WorldError(f"{env}: envpool is not installed; pip install 'bridle[envpool]'") from error
    name, arguments = env.removeprefix("ALE/"), settings.arguments
    if is_atari(env):
        arguments = {**envpool_arguments(settings.atari), **arguments}
    if settings.max_episode_steps is not None:
        arguments["max_episode_steps"] = settings.max_episode_steps
    known = pool.list_all_envs()
    if name not in known:
        matches = " or ".join(difflib.get_close_matches(name, known, n=3))
        hint = f"did you mean {matches}?" if matches else "envpool.list_all_envs() lists all"
        raise WorldError(f"{env}: envpool has no such environment; {hint}")
    make = partial(pool.make, name, env_type="gymnasium", num_envs=settings.num_envs, **arguments)
    with foreign(env, "making it"):
        return Pool(make)


def _given(env: GivenWorld) -> World:
    expected = "a gymnasium.vector.VectorEnv, or a function that makes one"
    if not callable(env) and not isinstance(env, VectorEnv):
        raise WorldError(f"the environment given is {type(env).__name__}; expected an id, {expected}")

    def made() -> VectorEnv[Any, Any, Any]:
        envs: object = env if isinstance(env, VectorEnv) else env()
        if not isinstance(envs, VectorEnv):
            raise WorldError(f"the environment given is {type(envs).__name__}; expected {expected}")
        set_apart(envs)
        return envs

    with foreign("the environment given", "making it"):
        envs = made()
    name = envs.spec.id if envs.spec is not None else type(envs.unwrapped).__name__
    return World(name, envs, form="as it was given", remake=None if isinstance(env, VectorEnv) else made)


def _load_wrapper(name: str) -> Callable[[Any], Any]:
    module, _, attribute = name.partition(":")
    try:
        wrapper: object = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a module runs the user's code when it is imported
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError.of("world.wrappers", name, "an importable module:Name", reason) from error
    if not callable(wrapper):
        raise ConfigError.of("world.wrappers", name, "something that can be called with an environment")
    return wrapper


def _close_matches(name: str) -> str:
    known = {known.lower(): known for known in gymnasium.registry}
    matches = [known[match] for match in difflib.get_close_matches(name.lower(), known, n=3)]
    return f" did you mean {' or '.join(matches)}?" if matches else ""
