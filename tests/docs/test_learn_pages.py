"""The pages of docs/learn: their code runs, their commands and links exist, their numbers are those of their figures."""

from __future__ import annotations

import doctest
import io
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from learn_page import Experiment, differences, passage, run, with_passage

ROOT = Path(__file__).resolve().parents[2]
LEARN = ROOT / "docs" / "learn"
NAMES = sorted(path.stem for path in (LEARN / "experiments").glob("*.py") if not path.stem.startswith("learn_"))
PAGES = sorted(path for path in LEARN.glob("*.md") if path.name != "comparison.md")
IDEAS = [path for path in PAGES if path.name != "README.md"]
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)


def experiment(name: str) -> Experiment:
    found = import_module(name).EXPERIMENT
    assert isinstance(found, Experiment)
    assert found.name == name
    return found


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def failures(blocks: list[str], name: str) -> tuple[int, int, str]:
    """Run the blocks of one page one after the other, as one session: (examples, failures, what doctest says)."""
    report = io.StringIO()
    runner = doctest.DocTestRunner(verbose=False)
    space: dict[str, object] = {}
    for block in blocks:
        test = doctest.DocTestParser().get_doctest(block, space, name, None, 0)
        runner.run(test, out=report.write, clear_globs=False)
        space = test.globs
    return runner.tries, runner.failures, report.getvalue()


@pytest.mark.parametrize("page", IDEAS, ids=lambda path: path.stem)
def test_the_code_of_a_page_runs_and_prints_what_it_says(page: Path) -> None:
    blocks = code_blocks(page.read_text())
    assert blocks
    assert all(block.startswith(">>> ") for block in blocks)
    tried, failed, report = failures(blocks, page.name)
    assert tried >= 3
    assert failed == 0, report


def test_a_wrong_result_in_a_page_is_seen() -> None:
    assert failures([">>> x = 1 + 1\n", ">>> x\n3\n"], "page")[:2] == (2, 1)


@by_name
def test_links_and_pictures_exist_and_pictures_are_small(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    assert targets
    for target in targets:
        assert (page.parent / target).is_file(), target
        if target.endswith(".png"):
            assert (page.parent / target).stat().st_size < 100_000, target


def test_every_idea_has_its_page_in_the_way_in() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", (LEARN / "README.md").read_text()))
    assert {path.name for path in IDEAS} <= linked


def test_every_command_exists_and_every_experiment_has_a_page() -> None:
    commands = {
        found for page in PAGES for found in re.findall(r"python docs/learn/experiments/(\w+)\.py", page.read_text())
    }
    assert commands == set(NAMES)
    figures = {path.name for path in (LEARN / "figures").iterdir()}
    assert {f"{name}.{end}" for name in NAMES for end in ("json", "png")} <= figures


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_in_the_pages_are_those_of_the_committed_figures(name: str) -> None:
    found = experiment(name)
    text = passage(found.seen(found.figures))
    marked = [page for page in PAGES if f"<!-- {name} -->" in page.read_text()]
    assert marked
    for page in marked:
        assert with_passage(page.read_text(), name, text) == page.read_text(), page.name
        assert f"experiments/{name}.py" in page.read_text()
        assert f"figures/{name}.png" in page.read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_can_be_drawn_from_the_committed_figures(name: str) -> None:
    pytest.importorskip("matplotlib")
    found = experiment(name)
    drawn = io.BytesIO()
    found.draw(found.figures).savefig(drawn, format="png", dpi=40)
    assert drawn.getvalue().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["clipped_surrogate", "gae_weights"])
def test_check_finds_the_committed_figures(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(experiment(name), ["--check"]) == 0
    assert "as committed" in capsys.readouterr().out


def test_check_sees_a_figure_that_moved() -> None:
    figures = {"a": [1.0, 2.0], "b": {"c": "x", "d": 5}}
    same = json.loads(json.dumps(figures))
    assert list(differences(same, figures, 1e-3)) == []
    for moved in (
        {"a": [1.0, 2.01], "b": {"c": "x", "d": 5}},
        {"a": [1.0], "b": {"c": "x", "d": 5}},
        {"a": [1.0, 2.0], "b": {"c": "y", "d": 5}},
        {"a": [1.0, 2.0], "b": {"c": "x"}},
        {"a": [1.0, float("nan")], "b": {"c": "x", "d": 5}},
    ):
        assert len(list(differences(moved, figures, 1e-3))) == 1
