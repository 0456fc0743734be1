"""A job's settings as JSON and back: nested frozen dataclasses, nothing else.

``to_dict`` gives what config.json keeps, ``from_dict`` builds the dataclass again and refuses what does not fit, naming
the key. Known types: bool, int, float, str, Path, Enum, Literal, None, unions of them, tuples, mappings from str, and
dataclasses of these.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

from bridle.errors import ConfigError
from bridle.runs.files import Json

__all__ = ["from_dict", "require_sane", "to_dict"]

T = TypeVar("T")

LARGEST = 2**63 - 1
"""No count, seed or size is larger: what computes with them holds 64 bits."""


def to_dict(config: object) -> dict[str, Json]:
    """Lay a dataclass out as JSON values, keyed by field."""
    if not dataclasses.is_dataclass(config):
        raise TypeError(f"{type(config).__name__} is not a dataclass")
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: object) -> Json:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Enum):
        return _plain(value.value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    raise TypeError(f"a setting of type {type(value).__name__} cannot be kept in config.json")


def require_sane(config: object) -> None:
    """Refuse settings that hold a number which is not finite, or a whole one beyond 64 bits.

    A comparison with NaN is never true, so range checks miss it. Raises :class:`ConfigError` naming the field.
    """
    for name, number in _numbers(config, ""):
        option = f"leave --{name.replace('_', '-')} out for its default"
        if isinstance(number, float) and not math.isfinite(number):
            raise ConfigError.of(name, number, "a finite number", option)
        if isinstance(number, int) and abs(number) > LARGEST:
            raise ConfigError(
                f"{name} has {len(str(abs(number)))} digits: expected a whole number of 64 bits; {option}"
            )


def _numbers(value: object, name: str) -> Iterator[tuple[str, float | int]]:
    """List every number of the settings with its name."""
    if isinstance(value, float | int):
        yield name, value
    elif isinstance(value, tuple):
        for item in value:
            yield from _numbers(item, name)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _numbers(getattr(value, field.name), f"{name}.{field.name}" if name else field.name)


def from_dict(cls: type[T], values: Mapping[str, Json]) -> T:
    """Build ``cls`` from what :func:`to_dict` gave.

    Raises :class:`ConfigError` naming the key where one is unknown, missing or of the wrong type; a dataclass's own
    ``__post_init__`` may raise it too.
    """
    return _build(cls, values, "")


def _build(cls: type[T], values: Mapping[str, Json], prefix: str) -> T:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in values:
        if key not in fields:
            near = get_close_matches(key, fields, 1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(fields)}"
            raise ConfigError(f"{prefix}{key} is not a setting of {cls.__name__}; {hint}")
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in values:
            raise ConfigError(f"{prefix}{name} is missing; it has no default")
    return cls(**{key: _typed(hints[key], value, f"{prefix}{key}") for key, value in values.items()})


def _typed(kind: Any, value: Json, name: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _member(arguments, value, name)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError.of(name, value, "one of " + ", ".join(map(str, arguments)))
        return value
    if origin is tuple and isinstance(value, list):
        return _tuple(arguments, value, name)
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        return {key: _typed(arguments[1], item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(kind, type) and _fits(kind, value):
        return _scalar(kind, value, name)
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    if dataclasses.is_dataclass(kind):
        names = ", ".join(field.name for field in dataclasses.fields(kind)[:3])
        expected = f"a group of settings by name ({names}, …)"
    raise ConfigError.of(name, value, expected)


def _fits(kind: type, value: Json) -> bool:
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    if kind is types.NoneType:
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, str)
    return issubclass(kind, Enum) or (kind in (bool, str) and isinstance(value, kind))


def _scalar(kind: type, value: Json, name: str) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return _build(kind, value, f"{name}.")
    if kind is types.NoneType:
        return None
    if issubclass(kind, Enum) and value not in [member.value for member in kind]:
        raise ConfigError.of(name, value, "one of " + ", ".join(str(member.value) for member in kind))
    try:
        return kind(value)
    except OverflowError:
        raise ConfigError(f"{name}: expected a number that a float can hold") from None


def _member(arguments: tuple[Any, ...], value: Json, name: str) -> Any:
    """Take the first member of a union that the value fits; exact types before int-as-float."""
    if value is None and types.NoneType in arguments:
        return None
    exact = [kind for kind in arguments if kind is type(value)]
    refusal = ConfigError.of(name, value, " or ".join(getattr(kind, "__name__", str(kind)) for kind in arguments))
    for kind in [*exact, *(kind for kind in arguments if kind is not types.NoneType)]:
        try:
            return _typed(kind, value, name)
        except ConfigError as error:
            if dataclasses.is_dataclass(kind):
                refusal = error
    raise refusal


def _tuple(arguments: tuple[Any, ...], value: list[Json], name: str) -> tuple[Any, ...]:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        return tuple(_typed(arguments[0], item, f"{name}[{i}]") for i, item in enumerate(value))
    if len(arguments) != len(value):
        raise ConfigError.of(name, value, f"{len(arguments)} values")
    return tuple(
        _typed(kind, item, f"{name}[{i}]") for i, (kind, item) in enumerate(zip(arguments, value, strict=True))
    )
