"""Runs in bfloat16: checkpoints hold float32 masters, a resume is exact, and the loss follows float32's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridle.jobs import ppo, reward, sft
from bridle.jobs.session import RunSettings
from bridle.language.adapters import LoraSettings
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings
from bridle.learn.optim import OptimSettings
from bridle.runs import Run
from tests.jobs.test_lora import ppo_config, require_exact_from_every_step, settings, sft_config
from tests.jobs.test_lora import world as world

OFF = LoraSettings()


def in_half(config: Any) -> Any:
    return replace(config, run=replace(config.run, dtype="bfloat16"))


def is_rounded(path: Path) -> bool:
    """Whether the layers' weights in a file are all bfloat16 numbers."""
    found = {name: t for name, t in load_file(path).items() if "proj" in name}
    assert found
    assert all(t.dtype is torch.float32 for t in found.values()), path
    return all(torch.equal(t, t.bfloat16().float()) for t in found.values())


def test_fine_tuning_keeps_masters_and_resumes_exactly(world: Path, tmp_path: Path) -> None:
    config = in_half(sft_config(world, tmp_path / "run", lora=OFF))
    sft.run(config)
    steps = [row["step"] for row in Run.open(tmp_path / "run").metrics() if "loss" in row]
    assert not is_rounded(tmp_path / "run/policy/model.safetensors")
    assert not is_rounded(tmp_path / f"run/checkpoints/step-{len(steps)}/policy/model.safetensors")
    require_exact_from_every_step(sft, config, len(steps))


@pytest.mark.parametrize("lora", [OFF, LoraSettings(rank=2)], ids=["whole", "adapters"])
def test_ppo_keeps_masters_and_resumes_exactly(world: Path, tmp_path: Path, lora: LoraSettings) -> None:
    config = in_half(ppo_config(world, tmp_path / "run", world / "model", lora=lora, steps=2))
    ppo.run(config)
    checkpoint = tmp_path / "run/checkpoints/step-2"
    if lora.rank is None:
        assert not is_rounded(checkpoint / "policy/model.safetensors")
        assert not is_rounded(checkpoint / "critic.safetensors")
    require_exact_from_every_step(ppo, config, 2)


def test_a_reward_model_keeps_masters_and_resumes_exactly(world: Path, tmp_path: Path) -> None:
    config = reward.RewardConfig(
        run=replace(settings(tmp_path / "run"), dtype="bfloat16"),
        model=ModelSettings(path=str(world / "model")),
        data=DataSettings(path=str(world / "pairs.jsonl")),
        batch_size=8,
        optim=OptimSettings(lr=2e-2),
        evaluation=reward.EvaluationSettings(share=0.3),
    )
    reward.run(config)
    steps = [row["step"] for row in Run.open(tmp_path / "run").metrics()]
    assert not is_rounded(tmp_path / "run/reward/model.safetensors")
    require_exact_from_every_step(reward, config, len(steps))


def test_the_loss_on_the_real_model_follows_float32s(shared_data: Path, tmp_path: Path) -> None:
    """Within 1 % at each of 8 steps on stories260K, while the loss itself falls by a tenth."""
    text = (shared_data / "tinystories/tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip()[:100].upper() for story in text.split("<|endoftext|>")[:32]]  # capitals are new to it
    (tmp_path / "demos.jsonl").write_text(
        "".join(json.dumps({"prompt": s[:20], "answer": s[20:]}) + "\n" for s in stories if len(s) > 60)
    )
    curves: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16"):
        sft.run(
            sft.SFTConfig(
                run=RunSettings(dir=tmp_path / dtype, threads=1, quiet=True, dtype=dtype),  # type: ignore[arg-type]
                model=ModelSettings(path=str(shared_data / "models/stories260K")),
                data=DataSettings(path=str(tmp_path / "demos.jsonl")),
                batch_size=4,
                optim=OptimSettings(lr=2e-3),
                evaluation=sft.EvaluationSettings(share=0.0),
            )
        )
        curves[dtype] = [float(str(row["loss"])) for row in Run.open(tmp_path / dtype).metrics() if "loss" in row]
    full, half = (torch.tensor(curves[dtype][:8]) for dtype in ("float32", "bfloat16"))
    assert float((half - full).abs().div(full).max()) < 0.01
    assert float(full[-1]) < 0.9 * float(full[0])
