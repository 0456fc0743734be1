"""Rows out of a file or a hub dataset: one mapping each, with a name that the user can find it by."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import IO, TYPE_CHECKING, Literal, cast

from bridle.errors import ConfigError, DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["DataSettings", "Row", "hub_digest", "read_rows"]

_HASHED_AT_ONCE = 1000
"""Rows of a dataset that are held while they are hashed."""

_MOST_LEVELS = 100
"""Lists and objects inside one another; who goes through a value by recursion must come to its end."""

_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """Where the data are, and what their columns are called."""

    path: str
    """File (.jsonl, .json, .parquet or .csv; the text ones also .gz), or name of a hub dataset."""
    subset: str | None = None
    """Subset (configuration) of a hub dataset that has several."""
    split: str = "train"
    """Split of a hub dataset."""
    limit: int | None = None
    """Rows to read at most, from the first."""
    long: Literal["refuse", "drop", "truncate_left"] = "refuse"
    """What to do with what is longer than the context: an error, leave it out, or cut the prompt's beginning."""
    prompt: str = "prompt"
    """Column of the prompt: text or messages."""
    answer: str = "answer"
    """Column of the demonstrated answer: text."""
    messages: str = "messages"
    """Column of a whole chat: a list of {role, content}; used where it exists."""
    chosen: str = "chosen"
    """Column of the better answer: text, a whole dialogue as text, or messages."""
    rejected: str = "rejected"
    """Column of the worse answer, in the same form."""
    margin: str = "margin"
    """Column of how much better the better answer is, in units of score, >= 0; used where it exists."""
    answers: str = "answers"
    """Column of the ranked answers, best first: a list of texts."""
    ended: str = "ended"
    """Column of one true or false per compared answer, false where a limit cut it; used where it exists."""

    def __post_init__(self) -> None:
        """Refuse an empty name and a limit below 1."""
        if not self.path:
            raise ConfigError.of("path", self.path, "a file or the name of a hub dataset")
        if self.limit is not None and self.limit < 1:
            raise ConfigError.of("limit", self.limit, "a number of rows >= 1", "leave it out to read them all")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One record as it was found."""

    place: str
    """where it is: 'FILE line 3'."""
    values: Mapping[str, object]
    """column → value."""

    def __getitem__(self, column: str) -> object:
        """Return a column's value; raises DataError naming the columns there are."""
        if column not in self.values:
            have = ", ".join(self.values) or "none"
            raise DataError(
                f"{self.place} has no column {column!r} (it has: {have}); name the right one: --data.…, in ppo --prompts.…"
            )
        return self.values[column]

    def text(self, column: str) -> str:
        """Return a column that must be text."""
        value = self[column]
        if not isinstance(value, str):
            raise self.wrong(column, value, "text")
        return self.whole(column, value)

    def whole(self, column: str, text: str) -> str:
        """Return ``text`` of a column if every character is one; JSON's escapes can write half of a surrogate pair."""
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(
                f"{self.place}: {column!r} holds half of a surrogate pair (\\ud800 …); write the character whole"
            )
        return text

    def wrong(self, column: str, value: object, expected: str) -> DataError:
        """Make the error for a column of the wrong type."""
        return DataError(f"{self.place}: {column!r} is {_named(value)}, expected {expected}")


def _named(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "missing" if value is None else names.get(type(value), type(value).__name__)


def read_rows(settings: DataSettings) -> tuple[Row, ...]:
    """Read the rows of a file or of a hub dataset.

    Raises DataError in one line: no such file, a folder, another kind of file, not UTF-8, a malformed line (with its
    number), something that is no record, or nothing at all.
    """
    with _reachable(settings.path):
        path, mode = _path_and_mode(settings.path)
        inside = sorted(file.name for file in path.iterdir() if _kind(file) is not None) if path.is_dir() else []
    if mode is not None and S_ISDIR(mode):
        remedy = f"name one of its files ({', '.join(inside[:5])})" if inside else "name a file"
        raise DataError(f"{settings.path} is a folder; {remedy}")
    kind = _kind(path)
    if _is_of_hub(settings.path, path, mode):
        rows = _hub_rows(settings.path, settings.subset, settings.split)
    elif mode is None:
        raise DataError(f"{settings.path}: no such file")
    elif kind is None:
        raise DataError(
            f"{settings.path}: unknown kind of file; known are {', '.join(_SUFFIXES)}, the text ones also .gz"
        )
    elif not S_ISREG(mode):
        raise DataError(f"{settings.path} is no regular file (a pipe or a device); save the records in one")
    else:
        rows = _file_rows(path, kind)
    found = tuple(islice(rows, settings.limit))
    if not found:
        raise DataError(f"{settings.path} holds no records")
    return found


def hub_digest(settings: DataSettings) -> str | None:
    """SHA-256 over the rows that :func:`read_rows` reads of a hub dataset, by their content; None for a file.

    A revision or the library's own fingerprint would not do: both change with a README, and neither says what was read.
    Raises DataError where the dataset cannot be had.
    """
    with _reachable(settings.path):
        path, mode = _path_and_mode(settings.path)
    if not _is_of_hub(settings.path, path, mode):
        return None
    digest = hashlib.sha256()
    found = _hub_dataset(settings.path, settings.subset, settings.split).with_format("arrow")  # images stay undecoded
    count = len(found) if settings.limit is None else min(settings.limit, len(found))
    for first in range(0, count, _HASHED_AT_ONCE):
        for row in found[first : min(first + _HASHED_AT_ONCE, count)].to_pylist():
            digest.update(json.dumps(row, default=_hashed, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _hashed(value: object) -> str:
    """Stand in for what JSON cannot write: bytes, dates, decimals."""
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else f"{type(value).__name__} {value}"


def _path_and_mode(name: str) -> tuple[Path, int | None]:
    path = Path(name).expanduser()
    return path, path.stat().st_mode if path.exists() else None


def _is_of_hub(name: str, path: Path, mode: int | None) -> bool:
    return _kind(path) is None and mode is None and path.suffix == "" and name.count("/") <= 1


@contextmanager
def _reachable(name: str) -> Iterator[None]:
    """Tell why a path cannot even be asked for: a folder that may not be entered, a name too long."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{name if len(name) <= 80 else name[:77] + '...'} cannot be reached: {reason}") from error


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        return suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES and suffixes[-1] != ".parquet" else None
    return suffixes[-1] if suffixes and suffixes[-1] in _SUFFIXES else None


def _file_rows(path: Path, kind: str) -> Iterator[Row]:
    readers: dict[str, Callable[[Path], Iterator[Row]]] = {
        ".jsonl": _jsonl_rows,
        ".json": _json_rows,
        ".parquet": _parquet_rows,
        ".csv": _csv_rows,
    }
    try:
        yield from readers[kind](path)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {' '.join(str(error).split())}") from error


def _open(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else path.open("rb")


def _decode(line: bytes, place: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is not UTF-8 (byte {error.start + 1}); save the file as UTF-8") from error


def _parse(text: str, place: str) -> object:
    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise DataError(f"{place} has the key {twice!r} twice; which of them counts cannot be told: keep one")
        return found

    deep = f"{place} is nested too deeply; at most {_MOST_LEVELS} lists and objects may lie inside one another"
    try:
        value: object = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        where = f"{place} line {error.lineno}" if error.lineno > 1 else place
        raise DataError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
    except RecursionError as error:
        raise DataError(deep) from error
    except DataError:
        raise
    except ValueError as error:  # Python reads no whole number beyond 4,300 digits
        raise DataError(f"{place} holds a number that is too long: {error}") from error
    if text.count("[") + text.count("{") > _MOST_LEVELS and _is_deep(value):
        raise DataError(deep)
    return value


def _is_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [inner for one in level for inner in _inside(one)]
        if not level:
            return False
    return True


def _inside(value: object) -> Iterable[object]:
    return value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()


def _row(value: object, place: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(f'{place} is {_named(value)}, expected an object: {{"column": value, …}}')
    return Row(place=place, values=value)


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            place = f"{path} line {number}"
            text = _decode(line, place).removeprefix("\ufeff").strip()
            if text:
                yield _row(_parse(text, place), place)


def _json_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        records = _parse(_decode(file.read(), str(path)).removeprefix("\ufeff"), str(path))
    if not isinstance(records, list):
        raise DataError(f"{path} is {_named(records)}, expected a list of objects; is it .jsonl?")
    for number, record in enumerate(records, start=1):
        place = f"{path} item {number}"
        yield _row(record, place)


def _csv_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:
        lines = (_decode(line, f"{path} line {n}").removeprefix("\ufeff") for n, line in enumerate(file, start=1))
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, None)
            if header is None:
                return
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice:
                raise DataError(f"{path}: the header names {twice[0]!r} twice; give each column its own name")
            for fields in reader:
                place = f"{path} line {reader.line_num}"
                if fields and len(fields) != len(header):
                    raise DataError(f"{place} has {len(fields)} fields, the header {len(header)}")
                if fields:
                    yield Row(place=place, values=dict(zip(header, fields, strict=True)))
        except csv.Error as error:
            raise DataError(f"{path} line {reader.line_num} is not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    number += 1
                    yield Row(place=f"{path} row {number}", values=values)
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not Parquet: {' '.join(str(error).split())}") from error


def _hub_rows(name: str, subset: str | None, split: str) -> Iterator[Row]:
    for number, values in enumerate(_hub_dataset(name, subset, split), start=1):
        yield Row(place=f"{name} {split} row {number}", values=values)


@lru_cache(maxsize=8)  # what is read is what was hashed, whatever the hub has by then
def _hub_dataset(name: str, subset: str | None, split: str) -> Dataset:
    import datasets

    from bridle.language.models import quiet

    datasets.disable_progress_bars()
    try:
        with quiet():
            return datasets.load_dataset(name, subset, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"{name} is neither a file nor a dataset that can be had: {reason}") from error
