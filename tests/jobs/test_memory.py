"""Out of memory at some micro-batch: it is halved and told, and the weights are those of a run that had room, to rounding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bridle.errors import TrainingError
from bridle.jobs import ppo, reward, sft
from bridle.learn.memory import MicroBudget, within_memory
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from bridle.runs.checkpoints import load_tensors
from tests.jobs.small import ppo_config, reward_config, sft_config, small_world

LlamaModel: Any = pytest.importorskip("transformers").LlamaModel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("world"))


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


def test_with_one_text_at_a_time_it_ends_with_one_line() -> None:
    def attempt(tokens: int | None) -> None:
        raise torch.OutOfMemoryError("full")

    budget = MicroBudget(None)
    with pytest.raises(TrainingError, match="one text of 7 tokens at a time"):
        within_memory(budget, torch.tensor([3, 7, 5]), attempt)
    assert budget.tokens == 7
    assert len(budget.halvings) == 2
    with pytest.raises(torch.OutOfMemoryError):
        within_memory(64, torch.tensor([3]), attempt)
