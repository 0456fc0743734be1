"""Training speed side by side: Bridle, Stable-Baselines3, Tianshou and AgileRL with the same settings on one core.

    python bench/control_speed.py --peers sb3=PYTHON tianshou=PYTHON agilerl=PYTHON [--part cartpole64 …] [--rounds 5]
    python bench/control_speed.py --short            a trial of some seconds, Bridle alone, writes nothing

``PYTHON`` is the interpreter of an environment made as ``bench/peers/README.md`` says; a side without one is left out. Every
measurement is a fresh process pinned to the same core (two for ``…-two-threads``), and the sides take turns, so that a busy
machine slows them alike. A process first trains a little on the same workload, then its clock runs from making the
environments to the end of training; imports are timed apart. Bridle runs the whole job, its records and checkpoints
included; its final evaluation, which no peer makes, is cut to one action and left out, its seconds kept apart: games of
Atari take 4 s to be made anew for it. ``limits`` are the matrix products of the workload alone and its
environments alone, in the same run. Parts that were run replace those of the same name in
``bench/results/control_speed.json``; the rest of the file stays.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peers.workload import Workload

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "control_speed.json"

PROGRAMS = {
    "bridle": [str(HERE / "control_speed_bridle.py")],
    "bridle-sync": [str(HERE / "control_speed_bridle.py"), "--sync"],
    "sb3": [str(HERE / "peers" / "sb3_speed.py")],
    "tianshou": [str(HERE / "peers" / "tianshou_speed.py")],
    "agilerl": [str(HERE / "peers" / "agilerl_speed.py")],
}
EVERYBODY = ("bridle", "bridle-sync", "sb3", "tianshou", "agilerl")

CARTPOLE64 = Workload()
# as many steps in a rollout and in a minibatch as with 64 environments
CARTPOLE8 = Workload(num_envs=8, n_steps=256, rollouts=30)
# minibatches of 64, ten epochs
HALFCHEETAH8 = Workload(
    env="HalfCheetah-v5", num_envs=8, n_steps=256, minibatches=32, lr=3e-4, gamma=0.99, lam=0.95, rollouts=12, warmup=1
)
ATARI = Workload(
    env="ALE/Pong-v5",
    num_envs=8,
    n_steps=128,
    epochs=4,
    lr=2.5e-4,
    gamma=0.99,
    lam=0.95,
    clip=0.1,
    entropy=0.01,
    network="nature",
    rollouts=4,
    warmup=1,
)


@dataclass(frozen=True, kw_only=True)
class Part:
    """One workload and who does it."""

    load: Workload
    sides: tuple[str, ...]
    seeds: tuple[int, ...] | None = None
    """one measurement per seed and side, instead of as many as there are rounds"""


PARTS = {
    "cartpole64": Part(load=CARTPOLE64, sides=EVERYBODY),
    "cartpole8": Part(load=CARTPOLE8, sides=EVERYBODY),
    "cartpole64-475": Part(
        load=replace(CARTPOLE64, rollouts=150, until=475.0, warmup=1),
        sides=("bridle", "sb3", "tianshou", "agilerl"),
        seeds=(0, 1, 2, 3, 4),
    ),
    "own-module": Part(load=replace(CARTPOLE64, network="own"), sides=("bridle", "bridle-sync", "sb3")),
    "own-normed-module": Part(load=replace(CARTPOLE64, network="own-normed"), sides=("bridle", "bridle-sync", "sb3")),
    "own-plain-module": Part(load=replace(CARTPOLE64, network="own-plain"), sides=("bridle", "bridle-sync", "sb3")),
    "own-trunk-module": Part(load=replace(CARTPOLE64, network="own-trunk"), sides=("bridle", "bridle-sync", "sb3")),
    "halfcheetah8": Part(load=HALFCHEETAH8, sides=("bridle", "sb3", "tianshou", "agilerl")),
    "atari": Part(load=ATARI, sides=("bridle", "bridle-sync", "sb3")),
    "cartpole64-two-threads": Part(load=replace(CARTPOLE64, threads=2), sides=("bridle", "sb3")),
    "halfcheetah8-two-threads": Part(load=replace(HALFCHEETAH8, threads=2), sides=("bridle", "sb3")),
    "atari-two-threads": Part(load=replace(ATARI, threads=2), sides=("bridle", "sb3")),
}


def answer_of(program: list[str], python: str, load: Workload, cores: set[int]) -> dict[str, Any]:
    """Run one measurement in a process of its own, which finds what this one finds."""
    where = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [python, *program[:1], load.text(), *program[1:]],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(load.threads), "PYTHONPATH": os.pathsep.join(where)},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"{Path(program[0]).name} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def measure(
    name: str, part: Part, pythons: dict[str, str], cores: list[int], rounds: int, *, short: bool
) -> dict[str, Any]:
    """All sides of one part, taking turns; then what the machine allows."""
    sides = [side for side in part.sides if side.partition("-")[0] in pythons]
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    allowed = set(cores[: part.load.threads])
    for turn, seed in enumerate(part.seeds or range(rounds)):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            load = replace(part.load, seed=seed)
            found = answer_of(PROGRAMS[side], pythons[side.partition("-")[0]], load, allowed)
            answers[side].append(found)
            rate, cpu = found["steps"] / found["seconds"], found["steps"] / found["cpu_seconds"]
            reached = "" if found["reached_seconds"] is None else f", reached after {found['reached_seconds']:.2f} s"
            print(f"{name} {side} {seed}: {rate:,.0f} steps/s ({cpu:,.0f} per CPU second){reached}", flush=True)
    program = [str(HERE / "control_speed_limits.py"), *(["--short"] if short else [])]
    limits = answer_of(program, pythons["bridle"], part.load, allowed)
    return {
        "workload": json.loads(part.load.text()),
        "sides": {side: summary(found) for side, found in answers.items()},
        "bridle_over": {side: ratio(answers, side, until=part.load.until) for side in sides if side != "bridle"},
        "limits": limits,
    }


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "steps_per_second": spread([one["steps"] / one["seconds"] for one in found]),
        "steps_per_cpu_second": spread([one["steps"] / one["cpu_seconds"] for one in found]),
        "import_seconds": statistics.median(one["import_seconds"] for one in found),
        "reached_seconds": [one["reached_seconds"] for one in found],
        "measurements": found,
    }


def ratio(answers: dict[str, list[dict[str, Any]]], side: str, *, until: float | None) -> dict[str, float] | None:
    """How many times as fast Bridle is, turn by turn: in steps per second, or in the time until the returns are reached."""
    turns = list(zip(answers["bridle"], answers[side], strict=True))
    if until is None:
        return spread([(b["steps"] / b["seconds"]) / (s["steps"] / s["seconds"]) for b, s in turns])
    both = [
        s["reached_seconds"] / b["reached_seconds"] for b, s in turns if b["reached_seconds"] and s["reached_seconds"]
    ]
    return spread(both) if both else None


def show(name: str, part: dict[str, Any]) -> None:
    limits = part["limits"]
    print(f"\n{name}")
    for side, found in part["sides"].items():
        rate, ratios = found["steps_per_second"], part["bridle_over"].get(side)
        times = (
            ""
            if ratios is None
            else f"   Bridle {ratios['median']:.2f}× ({ratios['lowest']:.2f}–{ratios['highest']:.2f})"
        )
        reached = [f"{t:.2f}" if t else "never" for t in found["reached_seconds"]]
        waits = f"   reached after {', '.join(reached)} s" if part["workload"]["until"] else ""
        print(f"  {side:12} {rate['median']:>9,.0f} ({rate['lowest']:,.0f}–{rate['highest']:,.0f}){times}{waits}")
    products, worlds = limits["steps_per_second"], limits["environments_auto_steps_per_second"]
    print(
        f"  matrix products alone {products:,.0f} ({limits['learning_gflops']:.1f} GFLOP/s), environments alone {worlds:,.0f}"
    )
    share = part["sides"]["bridle"]["steps_per_second"]["median"] / limits["both_auto_steps_per_second"]
    print(f"  both together {limits['both_auto_steps_per_second']:,.0f}: Bridle is at {share:.0%} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="*", default=[], metavar="SIDE=PYTHON", help="interpreters of the peers")
    parser.add_argument(
        "--part",
        nargs="+",
        choices=tuple(PARTS),
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=lambda text: [int(c) for c in text.split(",")], default=[1, 0])
    parser.add_argument("--rollouts", type=int, help="another length, for a trial: writes nothing")
    parser.add_argument("--short", action="store_true", help="two rollouts, one round: writes nothing")
    given = parser.parse_args()
    pythons = {"bridle": sys.executable, **dict(item.split("=", 1) for item in given.peers)}
    rollouts = 2 if given.short else given.rollouts
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    started = time.strftime("%Y-%m-%d")
    for name in given.part or (["cartpole64"] if given.short else PARTS):
        part = PARTS[name]
        if rollouts is not None:
            part = replace(
                part, load=replace(part.load, rollouts=rollouts, warmup=1), seeds=part.seeds and part.seeds[:1]
            )
        rounds = 1 if given.short else given.rounds
        found = measure(name, part, pythons, given.cores, rounds, short=given.short)
        show(name, found)
        if rollouts is None:
            sides = [f"{side}=PYTHON" for side in pythons if side != "bridle"]
            shown = [
                "python",
                "bench/control_speed.py",
                "--rounds",
                str(given.rounds),
                "--part",
                name,
                "--peers",
                *sides,
            ]
            results[name] = {"command": shlex.join(shown), "date": started, "machine": platform.processor(), **found}
            RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
