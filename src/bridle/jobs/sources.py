"""Which files a job's settings name: what a resume compares by content. Imports no heavy library of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bridle.runs.depends import Sources, source_of

if TYPE_CHECKING:
    from gymnasium.vector import VectorEnv

    from bridle.control.making import GivenWorld, WorldSettings
    from bridle.language.adapters import LoraSettings
    from bridle.language.data import DataSettings
    from bridle.language.models import ModelSettings

__all__ = ["LANGUAGE", "of_data", "of_functions", "of_model", "of_world", "packages_of"]

LANGUAGE = ("transformers", "tokenizers")
"""Packages whose version may change what a language job computes."""

_OF_WORLDS = {"gymnasium.envs.mujoco": "mujoco", "gymnasium.envs.box2d": "box2d", "ale_py": "ale-py"}
"""Module of an environment → the package that computes it."""


def packages_of(lora: LoraSettings) -> tuple[str, ...]:
    """Packages whose version may change what a job computes that may train adapters."""
    return LANGUAGE if lora.rank is None else (*LANGUAGE, "peft")


def of_model(setting: str, model: ModelSettings) -> dict[str, Path]:
    """Return the folders and files that a model's settings name, of an adapter its base too; the model has been opened."""
    from bridle.language.models import adapter_of

    found = _folder(setting, model.path, "config.json", model.revision)
    adapter = adapter_of(model)
    if adapter is not None:
        found |= _folder(f"{setting}'s base", adapter.base, "config.json", adapter.revision)
    if model.tokenizer is not None:
        found |= _folder(f"{setting}.tokenizer", model.tokenizer, "tokenizer_config.json", None)
    if model.chat_template is not None:
        found[f"{setting}.chat_template"] = model.chat_template
    return found


def _folder(setting: str, source: str, sign: str, revision: str | None) -> dict[str, Path]:
    """The folder itself; of a model on the hub, which has been opened, its snapshot in the cache."""
    path = Path(source).expanduser()
    if path.is_dir():
        return {setting: path}
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(source, sign, revision=revision)
    except HFValidationError:  # no name of the hub: it will be refused where it is opened
        return {}
    return {setting: Path(cached).parent} if isinstance(cached, str) else {}


def of_data(named: Mapping[str, DataSettings]) -> Sources:
    """Return the files and the hub datasets that settings name, setting → where its data are."""
    files: dict[str, Path] = {}
    contents: dict[str, Callable[[], Mapping[str, str]]] = {}
    for setting, data in named.items():
        path = Path(data.path).expanduser()
        if path.is_file():
            files[setting] = path
        else:
            contents[setting] = partial(_of_hub, data)
    return Sources(files=files, contents=contents)


def _of_hub(data: DataSettings) -> dict[str, str]:
    from bridle.language.data.readers import hub_digest

    digest = hub_digest(data)
    return {} if digest is None else {f"{data.path} {data.split}": digest}


def of_functions(setting: str, names: Iterable[str]) -> dict[str, Path]:
    """Return the source file of each function, wrapper or judge that is named as ``module:function``."""
    found = {f"{setting} {name}": source_of(name) for name in names}
    return {setting: path for setting, path in found.items() if path is not None}


def of_world(env: GivenWorld | str, settings: WorldSettings, factory: str | None) -> Sources:
    """Return what an environment, its wrappers and the user's own networks are computed by; the world has been made."""
    files = of_functions("world.wrappers", settings.wrappers)
    files |= of_functions("network.factory", () if factory is None else (factory,))
    packages = ["gymnasium"]
    if not isinstance(env, str):
        return Sources(packages=tuple(packages), files=files | _code("env", env if callable(env) else type(env)))
    from gymnasium import registry

    spec = registry.get(env.rpartition(":")[2])
    if settings.vectorization == "envpool":
        packages.append("envpool")
    for entry in () if spec is None else (spec.entry_point, spec.vector_entry_point):
        if callable(entry):
            files |= _code("env", entry)
        elif isinstance(entry, str):
            packages += [package for module, package in _OF_WORLDS.items() if entry.startswith(module)]
            files |= of_functions("env", (entry,))
    return Sources(packages=tuple(dict.fromkeys(packages)), files=files)


def _code(setting: str, made: Callable[..., object] | type[VectorEnv[object, object, object]]) -> dict[str, Path]:
    """The source file of a class or function of the user's own."""
    try:
        path = inspect.getsourcefile(inspect.unwrap(made))
    except (TypeError, OSError):  # made in C, an object that can be called, or a class of a notebook's own
        return {}
    return {} if path is None or not Path(path).is_file() else {setting: Path(path)}
