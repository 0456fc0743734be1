"""One measurement of training speed: what every side is told, and what it answers.

A side is a program that takes a :class:`Workload` as JSON on its command line, trains, and prints one line of JSON: an
:class:`Answer`. Imported by Bridle's side and by each peer's, so it needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Workload:
    """PPO with the same settings for everybody; the learning rate falls linearly to 0."""

    env: str = "CartPole-v1"
    num_envs: int = 64
    n_steps: int = 32
    epochs: int = 10
    minibatches: int = 4
    lr: float = 1e-3
    gamma: float = 0.98
    lam: float = 0.8
    clip: float = 0.2
    entropy: float = 0.0
    value: float = 0.5
    """coefficient of the mean (V − R)², all told"""
    max_grad_norm: float = 0.5
    network: Literal["mlp", "own", "own-normed", "own-plain", "own-trunk", "nature"] = "mlp"
    """two 2×64 tanh networks, by the library or as a user's own modules; these with layer norms and SiLU, or with a residual
    sum; heads on one trunk of 128; or one Nature CNN"""
    rollouts: int = 60
    warmup: int = 2
    """rollouts of an earlier training in the same process, not counted"""
    until: float | None = None
    """stop once the mean return of the last 100 training episodes is here"""
    seed: int = 0
    threads: int = 1

    @property
    def rollout(self) -> int:
        return self.num_envs * self.n_steps

    @property
    def minibatch(self) -> int:
        return self.rollout // self.minibatches

    @classmethod
    def told(cls) -> Workload:
        return cls(**json.loads(sys.argv[1]))

    def text(self) -> str:
        return json.dumps(asdict(self))


class Watch:
    """Wall and processor time since it was made, and the returns of the last 100 episodes."""

    def __init__(self, until: float | None) -> None:
        self.until = until
        self.returns: deque[float] = deque(maxlen=100)
        self.reached: tuple[float, int] | None = None
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def saw(self, returns: Iterable[float], steps: int) -> bool:
        """Take in the returns of finished episodes; True once what was waited for is reached."""
        self.returns.extend(float(value) for value in returns)
        if self.until is None or self.reached is not None or len(self.returns) < (self.returns.maxlen or 0):
            return self.reached is not None
        if sum(self.returns) / len(self.returns) >= self.until:
            self.reached = (time.perf_counter() - self.wall, steps)
        return self.reached is not None

    def answer(self, steps: int, imports: float, *packages: str) -> dict[str, Any]:
        return {
            "steps": steps,
            "seconds": time.perf_counter() - self.wall,
            "cpu_seconds": time.process_time() - self.cpu,
            "import_seconds": imports,
            "return_of_last_100": sum(self.returns) / len(self.returns) if self.returns else None,
            "reached_seconds": self.reached and self.reached[0],
            "reached_steps": self.reached and self.reached[1],
            "cores": sorted(os.sched_getaffinity(0)),
            "versions": {name: metadata.version(name) for name in ("torch", "numpy", "gymnasium", *packages)},
        }


def tell(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), flush=True)
