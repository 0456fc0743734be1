"""What every job needs around its loop: the run, the device, progress, checkpoints when due, a clean way to stop.

with open_session("ppo", config, config.run, resume=resume) as session:
    state = … restore from session.checkpoint, if there is one …
    with session.progress(config.steps, "ppo", start=session.start) as progress:
        for step in session.steps(config.steps):
            …
            session.record(step, metrics)
            progress.advance(reward=…, kl=…)
            session.end_step(step, last=config.steps, save=lambda folder: …)
    with session.run.export("policy") as folder: …
"""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bridle.errors import ConfigError, RunError, UserError
from bridle.jobs.config import to_dict
from bridle.jobs.progress import Progress, progress_on
from bridle.runs import Checkpoint, Run
from bridle.runs.files import Json
from bridle.runs.trackers import TrackerName, open_trackers

__all__ = ["RunSettings", "Session", "Stopped", "open_session", "resolve_device"]

_MAY_CHANGE = ("dir", "device", "threads", "checkpoint_every", "keep_checkpoints", "trackers", "quiet")


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
    """Precision of the forward passes; weights are mastered in float32."""
    threads: int | None = None
    """1 to 1024, threads of one tensor operation; None leaves PyTorch's choice."""
    checkpoint_every: int = 50
    """≥ 1 steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = 2
    """≥ 1, how many of the newest checkpoints stay."""
    trackers: tuple[TrackerName, ...] = ()
    """Who gets a copy of the metrics besides metrics.jsonl."""
    quiet: bool = False
    """Print nothing while it works."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name in ("checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError.of(f"run.{name}", getattr(self, name), "a whole number of at least 1")
        if self.threads is not None and not 1 <= self.threads <= 1024:  # PyTorch dies of many more
            raise ConfigError.of(
                "run.threads", self.threads, "a whole number from 1 to 1024", "the number of cores is usual"
            )
        if self.seed < 0:
            raise ConfigError.of("run.seed", self.seed, "a whole number of at least 0")


class Stopped(KeyboardInterrupt):
    """Asked to stop: the step was finished and saved, and the run can be resumed."""


def resolve_device(name: str) -> torch.device:
    """Return the device that a setting names; raises :class:`ConfigError` where there is no such one."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise ConfigError.of("run.device", name, "a GPU that PyTorch can use", "pass --run.device cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first product: deterministic only with it
    return torch.device("cuda" if name != "cpu" and available else "cpu")


class Session:
    """The surroundings of one job while it works; make it with :func:`open_session`, use it in a ``with`` block."""

    def __init__(
        self, run: Run, settings: RunSettings, *, device: torch.device, checkpoint: Checkpoint | None, console: Console
    ) -> None:
        """Use :func:`open_session`."""
        self.run = run
        """the run's directory, open for writing."""
        self.device = device
        """where the tensors live."""
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        """precision of the forward passes."""
        self.seed = settings.seed
        """the key of every random draw."""
        self.checkpoint = checkpoint
        """what to go on from; None at the beginning."""
        self.start = 0 if checkpoint is None else checkpoint.step
        """[steps] how many steps are already done."""
        self.stopping = False
        """True once a signal asked the job to stop; :meth:`end_step` sees to it."""
        self._settings = settings
        self._console = console
        self._trackers = open_trackers(
            settings.trackers, run.path, job=run.job, config=run.config, after_step=self.start if checkpoint else -1
        )
        self._restore = ExitStack()

    def __enter__(self) -> Self:
        """Set threads and deterministic algorithms, and listen for SIGINT and SIGTERM (in the main thread only)."""
        self._set_flags()
        if threading.current_thread() is threading.main_thread():
            self._listen()
        resumed = self.checkpoint is not None or bool(self.run.events())
        kind, text = ("resume", f"resumed after step {self.start}") if resumed else ("start", "started")
        self.run.event(kind, text, step=self.start, device=str(self.device), threads=torch.get_num_threads())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Note how it ended, put every global setting back, and close the run; a user's mistake leaves no empty run."""
        self._restore.close()
        for tracker in self._trackers:
            tracker.close()
        if kind is None:
            self.run.event("finish", "finished")
        elif issubclass(kind, Stopped):
            self.run.event("stop", str(error))
        else:
            self.run.event("fail", f"{kind.__name__}: {error}")
        if isinstance(error, UserError):
            self.run.discard()
        self.run.close()

    def steps(self, last: int) -> range:
        """Steps still to do: from the one after the checkpoint to ``last``, counted from 1."""
        return range(self.start + 1, last + 1)

    def record(self, step: int, metrics: Mapping[str, float | int | str | bool | None]) -> None:
        """Write one record to metrics.jsonl and to the trackers."""
        self.run.record(step, metrics)
        for tracker in self._trackers:
            tracker.log(step, metrics)

    def end_step(self, step: int, *, last: int, save: Callable[[Path], object]) -> None:
        """Save a checkpoint if one is due (every ``checkpoint_every``, at ``last``, or when asked to stop).

        ``save`` writes into the folder it is given. Raises :class:`Stopped` after saving if a signal asked for it and
        steps are left.
        """
        stopping = self.stopping and step < last
        if not (stopping or step == last or step % self._settings.checkpoint_every == 0):
            return
        with self.run.checkpoint(step) as folder:
            save(folder)
        self.run.prune(self._settings.keep_checkpoints)
        if stopping:
            raise Stopped(f"stopped after step {step}; go on with: bridle resume {self.run.path}")

    @contextmanager
    def progress(self, total: int, description: str, *, start: int = 0) -> Iterator[Progress]:
        """Show how far ``total`` steps have come: a bar on a terminal, plain lines elsewhere, nothing when quiet."""
        with progress_on(self._console, total, description, start=start) as progress:
            yield progress

    def say(self, text: str) -> None:
        """Print one line, unless quiet."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _set_flags(self) -> None:
        if self._settings.threads is not None:
            self._restore.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(self._settings.threads)
            self._restore.enter_context(threadpool_limits(self._settings.threads, user_api="blas"))  # NumPy's
        # says the same as torch.use_deterministic_algorithms, which imports the compiler: seconds at each start
        self._restore.callback(torch.set_deterministic_debug_mode, torch.get_deterministic_debug_mode())
        module: Any = torch.utils.deterministic
        self._restore.callback(setattr, module, "fill_uninitialized_memory", module.fill_uninitialized_memory)
        module.fill_uninitialized_memory = False  # it would fill every torch.empty, for nothing
        torch.set_deterministic_debug_mode("error" if self.device.type == "cpu" else "warn")
        # what was imported is here to stay: a twentieth of a small agent's time went into looking for garbage in it
        self._restore.callback(gc.unfreeze)
        gc.freeze()

    def _listen(self) -> None:
        def ask(number: int, _: FrameType | None) -> None:
            if self.stopping:
                raise KeyboardInterrupt
            self.stopping = True
            self._console.print("stopping after this step; once more to stop now", highlight=False)

        for number in (signal.SIGINT, signal.SIGTERM):
            self._restore.callback(signal.signal, number, signal.signal(number, ask))


def open_session(job: str, config: Any, settings: RunSettings, *, resume: bool = False) -> Session:
    """Make the run at ``settings.dir``, or open it to go on from its newest whole checkpoint.

    Load and check everything that can be wrong with the user's input before this call. Raises :class:`RunError` where
    the directory is taken, is no run of this job, or was made with other settings; :class:`ConfigError` where the
    device or a tracker is not to be had.
    """
    device = resolve_device(settings.device)
    written = to_dict(config)
    console = Console(stderr=True, quiet=settings.quiet)
    if not resume:
        chosen: dict[str, Json] = {"device": device.type, "threads": settings.threads or torch.get_num_threads()}
        run = Run.create(settings.dir, job, written, resolved={**written, "run": to_dict(settings) | chosen})
        checkpoint = None
    else:
        run = Run.open(settings.dir, write=True)
        _same_settings(run, job, written)
        checkpoint = run.latest_checkpoint()
        start = 0 if checkpoint is None else checkpoint.step
        damaged = [f"step-{other.step}" for other in run.checkpoints() if other.step > start]
        if damaged:
            text = f"damaged, moved to {run.path / 'faults'}: {', '.join(damaged)}; going on after step {start}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        run.rewind(-1 if checkpoint is None else start)
    try:
        return Session(run, settings, device=device, checkpoint=checkpoint, console=console)
    except UserError:
        run.discard()
        run.close()
        raise


def _same_settings(run: Run, job: str, written: Mapping[str, Json]) -> None:
    """Refuse other settings than the run's, also where config.json was edited: what is resolved there must agree."""
    if run.job != job:
        run.close()
        raise RunError(f"{run.path} is a run of {run.job}, not of {job}; use `bridle resume {run.path}`")
    kept = (_essential(run.config), _essential(run.resolved))
    changed = next(filter(None, (_first_difference(old, _essential(written), "") for old in kept)), None)
    if changed is not None:
        run.close()
        raise RunError(
            f"{changed} is not what {run.path} was started with; resume with its own settings or start a new run"
        )


def _essential(config: Mapping[str, Json]) -> Mapping[str, Json]:
    run = config.get("run")
    if not isinstance(run, Mapping):
        return config
    return {**config, "run": {name: value for name, value in run.items() if name not in _MAY_CHANGE}}


def _first_difference(old: Mapping[str, Json], new: Mapping[str, Json], prefix: str) -> str | None:
    for name in [*new, *(key for key in old if key not in new)]:
        left, right = old.get(name), new.get(name)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            inner = _first_difference(left, right, f"{prefix}{name}.")
            if inner is not None:
                return inner
        elif left != right:
            return f"{prefix}{name}={right!r}"
    return None
