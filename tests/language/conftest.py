"""Compiled layers for the tests that ask for them: of training and of writing texts."""

from __future__ import annotations

from types import ModuleType

import pytest

from bridle.language import decoding, layers
from tests.built import HERE, built


@pytest.fixture(scope="session", params=HERE)
def libraries(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[ModuleType, object]:
    return {
        room: built(f"{name}.c", room.load, tmp_path_factory.mktemp(name), request.param)
        for name, room in (("layers", layers), ("decoding", decoding))
    }


@pytest.fixture
def compiled(libraries: dict[ModuleType, object], monkeypatch: pytest.MonkeyPatch) -> None:
    for room, library in libraries.items():
        if isinstance(library, str):
            pytest.skip(f"not compiled: {library}")
        monkeypatch.setattr(room, "library", library)
