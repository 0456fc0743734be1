"""Compiled layers for the tests that ask for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bridle.language import layers
from bridle.native.compiling import SOURCES, compile_source, compiled_from


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> object:
    """What was compiled on installing, if it is of the present source; else it is compiled here, which takes seconds."""
    place = tmp_path_factory.mktemp("compiled") / "_layers.so"
    return layers.load(compiled_from(SOURCES[1])) or compile_source(SOURCES[1], place) or layers.load(place)


@pytest.fixture
def compiled(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(library, str):
        pytest.skip(f"not compiled: {library}")
    monkeypatch.setattr(layers, "library", library)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
