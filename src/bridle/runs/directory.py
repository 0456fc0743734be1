"""A run is a directory: what was asked for, what was measured, what was said, and where to go on from.

    config.json            what was asked for, as written and as resolved; versions
    metrics.jsonl          one line a record; deterministic: no wall clock, no machine
    timing.jsonl           wall clock, speed, memory
    events.jsonl           what happened: started, resumed, a checkpoint skipped, stopped, finished
    samples/step-N.jsonl   what was said or done at step N
    checkpoints/step-N/    where the run can be taken up again
    faults/                evidence of what went wrong

One process writes a run (a lock sees to it); any number may read it while it grows.
"""

from __future__ import annotations

import errno
import os
import platform
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Self

from safetensors import SafetensorError

from bridle.errors import RunError
from bridle.runs.checkpoints import (
    Checkpoint,
    NewerFormat,
    clear_leftovers,
    list_checkpoints,
    remove_folder,
    verify,
    whole_folder,
    write_manifest,
)
from bridle.runs.depends import version_of
from bridle.runs.extent import extents
from bridle.runs.files import (
    Json,
    JsonObject,
    append_line,
    drop_torn_line,
    load_json,
    read_lines,
    save_json,
    step_of,
    sync,
    write_lines,
    write_samples,
)
from bridle.runs.mending import cut_back, drop_damaged_lines
from bridle.runs.places import FOLDERS, Reserved, clear, is_locked, let_go, reserve, take_lock

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["FORMAT", "Run", "RunState"]

FORMAT = 1
"""Version of the layout; a run of another format is refused."""

Metric = float | int | str | bool | None
_STREAMS = ("metrics.jsonl", "timing.jsonl")


class RunState(Enum):
    """What has become of a run."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"
    """asked to stop; it saved a checkpoint and left."""
    FAILED = "failed"
    INTERRUPTED = "interrupted"
    """its process was stopped at once, or is gone without having said anything."""


_ENDINGS = {
    "finish": RunState.FINISHED,
    "stop": RunState.STOPPED,
    "fail": RunState.FAILED,
    "interrupt": RunState.INTERRUPTED,
}


def _step_of(row: Mapping[str, Json]) -> int:
    step = step_of(row)
    if step is None:
        raise RunError("a record without a step; the run's files were altered")
    return step


class Run:
    """One run's directory, open for writing (:meth:`create`, ``open(…, write=True)``) or only for reading."""

    __slots__ = ("_head", "_last_step", "_lock", "_made", "mended", "path")

    def __init__(self, path: Path, head: JsonObject, *, lock: int | None, made: tuple[Path, ...] = ()) -> None:
        """Use :meth:`create` or :meth:`open`."""
        self.path = path
        self.mended: tuple[str, ...] = ()
        """what was damaged when it was opened to be gone on with, and what became of it."""
        self._made = made
        self._head = head
        self._lock = lock
        self._last_step = -1

    @property
    def job(self) -> str:
        """The job that writes it."""
        return str(self._head["job"])

    @property
    def config(self) -> JsonObject:
        """What was asked for."""
        return _object(self._head, "config")

    @property
    def resolved(self) -> JsonObject:
        """The same with every automatic choice made."""
        return _object(self._head, "resolved")

    @property
    def depends(self) -> JsonObject:
        """What its numbers depend on besides: see :func:`bridle.runs.depends.take_stock`."""
        return _object(self._head, "depends")

    @classmethod
    def create(
        cls,
        path: Path | str | Reserved,
        job: str,
        config: Mapping[str, Json],
        *,
        resolved: Mapping[str, Json] | None = None,
        depends: Mapping[str, Json] | None = None,
    ) -> Run:
        """Make a new run at ``path``, which must not exist or be empty, or is already held.

        ``config`` is what was asked for; ``resolved`` the same with every automatic choice made; ``depends`` what the
        numbers depend on besides. Raises :class:`RunError` where something is there already; nothing is written over.
        """
        held = path if isinstance(path, Reserved) else reserve(path)
        path = held.path
        packages = ("bridle", "torch", "transformers", "gymnasium")
        versions: dict[str, Json] = {"python": platform.python_version()}
        versions |= {name: version_of(name) for name in packages}
        head: JsonObject = {"format": FORMAT, "job": job, "versions": versions, "config": dict(config)}
        head |= {"resolved": dict(config if resolved is None else resolved), "depends": dict(depends or {})}
        run = cls(path, head, lock=held.lock, made=held.made)
        with run._writing():
            for name in FOLDERS:
                (path / name).mkdir(exist_ok=True)
            save_json(path / "config.json", head)
            for folder in (path, *held.made):
                with suppress(PermissionError):  # a folder above it that may not be read
                    sync(folder.parent)
        return run

    @classmethod
    def open(cls, path: Path | str, *, write: bool = False) -> Run:
        """Open the run at ``path``, to read it or, with ``write``, to go on with it.

        Raises :class:`RunError` where there is no run, its config.json is damaged, or another process writes it.
        """
        path = Path(path)
        try:
            path.stat()
        except (FileNotFoundError, NotADirectoryError):
            pass
        except (OSError, ValueError) as error:  # a name too long, a folder that may not be entered
            reason = error.strerror if isinstance(error, OSError) else error
            raise RunError(
                f"{str(path)[:200]} cannot be reached ({reason}); `bridle runs` lists the runs there are"
            ) from None
        if not path.is_dir():
            what = "is a file, not a run" if path.exists() else "does not exist"
            raise RunError(f"{path} {what}; `bridle runs` lists the runs there are")
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not a run (it has no config.json); `bridle runs` lists the runs there are")
        head = load_json(path / "config.json")
        written = head.get("format") if isinstance(head, dict) else None
        if not isinstance(head, dict) or written != FORMAT:
            newer = f"of format {written}, and this bridle reads {FORMAT}; use a newer bridle"
            other = f"not of run format {FORMAT}; use the bridle that wrote it"
            is_newer = isinstance(written, int) and written > FORMAT
            raise RunError(f"{path / 'config.json'} is {newer if is_newer else other}")
        objects = (head.get("config"), head.get("resolved"))
        if not isinstance(head.get("job"), str) or not all(isinstance(value, dict) for value in objects):
            raise RunError(f"{path / 'config.json'} lacks job, config or resolved; restore it or start a new run")
        if not write:
            return cls(path, head, lock=None)
        try:
            lock = take_lock(path)
        except OSError as error:
            raise RunError(f"{path} cannot be written ({error.strerror}); make it writable, or copy it") from None
        run = cls(path, head, lock=lock)
        try:
            with run._writing():
                run._mend()
        except RunError:
            run.close()
            raise
        return run

    def _mend(self) -> None:
        """Clear what a crash left half done."""
        for folder in (self.path, *(self.path / name for name in FOLDERS)):
            clear_leftovers(folder)
        # all of them first: a line appended to events.jsonl while that is torn would be lost with what was torn
        torn = [name for name in (*_STREAMS, "events.jsonl") if drop_torn_line(self.path / name)]
        said = [drop_damaged_lines(self.path / "events.jsonl"), *(f"dropped a torn last line of {n}" for n in torn)]
        said += [cut_back(self.path / name, self._goes_on_from) for name in _STREAMS]
        self.mended = tuple(filter(None, said))
        for text in self.mended:
            self.event("mended", text)
        rows = self.metrics()
        self._last_step = _step_of(rows[-1]) if rows else -1

    def _goes_on_from(self) -> Checkpoint | None:
        """Find the newest checkpoint that is whole; None where there is none at all."""
        newest, there = self.latest_checkpoint(), self.checkpoints()
        if newest is None and there:
            raise RunError(f"{self.path}: records are damaged and no checkpoint is whole; put one of them back")
        return newest

    def go_on_as(
        self, config: Mapping[str, Json], resolved: Mapping[str, Json], depends: Mapping[str, Json], changes: list[str]
    ) -> None:
        """Write into config.json that the run goes on with other settings, code or files: what changed, under ``lineage``."""
        past = self._head.get("lineage", [])
        entry: JsonObject = {"after_step": self._last_step, "changes": changes, "depended": self.depends}
        lineage: list[Json] = [*past, entry] if isinstance(past, list) else [entry]
        self._head |= {"config": dict(config), "resolved": dict(resolved), "depends": dict(depends), "lineage": lineage}
        with self._writing():
            save_json(self.path / "config.json", self._head)

    def keep_settings(self, config: Mapping[str, Json], resolved: Mapping[str, Json]) -> None:
        """Write other settings into config.json, with which the run goes on as the same run."""
        self._head |= {"config": dict(config), "resolved": dict(resolved)}
        with self._writing():
            save_json(self.path / "config.json", self._head)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn what the system says against writing into one line; what was saved before is whole."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            reason, full = _refusal(error)
            saved = self.checkpoints()
            whole = f" (newest checkpoint: step {saved[-1].step})" if saved else ""
            remedy = "free some space" if full else "see to it that it can be written"
            raise RunError(
                f"{self.path} cannot be written ({reason}); {remedy}, then go on with: bridle resume {self.path}{whole}"
            ) from error

    def close(self) -> None:
        """Let go of the lock; the run can still be read."""
        if self._lock is not None:
            let_go(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        """Return the run itself; leaving the block closes it."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    def discard(self) -> None:
        """Remove a run that has recorded nothing yet, as after a mistake in its settings; one that has stays.

        A directory that was there before it stays too, empty.
        """
        if self._lock is not None and not self.metrics() and not self.checkpoints():
            with suppress(FileNotFoundError):  # not found from where the user's code has changed directory to
                clear(self.path, self._made)
            self.close()

    # Recording

    def record(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Append one line of metrics; steps never go backwards. Wall clock belongs in :meth:`timing`.

        NaN and infinities are kept (as strings, see ``files.py``); None says "not measured at this step".
        """
        if step < self._last_step:
            raise ValueError(f"step {step} after step {self._last_step}; rewind the run first")
        with self._writing():
            append_line(self.path / "metrics.jsonl", {"step": step, **metrics})
        self._last_step = step

    def timing(self, step: int, **measures: Metric) -> None:
        """Append one line of timing; ``time`` (seconds since 1970) is added."""
        with self._writing():
            append_line(self.path / "timing.jsonl", {"step": step, "time": round(time.time(), 3), **measures})

    def event(self, kind: str, text: str, **fields: Json) -> None:
        """Append one event: a word for its kind, a sentence, and what else is known."""
        head: dict[str, Json] = {"time": round(time.time(), 3), "kind": kind, "text": text}
        with self._writing():
            append_line(self.path / "events.jsonl", head | fields, texts=True)

    def samples(self, step: int, rows: Iterable[Mapping[str, Json | Tensor]], *, name: str = "step") -> None:
        """Write what was said or done at ``step`` as ``samples/NAME-N.jsonl``, whole; a second call replaces it.

        Columns of numbers of a row may be tensors [N]; those of float32 are kept to the last bit.
        """
        with self._writing():
            write_samples(self.path / "samples" / f"{name}-{step}.jsonl", rows)

    def summary(self, name: str, value: Json) -> None:
        """Write what a finished run comes to as ``RUN/name``, one JSON value, whole."""
        with self._writing():
            save_json(self.path / name, value)

    # Reading

    def metrics(self) -> list[JsonObject]:
        """Read every complete line of metrics, oldest first."""
        return read_lines(self.path / "metrics.jsonl")

    def timings(self) -> list[JsonObject]:
        """Read every complete line of timing, oldest first."""
        return read_lines(self.path / "timing.jsonl")

    def events(self) -> list[JsonObject]:
        """Read every complete event, oldest first."""
        return read_lines(self.path / "events.jsonl", texts=True)

    def read_samples(self, step: int, *, name: str = "step") -> list[JsonObject]:
        """Read what :meth:`samples` wrote at ``step``; empty if nothing."""
        return read_lines(self.path / "samples" / f"{name}-{step}.jsonl", texts=True)

    def state(self) -> RunState:
        """Tell what has become of the run."""
        if self._lock is not None or is_locked(self.path):
            return RunState.RUNNING
        kinds = [str(event.get("kind")) for event in read_lines(self.path / "events.jsonl", texts=True, lenient=True)]
        lives = [kind for kind in kinds if kind in ("start", "resume", *_ENDINGS)]
        return _ENDINGS.get(lives[-1], RunState.INTERRUPTED) if lives else RunState.INTERRUPTED

    # Checkpoints

    @contextmanager
    def checkpoint(self, step: int) -> Iterator[Path]:
        """Lend a folder to save into; on leaving it becomes ``checkpoints/step-N``, whole, with its manifest.

        The records up to here are made durable first. An exception inside leaves nothing visible.
        """
        with self._writing(), whole_folder(self.path / "checkpoints" / f"step-{step}") as folder:
            yield folder
            write_manifest(folder, step, extents(self.path, step))
            for name in (*_STREAMS, "events.jsonl"):
                if (self.path / name).exists():
                    sync(self.path / name)
            sync(self.path)  # where they are listed

    @contextmanager
    def export(self, name: str) -> Iterator[Path]:
        """Lend a folder for a finished artefact; on leaving it becomes ``RUN/name``, whole, replacing an older one."""
        with self._writing(), whole_folder(self.path / name) as folder:
            yield folder

    def checkpoints(self) -> list[Checkpoint]:
        """List the checkpoints, oldest first, without verifying them."""
        return list_checkpoints(self.path / "checkpoints")

    def latest_checkpoint(self) -> Checkpoint | None:
        """Find the newest checkpoint whose manifest verifies; a damaged one is passed over, and noted if writing.

        Raises :class:`RunError` where a newer bridle wrote it: that is no damage.
        """
        for checkpoint in reversed(self.checkpoints()):
            try:
                verify(checkpoint)
            except NewerFormat:
                raise
            except RunError as error:
                if self._lock is not None:
                    self.event("checkpoint_skipped", str(error), step=checkpoint.step)
                continue
            return checkpoint
        return None

    def prune(self, keep_last: int, *, keep: Collection[int] = ()) -> None:
        """Remove all checkpoints but the newest ``keep_last`` and the steps in ``keep``."""
        with self._writing():
            for checkpoint in self.checkpoints()[:-keep_last] if keep_last > 0 else self.checkpoints():
                if checkpoint.step not in keep:
                    remove_folder(checkpoint.path)

    def rewind(self, step: int) -> None:
        """Forget what was recorded after ``step``, so that going on from its checkpoint leaves no duplicate and no gap.

        Metrics and timing are rewritten whole, later samples removed; later checkpoints move to ``faults/``.
        """
        with self._writing():
            self._forget_after(step)
        self._last_step = step

    def _forget_after(self, step: int) -> None:
        for name in _STREAMS:
            rows = read_lines(self.path / name)
            kept = [row for row in rows if _step_of(row) <= step]
            if len(kept) < len(rows):
                write_lines(self.path / name, kept)
        for path in (self.path / "samples").glob("*-*.jsonl"):
            number = path.stem.rpartition("-")[2]
            if number.isdecimal() and int(number) > step:
                path.unlink()
        for checkpoint in self.checkpoints():
            if checkpoint.step > step:
                aside = self.path / "faults" / f"checkpoint-step-{checkpoint.step}"
                shutil.rmtree(aside, ignore_errors=True)
                checkpoint.path.rename(aside)


def _object(head: JsonObject, name: str) -> JsonObject:
    value = head.get(name)
    return value if isinstance(value, dict) else {}


def _refusal(error: OSError | SafetensorError) -> tuple[str, bool]:
    """Say what the system said, and whether the disk or the quota is full."""
    if isinstance(error, OSError):
        number, reason = error.errno, error.strerror or str(error)
    else:  # its text is all there is: "… I/O error: No space left on device (os error 28)"
        found = re.search(r"os error (\d+)", str(error))
        number = int(found[1]) if found else None
        reason = os.strerror(number) if number is not None else str(error)
    return reason, number in (errno.ENOSPC, errno.EDQUOT)
