"""A run is a directory: its records, samples, checkpoints and lock. Imports no other room."""

from __future__ import annotations

from bridle.runs.checkpoints import Checkpoint
from bridle.runs.directory import Run, RunState
from bridle.runs.places import Reserved, reserve

__all__ = ["Checkpoint", "Reserved", "Run", "RunState", "reserve"]
