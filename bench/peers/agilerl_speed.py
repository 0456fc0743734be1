"""AgileRL's side of ``bench/control_speed.py``; its own evolution of hyperparameters is left out.

Its value loss is always clipped by the policy's clip range, the gradient norms of its actor and critic are bounded one by
one, and advantages are whitened over the rollout: there is no setting for the others' ways.
"""

from __future__ import annotations

import time

BEFORE = time.perf_counter()

import warnings  # noqa: E402
from typing import Any  # noqa: E402

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402

warnings.filterwarnings("ignore")

from agilerl.algorithms import PPO  # noqa: E402
from agilerl.modules.dummy import DummyEvolvable  # noqa: E402
from agilerl.networks import StochasticActor  # noqa: E402
from agilerl.networks.value_networks import ValueNetwork  # noqa: E402
from agilerl.rollouts.on_policy import collect_rollouts  # noqa: E402
from agilerl.utils.utils import make_vect_envs  # noqa: E402
from torch import nn  # noqa: E402
from workload import Watch, Workload, tell  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE

HEAD = {"hidden_size": [64], "activation": "Tanh", "layer_norm": False}


def first_layer(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 64), nn.Tanh())


def learner(load: Workload, worlds: gymnasium.vector.VectorEnv) -> PPO:
    seen, done = worlds.single_observation_space, worlds.single_action_space
    width = int(np.prod(seen.shape))

    def encoder() -> Any:
        module = DummyEvolvable("cpu", module_fn=first_layer, module_kwargs={"width": width})
        module.num_outputs = 64
        return module

    return PPO(
        seen,
        done,
        actor_network=StochasticActor(seen, done, encoder=encoder(), head_config=dict(HEAD)),
        critic_network=ValueNetwork(seen, encoder=encoder(), head_config=dict(HEAD)),
        share_encoders=False,
        num_envs=load.num_envs,
        learn_step=load.rollout,
        batch_size=load.minibatch,
        update_epochs=load.epochs,
        lr=load.lr,
        gamma=load.gamma,
        gae_lambda=load.lam,
        clip_coef=load.clip,
        ent_coef=load.entropy,
        vf_coef=2 * load.value,
        max_grad_norm=load.max_grad_norm,
        device="cpu",
    )


def train(load: Workload, rollouts: int, watch: Watch) -> int:
    torch.manual_seed(load.seed)
    np.random.seed(load.seed)
    worlds = make_vect_envs(load.env, num_envs=load.num_envs, should_async_vector=False)
    worlds.reset(seed=load.seed)
    agent = learner(load, worlds)
    seen: tuple[Any, ...] = (None, None, None, None)
    for done in range(rollouts):
        for group in agent.optimizer.optimizer.param_groups:
            group["lr"] = load.lr * (1 - done / rollouts)
        returns, *seen = collect_rollouts(
            agent,
            worlds,
            n_steps=load.n_steps,
            last_obs=seen[0],
            last_done=seen[1],
            last_scores=seen[2],
            last_info=seen[3],
        )
        if watch.saw(returns, (done + 1) * load.rollout):
            return (done + 1) * load.rollout
        agent.learn()
    return rollouts * load.rollout


def main() -> None:
    load = Workload.told()
    torch.set_num_threads(load.threads)
    if load.warmup:
        train(load, load.warmup, Watch(None))
    watch = Watch(load.until)
    steps = train(load, load.rollouts, watch)
    tell(watch.answer(steps, IMPORTS, "agilerl"))


if __name__ == "__main__":
    main()
