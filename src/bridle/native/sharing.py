"""Shares work out among threads, which run at once while they are in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

__all__ = ["for_each", "shares"]


def shares(count: int, parts: int) -> list[range]:
    """Cut 0 … ``count`` − 1 into neighbouring parts of alike size: at most ``parts`` ≥ 1 of them, and none that is empty.

    Part i of n begins at ⌊count · i / n⌋, so that sizes differ by at most one.
    """
    parts = min(count, parts)
    bounds = [count * i // parts for i in range(parts + 1)] if parts else [0]
    return [range(start, stop) for start, stop in pairwise(bounds)]


def for_each(count: int, call: Callable[[int], None]) -> None:
    """Call with 0 … ``count`` − 1, each in a thread of its own: a single one in the caller's, none for a count of 0.

    Returns when all have returned, and raises what the first of them in order raised. Threads are kept for the next call.
    """
    if count == 1:
        call(0)
    elif count:
        list(_pool(count).map(call, range(count)))


@cache
def _pool(workers: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(workers)
