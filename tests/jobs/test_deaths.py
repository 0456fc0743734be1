"""A run in which environments die goes on, says so, and is taken up again as the run that it was."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bridle.control.collect import Collector
from bridle.control.evaluate import EvaluationSettings
from bridle.control.making import WorldSettings
from bridle.control.networks import NetworkSettings
from bridle.errors import WorldError
from bridle.jobs.control import ControlConfig, run
from bridle.runs import Run
from tests.control.test_deaths import tickets
from tests.jobs.test_control import forget_after, metrics, small

# from CPython 3.12 on, multiprocessing warns of any fork while threads run; torch has some
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def fated(path: Path, asked: tuple[str, ...], **changes: Any) -> ControlConfig:
    world = {
        "num_envs": 2,
        "vectorization": "async",
        "on_death": "restart",
        "kwargs": asked,
        **changes.pop("world", {}),
    }
    return small(
        path,
        env="BridleTest/Fated-v0",
        world=WorldSettings(**world),
        total_steps=6 * 32,
        restart_every=5,
        normalise_observations=True,
        scale_rewards=True,
        evaluation=EvaluationSettings(every=0, final_episodes=5),
        **changes,
    )


@pytest.mark.parametrize(
    ("mode", "changes"),
    [("same_step", {}), ("next_step", {"network": NetworkSettings(hidden=(8,), recurrent="gru")})],
)
def test_a_run_in_which_environments_died_is_taken_up_as_the_run_that_it_was(
    mode: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    asked = (tickets(tmp_path / "tickets", 3),)

    def config(name: str) -> ControlConfig:
        return fated(tmp_path / name, asked, world={"autoreset": mode}, **changes)

    whole, cut = run(config("whole")), tmp_path / "cut"
    assert not list((tmp_path / "tickets").iterdir())
    shutil.copytree(whole, cut)
    forget_after(cut, 3)
    run(config("cut"), resume=True)
    for name in ("metrics.jsonl", "policy/policy.safetensors", "checkpoints/step-6/episodes.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    events = [event for event in Run.open(cut).events() if event["kind"] == "environment"]
    assert len(events) == 3, "taking the same steps again is no death"


def test_a_death_while_a_run_is_taken_up_is_none_of_its_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made anew from the seed that it would have begun with, and loses nothing."""
    asked = (tickets(tmp_path / "tickets", 0),)
    whole = run(fated(tmp_path / "whole", asked))
    cut, replay = tmp_path / "cut", Collector.replay
    shutil.copytree(whole, cut)
    forget_after(cut, 3)

    def kill_and_replay(self: Collector, *arguments: Any, **more: Any) -> bool:
        assert self.world._processes is not None
        process = self.world._processes.processes[0]
        assert process is not None
        process.kill()
        process.join()
        return replay(self, *arguments, **more)

    monkeypatch.setattr(Collector, "replay", kill_and_replay)
    run(fated(cut, asked), resume=True)
    for name in ("metrics.jsonl", "policy/policy.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    (event,) = [event for event in Run.open(cut).events() if event["kind"] == "environment"]
    assert event["step"] == 3


def test_a_run_in_which_an_environment_hung_is_taken_up_as_the_run_that_it_was(tmp_path: Path) -> None:
    asked = (tickets(tmp_path / "tickets", 1), "how=hang")
    whole, cut = run(fated(tmp_path / "whole", asked, world={"step_timeout": 2.0})), tmp_path / "cut"
    shutil.copytree(whole, cut)
    forget_after(cut, 3)
    run(fated(cut, asked, world={"step_timeout": None}), resume=True)
    for name in ("metrics.jsonl", "policy/policy.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    (event,) = [event for event in Run.open(cut).events() if event["kind"] == "environment"]
    assert "did not answer within 2 s; made anew (1 of at most 10)" in str(event["text"])


def test_a_death_is_an_event_a_line_and_a_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (tickets(tmp_path / "tickets", 3), "how=raise")
    path = run(fated(tmp_path / "run", asked, run={"quiet": False}, record_every=4))
    events = [event for event in Run.open(path).events() if event["kind"] == "environment"]
    assert [event["step"] for event in events] == [1, 1, 1]
    said = capsys.readouterr().err.splitlines()
    for event in events:
        assert str(event["text"]) in said
        assert str(event["text"]).startswith("step 1: environment ")
        assert " raised KeyError: 'the\\nbattery is empty'; made anew (" in str(event["text"])
    rows = {row["step"]: row for row in metrics(path)}
    assert rows[1]["environments_made_anew"] == 3
    assert rows[1]["actions"] == 32 - 3
    assert not any("environments_made_anew" in row for step, row in rows.items() if step > 1)


def test_one_death_too_many_ends_the_run_and_its_checkpoint_stays(tmp_path: Path) -> None:
    config = fated(tmp_path / "run", (tickets(tmp_path / "tickets", 0),), world={"death_limit": 1})
    run(config)
    forget_after(tmp_path / "run", 5)
    tickets(tmp_path / "tickets", 2)
    with pytest.raises(WorldError, match=r"Fated-v0: step: the process of environment ., .* died, killed by signal 9"):
        run(config, resume=True)
    found = Run.open(tmp_path / "run").latest_checkpoint()
    assert found is not None
    assert found.step == 5


def test_what_follows_a_death_may_be_decided_when_the_run_is_taken_up(tmp_path: Path) -> None:
    asked, path = (tickets(tmp_path / "tickets", 0),), tmp_path / "run"
    run(fated(path, asked, world={"on_death": "fail"}))
    forget_after(path, 3)
    tickets(tmp_path / "tickets", 1)
    with pytest.raises(WorldError, match="died, killed by signal 9"):
        run(fated(path, asked, world={"on_death": "fail"}), resume=True)
    tickets(tmp_path / "tickets", 1)
    run(fated(path, asked, world={"death_limit": 3}), resume=True)
    assert [event["kind"] for event in Run.open(path).events()].count("environment") == 1


def test_a_rollout_of_which_nothing_is_left_is_not_learnt_from(tmp_path: Path) -> None:
    changes = {"algorithm": "a2c", "n_steps": 1, "run": {"checkpoint_every": None}, "world": {"num_envs": 1}}
    config = fated(tmp_path / "run", (tickets(tmp_path / "tickets", 2),), **changes)
    rows = metrics(run(replace(config, total_steps=16)))
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert len(skipped) == 2
    assert [row["step"] for row in rows if "environments_made_anew" in row] == skipped
    assert rows[-1]["actions"] == 16
    assert rows[-1]["step"] == 16 + 2
