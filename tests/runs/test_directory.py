"""A run's directory: refuses to write over anything, keeps its records whole, rewinds without duplicates or gaps."""

from __future__ import annotations

import functools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bridle.errors import RunError
from bridle.runs import Run, RunState

Make = Callable[..., Run]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", "toy", {"steps": 3})


def test_create_writes_what_was_asked_and_what_was_resolved(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "deep" / "run", "toy", {"device": "auto"}, resolved={"device": "cpu"})
    head = json.loads((run.path / "config.json").read_text())
    assert (head["format"], head["job"]) == (1, "toy")
    assert (head["config"], head["resolved"]) == ({"device": "auto"}, {"device": "cpu"})
    assert {"python", "bridle", "torch", "transformers"} <= set(head["versions"])


def test_create_refuses_a_directory_that_holds_anything_and_leaves_it_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(RunError, match=r"is not empty; pass --run\.dir another path$"):
        Run.create(tmp_path, "toy", {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_create_takes_an_empty_directory_and_refuses_a_file(tmp_path: Path) -> None:
    Run.create(tmp_path, "toy", {}).close()
    file = tmp_path / "config.json"
    with pytest.raises(RunError, match="is a file"):
        Run.create(file, "toy", {})
    with pytest.raises(RunError, match="cannot be written"):
        Run.create(file / "below", "toy", {})


def test_open_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="does not exist"):
        Run.open(tmp_path / "nothing")
    with pytest.raises(RunError, match="is not a run"):
        Run.open(tmp_path)
    for content, message in [
        ("{", "is not valid JSON"),
        ("\x00", "is not valid JSON"),
        ("[]", "not of run format 1"),
        ('{"format": 99}', "of format 99, and this bridle reads 1; use a newer bridle"),
        ('{"format": 0}', "not of run format 1"),
        ('{"format": 1, "job": "toy"}', "lacks job, config or resolved"),
    ]:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(RunError, match=message) as caught:
            Run.open(tmp_path)
        assert "\n" not in str(caught.value)


def test_one_writer_any_readers(run: Run) -> None:
    assert Run.open(run.path).state() is RunState.RUNNING
    with pytest.raises(RunError, match="in use by another process"):
        Run.open(run.path, write=True)
    run.close()
    with Run.open(run.path, write=True) as again, pytest.raises(RunError, match="in use"):
        Run.open(again.path, write=True)


def test_metrics_come_back_as_they_were_also_where_json_has_no_word(run: Run) -> None:
    run.record(0, {"reward": 0.1 + 0.2, "count": 3, "stop": "eos", "cut": True, "kl": None})
    run.record(1, {"reward": math.inf, "kl": -math.inf, "loss": math.nan})
    first, second = run.metrics()
    assert first == {"step": 0, "reward": 0.1 + 0.2, "count": 3, "stop": "eos", "cut": True, "kl": None}
    assert (second["reward"], second["kl"]) == (math.inf, -math.inf)
    assert isinstance(second["loss"], float)
    assert math.isnan(second["loss"])
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # plain JSON, without NaN and Infinity literals


def test_a_text_that_reads_like_a_number_is_refused_in_metrics_and_kept_in_samples(run: Run) -> None:
    with pytest.raises(ValueError, match="cannot be told apart"):
        run.record(0, {"answer": "NaN"})
    run.samples(0, [{"answer": "NaN", "logp": [math.nan, -1.5]}])
    assert run.read_samples(0) == [{"answer": "NaN", "logp": ["NaN", -1.5]}]


def test_columns_of_numbers_are_kept_to_the_last_bit(run: Run) -> None:
    """Every float32 is read back as itself, small ones and large ones; what is not finite, truth and ids as what they are."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4096, dtype=np.uint32).view(np.float32)
    finite = bits[np.isfinite(bits)]
    odd = torch.tensor([1.5, math.nan, math.inf, -math.inf])
    run.samples(
        0,
        [
            {
                "logp": torch.from_numpy(finite),
                "odd": odd,
                "ids": torch.tensor([1, -2, 2**40]),
                "clipped": torch.tensor([True, False]),
            }
        ],
    )
    (row,) = run.read_samples(0)
    assert np.array(row["logp"], dtype=np.float32).tobytes() == finite.tobytes()
    assert row["odd"] == [1.5, "NaN", "Infinity", "-Infinity"]
    assert row["ids"] == [1, -2, 2**40]
    assert row["clipped"] == [True, False]


@pytest.mark.parametrize(
    "odd", ["\ud800 lone", 2**70, -(2**70), functools.reduce(lambda inner, _: [inner], range(300), 1)]
)
def test_what_plain_json_writes_is_written(run: Run, odd: object) -> None:
    """A lone surrogate, a number beyond 64 bits, much nesting: beside a column, too."""
    run.samples(0, [{"odd": odd, "ids": torch.tensor([1, 2])}])  # type: ignore[dict-item]
    assert run.read_samples(0) == [{"odd": odd, "ids": [1, 2]}]


@pytest.mark.parametrize("text", ["two\nlines\r\n", "\u2028\u2029\x85", "\ud800 lone", "Ω 𝕏 \x00", '"\\'])
def test_any_text_survives_in_samples_and_events(run: Run, text: str) -> None:
    run.samples(4, [{"answer": text}, {"answer": "plain"}])
    run.event("note", text)
    assert run.read_samples(4) == [{"answer": text}, {"answer": "plain"}]
    assert run.events()[-1]["text"] == text


def test_values_that_are_not_plain_are_refused(run: Run) -> None:
    with pytest.raises(TypeError, match="set cannot be written as JSON"):
        run.samples(0, [{"tokens": {1, 2}}])  # type: ignore[dict-item]
    assert run.read_samples(0) == []


def test_metrics_hold_no_wall_clock_and_so_are_equal_byte_for_byte(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        with Run.create(tmp_path / name, "toy", {}) as run:
            run.record(1, {"reward": 1 / 3})
            run.timing(1, seconds=0.5)
        contents.append((run.path / "metrics.jsonl").read_bytes())
        assert run.timings()[0]["time"]
    assert contents[0] == contents[1]


def test_a_torn_last_line_is_tolerated_by_readers_and_dropped_by_the_next_writer(run: Run) -> None:
    run.record(1, {"reward": 1.0})
    run.close()
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 2, "rew')
    assert [row["step"] for row in Run.open(run.path).metrics()] == [1]
    with Run.open(run.path, write=True) as again:
        again.record(2, {"reward": 2.0})
        assert [row["step"] for row in again.metrics()] == [1, 2]
        assert again.events()[-1]["kind"] == "mended"


def test_a_damaged_line_in_the_middle_is_named_by_its_number(run: Run) -> None:
    for step in range(3):
        run.record(step, {})
    path = run.path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 1}', '{"step": 1'))
    with pytest.raises(RunError, match=r"metrics\.jsonl line 2 is damaged"):
        run.metrics()


def test_steps_never_go_backwards_also_after_reopening(run: Run) -> None:
    run.record(5, {})
    run.record(5, {"split": "evaluation"})
    with pytest.raises(ValueError, match="step 4 after step 5"):
        run.record(4, {})
    run.close()
    with Run.open(run.path, write=True) as again, pytest.raises(ValueError, match="step 4 after step 5"):
        again.record(4, {})


def test_rewind_leaves_exactly_the_records_up_to_the_step(run: Run) -> None:
    for step in range(1, 6):
        run.record(step, {"reward": step / 7})
        run.timing(step, seconds=1.0)
        run.samples(step, [{"step": step}])
        run.samples(step, [{"step": step}], name="evaluation")
        with run.checkpoint(step) as folder:
            (folder / "state").write_text(str(step))
    before = (run.path / "metrics.jsonl").read_bytes()
    events = len(run.events())
    run.rewind(3)
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert [row["step"] for row in run.timings()] == [1, 2, 3]
    assert [c.step for c in run.checkpoints()] == [1, 2, 3]
    assert not run.read_samples(4)
    assert not run.read_samples(5, name="evaluation")
    assert run.read_samples(3)
    assert len(run.events()) == events  # what happened has happened
    assert (run.path / "faults" / "checkpoint-step-5" / "state").read_text() == "5"
    for step in (4, 5):
        run.record(step, {"reward": step / 7})
    assert (run.path / "metrics.jsonl").read_bytes() == before


def test_rewind_to_before_the_beginning_forgets_everything(run: Run) -> None:
    run.record(0, {})
    run.rewind(-1)
    assert run.metrics() == []
    run.record(0, {})


@pytest.mark.parametrize(
    ("kinds", "state"),
    [
        ([], RunState.INTERRUPTED),
        (["start"], RunState.INTERRUPTED),
        (["start", "finish"], RunState.FINISHED),
        (["start", "stop", "checkpoint_skipped"], RunState.STOPPED),
        (["start", "fail"], RunState.FAILED),
        (["start", "interrupt"], RunState.INTERRUPTED),
        (["start", "stop", "resume"], RunState.INTERRUPTED),
    ],
)
def test_state_is_told_by_the_last_thing_that_happened(run: Run, kinds: list[str], state: RunState) -> None:
    for kind in kinds:
        run.event(kind, "")
    assert run.state() is RunState.RUNNING
    run.close()
    assert run.state() is state


def test_discard_removes_only_a_run_that_has_recorded_nothing(tmp_path: Path) -> None:
    empty = Run.create(tmp_path / "empty", "toy", {})
    empty.event("start", "started")
    empty.discard()
    assert not (tmp_path / "empty").exists()
    used = Run.create(tmp_path / "used", "toy", {})
    used.record(1, {})
    used.discard()
    assert used.metrics()


def test_the_lock_dies_with_its_process(run: Run) -> None:
    run.close()
    script = "import os, sys; from bridle.runs import Run; run = Run.open(sys.argv[1], write=True); os._exit(7)"
    assert subprocess.run([sys.executable, "-c", script, str(run.path)], check=False).returncode == 7
    Run.open(run.path, write=True).close()


def test_another_process_cannot_write_the_same_run(run: Run) -> None:
    script = "import sys; from bridle.runs import Run; Run.open(sys.argv[1], write=True)"
    other = subprocess.run([sys.executable, "-c", script, str(run.path)], check=False, capture_output=True, text=True)
    assert "in use by another process" in other.stderr
