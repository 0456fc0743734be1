"""Out of memory at some micro-batch: it is halved and told, and the weights are those of a run that had room, to rounding."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridle.errors import TrainingError
from bridle.jobs import ppo, reward, sft
from bridle.language import likelihood, prompts
from bridle.language.prompts import MixSettings
from bridle.language.sampler import ReferenceSampler, SamplingSettings
from bridle.language.sampler.engine import EmbeddedSampler
from bridle.language.scorers import RewardSettings
from bridle.learn.memory import MicroBudget, RowBudget, within_memory, within_rows
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from bridle.runs.checkpoints import load_tensors
from tests.jobs.small import ppo_config, reward_config, sft_config, small_world

LlamaModel: Any = pytest.importorskip("transformers").LlamaModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def plain_backbones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out in a backbone's own forward pass here, which layers in one step do without."""
    monkeypatch.setattr("bridle.language.backbones.join_layers", lambda model: model)


def full(monkeypatch: pytest.MonkeyPatch, *, room: int, after: int) -> Callable[[], int]:
    """Let memory run out at forward passes under gradients with more than ``room`` rows, once ``after`` were done."""
    right, passes, refused = LlamaModel.forward, 0, 0

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal passes, refused
        if torch.is_grad_enabled():
            passes += 1
            if passes > after and len(options["input_ids"]) > room:
                refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory, as the test says")
        return right(self, *arguments, **options)

    monkeypatch.setattr(LlamaModel, "forward", forward)
    return lambda: refused


def full_without_gradients(monkeypatch: pytest.MonkeyPatch, *, room: int, of: str) -> Callable[[], int]:
    """Let memory run out where the function ``of`` looks at more than ``room`` rows of tokens at once, without gradients."""
    right, refused, inside = LlamaModel.forward, 0, 0
    module, name = of.rsplit(".", 1)
    owner = importlib.import_module(module)
    own = getattr(owner, name)

    def watched(*arguments: Any, **options: Any) -> Any:
        nonlocal inside
        inside += 1
        try:
            return own(*arguments, **options)
        finally:
            inside -= 1

    def forward(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal refused
        if inside and not torch.is_grad_enabled() and len(options["input_ids"]) > room:
            refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory, as the test says")
        return right(self, *arguments, **options)

    monkeypatch.setattr(owner, name, watched)
    monkeypatch.setattr(LlamaModel, "forward", forward)
    return lambda: refused


def told(path: Path) -> list[tuple[Any, Any]]:
    return [(event["step"], event["tokens"]) for event in Run.open(path).events() if event["kind"] == "memory"]


def close(a: Path, b: Path) -> bool:
    left, right = load_tensors(a), load_tensors(b)
    return all(torch.allclose(left[name], right[name], rtol=1e-4, atol=1e-6) for name in right)


EVEN = OptimSettings(lr=1e-3, eps=1e-2)
"""With so large an ε, Adam's step is proportional to a small gradient: one counted twice would show."""


@pytest.mark.parametrize("after", [0, 3])
def test_ppo(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """With ``after`` = 3 the gradient of earlier micro-batches is there already, and must not count twice."""
    settings: dict[str, Any] = {
        "steps": 2,
        "ppo": PPOSettings(epochs=1, minibatches=1, micro_batch_tokens=40),
        "actor": EVEN,
        "critic_optim": EVEN,
    }
    ppo.run(ppo_config(world, tmp_path / "roomy", **settings))
    refused = full(monkeypatch, room=2, after=after)
    ppo.run(ppo_config(world, tmp_path / "full", **settings))
    assert refused() == len(told(tmp_path / "full")) >= 1
    assert told(tmp_path / "full")[0] == (1, 20)
    for file in ("policy/model.safetensors", "checkpoints/step-2/critic.safetensors"):
        assert close(tmp_path / "full" / file, tmp_path / "roomy" / file)


def test_sft(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "micro_batch_tokens": 60, "optim": EVEN}
    sft.run(sft_config(world, tmp_path / "roomy", **settings))
    refused = full(monkeypatch, room=2, after=1)
    sft.run(sft_config(world, tmp_path / "full", **settings))
    assert refused() == len(told(tmp_path / "full")) >= 1
    assert close(tmp_path / "full/policy/model.safetensors", tmp_path / "roomy/policy/model.safetensors")


def test_reward(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"epochs": 1, "normalise": False, "optim": EVEN}
    reward.run(reward_config(world, tmp_path / "roomy", **settings))
    refused = full(monkeypatch, room=4, after=0)
    reward.run(reward_config(world, tmp_path / "full", **settings))
    assert refused() == len(told(tmp_path / "full")) >= 1
    assert close(tmp_path / "full/reward/model.safetensors", tmp_path / "roomy/reward/model.safetensors")


@pytest.mark.parametrize("of", ["bridle.jobs.ppo.prepare", "bridle.language.evaluate.look"])
def test_what_ppo_only_looks_at(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of: str) -> None:
    """Values and the reference's log-probs before the update; policy and reference in an evaluation."""
    settings: dict[str, Any] = {
        "steps": 2,
        "ppo": PPOSettings(epochs=1, minibatches=1, micro_batch_tokens=40),
        "actor": EVEN,
        "critic_optim": EVEN,
    }
    ppo.run(ppo_config(world, tmp_path / "roomy", **settings))
    refused = full_without_gradients(monkeypatch, room=2, of=of)
    ppo.run(ppo_config(world, tmp_path / "full", **settings))
    assert refused() == len(told(tmp_path / "full")) >= 1
    assert told(tmp_path / "full")[0][0] == (1 if of.endswith("prepare") else 0)
    assert close(tmp_path / "full/policy/model.safetensors", tmp_path / "roomy/policy/model.safetensors")
    judged = [
        [row["evaluation/exact_kl"] for row in Run.open(tmp_path / name).metrics() if "evaluation/exact_kl" in row]
        for name in ("full", "roomy")
    ]
    assert judged[0] == pytest.approx(judged[1], abs=1e-5)


def test_the_judge_of_ppo(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward model that scores answers: its own number is halved, and kept for a resume; training's is not."""
    reward.run(reward_config(world, tmp_path / "judge", epochs=1))
    model = RewardSettings(model=str(tmp_path / "judge" / "reward"))
    settings: dict[str, Any] = {"steps": 2, "reward": model, "actor": EVEN, "critic_optim": EVEN}
    ppo.run(ppo_config(world, tmp_path / "roomy", **settings))
    refused = full_without_gradients(monkeypatch, room=1, of="bridle.language.scorers.models.score_sequences")
    ppo.run(ppo_config(world, tmp_path / "full", **settings))
    events = [event for event in Run.open(tmp_path / "full").events() if event["kind"] == "memory"]
    assert refused() == len(events) >= 2
    assert {event["step"] for event in events} == {0}  # in the evaluation before the first step
    assert all("judged_tokens" in event and "tokens" not in event for event in events)
    assert "out of memory: the judge's micro-batches of at most " in str(events[0]["text"])
    scores = [
        [row["score"] for row in Run.open(tmp_path / name).metrics() if "score" in row] for name in ("full", "roomy")
    ]
    assert scores[0] == pytest.approx(scores[1], rel=1e-5)
    assert close(tmp_path / "full/policy/model.safetensors", tmp_path / "roomy/policy/model.safetensors")
    before = refused()
    shutil.rmtree(tmp_path / "full" / "checkpoints" / "step-2")
    shutil.rmtree(tmp_path / "full" / "policy")
    ppo.run(ppo_config(world, tmp_path / "full", **settings), resume=True)
    assert refused() == before


def tight(monkeypatch: pytest.MonkeyPatch, sampler: Any, *, room: int, length: int = 6) -> Callable[[], int]:
    """Let memory run out where a sampler has more than ``room`` answers of the run's ``length`` under way."""
    right, refused = sampler.__call__, 0

    def call(self: Any, prompts: Any, uniforms: Any, settings: Any) -> Any:
        nonlocal refused
        if settings.max_new_tokens == length and min(settings.rows, len(prompts)) > room:
            refused += 1
            raise torch.OutOfMemoryError("CUDA out of memory, as the test says")
        return right(self, prompts, uniforms, settings)

    monkeypatch.setattr(sampler, "__call__", call)
    return lambda: refused


@pytest.mark.parametrize("kind", ["engine", "reference"])
def test_sampling(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    settings: dict[str, Any] = {"steps": 1, "sampler": kind, "actor": EVEN, "critic_optim": EVEN}
    ppo.run(ppo_config(world, tmp_path / "roomy", **settings))
    refused = tight(monkeypatch, EmbeddedSampler if kind == "engine" else ReferenceSampler, room=1)
    ppo.run(ppo_config(world, tmp_path / "full", **settings))
    events = [event for event in Run.open(tmp_path / "full").events() if event["kind"] == "memory"]
    assert refused() == len(events) >= 1
    assert (events[0]["step"], events[-1]["rows"]) == (0, 1)
    assert "out of memory: at most 1 answers under way from here on, not 3" in str(events[-1]["text"])
    said = [[row["answer"] for row in Run.open(tmp_path / name).read_samples(1)] for name in ("full", "roomy")]
    assert said[0] == said[1]
    assert close(tmp_path / "full/policy/model.safetensors", tmp_path / "roomy/policy/model.safetensors")


def test_sampling_after_a_resume_goes_on_with_what_was_left(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = tight(monkeypatch, EmbeddedSampler, room=1)
    ppo.run(ppo_config(world, tmp_path / "run", steps=2))
    before = refused()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    shutil.rmtree(tmp_path / "run" / "policy")
    ppo.run(ppo_config(world, tmp_path / "run", steps=2), resume=True)
    assert refused() == before >= 1


def test_sft_evaluates_and_answers(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = sft.EvaluationSettings(share=0.4, every=1, samples=3, sampling=SamplingSettings(max_new_tokens=3))
    settings: dict[str, Any] = {"epochs": 1, "batch_size": 8, "micro_batch_tokens": 60, "evaluation": judged}
    sft.run(sft_config(world, tmp_path / "roomy", **settings))
    refused = full_without_gradients(monkeypatch, room=1, of="bridle.jobs.sft.held_out_loss")
    turned_away = tight(monkeypatch, ReferenceSampler, room=1, length=3)
    sft.run(sft_config(world, tmp_path / "full", **settings))
    events = [event for event in Run.open(tmp_path / "full").events() if event["kind"] == "memory"]
    assert refused() == sum("tokens" in event for event in events) >= 1
    assert turned_away() == sum("rows" in event for event in events) >= 1
    losses = [
        [row["evaluation/loss"] for row in Run.open(tmp_path / name).metrics() if "evaluation/loss" in row]
        for name in ("full", "roomy")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_reward_judges_and_normalises(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"epochs": 1, "optim": EVEN}
    reward.run(reward_config(world, tmp_path / "roomy", **settings))
    refused = full_without_gradients(monkeypatch, room=3, of="bridle.jobs.reward.score_sequences")
    more = full_without_gradients(monkeypatch, room=2, of="bridle.jobs.reward.normalise_scores")
    reward.run(reward_config(world, tmp_path / "full", **settings))
    assert refused() + more() == len(told(tmp_path / "full"))
    assert refused() >= 1
    assert more() >= 1
    assert close(tmp_path / "full/reward/model.safetensors", tmp_path / "roomy/reward/model.safetensors")


def test_the_mix_comes_in_parts_and_the_policys_gradient_counts_once(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory runs out in the demonstrations beside a minibatch whose gradient is there already."""
    settings: dict[str, Any] = {
        "steps": 2,
        "ppo": PPOSettings(epochs=1, minibatches=1),
        "actor": EVEN,
        "critic_optim": EVEN,
        "mix": MixSettings(path=str(world / "demos.jsonl"), coefficient=0.5, batch=6),
    }
    ppo.run(ppo_config(world, tmp_path / "roomy", **settings))
    right, refused = likelihood.token_losses, 0

    def losses(model: Any, batch: Any, tokens: int | None, computing: Any) -> Any:
        nonlocal refused
        for part in right(model, batch, tokens, computing):
            if tokens is None or tokens > 30:
                refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory, as the test says")
            yield part

    monkeypatch.setattr(prompts, "token_losses", losses)
    ppo.run(ppo_config(world, tmp_path / "full", **settings))
    assert refused == len(told(tmp_path / "full")) >= 1
    for file in ("policy/model.safetensors", "checkpoints/step-2/critic.safetensors"):
        assert close(tmp_path / "full" / file, tmp_path / "roomy" / file)
    assert not close(tmp_path / "full/policy/model.safetensors", world / "model" / "model.safetensors")


def test_memory_that_runs_out_where_nothing_is_halved_is_one_line(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has …")

    monkeypatch.setattr("bridle.jobs.sft.save_tensors", save)
    with pytest.raises(TrainingError, match="CUDA out of memory; ask for less at once"):
        sft.run(sft_config(world, tmp_path / "run"))


def test_with_one_text_at_a_time_it_ends_with_one_line() -> None:
    def attempt(tokens: int | None) -> None:
        raise torch.OutOfMemoryError("full")

    rows = RowBudget(8)
    with pytest.raises(TrainingError, match="one answer at a time"):
        within_rows(rows, 3, attempt)
    assert (rows.rows, len(rows.halvings)) == (1, 1)
    with pytest.raises(torch.OutOfMemoryError):
        within_rows(3, 3, attempt)
    budget = MicroBudget(None)
    with pytest.raises(TrainingError, match="one text of 7 tokens at a time"):
        within_memory(budget, torch.tensor([3, 7, 5]), attempt)
    assert budget.tokens == 7
    assert len(budget.halvings) == 2
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(64, torch.tensor([3]), attempt)
