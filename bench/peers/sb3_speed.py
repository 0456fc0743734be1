"""Stable-Baselines3's side of ``bench/control_speed.py``."""

from __future__ import annotations

import time

BEFORE = time.perf_counter()

import functools  # noqa: E402
import warnings  # noqa: E402
from typing import Any  # noqa: E402

import gymnasium  # noqa: E402
import torch  # noqa: E402
from stable_baselines3 import PPO  # noqa: E402
from stable_baselines3.common.callbacks import BaseCallback  # noqa: E402
from stable_baselines3.common.env_util import make_atari_env, make_vec_env  # noqa: E402
from stable_baselines3.common.policies import ActorCriticPolicy  # noqa: E402
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor  # noqa: E402
from stable_baselines3.common.vec_env import VecEnv, VecFrameStack  # noqa: E402
from torch import nn  # noqa: E402
from workload import Watch, Workload, tell  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE


class Tower(nn.Module):
    """A user's own network, written as users write them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 64)
        self.second = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.second(torch.tanh(self.first(x))))


class NormedTower(nn.Module):
    """Another, with layer norms and SiLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 64)
        self.second = nn.Linear(64, 64)
        self.norms = nn.ModuleList([nn.LayerNorm(64), nn.LayerNorm(64)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in zip((self.first, self.second), self.norms, strict=True):
            x = nn.functional.silu(norm(layer(x)))
        return x


class ResidualTower(nn.Module):
    """A third, with a residual sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, 64)
        self.norm = nn.LayerNorm(64)
        self.second = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.first(x))
        return x + nn.functional.silu(self.second(self.norm(x)))


class Towers(nn.Module):
    """Two of them, in the place where SB3 asks for a custom network."""

    latent_dim_pi = latent_dim_vf = 64

    def __init__(self, width: int, kind: type[Tower | NormedTower | ResidualTower]) -> None:
        super().__init__()
        self.actor, self.critic = kind(width), kind(width)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.actor(x), self.critic(x)

    def forward_actor(self, x: torch.Tensor) -> torch.Tensor:
        return self.actor(x)

    def forward_critic(self, x: torch.Tensor) -> torch.Tensor:
        return self.critic(x)


class OwnPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Towers(self.features_dim, Tower)


class OwnNormedPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Towers(self.features_dim, NormedTower)


class OwnPlainPolicy(ActorCriticPolicy):
    def _build_mlp_extractor(self) -> None:
        self.mlp_extractor = Towers(self.features_dim, ResidualTower)


class Trunk(BaseFeaturesExtractor):
    """What actor and critic both read."""

    def __init__(self, space: gymnasium.spaces.Box) -> None:
        super().__init__(space, 128)
        self.layers = nn.Sequential(nn.Linear(space.shape[0], 128), nn.SiLU(), nn.LayerNorm(128))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Follow(BaseCallback):
    """Ends the training once the returns are where they are waited for."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch, self.done = watch, False

    def _on_step(self) -> bool:
        return not self.done

    def _on_rollout_end(self) -> None:
        self.watch.returns.clear()  # the buffer itself holds the last 100
        buffer = self.model.ep_info_buffer or ()
        self.done = self.watch.saw((episode["r"] for episode in buffer), self.num_timesteps)


def world(load: Workload) -> VecEnv:
    if load.network != "nature":
        return make_vec_env(load.env, n_envs=load.num_envs, seed=load.seed)
    make = functools.partial(gymnasium.make, load.env, frameskip=1, repeat_action_probability=0.0)
    return VecFrameStack(make_atari_env(make, n_envs=load.num_envs, seed=load.seed), 4)


def learner(load: Workload) -> PPO:
    shapes: dict[str, dict[str, Any]] = {
        "mlp": {"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
        "own-trunk": {"features_extractor_class": Trunk, "net_arch": []},
    }
    own = {"own": OwnPolicy, "own-normed": OwnNormedPolicy, "own-plain": OwnPlainPolicy}
    return PPO(
        own.get(load.network, "CnnPolicy" if load.network == "nature" else "MlpPolicy"),
        world(load),
        n_steps=load.n_steps,
        batch_size=load.minibatch,
        n_epochs=load.epochs,
        learning_rate=lambda left: load.lr * left,
        gamma=load.gamma,
        gae_lambda=load.lam,
        clip_range=load.clip,
        ent_coef=load.entropy,
        vf_coef=load.value,
        max_grad_norm=load.max_grad_norm,
        policy_kwargs=shapes.get(load.network, {}),
        seed=load.seed,
        device="cpu",
    )


def main() -> None:
    load = Workload.told()
    torch.set_num_threads(load.threads)
    warnings.filterwarnings("ignore", category=UserWarning)
    if load.network == "nature":
        import ale_py

        gymnasium.register_envs(ale_py)
    if load.warmup:
        learner(load).learn(load.warmup * load.rollout)
    watch = Watch(load.until)
    model = learner(load)
    model.learn(load.rollouts * load.rollout, callback=Follow(watch))
    tell(watch.answer(model.num_timesteps, IMPORTS, "stable_baselines3"))


if __name__ == "__main__":
    main()
