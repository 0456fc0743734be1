"""Shares work out among threads, which run at once while they are in compiled code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from itertools import pairwise

import torch

__all__ = ["calm", "for_each", "shares", "threads"]

_given = threading.local()


def threads() -> int:
    """Return among how many threads compiled code is shared out: those of PyTorch, or those it had before :func:`calm`."""
    return getattr(_given, "threads", None) or torch.get_num_threads()


@contextmanager
def calm(where: bool = True) -> Iterator[None]:
    """Let PyTorch compute in one thread in here, compiled code in as many as PyTorch did until now; not ``where``, nothing.

    After each operation PyTorch's threads wait for the next one by turning round and round, and hold the cores that compiled
    code is about to ask for. Where little is left to PyTorch one thread of it is faster. This is the calling thread's own; but
    a thread that asks PyTorch for the first time meanwhile finds one thread, as PyTorch tells it what was set last.
    """
    if not where:
        yield
        return
    own, before, outer = threads(), torch.get_num_threads(), getattr(_given, "threads", None)
    try:
        _given.threads = own
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)
        _given.threads = outer


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
