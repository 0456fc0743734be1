"""What adapters learn on a real pretrained model, what they hold and cost: SFT and PPO, all weights against rank 8.

    python bench/adapters_learn.py [--steps 15]      → bench/results/adapters_learn.json
    python bench/adapters_learn.py --cost            → bench/results/adapters_cost.json

SFT: stories260K learns the darkest of its own four continuations of each prompt, by the judge of recipes/stories. PPO: the task
of recipes/stories with 64 prompts a step, judge as the reward. Cost: a rollout and a pass of the training step with and without
adapters, taking turns in one process, one thread, least processor time of each; bytes are those of tensors, each memory once.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "stories"))

from run import HERE, MODEL, make_prompts, make_rankings, ppo_config  # noqa: E402

from bridle.jobs import ppo, sft  # noqa: E402
from bridle.jobs.session import RunSettings  # noqa: E402
from bridle.language.adapters import LoraSettings  # noqa: E402
from bridle.language.data import DataSettings  # noqa: E402
from bridle.language.models import ModelSettings, save_model  # noqa: E402
from bridle.language.roles import CriticSettings, Roles, open_roles  # noqa: E402
from bridle.language.sampler import SamplingSettings  # noqa: E402
from bridle.language.scorers import RewardSettings  # noqa: E402
from bridle.language.segments import Segments  # noqa: E402
from bridle.learn.optim import OptimSettings  # noqa: E402
from bridle.learn.step import Seen, Slopes  # noqa: E402
from bridle.random import generator, torch_rng, uniforms  # noqa: E402
from bridle.runs import Run  # noqa: E402

LORA = LoraSettings(rank=8, alpha=16.0)
OFF = LoraSettings()


def fine_tune(folder: Path, data: Path, lora: LoraSettings, lr: float) -> dict[str, object]:
    """Two epochs; the held-out loss before and after, and what is kept."""
    sft.run(
        sft.SFTConfig(
            run=RunSettings(dir=folder, quiet=True, threads=1),
            model=ModelSettings(path=str(MODEL)),
            data=DataSettings(path=str(data)),
            lora=lora,
            epochs=2,
            optim=OptimSettings(lr=lr, schedule="cosine", warmup_steps=5),
            evaluation=sft.EvaluationSettings(share=0.1, samples=0, every=1000),
        )
    )
    losses = [row["evaluation/loss"] for row in Run.open(folder).metrics() if "evaluation/loss" in row]
    return {"held_out_loss_before": losses[0], "held_out_loss_after": losses[-1], **kept(folder)}


def train(folder: Path, prompts: Path, lora: LoraSettings, model: Path, lr: float, steps: int) -> dict[str, object]:
    """PPO; the held-out judge's score before and after, exact KL, the sampler's gap, and what is kept."""
    config = ppo_config(folder, prompts, RewardSettings(functions=(f"{HERE}/judge.py:dark",)), 0.04, steps, 0)
    config = replace(
        config,
        run=replace(config.run, quiet=True, threads=1),
        model=ModelSettings(path=str(model)),
        lora=lora,
        prompts_per_step=64,
        actor=replace(config.actor, lr=lr),
        critic_optim=replace(config.critic_optim, lr=lr),
        evaluation=replace(config.evaluation, held_out=256),
    )
    ppo.run(config)
    run = Run.open(folder)
    rows = [row for row in run.metrics() if "evaluation/score" in row]
    steps_seen = [row for row in run.metrics() if "clip_fraction" in row]
    return {
        "gold_before": rows[0]["evaluation/score/gold/gold"],
        "gold_after": rows[-1]["evaluation/score/gold/gold"],
        "ci95": rows[-1]["evaluation/score/gold/gold_ci95"],
        "exact_kl_after": rows[-1]["evaluation/exact_kl"],
        "sampler_gap_mean": max(float(str(row["sampler_gap_mean"])) for row in steps_seen),
        "sampler_gap_max": max(float(str(row["sampler_gap_max"])) for row in steps_seen),
        "curve": [row["score"] for row in steps_seen],
        **kept(folder),
    }


def kept(folder: Path) -> dict[str, object]:
    """Bytes of the weights in the newest checkpoint and in the policy."""
    checkpoint = Run.open(folder).latest_checkpoint()
    assert checkpoint is not None
    sizes = {"checkpoint": checkpoint.path, "policy": folder / "policy"}
    return {
        f"{name}_weight_bytes": sum(p.stat().st_size for p in path.rglob("*.safetensors"))
        for name, path in sizes.items()
    }


@dataclass(frozen=True, slots=True)
class Side:
    """One way of training, and the least processor seconds that its parts have taken."""

    roles: Roles
    least: dict[str, float]

    def take(self, part: str, work: Callable[[], object]) -> None:
        """Do it once more."""
        began = time.process_time()
        work()
        self.least[part] = min(self.least.get(part, math.inf), time.process_time() - began)


def cost(model: PreTrainedModel, folder: Path, rounds: int) -> dict[str, object]:
    """Seconds and bytes, with and without adapters; 16 prompts of 16 tokens, 48 new ones, a critic of its own."""
    save_model(folder, model, AutoTokenizer.from_pretrained(MODEL))
    rows = generator(0, "cost").integers(3, model.config.vocab_size, size=(16, 16))
    prompts, settings = list(torch.from_numpy(rows)), SamplingSettings(max_new_tokens=48, rows=16)
    draws = uniforms(0, "cost", 0, range(16), 48)
    sides = {label: Side(a_line(folder, lora), {}) for label, lora in (("all weights", OFF), ("adapters", LORA))}
    answers = next(iter(sides.values())).roles.sampler(prompts, draws, settings)
    units = Segments.of(prompts, [answer.ids for answer in answers])

    def slopes(seen: Seen, rows: slice) -> Slopes:
        one = torch.ones_like(seen.logp)
        return Slopes(logp=one, entropy=one, value=one)

    for _ in range(rounds):
        for side in sides.values():
            side.take("rollout", lambda side=side: side.roles.sampler(prompts, draws, settings))
            side.take("training pass", lambda side=side: side.roles.policy.differentiate(units, slopes))
            side.roles.policy.zero_grad()
    return {label: {"seconds": side.least, **held(side.roles)} for label, side in sides.items()} | {
        "ratio": {p: sides["adapters"].least[p] / sides["all weights"].least[p] for p in sides["adapters"].least}
    }


def a_line(folder: Path, lora: LoraSettings) -> Roles:
    """Actor, critic and reference."""
    return open_roles(
        ModelSettings(path=str(folder)),
        CriticSettings(source="actor"),
        None,
        temperature=1.0,
        device=torch.device("cpu"),
        compute_dtype=torch.float32,
        lora=lora,
    )


def held(roles: Roles) -> dict[str, int]:
    """Bytes of the weights of actor, critic and reference, and how many numbers learn."""
    models = (roles.policy, roles.reference)
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in models for p in m.parameters()}
    learning = sum(p.numel() for p in roles.policy.parameters() if p.requires_grad)
    return {"weight_bytes": sum(memory.values()), "learning": learning}


def costs(output: Path) -> None:
    """Both sizes: the real model, and a random Llama of 15M parameters."""
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=32_000, hidden_size=288, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6,
        max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name, torch_rng(0, "cost"):
        small = AutoModelForCausalLM.from_pretrained(MODEL)
        found: dict[str, object] = {"command": " ".join(["python", *sys.argv])}
        for label, model, rounds in (("260K", small, 6), ("15M", LlamaForCausalLM(config), 3)):
            found[label] = cost(model, Path(name) / label, rounds)
            output.write_text(json.dumps(found, indent=1) + "\n")
            print(label, found[label], flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--cost", action="store_true")
    asked = parser.parse_args()
    output = ROOT / "bench/results/adapters_learn.json"
    if asked.cost:
        costs(output.with_name("adapters_cost.json"))
        return
    found: dict[str, object] = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_prompts(folder)
        make_rankings(folder, folder / "prompts.jsonl", 0)
        rows = [json.loads(line) for line in (folder / "rankings.jsonl").read_text().splitlines()]
        demos = [{"prompt": row["prompt"], "answer": row["answers"][0]} for row in rows]
        (folder / "dark.jsonl").write_text("".join(json.dumps(row) + "\n" for row in demos))
        for label, lora, sft_lr, ppo_lr in (("adapters", LORA, 5e-3, 4e-3), ("all weights", OFF, 1e-3, 1e-3)):
            slug = re.sub(r"\W", "-", label)
            tuned = fine_tune(folder / f"sft-{slug}", folder / "dark.jsonl", lora, sft_lr)
            start = folder / f"sft-{slug}" / "policy" if lora.rank else MODEL
            trained = train(folder / f"ppo-{slug}", folder, lora, MODEL, ppo_lr, asked.steps)
            found[label] = {"sft": tuned, "ppo": trained}
            if lora.rank:
                after = train(folder / f"ppo-after-sft-{slug}", folder, replace(lora, alpha=None), start, ppo_lr, 3)
                found["adapters, on from SFT's"] = {"ppo": after}
            output.write_text(json.dumps(found, indent=1) + "\n")
            print(label, found[label])


if __name__ == "__main__":
    main()
