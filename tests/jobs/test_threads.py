"""Who computes in how many threads: PyTorch in one where a model's layers run compiled, and in all where they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridle.jobs import ppo, reward, sft
from bridle.language import decoding, layers, vocabulary
from bridle.language.quickening import calm_for, quicken
from bridle.language.scorers import RewardSettings
from bridle.learn.optim import Optimiser
from bridle.native.sharing import threads
from bridle.runs import Run
from tests.jobs.small import ppo_config, reward_config, sft_config, small_world
from tests.language.tiny import tiny_model

JUDGE = """
import torch

def threads(prompts, completions):
    return [float(torch.get_num_threads()) for _ in completions]
"""
RUN = {"threads": 2}
JOBS = {"sft": (sft.run, sft_config), "reward": (reward.run, reward_config), "ppo": (ppo.run, ppo_config)}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    if any(code.library is None for code in (layers, vocabulary, decoding)):
        pytest.skip("not compiled")
    (tmp_path / "threads.py").write_text(JUDGE)
    return small_world(tmp_path)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """PyTorch's threads and those of compiled code, whenever an optimiser takes a step."""
    found: set[tuple[int, int]] = set()
    step = Optimiser.step

    def noting(self: Optimiser, *given: Any, **named: Any) -> Any:
        found.add((torch.get_num_threads(), threads()))
        return step(self, *given, **named)

    monkeypatch.setattr(Optimiser, "step", noting)
    return found


@pytest.mark.parametrize("job", JOBS)
def test_pytorch_computes_in_one_thread_where_layers_run_compiled(
    job: str, world: Path, tmp_path: Path, seen: set[tuple[int, int]]
) -> None:
    before = torch.get_num_threads()
    run, config = JOBS[job]
    run(config(world, tmp_path / "run", run=RUN))
    assert seen == {(1, 2)}
    assert torch.get_num_threads() == before


def threads_for(*models: nn.Module, dtype: torch.dtype = torch.float32) -> int:
    """PyTorch's threads while these models compute, of two; computing itself would take long where other tests compute too."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with calm_for(torch.autocast("cpu", dtype=dtype, enabled=dtype is not torch.float32), *models):
            return torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("world")
def test_it_computes_in_all_where_one_model_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    quick, plain = quicken(tiny_model()), quicken(tiny_model("gpt2"))
    assert [threads_for(quick), threads_for(quick, quick)] == [1, 1]
    assert [threads_for(plain), threads_for(quick, plain), threads_for(nn.Linear(2, 2))] == [2, 2, 2]
    monkeypatch.setattr(layers, "halved", None)
    assert threads_for(quick, dtype=torch.bfloat16) == 2


@pytest.mark.usefixtures("world")
def test_it_computes_in_all_where_an_adapter_learns_or_somebody_looks_on() -> None:
    watched, adapted = quicken(tiny_model()), quicken(tiny_model())
    watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    adapted.model.layers[1].self_attn.q_proj = nn.Sequential(adapted.model.layers[1].self_attn.q_proj, nn.Identity())
    assert [threads_for(watched), threads_for(adapted)] == [2, 2]


def test_judges_have_all_threads_and_a_step_of_writing_leaves_them_to_compiled_code(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing: set[tuple[int, int]] = set()
    step = decoding.Stack.step

    def noting(self: decoding.Stack, *given: Any) -> Any:
        writing.add((torch.get_num_threads(), threads()))
        return step(self, *given)

    monkeypatch.setattr(decoding.Stack, "step", noting)
    judge = RewardSettings(functions=(f"{world}/threads.py:threads",))
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # a sampler is tried before the run sets its own
    try:
        ppo.run(ppo_config(world, tmp_path / "run", run=RUN, reward=judge, steps=1))
    finally:
        torch.set_num_threads(before)
    assert writing == {(1, 2)}
    assert [row["score"] for row in Run.open(tmp_path / "run").read_samples(1)] == [2.0] * 8
