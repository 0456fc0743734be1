"""Targets that read what users write: files of data, settings, and command lines."""

from __future__ import annotations

import dataclasses
import json
import shlex
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from bridle.cli.arguments import parse
from bridle.cli.main import COMMANDS
from bridle.errors import RunError
from bridle.jobs.commands import command
from bridle.jobs.config import from_dict, require_sane, to_dict
from bridle.jobs.control import ControlConfig
from bridle.jobs.ppo import PPOConfig
from bridle.jobs.reward import RewardConfig
from bridle.jobs.session import RunSettings
from bridle.jobs.sft import SFTConfig
from bridle.language.data import (
    DataSettings,
    read_demonstrations,
    read_preferences,
    read_prompts,
    read_rankings,
)
from bridle.language.models import ModelSettings
from bridle.language.scorers import RewardSettings
from bridle.runs.files import load_json, save_json
from tests.fuzz.mutate import vary
from tests.fuzz.target import Target

__all__ = ["CONFIGS", "TARGETS"]

_RUN = RunSettings(dir=Path("r"))
CONFIGS: dict[str, Any] = {
    "ppo": PPOConfig(
        run=_RUN,
        model=ModelSettings(path="m"),
        prompts=DataSettings(path="p.jsonl"),
        reward=RewardSettings(functions=("a:b",), weights=(1.0,)),
    ),
    "reward": RewardConfig(run=_RUN, model=ModelSettings(path="m"), data=DataSettings(path="d.csv")),
    "sft": SFTConfig(run=_RUN, model=ModelSettings(path="m"), data=DataSettings(path="d.json.gz")),
    "train": ControlConfig(),
}


def _nothing(folder: Path) -> None:
    pass


_KINDS = (".jsonl", ".json", ".csv", ".jsonl.gz", ".parquet")
_READERS: tuple[Callable[[DataSettings], Any], ...] = (
    read_demonstrations,
    read_prompts,
    read_preferences,
    read_rankings,
)


def _data(data: bytes, folder: Path) -> None:
    """The first byte picks reader and kind of file; what is read from JSONL is written and read again."""
    pick = data[0] if data else 0
    kind, reader = _KINDS[pick // 4 % len(_KINDS)], _READERS[pick % 4]
    path = folder / f"d{kind}"
    path.write_bytes(data[1:])
    records = reader(DataSettings(path=str(path))).items
    rows = [dataclasses.asdict(record) for record in records]
    for row in rows:
        assert row.pop("place")
        json.dumps(row, default=str).encode("utf-8", "surrogatepass")
    if kind == ".jsonl" and reader is not read_prompts:
        again = folder / "again.jsonl"
        again.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = [dataclasses.asdict(record) for record in reader(DataSettings(path=str(again))).items]
        assert [{**row, "place": ""} for row in found] == [{**row, "place": ""} for row in rows]


def _data_seeds(folder: Path) -> list[bytes]:
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
    rows = [
        [{"prompt": "a", "answer": "b", "x": [1, {"y": None}]}, talk],
        [{"prompt": "a", "level": 3}, {**talk, "solution": 1.5}],
        [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 0.5, "ended": [True, False]}],
        [{"prompt": talk["messages"], "answers": ["a", "b", "c"], "ended": [True, False, True]}],
    ]
    lines = ["".join(json.dumps(row) + "\n" for row in some).encode() for some in rows]
    dialogues = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    return [
        *(bytes([number]) + text for number, text in enumerate(lines)),
        *(bytes([4 + number]) + json.dumps(some).encode() for number, some in enumerate(rows)),
        bytes([2]) + json.dumps(dialogues).encode(),
        bytes([8]) + b'prompt,answer\na,"b, ""c"""\n"d\ne",f\n',
        bytes([10]) + b"prompt,chosen,rejected,margin\na,b,c,0.5\n",
    ]


def _config(data: bytes, folder: Path) -> None:
    """The first byte picks the job; settings that are accepted stay the same through config.json."""
    kept = CONFIGS[list(CONFIGS)[(data[0] if data else 0) % len(CONFIGS)]]
    (folder / "asked.json").write_bytes(data[1:])
    values = load_json(folder / "asked.json")
    if not isinstance(values, dict):
        raise RunError("no settings")
    config = from_dict(type(kept), values)
    require_sane(config)
    save_json(folder / "c.json", to_dict(config))
    written = load_json(folder / "c.json")
    assert isinstance(written, dict)
    assert from_dict(type(kept), written) == config


def _config_seeds(folder: Path) -> list[bytes]:
    return [bytes([number]) + json.dumps(to_dict(kept)).encode() for number, kept in enumerate(CONFIGS.values())]


def _groups(config: Any) -> Iterator[Any]:
    """The settings inside settings, each once."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from (value, *_groups(value))


_PARSED: dict[str, Any] = {
    **{type(group).__name__: group for kept in CONFIGS.values() for group in _groups(kept)},
    **CONFIGS,
}
"""Name → settings that are parsed: the jobs, and what they consist of, which takes a tenth of the time."""


def _words(data: bytes, folder: Path) -> None:
    """Arguments, one a line, the first of them the job or the group; what is accepted comes from its own command line again."""
    first, *arguments = data.decode("utf-8", "surrogateescape").split("\n")
    job = first if first in _PARSED else "OptimSettings"
    kept = _PARSED[job]
    if {"-h", "--help"} & set(arguments) or any(word.startswith("--tyro") for word in arguments):
        return
    positional = COMMANDS[job].positional if job in COMMANDS else None
    config = parse(type(kept), arguments, program=f"bridle {job}", positional=positional)
    again = shlex.split(command(job, config))[2:]
    assert parse(type(kept), again, program=f"bridle {job}") == config


def _words_seeds(folder: Path) -> list[bytes]:
    found = [b"\n".join(map(str.encode, shlex.split(command(job, kept))[1:])) for job, kept in _PARSED.items()]
    more = "train\nCartPole-v1\n--optim.lr=1e-3\n--network.hidden\n32\n16\n--normalise-observations\n--ppo.clip\nNone"
    return [*found, more.encode()]


def _another_option(data: bytes, draws: Random) -> bytes:
    """Give one option more, with a word that its kind allows; seldom another letter for a letter."""
    kept = _PARSED.get(data.split(b"\n")[0].decode(errors="replace"))
    if kept is None or draws.random() < 0.2:
        return vary(data, draws)
    name, kind = draws.choice(list(_kinds(type(kept), "")))
    if kind is bool:
        group, _, last = name.rpartition(".")
        words = [name if draws.random() < 0.5 else f"{group}.no-{last}" if group else f"no-{last}"]
    else:
        words = [name, *_allowed(kind, draws)]
    return "\n".join([data.decode("utf-8", "surrogateescape"), f"--{words[0]}", *words[1:]]).encode(
        "utf-8", "surrogateescape"
    )


def _kinds(config_class: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """Every option's name and type."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        kind, name = hints[field.name], prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _kinds(kind, f"{name}.")
        else:
            yield name, kind


def _allowed(kind: Any, draws: Random) -> list[str]:
    """Words that an option of a type may be given."""
    origin, members = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return [word for _ in range(draws.choice((0, 1, 2))) for word in _allowed(members[0], draws)]
    if origin is typing.Literal:
        return [str(draws.choice(members))]
    if members:  # a union
        return _allowed(draws.choice(members), draws)
    numbers = {int: ("0", "1", "2", "7", "64", "1000"), float: ("0", "0.01", "0.5", "0.99", "1", "2", "1e-3")}
    return [draws.choice({**numbers, type(None): ("None",)}.get(kind, ("a", "b:c", "d/e.jsonl", "é", "")))]


TARGETS = (
    Target(
        name="data",
        reads=("language/data/readers.py", "language/data/records.py"),
        prepare=_nothing,
        seeds=_data_seeds,
        run=_data,
        head=1,
    ),
    Target(name="config", reads=("jobs/config.py",), prepare=_nothing, seeds=_config_seeds, run=_config, head=1),
    Target(
        name="words",
        reads=("cli/arguments.py", "jobs/commands.py"),
        prepare=_nothing,
        seeds=_words_seeds,
        run=_words,
        alike=_another_option,
    ),
)
