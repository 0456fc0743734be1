"""Where ``bridle train`` starts from: settings for each kind of world, and tuned ones for worlds that many people know.

A row holds what differs from the defaults of :class:`bridle.jobs.control.ControlConfig`, under the same names, and first of
all applies its kind's row. Units are this project's: a box's actions are in half-widths of the box, ``value_coefficient``
weighs ½(V − R)², so it is twice the ``vf_coef`` of Stable-Baselines3, which weighs (V − R)², and
``minibatches`` is the rollout's size over their ``batch_size``.

Sources: RL Baselines3 Zoo, hyperparams/ppo.yml at 22e3ff2 ("RL Zoo"); Huang et al. 2022, "The 37 implementation details of
proximal policy optimization" and CleanRL's ppo_continuous_action.py and ppo_atari.py ("CleanRL"); Tianshou's
examples/mujoco/mujoco_ppo.py at 002ffd9 ("Tianshou").
"""

from __future__ import annotations

from collections.abc import Mapping

from bridle.runs.files import Json

__all__ = ["KINDS", "PRESETS", "merged"]

Settings = Mapping[str, Json]

KINDS: dict[str, Settings] = {
    # few numbers in, a choice out: the defaults, which are CleanRL's with the rewards scaled
    "vector": {"ppo": {"epochs": 10, "minibatches": 8}, "optim": {"lr": 1e-3}},
    # CleanRL's ppo_continuous_action.py, its one environment of 2048 steps as eight of 256
    "box": {
        "total_steps": 1_000_000,
        "n_steps": 256,
        "normalise_observations": True,
        "clip_rewards": 10.0,
        "ppo": {"epochs": 10, "minibatches": 32, "whiten": "minibatch"},
        "optim": {"lr": 3e-4},
    },
    # CleanRL's ppo_atari.py, without what is Atari's own
    "image": {
        "total_steps": 10_000_000,
        "n_steps": 128,
        "ppo": {
            "epochs": 4,
            "minibatches": 4,
            "clip": 0.1,
            "entropy_coefficient": 0.01,
            "whiten": "minibatch",
        },
        "optim": {"lr": 2.5e-4},
        "evaluation": {"every": 500, "episodes": 5, "final_episodes": 10},
    },
    # the same as Atari games are played: rewards clipped to their sign (they are whole numbers)
    "atari": {
        "total_steps": 10_000_000,
        "n_steps": 128,
        "scale_rewards": False,
        "clip_rewards": 1.0,
        "ppo": {
            "epochs": 4,
            "minibatches": 4,
            "clip": 0.1,
            "entropy_coefficient": 0.01,
            "whiten": "minibatch",
        },
        "optim": {"lr": 2.5e-4},
        "evaluation": {"every": 500, "episodes": 5, "final_episodes": 10, "max_steps": 27_000},
    },
}
"""Kind of world → what differs from the plain defaults."""

_NORMALISED: Settings = {"normalise_observations": True, "scale_rewards": True, "clip_rewards": 10.0}

# Tianshou, which values a rollout anew before each epoch; minibatches of 64
_MUJOCO: Settings = {
    **_NORMALISED,
    "total_steps": 1_000_000,
    "world": {"num_envs": 8},
    "n_steps": 256,
    "network": {"initial_log_std": -0.5},
    "advantage": {"gamma": 0.99, "lam": 0.95},
    "ppo": {"epochs": 10, "minibatches": 32, "value_coefficient": 0.5, "whiten": "minibatch"},
    "recompute_advantages": True,
    "optim": {"lr": 3e-4, "schedule": "linear"},
}

PRESETS: dict[str, Settings] = {
    # RL Zoo
    "CartPole-v1": {
        "scale_rewards": False,
        "total_steps": 100_000,
        "n_steps": 32,
        "advantage": {"gamma": 0.98, "lam": 0.8},
        "ppo": {"epochs": 20, "minibatches": 1, "value_coefficient": 1.0},
        "clip_schedule": "linear",
        "optim": {"lr": 1e-3},
    },
    # RL Zoo, but for more epochs at a larger, falling rate (docs/LOG.md)
    "Acrobot-v1": {
        **_NORMALISED,
        "total_steps": 1_000_000,
        "world": {"num_envs": 16},
        "n_steps": 256,
        "advantage": {"gamma": 0.99, "lam": 0.94},
        "ppo": {"epochs": 8, "minibatches": 64, "value_coefficient": 1.0, "whiten": "minibatch"},
        "optim": {"lr": 1e-3, "schedule": "linear"},
    },
    # RL Zoo
    "MountainCar-v0": {
        **_NORMALISED,
        "total_steps": 1_000_000,
        "world": {"num_envs": 16},
        "n_steps": 16,
        "advantage": {"gamma": 0.99, "lam": 0.98},
        "ppo": {"epochs": 4, "minibatches": 4, "value_coefficient": 1.0, "whiten": "minibatch"},
        "optim": {"lr": 3e-4, "schedule": "constant"},
    },
    # RL Zoo without its state-dependent exploration, but for γ, σ, epochs and a falling rate (docs/LOG.md)
    "Pendulum-v1": {
        "scale_rewards": False,
        "clip_rewards": None,
        "normalise_observations": False,
        "total_steps": 100_000,
        "world": {"num_envs": 4},
        "n_steps": 1024,
        "network": {"initial_log_std": 0.0},
        "advantage": {"gamma": 0.98, "lam": 0.95},
        "ppo": {"epochs": 20, "minibatches": 64, "value_coefficient": 1.0, "whiten": "minibatch"},
        "optim": {"lr": 1e-3, "schedule": "linear"},
    },
    # RL Zoo
    "LunarLander-v3": {
        "scale_rewards": False,
        "total_steps": 1_000_000,
        "world": {"num_envs": 16},
        "n_steps": 1024,
        "advantage": {"gamma": 0.999, "lam": 0.98},
        "ppo": {
            "epochs": 4,
            "minibatches": 256,
            "value_coefficient": 1.0,
            "entropy_coefficient": 0.01,
            "whiten": "minibatch",
        },
        "optim": {"lr": 3e-4, "schedule": "constant"},
    },
    # RL Zoo
    "BipedalWalker-v3": {
        **_NORMALISED,
        "total_steps": 5_000_000,
        "world": {"num_envs": 32},
        "n_steps": 2048,
        "advantage": {"gamma": 0.999, "lam": 0.95},
        "ppo": {"epochs": 10, "minibatches": 1024, "clip": 0.18, "value_coefficient": 1.0, "whiten": "minibatch"},
        "optim": {"lr": 3e-4, "schedule": "constant"},
    },
    "HalfCheetah-v5": _MUJOCO,
    "Hopper-v5": _MUJOCO,
    "Walker2d-v5": _MUJOCO,
    # what has been observed soon varies little, for it balances: divided by that, the states episodes begin with lie far
    # out, and it forgets them; more of them in an update, too
    "InvertedDoublePendulum-v5": {
        **_MUJOCO,
        "normalise_observations": False,
        "n_steps": 1024,
        "ppo": {"epochs": 10, "minibatches": 128, "value_coefficient": 0.5, "whiten": "minibatch"},
    },
    # RL Zoo (v4)
    "Swimmer-v5": {
        **_NORMALISED,
        "total_steps": 1_000_000,
        "world": {"num_envs": 4},
        "n_steps": 1024,
        "advantage": {"gamma": 0.9999, "lam": 0.98},
        "ppo": {"epochs": 10, "minibatches": 16, "value_coefficient": 1.0, "whiten": "minibatch"},
        "optim": {"lr": 6e-4, "schedule": "constant"},
    },
    "Ant-v5": _MUJOCO,
}
"""Environment id → what differs from its kind's settings."""


def merged(below: Settings, above: Settings) -> dict[str, Json]:
    """Lay ``above`` over ``below``, group by group."""
    found = dict(below)
    for name, value in above.items():
        under = found.get(name)
        both = isinstance(value, Mapping) and isinstance(under, Mapping)
        found[name] = merged(under, value) if both else value  # type: ignore[arg-type]
    return found
