"""Fuzzing in its short form: fixed mutants of sound inputs, what once crashed, and properties over drawn values."""

from __future__ import annotations

import json
import time
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridle.errors import DataError, RunError
from bridle.language.data import DataSettings, read_demonstrations, read_preferences
from bridle.runs.files import append_line, load_json, read_lines, save_json
from tests.fuzz.targets import TARGETS, Target, try_one

CRASHES = Path(__file__).parent / "crashes"
MUTANTS = {"words": 40, "data": 150, "config": 100, "policy": 80, "adapter": 80}
"""Target → mutants; 60 where nothing is said; a job's command line takes tens of milliseconds, all else a few at most."""


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def test_sound_inputs_are_taken(target: Target, tmp_path: Path) -> None:
    target.prepare(tmp_path)
    assert [try_one(target, data, tmp_path) for data in target.seeds(tmp_path)] == [""] * len(target.seeds(tmp_path))


def test_mutants_are_taken_or_refused_in_a_line(target: Target, tmp_path: Path) -> None:
    target.prepare(tmp_path)
    draws, pool, refused = Random(target.name), target.seeds(tmp_path), 0
    mutants = MUTANTS.get(target.name, 60)
    for number in range(mutants):
        data = (target.vary, target.mutate)[number % 2](draws.choice(pool), draws)[:20_000]
        began = time.process_time()
        refusal = try_one(target, data, tmp_path)
        assert time.process_time() - began < 5, data[:200]
        refused += bool(refusal)
        if not refusal and len(pool) < 200:
            pool.append(data)  # an accepted mutant is a parent too
    assert mutants // 10 < refused < mutants * 9 // 10


@pytest.mark.parametrize("name", sorted(path.name for path in CRASHES.glob("*-*")))
def test_what_once_crashed_does_no_more(name: str, tmp_path: Path) -> None:
    target = TARGETS[name.partition("-")[0]]
    target.prepare(tmp_path)
    began = time.process_time()
    try_one(target, (CRASHES / name).read_bytes(), tmp_path)
    assert time.process_time() - began < 5


def test_the_watch_sees_what_is_no_refusal(tmp_path: Path) -> None:
    def crash(data: bytes, folder: Path) -> None:
        raise KeyError(data)

    target = Target(name="t", prepare=lambda folder: None, seeds=lambda folder: [b""], run=crash, reads=())
    with pytest.raises(KeyError):
        try_one(target, b"", tmp_path)


TEXTS = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | TEXTS.filter(lambda t: "n" not in t.lower()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=4))
def test_any_text_comes_back_from_jsonl(tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[str, str]]) -> None:
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": a, "answer": b}) + "\n" for a, b in pairs))
    found = read_demonstrations(DataSettings(path=str(path))).items
    assert [(record.prompt, record.answer) for record in found] == pairs  # type: ignore[union-attr]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), min_size=1, max_size=4))
def test_any_record_of_json_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]]
) -> None:
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "chosen": "b", **row}) + "\n" for row in rows))
    refusal = ""
    try:
        read_preferences(DataSettings(path=str(path)))
    except DataError as error:
        refusal = str(error)
    assert not refusal or refusal.startswith(f"{path} ")


@settings(derandomize=True, max_examples=80, deadline=None)
@given(VALUES)
def test_any_value_comes_back_from_a_file_of_the_run(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.mktemp("d") / "v.json"
    save_json(path, value)  # type: ignore[arg-type]
    assert repr(load_json(path)) == repr(value)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.lists(st.dictionaries(TEXTS, VALUES, max_size=3), max_size=4), st.binary(max_size=12))
def test_records_come_back_but_for_a_torn_last_line(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, object]], torn: bytes
) -> None:
    path = tmp_path_factory.mktemp("d") / "m.jsonl"
    path.touch()
    for row in rows:
        append_line(path, row)  # type: ignore[arg-type]
    with path.open("ab") as file:
        file.write(torn.replace(b"\n", b""))
    assert repr(read_lines(path)) == repr(rows)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_read_as_json_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("d") / "v.json"
    path.write_bytes(content)
    refusal = ""
    try:
        load_json(path)
    except RunError as error:
        refusal = str(error)
    assert "\n" not in refusal
