"""A reward or observation that is not finite reaches no weight and no statistic, and is seen again from its evidence."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bridle.cli.main import main
from bridle.control.environments import World
from bridle.control.evaluate import EvaluationSettings
from bridle.control.making import WorldSettings
from bridle.control.observations import Observations
from bridle.errors import WorldError
from bridle.jobs.control import ControlConfig, run
from bridle.runs import Run
from bridle.runs.files import load_tensors
from tests.jobs.test_control import forget_after, metrics, small
from tests.jobs.test_faults import events, weights


def glitching(path: Path, *, what: str = "reward", below: int = 200, **changes: Any) -> ControlConfig:
    """Two environments begin anew every third update, and at their 40th step one that drew a low number goes wrong."""
    settings = {"on_fault": "skip", "fault_limit": 2, **changes.pop("run", {})}
    return small(
        path,
        env="BridleTest/Glitching-v0",
        world=WorldSettings(num_envs=2, kwargs=(f"below={below}", f"what={what}")),
        total_steps=14 * 32,
        restart_every=3,
        normalise_observations=True,
        scale_rewards=True,
        evaluation=EvaluationSettings(every=0, final_episodes=5, max_steps=12),
        run=settings,
        **changes,
    )


@pytest.fixture(scope="module")
def skipping(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(glitching(tmp_path_factory.mktemp("skipping") / "run"))


def test_the_rollout_is_left_out_and_the_environments_start_anew(skipping: Path) -> None:
    rows = metrics(skipping)
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert skipped == [event["step"] for event in events(skipping)]
    assert 0 < len(skipped) < 5
    assert rows[-1]["actions"] == 14 * 32 == 32 * (len(rows) - len(skipped))
    for step in skipped:
        before, after = (weights(skipping / "checkpoints" / f"step-{at}") for at in (step - 1, step))
        assert {**before, "episodes.safetensors": b""} == {**after, "episodes.safetensors": b""}
    assert all(torch.isfinite(t).all() for t in load_tensors(skipping / "policy" / "policy.safetensors").values())


def test_a_run_that_left_a_rollout_out_resumes_exactly(skipping: Path, tmp_path: Path) -> None:
    skipped = next(row["step"] for row in metrics(skipping) if row.get("skipped"))
    for after in (skipped, skipped + 1):
        cut = tmp_path / str(after)
        shutil.copytree(skipping, cut)
        forget_after(cut, after)
        run(glitching(cut), resume=True)
        for name in ("metrics.jsonl", "policy/policy.safetensors"):
            assert (cut / name).read_bytes() == (skipping / name).read_bytes()


@pytest.mark.parametrize("what", ["reward", "observation"])
def test_it_is_seen_again(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = glitching(tmp_path / "run", what=what, run={"on_fault": "stop"})
    with pytest.raises(WorldError, match=r"environment \d.* not .*finite.* look at it with: bridle replay"):
        run(config)
    (event,) = events(tmp_path / "run")
    folder = tmp_path / "run" / "faults" / f"step-{event['step']}"
    newest = Run.open(tmp_path / "run").latest_checkpoint()
    assert newest is not None
    assert newest.step == event["step"] - 1
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    head, given, again = capsys.readouterr().out.splitlines()
    assert head.startswith(
        f"step {event['step']} of control: {'the' if what == 'reward' else 'an'} {what} of environment "
    )
    assert given.startswith("world: given holds 1 NaN and 0" if what == "reward" else "world: given holds 0 NaN and 1")
    assert again.startswith(
        "world: the 40 steps since its environments began lead there again: BridleTest/Glitching-v0: "
    )
    report = json.loads((folder / "report.json").read_text())
    report["config"]["world"]["kwargs"] = ["below=0", f"what={what}"]
    (folder / "report.json").write_text(json.dumps(report))
    assert main(["replay", str(folder)]) == 0
    assert capsys.readouterr().out.endswith("lead to finite numbers this time\n")


def test_it_stops_after_so_many_in_a_row(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match="2 steps before it were skipped already"):
        run(glitching(tmp_path / "run", below=1000, n_steps=48))
    assert [event["skipped"] for event in events(tmp_path / "run")] == [True, True, False]


def test_before_the_first_record_there_is_nothing_to_keep(tmp_path: Path) -> None:
    with pytest.raises(WorldError, match=r"after action ., is not a finite number$"):
        run(glitching(tmp_path / "run", below=1000, n_steps=48, run={"on_fault": "stop"}))
    assert not (tmp_path / "run").exists()


def test_an_evaluation_that_goes_wrong_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, reset = list[int](), World.reset

    def watched(self: World, seed: int) -> Observations:
        seeds.append(seed)
        return reset(self, seed)

    monkeypatch.setattr(World, "reset", watched)
    evaluation = EvaluationSettings(every=0, final_episodes=5, max_steps=60)
    config = glitching(tmp_path / "run", below=1000, n_steps=13)
    path = run(dataclasses.replace(config, total_steps=78, evaluation=evaluation))
    (row, *_) = [row for row in metrics(path) if row["step"] == 3]
    assert not any(name.startswith("final/") for name in row)
    assert [event["step"] for event in events(path)] == [3, 3]
    kept = sorted((path / "faults").iterdir())
    assert [folder.name for folder in kept] == ["evaluation-3-deterministic", "evaluation-3-sampled"]
    for folder, event in zip(kept, events(path), strict=True):
        assert str(event["text"]).endswith(
            f"look at it with: bridle replay {folder}; no final of {folder.name[13:]} actions"
        )
        begun = seeds[-1]
        assert main(["replay", str(folder)]) == 0
        assert seeds[-2:] == [begun, begun]
        assert "since its environments began lead there again: " in capsys.readouterr().out
    assert Run.open(path).events()[-1]["kind"] == "finish"
