"""Tianshou's side of ``bench/control_speed.py``."""

from __future__ import annotations

import time

BEFORE = time.perf_counter()

import contextlib  # noqa: E402
import logging  # noqa: E402
import math  # noqa: E402
import warnings  # noqa: E402
from typing import Any  # noqa: E402

import gymnasium  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tianshou.algorithm import PPO  # noqa: E402
from tianshou.algorithm.modelfree.reinforce import ProbabilisticActorPolicy  # noqa: E402
from tianshou.algorithm.optim import AdamOptimizerFactory, LRSchedulerFactoryLinear  # noqa: E402
from tianshou.data import Collector, CollectStats, VectorReplayBuffer  # noqa: E402
from tianshou.env import DummyVectorEnv  # noqa: E402
from tianshou.trainer import OnPolicyTrainerParams  # noqa: E402
from tianshou.utils.net.common import Net  # noqa: E402
from tianshou.utils.net.continuous import ContinuousActorProbabilistic, ContinuousCritic  # noqa: E402
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic  # noqa: E402
from torch import nn  # noqa: E402
from torch.distributions import Categorical, Independent, Normal  # noqa: E402
from workload import Watch, Workload, tell  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE


class ReachedError(Exception):
    """The returns are where they were waited for."""


class Watched(Collector):
    """Shows the watch what each collection brought."""

    watch: Watch
    steps = 0

    def collect(self, *args: Any, **kwargs: Any) -> CollectStats:
        stats = super().collect(*args, **kwargs)
        self.steps += stats.n_collected_steps
        if self.watch.saw(stats.returns, self.steps):
            raise ReachedError
        return stats


def policy_of(load: Workload, env: gymnasium.Env) -> tuple[ProbabilisticActorPolicy, nn.Module]:
    def trunk() -> Net:
        return Net(state_shape=env.observation_space.shape, hidden_sizes=(64, 64), activation=nn.Tanh)

    shape: Any
    if isinstance(env.action_space, gymnasium.spaces.Discrete):
        shape = int(env.action_space.n)
        actor = DiscreteActor(preprocess_net=trunk(), action_shape=shape, softmax_output=False)
        critic = DiscreteCritic(preprocess_net=trunk())
        policy = ProbabilisticActorPolicy(
            actor=actor,
            dist_fn=lambda logits: Categorical(logits=logits),
            action_space=env.action_space,
            action_scaling=False,
            action_bound_method=None,
        )
    else:
        shape = env.action_space.shape
        actor = ContinuousActorProbabilistic(preprocess_net=trunk(), action_shape=shape, unbounded=True)
        critic = ContinuousCritic(preprocess_net=trunk())
        policy = ProbabilisticActorPolicy(
            actor=actor,
            dist_fn=lambda both: Independent(Normal(*both), 1),
            action_space=env.action_space,
            action_bound_method="clip",
        )
    for module in (*actor.modules(), *critic.modules()):
        if isinstance(module, nn.Linear):
            nn.init.orthogonal_(module.weight, math.sqrt(2))
            nn.init.zeros_(module.bias)
    return policy, critic


def train(load: Workload, rollouts: int, watch: Watch) -> int:
    torch.manual_seed(load.seed)
    np.random.seed(load.seed)
    worlds = DummyVectorEnv([lambda: gymnasium.make(load.env) for _ in range(load.num_envs)])
    worlds.seed(load.seed)
    policy, critic = policy_of(load, gymnasium.make(load.env))
    optim = AdamOptimizerFactory(lr=load.lr, eps=1e-5).with_lr_scheduler_factory(
        LRSchedulerFactoryLinear(
            max_epochs=1, epoch_num_steps=rollouts * load.rollout, collection_step_num_env_steps=load.rollout
        )
    )
    algorithm = PPO(
        policy=policy,
        critic=critic,
        optim=optim,
        eps_clip=load.clip,
        vf_coef=load.value,
        ent_coef=load.entropy,
        max_grad_norm=load.max_grad_norm,
        gae_lambda=load.lam,
        gamma=load.gamma,
        max_batchsize=load.rollout,
    )
    collector = Watched(algorithm, worlds, VectorReplayBuffer(load.rollout, load.num_envs))
    collector.watch = watch
    collector.reset()
    params = OnPolicyTrainerParams(
        training_collector=collector,
        max_epochs=1,
        epoch_num_steps=rollouts * load.rollout,
        collection_step_num_env_steps=load.rollout,
        update_step_num_repetitions=load.epochs,
        batch_size=load.minibatch,
        test_collector=None,
        show_progress=False,
        verbose=False,
    )
    with contextlib.suppress(ReachedError):
        algorithm.run_training(params)
    return collector.steps


def main() -> None:
    load = Workload.told()
    logging.disable(logging.INFO)
    warnings.filterwarnings("ignore", category=UserWarning)  # it takes an unbounded actor for a bounded one
    torch.set_num_threads(load.threads)
    if load.warmup:
        train(load, load.warmup, Watch(None))
    watch = Watch(load.until)
    steps = train(load, load.rollouts, watch)
    tell(watch.answer(steps, IMPORTS, "tianshou"))


if __name__ == "__main__":
    main()
