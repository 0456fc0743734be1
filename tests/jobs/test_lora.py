"""Every language job with adapters: it learns, resumes to the bit, and leaves what peft opens."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bridle.errors import ConfigError, TrainingError
from bridle.jobs import ppo, reward, sft
from bridle.jobs.evaluate import EvaluateConfig
from bridle.jobs.evaluate import run as evaluate
from bridle.jobs.replay import replay
from bridle.jobs.session import RunSettings
from bridle.language.adapters import LoraSettings
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings, save_model
from bridle.language.roles import CriticSettings
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardSettings
from bridle.language.shaping import KLSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from tests.language.tiny import byte_tokenizer, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing.:FutureWarning")  # peft's own
LORA = LoraSettings(rank=4, alpha=8.0)
JUDGE = """
def letters(prompts, completions):
    return [sum(ch.isascii() and ch.isalpha() for ch in c) / 4 for c in completions]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, demonstrations, pairs, prompts and a judge."""
    path = tmp_path_factory.mktemp("world")
    save_model(path / "model", tiny_model(vocab_size=260), byte_tokenizer())  # its head is frozen, so no small logits
    words = [f"{'abcdefgh'[i % 8]}{i}" for i in range(24)]
    rows: dict[str, list[dict[str, str]]] = {
        "prompts": [{"prompt": word} for word in words],
        "demos": [{"prompt": word, "answer": "zz"} for word in words],
        "pairs": [{"prompt": word, "chosen": "zzz", "rejected": "..."} for word in words],
    }
    for name, lines in rows.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (path / "judge.py").write_text(JUDGE)
    return path


def settings(path: Path) -> RunSettings:
    return RunSettings(dir=path, checkpoint_every=1, keep_checkpoints=9, threads=1, quiet=True)


def sft_config(world: Path, path: Path, **changes: Any) -> sft.SFTConfig:
    common: dict[str, Any] = {"lora": LORA, "model": ModelSettings(path=str(world / "model")), "batch_size": 8}
    return sft.SFTConfig(
        run=settings(path),
        data=DataSettings(path=str(world / "demos.jsonl")),
        optim=OptimSettings(lr=5e-2),
        evaluation=sft.EvaluationSettings(share=0.3, samples=1, sampling=SamplingSettings(max_new_tokens=3)),
        **{**common, **changes},
    )


def ppo_config(world: Path, path: Path, model: Path, **changes: Any) -> ppo.PPOConfig:
    common: dict[str, Any] = {
        "lora": LORA,
        "reward": RewardSettings(functions=(f"{world}/judge.py:letters",)),
        "steps": 3,
        "prompts_per_step": 8,
        "actor": OptimSettings(lr=1e-2),
        "advantage": AdvantageSettings(gamma=1.0, lam=0.95),
        "critic": CriticSettings(source="actor"),
        "kl": KLSettings(where="reward"),
        "critic_optim": OptimSettings(lr=3e-3),
    }
    return ppo.PPOConfig(
        run=settings(path),
        model=ModelSettings(path=str(model)),
        prompts=DataSettings(path=str(world / "prompts.jsonl")),
        sampling=SamplingSettings(max_new_tokens=5),
        ppo=PPOSettings(epochs=2, minibatches=2, micro_batch_tokens=40),
        evaluation=ppo.EvaluationSettings(held_out=6, every=2),
        **{**common, **changes},
    )


def files(folder: Path, last: int) -> dict[str, bytes]:
    """Everything that must be equal between a run and its resumed twin."""
    kept = [folder / "metrics.jsonl", *sorted((folder / "samples").iterdir())]
    kept += [
        p for p in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in p.parts or f"step-{last}" in p.parts
    ]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def require_exact_from_every_step(job: Any, config: Any, last: int) -> None:
    """Cut a finished run after each of its steps; each time it must end as it ended."""
    whole = config.run.dir
    for step in range(1, last):
        cut = whole.parent / f"cut-{step}"
        shutil.copytree(whole, cut)
        for later in range(step + 1, last + 1):
            shutil.rmtree(cut / f"checkpoints/step-{later}")
        for result in ("policy", "reward", "merged"):
            shutil.rmtree(cut / result, ignore_errors=True)
        job.run(replace(config, run=replace(config.run, dir=cut)), resume=True)
        assert files(cut, last) == files(whole, last), f"resumed after step {step}"


def only_adapters(path: Path) -> None:
    """Nothing in a checkpoint is as large as the base, and no name is one of its weights."""
    for file in path.rglob("*.safetensors"):
        if file.name != "state.safetensors":
            assert all("lora_" in n or "score" in n or "head" in n for n in load_file(file)), file


def test_fine_tuning_learns_resumes_and_leaves_an_adapter_and_a_model(world: Path, tmp_path: Path) -> None:
    config = sft_config(world, tmp_path / "sft", lora=replace(LORA, merged=True), epochs=2)
    sft.run(config)
    losses = [row["loss"] for row in Run.open(tmp_path / "sft").metrics() if "loss" in row]
    assert float(str(losses[-1])) < float(str(losses[0])) - 0.5
    only_adapters(tmp_path / "sft/checkpoints")
    require_exact_from_every_step(sft, config, len(losses))
    base = AutoModelForCausalLM.from_pretrained(world / "model")
    theirs = PeftModel.from_pretrained(base, str(tmp_path / "sft/policy")).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "sft/merged").eval()
    followed = AutoModelForCausalLM.from_pretrained(
        tmp_path / "sft/policy"
    ).eval()  # transformers finds the base itself
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        for other in (merged, followed):
            torch.testing.assert_close(theirs(ids).logits, other(ids).logits, rtol=1e-4, atol=1e-4)


def test_ppo_on_adapters_resumes_exactly_and_its_evaluation_opens_the_adapter(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world, tmp_path / "ppo", world / "model", kl=KLSettings(where="loss", estimator="exact"))
    ppo.run(config)
    steps = [row for row in Run.open(tmp_path / "ppo").metrics() if "clip_fraction" in row]
    assert steps[0]["exact_kl"] == pytest.approx(0.0, abs=1e-6)
    assert float(str(steps[-1]["exact_kl"])) > 0
    assert all(float(str(row["sampler_gap_mean"])) < 1e-5 for row in steps)
    assert all(float(str(row["sampler_gap_max"])) < 1e-4 for row in steps)
    only_adapters(tmp_path / "ppo/checkpoints")
    require_exact_from_every_step(ppo, config, 3)
    last = [row for row in Run.open(tmp_path / "ppo").metrics() if "evaluation/score" in row][-1]
    evaluate(EvaluateConfig(target=str(tmp_path / "ppo"), output=tmp_path / "of-run.json"))
    evaluate(
        EvaluateConfig(
            target=str(tmp_path / "ppo/policy"),
            prompts=str(world / "prompts.jsonl"),
            reference=str(world / "model"),
            functions=(f"{world}/judge.py:letters",),
            max_new_tokens=5,
            output=tmp_path / "of-adapter.json",
        )
    )
    after = json.loads((tmp_path / "of-run.json").read_text())["after"]
    for name in ("score", "exact_kl", "entropy"):
        assert after[name] == pytest.approx(float(str(last[f"evaluation/{name}"])), abs=1e-4)
    assert json.loads((tmp_path / "of-adapter.json").read_text())["after"]["exact_kl"] > 0


def test_from_demonstrations_to_ppo_all_on_one_base(world: Path, tmp_path: Path) -> None:
    """SFT's adapter is PPO's reference; the reward model is an adapter too, whose copy the critic starts as."""
    sft.run(sft_config(world, tmp_path / "sft"))
    config = reward.RewardConfig(
        run=settings(tmp_path / "rm"),
        model=ModelSettings(path=str(world / "model")),
        lora=replace(LORA, rank=2),
        data=DataSettings(path=str(world / "pairs.jsonl")),
        batch_size=8,
        optim=OptimSettings(lr=2e-2),
        evaluation=reward.EvaluationSettings(share=0.3),
    )
    reward.run(config)
    only_adapters(tmp_path / "rm/checkpoints")
    steps = [row["step"] for row in Run.open(tmp_path / "rm").metrics()]
    require_exact_from_every_step(reward, config, len(steps))
    bare = AutoModelForSequenceClassification.from_pretrained(world / "model", num_labels=1)
    PeftModel.from_pretrained(bare, str(tmp_path / "rm/reward"))
    on_adapters = ppo_config(
        world,
        tmp_path / "ppo",
        tmp_path / "sft/policy",
        reward=RewardSettings(
            model=str(tmp_path / "rm/reward"), functions=(f"{world}/judge.py:letters",), weights=(0.1, 1.0)
        ),
        kl=KLSettings(where="reward", coefficient=0.01),
        critic=CriticSettings(source="reward"),
        lora=replace(LORA, alpha=None),
        steps=2,
    )
    ppo.run(on_adapters)
    first = next(row for row in Run.open(tmp_path / "ppo").metrics() if "clip_fraction" in row)
    assert first["exact_kl"] == pytest.approx(0.0, abs=1e-6), "the reference is not SFT's adapter"
    only_adapters(tmp_path / "ppo/checkpoints")


def test_ppo_learns_through_adapters_alone(world: Path, tmp_path: Path) -> None:
    config = ppo_config(
        world,
        tmp_path / "ppo",
        world / "model",
        kl=KLSettings(where="reward", coefficient=0.01),
        actor=OptimSettings(lr=0.1),
        critic=CriticSettings(source="trunk"),
        steps=12,
        prompts_per_step=32,
        lora=replace(LORA, rank=8),
    )
    often = PPOSettings(epochs=4, minibatches=2)
    ppo.run(replace(config, ppo=often, run=replace(config.run, checkpoint_every=None)))
    scores = [float(str(row["score"])) for row in Run.open(tmp_path / "ppo").metrics() if "clip_fraction" in row]
    assert sum(scores[-4:]) / 4 > sum(scores[:4]) / 4 + 0.2


def test_a_fault_keeps_adapters_alone_and_is_replayed(world: Path, tmp_path: Path) -> None:
    config = ppo_config(world, tmp_path / "run", world / "model", actor=OptimSettings(lr=1e30, max_grad_norm=None))
    with pytest.raises(TrainingError, match="step 1:"):
        ppo.run(config)
    (fault,) = (tmp_path / "run/faults").iterdir()
    assert all("lora_" in name or "head" in name for name in load_file(fault / "weights.safetensors"))
    assert any("forward" in line for line in replay(fault))


def test_a_layer_that_is_not_there_leaves_no_run(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'nowhere': expected a linear layer of the model: down_proj"):
        sft.run(sft_config(world, tmp_path / "run", lora=replace(LORA, targets=("nowhere",))))
    assert not (tmp_path / "run").exists()
