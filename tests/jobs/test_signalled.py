"""What is sent to all of a run's processes at once stops the run after its step, and none of its environments before."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there are no process groups")


def test_a_signal_to_the_whole_group_finishes_the_step_and_saves(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.jobs.signalled", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 3
    for name, one in found.items():
        *_, asked, last = one["said"].splitlines()
        assert asked == "stopping after this step; once more to stop now", (name, one["said"])
        assert f"stopped after step {one['checkpoint']}; go on with: " in last
        assert (one["code"], one["state"]) == (130, "stopped")
        assert one["checkpoint"] == one["steps"] >= 3
