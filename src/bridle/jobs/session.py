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
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self, cast

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bridle.errors import ConfigError, RunError, UserError
from bridle.jobs.config import to_dict
from bridle.jobs.progress import Progress, progress_on
from bridle.learn.memory import MicroBudget
from bridle.runs import Checkpoint, Run
from bridle.runs.depends import Sources, differences, take_stock
from bridle.runs.files import Json
from bridle.runs.invariants import Watch
from bridle.runs.trackers import TrackerName, open_trackers

__all__ = ["RunSettings", "Session", "Stopped", "open_session", "resolve_device"]

_MAY_CHANGE = {
    "run": (
        *("dir", "trackers", "quiet", "checkpoint_every", "checkpoint_minutes"),
        *("keep_checkpoints", "keep_every", "keep_best"),
        *("on_fault", "fault_limit"),
        *("device", "threads"),  # what they come to is compared, with the rest of the machine
    ),
    "world": ("on_death", "death_limit"),
}
"""Settings that change no number of a run that goes well, by their groups."""


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
    """Precision of the forward passes, and of the layers' weights; what is trained and saved is float32."""
    threads: int | None = None
    """1 to 1024, threads of one tensor operation; None leaves PyTorch's choice."""
    checkpoint_every: int | None = None
    """≥ 1 steps between checkpoints, besides those by the clock; None leaves it to the clock. The last step is always
    saved. Saving changes nothing in a run, so this may differ in a resumed one."""
    checkpoint_minutes: float = 8.0
    """> 0 minutes after a checkpoint at which the next finished step is saved: with that step, what a crash can cost."""
    keep_checkpoints: int = 2
    """≥ 1, how many of the newest checkpoints stay."""
    keep_every: int | None = None
    """≥ 1 steps: checkpoints at its multiples stay too."""
    keep_best: str | None = None
    """Name of a metric: the checkpoint at whose step it was highest stays too; with a - before the name, lowest."""
    trackers: tuple[TrackerName, ...] = ()
    """Who gets a copy of the metrics besides metrics.jsonl."""
    quiet: bool = False
    """Print nothing while it works."""
    on_fault: Literal["stop", "skip"] = "stop"
    """What follows a loss, gradient, value or log-probability that is not finite, or such a reward or observation of an
    environment. The step is not applied and its evidence is kept either way."""
    fault_limit: int = 3
    """≥ 0, steps in a row that may be skipped; the next one stops the run."""

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name in ("checkpoint_every", "keep_checkpoints", "keep_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(f"run.{name}", value, "a whole number of at least 1")
        if not self.checkpoint_minutes > 0:
            raise ConfigError.of("run.checkpoint_minutes", self.checkpoint_minutes, "a number of minutes > 0")
        if self.keep_best is not None and not self.keep_best.removeprefix("-"):
            raise ConfigError.of(
                "run.keep_best", self.keep_best, "the name of a metric", "evaluation/score, for instance"
            )
        if self.threads is not None and not 1 <= self.threads <= 1024:  # PyTorch dies of many more
            raise ConfigError.of(
                "run.threads", self.threads, "a whole number from 1 to 1024", "the number of cores is usual"
            )
        if self.fault_limit < 0:
            raise ConfigError.of("run.fault_limit", self.fault_limit, "a number of steps >= 0")
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
        self,
        run: Run,
        settings: RunSettings,
        *,
        device: torch.device,
        checkpoint: Checkpoint | None,
        console: Console,
        resumed: bool,
        force: bool,
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
        self.force = force
        """whether to go on where the same run to the bit cannot be had."""
        self.stopping = False
        """True once a signal asked the job to stop; :meth:`end_step` sees to it."""
        self._settings = settings
        self._console = console
        self._trackers = open_trackers(
            settings.trackers, run.path, job=run.job, config=run.config, after_step=self.start if checkpoint else -1
        )
        self._resumed = resumed
        self._saved_at = time.monotonic()
        self._best: dict[int, float] = {}
        self._doubted = False
        for row in run.metrics() if settings.keep_best is not None else ():
            self._note_best(cast("int", row["step"]), row)
        self._restore = ExitStack()
        self._watch = _watch(run, settings)
        events = (event for event in run.events() if event.get("kind") == "invariant")
        self._told = {(event.get("invariant"), event.get("step"), event.get("crossed")) for event in events}

    def __enter__(self) -> Self:
        """Set threads and deterministic algorithms, and listen for SIGINT and SIGTERM (in the main thread only)."""
        self._set_flags()
        if threading.current_thread() is threading.main_thread():
            self._listen()
        kind, text = ("resume", f"resumed after step {self.start}") if self._resumed else ("start", "started")
        self.run.event(kind, text, step=self.start, device=str(self.device), threads=torch.get_num_threads())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Note how it ended, put every global setting back, and close the run; a user's mistake leaves no empty run."""
        self._restore.close()
        try:
            for tracker in self._trackers:
                tracker.close()
            if kind is None:
                self.run.event("finish", "finished")
            elif issubclass(kind, Stopped):
                self.run.event("stop", str(error))
            else:
                self.run.event("fail", f"{kind.__name__}: {error}")
        except RunError:
            if kind is None:  # otherwise what went wrong first is what is to be said
                raise
        finally:
            if isinstance(error, UserError) and not self._resumed:
                self.run.discard()
            self.run.close()

    def steps(self, last: int) -> range:
        """Steps still to do: from the one after the checkpoint to ``last``, counted from 1."""
        return range(self.start + 1, last + 1)

    def record(self, step: int, metrics: Mapping[str, float | int | str | bool | None]) -> None:
        """Write one record to metrics.jsonl and to the trackers, and say which invariant it crossed."""
        self.run.record(step, metrics)
        self._note_best(step, metrics)
        for tracker in self._trackers:
            tracker.log(step, metrics)
        for found in self._watch.see(step, metrics):
            name = found.invariant.name
            if (name, step, found.crossed) in self._told:  # by the run before it was taken up again
                continue
            fields: dict[str, Json] = {"step": step, "invariant": name, "crossed": found.crossed, "value": found.value}
            self.run.event("invariant", found.text, **fields)
            self.say(found.text)

    @property
    def settings(self) -> RunSettings:
        """Where the run lies and what it runs on."""
        return self._settings

    def skipped_before(self, step: int) -> int:
        """Count the steps right before ``step`` that were skipped, one after the other."""
        skipped = {row["step"] for row in self.run.metrics() if row.get("skipped")}
        count = 0
        while step - 1 - count in skipped:
            count += 1
        return count

    def micro_budget(self, tokens: int | None) -> MicroBudget:
        """Return what a forward pass may hold: as set, or what an earlier life of the run was left with by its checkpoint."""
        for event in self.run.events():
            step, left = event.get("step"), event.get("tokens")
            if event.get("kind") == "memory" and isinstance(step, int) and isinstance(left, int) and step <= self.start:
                tokens = left
        return MicroBudget(tokens)

    def tell_memory(self, step: int, budget: MicroBudget) -> None:
        """Keep it as events where memory ran out, and say so."""
        for text in budget.halvings:
            self.run.event("memory", f"step {step}: {text}", step=step, tokens=budget.tokens)
            self.say(f"step {step}: {text}")
        budget.halvings.clear()

    def leave_out(self, invariant: str) -> None:
        """Stop watching an invariant that makes no sense in this run."""
        self._watch.leave_out(invariant)

    def end_step(self, step: int, *, last: int, save: Callable[[Path], object]) -> None:
        """Save a checkpoint if one is due: by steps, by the clock, at ``last``, or when asked to stop.

        ``save`` writes into the folder it is given. Raises :class:`Stopped` after saving if a signal asked for it and
        steps are left.
        """
        stopping = self.stopping and step < last
        every = self._settings.checkpoint_every
        late = time.monotonic() - self._saved_at >= 60 * self._settings.checkpoint_minutes
        if not (stopping or late or step == last or (every is not None and step % every == 0)):
            return
        with self.run.checkpoint(step) as folder:
            save(folder)
        self._saved_at = time.monotonic()
        self.prune()
        self._doubt_best(step)
        if stopping:
            raise Stopped(f"stopped after step {step}; go on with: bridle resume {self.run.path}")

    def prune(self) -> None:
        """Remove the checkpoints that need not stay."""
        self.run.prune(self._settings.keep_checkpoints, keep=self._kept())

    def _note_best(self, step: int, metrics: Mapping[str, Json]) -> None:
        """Remember the metric that ``keep_best`` names, turned so that higher is better."""
        name = self._settings.keep_best
        value = None if name is None else metrics.get(name.removeprefix("-"))
        if name is not None and isinstance(value, int | float) and not math.isnan(value):
            self._best[step] = -float(value) if name.startswith("-") else float(value)

    def _doubt_best(self, step: int) -> None:
        """Say once, after a checkpoint, that nothing was recorded by the name in ``keep_best``: it may be misspelt."""
        if self._settings.keep_best is None or self._best or self._doubted:
            return
        self._doubted = True
        name = self._settings.keep_best.removeprefix("-")
        names = sorted({recorded for row in self.run.metrics() for recorded in row} - {"step"})
        near = get_close_matches(name, names, 1)
        text = f"run.keep_best: no number {name!r} was recorded up to step {step}" + (
            f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"
        )
        self.run.event("keep_best", text, step=step)
        self.say(text)

    def _kept(self) -> set[int]:
        """Steps whose checkpoints stay besides the newest."""
        steps = [checkpoint.step for checkpoint in self.run.checkpoints()]
        every = self._settings.keep_every
        kept = set() if every is None else {step for step in steps if step % every == 0}
        judged = [step for step in steps if step in self._best]
        return kept | ({max(judged, key=lambda step: (self._best[step], step))} if judged else set())

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


class _Console(Console):
    """Falls silent where nobody reads any longer, as when Ctrl-C has ended what the lines were piped into."""

    def on_broken_pipe(self) -> None:
        """Go on without a word: rich would leave the process, and the step would be neither finished nor saved."""
        self.quiet = True


def open_session(
    job: str,
    config: Any,
    settings: RunSettings,
    *,
    sources: Sources | None = None,
    resume: bool = False,
    force: bool = False,
) -> Session:
    """Make the run at ``settings.dir``, or open it to go on from its newest whole checkpoint.

    Load and check everything that can be wrong with the user's input before this call.

    Args:
        job: its name.
        config: its settings, with ``settings`` among them.
        settings: where the run lies and what it runs on.
        sources: what it reads besides.
        resume: go on with the run that lies there.
        force: do so also where it cannot be the same run to the bit, and record why.

    Raises:
        RunError: the directory is taken, or is no run of this job; or settings, code, machine or a file are not those
            that the run was started with; or none of its checkpoints is whole.
        ConfigError: the device or a tracker is not to be had.
    """
    device = resolve_device(settings.device)
    console = _Console(stderr=True, quiet=settings.quiet)
    threads = settings.threads or torch.get_num_threads()
    named = "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
    depends = take_stock(sources or Sources(files={}), device=named, threads=threads)
    asked = to_dict(config)
    resolved = {**asked, "run": to_dict(settings) | {"device": device.type, "threads": threads}}
    checkpoint = None
    if not resume:
        run = Run.create(settings.dir, job, asked, resolved=resolved, depends=depends)
    else:
        run = Run.open(settings.dir, write=True)
    try:
        if resume:
            changes = _changes(run, job, asked, resolved, depends, force=force)
            checkpoint = _go_back(run, console, force=force)
            if changes:
                run.go_on_as(asked, resolved, depends, changes)
                text = "forced: from here on another run than it was, because " + "; ".join(changes)
                run.event("forced", text, changes=changes)
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        session = Session(
            run, settings, device=device, checkpoint=checkpoint, console=console, resumed=resume, force=force
        )
        if checkpoint is not None:
            session.prune()  # a run that died between its last checkpoint and this has no other to do it after
        return session
    except BaseException as error:
        if isinstance(error, UserError) and not resume:
            run.discard()
        run.close()
        raise


def _watch(run: Run, settings: RunSettings) -> Watch:
    """Watch a run as it would be watched had it never stopped: by the records that are there."""
    critic = run.config.get("critic")
    warmup = critic.get("warmup_steps") if isinstance(critic, Mapping) else 0
    watch = Watch(run.job, dtype=settings.dtype, warmup=warmup if isinstance(warmup, int) else 0)
    for row in run.metrics():
        step = row["step"]
        assert isinstance(step, int)
        watch.see(step, row)
    return watch


def _go_back(run: Run, console: Console, *, force: bool) -> Checkpoint | None:
    """Find where the run can be taken up, and forget what was recorded after it; None is the beginning."""
    checkpoint = run.latest_checkpoint()
    start = 0 if checkpoint is None else checkpoint.step
    damaged = [f"step-{other.step}" for other in run.checkpoints() if other.step > start]
    if damaged and checkpoint is None and not force:
        raise RunError(
            f"{run.path}: no checkpoint is whole ({', '.join(damaged)} damaged); "
            f"put one back, or begin again with: bridle resume {run.path} --force"
        )
    if damaged:
        text = f"damaged, moved to {run.path / 'faults'}: {', '.join(damaged)}; going on after step {start}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    run.rewind(-1 if checkpoint is None else start)
    return checkpoint


def _changes(
    run: Run,
    job: str,
    asked: Mapping[str, Json],
    resolved: Mapping[str, Json],
    depends: Mapping[str, Json],
    *,
    force: bool,
) -> list[str]:
    """Refuse to go on as another run, naming what differs; with ``force`` return it.

    Also where config.json was edited: what is resolved there must agree with what was asked for.
    """
    if run.job != job:
        raise RunError(f"{run.path} is a run of {run.job}, not of {job}; use `bridle resume {run.path}`")
    kept = (_essential(run.config), _essential(run.resolved))
    changed = next(filter(None, (_first_difference(old, _essential(asked), "") for old in kept)), None)
    found = differences(run.depends, depends)
    forced = f"`bridle resume {run.path} --force`"
    if not force and found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise RunError(
            f"{found[0]} when {run.path} was started{more}, so it would not go on as the same run to the bit; "
            f"{found[0].remedy}, or {forced}"
        )
    if not force and changed is not None:
        raise RunError(
            f"{changed} is not what {run.path} was started with; "
            f"resume with its own settings or start a new run, or {forced}"
        )
    return [*([] if changed is None else [f"{changed} is another setting"]), *map(str, found)]


def _essential(config: Mapping[str, Json]) -> Mapping[str, Json]:
    groups = {name: group for name in _MAY_CHANGE if isinstance(group := config.get(name), Mapping)}
    return {
        **config,
        **{
            of: {name: value for name, value in group.items() if name not in _MAY_CHANGE[of]}
            for of, group in groups.items()
        },
    }


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
