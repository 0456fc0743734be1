"""What every room's tests share: checked shapes in core, a deterministic hypothesis, the real data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from jaxtyping import config as jaxtyping_config
from jaxtyping import install_import_hook

# The hook must be in place before anything imports bridle; it stays for the whole session, so no handle is kept.
# The numeric tower lets an int stand where a float is annotated, as PEP 484 and mypy do.
install_import_hook("bridle.core", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

settings.register_profile("bridle", derandomize=True, deadline=None, print_blob=True, max_examples=40)
settings.load_profile("bridle")

# The tensors of tests are small: more threads would only wait for each other.
torch.set_num_threads(1)

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real models and data beside the project; the test skips where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data is not there: ../shared/data from the project's root")
    return SHARED_DATA


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """PyTorch's threads, among which compiled code shares its work out: one, and more than tests have."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Switch jaxtyping's checks off, so that a test sees what a user sees: core's own ValueError."""
    before = jaxtyping_config.jaxtyping_disable
    jaxtyping_config.update("jaxtyping_disable", True)
    yield
    jaxtyping_config.update("jaxtyping_disable", before)
