"""What the final policies of two sides are worth after the same number of environment steps.

    python bench/control_returns.py run --side sb3 --peers PYTHON --env CartPole-v1 --seeds 0-4
    python bench/control_returns.py run --side bridle --env CartPole-v1 --seeds 0-4
    python bench/control_returns.py table

``run`` trains each seed in a process of its own and writes ``bench/results/control_returns/SIDE/ENV-SEED.json``; what is there
already is not run again, so an interrupted run is taken up by the same command. ``table`` reads those files and writes
``bench/results/control_returns.json`` and prints the table. ``PYTHON`` is the interpreter of an environment made as
``bench/peers/README.md`` says.

The final policy plays deterministically 100 episodes whose resets have the same seeds on both sides. The interval over training
seeds is Student's with n − 1 degrees of freedom over the seeds' means; the pooled one is over all episodes of all seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "control_returns"
SUMMARY = HERE / "results" / "control_returns.json"

# the two-sided 95 % points of Student's distribution, by degrees of freedom
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
NORMAL = 1.96

# steps, and what others have published: (return, by whom)
ENVS: dict[str, tuple[int, list[tuple[float, str]]]] = {
    "CartPole-v1": (100_000, [(500.0, "RL Zoo")]),
    "Acrobot-v1": (1_000_000, [(-73.5, "RL Zoo")]),
    "MountainCar-v0": (1_000_000, [(-110.4, "RL Zoo")]),
    "Pendulum-v1": (100_000, [(-172.2, "RL Zoo")]),
    "LunarLander-v3": (1_000_000, [(242.1, "RL Zoo, v2")]),
    "HalfCheetah-v5": (1_000_000, [(5819.1, "RL Zoo, v3"), (5784.0, "Tianshou, v3")]),
    "Hopper-v5": (1_000_000, [(2410.4, "RL Zoo, v3"), (2609.0, "Tianshou, v3")]),
    "Walker2d-v5": (1_000_000, [(3478.8, "RL Zoo, v3"), (3589.0, "Tianshou, v3")]),
    "InvertedDoublePendulum-v5": (1_000_000, [(9231.0, "Tianshou, v2")]),
    "Swimmer-v5": (1_000_000, [(281.6, "RL Zoo, v3"), (66.7, "Tianshou, v3")]),
}


def seeds_of(text: str) -> list[int]:
    """``0-4`` or ``0,2`` as a list."""
    first, dash, last = text.partition("-")
    return list(range(int(first), int(last) + 1)) if dash else [int(seed) for seed in text.split(",")]


def place_of(side: str, env: str, seed: int) -> Path:
    return RESULTS / side / f"{env}-{seed}.json"


def command_of(side: str, env: str, seed: int, place: Path, peers: str | None) -> list[str]:
    if side == "bridle":
        return [sys.executable, str(HERE / "control_returns_bridle.py"), env, str(seed), str(place)]
    if peers is None:
        raise SystemExit("--side sb3 needs --peers PYTHON: see bench/peers/README.md")
    return [peers, str(HERE / "peers" / "sb3_returns.py"), env, str(seed), str(place)]


def run(given: argparse.Namespace) -> None:
    for env in given.env:
        for seed in given.seeds:
            place = (given.out or RESULTS) / given.side / f"{env}-{seed}.json"
            if place.exists():
                continue
            command = command_of(given.side, env, seed, place, given.peers)
            command += [] if given.steps is None else ["--steps", str(given.steps)]
            command += [] if given.episodes is None else ["--episodes", str(given.episodes)]
            subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            result = json.loads(place.read_text())
            shown = [
                "python",
                "bench/control_returns.py",
                "run",
                "--side",
                given.side,
                "--env",
                env,
                "--seeds",
                str(seed),
            ]
            result["command"] = shlex.join(shown + (["--peers", "PYTHON"] if given.side != "bridle" else []))
            place.write_text(json.dumps(result) + "\n")
            mean, cpu = statistics.mean(result["returns"]), result["train_cpu_seconds"]
            print(
                f"{given.side} {env} seed {seed}: {mean:.1f} at {result['steps']} steps, {cpu} CPU seconds", flush=True
            )


def interval(values: list[float], point: float) -> float:
    return point * statistics.stdev(values) / math.sqrt(len(values))


def summary_of(results: list[dict[str, Any]]) -> dict[str, Any]:
    """One environment and side: the mean of the seeds' means, with both intervals (half widths)."""
    means = [statistics.mean(result["returns"]) for result in results]
    pooled = [value for result in results for value in result["returns"]]
    return {
        "seeds": [result["seed"] for result in results],
        "mean": statistics.mean(means),
        "seed_means": means,
        "interval_over_seeds": interval(means, STUDENT[len(means) - 1]) if len(means) > 1 else None,
        "interval_pooled": interval(pooled, NORMAL),
        "worst_episode": min(pooled),
        "best_episode": max(pooled),
        "steps": sorted({result["steps"] for result in results}),
        "train_cpu_seconds": statistics.mean(result["train_cpu_seconds"] for result in results),
    }


def cell(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "–"
    half = summary["interval_over_seeds"]
    spread = "(1 seed)" if half is None else f"± {half:.1f} ({len(summary['seeds'])} seeds)"
    return f"{summary['mean']:.1f} {spread}"


def table(_: argparse.Namespace) -> None:
    found: dict[str, dict[str, Any]] = {}
    print("| environment | steps | Bridle | SB3, RL Zoo's settings | published |\n| --- | --- | --- | --- | --- |")
    for env, (steps, published) in ENVS.items():
        sides: dict[str, Any] = {}
        for side in ("bridle", "sb3"):
            places = sorted((RESULTS / side).glob(f"{env}-[0-9]*.json"))
            if places:
                sides[side] = summary_of([json.loads(place.read_text()) for place in places])
        found[env] = {"budget": steps, **sides, "published": published}
        said = ", ".join(f"{value:g} ({who})" for value, who in published)
        print(f"| {env} | {steps:,} | {cell(sides.get('bridle'))} | {cell(sides.get('sb3'))} | {said} |")
    SUMMARY.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--side", choices=("sb3", "bridle"), required=True)
    runs.add_argument("--env", nargs="+", choices=tuple(ENVS), default=list(ENVS))
    runs.add_argument("--seeds", type=seeds_of, default=[0, 1, 2, 3, 4])
    runs.add_argument("--peers", help="the interpreter of the peers' environment")
    runs.add_argument("--steps", type=int, help="another budget, for a trial (with --out)")
    runs.add_argument("--episodes", type=int, help="fewer episodes, for a trial (with --out)")
    runs.add_argument("--out", type=Path, help="another folder for the results")
    runs.set_defaults(do=run)
    commands.add_parser("table").set_defaults(do=table)
    given = parser.parse_args()
    given.do(given)


if __name__ == "__main__":
    main()
