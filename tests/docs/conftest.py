"""The experiments of docs/learn are scripts beside each other: they are imported from their folder."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "docs" / "learn" / "experiments"))
