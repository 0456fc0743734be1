"""Taking a directory for a run: one process gets it, whatever the others do meanwhile, and a release leaves no trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from bridle.errors import RunError
from bridle.runs import Run, places, reserve


def below(path: Path) -> list[str]:
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_a_release_leaves_everything_as_it_was(tmp_path: Path) -> None:
    reserve(tmp_path / "deep" / "run").release()
    assert below(tmp_path) == []
    (tmp_path / "empty").mkdir()
    held = reserve(tmp_path / "empty")
    assert below(tmp_path) == ["empty", "empty/.lock"]
    held.release()
    assert below(tmp_path) == ["empty"]


def test_a_discarded_run_leaves_the_empty_directory_that_it_was_given(tmp_path: Path) -> None:
    (tmp_path / "given").mkdir()
    for path in (tmp_path / "given", tmp_path / "new" / "run"):
        Run.create(path, "toy", {}).discard()
    assert below(tmp_path) == ["given"]


def test_what_is_held_is_in_use_until_it_becomes_a_run(tmp_path: Path) -> None:
    held = reserve(tmp_path / "run")
    with pytest.raises(RunError, match="in use by another process"):
        reserve(tmp_path / "run")
    with Run.create(held, "toy", {"a": 1}) as run:
        assert run.config == {"a": 1}
        with pytest.raises(RunError, match="is not empty"):
            reserve(tmp_path / "run")
    with pytest.raises(RunError, match="or `bridle resume"):
        reserve(tmp_path / "run")


def between(monkeypatch: pytest.MonkeyPatch, act: object) -> None:
    """Let ``act`` happen once, after the lock's file was opened and before it is locked."""
    own, left = places._lock, [act]

    def lock(descriptor: int) -> None:
        if left:
            left.pop()()  # type: ignore[operator]
        own(descriptor)

    monkeypatch.setattr(places, "_lock", lock)


def test_a_run_that_began_and_ended_since_the_directory_was_empty_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other() -> None:
        with Run.create(tmp_path / "run", "other", {"whose": "other"}) as run:
            run.record(1, {"loss": 0.5})

    between(monkeypatch, other)
    with pytest.raises(RunError, match="is not empty"):
        Run.create(tmp_path / "run", "toy", {})
    run = Run.open(tmp_path / "run", write=True)  # nobody holds it
    assert (run.job, run.config, len(run.metrics())) == ("other", {"whose": "other"}, 1)


@pytest.mark.parametrize("again", [False, True])
def test_a_lock_that_was_taken_away_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    first = reserve(tmp_path / "run")

    def other() -> None:
        first.release()
        if again:
            reserve(tmp_path / "run")

    between(monkeypatch, other)
    with pytest.raises(RunError, match="in use by another process"):
        reserve(tmp_path / "run")
    assert below(tmp_path) == (["run", "run/.lock"] if again else [])


def test_of_many_at_once_one_gets_it(tmp_path: Path) -> None:
    together = Barrier(4)

    def attempt(number: int) -> str:
        together.wait()
        try:
            Run.create(tmp_path / str(number // 4) / "run", "toy", {"who": number}).close()
        except RunError:
            return "refused"
        return "made"

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(attempt, range(80)))
    assert [found[4 * k : 4 * k + 4].count("made") for k in range(20)] == [1] * 20
