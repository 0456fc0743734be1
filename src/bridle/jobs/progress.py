"""Progress while a job works: a bar on a terminal, a few plain lines in a log, always with the numbers that matter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Progress", "format_number", "progress_on"]

PLAIN_LINES = 20
"""How many lines a whole job prints where there is no terminal."""
ROUNDING = 1e-12
"""What is shown as 0, in whatever unit: the least learning rate anybody sets is larger."""


def format_number(value: float | int | str) -> str:
    """A float to three figures, and 0 for what rounding leaves of it: a KL of −2e-15 is none."""
    if not isinstance(value, float):
        return str(value)
    return "0" if abs(value) < ROUNDING else f"{value:.3g}"


def format_numbers(numbers: dict[str, float | int | str]) -> str:
    """``reward 0.42 | KL 3.1 | clip 8 %``: names with spaces for underscores, floats to three figures."""
    return " | ".join(f"{name.replace('_', ' ')} {format_number(value)}" for name, value in numbers.items())


class Progress:
    """How far a job has come; :meth:`advance` once a step."""

    def __init__(self, console: Console, bars: Bars | None, total: int, description: str, start: int) -> None:
        """Use :func:`progress_on`."""
        self._console = console
        self._bars = bars
        self._total = total
        self._description = description
        self._done = start
        self._task: TaskID | None = None
        if bars is not None:
            self._task = bars.add_task(description, total=total, completed=start, numbers="")

    def advance(self, steps: int = 1, /, **numbers: float | int | str) -> None:
        """Count ``steps`` more and show the numbers; a text is shown as it is, so percent is the caller's ("8 %")."""
        before = self._done
        self._done += steps
        text = format_numbers(numbers)
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, completed=self._done, numbers=text)
        elif self._done >= self._total or before * PLAIN_LINES // self._total < self._done * PLAIN_LINES // self._total:
            line = f"{self._description} {self._done}/{self._total}" + (f" | {text}" if text else "")
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def progress_on(console: Console, total: int, description: str, *, start: int = 0) -> Iterator[Progress]:
    """Show progress on ``console`` while the block runs."""
    if not console.is_terminal:
        yield Progress(console, None, total, description, start)
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
    )
    with Bars(*columns, console=console) as bars:
        yield Progress(console, bars, total, description, start)
