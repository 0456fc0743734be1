"""Trains agents in sessions of their own, sends a signal to all of a run's processes at once, and prints what became of it.

A terminal sends Ctrl-C so, `timeout`, service managers and clusters SIGTERM. ``python -m tests.jobs.signalled FOLDER``.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

import bridle
from bridle.cli.main import main
from bridle.runs import Run
from tests.control.worlds import Counter, register

READING, WRITING = os.pipe()

FEW = {"total_steps": 10**9, "n_steps": 16, "restart_every": 0, "evaluation": {"every": 0, "final_episodes": 5}}


class Beacon(Counter):
    """Says when its training is under way."""

    steps = 0

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.steps += 1
        if self.steps == 50:
            os.write(WRITING, b".")
        return super().step(action)


def of_ours(folder: Path) -> int:
    flags = ("--n-steps", "16", "--world.num-envs", "2", "--world.vectorization", "async", "--ppo.minibatches", "2")
    more = ("--total-steps", "1000000000", "--evaluation.every", "0", "--restart-every", "0", "--run.threads", "1")
    return main(["train", "BridleTest/Beacon-v0", *flags, *more, "--run.dir", str(folder)])


def vector() -> AsyncVectorEnv:
    return AsyncVectorEnv([Beacon] * 2, autoreset_mode=AutoresetMode.SAME_STEP)


def of_the_users(folder: Path, given: Any) -> int:
    try:
        bridle.train(given, **FEW, ppo={"minibatches": 2}, run={"dir": str(folder), "threads": 1})
    except KeyboardInterrupt as stopped:
        print(stopped, file=sys.stderr)
        return 130
    return 0


CASES = {
    "async, SIGTERM": (of_ours, signal.SIGTERM),
    "a function's, SIGINT": (lambda folder: of_the_users(folder, vector), signal.SIGINT),
    "given, SIGTERM": (lambda folder: of_the_users(folder, vector()), signal.SIGTERM),
}


def live(job: Any, folder: Path) -> None:
    """Be a run in a session of its own; never returns."""
    code = 1
    try:
        os.setsid()
        said = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(said, 1)
        os.dup2(said, 2)
        code = job(folder)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def become(folder: Path) -> dict[str, Any]:
    """Return what became of each case."""
    found = {}
    for number, (name, (job, sent)) in enumerate(CASES.items()):
        path = folder / f"run-{number}"
        child = os.fork()
        if child == 0:
            live(job, path)
        for _ in range(2):
            os.read(READING, 1)
        os.killpg(child, sent)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        run = Run.open(path)
        kept = run.latest_checkpoint()
        found[name] = {
            "code": code,
            "state": run.state().value,
            "steps": len(run.metrics()),
            "checkpoint": None if kept is None else kept.step,
            "said": path.with_suffix(".log").read_text(),
        }
    return found


if __name__ == "__main__":
    import gymnasium

    register()
    gymnasium.register("BridleTest/Beacon-v0", entry_point=Beacon)
    print(json.dumps(become(Path(sys.argv[1]))))
