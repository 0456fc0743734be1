"""Runs with a seeded disease raise its invariant as an event, once, also when taken up again; healthy ones raise none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from bridle.batch import Units
from bridle.cli.main import main
from bridle.jobs import ppo
from bridle.jobs.ppo import EvaluationSettings, run
from bridle.jobs.session import RunSettings, Session, Stopped
from bridle.language.models import save_model
from bridle.language.policy import LanguagePolicy
from bridle.language.sampler import SamplingSettings
from bridle.language.sampler.reference import ReferenceSampler
from bridle.language.scorers import RewardSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.step import Seen, Slopes, Weighed
from bridle.runs import Run
from tests.jobs.small import ppo_config, small_world
from tests.language.tiny import byte_tokenizer

ANSWERS = SamplingSettings(max_new_tokens=40)
"""Long enough for a random model of 260 tokens to stop by itself now and then."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world whose model ends its answers by itself, after three tokens on average."""
    path = small_world(tmp_path_factory.mktemp("world"))
    model = AutoModelForCausalLM.from_pretrained(path / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        hidden = model.model(torch.arange(3, 200)[None]).last_hidden_state[0]
        direction = hidden.mean(dim=0)
        model.lm_head.weight[2] += direction * 4.6 / (hidden @ direction).mean()
    save_model(path / "model", model, byte_tokenizer())
    return path


def told(path: Path) -> list[tuple[object, object]]:
    events = Run.open(path).events()
    return [(e["invariant"], e["crossed"]) for e in events if e["kind"] == "invariant"]


def test_a_healthy_run_raises_none(world: Path, tmp_path: Path) -> None:
    run(
        ppo_config(
            world,
            tmp_path / "run",
            steps=12,
            prompts_per_step=16,
            sampling=ANSWERS,
            reward=judged_by(world, "share"),
            critic_optim=OptimSettings(lr=3e-4),
        )
    )
    assert told(tmp_path / "run") == []


def judged_by(world: Path, *names: str) -> RewardSettings:
    return RewardSettings(functions=tuple(f"{world}/judges.py:{name}" for name in names))


def test_a_judge_that_counts_letters_is_told(world: Path, tmp_path: Path) -> None:
    run(ppo_config(world, tmp_path / "run", steps=6, sampling=ANSWERS, reward=judged_by(world, "length")))
    assert told(tmp_path / "run") == [("reward_length", True)]


def test_answers_that_are_cut_are_told_and_the_command_line_shows_it(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(ppo_config(world, tmp_path / "run", sampling=SamplingSettings(max_new_tokens=2)))
    assert told(tmp_path / "run") == [("cut_by_length", True)]
    assert main(["events", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "invariant" in shown
    assert "likely causes: sampling.max_new_tokens" in shown


def test_a_critic_that_never_moves_is_told(world: Path, tmp_path: Path) -> None:
    still = OptimSettings(lr=0.0)
    run(ppo_config(world, tmp_path / "run", sampling=ANSWERS, reward=judged_by(world, "share"), critic_optim=still))
    assert told(tmp_path / "run") == [("dead_critic", True)]


def test_a_sampler_that_says_other_log_probabilities_is_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = ReferenceSampler.__call__

    def wrong(self: ReferenceSampler, *arguments: Any) -> Any:
        return [replace(answer, logp=answer.logp + 1e-4) for answer in right(self, *arguments)]

    monkeypatch.setattr(ReferenceSampler, "__call__", wrong)
    run(ppo_config(world, tmp_path / "run", sampling=ANSWERS, sampler="reference"))
    assert told(tmp_path / "run") == [("sampler_agreement", True)]


def test_a_forward_pass_that_differs_under_gradients_is_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with dropout left on: what the update sees is not what was prepared."""
    right = LanguagePolicy.differentiate

    def noisy(self: LanguagePolicy, units: Units, slopes: Weighed) -> Seen:
        def shifted(seen: Seen, rows: slice) -> Slopes:
            return slopes(replace(seen, logp=seen.logp + 1e-3), rows)

        seen = right(self, units, shifted)
        return replace(seen, logp=seen.logp + 1e-3)

    monkeypatch.setattr(LanguagePolicy, "differentiate", noisy)
    run(ppo_config(world, tmp_path / "run", sampling=ANSWERS))
    assert told(tmp_path / "run") == [("first_ratio", True)]


def test_a_judge_that_the_gold_score_contradicts_is_told(world: Path, tmp_path: Path) -> None:
    gold = EvaluationSettings(held_out=8, every=10, gold=(f"{world}/judges.py:unlike_letters",))
    run(
        ppo_config(
            world,
            tmp_path / "run",
            steps=20,
            prompts_per_step=16,
            sampling=ANSWERS,
            kl=replace(ppo.KLSettings(), coefficient=0.0),
            actor=OptimSettings(lr=1e-2),
            evaluation=gold,
        )
    )
    assert ("reward_against_gold", True) in told(tmp_path / "run")
    assert {name for name, _ in told(tmp_path / "run")} <= {"reward_against_gold", "reward_length", "cut_by_length"}


def test_a_run_that_is_taken_up_again_says_nothing_twice(world: Path, tmp_path: Path) -> None:
    """The crossing falls after the checkpoint that the second half begins with."""
    whole = ppo_config(world, tmp_path / "whole", steps=6, sampling=SamplingSettings(max_new_tokens=2))
    run(whole)
    again = ppo_config(world, tmp_path / "again", steps=6, sampling=SamplingSettings(max_new_tokens=2))
    record = Session.record

    def killed(self: Session, step: int, metrics: Any) -> None:
        record(self, step, metrics)
        if step == 3:
            raise Stopped("as by a signal that leaves no time to save")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Session, "record", killed)
        with pytest.raises(Stopped):
            run(again)
    assert told(tmp_path / "again") == [("cut_by_length", True)]
    run(again, resume=True)
    assert told(tmp_path / "again") == told(tmp_path / "whole") == [("cut_by_length", True)]
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "again")]
    assert metrics[0] == metrics[1]


def test_a_healthy_agent_raises_none(tmp_path: Path) -> None:
    pytest.importorskip("gymnasium")
    from bridle.jobs.control import ControlConfig
    from bridle.jobs.control import run as train

    config = ControlConfig(
        total_steps=128 * 4 * 14,
        ppo=PPOSettings(epochs=4, value_coefficient=0.5),
        run=RunSettings(dir=tmp_path / "run", quiet=True, threads=1),
    )
    train(replace(config, world=replace(config.world, num_envs=4)))
    assert told(tmp_path / "run") == []
