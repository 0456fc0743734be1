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
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self, cast

import torch
from rich.console import Console
from threadpoolctl import threadpool_limits

from bridle.errors import RunError, TrainingError, UserError
from bridle.jobs.config import to_dict
from bridle.jobs.progress import Progress, progress_on
from bridle.jobs.settings import RunSettings, resolve_device
from bridle.jobs.taking_up import changed_records, changed_settings, changed_surroundings, chosen_anew, newest_whole
from bridle.learn.memory import MicroBudget, RowBudget
from bridle.runs import Checkpoint, Reserved, Run, reserve
from bridle.runs.depends import Sources, take_stock
from bridle.runs.files import Json
from bridle.runs.invariants import Watch
from bridle.runs.trackers import open_trackers, require_trackers

__all__ = ["Place", "RunSettings", "Session", "Stopped", "hold_place", "open_session", "resolve_device"]


class Stopped(KeyboardInterrupt):
    """Asked to stop: the step was finished and saved, and the run can be resumed."""


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
            elif issubclass(kind, KeyboardInterrupt):
                self.run.event("interrupt", "stopped at once: what came after the newest checkpoint is lost")
            else:
                self.run.event("fail", f"{kind.__name__}: {error}")
        except RunError:
            if kind is None:  # otherwise what went wrong first is what is to be said
                raise
        finally:
            if isinstance(error, UserError) and not self._resumed:
                self.run.discard()
            self.run.close()
        if isinstance(error, torch.OutOfMemoryError):  # where nothing is halved: a judge, a copy of the weights
            text = " ".join(str(error).split(". ")[0].split())
            raise TrainingError(f"out of memory: {text}; ask for less at once, or take a smaller model") from error

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
        return MicroBudget(self._left("tokens", tokens))

    def row_budget(self, rows: int) -> RowBudget:
        """The same of how many answers may be under way at once."""
        return RowBudget(self._left("rows", rows) or rows)

    def take_up_budget(self, budget: MicroBudget) -> MicroBudget:
        """Leave a budget that was there before the session what it was left with; return it."""
        budget.tokens = self._left(budget.name, budget.tokens)
        return budget

    def _left(self, name: str, value: int | None) -> int | None:
        for event in self.run.events():
            step, left = event.get("step"), event.get(name)
            if event.get("kind") == "memory" and isinstance(step, int) and isinstance(left, int) and step <= self.start:
                value = left
        return value

    def tell_memory(self, step: int, *budgets: MicroBudget | RowBudget) -> None:
        """Keep it as events where memory ran out, and say so."""
        for budget in budgets:
            left = {budget.name: budget.tokens} if isinstance(budget, MicroBudget) else {"rows": budget.rows}
            for text in budget.halvings:
                self.run.event("memory", f"step {step}: {text}", step=step, **left)
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
                raise KeyboardInterrupt(f"stopped at once; go on with: bridle resume {self.run.path}")
            self.stopping = True
            self._console.print("stopping after this step; once more to stop now", highlight=False)

        for number in (signal.SIGINT, signal.SIGTERM):
            self._restore.callback(signal.signal, number, signal.signal(number, ask))


class _Console(Console):
    """Falls silent where nobody reads any longer, as when Ctrl-C has ended what the lines were piped into."""

    def on_broken_pipe(self) -> None:
        """Go on without a word: rich would leave the process, and the step would be neither finished nor saved."""
        self.quiet = True


class Place:
    """A run's directory, held while what the job reads is opened; make it with :func:`hold_place`."""

    def __init__(
        self,
        job: str,
        settings: RunSettings,
        held: Reserved | Run,
        *,
        device: torch.device,
        sources: Callable[[], Sources] | None,
        force: bool,
    ) -> None:
        """Use :func:`hold_place`."""
        self.device = device
        """where the tensors will live."""
        self._job = job
        self._settings = settings
        self._held: Reserved | Run | None = held
        self._sources = sources
        self._force = force
        self._threads = settings.threads or torch.get_num_threads()
        self._digests: dict[str, Json] = {}
        self._newest: tuple[Checkpoint | None, list[str]] = (None, [])
        self._lacking: list[str] = []

    def check(self, run: Run, config: Any | None) -> None:
        """Refuse to take up a run, as far as can be told before anything else is opened."""
        if run.job != self._job:
            raise RunError(f"{run.path} is a run of {run.job}, not of {self._job}; use `bridle resume {run.path}`")
        changed_surroundings(run, self._stock(), force=self._force, so_far=True)
        if config is not None:
            changed_settings(run, to_dict(config), force=self._force)
        self._newest = newest_whole(run, force=self._force)
        self._lacking = changed_records(run, self._newest[0], force=self._force)

    def session(self, config: Any, sources: Sources | None = None) -> Session:
        """Begin, now that everything is open: write config.json, or go back to where the run is taken up.

        ``sources`` is what the job reads, where that is known only now. Raises :class:`RunError` as :func:`hold_place`.
        """
        assert self._held is not None, "a place becomes one session"
        if sources is not None:
            self._sources = lambda: sources
        depends, asked = self._stock(), to_dict(config)
        resolved = {**asked, "run": to_dict(self._settings) | {"device": self.device.type, "threads": self._threads}}
        console, resumed = _Console(stderr=True, quiet=self._settings.quiet), isinstance(self._held, Run)
        if isinstance(self._held, Run):
            run = self._held
            changes = changed_surroundings(run, depends, force=self._force)
            changes = [*changed_settings(run, asked, force=self._force), *changes, *self._lacking]
            self._go_back(run, console)
            if chosen := chosen_anew(run, asked):
                run.keep_settings(asked, resolved)
                run.event("settings", f"goes on with {', '.join(chosen)}", settings=chosen)
            if changes:
                run.go_on_as(asked, resolved, depends, changes)
                text = "forced: from here on another run than it was, because " + "; ".join(changes)
                run.event("forced", text, changes=changes)
                console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            run = Run.create(self._held, self._job, asked, resolved=resolved, depends=depends)
            self._held = run
        checkpoint = self._newest[0]
        session = Session(
            run,
            self._settings,
            device=self.device,
            checkpoint=checkpoint,
            console=console,
            resumed=resumed,
            force=self._force,
        )
        if checkpoint is not None:
            session.prune()  # a run that died between its last checkpoint and this has no other to do it after
        self._held = None  # it is the session's now
        return session

    def release(self, *, resume: bool) -> None:
        """Leave the directory as it was found, unless a session has begun there."""
        if isinstance(self._held, Reserved):
            self._held.release()
        elif self._held is not None:
            if not resume:
                self._held.discard()
            self._held.close()

    def _go_back(self, run: Run, console: Console) -> None:
        """Forget what was recorded after the checkpoint."""
        checkpoint, damaged = self._newest
        for text in run.mended:
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        start = 0 if checkpoint is None else checkpoint.step
        if damaged:
            text = f"damaged, moved to {run.path / 'faults'}: {', '.join(damaged)}; going on after step {start}"
            console.print(text, markup=False, highlight=False, soft_wrap=True)
        if checkpoint is None and run.metrics():
            console.print("no checkpoint was saved: beginning again", highlight=False)
        run.rewind(-1 if checkpoint is None else start)

    def _stock(self) -> dict[str, Json]:
        """Take stock of what the numbers depend on; of a file that was looked at before, not again."""
        sources = Sources(files={}) if self._sources is None else self._sources()
        named = "cpu" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        files = {setting: path for setting, path in sources.files.items() if setting not in self._digests}
        contents = {setting: look for setting, look in sources.contents.items() if setting not in self._digests}
        fresh = replace(sources, files=files, contents=contents)
        stock = take_stock(fresh, device=named, threads=self._threads)
        self._digests |= cast("dict[str, Json]", stock["files"])
        return {**stock, "files": {**self._digests}}


@contextmanager
def hold_place(
    job: str,
    settings: RunSettings,
    *,
    config: Any | None = None,
    sources: Callable[[], Sources] | None = None,
    resume: bool = False,
    force: bool = False,
) -> Iterator[Place]:
    """Take the run's directory, then let the caller open what may take long, then begin: ``place.session(config)``.

        with hold_place("sft", config.run, config=config, sources=…, resume=resume) as place:
            world = …
            with place.session(config) as session:

    What is wrong with the place, or with the run that is to be taken up, is told at once; what raises before the session
    has begun leaves the directory as it was.

    Args:
        job: its name.
        settings: where the run lies and what it runs on.
        config: the job's settings, where they are known before anything is opened.
        sources: what it reads besides; asked at once where a run is taken up, and when the session begins, since what is
            on the hub is here only once it was opened.
        resume: go on with the run that lies there.
        force: do so also where it cannot be the same run to the bit, and record why.

    Raises:
        RunError: the directory is taken, or is no run of this job; or settings, code, machine or a file are not those
            that the run was started with; or none of its checkpoints is whole.
        ConfigError: the device or a tracker is not to be had.
    """
    device = resolve_device(settings.device)
    require_trackers(settings.trackers)
    held = Run.open(settings.dir, write=True) if resume else reserve(settings.dir)
    place = Place(job, settings, held, device=device, sources=sources, force=force)
    try:
        if isinstance(held, Run):
            place.check(held, config)
        yield place
    finally:
        place.release(resume=resume)


def open_session(
    job: str,
    config: Any,
    settings: RunSettings,
    *,
    sources: Sources | None = None,
    resume: bool = False,
    force: bool = False,
) -> Session:
    """Take the run's directory and begin at once, as a job does that opens nothing; see :func:`hold_place`."""
    with hold_place(job, settings, config=config, resume=resume, force=force) as place:
        return place.session(config, sources)


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
