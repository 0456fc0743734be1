"""The model of a power loss against what POSIX says of single operations, worked out by hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from bridle.runs import Run
from tests.power import Disk


def _sync(disk: Disk, path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    disk.sync(descriptor)
    os.close(descriptor)


def _left(disk: Disk, folder: Path, kept: float, seed: int = 0) -> dict[str, bytes]:
    target = folder / f"left-{kept}-{seed}"
    disk.lose_power(target, np.random.default_rng(seed), kept=kept)
    return {path.relative_to(target).as_posix(): path.read_bytes() for path in target.rglob("*") if path.is_file()}


def _root(folder: Path) -> Path:
    root = folder / "root"
    root.mkdir()
    return root


def test_a_new_file_needs_its_own_fsync_and_its_folders(tmp_path: Path) -> None:
    root = _root(tmp_path)
    disk = Disk(root)
    (root / "a").write_bytes(b"text")
    assert _left(disk, tmp_path, 0.0) == {}
    _sync(disk, root / "a")
    assert _left(disk, tmp_path, 0.0, 1) == {}  # durable, and no name leads to it
    _sync(disk, root)
    assert _left(disk, tmp_path, 0.0, 2) == {"a": b"text"}


def test_a_name_that_is_durable_before_its_content_shows_an_empty_file(tmp_path: Path) -> None:
    root = _root(tmp_path)
    disk = Disk(root)
    (root / "a").write_bytes(b"text")
    _sync(disk, root)
    assert _left(disk, tmp_path, 0.0) == {"a": b""}


def test_a_rename_over_a_file_leaves_the_old_or_the_new_and_never_neither(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "a").write_bytes(b"old")
    disk = Disk(root)
    (root / ".a").write_bytes(b"new")
    _sync(disk, root / ".a")
    (root / ".a").replace(root / "a")
    found = [_left(disk, tmp_path, 0.5, seed) for seed in range(30)]
    assert {tuple(left.items()) for left in found} == {(("a", b"old"),), (("a", b"new"),)}


def test_what_is_appended_may_be_there_in_part_or_as_zeros_after_what_was_durable(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "log").write_bytes(b"one\n")
    disk = Disk(root)
    with (root / "log").open("ab") as file:
        file.write(b"two\nthree\n")
    left = {_left(disk, tmp_path, 0.8, seed)["log"] for seed in range(60)}
    assert {b"one\n", b"one\ntwo\nthree\n"} < left
    assert all(content.startswith(b"one\n") and len(content) <= 14 for content in left)
    assert any(b"\0" in content for content in left)


def test_files_taken_away_may_be_back_one_by_one(tmp_path: Path) -> None:
    root = _root(tmp_path)
    for name in ("a", "b", "c"):
        (root / name).write_bytes(name.encode())
    disk = Disk(root)
    for name in ("a", "b", "c"):
        (root / name).unlink()
    sizes = {len(_left(disk, tmp_path, 0.5, seed)) for seed in range(30)}
    assert sizes == {0, 1, 2, 3}
    _sync(disk, root)
    assert _left(disk, tmp_path, 0.5, 99) == {}


def test_the_number_of_an_inode_is_not_taken_for_another_file(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "a").write_bytes(b"old")
    disk = Disk(root)
    (root / "a").unlink()
    (root / "b").write_bytes(b"new")
    _sync(disk, root)
    assert _left(disk, tmp_path, 0.0) == {"b": b""}


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_what_a_run_has_saved_survives_a_loss_of_power(
    kept: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _root(tmp_path)
    disk = Disk(root)
    fsync = os.fsync

    def durably(descriptor: int) -> None:
        fsync(descriptor)
        disk.sync(descriptor)

    monkeypatch.setattr(os, "fsync", durably)
    with Run.create(root / "runs" / "a", "job", {"rate": 0.5}) as run:
        for step in range(1, 5):
            run.record(step, {"loss": 1 / step})
            run.samples(step, [{"text": "said"}])
            run.event("memory", "halved", step=step)
            if step % 2 == 0:
                with run.checkpoint(step) as folder:
                    (folder / "state").write_bytes(bytes([step]))
                run.prune(1)
        for seed in range(20):
            left = tmp_path / f"left-{seed}"
            disk.lose_power(left, np.random.default_rng(seed), kept=kept)
            with Run.open(left / "runs" / "a", write=True) as found:
                newest = found.latest_checkpoint()
                assert newest is not None
                assert newest.step == 4
                found.rewind(4)
                assert found.metrics() == [{"step": step, "loss": 1 / step} for step in range(1, 5)]
                halved = [event["step"] for event in found.events() if event["kind"] == "memory"]
                assert halved == [1, 2, 3, 4]  # what a resume computes with
                assert [found.read_samples(step) for step in range(1, 5)] == [[{"text": "said"}]] * 4
