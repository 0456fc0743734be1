"""Inputs out of inputs: JSON changed as a tree, anything changed as bytes."""

from __future__ import annotations

import json
from random import Random
from typing import Any

__all__ = ["mutate"]

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 2**64, 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), "", "NaN", "-Infinity", "\ud800", "\0", "é", "../x", "/", "x" * 300, "1", "Box"),
    *([], {}, [[]], [None], {"": {}}, [1, "a", None], {"kind": "BoxPart"}, {"role": "user", "content": "a"}),
)
TOKENS = (
    *(b"", b"\0", b"\n", b"\r\n", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"NaN", b"1e999", b"-"),
    *(b"9" * 400, b"9" * 5000, b"[" * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"--", b"="),
)


def mutate(data: bytes, draws: Random) -> bytes:
    """Change ``data`` once or a few times."""
    for _ in range(draws.choice((1, 1, 1, 2, 4))):
        change = draws.choices((_as_tree, _as_bytes, _as_lines), (6, 3, 1))[0]
        data = change(data, draws)
    return data


def _as_tree(data: bytes, draws: Random) -> bytes:
    """Change one line that holds JSON, or all of it; what is none is changed as bytes."""
    lines = data.split(b"\n")
    place = draws.randrange(len(lines))
    for whole in (True, False):
        try:
            value = json.loads(data if whole else lines[place])
        except (ValueError, RecursionError):
            continue
        try:
            changed = json.dumps(_change(value, draws), ensure_ascii=draws.random() < 0.7)
        except (ValueError, OverflowError, RecursionError):  # 5,000 digits, or nested too deeply to be written
            break
        text = changed.encode("utf-8", "surrogatepass")
        return text if whole else b"\n".join([*lines[:place], text, *lines[place + 1 :]])
    return _as_bytes(data, draws)


def _as_lines(data: bytes, draws: Random) -> bytes:
    """Leave a line out, say it twice, or move it."""
    lines = data.split(b"\n")
    line = lines.pop(draws.randrange(len(lines)))
    for _ in range(draws.choice((0, 1, 1, 2))):
        lines.insert(draws.randrange(len(lines) + 1), line)
    return b"\n".join(lines)


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
