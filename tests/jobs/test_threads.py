"""Who computes in how many threads: PyTorch in one where a model's layers run compiled, and in all where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bridle.jobs import ppo, reward, sft
from bridle.language import decoding, evaluate, layers, vocabulary
from bridle.language.backbones import join_layers
from bridle.language.causal import CausalModel
from bridle.language.policy import LanguagePolicy, critic_from_actor, value_head
from bridle.language.quickening import quicken
from bridle.language.sampler import ReferenceSampler, SamplingSettings
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


def noting(found: set[tuple[int, int]], call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that notes PyTorch's threads and those of compiled code whenever it is called."""

    def noted(*given: Any, **named: Any) -> Any:
        found.add((torch.get_num_threads(), threads()))
        return call(*given, **named)

    return noted


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[tuple[int, int]]:
    """PyTorch's threads and those of compiled code, whenever an optimiser takes a step."""
    found: set[tuple[int, int]] = set()
    monkeypatch.setattr(Optimiser, "step", noting(found, Optimiser.step))
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


def compiled(model: Any, dtype: torch.dtype = torch.float32) -> bool:
    return CausalModel(join_layers(quicken(model))).computes_compiled(dtype)


@pytest.mark.usefixtures("world")
def test_a_model_runs_compiled_only_where_all_of_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    watched, wrapped = tiny_model(), tiny_model()
    assert compiled(tiny_model())
    assert not compiled(tiny_model("gpt2"))
    assert not compiled(tiny_model("mistral", sliding_window=6))
    watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    wrapped.lm_head = nn.Sequential(wrapped.lm_head)
    assert not compiled(watched)
    assert not compiled(wrapped)
    monkeypatch.setattr(layers, "halved", None)
    assert not compiled(tiny_model(), torch.bfloat16)


@pytest.mark.usefixtures("world")
def test_a_policy_runs_compiled_only_where_its_critic_does() -> None:
    actor = CausalModel(join_layers(quicken(tiny_model())))
    critic = critic_from_actor(actor.model)
    policy = LanguagePolicy(actor, critic, temperature=1.0, reference=actor)
    assert policy.computes_compiled()
    critic.backbone.layers[0].register_forward_hook(lambda *_: None)
    assert not policy.computes_compiled()
    assert LanguagePolicy(actor, value_head(32), temperature=1.0, reference=actor).computes_compiled()


def test_judges_have_all_threads_and_a_step_of_writing_leaves_them_to_compiled_code(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writing: set[tuple[int, int]] = set()
    monkeypatch.setattr(decoding.Stack, "step", noting(writing, decoding.Stack.step))
    judge = RewardSettings(functions=(f"{world}/threads.py:threads",))
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # a sampler is tried before the run sets its own
    try:
        ppo.run(ppo_config(world, tmp_path / "run", run=RUN, reward=judge, steps=1))
    finally:
        torch.set_num_threads(before)
    assert writing == {(1, 2)}
    assert [row["score"] for row in Run.open(tmp_path / "run").read_samples(1)] == [2.0] * 8


def test_evaluations_compute_in_one_thread_what_runs_compiled_and_in_all_what_does_not(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held-out losses and the KL of answers are whole texts; fine-tuning's answers are drawn by PyTorch, token by token."""
    losses, answers, looks = (set[tuple[int, int]]() for _ in range(3))
    monkeypatch.setattr(sft, "held_out_loss", noting(losses, sft.held_out_loss))
    monkeypatch.setattr(ReferenceSampler, "__call__", noting(answers, ReferenceSampler.__call__))
    monkeypatch.setattr(evaluate, "look", noting(looks, evaluate.look))
    asked = sft.EvaluationSettings(share=0.2, every=1, samples=1, sampling=SamplingSettings(max_new_tokens=1))
    sft.run(sft_config(world, tmp_path / "sft", run=RUN, epochs=1, evaluation=asked))
    ppo.run(ppo_config(world, tmp_path / "ppo", run=RUN, steps=1))
    assert (losses, answers, looks) == ({(1, 2)}, {(2, 2)}, {(1, 2)})
