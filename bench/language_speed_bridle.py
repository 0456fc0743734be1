"""Bridle's side of ``bench/language_speed.py``: the jobs as ``bridle ppo``, ``sft`` and ``reward`` run them."""

from __future__ import annotations

import time

BEFORE = time.perf_counter()

import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from dataclasses import replace  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402
from unittest import mock  # noqa: E402

import torch  # noqa: E402
from peers.language_work import Laps, PPOWork, TuningWork, forget_peak, memory, tell  # noqa: E402
from transformers.models.llama import modeling_llama  # noqa: E402, F401  (a peer's imports hold it too)

from bridle.jobs import ppo, reward, sft  # noqa: E402
from bridle.jobs.ppo import PPOConfig  # noqa: E402
from bridle.jobs.reward import RewardConfig  # noqa: E402
from bridle.jobs.session import RunSettings, Session  # noqa: E402
from bridle.jobs.sft import SFTConfig  # noqa: E402
from bridle.language.data import DataSettings  # noqa: E402
from bridle.language.models import ModelSettings  # noqa: E402
from bridle.language.roles import CriticSettings  # noqa: E402
from bridle.language.sampler import SamplingSettings  # noqa: E402
from bridle.language.scorers import RewardSettings  # noqa: E402
from bridle.language.shaping import KLSettings  # noqa: E402
from bridle.learn.optim import OptimSettings  # noqa: E402
from bridle.runs import Run  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE


def settings_of(work: PPOWork | TuningWork, folder: Path) -> RunSettings:
    return RunSettings(
        dir=folder, seed=work.seed, dtype=work.dtype, threads=work.threads, checkpoint_every=10_000, quiet=True
    )


def ppo_config(work: PPOWork, folder: Path, *, form: str) -> PPOConfig:
    """``same``: TRL's work, item by item; ``trunk``: this with the critic on the actor's trunk; ``defaults``: Bridle's own."""
    plain = PPOConfig(
        run=settings_of(work, folder),
        model=ModelSettings(path=work.model),
        prompts=DataSettings(path=work.data),
        reward=RewardSettings(model=work.reward_model),
        steps=work.iterations,
        prompts_per_step=work.prompts,
        sampling=SamplingSettings(max_new_tokens=work.new_tokens, temperature=work.temperature),
        evaluation=ppo.EvaluationSettings(held_out=2, every=10_000),
    )
    if form == "defaults":
        return plain
    optim = OptimSettings(lr=work.lr, schedule="linear", max_grad_norm=None)
    return replace(
        plain,
        kl=KLSettings(where="reward", estimator="k1", coefficient=work.kl),
        advantage=replace(plain.advantage, lam=work.lam),
        ppo=replace(
            plain.ppo,
            epochs=work.epochs,
            minibatches=work.minibatches,
            value_clip=work.value_clip,
            value_coefficient=work.value,
        ),
        actor=optim,
        critic=CriticSettings(source="trunk" if form == "trunk" else "reward"),
        critic_optim=optim,
    )


def sft_config(work: TuningWork, folder: Path) -> SFTConfig:
    return SFTConfig(
        run=settings_of(work, folder),
        model=ModelSettings(path=work.model),
        data=DataSettings(path=work.data, limit=work.steps * work.batch),
        batch_size=work.batch,
        optim=OptimSettings(lr=work.lr, schedule="linear"),
        evaluation=sft.EvaluationSettings(share=0.0, samples=0),
    )


def reward_config(work: TuningWork, folder: Path) -> RewardConfig:
    held_out = folder.with_name("held_out.jsonl")
    held_out.write_text("".join(json.dumps(row) + "\n" for row in work.rows()[-2:]))
    return RewardConfig(
        run=settings_of(work, folder),
        model=ModelSettings(path=work.model),
        data=DataSettings(path=work.data, limit=work.steps * work.batch),
        batch_size=work.batch,
        optim=OptimSettings(lr=work.lr, schedule="linear"),
        normalise=False,
        evaluation=reward.EvaluationSettings(path=str(held_out)),
    )


def run_ppo(work: PPOWork, folder: Path, form: str) -> dict[str, Any]:
    """Whole iterations, from the job's loop; their parts, from what the job notes."""
    laps, whole = Laps(), Session.steps

    def steps(session: Session, last: int) -> Iterator[int]:
        for step in whole(session, last):
            laps.skip()
            yield step
            laps.mark("iteration")
            laps.end()

    with mock.patch.object(Session, "steps", steps):
        run = Run.open(ppo.run(ppo_config(work, folder, form=form)))
    rows = [
        row | {name: value for name, value in noted.items() if name not in ("step", "time")}
        for row, noted in zip(laps.rows, run.timings(), strict=True)
    ]
    lengths = [row["length"] for row in run.metrics() if "clip_fraction" in row]
    return {"iterations": rows, "answer_tokens": lengths}


def run_tuning(work: TuningWork, folder: Path) -> dict[str, Any]:
    if work.kind == "sft":
        run = Run.open(sft.run(sft_config(work, folder)))
    else:
        run = Run.open(reward.run(reward_config(work, folder)))
    return {"iterations": [{**row, "items": work.batch} for row in run.timings()]}


def main() -> None:
    told = json.loads(sys.argv[1])
    form = sys.argv[2] if len(sys.argv) > 2 else "same"
    work = TuningWork(**told) if "kind" in told else PPOWork(**told)
    torch.set_num_threads(work.threads)
    if work.threads == 1:  # one thread: the parts in processor seconds, which others on the machine disturb less
        time.perf_counter = time.process_time
    with tempfile.TemporaryDirectory() as place:
        held = forget_peak()
        folder = Path(place) / "run"
        found = run_ppo(work, folder, form) if isinstance(work, PPOWork) else run_tuning(work, folder)
    answer = {
        **found,
        "import_seconds": IMPORTS,
        "memory_after_imports": held,
        "peak_memory": memory()["peak"],
    }
    tell(answer)


if __name__ == "__main__":
    main()
