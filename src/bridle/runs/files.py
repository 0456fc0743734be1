"""How a run writes and reads its files: whole or not at all, JSON and safetensors only.

JSON has no NaN or infinity. They are written as the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``; ``null`` is
kept for "not measured". In metrics, timing and single JSON files they are read back as floats, and a text that is one
of those three is refused there. In samples and events, which hold text that anybody may have written, they stay
strings. Columns of numbers may be tensors there, whose float32 are written in as few digits as tell them apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import orjson

from bridle.errors import RunError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "Json",
    "JsonObject",
    "append_line",
    "file_digest",
    "json_digest",
    "load_json",
    "load_tensors",
    "read_line",
    "read_lines",
    "save_json",
    "save_tensors",
    "step_of",
    "sync_tree",
    "write_lines",
    "write_samples",
    "write_text",
]

_ALLOWED = "None, bool, int, float, str, or lists and string-keyed mappings of these"

Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]
"""A value that the run's files can hold."""
JsonObject = dict[str, Json]
"""A JSON object as read back."""

_ALIGNMENT = 64
"""Bytes: where PyTorch lays a tensor's memory, its address is a multiple of this."""

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _encode(value: object, *, texts: bool) -> object:
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str) and value in _SPECIAL and not texts:
        raise ValueError(f"the text {value!r} is how a number that is not finite is written; it cannot be told apart")
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): _encode(item, texts=texts) for key, item in value.items()}
    if isinstance(value, list | tuple):
        kinds = set(map(type, value))
        if kinds <= {int, bool} or (kinds == {float} and math.isfinite(sum(value))):  # a sample's many columns
            return value
        return [_encode(item, texts=texts) for item in value]
    raise TypeError(f"{type(value).__name__} cannot be written as JSON; give {_ALLOWED}")


def _decode(value: object) -> Json:
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return cast(Json, value)


def _dumps(value: object, *, texts: bool = False, indent: int | None = None) -> bytes:
    encoded = _encode(value, texts=texts)
    text = json.dumps(encoded, ensure_ascii=False, allow_nan=False, indent=indent)
    try:
        return text.encode()
    except UnicodeEncodeError:  # a lone surrogate, as user JSON may hold: only the \u escape can carry it
        return json.dumps(encoded, ensure_ascii=True, allow_nan=False, indent=indent).encode()


def _dumps_sample(row: Mapping[str, Json | Tensor]) -> bytes:
    from torch import Tensor

    columns = {name: item for name, item in row.items() if isinstance(item, Tensor)}
    there = {str(name): _encode(item, texts=True) for name, item in row.items() if name not in columns}
    arrays = {name: column.numpy(force=True) for name, column in columns.items()}
    try:
        line = orjson.dumps(there | arrays, option=orjson.OPT_SERIALIZE_NUMPY)
    except orjson.JSONEncodeError:  # a lone surrogate, a number beyond 64 bits, much nesting
        line = None
    if line is None or (b"null" in line and not all(column.isfinite().all() for column in columns.values())):
        return _dumps(there | {name: column.tolist() for name, column in columns.items()}, texts=True)
    return line


def sync(path: Path) -> None:
    """Make a file's or directory's content durable (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Make a folder durable: every file, then every directory from the inside out."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(root, name))
        sync(Path(root))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: beside it, fsync, rename over it."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole, in UTF-8: a reader sees the old content or the new, never a part."""
    write_bytes(path, text.encode())


def save_json(path: Path, value: Json) -> None:
    """Write one JSON value whole; NaN and infinities as the module says."""
    write_bytes(path, _dumps(value, indent=2) + b"\n")


def load_json(path: Path) -> Json:
    """Read what :func:`save_json` wrote; raises :class:`RunError` where the file is missing or damaged."""
    try:
        return _decode(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise RunError(f"{path} is missing; the run or checkpoint is not whole") from None
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is not valid JSON ({error}); restore it or start a new run") from None


def append_line(path: Path, value: Mapping[str, Json], *, texts: bool = False) -> None:
    """Append one JSON object as a line, in a single write, so that a crash can tear the last line only.

    Where the system refuses (a full disk takes the first part of a line), the file is as it was before.
    """
    left = _dumps(value, texts=texts) + b"\n"
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            while left:
                left = left[file.write(left) :]
        except OSError:
            os.ftruncate(file.fileno(), before)
            raise


def write_lines(path: Path, values: Iterable[Mapping[str, Json]], *, texts: bool = False) -> None:
    """Write a JSONL file whole."""
    write_bytes(path, b"".join(_dumps(value, texts=texts) + b"\n" for value in values))


def write_samples(path: Path, rows: Iterable[Mapping[str, Json | Tensor]]) -> None:
    """Write a JSONL file of texts, and of columns of numbers as tensors [N], whole, with no spaces between."""
    write_bytes(path, b"".join(_dumps_sample(row) + b"\n" for row in rows))


def read_line(line: bytes, *, texts: bool = False) -> JsonObject | None:
    """Read one JSON object, NaN and infinities as the module says; None where the line holds none, or one nested too deeply."""
    try:
        row = json.loads(line)
        if isinstance(row, dict):
            return row if texts else {name: _decode(item) for name, item in row.items()}
    except (ValueError, RecursionError):
        pass
    return None


def step_of(row: Mapping[str, Json]) -> int | None:
    """A record's step; None where it has none."""
    step = row.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def read_lines(path: Path, *, texts: bool = False, lenient: bool = False) -> list[JsonObject]:
    """Read a JSONL file; a missing file is empty and a torn last line is left out; with ``lenient`` every damaged one is.

    Raises :class:`RunError` with the line number where a complete line is not a JSON object.
    """
    if not path.exists():
        return []
    try:
        *complete, _ = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RunError(f"{path} cannot be read ({error.strerror}); make it readable") from None
    rows: list[JsonObject] = []
    for number, line in enumerate(complete, start=1):
        row = read_line(line, texts=texts)
        if row is not None:
            rows.append(row)
        elif not lenient:
            raise RunError(f"{path} line {number} is damaged; delete that line to go on without it")
    return rows


def drop_torn_line(path: Path) -> bool:
    """Cut off a last line without its newline; True if there was one."""
    if not path.exists():
        return False
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole == len(content):
        return False
    os.truncate(path, whole)
    return True


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_digest(value: Json) -> str:
    """SHA-256 of a JSON value, in hex; the order of an object's names counts."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file; those that share memory (tied weights) each in full."""
    from safetensors.torch import save_file

    seen: set[int] = set()
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        if whole.untyped_storage().data_ptr() in seen:
            whole = whole.clone()
        seen.add(whole.untyped_storage().data_ptr())
        plain[name] = whole
    save_file(plain, path)


def load_tensors(path: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Read what :func:`save_tensors` wrote; raises :class:`RunError` where the file is missing or damaged.

    A file lays tensors at any multiple of 8 bytes, and a product of small matrices rounds otherwise where they do not
    lie as PyTorch lays its own: those that do not are moved, so that a resumed run computes as the one that saved them.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device=device)
    except FileNotFoundError:
        raise RunError(f"{path} is missing; the run or checkpoint is not whole") from None
    except SafetensorError as error:
        raise RunError(f"{path} is not a whole safetensors file ({error}); use an older checkpoint") from None
    return {name: tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor for name, tensor in tensors.items()}
