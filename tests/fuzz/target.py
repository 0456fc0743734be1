"""What a target of fuzzing is: whatever the input, it returns or raises a :class:`~bridle.errors.UserError` of one line.

A target also asserts what holds of every input that is accepted: read again after writing, it is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from bridle.errors import UserError
from tests.fuzz import mutate

__all__ = ["Target", "try_one"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Something that reads what a user, or anybody else, has written."""

    name: str
    """what it is called."""
    prepare: Callable[[Path], None]
    """fills an empty folder, once."""
    seeds: Callable[[Path], list[bytes]]
    """sound inputs to begin with, from that folder."""
    run: Callable[[bytes, Path], None]
    """takes one input in that folder."""
    reads: tuple[str, ...]
    """modules under ``bridle`` that it is to reach."""
    head: int = 0
    """leading bytes of an input that pick the reader or the file, and are not read themselves."""
    alike: Callable[[bytes, Random], bytes] = mutate.vary
    """makes one change that is likely to be taken."""

    def vary(self, data: bytes, draws: Random) -> bytes:
        """Change one thing into another of its kind."""
        return data[: self.head] + self.alike(data[self.head :], draws)

    def mutate(self, data: bytes, draws: Random) -> bytes:
        """Put something odd anywhere, seldom in the head."""
        head = bytes(draws.randrange(256) if draws.random() < 0.05 else byte for byte in data[: self.head])
        return head + mutate.mutate(data[self.head :], draws)


def try_one(target: Target, data: bytes, folder: Path) -> str:
    """Let the target take ``data``; return its refusal, "" if it took it. Whatever else it raises is a crash."""
    try:
        target.run(data, folder)
    except UserError as error:
        text = str(error)
        assert text, "a refusal without words"
        assert len(text) < 20_000, "a refusal without end"
        return text
    return ""
