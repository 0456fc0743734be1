"""Train one environment with Stable-Baselines3 as RL Zoo tunes it, and judge the final policy.

PYTHON bench/peers/sb3_returns.py ENV SEED PLACE [--steps N]     PYTHON: an environment's with stable-baselines3
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from protocol import judge, machine, versions, write
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize
from zoo import PPO as TUNED


class Falling:
    """From ``start`` at the beginning of training linearly to 0 at its end."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, remaining: float) -> float:
        return remaining * self.start


def prepared(settings: dict[str, Any]) -> dict[str, Any]:
    """The file's settings as SB3's constructor takes them."""
    ready = {name: value for name, value in settings.items() if name not in ("normalize", "n_envs", "n_timesteps")}
    for name in ("learning_rate", "clip_range"):
        if isinstance(ready.get(name), str):
            ready[name] = Falling(float(ready[name].removeprefix("lin_")))
    if "activation_fn" in ready.get("policy_kwargs", {}):
        ready["policy_kwargs"]["activation_fn"] = getattr(torch.nn, ready["policy_kwargs"]["activation_fn"])
    return ready


def train(env_id: str, seed: int, settings: dict[str, Any], steps: int) -> tuple[PPO, VecNormalize | None]:
    world = make_vec_env(env_id, n_envs=settings["n_envs"], seed=seed, vec_env_cls=DummyVecEnv)
    scaled = VecNormalize(world, gamma=settings["gamma"]) if settings.get("normalize") else None
    model = PPO("MlpPolicy", scaled or world, seed=seed, device="cpu", **prepared(copy.deepcopy(settings)))
    model.learn(steps)
    return model, scaled


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("env")
    parser.add_argument("seed", type=int)
    parser.add_argument("place", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--episodes", type=int, default=100)
    given = parser.parse_args()
    # SB3 says so wherever the last minibatch of an epoch is short; the tuned settings are kept as they are
    warnings.filterwarnings("ignore", message="You have specified a mini-batch size")
    torch.set_num_threads(1)
    settings = TUNED[given.env]
    wall, cpu = time.perf_counter(), time.process_time()
    model, scaled = train(given.env, given.seed, settings, given.steps or settings["n_timesteps"])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu

    def act(observations: np.ndarray) -> np.ndarray:
        ready = observations if scaled is None else scaled.normalize_obs(observations)
        return model.predict(ready, deterministic=True)[0]

    before = time.process_time()
    judged = judge(given.env, act, episodes=given.episodes)
    write(
        given.place,
        {
            "side": "sb3",
            "env": given.env,
            "seed": given.seed,
            "settings": settings,
            "budget": given.steps or settings["n_timesteps"],
            "steps": model.num_timesteps,
            **judged,
            "train_wall_seconds": round(wall, 1),
            "train_cpu_seconds": round(cpu, 1),
            "evaluation_cpu_seconds": round(time.process_time() - before, 1),
            "threads": 1,
            "versions": versions("stable_baselines3"),
            "machine": machine(),
            "train_returns_last_100": [float(e["r"]) for e in model.ep_info_buffer or ()],
        },
    )


if __name__ == "__main__":
    main()
