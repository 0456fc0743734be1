"""Targets that read folders which a program has written, and anybody may have damaged: runs, policies and adapters."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import takewhile
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from bridle.cli.listing import _row, event_rows, find_runs
from bridle.cli.main import COMMANDS
from bridle.cli.plain import plain
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.saved import Agent, load_policy, save_policy
from bridle.control.spaces import action_spec, observation_spec
from bridle.core.moments import Moments
from bridle.jobs.config import from_dict, require_sane, to_dict
from bridle.language.adapter_files import CONFIG, WEIGHTS, LowRank, read_adapter, write_adapter
from bridle.language.models import ModelSettings, adapter_of, base_of
from bridle.runs import Run
from bridle.runs.checkpoints import verify, write_manifest
from bridle.runs.files import load_json, load_tensors, save_json, save_tensors
from tests.fuzz.target import Target
from tests.fuzz.texts import CONFIGS

__all__ = ["TARGETS"]

_STREAMS = ("metrics.jsonl", "timing.jsonl", "events.jsonl")


def _make_run(folder: Path) -> None:
    """Leave a run with records, and a checkpoint; by a clock that stands still, so that its mutants are always the same."""
    with mock.patch("time.time", return_value=1_800_000_000.5):
        _write_run(folder)


def _write_run(folder: Path) -> None:
    with Run.create(folder / "run", "ppo", to_dict(CONFIGS["ppo"])) as run:
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
    jobs = {command.job: kept for name, command in COMMANDS.items() if (kept := CONFIGS.get(name)) is not None}
    kept = jobs.get(run.job)
    if kept is not None and isinstance(run.config.get("run"), dict):
        require_sane(from_dict(type(kept), run.config))


@contextmanager
def _restored(folder: Path, names: tuple[str, ...]) -> Iterator[None]:
    """Put the files ``names`` of a folder back on leaving."""
    originals = {name: (folder / name).read_bytes() for name in names}
    try:
        yield
    finally:
        for name, content in originals.items():
            (folder / name).write_bytes(content)


def _records(data: bytes, folder: Path) -> None:
    """The first byte picks the file of records that is replaced; what is read is written and read again the same."""
    run_folder = folder / "run"
    with _restored(run_folder, _STREAMS):
        (run_folder / _STREAMS[(data[0] if data else 0) % 3]).write_bytes(data[1:])
        assert [_row(path)[0] for path in find_runs(folder)] == [str(run_folder)]
        run = Run.open(run_folder)
        run.state()
        rows = run.metrics()
        run.timings()
        "".join(plain(cell) for row in event_rows(run_folder) for cell in row).encode()
        with Run.open(run_folder, write=True) as taken:
            taken.rewind(1)
            whole = list(takewhile(lambda row: type(row.get("step")) is int, rows))
            assert repr(taken.metrics()) == repr([row for row in whole if row["step"] <= 1])  # type: ignore[operator]


def _is_whole(line: bytes, *, event: bool) -> bool:
    """Whether a line is a record: an object, with a step unless it is an event."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(row, dict) and (event or type(row.get("step")) is int)


def _mending(data: bytes, folder: Path) -> None:
    """The first byte picks the file of records that a crash has damaged; a run that is taken up mends it, once.

    What is left of metrics and timing is how the file began, up to its first damaged line; of the events every whole line.
    """
    run_folder, pick = folder / "run", (data[0] if data else 0) % 3
    path = run_folder / _STREAMS[pick]
    given = [line + b"\n" for line in data[1:].split(b"\n")[:-1]]
    whole = [_is_whole(line, event=pick == 2) for line in given]
    torn = b"".join(given) != data[1:]
    try:
        with _restored(run_folder, _STREAMS):
            path.write_bytes(data[1:])
            with Run.open(run_folder, write=True) as taken:
                mended, left = taken.mended, path.read_bytes()
                taken.metrics(), taken.timings(), taken.events()
            if pick == 2:
                assert left.startswith(b"".join(line for line, sound in zip(given, whole, strict=True) if sound))
            else:
                sound = whole.index(False) if False in whole else len(whole)
                assert left == b"".join(given[:sound])
                assert sound >= 2 or all(whole), "lines that the checkpoint followed on are gone"
            assert bool(mended) == (torn or not all(whole))
            with Run.open(run_folder, write=True) as taken:
                assert not taken.mended
                assert path.read_bytes() == left
    finally:
        shutil.rmtree(run_folder / "faults")
        (run_folder / "faults").mkdir()


def _record_seeds(folder: Path) -> list[bytes]:
    return [bytes([number]) + (folder / "run" / name).read_bytes() for number, name in enumerate(_STREAMS)]


def _checkpoint(data: bytes, folder: Path) -> None:
    """The first byte picks the file of a checkpoint that is replaced; sound ones verify and load."""
    names = ("manifest.json", "state.safetensors", "state.json")
    pick = data[0] if data else 0
    saved = folder / "run" / "checkpoints" / "step-2"
    with _restored(saved, names):
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


def _make_adapters(folder: Path) -> None:
    """Leave the adapters of a language model and of a reward model, on a base that is no adapter."""
    (folder / "base").mkdir()
    for name, head in (("policy", None), ("scores", torch.ones(1, 3))):
        layers = {f"layers.{n}.q": LowRank(a=torch.ones(2, 3), b=torch.full((4, 2), 0.5)) for n in range(2)}
        write_adapter(
            folder / name,
            layers,
            base=str(folder / "base"),
            revision=None,
            alpha=4.0,
            transposed=False,
            task="CAUSAL_LM" if head is None else "SEQ_CLS",
            head=head,
        )


def _adapter(data: bytes, folder: Path) -> None:
    """The first byte picks the adapter, and the file of it that is replaced; what is read is written and read again."""
    pick = data[0] if data else 0
    kept, name = folder / ("policy", "scores")[pick % 2], (CONFIG, WEIGHTS)[pick // 2 % 2]
    with _restored(kept, (CONFIG, WEIGHTS)):
        (kept / name).write_bytes(data[1:])
        settings = ModelSettings(path=str(kept))
        adapter = adapter_of(settings)
        assert adapter is not None
        assert base_of(settings, adapter).path == adapter.base
        write_adapter(
            folder / "again",
            adapter.layers,
            base=adapter.base,
            revision=adapter.revision,
            alpha=adapter.alpha,
            transposed=False,
            task="CAUSAL_LM" if adapter.head is None else "SEQ_CLS",
            head=adapter.head,
        )
        again = read_adapter(folder / "again")
        assert (again.base, again.revision) == (adapter.base, adapter.revision)
        assert (again.rank, again.alpha) == (adapter.rank, adapter.alpha)
        assert (again.head is None) == (adapter.head is None)
        assert again.layers.keys() == adapter.layers.keys()
        for layer, pair in adapter.layers.items():
            assert torch.equal(again.layers[layer].a, pair.a)
            assert torch.equal(again.layers[layer].b, pair.b)


def _adapter_seeds(folder: Path) -> list[bytes]:
    return [
        bytes([pick]) + (folder / ("policy", "scores")[pick % 2] / (CONFIG, WEIGHTS)[pick // 2]).read_bytes()
        for pick in range(4)
    ]


TARGETS = (
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
        seeds=_record_seeds,
        run=_records,
        head=1,
    ),
    Target(
        name="mending",
        reads=("runs/mending.py", "runs/files.py", "runs/directory.py"),
        prepare=_make_run,
        seeds=_record_seeds,
        run=_mending,
        head=1,
    ),
    Target(
        name="checkpoint",
        reads=("runs/checkpoints.py", "runs/files.py"),
        prepare=_make_run,
        seeds=_checkpoint_seeds,
        run=_checkpoint,
        head=1,
    ),
    Target(
        name="policy",
        reads=("control/saved.py", "control/spaces.py", "control/parts.py"),
        prepare=_make_policies,
        seeds=_policy_seeds,
        run=_policy,
        head=1,
    ),
    Target(
        name="adapter",
        reads=("language/adapter_files.py",),
        prepare=_make_adapters,
        seeds=_adapter_seeds,
        run=_adapter,
        head=1,
    ),
)
