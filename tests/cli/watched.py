"""A mistake as the command line meets it: what it prints, how it leaves, and the line of the code that refused."""

from __future__ import annotations

import contextlib
import io
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import bridle
from bridle.cli import main as command_line
from bridle.errors import BridleError, UserError

HOME = Path(bridle.__file__).resolve().parent
OUTERMOST = "cli/arguments.py"


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A line that raises."""

    file: str
    """path under ``src/bridle``."""
    function: str
    """qualified name of the function."""
    line: int
    """line number, from 1."""

    def __str__(self) -> str:
        return f"{self.file}:{self.function}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of one mistake."""

    code: int
    """exit code."""
    out: str
    """standard output."""
    err: str
    """standard error."""
    kind: str
    """class of the error; empty if there was none."""
    site: Site | None
    """where it was first refused."""
    seconds: float
    """processor time."""
    trace: str
    """the traceback of an error that nobody caught."""

    @property
    def message(self) -> str:
        """The last line of standard error, without the program's name."""
        return (self.err.splitlines() or [""])[-1].removeprefix("bridle: ")


def observe(call: Callable[[], int]) -> Seen:
    """Run ``call``, which returns an exit code, and watch."""
    caught: list[BaseException] = []
    complain = command_line._complain

    def watch(text: str) -> None:
        error = sys.exception()
        assert error is not None
        caught.append(error)
        complain(text)

    out, err, trace = io.StringIO(), io.StringIO(), ""
    began = time.process_time()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(command_line, "_complain", watch),
    ):
        try:
            code = call()
        except UserError as error:  # of the Python API: as a program would see it
            caught.append(error)
            code = 2
            err.write(f"{error}\n")
        except Exception:  # what must not happen is shown
            code, trace = 1, traceback.format_exc()
    seconds = time.process_time() - began
    error = caught[-1] if caught else None
    return Seen(
        code=code,
        out=out.getvalue(),
        err=err.getvalue(),
        kind="" if error is None else type(error).__name__,
        site=None if error is None else site_of(error),
        seconds=seconds,
        trace=trace,
    )


def command(arguments: Sequence[str]) -> Seen:
    """Run the command line in this process."""
    return observe(lambda: command_line.main(arguments))


def site_of(error: BaseException) -> Site | None:
    """Find the line of ours that refused first: the innermost of the errors that were told in other words on the way."""
    sites = [site for link in _told(error) if isinstance(link, BridleError) and (site := _innermost(link)) is not None]
    inner = [site for site in sites if site.file != OUTERMOST]  # tyro's box is opened there
    return (inner or sites or [None])[-1]


def _told(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__


def _innermost(error: BaseException) -> Site | None:
    frames = []
    walk = error.__traceback__
    while walk is not None:
        code = walk.tb_frame.f_code
        path = Path(code.co_filename)
        if path.is_relative_to(HOME):
            frames.append(Site(file=path.relative_to(HOME).as_posix(), function=code.co_qualname, line=walk.tb_lineno))
        walk = walk.tb_next
    return frames[-1] if frames else None


@contextmanager
def as_users_see_it() -> Iterator[None]:
    """Let warnings be errors no more: a user's Python prints them."""
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        yield
