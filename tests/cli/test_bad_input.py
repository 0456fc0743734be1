"""What a user can get wrong: one line that says what and how to mend it, exit code 2, and nothing written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bridle.cli.main import main
from bridle.runs import Run
from tests.cli.world import PPO, SFT, contents, judged, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("world")
    make_world(path)
    return path


Bridle = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bridle(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridle]:
    """Run the command line in the world; exit code, stdout, stderr. What a case writes as ``r`` is removed after it."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    shutil.rmtree(world / "r", ignore_errors=True)


@pytest.mark.parametrize(
    "arguments",
    [
        (*SFT, "--model.path", "pad-eos"),
        (*SFT, "--model.path", "bos-eos"),
        (*SFT, "--model.path", "no-pad"),
        (*PPO, "--model.path", "pad-eos"),
        (*PPO, "--model.path", "bos-eos"),
    ],
    ids=lambda value: f"{value[0]} {value[-1]}",
)
def test_unusual_special_tokens_are_no_mistake(bridle: Bridle, arguments: tuple[str, ...]) -> None:
    assert bridle(*arguments) == (0, "r\n", "")


@pytest.fixture(scope="module")
def failed(world: Path) -> Path:
    """A run of PPO whose judge failed at step 2, behind the evaluations at 0 and 1 and a checkpoint at 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert main((*judged("later"), "--run.dir", "failed", "--evaluation.every", "1")) == 2
    return world / "failed"


@pytest.fixture
def r(failed: Path, world: Path) -> Path:
    """A copy of the failed run, as ``r``."""
    return Path(shutil.copytree(failed, world / "r"))


def test_a_judge_that_fails_later_leaves_what_was_recorded(bridle: Bridle, failed: Path, r: Path) -> None:
    run = Run.open(r)
    assert "later raised RuntimeError: the judge is down (judges.py, line " in str(run.events()[-1]["text"])
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]
    assert bridle(*PPO)[2] == "bridle: r is not empty; pass --run.dir another path or `bridle resume r`\n"
    assert contents(r) == contents(failed)
    assert bridle("resume", "r") == (0, "r\n", "")
    assert bridle("resume", "r") == (0, "r has finished; there is nothing to resume\n", "")


def test_a_damaged_checkpoint_is_passed_over_where_that_is_asked_for(bridle: Bridle, r: Path) -> None:
    weights = r / "checkpoints" / "step-1" / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    before = contents(r)
    code, _, err = bridle("resume", "r")
    assert (code, err.count("\n")) == (2, 1)
    assert (
        "r: no checkpoint is whole (step-1 damaged); put one back, or begin again with: bridle resume r --force" in err
    )
    after = contents(r)
    assert {name for name in {**before, **after} if before.get(name) != after.get(name)} <= {"events.jsonl"}
    code, _, err = bridle("resume", "r", "--force")
    assert (code, err.count("\n")) == (2, 1)  # begun again, so the judge fails again at step 2
    assert "the judge is down" in err
    run = Run.open(r)
    assert {"checkpoint_skipped", "resume"} <= {str(event["kind"]) for event in run.events()}
    assert [row["step"] for row in run.metrics()] == [0, 1, 1]
    assert (r / "faults" / "checkpoint-step-1").is_dir()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"clip": 0.2,', '"clip": 0.3,', "ppo.clip=0.3 is not what r was started with, so it would not go"),
        ('"steps": 2,', '"steps": "many",', "steps='many': expected int"),
        ('"steps": 2,', '"steps": 0,', "steps=0: expected a whole number >= 1"),
        (
            '"clip": 0.2,',
            '"clip": 0.2, "clipp": 1,',
            "ppo.clipp is not a setting of PPOSettings; did you mean ppo.clip?",
        ),
        ('"path": "model"', '"path": "./gone"', "model ./gone: no such folder"),
        ('"job": "ppo"', '"job": "tea"', "r is a run of 'tea', unknown to this bridle"),
        ("{", "", "r/config.json is not valid JSON"),
    ],
)
def test_a_config_edited_by_hand_is_refused(bridle: Bridle, r: Path, old: str, new: str, words: str) -> None:
    path = r / "config.json"
    path.write_text(path.read_text().replace(old, new, 1))
    before = contents(r)
    code, out, err = bridle("resume", "r")
    assert words in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert contents(r) == before


def test_records_edited_by_hand_are_refused(bridle: Bridle, r: Path) -> None:
    (r / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    code, _, err = bridle("resume", "r")
    assert (code, err) == (
        2,
        "bridle: r/metrics.jsonl line 1 is damaged, before the checkpoint of step 1; put the file back as it was, "
        "or delete that line and go on without it: bridle resume r --force\n",
    )


def test_a_run_in_use_is_left_alone(bridle: Bridle, r: Path) -> None:
    with Run.open(r, write=True):
        before = contents(r)
        code, _, err = bridle("resume", "r")
        assert (code, err) == (2, "bridle: r is in use by another process; wait for it to end\n")
        assert contents(r) == before


def test_a_tracker_that_is_not_installed_leaves_nothing(
    bridle: Bridle, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    code, _, err = bridle(*SFT, "--run.trackers", "wandb")
    assert (code, err.count("\n")) == (2, 1)
    assert "run.trackers='wandb': expected an installed package; pip install 'bridle[wandb]'" in err
    assert not (world / "r").exists()


def test_an_interrupt_finishes_the_step_and_can_be_gone_on_from(bridle: Bridle, world: Path) -> None:
    code, out, err = bridle(*judged("stop"))
    assert (code, out, err) == (130, "", "bridle: stopped after step 1; go on with: bridle resume r\n")
    assert [checkpoint.step for checkpoint in Run.open(world / "r").checkpoints()] == [1]
    assert bridle("resume", "r")[:2] == (0, "r\n")


def test_weights_that_run_away_are_a_failure_of_the_training(bridle: Bridle, world: Path) -> None:
    code, out, err = bridle(*SFT, "--optim.lr", "1e30", "--optim.warmup-steps", "0", "--optim.schedule", "constant")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is not finite" in err
    assert torch.get_num_threads() == 1
