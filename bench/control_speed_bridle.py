"""Bridle's side of ``bench/control_speed.py``: the job as ``bridle train`` runs it, with the least evaluation, timed apart."""

from __future__ import annotations

import time

BEFORE = time.perf_counter()

import sys  # noqa: E402
import tempfile  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from peers.workload import Watch, Workload, tell  # noqa: E402

from bridle.control import EvaluationSettings, NetworkSettings, WorldSettings, compiled, convolutions  # noqa: E402
from bridle.jobs import control  # noqa: E402
from bridle.jobs.control import ControlConfig, run  # noqa: E402
from bridle.jobs.session import RunSettings  # noqa: E402
from bridle.learn.advantages import AdvantageSettings  # noqa: E402
from bridle.learn.optim import OptimSettings  # noqa: E402
from bridle.learn.ppo import PPOSettings  # noqa: E402
from bridle.runs import Run  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE


def config_of(load: Workload, folder: Path, rollouts: int, *, sync: bool) -> ControlConfig:
    """What the peers are told, in Bridle's words: its value loss is ½ (V − R)²."""
    factories = {
        "own": "own_module:build",
        "own-normed": "own_module:build_normed",
        "own-plain": "own_module:build_plain",
        "own-trunk": "own_module:build_trunk",
    }
    return ControlConfig(
        env=load.env,
        total_steps=rollouts * load.rollout,
        n_steps=load.n_steps,
        world=WorldSettings(num_envs=load.num_envs, vectorization="sync" if sync else "auto"),
        network=NetworkSettings(factory=factories.get(load.network)),
        advantage=AdvantageSettings(gamma=load.gamma, lam=load.lam),
        ppo=PPOSettings(
            epochs=load.epochs,
            minibatches=load.minibatches,
            clip=load.clip,
            value_coefficient=2 * load.value,
            entropy_coefficient=load.entropy,
            whiten="minibatch",
        ),
        optim=OptimSettings(lr=load.lr, schedule="linear", eps=1e-5, max_grad_norm=load.max_grad_norm),
        scale_rewards=False,
        clip_rewards=1.0 if load.network == "nature" else None,
        evaluation=EvaluationSettings(every=0, final_episodes=5, max_steps=1),
        run=RunSettings(dir=folder, seed=load.seed, threads=load.threads, quiet=True),
    )


class Aside:
    """A function whose wall and processor time are added up."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.wall = self.cpu = 0.0

    def __call__(self, *given: Any, **named: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            return self.function(*given, **named)
        finally:
            self.wall, self.cpu = self.wall + time.perf_counter() - wall, self.cpu + time.process_time() - cpu


def main() -> None:
    load, sync = Workload.told(), "--sync" in sys.argv
    with tempfile.TemporaryDirectory() as place:
        if load.warmup:
            run(config_of(load, Path(place) / "warmup", load.warmup, sync=sync))
        judging = control.evaluate = Aside(control.evaluate)
        watch, clock = Watch(load.until), time.time()
        opened = Run.open(run(config_of(load, Path(place) / "run", load.rollouts, sync=sync)))
        answer = watch.answer(0, IMPORTS, "bridle")
        answer["seconds"] -= judging.wall
        answer["cpu_seconds"] -= judging.cpu
        answer["evaluation_seconds"] = judging.wall
        rows, ends = opened.metrics(), {row["step"]: row["time"] for row in opened.timings()}
        for row in rows:
            reached = row["episodes"] >= 100 and row["return_of_last_100"] >= (load.until or float("inf"))
            if reached and answer["reached_seconds"] is None:
                answer |= {"reached_seconds": ends[row["step"]] - clock, "reached_steps": row["actions"]}
        answer["return_of_last_100"] = rows[-1]["return_of_last_100"] if rows[-1]["episodes"] else None
        answer["steps"] = rows[-1]["actions"]
        answer["form"] = "sync" if sync else "auto"
        answer["compiled"] = compiled.library is not None and convolutions.library is not None
    tell(answer)


if __name__ == "__main__":
    main()
