"""All that is fuzzed."""

from __future__ import annotations

from tests.fuzz import folders, texts
from tests.fuzz.target import Target, try_one

__all__ = ["TARGETS", "Target", "try_one"]

TARGETS = {target.name: target for target in (*texts.TARGETS, *folders.TARGETS)}
"""Name → target."""
