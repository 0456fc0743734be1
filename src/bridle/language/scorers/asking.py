"""Asking a judge that may raise, hang or talk nonsense: in time, again, and never with a silent zero."""

from __future__ import annotations

import asyncio
import math
import queue
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bridle.errors import ConfigError, ScorerError

_GRACE = 1.0
"""Seconds that an async function has to take leave in, when it is told that its time is up."""

__all__ = ["JudgingSettings", "Mishap", "Worker", "ask"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgingSettings:
    """What follows when a judge's function raises, hangs, or returns anything but finite numbers."""

    timeout: float | None = 600.0
    """> 0 seconds that it may take for all answers of a step. Then it is left behind in its thread, which no Python program can
    end; one that holds the interpreter (an endless loop in C) cannot be left. None waits for ever, in the main thread."""
    retries: int = 2
    """>= 0, how often it is asked again about the answers that it failed on."""
    wait: float = 0.5
    """>= 0 seconds before it is asked again; twice as long each time."""
    on_failure: Literal["fail", "drop"] = "fail"
    """What follows the last retry: the run ends, its last checkpoint as it was; or the answers that have no score are left
    out of the step. An answer is never given a score that no judge gave."""

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.timeout is not None and not (math.isfinite(self.timeout) and self.timeout > 0):
            raise ConfigError.of("judging.timeout", self.timeout, "a number of seconds > 0", "leave it out to wait on")
        if self.retries < 0:
            raise ConfigError.of("judging.retries", self.retries, "a whole number >= 0")
        if not (math.isfinite(self.wait) and self.wait >= 0):
            raise ConfigError.of("judging.wait", self.wait, "a number of seconds >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mishap:
    """One time that a judge failed."""

    judge: str
    """Its name."""
    outcome: Literal["retried", "dropped", "failed"]
    """What followed."""
    answers: int
    """How many answers had no score of it then."""
    text: str
    """What it did."""


class Worker:
    """A thread that calls a user's function, one call after the other; it is left behind when one takes too long.

    The same thread serves all calls until then, and one event loop: a client that the user's module keeps open belongs to its
    first loop. It is a daemon, so the process ends whether the function has or not.
    """

    def __init__(self, timeout: float | None) -> None:
        self._timeout = timeout
        self._loop: asyncio.AbstractEventLoop | None = None
        self._work: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None] | None = None

    def run(self, work: Callable[[], None], *, takes_leave: bool = False) -> bool:
        """Do ``work``, which must not raise; return False if it was not done in time.

        ``takes_leave`` says that it looks at the time by itself, and has a little more to say so.
        """
        if self._timeout is None:
            work()
            return True
        if self._work is None:
            self._work = queue.SimpleQueue()
            threading.Thread(target=_serve, args=(self._work,), name="judge", daemon=True).start()
        done = threading.Event()
        self._work.put((work, done))
        if done.wait(self._timeout + (_GRACE if takes_leave else 0.0)):
            return True
        self._work.put(None)  # should it ever return, its thread ends
        self._work, self._loop = None, None
        return False

    def gather(self, waiting: Sequence[Awaitable[object]]) -> list[object]:
        """Await all together, in time; return each one's result, or what it raised. To be called from within ``work``."""
        loop = self._loop = self._loop or asyncio.new_event_loop()

        async def settle() -> list[object]:
            tasks = [asyncio.ensure_future(one) for one in waiting]
            late = (await asyncio.wait(tasks, timeout=self._timeout))[1]
            for task in late:
                task.cancel()
            await asyncio.wait(tasks, timeout=_GRACE / 2)
            # what was cancelled counts as late, whatever it made of that
            return [TimeoutError() if task in late else task.exception() or task.result() for task in tasks]

        return loop.run_until_complete(settle())

    def close(self) -> None:
        """Let the thread end and close the event loop, if no call is under way."""
        if self._work is not None:
            self._work.put(None)
            self._work = None
        if self._loop is not None:
            self._loop.close()
            self._loop = None


def _serve(work: queue.SimpleQueue[tuple[Callable[[], None], threading.Event] | None]) -> None:
    while (item := work.get()) is not None:
        item[0]()
        item[1].set()


def ask(
    judge: str,
    settings: JudgingSettings,
    sizes: Sequence[int],
    call: Callable[[Sequence[int]], Mapping[int, list[float | None] | ScorerError]],
    tell: Callable[[Mishap], None],
) -> list[list[float | None]]:
    """Ask about several sets of answers, again where it fails; return each set's scores, None where there is none.

    Args:
        judge: its name.
        settings: how often, and what then.
        sizes: answers in each set.
        call: given which sets to ask about, the scores of each (None for rubbish) or what went wrong.
        tell: is told every mishap.

    Raises:
        ScorerError: it failed for the last time, and ``on_failure`` is "fail", or no answer at all has a score.
    """
    found: list[list[float | None]] = [[None] * size for size in sizes]
    left = list(range(len(sizes)))
    for attempt in range(settings.retries + 1):
        errors: list[ScorerError] = []
        for which, result in call(left).items():
            if isinstance(result, ScorerError):
                errors.append(result)
                continue
            found[which] = result
            if None in result:
                errors.append(ScorerError(f"{judge} gave no finite number for answer {result.index(None)}"))
        left = [which for which in left if None in found[which]]
        if not left:
            return found
        missing = sum(row.count(None) for row in found)
        last = attempt == settings.retries
        drop = last and settings.on_failure == "drop" and missing < sum(sizes)
        outcome: Literal["retried", "dropped", "failed"] = "retried" if not last else "dropped" if drop else "failed"
        tell(Mishap(judge=judge, outcome=outcome, answers=missing, text=str(errors[0])))
        if last and not drop:
            raise errors[0]
        if not last:
            time.sleep(settings.wait * 2**attempt)
    return found
