"""Kill runs at random moments, resume each to its end, and compare it byte for byte with the one that was never stopped.

    scripts/torture --kills 50 --out bench/results/torture.json

One process imports everything once and forks a child for each life of a run, so that a kill and a resume cost about a
second. Every kill is a SIGKILL. A third of them come from the parent when the child has used a drawn share of the CPU time
that the whole run takes; the others from the child itself at a drawn one of its dealings with the file system: before it,
after it, or with half of it done (half a line, half a file of tensors, half a folder taken away). What the child was at,
it writes into memory shared with the parent.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import bridle.jobs.control as control
import bridle.jobs.learner as learner
import bridle.jobs.ppo as ppo
import bridle.jobs.reward as reward
import bridle.jobs.sft as sft
from bridle.control.collect import Collector
from bridle.control.evaluate import EvaluationSettings
from bridle.control.making import WorldSettings
from bridle.control.networks import NetworkSettings
from bridle.jobs.session import RunSettings, Session
from bridle.language.sampler import SamplingSettings
from bridle.language.shaping import KLSettings, ShapingSettings
from bridle.learn.ppo import PPOSettings
from bridle.random import generator
from bridle.runs import Run, RunState, checkpoints, directory, files
from tests.jobs import small
from tests.power import Disk

__all__ = ["JOBS", "Outcome", "main", "torture"]

APART = {"events.jsonl", "timing.jsonl", ".lock"}
"""What a run may differ in: what happened to it, and the wall clock."""
EVIDENCE = "faults/"
"""Where it keeps what a power loss damaged, as it was found."""

# What the child is at

_BOARD = mmap.mmap(-1, 4096)
_EVENTS = slice(0, 8)
_PHASE = slice(8, 72)
_SAVED = slice(72, 80)


def _phase() -> str:
    return bytes(_BOARD[_PHASE]).rstrip(b"\0").decode()


def _set_phase(name: str) -> None:
    _BOARD[_PHASE] = name.encode().ljust(64, b"\0")


def _events() -> int:
    return int.from_bytes(_BOARD[_EVENTS], "little")


def _saved() -> int:
    """The step of the newest checkpoint that a child has been told is safe; -1 where there is none."""
    return int.from_bytes(_BOARD[_SAVED], "little") - 1


def _say_saved(run: Run, step: int) -> Any:
    @contextmanager
    def saving() -> Iterator[Path]:
        with _CHECKPOINT(run, step) as folder:
            yield folder
        _BOARD[_SAVED] = (step + 1).to_bytes(8, "little")

    return saving()


_CHECKPOINT = Run.checkpoint


@contextmanager
def _during(name: str) -> Iterator[None]:
    before = _phase()
    _set_phase(name)
    try:
        yield
    finally:
        _set_phase(before)


@dataclass(slots=True)
class Doom:
    """Which dealing with the file system is the child's last, and how far it gets."""

    event: int = 0
    """counted from 1; 0 is none."""
    share: float = 0.0
    """0 before it, 1 after it, between with half of it done where it can be halved."""
    power: int | None = None
    """seed of what a power loss leaves; None where the system lives on and writes what it was given."""


_doom = Doom()
_disk: list[Disk] = []
"""Of the child, what a power loss would leave; empty in the parent."""


def _die() -> None:
    if _doom.power is not None:
        draws = generator(_doom.power, "power loss")
        lost = _disk[0].root.with_name("lost")
        _disk[0].lose_power(lost, draws, kept=float(draws.choice([0.0, 0.5, 0.9])))
    os.kill(os.getpid(), signal.SIGKILL)


def _dealing(name: str, whole: Callable[[], Any], half: Callable[[], None] | None = None) -> Any:
    """Count one dealing with the file system, and die in it if it is the one."""
    number = _events() + 1
    _BOARD[_EVENTS] = number.to_bytes(8, "little")
    if number != _doom.event:
        return whole()
    with _during(f"{_phase()}: {name}"):
        if _doom.share == 0.5 and half is not None:
            _set_phase(f"{_phase()}, half done")
            half()
        elif _doom.share > 0:
            whole()
        _die()
    return None


def _phased(owner: Any, name: str, phase: str) -> None:
    own = getattr(owner, name)

    @functools.wraps(own)
    def call(*arguments: Any, **named: Any) -> Any:
        with _during(phase):
            return own(*arguments, **named)

    setattr(owner, name, call)


def _phased_block(owner: Any, name: str, phase: str) -> None:
    own = getattr(owner, name)

    @contextmanager
    def call(*arguments: Any, **named: Any) -> Iterator[Any]:
        with _during(phase), own(*arguments, **named) as lent:
            yield lent

    setattr(owner, name, call)


def _watch_phases() -> None:
    """Let everything that a job does say its name while it works."""
    for module, named in {
        ppo: {"_collect": "collecting", "_prepare": "preparing", "_update": "learning", "_evaluate": "evaluating"},
        sft: {"likelihood_step": "learning", "_evaluate": "evaluating"},
        reward: {"train_step": "learning", "_judge": "evaluating", "_finish": "finishing"},
        control: {"prepare": "preparing", "_judge": "evaluating", "take_up_episodes": "restoring"},
    }.items():
        for name, phase in named.items():
            _phased(module, name, phase)
    for module, name in ((ppo, "restore"), (sft, "_restore"), (reward, "_restore")):
        _phased(module, name, "restoring")
    _phased(Collector, "collect", "collecting")
    _phased(learner.Learner, "restore", "restoring")
    updates: list[Any] = [sys.modules["bridle.learn.ppo"], sys.modules["bridle.learn.a2c"]]
    for module in updates:
        own = module.update

        def slowly(*arguments: Any, own: Any = own, **named: Any) -> Iterator[Any]:
            for taken in own(*arguments, **named):
                _set_phase("learning")
                yield taken
            _set_phase("between")

        module.update = slowly
    for name, phase in (("record", "metrics"), ("samples", "samples"), ("timing", "timing"), ("event", "events")):
        _phased(Run, name, phase)
    for name, phase in (("prune", "pruning"), ("rewind", "rewinding"), ("_mend", "mending")):
        _phased(Run, name, phase)
    _phased(directory, "write_manifest", "checkpoint: checksums")
    _phased(checkpoints, "sync_tree", "checkpoint: fsync")
    Run.checkpoint = _say_saved  # type: ignore[method-assign, assignment]
    _phased_block(Run, "checkpoint", "checkpoint")
    _phased_block(Run, "export", "export")
    _phased(Session, "__enter__", "opening")


def _watch_files() -> None:
    """Count every dealing with the file system that a run's safety rests on."""
    records: Any = directory
    append, fsync, rename, save = records.append_line, os.fsync, os.rename, safetensors.torch.save_file
    replace, remove = os.replace, shutil.rmtree

    def half_a_line(path: Path, value: Any, texts: bool) -> None:
        line = files._dumps(value, texts=texts)
        with path.open("ab", buffering=0) as file:
            file.write(line[: max(1, len(line) // 2)])

    def append_line(path: Path, value: Any, *, texts: bool = False) -> None:
        _dealing("append", lambda: append(path, value, texts=texts), lambda: half_a_line(path, value, texts))

    def half_a_file(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        save(tensors, path, *rest, **named)
        os.truncate(path, os.path.getsize(path) // 2)

    def save_file(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        _dealing(
            "tensors",
            lambda: save(tensors, path, *rest, **named),
            lambda: half_a_file(tensors, path, *rest, **named),
        )

    def half_a_folder(path: Any) -> None:
        found = sorted(found for found in Path(path).rglob("*") if found.is_file())
        for gone in found[: (len(found) + 1) // 2]:
            gone.unlink()

    def rmtree(path: Any, *rest: Any, **named: Any) -> None:
        _dealing("removal", lambda: remove(path, *rest, **named), lambda: half_a_folder(path))

    def durably(descriptor: int) -> None:
        fsync(descriptor)
        for disk in _disk:
            disk.sync(descriptor)

    records.append_line = append_line
    safetensors.torch.save_file = save_file  # type: ignore[assignment]
    shutil.rmtree = rmtree  # type: ignore[assignment]
    os.fsync = lambda fd: _dealing("fsync", lambda: durably(fd))
    os.rename = lambda *arguments: _dealing("rename", lambda: rename(*arguments))
    os.replace = lambda *arguments: _dealing("rename", lambda: replace(*arguments))


# The runs


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A job at its smallest, with all that it can carry from step to step."""

    run: Callable[..., Path]
    config: Callable[[Path, Path], Any]
    """of the folder of the text world, and the run's directory."""


_KEPT = {"keep_checkpoints": 2, "keep_every": 3}


def _run_settings(path: Path) -> RunSettings:
    return small.run_settings(path, checkpoint_every=2, **_KEPT)


def _control(_: Path, path: Path, **changes: Any) -> control.ControlConfig:
    settings: dict[str, Any] = {
        "n_steps": 16,
        "total_steps": 9 * 32,
        "world": WorldSettings(num_envs=2),
        "network": NetworkSettings(hidden=(8,)),
        "ppo": PPOSettings(epochs=2, minibatches=2),
        "evaluation": EvaluationSettings(every=3, episodes=5, final_episodes=5, max_steps=8),
        "normalise_observations": True,
        "scale_rewards": True,
        "restart_every": 3,
        "run": _run_settings(path),
    }
    return control.ControlConfig(**{**settings, **changes})


JOBS = {
    "control ppo": Job(run=control.run, config=functools.partial(_control, env="Pendulum-v1")),
    "control a2c": Job(
        run=control.run,
        config=functools.partial(
            _control, env="CartPole-v1", algorithm="a2c", network=NetworkSettings(hidden=(8,), recurrent="gru")
        ),
    ),
    "sft": Job(
        run=sft.run,
        config=lambda world, path: small.sft_config(
            world,
            path,
            run=_KEPT,
            evaluation=sft.EvaluationSettings(share=0.2, every=2, sampling=SamplingSettings(max_new_tokens=4)),
        ),
    ),
    "reward": Job(
        run=reward.run,
        config=lambda world, path: small.reward_config(
            world,
            path,
            run=_KEPT,
            epochs=1,
            evaluation=reward.EvaluationSettings(folds=2, every=2),
        ),
    ),
    "ppo": Job(
        run=ppo.run,
        config=lambda world, path: small.ppo_config(
            world,
            path,
            run=_KEPT,
            steps=6,
            kl=KLSettings(where="reward", target=1.0, horizon=20),
            shaping=ShapingSettings(scale=True),
            evaluation=ppo.EvaluationSettings(held_out=4, every=2),
        ),
    ),
}
"""What is tortured."""


# Lives and deaths


@dataclass(slots=True)
class Outcome:
    """What became of one job under torture."""

    kills: int = 0
    """SIGKILLs and power losses that found the run at work."""
    resumed: int = 0
    """runs that were killed once or more and then brought to their end."""
    differences: list[str] = field(default_factory=list)
    """files that were not those of the run that was never stopped."""
    by: Counter[str] = field(default_factory=Counter)
    """kills by CPU time, at a dealing with the file system, and by a loss of power there."""
    phases: Counter[str] = field(default_factory=Counter)
    """what the run was at when it was killed."""

    def summary(self) -> dict[str, Any]:
        """Lay it out for JSON."""
        return {
            "kills": self.kills,
            "runs_resumed_to_the_end": self.resumed,
            "files_that_differ": self.differences,
            "kills_by": dict(sorted(self.by.items())),
            "phases": dict(self.phases.most_common()),
        }


def _live(job: Job, world: Path, path: Path, log: Path, doom: Doom, cpu: float) -> bool:
    """Let a child begin or go on with the run; True if it came to its end, False if it was killed."""
    _BOARD[_EVENTS] = bytes(8)
    _set_phase("starting")
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _child(job, world, path, log, doom)
    clock = (~child << 3) | 2  # CPU time of another process, as clock_getcpuclockid gives it
    while True:
        gone, status = os.waitpid(child, os.WNOHANG if cpu else 0)
        if gone:
            break
        if time.clock_gettime(clock) >= cpu:
            os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            break
        time.sleep(0.001)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        raise RuntimeError(f"a run went wrong by itself (exit code {code}):\n{log.read_text()}")
    if code != 0 and doom.power is not None:
        shutil.rmtree(path.parent)
        path.parent.with_name("lost").rename(path.parent)
    return code == 0


def _child(job: Job, world: Path, path: Path, log: Path, doom: Doom) -> None:
    """Live one life of a run, in a process of its own; never returns."""
    code = 1
    try:
        _doom.event, _doom.share, _doom.power = doom.event, doom.share, doom.power
        if doom.power is not None:
            _disk.append(Disk(path.parent))
        job.run(job.config(world, path), resume=(path / "config.json").is_file())
        log.write_text("\n".join(sys.modules))
        code = 0
    except BaseException:
        log.write_text(traceback.format_exc())
    finally:
        os._exit(code)


def _contents(path: Path) -> dict[str, bytes]:
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}
    return {name: text for name, text in found.items() if name not in APART and not name.startswith(EVIDENCE)}


def _compare(path: Path, whole: dict[str, bytes], steps: list[Any], attempt: int) -> list[str]:
    """Name every file that is missing, left over or not the same; and a timing line that is there twice or not at all."""
    own = _contents(path)
    wrong = [name for name in sorted({*own, *whole}) if own.get(name) != whole.get(name)]
    run = Run.open(path)
    if run.state() is not RunState.FINISHED:
        wrong.append("the run has not finished")
    if [row["step"] for row in run.timings()] != steps:
        wrong.append("timing.jsonl: its steps")
    return [f"attempt {attempt}: {name}" for name in wrong]


def _newest(path: Path) -> int:
    """The step of a run's newest checkpoint that is whole; -1 where there is none."""
    whole = Run.open(path).latest_checkpoint() if (path / "config.json").is_file() else None
    return -1 if whole is None else whole.step


def torture(name: str, kills: int, world: Path, folder: Path, *, seed: int = 0) -> Iterator[Outcome]:
    """Kill a job's runs until ``kills`` have found one at work; compare each with the one that was left alone.

    Yields what has become of them after each.
    """
    job, path, log = JOBS[name], folder / "disk" / "run", folder / "log"
    path.parent.mkdir(parents=True)
    spent = os.times()
    if not _live(job, world, path, log, Doom(), 0.0):
        raise RuntimeError(f"{name}: nobody killed it, and it is dead")
    events, now = _events(), os.times()
    for module in log.read_text().split("\n"):  # or every life would begin with importing it
        if module.startswith(("transformers.", "tokenizers.", "gymnasium.", "safetensors.", "torch.")):
            with suppress(ImportError):
                importlib.import_module(module)
    cpu = now.children_user + now.children_system - spent.children_user - spent.children_system
    whole, steps = _contents(path), [row["step"] for row in Run.open(path).timings()]
    outcome, attempt = Outcome(), 0
    while outcome.kills < kills:
        attempt += 1
        shutil.rmtree(path, ignore_errors=True)  # a power loss may have left nothing
        draws = generator(seed, f"torture {name}", attempt)
        _BOARD[_SAVED] = bytes(8)
        killed = 0
        for _ in range(2 if attempt % 5 == 0 else 1):  # every fifth run dies twice
            at_event = bool(draws.integers(3))
            doom = Doom(event=int(draws.integers(1, events + 1)), share=float(draws.choice([0.0, 0.5, 1.0])))
            doom.power = int(draws.integers(1 << 31)) if draws.integers(2) else None
            if _live(job, world, path, log, doom if at_event else Doom(), 0.0 if at_event else cpu * draws.random()):
                break
            killed += 1
            dealing = "a dealing with the file system" if doom.power is None else "a loss of power"
            outcome.by[dealing if at_event else "CPU time"] += 1
            outcome.phases[_phase()] += 1
            if _newest(path) < _saved():
                outcome.differences.append(
                    f"attempt {attempt}: the checkpoint of step {_saved()} was safe, and is lost"
                )
        if not killed:
            continue
        outcome.kills += killed
        outcome.resumed += 1
        if Run.open(path).state() is not RunState.FINISHED if (path / "config.json").is_file() else True:
            _live(job, world, path, log, Doom(), 0.0)
        outcome.differences += _compare(path, whole, steps, attempt)
        yield outcome


def main(arguments: list[str] | None = None) -> int:
    """Torture every job; exit code 1 if a file of a resumed run is not the one of the run that was left alone."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs for each job")
    parser.add_argument("--jobs", nargs="+", default=[*JOBS], choices=[*JOBS], help="which of them")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    asked = parser.parse_args(arguments)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    _watch_phases()
    _watch_files()
    began = time.perf_counter()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        if os.fork() == 0:  # the parent computes nothing: what it forks must not find threads at work
            small.small_world(world)
            os._exit(0)
        os.wait()
        for name in asked.jobs:
            for outcome in torture(name, asked.kills, world, Path(scratch) / name.replace(" ", "-"), seed=asked.seed):
                found[name] = outcome.summary()
                spent = os.times()
                result = {
                    "command": f"scripts/torture --kills {asked.kills} --seed {asked.seed}",
                    "kills": sum(one["kills"] for one in found.values()),
                    "files_that_differ": sum(len(one["files_that_differ"]) for one in found.values()),
                    "cpu_seconds": round(spent.user + spent.system + spent.children_user + spent.children_system),
                    "seconds": round(time.perf_counter() - began),
                    "jobs": found,
                }
                if asked.out is not None:
                    files.write_text(asked.out, json.dumps(result, indent=2) + "\n")
            print(
                f"{name}: {found[name]['kills']} kills, {len(found[name]['files_that_differ'])} files differ",
                flush=True,
            )
    return 1 if any(one["files_that_differ"] for one in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
