"""What a run depends on is found out by content, and what changed is named."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

from bridle.runs import depends
from bridle.runs.depends import Difference, Sources, differences, source_of, take_stock


def stock(folder: Path, *, packages: tuple[str, ...] = (), threads: int = 1) -> dict[str, object]:
    files = {path.name: path for path in sorted(folder.iterdir())}
    return dict(take_stock(Sources(packages=packages, files=files), device="cpu", threads=threads))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data.jsonl").write_text("rows")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(b"numbers")
    (tmp_path / "model" / "README.md").write_text("words")
    return tmp_path


def test_files_are_known_by_their_content(folder: Path) -> None:
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in (("d", b"rows"), ("m", b"numbers"))}
    assert stock(folder)["files"] == {
        "data.jsonl": {"data.jsonl": digests["d"]},
        "model": {"weights.safetensors": digests["m"]},
    }


def test_nothing_changed_is_no_difference_also_after_a_copy(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    before = stock(folder)
    (folder / "model" / "README.md").write_text("other words, which no number depends on")
    assert differences(before, stock(folder)) == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.jsonl", b"rowz", "data.jsonl: the content of data.jsonl is "),
        ("model/weights.safetensors", b"numberz", "model: the content of weights.safetensors is "),
        ("model/config.json", b"{}", "model: the content of config.json is 44136fa355b3… and was not there"),
    ],
)
def test_a_changed_file_is_named(folder: Path, name: str, content: bytes, said: str) -> None:
    before = stock(folder)
    (folder / name).write_bytes(content)
    (found,) = differences(before, stock(folder))
    assert str(found).startswith(said)
    assert found.now == hashlib.sha256(content).hexdigest()


def test_threads_are_part_of_it(folder: Path) -> None:
    found = differences(stock(folder, threads=2), stock(folder, threads=1))
    assert found == [Difference(what="threads", now=1, was=2, remedy="set OMP_NUM_THREADS=2")]


def test_another_version_of_a_package_is_named_with_the_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = stock(folder, packages=("gymnasium",))
    own = depends.version_of
    monkeypatch.setattr(depends, "version_of", lambda name: "9.9" if name == "torch" else own(name))
    (found,) = differences(before, stock(folder, packages=("gymnasium",)))
    assert str(found) == f"torch is 9.9 and was {own('torch')}"
    assert found.remedy == f"pip install torch=={own('torch')}"


def test_a_package_that_the_job_does_not_use_is_not_looked_at(folder: Path) -> None:
    assert "gymnasium" not in stock(folder)["code"]  # type: ignore[operator]


def test_a_functions_source_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source_of("bridle.runs.depends:source_of") == Path(depends.__file__)
    assert source_of("some/judge.py:score") == Path("some/judge.py")
    assert source_of("math:sin") is None
    monkeypatch.setitem(sys.modules, "made_here", ModuleType("made_here"))
    assert source_of("made_here:f") is None
