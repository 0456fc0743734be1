"""bfloat16 with float32 masters against float32, on the real 260K model: losses, the sampler's gap, and what is held.

    python bench/bfloat16.py      → bench/results/bfloat16.json

SFT: stories in capitals, which are new to it; the same batches in both. PPO: four steps of the task of recipes/stories with 16
prompts. Speeds are in bench/language_speed.py.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes" / "stories"))

from run import HERE, MODEL, STORIES, make_prompts, ppo_config  # noqa: E402

from bridle.jobs import ppo, sft  # noqa: E402
from bridle.jobs.session import RunSettings  # noqa: E402
from bridle.language.data import DataSettings  # noqa: E402
from bridle.language.models import ModelSettings  # noqa: E402
from bridle.language.roles import CriticSettings, open_roles  # noqa: E402
from bridle.language.scorers import RewardSettings  # noqa: E402
from bridle.learn.optim import OptimSettings  # noqa: E402
from bridle.runs import Run  # noqa: E402

DTYPES = ("float32", "bfloat16")


def losses(folder: Path, data: Path, dtype: str) -> list[float]:
    """The training loss of every step, nats per token."""
    sft.run(
        sft.SFTConfig(
            run=RunSettings(dir=folder, quiet=True, threads=1, dtype=dtype),
            model=ModelSettings(path=str(MODEL)),
            data=DataSettings(path=str(data)),
            batch_size=8,
            optim=OptimSettings(lr=1e-3, schedule="cosine", warmup_steps=3),
            evaluation=sft.EvaluationSettings(share=0.0),
        )
    )
    return [float(str(row["loss"])) for row in Run.open(folder).metrics() if "loss" in row]


def gaps(folder: Path, prompts: Path, dtype: str) -> dict[str, list[float]]:
    """What the trainer's first forward pass and the sampler differ by, step by step, nats per token; and the scores."""
    config = ppo_config(folder, prompts, RewardSettings(functions=(f"{HERE}/judge.py:dark",)), 0.04, 4, 0)
    config = replace(
        config,
        run=replace(config.run, quiet=True, threads=1, dtype=dtype),
        prompts_per_step=16,
        evaluation=replace(config.evaluation, held_out=2),
    )
    ppo.run(config)
    rows = [row for row in Run.open(folder).metrics() if "clip_fraction" in row]
    names = ("sampler_gap_mean", "sampler_gap_p99", "sampler_gap_max", "score", "exact_kl")
    return {name: [float(str(row[name])) for row in rows] for name in names}


def held(dtype: str) -> dict[str, int]:
    """Bytes of what actor, critic and reference hold in PPO, each memory once; gradients and moments are float32."""
    roles = open_roles(
        ModelSettings(path=str(MODEL)),
        CriticSettings(source="actor"),
        None,
        temperature=1.0,
        device=torch.device("cpu"),
        compute_dtype=getattr(torch, dtype),
    )

    def size(*tensors: torch.Tensor) -> int:
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    learning = list(roles.policy.parameters())
    return {
        "actor and critic": size(*learning),
        "masters": size(*(roles.masters.of(p) for p in learning if roles.masters.of(p) is not p)),
        "reference": size(*roles.reference.parameters()),
        "gradients": 4 * sum(p.numel() for p in learning),
        "moments": 8 * sum(p.numel() for p in learning),
    }


def main() -> None:
    found: dict[str, object] = {"command": " ".join(["python", *sys.argv]), "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_prompts(folder)
        stories = [text.strip()[:160].upper() for text in STORIES.read_text("utf-8").split("<|endoftext|>")[:200]]
        rows = [{"prompt": text[:20], "answer": text[20:]} for text in stories if len(text) > 60]
        (folder / "capitals.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        curves = {dtype: losses(folder / f"sft-{dtype}", folder / "capitals.jsonl", dtype) for dtype in DTYPES}
        apart = [abs(a - b) / a for a, b in zip(*curves.values(), strict=True)]
        found |= {"losses": curves, "largest_relative_difference": max(apart)}
        found |= {"ppo": {dtype: gaps(folder / f"ppo-{dtype}", folder, dtype) for dtype in DTYPES}}
    found |= {"bytes": {dtype: held(dtype) for dtype in DTYPES}}
    (ROOT / "bench/results/bfloat16.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
