"""Inputs out of inputs: JSON and the header of safetensors changed as a tree, anything changed as bytes.

:func:`vary` puts a value of the same kind in one place, which most readers take: what is behind them is reached.
:func:`mutate` puts something odd anywhere, which most refuse.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

__all__ = ["mutate", "vary"]

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "NaN", "-Infinity", "\ud800", "\0", "é", "../x", "/", "x" * 300, "1", "Box"),
    *([], {}, [[]], [None], {"": {}}, [1, "a", None], {"kind": "BoxPart"}, {"role": "user", "content": "a"}),
    json.loads("[" * 600 + "]" * 600),
)
TOKENS = (
    *(b"", b"\0", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"-"),
    *(b"9" * 400, b"9" * 5000, b"[" * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"--", b"="),
)
_ALIKE = (
    *(("F32", "I32", "U32"), ("F16", "BF16", "I16", "U16"), ("F64", "I64", "U64", "C64"), ("F4", "F6_E2M3", "F8_E8M0")),
    *(("NaN", "Infinity", "-Infinity"), ("start", "resume", "finish", "stop", "fail"), ("tanh", "relu", "gelu")),
)
"""Words that stand for one another."""
_CLASSES = (b"0123456789", b"abcdefghijklmnopqrstuvwxyz", b"ABCDEFGHIJKLMNOPQRSTUVWXYZ")

Change = Callable[[Any, Random], Any]


def vary(data: bytes, draws: Random) -> bytes:
    """Change one thing into another of its kind."""
    return _as_tree(data, draws, _another) or _as_letters(data, draws)


def mutate(data: bytes, draws: Random) -> bytes:
    """Change ``data`` once or a few times."""
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        change = draws.choices((_tree_or_bytes, _as_bytes, _as_lines), (6, 3, 1))[0]
        data = change(data, draws)
    return data


def _tree_or_bytes(data: bytes, draws: Random) -> bytes:
    return _as_tree(data, draws, _change) or _as_bytes(data, draws)


def _as_tree(data: bytes, draws: Random, change: Change) -> bytes | None:
    """Change the header of safetensors, or one line that holds JSON, or all of it; None where there is none."""
    if len(data) > 8 and 8 + (size := struct.unpack("<Q", data[:8])[0]) <= len(data):
        header = _changed(data[8 : 8 + size], draws, change)
        return header and struct.pack("<Q", len(header)) + header + data[8 + size :]
    lines = data.split(b"\n")
    place = draws.choice([number for number, line in enumerate(lines) if line] or [0])
    whole = _changed(data, draws, change)
    if whole is not None:
        return whole
    line = _changed(lines[place], draws, change)
    return None if line is None else b"\n".join([*lines[:place], line, *lines[place + 1 :]])


def _changed(text: bytes, draws: Random, change: Change) -> bytes | None:
    """Change what ``text`` holds as JSON; None where it holds none, or what came of it cannot be written."""
    try:
        written = json.dumps(change(json.loads(text), draws), ensure_ascii=draws.random() < 0.7)
    except (ValueError, OverflowError, RecursionError):  # 5,000 digits, or nested too deeply
        return None
    return written.encode("utf-8", "surrogatepass")


def _as_lines(data: bytes, draws: Random) -> bytes:
    """Leave a line out, say it twice, or move it."""
    lines = data.split(b"\n")
    line = lines.pop(draws.randrange(len(lines)))
    for _ in range(draws.choice((0, 1, 1, 2))):
        lines.insert(draws.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


def _another(value: Any, draws: Random) -> Any:
    """Go down to one leaf and put another of its kind there, or turn or repeat what is on the way."""
    if isinstance(value, dict) and value and draws.random() < 0.95:
        name = draws.choice(list(value))
        return {**value, name: _another(value[name], draws)}
    if isinstance(value, list) and value and draws.random() < 0.8:
        place = draws.randrange(len(value))
        return [*value[:place], _another(value[place], draws), *value[place + 1 :]]
    match value:
        case bool():
            return not value
        case int() | float():
            near = (value * 2, value + 1, value - 1, value * 0.5, 0, 1, 0.5, 2)
            return type(value)(draws.choice(near)) if abs(value) < 1e9 else value
        case str():
            alike = [word for words in _ALIKE if value in words for word in words]
            return draws.choice(alike or [value + "a", value[::-1], value * 2, "a", "é \n\t", "\u2028", "🙂"])
        case list():
            return draws.choice((value[::-1], value * 2, value[:-1]))
        case dict():
            return dict(reversed(value.items()))
    return draws.choice((None, 1, 0.5, "a"))


def _change(value: Any, draws: Random) -> Any:
    """Go down to somewhere and put something odd there, or leave something out, or say it twice."""
    if isinstance(value, dict) and value and draws.random() < 0.9:
        name = draws.choice(list(value))
        match draws.randrange(8):
            case 0:
                return {key: item for key, item in value.items() if key != name}
            case 1:
                return {**value, draws.choice(("", name + "x", name[:-1], "kind", "\ud800")): value[name]}
            case _:
                return {**value, name: _change(value[name], draws)}
    if isinstance(value, list) and value and draws.random() < 0.8:
        place = draws.randrange(len(value))
        match draws.randrange(6):
            case 0:
                return value[:place] + value[place + 1 :]
            case 1:
                return value[:place] + [value[place]] * draws.choice((2, 2, 50)) + value[place + 1 :]
            case _:
                return [*value[:place], _change(value[place], draws), *value[place + 1 :]]
    if isinstance(value, int | float) and not isinstance(value, bool) and draws.random() < 0.3:
        return draws.choice((-value, value + 1, value * 1000, float(value), str(value), [value]))
    return draws.choice(ODD)


def _as_letters(data: bytes, draws: Random) -> bytes:
    """Put a digit for a digit, or a letter for a letter; any byte where there are none."""
    places = [place for place, byte in enumerate(data) if any(byte in letters for letters in _CLASSES)]
    if not places:
        return _as_bytes(data, draws)
    place = draws.choice(places)
    letters = next(letters for letters in _CLASSES if data[place] in letters)
    return data[:place] + bytes([draws.choice(letters)]) + data[place + 1 :]


def _as_bytes(data: bytes, draws: Random) -> bytes:
    start = draws.randrange(len(data) + 1)
    end = min(len(data), start + draws.choice((0, 1, 1, 2, 8, 64)))
    match draws.randrange(5):
        case 0:
            return data[:start] + data[end:]
        case 1:
            return data[:start] + draws.choice(TOKENS) + data[end:]
        case 2:
            return data[:start] + data[start:end] * draws.choice((2, 30)) + data[end:]
        case 3:
            return data[:start] + bytes(draws.randrange(256) for _ in range(end - start)) + data[end:]
        case _:
            return data[:start]
