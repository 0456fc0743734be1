"""A parent that is killed leaves no environment's process behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a child with its parent")

PARENT = """
import sys
from bridle.control.making import WorldSettings, make_world
world = make_world("CartPole-v1", WorldSettings(num_envs=3, vectorization="async"))
world.reset(0)
print(*[process.pid for process in world._envs.processes], flush=True)
sys.stdin.read()
"""


def test_a_parent_that_is_killed_leaves_none() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert parent.stdin is not None
    assert parent.stdout is not None
    children = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(children) == 3
    watched = [os.pidfd_open(pid) for pid in children]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for descriptor in watched:  # readable once its process has ended
        assert select.select([descriptor], [], [], 30.0)[0]
        os.close(descriptor)
    parent.stdin.close()
    parent.stdout.close()
