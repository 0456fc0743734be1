"""``bridle runs``: a table of the runs under a directory; ``bridle events``: what happened in one."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bridle.cli.plain import plain
from bridle.errors import RunError
from bridle.runs import Run
from bridle.runs.files import JsonObject

__all__ = ["event_rows", "find_runs", "print_events", "print_runs"]

SHOWN = 4
"""How many of the last record's numbers are shown."""


def find_runs(folder: Path) -> Iterator[Path]:
    """Find the runs under ``folder``, at any depth, in the order of their paths; nothing inside a run is looked at."""
    for root, names, files in os.walk(folder):
        if "config.json" in files and "checkpoints" in names:
            names.clear()
            yield Path(root)
        names.sort()


def _numbers(record: JsonObject) -> str:
    shown = [(name, value) for name, value in record.items() if isinstance(value, float) and math.isfinite(value)]
    shown = shown[:SHOWN]
    return "  ".join(f"{name} {value:.3g}" for name, value in shown)


def _row(path: Path) -> tuple[str, str, str, str, str]:
    try:
        run = Run.open(path)
        records = run.metrics()
        last = records[-1] if records else {}
        return str(path), run.job, run.state().value, str(last.get("step", "–")), _numbers(last)
    except RunError as error:
        return str(path), "?", "damaged", "–", str(error)


def print_runs(folder: Path) -> None:
    """Print path, job, state, last step and last numbers of every run under ``folder``, the damaged ones too."""
    rows = [_row(path) for path in find_runs(folder)]
    if not rows:
        print(f"no runs under {folder}")
        return
    table = Table("run", "job", "state", "step", "last numbers", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=240).print(table)


def _when(seconds: object) -> str:
    """Write a POSIX time as UTC; – for what is none."""
    if not isinstance(seconds, int | float) or not 0 <= seconds < 253_402_300_800:  # the end of the year 9999
        return "–"
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def event_rows(path: Path) -> list[tuple[str, str, str]]:
    """Return a run's events, oldest first: when (UTC), what kind, what is said of it."""
    return [
        (_when(event.get("time")), str(event.get("kind")), str(event.get("text"))) for event in Run.open(path).events()
    ]


def print_events(path: Path) -> None:
    """Print a run's events, as :func:`event_rows` gives them."""
    table = Table("time", "kind", "what happened", box=None, pad_edge=False)
    for row in event_rows(path):
        table.add_row(*(Text(plain(cell)) for cell in row))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=400).print(table)
