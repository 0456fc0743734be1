"""What it costs to survive: training time with checkpoints and watching at the default settings, and with neither.

    python bench/survival_cost.py control sft reward ppo     # write bench/results/survival_cost.json

Both kinds of run take turns in one process; medians of CPU seconds. A host that is shared disturbs that by more than is to
be measured, so the wall clock inside saving and inside watching is added up too, within one run. These runs are short: the
one checkpoint at their end weighs more than one in eight minutes does. What the default cadence comes to is the seconds of
one checkpoint over eight minutes, and the share of watching.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from exactness import write_world

from bridle.control.evaluate import EvaluationSettings
from bridle.jobs import control, ppo, reward, sft
from bridle.jobs.control import default_config
from bridle.jobs.session import RunSettings, Session
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings
from bridle.language.roles import CriticSettings
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs.files import Json, save_json
from bridle.runs.invariants import Watch

RESULTS = Path(__file__).parent / "results" / "survival_cost.json"


def run_control(_: Path, path: Path) -> Path:
    """CartPole by its own settings, 20,000 actions."""
    import dataclasses

    config = default_config("CartPole-v1")
    settings = RunSettings(dir=path, threads=1, quiet=True)
    judged = EvaluationSettings(every=0, final_episodes=5)
    return control.run(dataclasses.replace(config, run=settings, total_steps=20_000, evaluation=judged))


def run_ppo(world: Path, path: Path) -> Path:
    """Six rollouts of a model of width 128."""

    return ppo.run(
        ppo.PPOConfig(
            run=RunSettings(dir=path, threads=1, quiet=True),
            model=ModelSettings(path=str(world / "model")),
            prompts=DataSettings(path=str(world / "prompts.jsonl")),
            reward=RewardSettings(functions=(f"{world}/judge.py:score",)),
            steps=6,
            prompts_per_step=32,
            sampling=SamplingSettings(max_new_tokens=32),
            advantage=AdvantageSettings(gamma=1.0, lam=0.95),
            ppo=PPOSettings(epochs=2, minibatches=2),
            critic=CriticSettings(source="actor"),
            evaluation=ppo.EvaluationSettings(held_out=4, every=100),
        )
    )


def run_sft(world: Path, path: Path) -> Path:
    """Thirty steps of a model of width 128."""
    return sft.run(
        sft.SFTConfig(
            run=RunSettings(dir=path, threads=1, quiet=True),
            model=ModelSettings(path=str(world / "model")),
            data=DataSettings(path=str(world / "demos.jsonl")),
            epochs=10,
            batch_size=16,
            evaluation=sft.EvaluationSettings(share=0.0),
        )
    )


def run_reward(world: Path, path: Path) -> Path:
    """Thirty steps of a reward model of width 128."""
    return reward.run(
        reward.RewardConfig(
            run=RunSettings(dir=path, threads=1, quiet=True),
            model=ModelSettings(path=str(world / "model")),
            data=DataSettings(path=str(world / "pairs.jsonl")),
            epochs=10,
            batch_size=16,
        )
    )


JOBS: dict[str, Callable[[Path, Path], Path]] = {
    "control": run_control,
    "sft": run_sft,
    "reward": run_reward,
    "ppo": run_ppo,
}


@contextmanager
def neither() -> Iterator[None]:
    """Save nothing and watch nothing."""
    with patch.object(Session, "end_step", lambda *_, **__: None), patch.object(Watch, "see", lambda *_: []):
        yield


@contextmanager
def counted(owner: type, name: str, spent: list[float]) -> Iterator[None]:
    """Add up the wall-clock seconds inside a method."""
    own = getattr(owner, name)

    def call(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return own(*arguments, **named)
        finally:
            spent.append(time.perf_counter() - began)

    with patch.object(owner, name, call):
        yield


def measure(name: str, rounds: int) -> dict[str, Json]:
    """Take turns; return CPU seconds with and without, and what saving and watching took of the wall clock."""
    cpu: dict[str, list[float]] = {"with": [], "without": []}
    checkpoints: list[float] = []
    watching: list[float] = []  # share of each run
    with tempfile.TemporaryDirectory() as scratch:
        world, job = Path(scratch), JOBS[name]
        if name != "control":
            write_world(world)
        job(world, world / "warm")
        for turn in range(rounds):
            saved: list[float] = []
            seen: list[float] = []
            began, wall = time.process_time(), time.perf_counter()
            with counted(Session, "end_step", saved), counted(Watch, "see", seen):
                job(world, world / f"with-{turn}")
            cpu["with"].append(time.process_time() - began)
            checkpoints.append(max(saved))  # the only one, at the end
            watching.append((sum(seen) + sum(saved) - max(saved)) / (time.perf_counter() - wall))
            began = time.process_time()
            with neither():
                job(world, world / f"without-{turn}")
            cpu["without"].append(time.process_time() - began)
        size = sum(path.stat().st_size for path in (world / "with-0" / "checkpoints").rglob("*") if path.is_file())
    ratios = [one / other for one, other in zip(cpu["with"], cpu["without"], strict=True)]
    share = median(checkpoints) / 480
    return {
        "cpu_seconds": {kind: [round(value, 3) for value in seconds] for kind, seconds in cpu.items()},
        "median_cpu_ratio": round(median(ratios), 4),
        "seconds_of_a_checkpoint": round(median(checkpoints), 4),
        "checkpoint_bytes": size,
        "share_of_watching": round(median(watching), 5),
        "share_of_saving_every_eight_minutes": round(share, 6),
        "share_in_all": round(share + median(watching), 5),
    }


def main() -> None:
    """Measure the jobs named, and keep the rest of the figures as they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", nargs="*", default=[*JOBS], choices=[*JOBS])
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    kept: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in asked.jobs:
        kept[name] = measure(name, asked.rounds)
        save_json(RESULTS, kept)


if __name__ == "__main__":
    main()
