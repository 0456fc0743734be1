"""The settings that every job has: where its run lies, what it runs on, how often it saves."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from bridle.errors import ConfigError
from bridle.runs.trackers import TrackerName

__all__ = ["RunSettings", "resolve_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Where a run lies and what it runs on."""

    dir: Path
    """Directory of the run; must be new or empty."""
    seed: int = 0
    """≥ 0, the key of every random draw."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where the tensors live; auto takes CUDA where there is one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward passes, and of the layers' weights; what is trained and saved is float32."""
    threads: int | None = None
    """1 to 1024, threads of one tensor operation or compiled call; None leaves PyTorch's choice."""
    checkpoint_every: int | None = None
    """≥ 1 steps between checkpoints, besides those by the clock; None leaves it to the clock. The last step is always
    saved. Saving changes nothing in a run, so this may differ in a resumed one."""
    checkpoint_minutes: float = 8.0
    """> 0 minutes after a checkpoint at which the next finished step is saved: with that step, what a crash can cost."""
    keep_checkpoints: int = 2
    """≥ 1, how many of the newest checkpoints stay."""
    keep_every: int | None = None
    """≥ 1 steps: checkpoints at its multiples stay too."""
    keep_best: str | None = None
    """Name of a metric: the checkpoint at whose step it was highest stays too; with a - before the name, lowest."""
    trackers: tuple[TrackerName, ...] = ()
    """Who gets a copy of the metrics besides metrics.jsonl."""
    quiet: bool = False
    """Print nothing while it works."""
    on_fault: Literal["stop", "skip"] = "stop"
    """What follows a loss, gradient, value or log-probability that is not finite, or such a reward or observation of an
    environment. The step is not applied and its evidence is kept either way."""
    fault_limit: int = 3
    """≥ 0, steps in a row that may be skipped; the next one stops the run."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name in ("checkpoint_every", "keep_checkpoints", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(f"run.{name}", value, "a whole number of at least 1")
        if not self.checkpoint_minutes > 0:
            raise ConfigError.of("run.checkpoint_minutes", self.checkpoint_minutes, "a number of minutes > 0")
        if self.keep_best is not None and not self.keep_best.removeprefix("-"):
            raise ConfigError.of(
                "run.keep_best", self.keep_best, "the name of a metric", "evaluation/score, for instance"
            )
        if self.threads is not None and not 1 <= self.threads <= 1024:  # PyTorch dies of many more
            raise ConfigError.of(
                "run.threads", self.threads, "a whole number from 1 to 1024", "the number of cores is usual"
            )
        if self.fault_limit < 0:
            raise ConfigError.of("run.fault_limit", self.fault_limit, "a number of steps >= 0")
        if self.seed < 0:
            raise ConfigError.of("run.seed", self.seed, "a whole number of at least 0")


def resolve_device(name: str) -> torch.device:
    """Return the device that a setting names; raises :class:`ConfigError` where there is no such one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError.of("run.device", name, "a GPU that PyTorch can use", "pass --run.device cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product: deterministic only with it
    return torch.device("cuda" if name != "cpu" and available else "cpu")
