"""What is fuzzed: whatever the input, a target returns or raises a :class:`~bridle.errors.UserError` of one line.

A target also asserts what holds of every input that is accepted: read again after writing, it is the same.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bridle.cli.arguments import parse
from bridle.cli.listing import _row, event_rows, find_runs
from bridle.cli.main import COMMANDS
from bridle.cli.plain import plain
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.saved import Agent, load_policy, save_policy
from bridle.control.spaces import action_spec, observation_spec
from bridle.core.moments import Moments
from bridle.errors import RunError, UserError
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
from bridle.runs import Run
from bridle.runs.checkpoints import verify, write_manifest
from bridle.runs.files import load_json, load_tensors, save_json, save_tensors

__all__ = ["TARGETS", "Target", "try_one"]

_RUN = RunSettings(dir=Path("r"))
_CONFIGS: dict[str, Any] = {
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that reads what a user, or anybody else, has written."""

    name: str
    """what it is called."""
    prepare: Callable[[Path], None]
    """fills an empty folder, once."""
    seeds: Callable[[Path], list[bytes]]
    """sound inputs to begin with, from that folder."""
    run: Callable[[bytes, Path], None]
    """takes one input in that folder."""
    reads: tuple[str, ...]
    """modules under ``bridle`` that it is to reach."""


def try_one(target: Target, data: bytes, folder: Path) -> str:
    """Let the target take ``data``; return its refusal, "" if it took it. Whatever else it raises is a crash."""
    try:
        target.run(data, folder)
    except UserError as error:
        text = str(error)
        assert text, "a refusal without words"
        assert len(text) < 20_000, "a refusal without end"
        return text
    return ""


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
    kept = _CONFIGS[list(_CONFIGS)[(data[0] if data else 0) % len(_CONFIGS)]]
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
    return [bytes([number]) + json.dumps(to_dict(kept)).encode() for number, kept in enumerate(_CONFIGS.values())]


def _words(data: bytes, folder: Path) -> None:
    """Arguments, one a line, the first of them the job; what is accepted comes from its own command line again."""
    first, *arguments = data.decode("utf-8", "surrogateescape").split("\n")
    job = first if first in _CONFIGS else "train"
    kept = _CONFIGS[job]
    if {"-h", "--help"} & set(arguments) or any(word.startswith("--tyro") for word in arguments):
        return
    config = parse(type(kept), arguments, program=f"bridle {job}", positional=COMMANDS[job].positional)
    again = shlex.split(command(job, config))[2:]
    assert parse(type(kept), again, program=f"bridle {job}") == config


def _words_seeds(folder: Path) -> list[bytes]:
    found = [
        b"\n".join(word.encode() for word in shlex.split(command(job, kept))[1:]) for job, kept in _CONFIGS.items()
    ]
    more = "train\nCartPole-v1\n--optim.lr=1e-3\n--network.hidden\n32\n16\n--normalise-observations\n--ppo.clip\nNone"
    return [*found, more.encode()]


def _make_run(folder: Path) -> None:
    """Leave a run with records, and a checkpoint."""
    with Run.create(folder / "run", "ppo", to_dict(_CONFIGS["ppo"])) as run:
        run.event("start", "started", step=1)
        for step in (1, 2):
            run.record(step, {"score": step / 2, "phase": "final", "kl": float("nan"), "none": None})
            run.timing(step, seconds=1.0)
        with run.checkpoint(2) as saved:
            save_tensors(saved / "state.safetensors", {"mean": torch.zeros(3), "count": torch.ones(())})
            save_json(saved / "state.json", {"step": 2, "scores": {"1": [0.5]}})
        run.event("finish", "finished", step=2)


def _run_head(data: bytes, folder: Path) -> None:
    """config.json of a run, as ``bridle resume`` and ``bridle runs`` read it."""
    (folder / "run" / "config.json").write_bytes(data)
    assert [_row(path)[0] for path in find_runs(folder)] == [str(folder / "run")]
    run = Run.open(folder / "run")
    run.state()
    jobs = {command.job: kept for name, command in COMMANDS.items() if (kept := _CONFIGS.get(name)) is not None}
    kept = jobs.get(run.job)
    if kept is not None and isinstance(run.config.get("run"), dict):
        require_sane(from_dict(type(kept), run.config))


def _records(data: bytes, folder: Path) -> None:
    """Records of a run; what is read is written and read again the same."""
    run_folder = folder / "run"
    for name in ("metrics.jsonl", "timing.jsonl", "events.jsonl"):
        (run_folder / name).write_bytes(data)
    assert [_row(path)[0] for path in find_runs(folder)] == [str(folder / "run")]
    run = Run.open(run_folder)
    run.state()
    rows = run.metrics()
    run.timings()
    "".join(plain(cell) for row in event_rows(run_folder) for cell in row).encode()
    with Run.open(run_folder, write=True) as taken:
        taken.rewind(1)
        assert all(isinstance(row["step"], int) and row["step"] <= 1 for row in taken.metrics())
        assert [row for row in rows if repr(row) in map(repr, taken.metrics())] or not taken.metrics()


def _checkpoint(data: bytes, folder: Path) -> None:
    """The first byte picks the file of a checkpoint that is replaced; sound ones verify and load."""
    names = ("manifest.json", "state.safetensors", "state.json")
    pick = data[0] if data else 0
    saved = folder / "run" / "checkpoints" / "step-2"
    originals = {name: (saved / name).read_bytes() for name in names}
    try:
        (saved / names[pick % 3]).write_bytes(data[1:])
        if pick >= 128 and pick % 3:  # and a manifest to match, as somebody who forges one would write it
            (saved / "manifest.json").unlink()
            write_manifest(saved, 2)
        run = Run.open(folder / "run")
        (checkpoint,) = run.checkpoints()
        load_tensors(saved / "state.safetensors")
        load_json(saved / "state.json")
        verify(checkpoint)
        assert run.latest_checkpoint() == checkpoint
    finally:
        for name, content in originals.items():
            (saved / name).write_bytes(content)


def _checkpoint_seeds(folder: Path) -> list[bytes]:
    saved = folder / "run" / "checkpoints" / "step-2"
    names = ("manifest.json", "state.safetensors", "state.json")
    plain = [bytes([number]) + (saved / name).read_bytes() for number, name in enumerate(names)]
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    forged = [bytes([130]) + struct.pack("<Q", len(header)) + header + b"\0" * 4, bytes([131]) + plain[2][1:]]
    return [*plain, *forged]


def _make_policies(folder: Path) -> None:
    import gymnasium

    boxes, bits = gymnasium.spaces.Box(-1, 1, (2,)), gymnasium.spaces.MultiBinary(2)
    both = gymnasium.spaces.Dict({"a": boxes, "b": gymnasium.spaces.Discrete(3)})
    for name, observed, acted, settings in (
        ("small", boxes, gymnasium.spaces.Discrete(2), NetworkSettings(hidden=(4,))),
        ("dict", both, bits, NetworkSettings(hidden=(4, 4), shared_trunk=True)),
        ("memory", boxes, boxes, NetworkSettings(hidden=(4,), recurrent="gru", recurrent_width=4)),
    ):
        seen, does = observation_spec(observed, name), action_spec(acted, name)
        policy = build_policy(seen, does, settings, seed=0)
        (folder / name).mkdir()
        moments = Moments.empty((seen.width,)).updated(torch.ones(3, seen.width))
        save_policy(
            folder / name, Agent(policy=policy, observations=seen, actions=does, moments=moments), settings, env=name
        )


def _policy(data: bytes, folder: Path) -> None:
    """policy.json beside sound weights; what opens acts, on the observation that it says it sees."""
    kept = folder / ("small", "dict", "memory")[(data[0] if data else 0) % 3]
    opened = folder / "opened"
    shutil.rmtree(opened, ignore_errors=True)
    shutil.copytree(kept, opened)
    (opened / "policy.json").write_bytes(data[1:])
    agent = load_policy(opened)
    parts = agent.observations.parts
    if len(parts) == 1 and not parts[0].path and kept.name == "small":
        agent.session().act(np.zeros(parts[0].shape))


def _policy_seeds(folder: Path) -> list[bytes]:
    names = ("small", "dict", "memory")
    return [bytes([number]) + (folder / name / "policy.json").read_bytes() for number, name in enumerate(names)]


TARGETS = {
    target.name: target
    for target in (
        Target(
            name="data",
            reads=("language/data/readers.py", "language/data/records.py"),
            prepare=_nothing,
            seeds=_data_seeds,
            run=_data,
        ),
        Target(name="config", reads=("jobs/config.py",), prepare=_nothing, seeds=_config_seeds, run=_config),
        Target(
            name="words",
            reads=("cli/arguments.py", "jobs/commands.py"),
            prepare=_nothing,
            seeds=_words_seeds,
            run=_words,
        ),
        Target(
            name="run",
            reads=("runs/directory.py", "runs/files.py", "jobs/config.py"),
            prepare=_make_run,
            seeds=lambda folder: [(folder / "run" / "config.json").read_bytes()],
            run=_run_head,
        ),
        Target(
            name="records",
            reads=("runs/directory.py", "runs/files.py", "cli/listing.py"),
            prepare=_make_run,
            seeds=lambda folder: [
                (folder / "run" / f"{name}.jsonl").read_bytes() for name in ("metrics", "timing", "events")
            ],
            run=_records,
        ),
        Target(
            name="checkpoint",
            reads=("runs/checkpoints.py", "runs/files.py"),
            prepare=_make_run,
            seeds=_checkpoint_seeds,
            run=_checkpoint,
        ),
        Target(
            name="policy",
            reads=("control/saved.py", "control/spaces.py", "control/parts.py"),
            prepare=_make_policies,
            seeds=_policy_seeds,
            run=_policy,
        ),
    )
}
"""Name → target."""
