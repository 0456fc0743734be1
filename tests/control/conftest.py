from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bridle.control import compiled
from tests.built import HERE, built
from tests.control import worlds

worlds.register()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Networks this small are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=HERE)
def small_library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> object:
    """What small.c comes to for each kind of processor that this one can stand for, or why there is nothing."""
    return built("small.c", compiled.load, tmp_path_factory.mktemp("compiled"), request.param)


@pytest.fixture(scope="module")
def small_code(small_library: object) -> Iterator[None]:
    """Small networks run in that."""
    if isinstance(small_library, str):
        pytest.skip(f"not compiled: {small_library}")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(compiled, "library", small_library)
        yield
