"""How a finished policy is judged, and what a result says about itself: the same for every side of a comparison.

Imported by Bridle's side and by each peer's, so it needs gymnasium and NumPy alone.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from importlib import metadata, util
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

EVALUATION_SEED = 1_000_000
EVALUATION_EPISODES = 100
ABREAST = 25

Act = Callable[[np.ndarray], np.ndarray]


def judge(env_id: str, act: Act, *, episodes: int = EVALUATION_EPISODES) -> dict[str, list[float]]:
    """Play ``episodes`` whole episodes; episode i is reset with seed ``EVALUATION_SEED + i``, whoever plays it.

    ``act`` maps raw observations ``[n, …]`` to the deterministic policy's actions ``[n, …]``, within the action space.
    """
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=int)
    for start in range(0, episodes, ABREAST):
        running = {i: gymnasium.make(env_id) for i in range(start, min(start + ABREAST, episodes))}
        observations = {i: env.reset(seed=EVALUATION_SEED + i)[0] for i, env in running.items()}
        while running:
            chosen = act(np.stack([observations[i] for i in running]))
            for i, action in zip(list(running), chosen, strict=True):
                observations[i], reward, terminated, truncated, _ = running[i].step(action)
                returns[i] += float(reward)
                lengths[i] += 1
                if terminated or truncated:
                    running.pop(i).close()
    return {"returns": returns.tolist(), "lengths": lengths.tolist()}


def versions(*packages: str) -> dict[str, str]:
    """What ran: the interpreter and the packages, those that are absent left out."""
    names = ("torch", "numpy", "gymnasium", "mujoco", "box2d", *packages)
    found = {name: metadata.version(name) for name in names if util.find_spec("Box2D" if name == "box2d" else name)}
    return {"python": platform.python_version(), **found}


def machine() -> dict[str, Any]:
    """What it ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": model, "cores": os.cpu_count()}


def write(place: Path, result: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = place.with_suffix(".part")
    draft.write_text(json.dumps(result) + "\n")
    draft.replace(place)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
