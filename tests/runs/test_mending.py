"""Damage in a run's records: cut off behind what a checkpoint vouches for, named before it, and never lost without a copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bridle.errors import RunError
from bridle.jobs.taking_up import changed_records
from bridle.runs import Run, RunState

STREAMS = ("metrics.jsonl", "timing.jsonl")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Six steps, two records at each, the second checkpoint of two after the fourth."""
    with Run.create(tmp_path / "run", "toy", {}) as run:
        run.event("start", "started")
        for step in range(1, 7):
            run.record(step, {"loss": 1 / step})
            run.record(step, {"score": step})
            run.timing(step, seconds=0.5)
            if step in (2, 4):
                with run.checkpoint(step) as folder:
                    (folder / "state").write_text(str(step))
    return run


def spoil(path: Path, line: int, what: bytes = b"\0") -> bytes:
    """Overwrite a line of a file, from 1, and return what the file was."""
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    lines[line - 1] = (what * len(lines[line - 1]))[: len(lines[line - 1])]
    path.write_bytes(b"\n".join(lines))
    return whole


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("what", [b"\0", b"\xff\xfe", b"[1]", b'{"a": 1}'])
@pytest.mark.parametrize("line", [9, 10, 12])
def test_what_follows_the_checkpoint_is_cut_back_to_before_the_damage(run: Run, line: int, what: bytes) -> None:
    path = run.path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.split(b"\n")
    lines[line - 1] = what
    path.write_bytes(b"\n".join(lines))
    spoilt = path.read_bytes()
    with Run.open(run.path, write=True) as again:
        assert path.read_bytes() == b"".join(whole.splitlines(keepends=True)[: line - 1])
        text = (
            f"metrics.jsonl was damaged from line {line} on: {13 - line} lines cut off; "
            "the checkpoint of step 4 comes before them"
        )
        assert again.mended == (text,)
        assert again.events()[-1]["text"] == text
        again.rewind(4)
        assert steps(path) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert (run.path / "faults" / "metrics.jsonl.damaged-1").read_bytes() == spoilt


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("line", [1, 4])
def test_damage_that_a_checkpoint_followed_on_is_named_and_left(run: Run, name: str, line: int) -> None:
    path = run.path / name
    spoil(path, line)
    spoil(path, 6 if name == "timing.jsonl" else 12)
    before = path.read_bytes()
    for _ in range(2):
        with pytest.raises(RunError, match=rf"{name} line {line} is damaged, before the checkpoint of step 4; put the"):
            Run.open(run.path, write=True)
    assert path.read_bytes() == before
    lines = before.split(b"\n")
    path.write_bytes(b"\n".join(lines[: line - 1] + lines[line:]))  # as it says
    with Run.open(run.path, write=True) as again:
        (text,) = changed_records(again, again.latest_checkpoint(), force=True)
    counted = "7 of the 8" if name == "metrics.jsonl" else "3 of the 4"
    last = 3 if (name, line) == ("timing.jsonl", 4) else 4
    assert text == f"{path} has {counted} lines before the checkpoint of step 4, the last of step {last}"


def test_the_last_record_of_the_checkpoints_own_step_is_vouched_for(run: Run) -> None:
    """The step alone would not tell: line 7 has step 4 as well."""
    spoil(run.path / "metrics.jsonl", 8)
    with pytest.raises(RunError, match="line 8 is damaged, before"):
        Run.open(run.path, write=True)


def test_a_damaged_checkpoint_vouches_for_nothing(run: Run) -> None:
    (run.path / "checkpoints" / "step-4" / "state").write_text("x")
    spoil(run.path / "metrics.jsonl", 7)
    with Run.open(run.path, write=True) as again:
        assert "the checkpoint of step 2" in again.mended[0]
    (run.path / "checkpoints" / "step-2" / "state").write_text("x")
    spoil(run.path / "metrics.jsonl", 1)
    with pytest.raises(RunError, match="records are damaged and no checkpoint is whole"):
        Run.open(run.path, write=True)


def test_without_a_checkpoint_the_run_begins_again_anyway(run: Run) -> None:
    for step in (2, 4):
        for path in (run.path / "checkpoints" / f"step-{step}").iterdir():
            path.unlink()
        (run.path / "checkpoints" / f"step-{step}").rmdir()
    spoil(run.path / "metrics.jsonl", 3)
    with Run.open(run.path, write=True) as again:
        assert again.mended == ("metrics.jsonl was damaged from line 3 on: 10 lines cut off",)
        again.rewind(-1)
        assert again.metrics() == []


@pytest.mark.parametrize(("line", "fits"), [(8, False), (9, False), (10, True)])
def test_an_older_checkpoint_vouches_where_a_later_step_is_sound(run: Run, line: int, fits: bool) -> None:
    path = run.path / "checkpoints" / "step-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert {name: entry["lines"] for name, entry in manifest.pop("records").items()} == dict(
        zip(STREAMS, (8, 4), strict=True)
    )
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    spoil(run.path / "metrics.jsonl", line)
    if not fits:
        with pytest.raises(RunError, match=f"line {line} is damaged"):
            Run.open(run.path, write=True)
        return
    with Run.open(run.path, write=True) as again:
        assert len(again.metrics()) == 9


def test_damaged_events_are_left_out_and_the_others_stay(run: Run) -> None:
    path = run.path / "events.jsonl"
    with Run.open(run.path, write=True) as again:
        again.event("note", "one")
        again.event("stop", "stopped")
    spoil(path, 2)
    assert Run.open(run.path).state() is RunState.STOPPED
    with Run.open(run.path, write=True) as again:
        assert [event["text"] for event in again.events()] == [
            "started",
            "stopped",
            "left 1 damaged lines of events.jsonl out",
        ]
    assert b"\0" in (run.path / "faults" / "events.jsonl.damaged-1").read_bytes()
