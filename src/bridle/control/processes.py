"""Environments in a process each. Which of them died, or hangs, is known, and as often as is allowed it is made anew."""

from __future__ import annotations

import atexit
import ctypes
import math
import multiprocessing
import os
import select
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from gymnasium import Env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space, concatenate, create_empty_array, iterate

from bridle.random import generator

__all__ = ["Gone", "Processes", "Replacement", "close", "set_apart"]

_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of Linux's prctl."""

_LEAVING = 2.0
"""Seconds that an environment has to close itself in, when it is told to."""

_Request = tuple[str, Any]


class Gone(Exception):
    """An environment is no more: its process died, or was ended because its code raised something or did not answer in time."""

    def __init__(self, environment: int, how: str, *, raised: bool) -> None:
        """Say that ``environment`` (counted from 0) "raised KeyError: …" or "died, killed by signal 9"."""
        super().__init__(how)
        self.environment = environment
        self.how = how
        self.raised = raised
        self.allowed: int | None = None
        """How many were allowed to be made anew, and have been; None where it would not help."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replacement:
    """An environment that was gone and was made anew."""

    call: int
    """In which call of ``step`` and ``reset`` since the last seeded reset of all, counted from 1."""
    environment: int
    """Which it is."""
    seed: int
    """What the new one was first reset with."""


class Processes(VectorEnv[Any, Any, Any]):
    """B environments in a process each.

    They leave SIGINT and SIGTERM, which a terminal or a cluster sends to all of a run's processes, to the parent: it
    finishes its step and closes them. Where it is killed and closes nothing, they end with it (on Linux).

    An environment that is gone is made anew ``allowed`` times, and reset from a key: the seed of the last seeded reset, how
    many were made anew since, and which one it is. What it would have answered is lost: after such a call ``lost`` is True
    in its place, its reward is 0, and what it shows is the new one's first observation.
    """

    def __init__(
        self,
        makes: Sequence[Callable[[], Env[Any, Any]]],
        mode: AutoresetMode,
        *,
        allowed: int = 0,
        timeout: float | None = None,
    ) -> None:
        """Start a process for each of ``makes``.

        Args:
            makes: makes one environment each.
            mode: when an environment is reset by itself.
            allowed: how often one that is gone is made anew.
            timeout: [seconds] > 0 that one may take to be made, for a step or for a reset; after them it is ended, and gone.

        Raises:
            Gone: an environment cannot be made.
        """
        self.closed = True  # as long as there is nothing to close
        model = makes[0]()
        self.num_envs = len(makes)
        self.metadata = {**model.metadata, "autoreset_mode": mode}
        self.render_mode = model.render_mode
        self.single_observation_space, self.single_action_space = model.observation_space, model.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        model.close()
        self.lost = np.zeros(self.num_envs, dtype=np.bool_)
        self.replacements: list[Replacement] = []
        """those since the last seeded reset, in their order."""
        self.told: list[str] = []
        """one line for each that was made anew; whoever tells them empties it."""
        self._makes, self._mode = makes, mode
        self._allowed = self._left = allowed
        self._timeout = math.inf if timeout is None else timeout
        self._seed, self._call = 0, 0
        self._expected: dict[tuple[int, int], int] = {}
        self._shown: list[Any] = [None] * self.num_envs
        self._array: Any = create_empty_array(self.single_observation_space, n=self.num_envs, fn=np.zeros)
        self.processes: list[BaseProcess | None] = [None] * self.num_envs
        self._pipes: list[Connection | None] = [None] * self.num_envs
        self._polls = [select.poll() for _ in range(self.num_envs)]
        self._parent = os.getpid()
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)  # before multiprocessing waits for them, who do not hear its SIGTERM
        self.closed = False
        try:
            for index in range(self.num_envs):
                self._start(index)
            spaces = (self.single_observation_space, self.single_action_space)
            if not all(self._ask([("spaces", spaces)] * self.num_envs)):
                raise ValueError("its copies differ in their spaces")
        except BaseException:
            self.close()
            raise

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Start all environments anew, or those of ``options["reset_mask"]`` [B]; with ``seed`` from seed, seed + 1, …

        Raises:
            Gone: one is gone, and may not be made anew.
        """
        chosen = np.ones(self.num_envs, dtype=np.bool_) if options is None else options["reset_mask"]
        if seed is not None:
            self._seed, self._call, self.replacements, self._expected = seed, 0, [], {}
        requests = [("reset", None if seed is None else seed + i) if chosen[i] else None for i in range(self.num_envs)]
        info: dict[str, Any] = {}
        for index, answer in enumerate(self._ask(requests)):
            if answer is not None:
                self._shown[index], own = answer
                info = self._add_info(info, own, index)
        return self._observations(), info

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Step all environments.

        Raises:
            Gone: one is gone, and may not be made anew.
        """
        answers = self._ask([("step", action) for action in iterate(self.action_space, actions)])
        rewards = np.zeros(self.num_envs)
        terminated, truncated = (np.zeros(self.num_envs, dtype=np.bool_) for _ in range(2))
        info: dict[str, Any] = {}
        for index, answer in enumerate(answers):
            if self.lost[index]:
                self._shown[index], own = answer
            else:
                self._shown[index], rewards[index], terminated[index], truncated[index], own = answer
            info = self._add_info(info, own, index)
        return self._observations(), rewards, terminated, truncated, info

    def expect(self, replacements: Sequence[Replacement]) -> None:
        """After a seeded reset: make the environments anew where they were before, whether or not they would be gone again."""
        self.replacements = list(replacements)
        self._expected = {(one.call, one.environment): one.seed for one in replacements}

    def close_extras(self, **_: Any) -> None:
        """Let every environment close itself, and end those that do not."""
        if os.getpid() != self._parent:  # a process forked later shares the pipes
            return
        atexit.unregister(self._at_exit)
        for pipe in self._pipes:
            if pipe is not None:
                with suppress(OSError):
                    pipe.send(("close", None))
        ending = [process for process in self.processes if process is not None]
        waiting: list[Any] = [process.sentinel for process in ending]
        deadline = time.monotonic() + _LEAVING
        while waiting and (left := deadline - time.monotonic()) > 0:
            for ended in wait(waiting, timeout=left):
                waiting.remove(ended)
        for process in ending:
            process.kill()
            process.join()
        for pipe in self._pipes:
            if pipe is not None:
                pipe.close()

    def _observations(self) -> Any:
        return concatenate(self.single_observation_space, self._shown, self._array)

    def _ask(self, requests: Sequence[_Request | None]) -> list[Any]:
        """Send each environment its request, if there is one, and return what each answers."""
        self._call += 1
        self.lost[:] = False
        anew = [self._expected.get((self._call, index)) for index in range(self.num_envs)]
        for pipe, request, seed in zip(self._pipes, requests, anew, strict=True):
            if pipe is not None and request is not None and seed is None:
                with suppress(OSError):  # what became of it is heard when it is listened to
                    pipe.send(request)
        until = time.monotonic() + self._timeout
        return [self._answer(index, request, anew[index], until) for index, request in enumerate(requests)]

    def _answer(self, index: int, request: _Request | None, seed: int | None, until: float) -> Any:
        if request is None:
            return None
        try:
            if seed is None:
                return self._listen(index, until)
            self.lost[index] = True
            return self._begin_again(index, seed)
        except Gone as gone:
            return self._replace(index, request, gone)

    def _replace(self, index: int, request: _Request, gone: Gone) -> Any:
        """Make an environment anew as often as it takes; return what its reset answers."""
        command, data = request
        while True:
            if command == "spaces":
                raise gone
            if self._left == 0:
                gone.allowed = self._allowed
                raise gone
            self._left -= 1
            if command == "reset" and data is not None:
                seed = data  # it loses nothing, and shows what it would have shown
            else:
                key = (self._seed, "environment made anew", len(self.replacements), index)
                seed = int(generator(*key).integers(2**31))
                self.replacements.append(Replacement(call=self._call, environment=index, seed=seed))
            self.told.append(
                f"environment {index} {gone.how}; made anew ({self._allowed - self._left} of at most {self._allowed})"
            )
            self.lost[index] = True
            try:
                return self._begin_again(index, seed)
            except Gone as again:
                gone = again

    def _begin_again(self, index: int, seed: int) -> Any:
        self._start(index)
        pipe = self._pipes[index]
        assert pipe is not None
        with suppress(OSError):
            pipe.send(("reset", seed))
        return self._listen(index, time.monotonic() + self._timeout)

    def _listen(self, index: int, until: float) -> Any:
        """Return an environment's answer; raises :class:`Gone`, also where none has come by the time ``until``."""
        pipe, process = self._pipes[index], self.processes[index]
        assert pipe is not None
        assert process is not None
        if until < math.inf and not self._polls[index].poll(1000 * max(0.0, until - time.monotonic())):
            process.kill()  # nothing else ends one that hangs
            process.join()
            raise Gone(index, f"did not answer within {self._timeout:g} s", raised=False)
        try:
            fine, answer = pipe.recv()
        except (EOFError, OSError):
            process.join(timeout=1.0)  # the kernel closes its pipe a moment before it tells how it ended
            code = process.exitcode
            said = (
                "" if code is None else f", killed by signal {-code}" if code < 0 else f", left with exit code {code}"
            )
            raise Gone(index, f"died{said}", raised=False) from None
        if not fine:
            raise Gone(index, f"raised {answer}", raised=True)
        return answer

    def _start(self, index: int) -> None:
        """Start an environment's process, in place of the one before."""
        process, pipe = self.processes[index], self._pipes[index]
        if process is not None and pipe is not None:
            process.kill()
            process.join()
            self._polls[index].unregister(pipe)
            pipe.close()
        context = multiprocessing.get_context()
        own, theirs = context.Pipe()
        arguments = (CloudpickleWrapper(self._makes[index]), self._mode, theirs, own, os.getpid())
        process = context.Process(target=_serve, args=arguments, name=f"environment {index}", daemon=True)
        with _signals_waiting():
            process.start()
        theirs.close()
        self.processes[index], self._pipes[index] = process, own
        self._polls[index].register(own, select.POLLIN)


def _close(processes: weakref.ref[Processes]) -> None:
    if (own := processes()) is not None:
        own.close()


def set_apart(envs: VectorEnv[Any, Any, Any]) -> None:
    """Move the processes of Gymnasium's own form to groups of their own, so that what is sent to the run's does not end them.

    Only those that were forked can be moved.
    """
    if sys.platform == "win32" or not isinstance(envs.unwrapped, AsyncVectorEnv):
        return
    for process in envs.unwrapped.processes:
        assert process.pid is not None
        with suppress(PermissionError, ProcessLookupError):
            os.setpgid(process.pid, process.pid)


def close(envs: VectorEnv[Any, Any, Any]) -> None:
    """Close any vector environment; Gymnasium's own form with processes also where some of them have died."""
    try:
        envs.close()
    except (EOFError, OSError):
        if not isinstance(envs.unwrapped, AsyncVectorEnv):
            raise
        for process in envs.unwrapped.processes:
            process.kill()
            process.join()
        envs.unwrapped.closed = True  # or it would try again when it is collected


@contextmanager
def _signals_waiting() -> Iterator[None]:
    """Let no signal in, so that a new process hears none before it has said what it does with them."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _settle(parent: int) -> None:
    """In an environment's process: leave signals to the parent, and end where it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)  # not SIG_IGN: what the environment starts can be ended by it
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:  # it died before it was asked for
            os.kill(os.getpid(), signal.SIGKILL)


def _serve(
    make: Callable[[], Env[Any, Any]], mode: AutoresetMode, pipe: Connection, other: Connection, parent: int
) -> None:
    """Be an environment: answer (True, …) to each request; the first time something is raised (False, what) and leave."""
    _settle(parent)
    other.close()
    env: Env[Any, Any] | None = None
    over = used = False
    try:
        env = make()
        while True:
            command, data = pipe.recv()
            if command == "close":
                break
            answer: Any
            if command == "spaces":
                answer = data == (env.observation_space, env.action_space)
            elif command == "reset" or (over and mode is AutoresetMode.NEXT_STEP):
                if used and command == "reset" and data is not None:  # see World.reset
                    env.close()
                    env = make()
                used = True
                shown, info = env.reset(seed=data if command == "reset" else None)
                answer = (shown, info) if command == "reset" else (shown, 0.0, False, False, info)
                over = False
            else:
                answer = _step(env, data, mode)
                over = bool(answer[2] or answer[3])
            pipe.send((True, answer))
    except EOFError:
        pass  # nobody asks any more
    except Exception as error:  # an environment may raise anything
        pipe.send((False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
    finally:
        if env is not None:
            with suppress(Exception):  # the same holds for its end, which nobody listens to
                env.close()


def _step(env: Env[Any, Any], action: Any, mode: AutoresetMode) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    shown, reward, terminated, truncated, info = env.step(action)
    if mode is AutoresetMode.SAME_STEP and (terminated or truncated):
        last = {"final_obs": deepcopy(shown), "final_info": info}  # some show the same array all their life
        shown, begun = env.reset()
        info = {**last, **begun}
    return shown, reward, terminated, truncated, info
