"""Bridle: reinforcement learning with an actor and a critic, for language models and Gymnasium agents.

The names here are what most programs need; the maths is in ``bridle.core``, one readable function per job in ``bridle.jobs``.
They are imported when first used, so that ``bridle --help`` does not wait for PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bridle.batch import Batch, Evaluation, Policy, Trajectories, Units
    from bridle.control.saved import load_policy
    from bridle.errors import BridleError, TrainingError, UserError
    from bridle.jobs.control import train
    from bridle.runs import Run

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "BridleError",
    "Evaluation",
    "Policy",
    "Run",
    "TrainingError",
    "Trajectories",
    "Units",
    "UserError",
    "__version__",
    "load_policy",
    "train",
]

_HOMES = {
    "bridle.batch": ("Batch", "Evaluation", "Policy", "Trajectories", "Units"),
    "bridle.control.saved": ("load_policy",),
    "bridle.errors": ("BridleError", "TrainingError", "UserError"),
    "bridle.jobs.control": ("train",),
    "bridle.runs": ("Run",),
}


def __getattr__(name: str) -> object:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(home), name)
    raise AttributeError(f"module 'bridle' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
