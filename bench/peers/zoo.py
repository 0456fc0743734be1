"""RL Zoo's tuned settings of PPO for these environments, as data: ``hyperparams/ppo.yml`` at commit 22e3ff2 (2026-04-23).

Ids are those of the present environments: the settings of LunarLander-v3 are the file's own, those of ``-v5`` are the file's for
``-v4`` (``-v2`` for InvertedDoublePendulum). What the file leaves out is SB3's default. A string ``lin_x`` falls linearly from x to 0.
"""

from __future__ import annotations

from typing import Any

BIG: dict[str, Any] = {"log_std_init": -2, "ortho_init": False, "activation_fn": "ReLU", "net_arch": {"pi": [256, 256], "vf": [256, 256]}}

PPO: dict[str, dict[str, Any]] = {
    "CartPole-v1": {
        "n_envs": 8, "n_timesteps": 100_000, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98,
        "n_epochs": 20, "ent_coef": 0.0, "learning_rate": "lin_0.001", "clip_range": "lin_0.2",
    },
    "Acrobot-v1": {
        "normalize": True, "n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 256, "gae_lambda": 0.94, "gamma": 0.99,
        "n_epochs": 4, "ent_coef": 0.0,
    },
    "MountainCar-v0": {
        "normalize": True, "n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 16, "gae_lambda": 0.98, "gamma": 0.99,
        "n_epochs": 4, "ent_coef": 0.0,
    },
    "Pendulum-v1": {
        "n_envs": 4, "n_timesteps": 100_000, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10,
        "ent_coef": 0.0, "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4,
    },
    "LunarLander-v3": {
        "n_envs": 16, "n_timesteps": 1_000_000, "n_steps": 1024, "batch_size": 64, "gae_lambda": 0.98, "gamma": 0.999,
        "n_epochs": 4, "ent_coef": 0.01,
    },
    "HalfCheetah-v5": {
        "normalize": True, "n_envs": 1, "n_timesteps": 1_000_000, "batch_size": 64, "n_steps": 512, "gamma": 0.98,
        "learning_rate": 2.0633e-05, "ent_coef": 0.000401762, "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.92,
        "max_grad_norm": 0.8, "vf_coef": 0.58096, "policy_kwargs": BIG,
    },
    "Hopper-v5": {
        "normalize": True, "n_envs": 1, "n_timesteps": 1_000_000, "batch_size": 32, "n_steps": 512, "gamma": 0.999,
        "learning_rate": 9.80828e-05, "ent_coef": 0.00229519, "clip_range": 0.2, "n_epochs": 5, "gae_lambda": 0.99,
        "max_grad_norm": 0.7, "vf_coef": 0.835671, "policy_kwargs": BIG,
    },
    "Walker2d-v5": {
        "normalize": True, "n_envs": 1, "n_timesteps": 1_000_000, "batch_size": 32, "n_steps": 512, "gamma": 0.99,
        "learning_rate": 5.05041e-05, "ent_coef": 0.000585045, "clip_range": 0.1, "n_epochs": 20, "gae_lambda": 0.95,
        "max_grad_norm": 1, "vf_coef": 0.871923, "policy_kwargs": BIG,
    },
    "InvertedDoublePendulum-v5": {
        "normalize": True, "n_envs": 1, "n_timesteps": 1_000_000, "batch_size": 512, "n_steps": 128, "gamma": 0.98,
        "learning_rate": 0.000155454, "ent_coef": 1.05057e-06, "clip_range": 0.4, "n_epochs": 10, "gae_lambda": 0.8,
        "max_grad_norm": 0.5, "vf_coef": 0.695929,
    },
    "Swimmer-v5": {
        "normalize": True, "n_envs": 4, "n_timesteps": 1_000_000, "gamma": 0.9999, "n_steps": 1024, "batch_size": 256,
        "learning_rate": 6e-4, "gae_lambda": 0.98,
    },
}
