"""The frame of every job: stop and go on as if nothing had been, leave nothing behind after a mistake."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from bridle.errors import ConfigError, DataError, RunError
from bridle.jobs.progress import format_numbers
from bridle.jobs.session import RunSettings, Session, Stopped, open_session
from bridle.runs import Run, RunState
from bridle.runs.checkpoints import load_json, save_json


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    run: RunSettings
    steps: int = 10
    rate: float = 0.5


def toy(
    config: ToyConfig, *, resume: bool = False, force: bool = False, at: Callable[[int, Session], None] | None = None
) -> Path:
    """A job whose state is one number, which depends on every step before."""
    with open_session("toy", config, config.run, resume=resume, force=force) as session:
        state = 1.0

        def save(folder: Path) -> None:
            save_json(folder / "state.json", state)

        if session.checkpoint is not None:
            loaded = load_json(session.checkpoint.path / "state.json")
            assert isinstance(loaded, float)
            state = loaded
        with session.progress(config.steps, "toy", start=session.start) as progress:
            for step in session.steps(config.steps):
                state = state * config.rate + step
                session.record(step, {"state": state})
                session.run.timing(step, seconds=0.0)
                if at is not None:
                    at(step, session)
                progress.advance(state=state, clip="8 %")
                session.end_step(step, last=config.steps, save=save)
        return session.run.path


def settings(tmp_path: Path, **changes: object) -> RunSettings:
    return replace(RunSettings(dir=tmp_path / "run", checkpoint_every=4, quiet=True), **changes)  # type: ignore[arg-type]


def interrupt(after: int, number: int = signal.SIGINT, times: int = 1) -> Callable[[int, Session], None]:
    def act(step: int, _: Session) -> None:
        if step == after:
            for _time in range(times):
                os.kill(os.getpid(), number)

    return act


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("after", [1, 4, 6])
def test_stopped_and_resumed_is_the_same_run(tmp_path: Path, after: int, number: int) -> None:
    whole = ToyConfig(run=settings(tmp_path / "whole"))
    toy(whole)
    parts = ToyConfig(run=settings(tmp_path / "parts"))
    with pytest.raises(Stopped, match=f"stopped after step {after}; go on with: bridle resume .*run"):
        toy(parts, at=interrupt(after, number))
    run = Run.open(parts.run.dir)
    assert run.state() is RunState.STOPPED
    assert [row["step"] for row in run.metrics()] == list(range(1, after + 1))
    toy(parts, resume=True)
    assert run.state() is RunState.FINISHED
    assert (parts.run.dir / "metrics.jsonl").read_bytes() == (whole.run.dir / "metrics.jsonl").read_bytes()
    assert [row["step"] for row in run.timings()] == list(range(1, 11))


def test_a_crash_between_checkpoints_resumes_from_the_last_one_without_duplicates(tmp_path: Path) -> None:
    whole = ToyConfig(run=settings(tmp_path / "whole"))
    toy(whole)

    def crash(step: int, _: Session) -> None:
        if step == 7:
            raise ZeroDivisionError

    parts = ToyConfig(run=settings(tmp_path / "parts"))
    with pytest.raises(ZeroDivisionError):
        toy(parts, at=crash)
    assert Run.open(parts.run.dir).state() is RunState.FAILED
    assert len(Run.open(parts.run.dir).metrics()) == 7
    toy(parts, resume=True)
    assert (parts.run.dir / "metrics.jsonl").read_bytes() == (whole.run.dir / "metrics.jsonl").read_bytes()
    assert Run.open(parts.run.dir).events()[-2]["text"] == "resumed after step 4"


def test_a_crash_before_the_first_checkpoint_begins_again(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))

    def crash(step: int, _: Session) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        toy(config, at=crash)
    toy(config, resume=True)
    assert [row["step"] for row in Run.open(config.run.dir).metrics()] == list(range(1, 11))


def test_a_second_signal_stops_now(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))
    with pytest.raises(KeyboardInterrupt, match=r"stopped at once; go on with: bridle resume .*run") as caught:
        toy(config, at=interrupt(6, times=2))
    assert not isinstance(caught.value, Stopped)
    run = Run.open(config.run.dir)
    assert [c.step for c in run.checkpoints()] == [4]
    assert (run.state(), run.events()[-1]["kind"]) == (RunState.INTERRUPTED, "interrupt")


def test_a_signal_in_the_last_step_lets_it_finish(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))
    toy(config, at=interrupt(10))
    assert Run.open(config.run.dir).state() is RunState.FINISHED


def test_checkpoints_when_due_and_at_the_end_the_newest_stay(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path, keep_checkpoints=2))
    toy(config)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [8, 10]


def test_a_users_mistake_inside_leaves_no_empty_run_behind(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))
    with pytest.raises(DataError), open_session("toy", config, config.run):
        raise DataError("line 3 is malformed")
    assert not config.run.dir.exists()


def test_a_mistake_after_the_first_record_keeps_the_run(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))

    def mistake(_: int, __: Session) -> None:
        raise DataError("line 3 is malformed")

    with pytest.raises(DataError):
        toy(config, at=mistake)
    assert Run.open(config.run.dir).events()[-1]["text"] == "DataError: line 3 is malformed"


def test_global_settings_are_put_back(tmp_path: Path) -> None:
    threads, handler = torch.get_num_threads(), signal.getsignal(signal.SIGINT)
    config = ToyConfig(run=settings(tmp_path, threads=threads + 1))

    def look(_: int, __: Session) -> None:
        assert torch.get_num_threads() == threads + 1
        assert torch.are_deterministic_algorithms_enabled()
        assert signal.getsignal(signal.SIGINT) is not handler

    toy(config, at=look)
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert signal.getsignal(signal.SIGINT) is handler


def test_resume_refuses_other_settings_but_not_another_place(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))
    with pytest.raises(Stopped):
        toy(config, at=interrupt(3))
    with pytest.raises(RunError, match=r"rate=0\.25 is not what .* was started with"):
        toy(replace(config, rate=0.25), resume=True)
    with pytest.raises(RunError, match=r"run\.seed=1 is not what"):
        toy(replace(config, run=replace(config.run, seed=1)), resume=True)
    with pytest.raises(RunError, match="is a run of toy, not of other"):
        open_session("other", config, config.run, resume=True)
    moved = config.run.dir.rename(tmp_path / "moved")
    toy(
        replace(config, run=replace(config.run, dir=moved, checkpoint_every=3, on_fault="skip", fault_limit=0)),
        resume=True,
    )
    assert Run.open(moved).state() is RunState.FINISHED


def test_a_taken_directory_is_refused_before_anything_happens(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))
    toy(config)
    before = sorted(path.stat().st_mtime_ns for path in config.run.dir.rglob("*"))
    with pytest.raises(RunError, match="is not empty"):
        toy(config)
    assert sorted(path.stat().st_mtime_ns for path in config.run.dir.rglob("*")) == before


def test_automatic_choices_are_resolved_in_config_json(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path, device="auto"))
    toy(config)
    run = Run.open(config.run.dir)
    asked, chosen = run.config["run"], run.resolved["run"]
    assert isinstance(asked, dict)
    assert isinstance(chosen, dict)
    assert (asked["device"], asked["threads"]) == ("auto", None)
    assert chosen["device"] == ("cuda" if torch.cuda.is_available() else "cpu")
    assert chosen["threads"] == torch.get_num_threads()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"checkpoint_every": 0}, r"run\.checkpoint_every=0"),
        ({"keep_checkpoints": 0}, r"run\.keep_checkpoints=0"),
        ({"checkpoint_minutes": 0.0}, r"run\.checkpoint_minutes=0\.0"),
        ({"keep_every": 0}, r"run\.keep_every=0"),
        ({"keep_best": "-"}, r"run\.keep_best='-'"),
        ({"threads": 0}, r"run\.threads=0"),
        ({"seed": -1}, r"run\.seed=-1"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(tmp_path, **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_said_and_nothing_is_made(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path, device="cuda"))
    with pytest.raises(ConfigError, match=r"run\.device='cuda': expected a GPU .*; pass --run\.device cpu"):
        toy(config)
    assert not config.run.dir.exists()


def test_progress_without_a_terminal_is_a_few_plain_lines_with_the_numbers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(ToyConfig(run=settings(tmp_path, quiet=False), steps=200))
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) == 20
    assert lines[-1] == "toy 200/200 | state 398 | clip 8 %"


def test_quiet_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    toy(ToyConfig(run=settings(tmp_path)))
    assert capsys.readouterr() == ("", "")


def test_numbers_are_shown_short() -> None:
    numbers: dict[str, float | int | str] = {
        "reward": 0.123456,
        "KL_to_ref": 31.0,
        "clip": "8 %",
        "n": 12345,
        "lr": 1e-6,
    }
    assert format_numbers({"KL": -2.3e-15}) == "KL 0"
    assert format_numbers(numbers) == "reward 0.123 | KL to ref 31 | clip 8 % | n 12345 | lr 1e-06"


def begun(tmp_path: Path, **changes: object) -> ToyConfig:
    """A toy that was stopped after step 6, with checkpoints at 4 and 6."""
    config = ToyConfig(run=settings(tmp_path, threads=1, **changes))
    with pytest.raises(Stopped):
        toy(config, at=interrupt(6))
    return config


def test_code_that_changes_directory_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    config = ToyConfig(run=settings(Path()))
    with pytest.raises(RunError, match="run cannot be written"):
        toy(config, at=lambda *_: monkeypatch.chdir(tmp_path / "elsewhere"))


def test_a_run_without_a_checkpoint_says_that_it_begins_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ToyConfig(run=settings(tmp_path, quiet=False))
    with pytest.raises(Stopped):
        toy(config, at=interrupt(2))
    shutil.rmtree(config.run.dir / "checkpoints/step-2")
    capsys.readouterr()
    toy(config, resume=True)
    assert "no checkpoint was saved: beginning again" in capsys.readouterr().err


def test_resume_refuses_another_number_of_threads_and_names_it(tmp_path: Path) -> None:
    config = begun(tmp_path)
    more = replace(config, run=replace(config.run, threads=2))
    with pytest.raises(RunError) as caught:
        toy(more, resume=True)
    assert str(caught.value) == (
        f"threads is 2 and was 1 when {config.run.dir} was started, so it would not go on as the same run to the bit; "
        f"set OMP_NUM_THREADS=1, or `bridle resume {config.run.dir} --force`"
    )
    assert Run.open(config.run.dir).events()[-1]["kind"] == "stop"  # and nothing was touched
    toy(config, resume=True)


def test_force_goes_on_and_records_what_changed(tmp_path: Path) -> None:
    config = begun(tmp_path)
    other = replace(config, rate=0.25, run=replace(config.run, threads=2))
    toy(other, resume=True, force=True)
    run = Run.open(config.run.dir)
    (event,) = [event for event in run.events() if event["kind"] == "forced"]
    assert event["changes"] == ["rate=0.25 is another setting", "threads is 2 and was 1"]
    head = load_json(config.run.dir / "config.json")
    assert isinstance(head, dict)
    (lineage,) = head["lineage"]
    assert (lineage["after_step"], lineage["changes"]) == (6, event["changes"])
    assert run.config["rate"] == 0.25
    assert run.depends["machine"]["threads"] == 2  # type: ignore[index,call-overload]


def test_force_with_nothing_changed_records_nothing(tmp_path: Path) -> None:
    config = begun(tmp_path)
    toy(config, resume=True, force=True)
    assert "forced" not in [event["kind"] for event in Run.open(config.run.dir).events()]


def test_the_clock_saves_between_the_counted_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("bridle.jobs.session.time.monotonic", lambda: now[0])

    def wait(step: int, _: Session) -> None:
        now[0] += 25.0  # seconds a step; a minute is over in the third

    config = ToyConfig(run=settings(tmp_path, checkpoint_every=None, checkpoint_minutes=1.0, keep_checkpoints=9))
    toy(config, at=wait)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [3, 6, 9, 10]


def test_by_default_little_is_lost_and_short_runs_are_saved_once(tmp_path: Path) -> None:
    assert RunSettings(dir=tmp_path).checkpoint_minutes <= 9
    config = ToyConfig(run=settings(tmp_path, checkpoint_every=None))
    toy(config)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [10]


@pytest.mark.parametrize(
    ("best", "kept"), [("state", [4, 8, 9, 10]), ("-state", [1, 4, 8, 9, 10]), (None, [4, 8, 9, 10])]
)
def test_checkpoints_stay_by_age_by_number_and_by_metric(tmp_path: Path, best: str | None, kept: list[int]) -> None:
    config = ToyConfig(run=settings(tmp_path, checkpoint_every=1, keep_checkpoints=2, keep_every=4, keep_best=best))
    toy(config)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == kept  # the state grows with every step


def test_the_best_checkpoint_is_still_known_after_a_resume(tmp_path: Path) -> None:
    config = begun(tmp_path, checkpoint_every=1, keep_checkpoints=1, keep_best="-state")
    toy(config, resume=True)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [1, 10]


def test_a_run_that_died_before_it_pruned_is_pruned_when_it_is_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(run=settings(tmp_path, keep_checkpoints=1))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "prune", lambda *_, **__: None)
        toy(config)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [4, 8, 10]
    toy(config, resume=True)
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [10]


@pytest.mark.parametrize(("name", "remedy"), [("-stat", "did you mean 'state'?"), ("xyz", "there are state")])
def test_a_misspelt_metric_to_keep_by_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, remedy: str
) -> None:
    config = ToyConfig(run=settings(tmp_path, quiet=False, keep_best=name))
    toy(config)
    text = f"run.keep_best: no number {name.removeprefix('-')!r} was recorded up to step 4; {remedy}"
    assert capsys.readouterr().err.count(text) == 1
    assert [event["text"] for event in Run.open(config.run.dir).events() if event["kind"] == "keep_best"] == [text]


@pytest.mark.parametrize("name", ["state", "-state", None])
def test_a_metric_that_is_there_is_not_doubted(tmp_path: Path, name: str | None) -> None:
    config = ToyConfig(run=settings(tmp_path, keep_best=name))
    toy(config)
    assert not [event for event in Run.open(config.run.dir).events() if event["kind"] == "keep_best"]


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_is_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = ToyConfig(run=settings(tmp_path / "whole"))
    toy(whole)
    config = begun(tmp_path, quiet=False)
    (config.run.dir / "checkpoints/step-6/state.json").write_text("7.0\n")
    capsys.readouterr()
    toy(config, resume=True)
    said = [line for line in capsys.readouterr().err.splitlines() if "damaged" in line]
    assert said == [f"damaged, moved to {config.run.dir / 'faults'}: step-6; going on after step 4"]
    assert "checkpoint_skipped" in [event["kind"] for event in Run.open(config.run.dir).events()]
    assert (config.run.dir / "metrics.jsonl").read_bytes() == (whole.run.dir / "metrics.jsonl").read_bytes()


def test_where_every_checkpoint_is_damaged_nothing_is_thrown_away_unasked(tmp_path: Path) -> None:
    config = begun(tmp_path)
    for step in (4, 6):
        (config.run.dir / f"checkpoints/step-{step}/state.json").unlink()
    with pytest.raises(RunError, match=r"no checkpoint is whole \(step-4, step-6 damaged\).*--force"):
        toy(config, resume=True)
    assert len(Run.open(config.run.dir).metrics()) == 6
    toy(config, resume=True, force=True)
    assert Run.open(config.run.dir).state() is RunState.FINISHED


def test_a_mistake_on_resume_throws_no_run_away(tmp_path: Path) -> None:
    """Without a checkpoint a resume begins again: its records are gone then, and the run must still be there."""
    config = ToyConfig(run=settings(tmp_path, checkpoint_every=None))

    def crash(step: int, _: Session) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        toy(config, at=crash)

    def mistake(step: int, session: Session) -> None:
        session.run.rewind(-1)
        raise DataError("line 3 is malformed")

    with pytest.raises(DataError):
        toy(config, resume=True, at=mistake)
    toy(config, resume=True)
    assert Run.open(config.run.dir).state() is RunState.FINISHED


@pytest.mark.parametrize("where", ["metrics", "checkpoint"])
def test_a_full_disk_ends_the_run_in_one_line_and_it_can_be_taken_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Also the event that says so cannot be written then, which must not hide what went wrong first."""
    whole = ToyConfig(run=settings(tmp_path / "whole"))
    toy(whole)
    config = ToyConfig(run=settings(tmp_path / "parts"))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def fill(step: int, _: Session) -> None:
        if step == (6 if where == "metrics" else 8):
            monkeypatch.setattr("bridle.runs.directory.append_line", refuse)
            monkeypatch.setattr(os, "fsync", refuse)

    with pytest.raises(RunError) as caught:
        toy(config, at=fill)
    monkeypatch.undo()
    assert str(caught.value) == (
        f"{config.run.dir} cannot be written (No space left on device); free some space, "
        f"then go on with: bridle resume {config.run.dir} (newest checkpoint: step 4)"
    )
    toy(config, resume=True)
    assert (config.run.dir / "metrics.jsonl").read_bytes() == (whole.run.dir / "metrics.jsonl").read_bytes()


def test_a_second_signal_in_the_middle_of_a_checkpoint_leaves_the_one_before(tmp_path: Path) -> None:
    config = ToyConfig(run=settings(tmp_path))

    def save(folder: Path) -> None:
        save_json(folder / "state.json", 1.0)
        if folder.name == ".step-6.partial":
            os.kill(os.getpid(), signal.SIGINT)

    def stop() -> None:
        with open_session("toy", config, config.run) as session:
            for step in session.steps(10):
                session.record(step, {"state": 1.0})
                interrupt(6)(step, session)
                session.end_step(step, last=10, save=save)

    with pytest.raises(KeyboardInterrupt) as caught:
        stop()
    assert not isinstance(caught.value, Stopped)
    assert [path.name for path in (config.run.dir / "checkpoints").iterdir()] == ["step-4"]
    toy(config, resume=True)
    assert Run.open(config.run.dir).state() is RunState.FINISHED


def test_what_is_forced_is_said_of_the_step_that_the_run_goes_on_after(tmp_path: Path) -> None:
    def crash(step: int, _: Session) -> None:
        if step == 7:
            raise ZeroDivisionError

    config = ToyConfig(run=settings(tmp_path))
    with pytest.raises(ZeroDivisionError):
        toy(config, at=crash)
    toy(replace(config, rate=0.25), resume=True, force=True)
    head = load_json(config.run.dir / "config.json")
    assert isinstance(head, dict)
    (lineage,) = head["lineage"]
    assert lineage["after_step"] == 4


def test_a_checkpoint_that_cannot_be_read_here_is_refused_before_config_json_changes(tmp_path: Path) -> None:
    config = begun(tmp_path)
    manifest = config.run.dir / "checkpoints/step-6/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    before = (config.run.dir / "config.json").read_bytes()
    with pytest.raises(RunError, match="use a newer bridle"):
        toy(replace(config, rate=0.25), resume=True, force=True)
    assert (config.run.dir / "config.json").read_bytes() == before


def test_a_setting_that_newer_code_has_brought_is_not_blamed_on_the_user(tmp_path: Path) -> None:
    config = begun(tmp_path)
    head = load_json(config.run.dir / "config.json")
    assert isinstance(head, dict)
    for name in ("config", "resolved"):
        del head[name]["run"]["on_fault"]
    head["depends"]["code"]["bridle"] = "0.0.1"
    save_json(config.run.dir / "config.json", head)
    with pytest.raises(RunError, match=r"^bridle is .* and was 0\.0\.1 when .*; pip install bridle==0\.0\.1, or"):
        toy(config, resume=True)


def test_ctrl_c_that_ends_the_reader_of_its_lines_too_still_finishes_the_step_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ``bridle … 2>&1 | tee log``: the signal goes to both, and the reader is gone first."""
    receiver, sender = os.pipe()
    lines = os.fdopen(sender, "w", buffering=1)
    os.close(receiver)
    monkeypatch.setattr("sys.stderr", lines)
    config = ToyConfig(run=settings(tmp_path, quiet=False))
    with pytest.raises(Stopped):
        toy(config, at=interrupt(3))
    monkeypatch.undo()
    with suppress(BrokenPipeError):  # of what was still to be written
        lines.close()
    assert [c.step for c in Run.open(config.run.dir).checkpoints()] == [3]
