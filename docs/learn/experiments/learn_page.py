"""What every experiment of these pages shares: its command line, its files, the look of its picture.

An experiment is a module with three functions: ``measure`` gives its figures, ``draw`` its picture, ``seen`` the
sentences of its page. Pictures and figures lie in ``docs/learn/figures``.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "BLACK",
    "BLUE",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "Experiment",
    "Value",
    "differences",
    "panels",
    "passage",
    "rounded",
    "run",
    "with_passage",
]

PAGES = Path(__file__).resolve().parents[1]
FOLDER = PAGES / "figures"

Value = Any
"""What JSON can hold; how an experiment's figures are laid out only the experiment knows."""

BLUE, ORANGE, GREEN, PURPLE, BLACK, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#8A8A8A"
"""Okabe and Ito's colours, which colour-blind readers tell apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One experiment and its files."""

    name: str
    """Stem of its files in ``docs/learn/figures``."""
    measure: Callable[[], dict[str, Value]]
    """Runs it; the same figures every time."""
    draw: Callable[[Mapping[str, Value]], Figure]
    """The picture of these figures."""
    seen: Callable[[Mapping[str, Value]], str]
    """What its pages say is seen, with the numbers; paragraphs, or tables, with an empty line between them."""
    tolerance: float = 1e-3
    """How far a figure may be from the committed one, relative and absolute: other machines round otherwise."""
    compared: str | None = None
    """The one figure that is compared, where rounding moves a whole training and with it every single figure."""

    @property
    def figures(self) -> dict[str, Value]:
        """The committed figures."""
        loaded: dict[str, Value] = json.loads((FOLDER / f"{self.name}.json").read_text())
        return loaded


def panels(count: int, height: float = 3.3) -> tuple[Figure, Sequence[Axes]]:
    """Return a figure 7 inches (700 px at 100 dpi) wide with ``count`` panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, height), layout="constrained", facecolor="white")
    axes = figure.subplots(1, count, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="#E5E5E5", linewidth=0.6)
        ax.set_axisbelow(True)
        ax.tick_params(labelsize=8)
    return figure, axes


def differences(found: Value, expected: Value, tolerance: float, where: str = "figures") -> Iterator[str]:
    """Yield one line for each figure that is not what was expected; tolerances are relative and absolute."""
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        if set(found) != set(expected):
            yield f"{where}: {sorted(set(found) ^ set(expected))} on one side only"
        for name in sorted(set(found) & set(expected)):
            yield from differences(found[name], expected[name], tolerance, f"{where}.{name}")
    elif isinstance(found, str) or isinstance(expected, str):
        if found != expected:
            yield f"{where}: {found!r}, expected {expected!r}"
    elif isinstance(found, Sequence) and isinstance(expected, Sequence):
        if len(found) != len(expected):
            yield f"{where}: {len(found)} figures, expected {len(expected)}"
        for i, (one, other) in enumerate(zip(found, expected, strict=False)):
            yield from differences(one, other, tolerance, f"{where}[{i}]")
    elif not (
        isinstance(found, int | float)
        and isinstance(expected, int | float)
        and math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
    ):
        yield f"{where}: {found}, expected {expected} within {tolerance}"


def rounded(value: Value) -> Value:
    """Return the same figures with six significant digits."""
    if isinstance(value, Mapping):
        return {name: rounded(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def passage(text: str) -> str:
    """Return what ``seen`` gave as it stands in a page: paragraphs filled to the page's width, tables as they are."""
    parts = (part if part.startswith("|") else textwrap.fill(part, 120) for part in text.split("\n\n"))
    return "\n\n".join(parts)


def with_passage(page: str, name: str, text: str) -> str:
    """Put ``text`` between the marks of experiment ``name`` wherever ``page`` has them."""
    marks = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    return marks.sub(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)


def run(experiment: Experiment, arguments: Sequence[str] | None = None) -> int:
    """Make picture, figures and the pages' sentences again, or compare with the committed ones; return the exit code."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the committed figures and write nothing")
    check = parser.parse_args(arguments).check
    torch.set_num_threads(1)
    figures = experiment.measure()
    if check:
        committed: Value = experiment.figures
        if experiment.compared is not None:
            figures, committed = figures[experiment.compared], committed[experiment.compared]
        wrong = list(differences(figures, committed, experiment.tolerance))
        print("\n".join(wrong) or f"{experiment.name}: as committed, within {experiment.tolerance}")
        return 1 if wrong else 0
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{experiment.name}.json").write_text(json.dumps(rounded(figures), ensure_ascii=False) + "\n")
    picture = experiment.draw(figures)
    for ax in picture.axes:
        ax.title.set_fontsize(9.5)
        ax.xaxis.label.set_fontsize(9)
        ax.yaxis.label.set_fontsize(9)
    picture.savefig(FOLDER / f"{experiment.name}.png", dpi=150, metadata={"Software": None})
    text = passage(experiment.seen(figures))
    for page in sorted(PAGES.glob("*.md")):
        page.write_text(with_passage(page.read_text(), experiment.name, text))
    print(text)
    return 0
