"""The whole line at a small size: every stage runs, the parts fit, and what is finished is not done again."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bridle.errors import ConfigError, RunError
from bridle.jobs import quickstart
from bridle.jobs.quickstart import QuickstartConfig, ScaleSettings
from bridle.jobs.session import RunSettings, Stopped
from bridle.quickstart import rows
from bridle.quickstart.gold import gold_score
from bridle.runs import Run, RunState

SMALL = ScaleSettings(
    demonstrations=960,
    ranked_prompts=16,
    prompts=128,
    held_out=16,
    sft_epochs=2,
    reward_epochs=1,
    ppo_steps=2,
)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_whole_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "quick"
    config = QuickstartConfig(run=RunSettings(dir=root, quiet=True, threads=1), scale=SMALL)
    assert quickstart.run(config) == root

    demonstrations, held_out = lines(root / "demonstrations.jsonl"), lines(root / "held_out.jsonl")
    assert len(demonstrations) == 960
    assert len(held_out) == 16
    for row in lines(root / "rankings.jsonl"):
        assert len(row["answers"]) == 4
        assert row["gold"] == sorted(row["gold"], reverse=True)
        assert row["gold"] == [gold_score(row["prompt"], answer) for answer in row["answers"]]
    for stage in ("sft", "reward", "ppo"):
        assert Run.open(root / stage).state() is RunState.FINISHED
    AutoModelForCausalLM.from_pretrained(root / "ppo" / "policy")
    AutoModelForSequenceClassification.from_pretrained(root / "reward" / "reward")

    results = json.loads((root / "results.json").read_text())
    assert results["kl"]["sft"] == pytest.approx(0, abs=1e-5)  # the SFT model is its own reference
    assert results["kl"]["ppo"] > 0
    said = Run.open(root / "ppo").read_samples(0, name="evaluation")
    assert [row["prompt"] for row in said] == [row["prompt"] for row in held_out]
    assert results["length"]["sft"] == pytest.approx(sum(row["length"] for row in said) / 16)

    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")}
    (root / "results.json").unlink()
    (root / "metrics.jsonl").write_text("")  # as where it was stopped before it compared
    capsys.readouterr()
    quickstart.run(replace(config, run=replace(config.run, quiet=False)), resume=True)
    assert "beginning again" not in capsys.readouterr().err  # what is finished stays
    assert json.loads((root / "results.json").read_text()) == results
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.safetensors")} == before

    with pytest.raises(RunError, match="is not empty"):
        quickstart.run(config)


@pytest.mark.parametrize("part", ["demonstrations", "rankings"])
def test_a_signal_between_the_jobs_is_heard(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the three jobs listens for itself; nobody but the quickstart does while data are made."""
    made, began = getattr(rows, part), []

    def signalled(*given: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        return [(1, [{"prompt": "p", "answers": ["a", "b"]}])] * 2 if part == "rankings" else made(*given, **named)

    monkeypatch.setattr(rows, part, signalled)
    monkeypatch.setattr(quickstart.sft, "run", lambda config, **_: began.append("sft"))
    monkeypatch.setattr(quickstart.reward, "run", lambda config, **_: began.append("reward"))
    root = tmp_path / "quick"
    config = QuickstartConfig(run=RunSettings(dir=root, quiet=True, threads=1), scale=SMALL)
    with pytest.raises(Stopped, match=f"stopped; go on with: bridle resume {root}$"):
        quickstart.run(config)
    assert began == (["sft"] if part == "rankings" else [])
    assert Run.open(root).state() is RunState.STOPPED
    assert not (root / "rankings.jsonl").exists()


def test_it_is_resumed_by_any_name_of_its_place_and_nowhere_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its stages were given one another's paths: moved, or seen from another folder, these lead nowhere."""
    asked: list[tuple[Path, str]] = []

    def stop(config: Any, **_: object) -> Path:
        asked.append((config.run.dir, config.model.path))
        raise Stopped("stopped")

    monkeypatch.setattr(quickstart.sft, "run", stop)
    monkeypatch.chdir(tmp_path)
    config = QuickstartConfig(run=RunSettings(dir=Path("quick"), quiet=True, threads=1), scale=SMALL)
    with pytest.raises(Stopped):
        quickstart.run(config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "link").symlink_to(tmp_path / "quick")
    for name in (tmp_path / "quick", Path("other/link")):
        with pytest.raises(Stopped):
            quickstart.run(replace(config, run=replace(config.run, dir=name)), resume=True)
    assert asked == [(Path("quick/sft"), "quick/fresh")] * 3
    monkeypatch.chdir(tmp_path / "other")
    with pytest.raises(RunError, match="was begun as quick, a path by which its stages know one another"):
        quickstart.run(replace(config, run=replace(config.run, dir=tmp_path / "quick")), resume=True)


def test_a_second_signal_in_a_stage_names_the_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(config: object, **_: object) -> Path:
        raise KeyboardInterrupt("stopped at once; go on with: bridle resume the/stage")

    monkeypatch.setattr(quickstart.sft, "run", interrupted)
    root = tmp_path / "quick"
    with pytest.raises(KeyboardInterrupt, match=f"stopped at once; go on with: bridle resume {root}$"):
        quickstart.run(QuickstartConfig(run=RunSettings(dir=root, quiet=True, threads=1), scale=SMALL))
    assert Run.open(root).state() is RunState.INTERRUPTED


def test_scales_that_cannot_work_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scale\.held_out=1: expected a whole number >= 2"):
        replace(SMALL, held_out=1)
    with pytest.raises(ConfigError, match=r"scale\.ppo_steps=0"):
        replace(SMALL, ppo_steps=0)
    with pytest.raises(ConfigError, match=r"held_out"):
        quickstart.run(QuickstartConfig(run=RunSettings(dir=tmp_path / "run"), scale=replace(SMALL, held_out=9999)))
    assert not (tmp_path / "run").exists()


def test_the_default_directory_is_always_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert QuickstartConfig().run.dir == Path("runs/quickstart")
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    assert QuickstartConfig().run.dir == Path("runs/quickstart-2")
