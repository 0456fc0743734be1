"""Compiled layers for the tests that ask for them."""

from __future__ import annotations

import pytest

from bridle.language import layers
from tests.built import built


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> object:
    return built("layers.c", layers.load, tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def compiled(library: object, monkeypatch: pytest.MonkeyPatch) -> None:
    if isinstance(library, str):
        pytest.skip(f"not compiled: {library}")
    monkeypatch.setattr(layers, "library", library)
