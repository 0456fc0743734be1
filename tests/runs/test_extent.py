"""A run whose records were shortened, altered or taken away is not taken up as if they were whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from bridle.errors import RunError
from bridle.runs import Run
from bridle.runs.checkpoints import load_json
from bridle.runs.extent import missing
from tests.jobs.test_session import ToyConfig, settings, toy


@pytest.fixture
def config(tmp_path: Path) -> ToyConfig:
    """Eight steps of ten, the newest checkpoint after the eighth; samples at each step."""
    config = ToyConfig(run=settings(tmp_path))
    toy(config, at=lambda step, session: session.run.samples(step, [{"answer": "x" * step}]))
    shutil.rmtree(config.run.dir / "checkpoints" / "step-10")
    return config


def cut(path: Path, lines: int) -> None:
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def alter(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"state": 2', b'"state": 3', 1))


def without(path: Path, line: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[: line - 1] + lines[line:]))


def twice(path: Path, line: int) -> None:
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:line] + lines[line - 1 :]))


def older(manifest: Path) -> dict[str, object]:
    """What a manifest says, without its own checksum."""
    return {name: value for name, value in json.loads(manifest.read_text()).items() if name != "sha256"}


CASES = {
    "metrics cut": (lambda run: cut(run / "metrics.jsonl", 6), "metrics.jsonl has 6 of the 8 lines before", "step 6"),
    "metrics gone": (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl has 0 of the 8 lines before", ""),
    "a line left out": (lambda run: without(run / "metrics.jsonl", 3), "metrics.jsonl has 7 of the 8 lines", "step 8"),
    "a line twice": (lambda run: twice(run / "metrics.jsonl", 3), "metrics.jsonl has 9 lines before", "and had 8"),
    "a number altered": (
        lambda run: alter(run / "metrics.jsonl"),
        "metrics.jsonl was altered in the 8 lines",
        "step 8",
    ),
    "timing cut": (lambda run: cut(run / "timing.jsonl", 7), "timing.jsonl has 7 of the 8 lines before", "step 7"),
    "timing without a line": (lambda run: without(run / "timing.jsonl", 2), "timing.jsonl has 7 of the 8", "step 8"),
    "samples gone": (lambda run: (run / "samples/step-3.jsonl").unlink(), "samples/step-3.jsonl is missing", "step 8"),
    "samples cut": (
        lambda run: cut(run / "samples/step-8.jsonl", 0),
        "samples/step-8.jsonl has another size",
        "step 8",
    ),
    "no samples": (
        lambda run: [path.unlink() for path in (run / "samples").iterdir()],
        "step 8 (and 7 more files of samples)",
        "",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_refused_by_name_and_goes_on_when_forced(config: ToyConfig, case: str) -> None:
    spoil, said, until = CASES[case]
    spoil(config.run.dir)
    with pytest.raises(RunError, match=rf"{re.escape(said)}.*{until}.*--force`$"):
        toy(config, resume=True)
    toy(config, resume=True, force=True)
    (event,) = [event for event in Run.open(config.run.dir).events() if event["kind"] == "forced"]
    assert said in str(event["text"])
    head = load_json(config.run.dir / "config.json")
    assert isinstance(head, dict)
    assert said in head["lineage"][0]["changes"][0]  # type: ignore[index,call-overload]
    shutil.rmtree(config.run.dir / "checkpoints" / "step-10")
    with pytest.raises(RunError, match=re.escape(said)):  # of the older checkpoint, as it was
        toy(config, resume=True)


def test_what_comes_after_the_checkpoint_may_be_missing(config: ToyConfig) -> None:
    whole = (config.run.dir / "metrics.jsonl").read_bytes()
    for name in ("metrics.jsonl", "timing.jsonl"):
        cut(config.run.dir / name, 8)
    (config.run.dir / "samples" / "step-9.jsonl").unlink()
    toy(config, resume=True)
    assert (config.run.dir / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize(("records", "found"), [(None, 0), ({"metrics.jsonl": 8, "timing.jsonl": 8}, 1)])
def test_older_manifests_count_lines_alone_or_nothing(config: ToyConfig, records: object, found: int) -> None:
    path = config.run.dir / "checkpoints" / "step-8" / "manifest.json"
    path.write_text(json.dumps({**older(path), "records": records}))
    cut(config.run.dir / "metrics.jsonl", 6)
    (config.run.dir / "samples" / "step-3.jsonl").unlink()
    newest = Run.open(config.run.dir).latest_checkpoint()
    assert newest is not None
    assert len(missing(config.run.dir, newest)) == found


def test_a_manifest_that_names_other_files_reads_none_of_them(config: ToyConfig) -> None:
    path = config.run.dir / "checkpoints" / "step-8" / "manifest.json"
    odd = {"../secret": {"lines": 3}, "samples/\0": {"bytes": 1}, "metrics.jsonl": [1], "timing.jsonl": {"lines": "8"}}
    path.write_text(json.dumps({**older(path), "records": odd}))
    with pytest.raises(RunError, match="is missing"):
        toy(config, resume=True)
