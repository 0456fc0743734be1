"""One measurement of language training: what every side is told, and what it answers.

A side is a program that takes a :class:`PPOWork` or :class:`TuningWork` as JSON on its command line, trains, and prints one
line of JSON. Imported by Bridle's side and by the peers', so it needs the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

_wall = time.perf_counter
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What every kind of work has."""

    model: str
    """folder of the causal model, with its tokenizer"""
    data: str
    """JSON Lines: prompts, demonstrations or pairs"""
    dtype: Dtype = "float32"
    threads: int = 1
    seed: int = 0

    @classmethod
    def told(cls) -> Self:
        return cls(**json.loads(sys.argv[1]))

    def text(self) -> str:
        return json.dumps(asdict(self))

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.data).read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True, kw_only=True)
class PPOWork(Work):
    """PPO with a learned critic, four models: actor, critic with a trunk of its own, reference, judge."""

    lr: float = 1e-5
    reward_model: str | None = None
    """folder of a sequence classifier that judges"""
    judge: str | None = None
    """or a Python file with ``dark(prompts, completions)``"""
    prompts: int = 64
    """rows in a rollout"""
    prompt_tokens: int = 32
    new_tokens: int = 64
    stops: bool = False
    """answers end at the tokenizer's end token"""
    epochs: int = 4
    minibatches: int = 4
    temperature: float = 1.0
    kl: float = 0.05
    lam: float = 0.95
    value: float = 0.1
    """coefficient of ½ (V − R)²"""
    value_clip: float = 0.2
    rollout_rows: int = 64
    """rows of a forward pass without gradients, where a side has such a setting"""
    iterations: int = 3
    snapshots: str | None = None
    """folder that gets the policy after every iteration, off the clock"""
    until: float | None = None
    """end once the mean score of each of two iterations in a row is here,"""
    most_kl: float = float("inf")
    """and their KL to the reference at most this, nats an answer"""
    limit: float | None = None
    """[s of processor time] end after that long"""


@dataclass(frozen=True, kw_only=True)
class TuningWork(Work):
    """Supervised fine-tuning on ``{"prompt", "answer"}``, or a reward model from ``{"prompt", "better", "worse"}``."""

    kind: Literal["sft", "reward"] = "sft"
    lr: float = 1e-5
    batch: int = 16
    micro_batch: int = 16
    """rows (pairs) of a forward pass, where a side counts in rows"""
    longest: int = 256
    steps: int = 8
    """steps; the first is not counted"""


@dataclass(frozen=True, kw_only=True)
class GenerationWork(Work):
    """Sample an answer to each ``{"ids": […]}`` from the whole distribution at temperature 1."""

    new_tokens: int
    """tokens of an answer, at most"""
    stops: list[int]
    """ids that end an answer; what the model's own configuration says is left aside"""


def memory() -> dict[str, float]:
    """Resident memory of this process now and at its highest since :func:`forget_peak`, MB."""
    rows = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return {"now": int(rows["VmRSS"].split()[0]) / 1024, "peak": int(rows["VmHWM"].split()[0]) / 1024}


def forget_peak() -> float:
    """Begin to look for the highest memory anew; return what is held now, MB."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory()["now"]


class Laps:
    """Wall and processor seconds between marks."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._open: dict[str, float] = {}
        self._last = (_wall(), time.process_time())

    def skip(self) -> None:
        """Leave what has passed since the last mark out of every count."""
        self._last = (_wall(), time.process_time())

    def mark(self, name: str) -> None:
        """What has passed since the last mark belongs to ``name``."""
        wall, cpu = _wall(), time.process_time()
        for kind, spent in (("", wall - self._last[0]), ("_cpu", cpu - self._last[1])):
            self._open[name + kind] = self._open.get(name + kind, 0.0) + spent
        self._last = (wall, cpu)

    def end(self) -> dict[str, float]:
        """Close an iteration."""
        row, self._open = self._open, {}
        row["seconds"] = sum(value for name, value in row.items() if not name.endswith("_cpu"))
        row["cpu_seconds"] = sum(value for name, value in row.items() if name.endswith("_cpu"))
        self.rows.append(row)
        return row


def serve(
    sample: Callable[[], int], *packages: str, before: Callable[[], object] = lambda: None, warm: int = 2
) -> None:
    """Warm up and say what is used; then, at each line that comes in, sample once more and tell how long it took.

    ``sample`` returns the number of tokens; ``before`` is called each time, off the clock.
    """
    for _ in range(warm):
        before()
        sample()
    tell({}, *packages)
    for _ in sys.stdin:
        before()
        wall, cpu = _wall(), time.process_time()
        tokens = sample()
        spent = {"cpu_seconds": time.process_time() - cpu, "wall_seconds": _wall() - wall}
        print(json.dumps({"tokens": tokens, **spent}), flush=True)


def tell(answer: dict[str, Any], *packages: str) -> None:
    versions = {name: metadata.version(name) for name in ("torch", "transformers", *packages)}
    answer |= {"cores": sorted(os.sched_getaffinity(0)), "versions": versions}
    print(json.dumps(answer), flush=True)
