"""The short form of scripts/torture: a few kills for each job, in a process that imports once and forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("gymnasium")

KILLS = 5
ROOT = Path(__file__).resolve().parents[2]


def test_runs_that_were_killed_end_as_those_that_were_left_alone(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.torture", "--kills", str(KILLS), "--seed", "1"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "found.json")], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["files_that_differ"] == 0
    assert set(found["jobs"]) == {"control ppo", "control a2c", "sft", "reward", "ppo"}
    assert all(one["kills"] >= KILLS and one["runs_resumed_to_the_end"] >= 1 for one in found["jobs"].values())
