"""Checkpoints appear whole or not at all, and say so when they are not what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from bridle.errors import RunError
from bridle.runs import Run
from bridle.runs.checkpoints import load_json, load_tensors, save_json, save_tensors, verify, write_text


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", "toy", {})


def save(run: Run, step: int, content: str = "weights") -> None:
    with run.checkpoint(step) as folder:
        (folder / "actor").mkdir()
        (folder / "actor" / "model").write_text(content)


def test_a_checkpoint_is_invisible_until_it_is_whole(run: Run) -> None:
    with run.checkpoint(7) as folder:
        (folder / "state").write_text("half")
        assert run.checkpoints() == []
        assert run.latest_checkpoint() is None
    latest = run.latest_checkpoint()
    assert latest is not None
    assert (latest.step, latest.path) == (7, run.path / "checkpoints" / "step-7")
    assert (latest.path / "state").read_text() == "half"


def test_an_exception_leaves_nothing_and_keeps_the_older_one(run: Run) -> None:
    save(run, 1, "first")

    def fail(step: int) -> None:
        with run.checkpoint(step) as folder:
            (folder / "actor").mkdir()
            raise KeyboardInterrupt

    for step in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            fail(step)
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-1"]
    assert (run.path / "checkpoints/step-1/actor/model").read_text() == "first"


def test_what_a_crash_left_half_written_is_not_a_checkpoint_and_is_cleared(run: Run) -> None:
    aside = run.path / "checkpoints" / ".step-3.partial"
    aside.mkdir()
    (aside / "stale").write_text("from a process that died")
    assert run.checkpoints() == []
    save(run, 3)
    assert not aside.exists()
    assert not (run.path / "checkpoints/step-3/stale").exists()


def test_saving_a_step_again_replaces_it(run: Run) -> None:
    save(run, 1, "old")
    save(run, 1, "new")
    latest = run.latest_checkpoint()
    assert latest is not None
    assert (latest.path / "actor" / "model").read_text() == "new"


def test_the_manifest_holds_size_and_checksum_of_every_file(run: Run) -> None:
    save(run, 2, "weights")
    manifest = json.loads((run.path / "checkpoints/step-2/manifest.json").read_text())
    digest = hashlib.sha256(b"weights").hexdigest()
    files = {"actor/model": {"sha256": digest, "size": 7}}
    empty = {"lines": 0, "bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    records = {"metrics.jsonl": empty, "timing.jsonl": {"lines": 0}}  # what it vouches for
    own = manifest.pop("sha256")
    assert manifest == {"format": 1, "step": 2, "files": files, "records": records}
    assert own == hashlib.sha256(json.dumps(manifest).encode()).hexdigest()


def test_a_manifest_with_any_bit_flipped_is_damaged_or_says_the_same(run: Run) -> None:
    run.record(1, {"loss": 0.5})
    save(run, 1)
    path = run.path / "checkpoints/step-1/manifest.json"
    content = path.read_bytes()
    sound, passed = json.loads(content), 0
    del sound["sha256"]
    for place in range(len(content)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << place % 7
        path.write_bytes(bytes(flipped))
        with suppress(RunError):
            verify(run.checkpoints()[0])
            passed += 1  # the space between two words, or the name of the checksum, was hit
            assert sound.items() <= json.loads(path.read_bytes()).items()
    assert 0 < passed < len(content) / 5


def test_a_manifest_without_a_checksum_of_its_own_is_an_older_one(run: Run) -> None:
    save(run, 2)
    path = run.path / "checkpoints/step-2/manifest.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "sha256"}))
    verify(run.checkpoints()[0])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("actor/model", b"weights+", "another size"),
        ("actor/model", b"wejghts", "another checksum"),
        ("actor/model", None, "is missing"),
        ("manifest.json", None, "is missing"),
        ("manifest.json", b"{", "not valid JSON"),
        ("manifest.json", b"{}", "lists no files"),
        ("manifest.json", b'{"files": {"actor/model": 3}}', "another size"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_and_noted(
    run: Run, name: str, content: bytes | None, message: str
) -> None:
    save(run, 1)
    save(run, 2)
    path = run.path / "checkpoints" / "step-2" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunError, match=message):
        verify(run.checkpoints()[-1])
    latest = run.latest_checkpoint()
    assert latest is not None
    assert latest.step == 1
    event = run.events()[-1]
    assert (event["kind"], event["step"]) == ("checkpoint_skipped", 2)
    assert message in str(event["text"])


def test_a_reader_passes_over_damage_without_writing(run: Run) -> None:
    save(run, 1)
    (run.path / "checkpoints/step-1/actor/model").unlink()
    run.close()
    assert Run.open(run.path).latest_checkpoint() is None
    assert run.events() == []


def test_prune_keeps_the_newest_and_the_named(run: Run) -> None:
    for step in (5, 10, 15, 100, 20):
        save(run, step)
    run.prune(2, keep=(5,))
    assert [c.step for c in run.checkpoints()] == [5, 20, 100]
    run.prune(1)
    assert [c.step for c in run.checkpoints()] == [100]


def test_export_appears_whole_and_replaces(run: Run) -> None:
    for text in ("first", "second"):
        with run.export("policy") as folder:
            (folder / "config.json").write_text(text)
            visible = run.path / "policy" / "config.json"
            assert not visible.exists() if text == "first" else visible.read_text() == "first"
    assert (run.path / "policy" / "config.json").read_text() == "second"
    assert not list(run.path.glob(".policy*"))


def test_tensors_come_back_bit_for_bit_tied_transposed_and_empty_ones_too(tmp_path: Path) -> None:
    weight = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    tensors = {
        "embedding": weight,
        "head": weight,
        "transposed": weight.T,
        "slice": weight[1:, ::2],
        "empty": torch.empty(0),
        "none": torch.empty(0, 3),
        "count": torch.tensor(3),
        "half": torch.tensor([1.5, math.nan, -math.inf], dtype=torch.bfloat16),
        "trained": torch.nn.Parameter(torch.ones(2)),
    }
    save_tensors(tmp_path / "a.safetensors", tensors)
    loaded = load_tensors(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].nan_to_num(9.0), tensor.detach().nan_to_num(9.0))
    assert torch.equal(weight, torch.arange(12, dtype=torch.float32).reshape(3, 4))


@pytest.mark.parametrize("length", range(1, 17))
def test_tensors_that_are_read_lie_as_those_that_were_saved(tmp_path: Path, length: int) -> None:
    """Where they did not, a product of them with a weight was rounded otherwise, and a resumed run another one."""
    memory, weight, bias = (
        torch.linspace(-1, 1, 16).view(2, 8),
        torch.linspace(-1, 1, 64).view(8, 8).sin(),
        torch.ones(8),
    )
    save_tensors(tmp_path / "a.safetensors", {"n" * length: torch.tensor(length), "z": memory})
    read = load_tensors(tmp_path / "a.safetensors")["z"]
    assert read.data_ptr() % 64 == memory.data_ptr() % 64 == 0
    linear = torch.nn.functional.linear
    assert torch.equal(linear(read, weight, bias), linear(memory, weight, bias))


def test_missing_or_damaged_tensors_are_the_users_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(RunError, match="is missing"):
        load_tensors(path)
    save_tensors(path, {"a": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(RunError, match="not a whole safetensors file"):
        load_tensors(path)


def test_json_round_trips_and_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    save_json(path, {"best": -math.inf, "seen": 3, "list": [1.5, None], "text": "é"})
    assert load_json(path) == {"best": -math.inf, "seen": 3, "list": [1.5, None], "text": "é"}
    with pytest.raises(ValueError, match="cannot be told apart"):
        save_json(path, {"text": "Infinity"})
    assert load_json(path) == {"best": -math.inf, "seen": 3, "list": [1.5, None], "text": "é"}
    write_text(path, "neu\n")
    assert path.read_text() == "neu\n"
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_a_checkpoint_of_a_newer_bridle_is_refused_by_name_and_not_taken_for_damaged(run: Run) -> None:
    save(run, 1)
    save(run, 2)
    manifest = run.path / "checkpoints/step-2/manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(RunError, match=r"step-2 is a checkpoint of format 2, and this bridle reads 1; use a newer"):
        run.latest_checkpoint()


def test_what_a_crash_left_half_done_is_mended_when_the_run_is_taken_up(run: Run) -> None:
    save(run, 1)
    with run.export("best") as folder:
        (folder / "policy").write_text("good")
    run.close()
    (run.path / "best").rename(run.path / ".best.old")  # died between the two renames of a replacement
    (run.path / "checkpoints/.step-2.partial").mkdir()
    (run.path / "checkpoints/.step-2.partial/model").write_text("half")
    (run.path / "samples/.step-2.jsonl.partial").write_text("half")
    Run.open(run.path, write=True).close()
    assert (run.path / "best/policy").read_text() == "good"
    assert not list(run.path.rglob(".*.partial")) + list(run.path.rglob(".*.old"))


def test_pruning_never_shows_half_a_checkpoint(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(run, step)

    def die(path: Path, *_: object, **__: object) -> None:
        if path.is_dir():
            (path / "manifest.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("bridle.runs.checkpoints.shutil.rmtree", die)
    with pytest.raises(KeyboardInterrupt):
        run.prune(1)
    assert [c.step for c in run.checkpoints()] == [2]


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse what would make a file longer than ``size`` bytes, as a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_line_that_does_not_fit_leaves_the_file_as_it_was(run: Run) -> None:
    run.record(1, {"loss": 0.5})
    before = (run.path / "metrics.jsonl").read_bytes()
    with files_of_at_most(len(before) + 10), pytest.raises(RunError, match=r"cannot be written \(File too large\)"):
        run.record(2, {"loss": 0.25})
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run.record(2, {"loss": 0.25})
    assert [row["step"] for row in run.metrics()] == [1, 2]


def test_a_checkpoint_that_does_not_fit_leaves_the_last_one_and_says_so_in_a_line(run: Run) -> None:
    save(run, 1)

    def fill() -> None:
        with run.checkpoint(2) as folder:
            save_tensors(folder / "big.safetensors", {"weights": torch.zeros(10_000)})

    with files_of_at_most(20_000), pytest.raises(RunError) as caught:
        fill()
    assert str(caught.value) == (
        f"{run.path} cannot be written (File too large); see to it that it can be written, "
        f"then go on with: bridle resume {run.path} (newest checkpoint: step 1)"
    )
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step-1"]
    verify(run.checkpoints()[0])
    fill()
    assert [c.step for c in run.checkpoints()] == [1, 2]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "No space left on device); free some space"),
        (errno.EDQUOT, "Disk quota exceeded); free some space"),
        (errno.EROFS, "Read-only file system); see to it that it can be written"),
    ],
)
def test_a_full_disk_a_quota_and_a_folder_for_reading_only_are_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, number: int, remedy: str
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    save(run, 1)
    monkeypatch.setattr(os, "fsync", refuse)
    for attempt in (lambda: save(run, 2), lambda: run.samples(2, [{"answer": "a"}])):
        with pytest.raises(RunError) as caught:
            attempt()
        assert remedy in str(caught.value)
    assert [c.step for c in run.checkpoints()] == [1]


def test_a_folder_that_cannot_be_locked_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run.close()

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\); make it writable, or copy it"):
        Run.open(run.path, write=True)


def test_a_process_that_outlives_the_run_does_not_hold_its_lock(run: Run) -> None:
    ready, tell = os.pipe()
    wait, go = os.pipe()
    child = os.fork()
    if child == 0:  # like the process of an environment
        os.write(tell, b"1")
        os.read(wait, 1)
        os._exit(0)
    os.read(ready, 1)
    with pytest.raises(RunError, match="in use"):
        Run.open(run.path, write=True)
    run.close()  # as its death would
    try:
        Run.open(run.path, write=True).close()
    finally:
        os.write(go, b"1")
        os.waitpid(child, 0)
        for descriptor in (ready, tell, wait, go):
            os.close(descriptor)


def test_a_beginning_that_died_at_once_is_begun_again(tmp_path: Path) -> None:
    for name in ("samples", "checkpoints", "faults"):
        (tmp_path / "run" / name).mkdir(parents=True)
    (tmp_path / "run" / ".lock").touch()
    Run.create(tmp_path / "run", "toy", {}).close()
    with pytest.raises(RunError, match="is not empty"):
        Run.create(tmp_path / "run", "toy", {})
    (tmp_path / "other" / "samples").mkdir(parents=True)
    (tmp_path / "other" / "samples" / "mine.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty"):
        Run.create(tmp_path / "other", "toy", {})


def test_lines_that_a_power_cut_tore_at_once_are_all_dropped_before_it_is_said(run: Run) -> None:
    run.event("start", "started")
    run.record(1, {"loss": 0.5})
    run.close()
    for name in ("metrics.jsonl", "events.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(b'{"step": 2, "l')
    Run.open(run.path, write=True).close()
    assert [row["step"] for row in run.metrics()] == [1]
    texts = [event["text"] for event in run.events()]
    assert texts == ["started", *(f"dropped a torn last line of {name}.jsonl" for name in ("metrics", "events"))]


def test_a_run_that_cannot_be_taken_up_is_let_go_of(run: Run) -> None:
    run.record(1, {"loss": 0.5})
    save(run, 1)
    run.close()
    whole = (run.path / "metrics.jsonl").read_bytes()
    (run.path / "metrics.jsonl").write_bytes(b"rubbish\n")
    with pytest.raises(RunError, match="line 1 is damaged"):
        Run.open(run.path, write=True)
    (run.path / "metrics.jsonl").write_bytes(whole)
    Run.open(run.path, write=True).close()


def test_a_system_that_refuses_to_prune_or_rewind_is_quoted_in_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        run.record(step, {"loss": 0.5})
        save(run, step)

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "rename", refuse)
    for act in (lambda: run.prune(1), lambda: run.rewind(1)):
        with pytest.raises(RunError, match=r"cannot be written \(Read-only file system\)"):
            act()
    assert [c.step for c in run.checkpoints()] == [1, 2]
