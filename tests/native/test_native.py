"""What compiles the code in C, and what opens it: of the present source alone, and with a line where it cannot be had."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bridle.native.compiling import SOURCES, compile_source, compiled_from
from bridle.native.loading import load_library

TWICE = """#include <stdint.h>
int64_t told(void) __attribute__((visibility("default")));
int64_t told(void) { return SOURCE; }
double twice(double x) __attribute__((visibility("default")));
double twice(double x) { return 2 * x; }
"""
FUNCTIONS = {"twice": (ctypes.c_double, [ctypes.c_double])}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    place = tmp_path / "twice.c"
    place.write_text(TWICE)
    problem = compile_source(place, compiled_from(place))
    if problem:
        pytest.skip(f"not compiled: {problem}")
    return place


def test_what_is_compiled_can_be_called(source: Path) -> None:
    library = load_library(source.with_name("_twice.so"), source, FUNCTIONS, "told")
    assert library.twice(3.0) == 6.0


def test_what_was_built_from_another_source_is_not_opened(source: Path) -> None:
    """As where the source has been renewed and nobody has compiled it since: structures may lie otherwise."""
    library = compiled_from(source)
    assert load_library(library, source, FUNCTIONS, "not_told") is None
    source.write_text(TWICE + "/* newer */\n")
    assert load_library(library, source, FUNCTIONS, "told") is None
    assert load_library(library.with_name("gone.so"), source, FUNCTIONS, "told") is None
    foreign = library.with_name("foreign.so")
    foreign.write_bytes(b"no library")
    assert load_library(foreign, source, FUNCTIONS, "told") is None


@pytest.mark.parametrize("name", ["types.h", "../other/types.h"])
def test_a_source_is_another_where_a_header_of_it_is(name: str, tmp_path: Path) -> None:
    """Headers include by what lies beside themselves, not beside the source."""
    place, header, inner = (tmp_path / "here" / one for one in ("twice.c", name, f"{name[:-2]}_inner.h"))
    place.parent.mkdir()
    header.parent.mkdir(exist_ok=True)
    inner.write_text("#include <stdint.h>\n")
    header.write_text(f'#include "{inner.name}"\n')
    place.write_text(TWICE.replace("<stdint.h>", f'"{name}"'))
    problem = compile_source(place, compiled_from(place))
    if problem:
        pytest.skip(f"not compiled: {problem}")
    assert load_library(compiled_from(place), place, FUNCTIONS, "told").twice(3.0) == 6.0
    inner.write_text("#include <stdint.h>\ntypedef int64_t count;\n")
    assert load_library(compiled_from(place), place, FUNCTIONS, "told") is None


def test_every_source_is_known() -> None:
    """What is not in SOURCES would not be compiled on installing."""
    assert sorted(SOURCES) == sorted(SOURCES[0].parents[1].rglob("*.c"))


@pytest.mark.parametrize(
    ("compiler", "words"),
    [
        ("no-such-compiler -O1", "there is no C compiler 'no-such-compiler -O1'"),
        ("cc 'x", r"CC=.cc 'x. cannot be read: No closing quotation"),
        ("false", "false said: nothing, and left with exit code 1"),
    ],
)
def test_a_compiler_that_does_not_compile_is_named(
    compiler: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CC", compiler)
    problem = compile_source(SOURCES[0], tmp_path / "_small.so")
    assert problem is not None
    assert re.fullmatch(words, problem.replace('"', "'"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("asked", "code"), [("--help", 0), ("small.c", 2)])
def test_asked_how_it_is_used_it_compiles_nothing(asked: str, code: int) -> None:
    nowhere = {**os.environ, "CC": "/nowhere/cc"}
    module = [sys.executable, "-m", "bridle.native.compiling", asked]
    done = subprocess.run(module, env=nowhere, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (code, "")
    assert done.stdout.startswith("usage: python -m bridle.native.compiling\n")
