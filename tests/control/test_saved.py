from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from bridle.control.actor_critic import ActorCritic
from bridle.control.collect import Collector
from bridle.control.evaluate import evaluate
from bridle.control.heads import CategoricalHead
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.policy import ControlPolicy
from bridle.control.saved import Agent, load_policy, save_policy
from bridle.control.scaling import normalise, observed
from bridle.control.spaces import ActionSpec, ObservationSpec, action_spec, observation_spec
from bridle.core.moments import Moments
from bridle.errors import ConfigError, ModelError, WorldError
from bridle.random import generator
from tests.control import worlds

worlds.register()


def saved(folder: Path, env: str, settings: NetworkSettings, *, moments: bool = True) -> Agent:
    made = gymnasium.make(env)
    observations = observation_spec(made.observation_space, env)
    actions = action_spec(made.action_space, env)
    policy = build_policy(observations, actions, settings, seed=1)
    seen = (
        Moments.empty((observations.width,)).updated(torch.linspace(-3, 2, 7 * observations.width).view(7, -1))
        if moments and observations.width
        else None
    )
    agent = Agent(policy=policy, observations=observations, actions=actions, moments=seen)
    folder.mkdir()
    save_policy(folder, agent, settings, env=env)
    return agent


FRESH = """
import json, sys
import numpy as np
from bridle.control import load_policy
agent = load_policy(sys.argv[1])
print(json.dumps([np.asarray(agent.act(np.array(o, np.float32))).tolist() for o in json.loads(sys.argv[2])]))
"""


def test_a_fresh_process_acts_the_same(tmp_path: Path) -> None:
    agent = saved(tmp_path / "policy", "Pendulum-v1", NetworkSettings(hidden=(16,), shared_trunk=True))
    states = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32).tolist()
    command = [sys.executable, "-W", "error", "-c", FRESH, str(tmp_path / "policy"), json.dumps(states)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert json.loads(told) == [agent.act(np.array(state, np.float32)).tolist() for state in states]


@pytest.mark.parametrize("env", ["CartPole-v1", "BridleTest/Target-v0"])
def test_what_is_loaded_is_what_was_saved(tmp_path: Path, env: str) -> None:
    agent = saved(tmp_path / "policy", env, NetworkSettings(initial_log_std=-1.5), moments=env == "CartPole-v1")
    again = load_policy(tmp_path / "policy")
    assert (again.observations, again.actions) == (agent.observations, agent.actions)
    for (name, old), (_, new) in zip(agent.policy.state_dict().items(), again.policy.state_dict().items(), strict=True):
        assert torch.equal(old, new), name
    made = gymnasium.make(env)
    state, _ = made.reset(seed=0)
    for _ in range(5):
        old, new = (a.act(state, draws=np.random.default_rng(3)) for a in (agent, again))
        assert np.array_equal(old, new)
        assert made.action_space.contains(new)
        state = made.step(new)[0]


def test_normalisation_is_part_of_the_policy(tmp_path: Path) -> None:
    agent = saved(tmp_path / "policy", "CartPole-v1", NetworkSettings(hidden=(4,)))
    again = load_policy(tmp_path / "policy")
    assert agent.moments is not None
    assert again.moments is not None
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.moments.standardise(x), agent.moments.standardise(x))


def test_other_spaces_are_refused(tmp_path: Path) -> None:
    saved(tmp_path / "policy", "CartPole-v1", NetworkSettings(hidden=(4,)))
    cartpole, acrobot, pendulum = (gymnasium.make(f"{name}-v1") for name in ("CartPole", "Acrobot", "Pendulum"))
    spaces = {"observation_space": cartpole.observation_space, "action_space": cartpole.action_space}
    agent = load_policy(tmp_path / "policy", **spaces)
    with pytest.raises(ModelError, match="was trained for"):
        load_policy(tmp_path / "policy", observation_space=acrobot.observation_space)
    with pytest.raises(ModelError, match="was trained for"):
        load_policy(tmp_path / "policy", action_space=pendulum.action_space)
    with pytest.raises(ModelError, match=r"shape \(6,\)"):
        agent.act(acrobot.reset(seed=0)[0])


def linear(observations: ObservationSpec, actions: ActionSpec) -> ControlPolicy:
    return ActorCritic(
        actor=nn.Linear(observations.width, actions.width),
        critic=nn.Linear(observations.width, 1),
        head=CategoricalHead(),
    )


def not_a_policy(observations: ObservationSpec, actions: ActionSpec) -> nn.Module:
    return nn.Linear(observations.width, actions.width)


def test_a_users_own_policy_is_built_by_the_users_own_function(tmp_path: Path) -> None:
    settings = NetworkSettings(factory=f"{__name__}:linear")
    agent = saved(tmp_path / "policy", "CartPole-v1", settings)
    with pytest.raises(ModelError, match="pass that function as build="):
        load_policy(tmp_path / "policy")
    again = load_policy(tmp_path / "policy", build=linear)
    assert again.act(np.ones(4, np.float32)) == agent.act(np.ones(4, np.float32))


@pytest.mark.parametrize(
    "factory", ["no_such_module:f", f"{__name__}:no_such_function", f"{__name__}:not_a_policy", "nocolon", ":f"]
)
def test_a_factory_that_cannot_serve_is_refused(factory: str) -> None:
    made = gymnasium.make("CartPole-v1")
    observations, actions = observation_spec(made.observation_space, "w"), action_spec(made.action_space, "w")
    with pytest.raises(ConfigError, match="factory="):
        build_policy(observations, actions, NetworkSettings(factory=factory), seed=0)


def test_a_damaged_folder_is_refused_in_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    saved(folder, "CartPole-v1", NetworkSettings(hidden=(4,)))
    head = json.loads((folder / "policy.json").read_text())

    def refused(words: str) -> None:
        with pytest.raises(ModelError, match=words) as refusal:
            load_policy(folder)
        assert "\n" not in str(refusal.value)

    for change, words in (
        ({"format": 99}, "format 2"),
        ({"network": {**head["network"], "hidden": [5]}}, "do not fit"),
        ({"network": {"width": 3}}, "network"),
        ({"network": {**head["network"], "squash": "no"}}, "squash 'no'"),
        ({"network": {**head["network"], "factory": 5}}, "factory '5'"),
        ({"network": {**head["network"], "activation": "exec"}}, "network"),
        ({"actions": None}, "lacks 'actions'"),
    ):
        (folder / "policy.json").write_text(json.dumps({**head, **change}))
        refused(words)
    (folder / "policy.json").write_text("{")
    refused("JSON")
    (folder / "policy.json").write_text(json.dumps(head))
    (folder / "policy.safetensors").write_bytes(b"\x80\x04torch")
    refused("safetensors")
    (folder / "policy.safetensors").unlink()
    refused("missing")
    (folder / "policy.json").unlink()
    refused("missing")


KINDS: dict[str, tuple[str, NetworkSettings]] = {
    "everything": ("BridleTest/DictCounter-v0", NetworkSettings(hidden=(8,))),
    "image": ("BridleTest/ImageCounter-v0", NetworkSettings()),
    "choices": ("BridleTest/MatchDigits-v0", NetworkSettings(hidden=(8,))),
    "switches": ("BridleTest/MatchBits-v0", NetworkSettings(hidden=(8,))),
    "squashed": ("BridleTest/Target-v0", NetworkSettings(hidden=(8,), squash=True, std="state", initial_log_std=1.0)),
    "memory": ("BridleTest/DictCounter-v0", NetworkSettings(hidden=(8,), recurrent="lstm", recurrent_width=5)),
    "masked": ("BridleTest/MaskedMultiKey-v0", NetworkSettings(hidden=(8,))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_policy_acts_on_raw_observations_when_loaded(tmp_path: Path, kind: str) -> None:
    env, settings = KINDS[kind]
    agent = saved(tmp_path / "policy", env, settings)
    made = gymnasium.make(env)
    again = load_policy(tmp_path / "policy", observation_space=made.observation_space, action_space=made.action_space)
    old, new = (a.session(draws=np.random.default_rng(3)) for a in (agent, again))
    state, _ = made.reset(seed=0)
    for _ in range(8):
        action = new.act(state)
        assert np.array_equal(old.act(state), action)
        assert made.action_space.contains(action)
        state, _, terminated, truncated, _ = made.step(action)
        if terminated or truncated:
            state, _ = made.reset()
            old.reset()
            new.reset()


def test_a_session_remembers_its_episode_and_acts_as_the_collector_does(tmp_path: Path) -> None:
    env, settings = KINDS["memory"]
    agent = saved(tmp_path / "policy", env, settings, moments=False)
    with torch.no_grad():
        for parameter in agent.policy.actor.parameters():  # type: ignore[union-attr]
            parameter.mul_(1000)
    with pytest.raises(ModelError, match=r"agent.session\(\)"):
        agent.act(gymnasium.make(env).reset(seed=0)[0])
    world = make_world(env, WorldSettings(num_envs=1))
    score = evaluate(world, agent.policy, None, episodes=5, deterministic=True, seed=0)
    made, session = gymnasium.make(env), agent.session()
    start = int(generator(0, "evaluation-environments", 0).integers(2**31 - 1))
    state, _ = made.reset(seed=start)
    total, returns, chosen = 0.0, [], []
    while len(returns) < 5:
        action = session.act(state)
        chosen.append(action)
        state, reward, terminated, truncated, _ = made.step(action)
        total += float(reward)
        if terminated or truncated:
            returns.append(total)
            total = 0.0
            state, _ = made.reset()
            session.reset()
    assert tuple(returns) == score.returns
    # the same observations again, without a reset between the episodes, are another story
    first = made.reset(seed=start)[0]
    session.reset()
    fresh = session._state
    session.act(first)
    assert fresh is not None
    assert not torch.equal(session._state, fresh)  # type: ignore[arg-type]
    session.reset()
    assert torch.equal(session._state, fresh)  # type: ignore[arg-type]
    world.close()


def test_an_agent_obeys_the_mask_it_is_given(tmp_path: Path) -> None:
    agent = saved(tmp_path / "policy", "BridleTest/Masked-v0", NetworkSettings(hidden=(4,)), moments=False)
    seen = np.zeros(2, np.float32)
    for allowed in range(5):
        mask = np.arange(5) == allowed
        for draws in (None, np.random.default_rng(0)):
            assert agent.act(seen, mask=mask, draws=draws) == 7 + allowed
    with pytest.raises(WorldError, match="allows nothing"):
        agent.act(seen, mask=np.zeros(5))
    with pytest.raises(WorldError, match="need"):
        agent.act(seen, mask=np.ones(4))


def test_normalisation_leaves_bits_and_one_hots_as_they_are(tmp_path: Path) -> None:
    world = make_world("BridleTest/DictCounter-v0", WorldSettings(num_envs=3))
    policy = build_policy(world.observations, world.actions, NetworkSettings(hidden=(8,)), seed=0)
    collector = Collector(world, 20)
    collector.restart(seed=0, step=0)
    measured = world.observations.measured
    moments = Moments.empty((world.observations.width,))
    for step in range(2):
        rollout = collector.collect(policy, moments, seed=0, step=step)
        moments = observed(moments, rollout.observations, rollout.mask, measured)
    raw = rollout.observations
    seen = normalise(raw, moments)
    assert torch.equal(seen.vector[..., ~measured], raw.vector[..., ~measured])
    assert all(torch.equal(a, b) for a, b in zip(seen.images, raw.images, strict=True))
    numbers = seen.vector[..., measured]
    assert float(numbers.abs().max()) < 4
    assert int(measured.sum()) == 2
    settings = NetworkSettings(hidden=(8,))
    agent = Agent(policy=policy, observations=world.observations, actions=world.actions, moments=moments)
    (tmp_path / "policy").mkdir()
    save_policy(tmp_path / "policy", agent, settings, env="w")
    again = load_policy(tmp_path / "policy")
    assert again.moments is not None
    assert torch.equal(normalise(raw, again.moments).vector, seen.vector)
    world.close()
