from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import SyncVectorEnv

from bridle.control.actor_critic import ActorCritic
from bridle.control.collect import Collector
from bridle.control.environments import World
from bridle.control.heads import CategoricalHead
from bridle.control.making import WorldSettings, make_world
from bridle.control.masks import allowed
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import Transitions
from bridle.control.prepare import prepare
from bridle.control.spaces import action_spec
from bridle.errors import WorldError
from bridle.learn.advantages import AdvantageSettings
from tests.control.worlds import MODES, Masked, Strange

WORLDS = ("Masked", "MaskedKey", "MaskedMulti", "MaskedMultiKey")


@pytest.mark.parametrize("recurrent", [None, "gru"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", WORLDS)
def test_no_forbidden_action_reaches_the_world_and_the_trainer_sees_the_same_masks(
    name: str, mode: str, recurrent: str | None
) -> None:
    # the worlds raise on a forbidden action, and forbid all where an episode ends
    settings = WorldSettings(num_envs=3, autoreset=mode, vectorization="sync")
    world = make_world(f"BridleTest/{name}-v0", settings)
    policy = build_policy(world.observations, world.actions, NetworkSettings(recurrent=recurrent), seed=0)
    collector = Collector(world, 25)
    collector.restart(seed=1, step=0)
    for step in range(4):
        rollout = collector.collect(policy, None, seed=1, step=step)
        batch = prepare(rollout, policy, None, AdvantageSettings())
        seen = policy(batch.units)
        assert float((seen.logp.detach() - batch.old_logp).abs().max()) < 1e-5
        assert bool((seen.entropy >= 0).all())
        mask = batch.units.observations.mask
        assert mask is not None
        assert not bool(mask.all())
        assert len(rollout.episodes) > 10
    assert world.observations.width == 2
    world.close()


def test_every_row_is_read_from_the_observation_that_is_acted_on() -> None:
    # the environment of row i allows action i alone at its first step, and action (i + t) mod 5 after t steps
    class Turning(gymnasium.Env[np.ndarray, int]):
        observation_space = spaces.Box(0, 99, (1,), np.float32)
        action_space = spaces.Discrete(5)

        def reset(self, *, seed: int | None = None, options: object = None) -> tuple[np.ndarray, dict[str, object]]:
            super().reset(seed=seed)
            self.t = 0
            return np.zeros(1, np.float32), {"action_mask": np.arange(5) == 0}

        def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, object]]:
            assert action == self.t % 5
            self.t += 1
            return np.full(1, self.t, np.float32), 0.0, False, self.t == 7, {"action_mask": np.arange(5) == self.t % 5}

    for mode in gymnasium.vector.AutoresetMode:
        world = World("turning", SyncVectorEnv([Turning, Turning], autoreset_mode=mode))
        policy = build_policy(world.observations, world.actions, NetworkSettings(hidden=(4,)), seed=0)
        collector = Collector(world, 20)
        collector.restart(seed=0, step=0)
        rollout = collector.collect(policy, None, seed=0, step=0)
        mask = rollout.observations.mask
        assert mask is not None
        expected = rollout.observations.vector[..., 0].long() % 5
        assert torch.equal(mask[rollout.mask].long().argmax(-1), expected[rollout.mask])
        assert torch.equal(rollout.actions[rollout.mask], expected[rollout.mask])
        assert bool((rollout.sampler_logp[rollout.mask] == 0).all())
        world.close()


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("nothing", "the action mask of environment 0 allows nothing"),
        ("shape", r"an action mask of shape \(4,\); its actions need \(5,\)"),
        ("numbers", "must hold True and False"),
        ("missing", "lacks the 'action_mask'"),
    ],
)
def test_a_wrong_mask_is_told_in_one_line(fault: str, words: str) -> None:
    world = make_world(f"BridleTest/Masked-{fault}-v0", WorldSettings(num_envs=1))
    policy = build_policy(world.observations, world.actions, NetworkSettings(hidden=(4,)), seed=0)
    collector = Collector(world, 8)
    collector.restart(seed=0, step=0)
    with pytest.raises(WorldError, match=words) as refusal:
        collector.collect(policy, None, seed=0, step=0)
    assert "\n" not in str(refusal.value)
    world.close()


def test_a_mask_that_does_not_fit_the_actions_is_refused_before_anything_is_done() -> None:
    seen = spaces.Dict({"a": spaces.Box(0, 1, (1,)), "action_mask": spaces.MultiBinary(3)})
    for action, words in ((spaces.Discrete(4), "need"), (spaces.Box(0, 1, (3,)), "not Box ones")):
        envs = SyncVectorEnv([lambda action=action: Strange(seen, action)])
        with pytest.raises(WorldError, match=words):
            World("w", envs)
        envs.close()


def test_a_mask_that_comes_with_steps_only_is_refused() -> None:
    class Late(Masked):
        def reset(self, **arguments: object) -> tuple[np.ndarray, dict[str, object]]:
            return super().reset(**arguments)[0], {}  # type: ignore[arg-type]

    world = World("late", SyncVectorEnv([lambda: Late(fault="none")]))
    world.reset(0)
    first = np.array([int(world._envs.envs[0].mask.argmax())])  # type: ignore[attr-defined]
    with pytest.raises(WorldError, match="not after reset"):
        world.step(first)
    world.close()


def test_a_mask_handed_to_an_agent_is_checked_too() -> None:
    discrete, multi = action_spec(spaces.Discrete(3), "w"), action_spec(spaces.MultiDiscrete([2, 2]), "w")
    assert allowed(np.array([[0, 1, 1]]), discrete, "w").tolist() == [[False, True, True]]
    with pytest.raises(WorldError, match="allows nothing for choice 1"):
        allowed(np.array([[True, False, False, False]]), multi, "w")
    with pytest.raises(WorldError, match="not MultiBinary ones"):
        allowed(np.ones((1, 3)), action_spec(spaces.MultiBinary(3), "w"), "w")


def test_masks_learn_nothing_about_what_they_forbid() -> None:
    # with one allowed action there is nothing to learn: logp 0, entropy 0, no gradient on the actor
    actor = torch.nn.Linear(2, 3)
    policy = ActorCritic(actor=actor, critic=torch.nn.Linear(2, 1), head=CategoricalHead())
    mask = torch.tensor([[False, True, False], [False, False, True]])
    units = Transitions(
        observations=Observations(vector=torch.ones(2, 2), mask=mask), actions=torch.tensor([1, 2], dtype=torch.int64)
    )
    seen = policy(units)
    assert seen.logp.tolist() == [0, 0]
    assert seen.entropy.tolist() == [0, 0]
    (seen.logp.sum() + seen.entropy.sum()).backward()
    assert actor.weight.grad is not None
    assert bool((actor.weight.grad == 0).all())
