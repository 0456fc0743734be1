"""Vector environments that Gymnasium's own do not cover: processes that may die, and envpool's threads."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

from gymnasium.vector import AsyncVectorEnv, VectorEnv

__all__ = ["NOTE", "Pool", "Processes", "ignore_interrupts"]


NOTE = "environment "
"""How a note on an error begins that says which environment it came from."""

_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""


def ignore_interrupts(parent: int) -> None:
    """In any process but ``parent``, leave Ctrl-C to it: it finishes the step and closes the others itself.

    Where it is killed and closes nothing, they end with it (on Linux): the others hold its pipe open, so it would not notice.
    """
    if os.getpid() == parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it was asked for
            os.kill(os.getpid(), signal.SIGKILL)


class Processes(AsyncVectorEnv):
    """Gymnasium's environments in a process each; closing works also when some of them have died or are stuck."""

    def _raise_if_errors(self, successes: Iterable[bool]) -> None:
        """Note on what an environment raised which one it was."""
        done = list(successes)
        try:
            super()._raise_if_errors(done)
        except Exception as error:  # an environment may raise anything
            error.add_note(f"{NOTE}{done.index(False)}")
            raise

    def reset_wait(self, timeout: float | None = None) -> tuple[Any, dict[str, Any]]:
        """Wait until all have started anew."""
        with _without_tracebacks(), self._naming_the_dead():
            return super().reset_wait(timeout)

    def step_wait(self, timeout: float | None = None) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Wait until all have taken their step."""
        with _without_tracebacks(), self._naming_the_dead():
            return super().step_wait(timeout)

    def step_async(self, actions: Any) -> None:
        """Send each its action."""
        with self._naming_the_dead():
            super().step_async(actions)

    @contextmanager
    def _naming_the_dead(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            ended = wait([process.sentinel for process in self.processes], timeout=1.0)
            for index, process in enumerate(self.processes):
                if process.sentinel not in ended:
                    continue
                process.join(timeout=1.0)  # the kernel closes its pipes a moment before it tells how it ended
                if (code := process.exitcode) is not None:
                    error.add_note(f"{NOTE}{index}")
                    error.add_note(f"killed by signal {-code}" if code < 0 else f"left with exit code {code}")
                    break
            raise

    def close_extras(self, timeout: float | None = None, terminate: bool = False) -> None:
        """End all processes, asking nothing of them: they have nothing to save."""
        for process in self.processes:
            process.terminate()
        for pipe in self.parent_pipes:
            if pipe is not None:
                pipe.close()
        for process in self.processes:
            process.join()


@contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Leave out what Gymnasium prints of an error that it raises all the same."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"[\s\S]*ERROR: ", UserWarning)
        yield


class Pool(VectorEnv[Any, Any, Any]):
    """envpool's environments, which take their seed when they are made: each seeded reset makes them anew."""

    def __init__(self, make: Callable[..., Any]) -> None:
        """Wrap ``make(seed=…)``, which makes the whole pool."""
        self._make = make
        self._start(0)

    def _start(self, seed: int) -> None:
        with warnings.catch_warnings():
            # envpool states the bounds of its float32 spaces in float64
            warnings.filterwarnings("ignore", r"[\s\S]*Box (low|high)'s precision lowered", UserWarning)
            pool = self._pool = self._make(seed=seed)
            self.num_envs = int(pool.config["num_envs"])
            self.single_observation_space = pool.single_observation_space
            self.single_action_space = pool.single_action_space
            self.metadata = dict(pool.metadata)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start all environments anew."""
        if seed is not None:
            self._pool.close()
            self._start(seed)
        observations, info = self._pool.reset()
        return observations, info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments."""
        observations, rewards, terminated, truncated, info = self._pool.step(actions)
        return observations, rewards, terminated, truncated, info

    def close_extras(self, **kwargs: Any) -> None:
        """End the threads."""
        self._pool.close()
