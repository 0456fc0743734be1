"""The table of bad inputs: every mistake is one line, exit code 2, and nothing written; the page says what is said."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bridle.errors import ConfigError, ScorerError
from bridle.language.scorers.functions import load_function
from tests.cli.mistakes import Mistake
from tests.cli.table import PAGE, Row, all_mistakes, make, page, sites, working_directory
from tests.cli.watched import observe

pytest.importorskip("gymnasium")
pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    with working_directory(tmp_path_factory.mktemp("world")) as world:
        return [make(mistake, world) for mistake in all_mistakes()]


def test_every_mistake_is_one_line_with_exit_code_2_and_nothing_written(rows: list[Row]) -> None:
    assert {f"{row.mistake.group}: {row.mistake.what}": row.faults for row in rows if row.faults} == {}


def test_the_mistakes_are_different_ones(rows: list[Row]) -> None:
    assert len(rows) >= 340
    assert len(sites(rows)) >= 285
    named = Counter((row.mistake.group, row.mistake.what) for row in rows)
    assert max(named.values()) == 1


def test_the_page_says_what_is_said(rows: list[Row]) -> None:
    assert PAGE.read_text() == page(rows), "write it again: python -m tests.cli.table"


ONLY_OPEN = {
    "Models": {
        "a shape that does not fit",
        "a layer too many",
        "NaN for a weight",
        "a model that looks ahead",
        "a reference of another shape",
        "a reward model that lacks a layer",
        "adapters on layers that are not there",
        "adapters of a rank beyond the layers",
        "an adapter of layers that are not there",
        "an adapter of narrower layers",
        "an adapter that learns on at another rank",
        "an adapter that learns on with another α",
        "an adapter that learns on elsewhere",
    },
    "Judges": {
        "it raises",
        "its coroutine raises",
        "it leaves the program",
        "it hangs",
        "NaN",
        "10³⁰⁸",
        "a score too few",
        "a word",
        "None",
        "a matrix",
    },
    "Faults and events": {"a model of another shape"},
}
"""What nobody can know before weights are read: what they hold, and what a judge says of an answer."""


def test_weights_are_read_only_where_nothing_else_could_tell(rows: list[Row]) -> None:
    found: dict[str, set[str]] = {}
    for row in rows:
        if row.opened:
            found.setdefault(row.mistake.group, set()).add(row.mistake.what)
    assert found == ONLY_OPEN


def test_nothing_is_told_slowly(rows: list[Row]) -> None:
    slow = {row.done: row.seen.seconds for row in rows if row.seen.seconds > 5}
    assert slow == {}


def test_the_watch_sees_a_traceback_a_changed_file_and_a_wrong_code(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("a")
    change = f"__import__('pathlib').Path({str(tmp_path / 'kept')!r}).write_text('b')"
    row = make(Mistake(group="", what="", python=f"{change}; 1 / 0"), tmp_path)
    assert row.faults[0] == "a traceback: ZeroDivisionError: division by zero"
    assert row.faults[1:] == ["exit code 1", "0 lines: ''", "no line of ours refused", "changed: kept"]
    assert make(Mistake(group="", what="", python="0"), tmp_path).faults[0] == "exit code 0"


def test_the_place_is_that_of_the_first_refusal() -> None:
    def other_words() -> int:
        try:
            load_function("wrong")
        except ScorerError as error:
            raise ConfigError("in other words") from error
        return 0

    seen = observe(other_words)
    assert (seen.code, seen.kind, seen.message) == (2, "ConfigError", "in other words")
    assert str(seen.site) == "language/scorers/functions.py:load_function"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("resume", "nothing"), "bridle: nothing does not exist; `bridle runs` lists the runs there are\n"),
        (("train", "CartPole-v1", "--n-steps", "0"), "bridle: n_steps=0: expected a whole number >= 1\n"),
        ((b"pp\xffo",), "bridle: pp\\udcffo is not a command of bridle; did you mean ppo?\n"),
    ],
)
def test_a_process_of_its_own_says_the_same(tmp_path: Path, arguments: tuple[str, ...], line: str) -> None:
    script = "import sys; from bridle.cli.main import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script, *arguments], check=False, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr.decode()) == (2, b"", line)
    assert list(tmp_path.iterdir()) == []


def test_a_working_directory_that_is_gone_is_one_line(tmp_path: Path) -> None:
    script = (
        "import os, sys; os.rmdir(os.getcwd()); from bridle.cli.main import main; sys.exit(main(['train', 'A-v0']))"
    )
    (tmp_path / "gone").mkdir()
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, cwd=tmp_path / "gone")
    assert done.returncode == 2
    assert done.stderr.decode() == "bridle: the working directory is no more; change to one that is there\n"
