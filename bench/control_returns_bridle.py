"""Train one environment as ``bridle train ENV`` does, and judge the final policy; called by ``bench/control_returns.py``.

python bench/control_returns_bridle.py ENV SEED PLACE [--steps N]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from control_returns import ENVS
from peers.protocol import judge, machine, versions, write

from bridle.cli.main import main as bridle
from bridle.control import load_policy
from bridle.runs import Run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("env")
    parser.add_argument("seed", type=int)
    parser.add_argument("place", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    budget = given.steps or ENVS[given.env][0]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        words = ["train", given.env, "--total-steps", str(budget), "--run.seed", str(given.seed), "--run.threads", "1"]
        wall, cpu = time.perf_counter(), time.process_time()
        code = bridle([*words, "--evaluation.every", "0", "--run.quiet", "--run.dir", str(run)])
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if code:
            raise SystemExit(code)
        agent, opened = load_policy(run / "policy"), Run.open(run)
        settings, last = opened.config, opened.metrics()[-1]

    def act(observations: np.ndarray) -> np.ndarray:
        return np.stack([agent.act(observation) for observation in observations])

    before = time.process_time()
    judged = judge(given.env, act, episodes=given.episodes)
    write(
        given.place,
        {
            "side": "bridle",
            "env": given.env,
            "seed": given.seed,
            "settings": {name: value for name, value in settings.items() if name != "run"},
            "budget": budget,
            "steps": last["actions"],
            **judged,
            "train_wall_seconds": round(wall, 1),
            "train_cpu_seconds": round(cpu, 1),
            "evaluation_cpu_seconds": round(time.process_time() - before, 1),
            "threads": 1,
            "versions": versions("bridle"),
            "machine": machine(),
            "train_return_of_last_100": last["return_of_last_100"],
        },
    )


if __name__ == "__main__":
    main()
