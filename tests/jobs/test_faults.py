"""A step that is not finite moves nothing, leaves its evidence behind, and is seen again from that evidence alone."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from safetensors import SafetensorError

from bridle.cli.main import main
from bridle.errors import TrainingError
from bridle.jobs import control, ppo, reward, sft
from bridle.jobs.faults import digests
from bridle.jobs.session import RunSettings
from bridle.language.roles import CriticSettings
from bridle.language.scorers import JudgingSettings, RewardSettings
from bridle.learn.a2c import A2CSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from bridle.runs.checkpoints import load_tensors, save_tensors
from tests.jobs.small import ppo_config, reward_config, sft_config, small_world

WILD = OptimSettings(lr=1e25, max_grad_norm=None)
"""After one step the weights are so large that the next forward pass overflows."""

HUGE = """
def judge(prompts, completions):
    huge = any(p.endswith(("3", "7")) for p in prompts)
    return [3e38 if huge and b == 0 else float(len(c) % 3) for b, c in enumerate(completions)]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = small_world(tmp_path_factory.mktemp("world"))
    (path / "huge.py").write_text(HUGE)
    return path


@pytest.fixture(autouse=True)
def unbounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let scores pass that would be refused before they could overflow anything."""
    monkeypatch.setattr("bridle.language.scorers.functions.LARGEST_SCORE", math.inf)


def huge(world: Path, path: Path, **changes: Any) -> ppo.PPOConfig:
    """Two prompts a step; in steps that hold one ending in 3 or 7, one score is as large as float32 can hold."""
    return ppo_config(
        world,
        path,
        steps=6,
        prompts_per_step=2,
        reward=RewardSettings(functions=(f"{world}/huge.py:judge",)),
        ppo=PPOSettings(epochs=1, minibatches=1),
        **changes,
    )


def events(path: Path) -> list[dict[str, Any]]:
    return [event for event in Run.open(path).events() if event["kind"] == "fault"]


def stopped(run: Any, config: Any) -> Path:
    with pytest.raises(TrainingError, match="look at it with: bridle replay"):
        run(config)
    (event,) = events(config.run.dir)
    folder: Path = config.run.dir / "faults" / f"step-{event['step']}"
    return folder


def report(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / "report.json").read_text())
    return read


def replayed(folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    capsys.readouterr()
    assert main(["replay", str(folder)]) == 0
    return capsys.readouterr().out.splitlines()


def weights(folder: Path) -> dict[str, bytes]:
    kept = [p for p in sorted(folder.rglob("*.safetensors")) if p.name != "state.safetensors"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def test_skipped_steps_move_neither_weights_nor_optimiser_by_a_bit(world: Path, tmp_path: Path) -> None:
    config = huge(world, tmp_path / "run", run={"on_fault": "skip", "fault_limit": 6, "checkpoint_every": 1})
    ppo.run(config)
    rows = [row for row in Run.open(tmp_path / "run").metrics() if "evaluation/score" not in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    skipped = [int(str(row["step"])) for row in rows if row.get("skipped")]
    assert skipped == [event["step"] for event in events(tmp_path / "run")]
    assert 0 < len(skipped) < 6
    checkpoints = tmp_path / "run" / "checkpoints"
    for step in range(2, 7):
        same = weights(checkpoints / f"step-{step}") == weights(checkpoints / f"step-{step - 1}")
        assert same == (step in skipped)


def test_a_run_stops_after_so_many_skips_in_a_row(world: Path, tmp_path: Path) -> None:
    config = sft_config(
        world, tmp_path / "run", optim=WILD, run={"on_fault": "skip", "fault_limit": 2, "checkpoint_every": 1}
    )
    with pytest.raises(TrainingError, match="2 steps before it were skipped already"):
        sft.run(config)
    assert [event["step"] for event in events(tmp_path / "run")] == [2, 3, 4]
    assert [event["skipped"] for event in events(tmp_path / "run")] == [True, True, False]
    checkpoint = Run.open(tmp_path / "run").latest_checkpoint()
    assert checkpoint is not None
    assert checkpoint.step == 3


def test_sft_is_seen_again_in_a_fresh_process(world: Path, tmp_path: Path) -> None:
    folder = stopped(sft.run, sft_config(world, tmp_path / "run", optim=WILD))
    assert sorted(p.name for p in folder.iterdir()) == ["batch.safetensors", "report.json", "weights.safetensors"]
    command = [sys.executable, "-c", "import sys; from bridle.cli.main import main; sys.exit(main())"]
    done = subprocess.run([*command, "replay", str(folder)], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    head, first, *_ = done.stdout.splitlines()
    assert head == "step 2 of sft: the loss was not finite"
    assert first.startswith("forward: the output of model.model.layers.0.")


def test_a_reward_models_fault_is_seen_again(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(reward.run, reward_config(world, tmp_path / "run", optim=WILD))
    assert replayed(folder, capsys)[1].startswith("forward: the output of model.layers.0.")


def test_a_critic_that_diverged_is_found_before_the_update(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridle.learn.optim.SAFE", math.inf)  # or the step that spoils the weights would not be taken
    config = ppo_config(world, tmp_path / "run", critic_optim=replace(WILD, lr=1e38))
    folder = stopped(ppo.run, config)
    assert report(folder)["what"] == "the policy's value"
    assert replayed(folder, capsys)[1].startswith("weights: critic.")


def test_a_step_that_would_leave_float32_is_not_taken(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = stopped(ppo.run, ppo_config(world, tmp_path / "run", critic_optim=replace(WILD, lr=1e38)))
    assert folder.name == "step-1"
    assert report(folder)["what"] == "a weight of critic after its step"
    assert all(bool(t.isfinite().all()) for t in load_tensors(folder / "weights.safetensors").values())
    assert replayed(folder, capsys)[1].startswith(
        "step: all of it is finite, but AdamW would have left float32's range"
    )


def test_a_policy_that_diverged_is_found_while_it_samples(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = PPOSettings(epochs=1, minibatches=1)
    folder = stopped(ppo.run, ppo_config(world, tmp_path / "run", actor=WILD, ppo=settings))
    assert folder.name == "step-2"
    assert report(folder)["what"] == "the policy's log-probability while sampling"
    assert replayed(folder, capsys)[1].startswith("forward: the output of actor.")
    assert not list(Run.open(tmp_path / "run").path.glob("samples/step-2*"))


def test_a_huge_score_is_seen_again(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(ppo.run, huge(world, tmp_path / "run"))
    assert len(report(folder)["rows"]) >= 1
    lines = replayed(folder, capsys)
    assert lines[1].startswith(("batch: minibatch/", "backward: the gradient"))


def test_a_fault_between_minibatches_keeps_the_weights_of_that_moment(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first minibatch is learnt, the second overflows: what is kept are the weights between them."""
    settings = {"actor": WILD, "critic": CriticSettings(source="trunk"), "critic_optim": OptimSettings(lr=0.0)}
    folder = stopped(ppo.run, ppo_config(world, tmp_path / "run", **settings))
    assert report(folder)["taken"] == 1
    assert replayed(folder, capsys)[1].startswith("forward: the output of actor.model.")


@pytest.mark.parametrize(
    ("algorithm", "shared"), [("ppo", False), ("ppo", True), ("a2c", False), ("a2c", True), ("trpo", False)]
)
def test_an_agents_fault_is_seen_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], algorithm: Any, shared: bool
) -> None:
    """By a policy that differentiates by hand, and by one that leaves it to autograd (a trunk for both)."""
    config = control.ControlConfig(
        algorithm=algorithm,
        total_steps=4000,
        scale_rewards=False,
        optim=replace(WILD, lr=1e30),
        a2c=A2CSettings(value_coefficient=0.5),
        run=RunSettings(dir=tmp_path / "run", quiet=True, threads=1),
    )
    config = replace(config, network=replace(config.network, shared_trunk=shared))
    folder = stopped(control.run, config)
    assert len(replayed(folder, capsys)) >= 2


class Spiky(gymnasium.Env[Any, Any]):
    """Rewards 1, but once as much as float32 can hold."""

    observation_space = gymnasium.spaces.Box(-1, 1, (3,))
    action_space = gymnasium.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(3, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        reward = 3e38 if self.steps == 70 else float(action)
        return np.full(3, (self.steps % 7) / 10, np.float32), reward, False, False, {}


def test_an_agent_skips_and_goes_on(tmp_path: Path) -> None:
    gymnasium.register("Spiky-v0", entry_point=Spiky)
    run = {"quiet": True, "threads": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "on_fault": "skip"}
    try:
        config = control.ControlConfig(
            env="Spiky-v0",
            total_steps=6 * 32 * 2,
            n_steps=32,
            restart_every=0,
            scale_rewards=False,
            ppo=PPOSettings(epochs=2, minibatches=2),
            run=RunSettings(dir=tmp_path / "run", **run),  # type: ignore[arg-type]
        )
        config = replace(
            config,
            world=replace(config.world, num_envs=2),
            evaluation=replace(config.evaluation, every=0, final_episodes=5, max_steps=20),
        )
        control.run(config)
    finally:
        del gymnasium.registry["Spiky-v0"]
    (event,) = events(tmp_path / "run")
    assert event["step"] == 3
    rows = Run.open(tmp_path / "run").metrics()
    assert [row["step"] for row in rows if row.get("skipped")] == [3]
    kept = [weights(tmp_path / f"run/checkpoints/step-{step}/policy") for step in (2, 3, 4)]
    assert kept[0] == kept[1] != kept[2]


def test_a_replay_that_finds_nothing_says_so(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = stopped(sft.run, sft_config(world, tmp_path / "run", optim=WILD))
    tensors = load_tensors(folder / "weights.safetensors")
    save_tensors(folder / "weights.safetensors", {name: t.clamp(-0.1, 0.1) for name, t in tensors.items()})
    assert main(["replay", str(folder)]) == 2
    assert "weights.safetensors is not what was kept" in capsys.readouterr().err
    (folder / "report.json").write_text(json.dumps(report(folder) | {"files": digests(folder)}))
    assert main(["replay", str(folder)]) == 1
    assert "here everything is" in capsys.readouterr().err
    (folder / "report.json").write_text(json.dumps(report(folder) | {"job": "other"}))
    assert main(["replay", str(folder)]) == 2
    (folder / "report.json").unlink()
    assert main(["replay", str(folder)]) == 2
    assert "is not a fault" in capsys.readouterr().err
    assert main(["replay", str(tmp_path / "nowhere")]) == 2


def test_evidence_that_does_not_fit_on_the_disk_hides_nothing(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("bridle.jobs.faults.save_tensors", full)
    with pytest.raises(TrainingError, match=r"the loss is not finite.*evidence could not be kept \(.*No space left"):
        sft.run(sft_config(world, tmp_path / "run", optim=WILD))
    assert [path.name for path in (tmp_path / "run/faults").iterdir()] == []


MOODY = """
def judge(prompts, completions):
    return [None if p.endswith("3") else float(len(c) % 3) for p, c in zip(prompts, completions)]
"""


def test_answers_without_a_score_are_left_out_counted_and_told(world: Path, tmp_path: Path) -> None:
    (world / "moody.py").write_text(MOODY)
    judged = RewardSettings(
        functions=(f"{world}/moody.py:judge",), judging=JudgingSettings(retries=1, wait=0.0, on_failure="drop")
    )
    ppo.run(ppo_config(world, tmp_path / "run", reward=judged, steps=3))
    run = Run.open(tmp_path / "run")
    assert any(e["outcome"] == "retried" for e in run.events() if e["kind"] == "judge")
    assert not any("retried" in name for row in run.metrics() for name in row), "asking again changes no number"
    told = {(e["step"], e["answers"]) for e in run.events() if e["kind"] == "judge" and e["outcome"] == "dropped"}
    rows = [row for row in run.metrics() if "clip_fraction" in row]
    counted = {(row["step"], row["judge/judge/dropped"]) for row in rows if "judge/judge/dropped" in row}
    assert counted
    assert counted <= told
    for step, dropped in counted:
        assert len(run.read_samples(int(str(step)))) == 8 - int(float(str(dropped)))
        assert not any(str(row["prompt"]).endswith("3") for row in run.read_samples(int(str(step))))
