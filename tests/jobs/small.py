"""A small text world on disk: a model, a reward model, prompts, demonstrations, comparisons; and settings of each job."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bridle.jobs import ppo, reward, sft
from bridle.jobs.session import RunSettings
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.language.roles import CriticSettings
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardSettings
from bridle.language.shaping import KLSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from tests.language.tiny import byte_tokenizer, tiny_model

JUDGES = """
def letters(prompts, completions):
    return [sum(ch.isascii() and ch.isalpha() for ch in c) / 4 for c in completions]

def unlike_letters(prompts, completions):
    return [-score for score in letters(prompts, completions)]

def length(prompts, completions):
    return [float(len(c.encode())) for c in completions]

def share(prompts, completions):
    return [sum(ch.isascii() and ch.isalpha() for ch in c) / max(len(c), 1) for c in completions]

def same(prompts, completions):
    return [1.0 for _ in completions]
"""


def small_world(path: Path) -> Path:
    model = tiny_model(vocab_size=260)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    save_model(path / "model", model, byte_tokenizer())
    judge, tokenizer = load_reward_model(ModelSettings(path=str(path / "model")))
    save_model(path / "reward", judge, tokenizer)
    (path / "judges.py").write_text(JUDGES)
    files: dict[str, list[dict[str, Any]]] = {
        "prompts": [{"prompt": f"{'abcdefgh'[i % 8]}{i}"} for i in range(24)],
        "demos": [{"prompt": f"say {i}", "answer": "abc"[: 1 + i % 3]} for i in range(16)],
        "pairs": [{"prompt": f"p{i}", "chosen": "good", "rejected": "bad" + "!" * (i % 3)} for i in range(24)],
    }
    for name, rows in files.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_settings(path: Path, **changes: Any) -> RunSettings:
    settings = RunSettings(dir=path, checkpoint_every=2, keep_checkpoints=9, threads=1, quiet=True)
    return replace(settings, **changes)


def ppo_config(world: Path, path: Path, *, run: dict[str, Any] | None = None, **changes: Any) -> ppo.PPOConfig:
    common: dict[str, Any] = {
        "reward": RewardSettings(functions=(f"{world}/judges.py:letters",)),
        "steps": 4,
        "prompts_per_step": 8,
        "sampling": SamplingSettings(max_new_tokens=6),
        "ppo": PPOSettings(epochs=2, minibatches=2, micro_batch_tokens=40),
        "actor": OptimSettings(lr=3e-3),
        "advantage": AdvantageSettings(gamma=1.0, lam=0.95),
        "critic": CriticSettings(source="actor"),
        "kl": KLSettings(where="reward"),
        "critic_optim": OptimSettings(lr=3e-3),
        "evaluation": ppo.EvaluationSettings(held_out=6, every=100),
    }
    return ppo.PPOConfig(
        run=run_settings(path, **(run or {})),
        model=ModelSettings(path=str(world / "model")),
        prompts=DataSettings(path=str(world / "prompts.jsonl")),
        **{**common, **changes},
    )


def sft_config(world: Path, path: Path, *, run: dict[str, Any] | None = None, **changes: Any) -> sft.SFTConfig:
    common: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 4,
        "micro_batch_tokens": 24,
        "evaluation": sft.EvaluationSettings(share=0.0),
    }
    return sft.SFTConfig(
        run=run_settings(path, **(run or {})),
        model=ModelSettings(path=str(world / "model")),
        data=DataSettings(path=str(world / "demos.jsonl")),
        **{**common, **changes},
    )


def reward_config(world: Path, path: Path, *, run: dict[str, Any] | None = None, **changes: Any) -> reward.RewardConfig:
    common: dict[str, Any] = {"epochs": 2, "batch_size": 6, "evaluation": reward.EvaluationSettings(share=0.2)}
    return reward.RewardConfig(
        run=run_settings(path, **(run or {})),
        model=ModelSettings(path=str(world / "model")),
        data=DataSettings(path=str(world / "pairs.jsonl")),
        **{**common, **changes},
    )
