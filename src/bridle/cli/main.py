"""The command line: find the command, import its job only, and turn every error into one line and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bridle import __version__
from bridle.cli.plain import plain
from bridle.errors import BridleError, RunError, UserError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["COMMANDS", "JobCommand", "main"]


_POSIX = os.name == "posix"
"""Whether there are fork, file locks and resource limits, which runs, chat templates and environments are built on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobCommand:
    """A command that runs a job; the job's module is imported only when it is asked for."""

    job: str
    """module under ``bridle.jobs`` with a function ``run``; also the job's name in config.json."""
    config: str
    """name of its settings class in that module."""
    help: str
    """one line for ``bridle --help``."""
    extra: str
    """the optional dependencies it needs."""
    positional: str | None = None
    """the option whose name may be left out if its value comes first."""
    starting: str | None = None
    """name of a class in that module: a few of the options, whose ``settings()`` the others then start from."""

    def load(self) -> tuple[type[Any], Callable[..., Path]]:
        """Import the job; raises :class:`UserError` where its optional dependencies are not installed."""
        try:
            module = _job(self.job)
        except ModuleNotFoundError as error:
            raise self.missing(error) from None
        return getattr(module, self.config), module.run

    def missing(self, error: ModuleNotFoundError) -> Exception:
        """Turn a missing module into what to install; a module of Bridle's own is no user's mistake."""
        if error.name is None or error.name.partition(".")[0] == "bridle":
            return error
        return UserError(f"{error.name} is not installed; pip install 'bridle[{self.extra}]'")


def _job(name: str) -> Any:
    """Import a job. Looking for garbage meanwhile, where there is hardly any, took a third of the time that it takes.

    What is there afterwards is not looked at again, garbage of the caller's before it with it.
    """
    whole = f"bridle.jobs.{name}"
    if whole in sys.modules or not gc.isenabled():
        return import_module(whole)
    gc.disable()
    try:
        return import_module(whole)
    finally:
        gc.freeze()
        gc.enable()


COMMANDS = {
    "quickstart": JobCommand(
        job="quickstart",
        config="QuickstartConfig",
        help="the whole line on a small text world, in minutes: SFT, reward model, PPO",
        extra="language",
    ),
    "sft": JobCommand(
        job="sft", config="SFTConfig", help="fine-tune a language model on demonstrations", extra="language"
    ),
    "reward": JobCommand(
        job="reward", config="RewardConfig", help="train a reward model on preferences", extra="language"
    ),
    "ppo": JobCommand(
        job="ppo", config="PPOConfig", help="train a language model against a reward by PPO", extra="language"
    ),
    "evaluate": JobCommand(
        job="evaluate",
        config="EvaluateConfig",
        help="judge a run or a model on held-out prompts or episodes: bridle evaluate RUN",
        extra="language",
        positional="target",
    ),
    "train": JobCommand(
        job="control",
        config="ControlConfig",
        help="train an agent in a Gymnasium environment: bridle train CartPole-v1",
        extra="control",
        positional="env",
        starting="Start",
    ),
}
"""What each job command runs."""

_OTHERS = {
    "resume": "go on with a run from its newest checkpoint: bridle resume RUN [--force] [SETTINGS]",
    "runs": "list the runs under a directory (default: runs): bridle runs [DIR]",
    "replay": "take a step again that was not finite, and say where that begins: bridle replay RUN/faults/step-N",
    "events": "print what happened in a run, invariants crossed and faults included: bridle events RUN",
}


def _usage() -> str:
    rows = [(name, command.help) for name, command in COMMANDS.items()] + list(_OTHERS.items())
    commands = "\n".join(f"  {name:<12}{text}" for name, text in rows)
    return (
        "usage: bridle COMMAND [OPTIONS]\n\n"
        "Reinforcement learning with an actor and a critic, for language models and Gymnasium agents.\n\n"
        f"commands:\n{commands}\n\n"
        "`bridle COMMAND --help` shows a command's options; `bridle --version` the version.\n"
    )


def _run_job(name: str, arguments: Sequence[str]) -> None:
    from bridle.cli.arguments import parse

    command = COMMANDS[name]
    _here()  # before PyTorch's libraries find it gone, which end the process
    config_class, run = command.load()
    with _finding_modules_here():
        default = _start(command, arguments)
    config = parse(config_class, arguments, program=f"bridle {name}", positional=command.positional, default=default)
    if command.starting is not None and default is None:
        raise UserError(f"bridle {name} needs an environment; for instance: bridle {name} CartPole-v1")
    _call(command, partial(run, config))


def _start(command: JobCommand, arguments: Sequence[str]) -> object | None:
    """Return what the options start from, where that depends on what some of them say."""
    from bridle.cli.arguments import first_look

    if command.starting is None or command.positional is None:
        return None
    chosen = getattr(_job(command.job), command.starting)
    first = first_look(chosen, arguments, positional=command.positional)
    return None if first is None else first.settings()


def _call(command: JobCommand, run: Callable[[], Path]) -> None:
    try:
        with _finding_modules_here():
            print(run())
    except ModuleNotFoundError as error:
        raise command.missing(error) from None


def _here() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        raise UserError("the working directory is no more; change to one that is there") from None


@contextmanager
def _finding_modules_here() -> Iterator[None]:
    """Let the user's environments and judges be imported from the working directory, which is looked at last."""
    here = _here()
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _one_path(name: str, arguments: Sequence[str], default: str | None) -> Path | None:
    """Read the one path that the commands without options take; None after ``--help``."""
    if any(argument in ("-h", "--help") for argument in arguments):
        takes = {"resume": "RUN [--force] [SETTINGS]", "runs": "[DIR]", "events": "RUN", "replay": "RUN/faults/step-N"}
        print(f"usage: bridle {name} {takes[name]}\n\n{_OTHERS[name]}")
        if name == "resume":
            from bridle.jobs.taking_up import may_change

            options = ", ".join(f"--{setting.replace('_', '-')}" for setting in may_change())
            print("\n  --force     go on also where it cannot be the same run to the bit, and record why")
            print(f"\nSettings that may change where a run is taken up, as its command takes them: {options}")
        return None
    if any(argument.startswith("-") for argument in arguments):
        allowed = "the run first, then options" if name == "resume" else "no options; give it a path only"
        raise UserError(f"bridle {name} takes {allowed}")
    if len(arguments) > 1 or (not arguments and default is None):
        raise UserError(f"bridle {name} takes one path, not {len(arguments)}; for instance: bridle {name} runs/first")
    return Path(arguments[0] if arguments else default or "")


def _resume(arguments: Sequence[str]) -> None:
    force = "--force" in arguments
    arguments = [argument for argument in arguments if argument != "--force"]
    asks_help = any(argument in ("-h", "--help") for argument in arguments)
    options = next((place for place, word in enumerate(arguments) if place and word.startswith("-")), len(arguments))
    path = _one_path("resume", arguments if asks_help else arguments[:options], None)
    if path is None:
        return
    chosen = arguments[options:]
    _here()
    from bridle.runs import Run, RunState

    run = Run.open(path)
    if run.state() is RunState.FINISHED:
        if chosen:
            raise RunError(
                f"{path} has finished, so no setting changes it; what goes on from it is another run of its own"
            )
        print(f"{path} has finished; there is nothing to resume")
        return
    commands = [command for command in COMMANDS.values() if command.job == run.job]
    if not commands:
        raise RunError(f"{path} is a run of {run.job!r}, unknown to this bridle; use the version that wrote it")
    from bridle.jobs.config import from_dict, require_sane

    config_class, job = commands[0].load()
    settings = run.config.get("run")
    if not isinstance(settings, dict):
        raise RunError(f"{path / 'config.json'} lacks the run's settings; restore it or start a new run")
    here = {**run.config, "run": {**settings, "dir": str(path)}}
    config = from_dict(config_class, here)
    require_sane(config)
    if chosen:
        config = _changed(config_class, config, chosen, path)
    _call(commands[0], partial(job, config, resume=True, force=force))


def _changed(config_class: type[Any], config: Any, chosen: Sequence[str], path: Path) -> Any:
    """Lay the options that a resume is given over the run's own settings; whether they may change is for the job to say."""
    from bridle.cli.arguments import parse

    changed = parse(config_class, chosen, program="bridle resume", default=config)
    if changed.run.dir != path:
        raise RunError(f"a run is taken up where it lies; to give {path} another place, move the folder")
    return changed


def _runs(arguments: Sequence[str]) -> None:
    path = _one_path("runs", arguments, "runs")
    if path is None:
        return
    from bridle.cli.listing import print_runs

    if arguments and not path.is_dir():
        raise RunError(f"{path} is not a directory; give one that holds runs")
    print_runs(path)


def _events(arguments: Sequence[str]) -> None:
    path = _one_path("events", arguments, None)
    if path is None:
        return
    from bridle.cli.listing import print_events

    print_events(path)


def _replay(arguments: Sequence[str]) -> None:
    path = _one_path("replay", arguments, None)
    if path is None:
        return
    _here()
    from bridle.jobs.replay import replay

    with _finding_modules_here():
        print("\n".join(map(plain, replay(path))))


def _dispatch(arguments: Sequence[str]) -> None:
    name = arguments[0] if arguments else None
    known = [*COMMANDS, *_OTHERS]
    if name in ("-h", "--help", "help"):
        print(_usage(), end="")
    elif name in ("-V", "--version"):
        print(f"bridle {__version__}")
    elif name is None:
        raise UserError(f"a command is missing: one of {', '.join(known)}; `bridle --help` says what they do")
    elif name == "resume":
        _resume(arguments[1:])
    elif name == "runs":
        _runs(arguments[1:])
    elif name == "replay":
        _replay(arguments[1:])
    elif name == "events":
        _events(arguments[1:])
    elif name in COMMANDS:
        _run_job(name, arguments[1:])
    else:
        near = get_close_matches(name, known, 1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
        raise UserError(f"{name} is not a command of bridle; {hint}")


def _complain(text: str) -> None:
    """Print one line."""
    print(f"bridle: {plain(text)}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``bridle`` and return its exit code: 0 done, 1 training failed, 2 the user can mend it, 130 stopped."""
    if not _POSIX:
        _complain("bridle needs a POSIX system, such as Linux or macOS; on Windows run it in WSL")
        return 2
    try:
        _dispatch(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BridleError as error:
        _complain(str(error))
        return 2 if isinstance(error, UserError) else 1
    except MemoryError as error:
        _complain(f"out of memory: {str(error) or 'nothing is left'}; ask for less at once")
        return 2
    except KeyboardInterrupt as stop:
        _complain(str(stop) or "interrupted")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains while leaving
        return 141
    except SystemExit as leave:  # tyro's --help
        return leave.code if isinstance(leave.code, int) else 0
    return 0
