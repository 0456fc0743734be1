"""docs/EXACT.md says what was measured, and what it says holds here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gymnasium")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def exactness() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exactness", ROOT / "bench" / "exactness.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_shows_the_committed_figures(exactness: ModuleType) -> None:
    text = (ROOT / "docs" / "EXACT.md").read_text()
    assert exactness.page(text) == text
    assert "| sft | just so once more | **equal to the bit** |" in text


def test_order_and_micro_batch_change_rounding_only(exactness: ModuleType) -> None:
    """The law behind the table: one normaliser for the whole batch, so the first gradient moves by float32's rounding."""
    found = exactness.measure(("sft",))["sft"]
    assert found["again"] == {"metrics_equal": True, "weights_equal": True, "weights": 0, "loss": 0, "grad_norm": 0}
    for change in ("order", "micro"):
        assert found[change]["loss"] < 1e-6
        assert found[change]["grad_norm"] < 1e-5
