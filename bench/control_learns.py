"""Whether the algorithm learns in worlds whose answers are known; writes ``bench/results/control_learns.json``.

    python bench/control_learns.py [NAME …]

Without names every case is run (about an hour on one core); with names only those, and the other results stay.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bridle.control import EvaluationSettings, WorldSettings
from bridle.jobs.control import ControlConfig, run
from bridle.jobs.session import RunSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run

RESULTS = Path(__file__).parent / "results" / "control_learns.json"

A2C = {"algorithm": "a2c", "world": WorldSettings(num_envs=8), "total_steps": 150_000}

CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    # the defaults: bridle train CartPole-v1
    "cartpole-ppo": ((0, 1, 2, 3, 4), {}),
    "cartpole-a2c-td-1": ((0, 1), {**A2C, "n_steps": 1, "advantage": AdvantageSettings(estimator="td")}),
    "cartpole-a2c-n-step": (
        (0, 1),
        {**A2C, "n_steps": 16, "advantage": AdvantageSettings(estimator="n_step", n=16)},
    ),
    "cartpole-a2c-gae": ((0, 1), {**A2C, "n_steps": 16}),
    "pendulum-ppo": (
        (0, 1),
        {
            "env": "Pendulum-v1",
            "n_steps": 256,
            "advantage": AdvantageSettings(gamma=0.9, lam=0.95),
            "ppo": PPOSettings(epochs=10, minibatches=32, value_coefficient=0.5),
            "optim": OptimSettings(lr=1e-3, schedule="linear", eps=1e-5, max_grad_norm=0.5),
            "normalise_observations": True,
        },
    ),
}


def measure(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """Train once and tell how it went."""
    with tempfile.TemporaryDirectory() as folder:
        place = RunSettings(dir=Path(folder) / "run", seed=seed, threads=1, quiet=True, checkpoint_minutes=1e6)
        judged = EvaluationSettings(every=0)
        every = 100 if settings.get("n_steps") == 1 else 10 if settings.get("algorithm") == "a2c" else 1
        started = time.process_time()
        rows = Run.open(
            run(ControlConfig(run=place, evaluation=judged, record_every=every, restart_every=0, **settings))
        ).metrics()
        seconds = time.process_time() - started
    returns = [(row["actions"], row["return_of_last_100"]) for row in rows if row["episodes"] >= 100]
    return {
        "seed": seed,
        "first_475_at": next((actions for actions, mean in returns if mean >= 475), None),
        "best_of_last_100": max(mean for _, mean in returns),
        "last_100": rows[-1]["return_of_last_100"],
        "final": {name: value for name, value in rows[-1].items() if name.startswith("final/")},
        "actions": rows[-1]["actions"],
        "sampler_gap_mean": max(row["sampler_gap_mean"] for row in rows),
        "sampler_gap_max": max(row["sampler_gap_max"] for row in rows),
        "curve": [[actions, round(mean, 1)] for actions, mean in returns[:: max(1, len(returns) // 25)]],
        "cpu_seconds": round(seconds, 1),
    }


def main(names: list[str]) -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or CASES:
        seeds, settings = CASES[name]
        results[name] = []
        for seed in seeds:
            result = measure(seed, settings)
            results[name].append(result)
            line = f"last 100: {result['last_100']:.1f}, first 475 at {result['first_475_at']}"
            print(f"{name} seed {seed}: {line}, {result['cpu_seconds']} s", flush=True)
        print(f"{name}: mean of last 100 {statistics.mean(r['last_100'] for r in results[name]):.1f}", flush=True)
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
