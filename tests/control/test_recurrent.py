from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from bridle.control.collect import Collector
from bridle.control.environments import World
from bridle.control.evaluate import evaluate
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import Sequences
from bridle.control.prepare import prepare, remembered_anew, trajectories
from bridle.control.recurrent import Pieces, RecurrentActorCritic
from bridle.errors import ConfigError
from bridle.learn import ppo
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from tests.control.worlds import MODES

Kind = Literal["lstm", "gru"]
KINDS: tuple[Kind, ...] = ("lstm", "gru")


def remembering(world: World, kind: Kind, width: int = 7) -> RecurrentActorCritic:
    """A policy whose actions depend a good deal on its memory."""
    settings = NetworkSettings(hidden=(8,), recurrent=kind, recurrent_width=width)
    policy = build_policy(world.observations, world.actions, settings, seed=1)
    assert isinstance(policy, RecurrentActorCritic)
    with torch.no_grad():
        for parameter in policy.actor.parameters():
            parameter.mul_(100)
        for layer in policy.encoder.modules():
            if isinstance(layer, nn.Linear) and layer.in_features == 2:
                layer.weight[:, 0].mul_(0.002)  # the counter's numbers go up to 1000
    return policy


def counter(mode: str, n_steps: int, env: str = "Counter") -> Collector:
    settings = WorldSettings(num_envs=3, autoreset=mode, vectorization="sync")
    collector = Collector(make_world(f"BridleTest/{env}-v0", settings), n_steps)
    collector.restart(seed=5, step=0)
    return collector


@pytest.mark.parametrize("env", ["Counter", "MaskedMulti", "DictCounter"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_trainer_forward_agrees_with_the_sampler(kind: Kind, mode: str, env: str) -> None:
    collector = counter(mode, 23, env)
    policy = remembering(collector.world, kind)
    for step in range(3):
        rollout = collector.collect(policy, None, seed=0, step=step)
        assert rollout.memory is not None
        batch = prepare(rollout, policy, None, AdvantageSettings())
        assert isinstance(batch.units, Sequences)
        assert int(batch.units.fresh.sum()) > 10
        seen = policy(batch.units)
        torch.testing.assert_close(seen.logp.detach(), batch.old_logp, rtol=0, atol=1e-5)
        torch.testing.assert_close(seen.value.detach(), batch.old_value, rtol=1e-5, atol=1e-5)
        index = torch.tensor([2, 0])
        some = policy(batch.units.select(index))
        torch.testing.assert_close(some.logp.detach(), batch.old_logp[batch.actions_of(index)], rtol=0, atol=1e-5)
    # the second and third rollout begin in the middle of episodes
    assert bool((rollout.memory.before[:, 0] != 0).any())
    collector.world.close()


def plainly(policy: RecurrentActorCritic, episode: list[Tensor]) -> list[float]:
    """V after each observation of one episode, by PyTorch's cells, one step at a time."""
    lstm = isinstance(policy.memory, nn.LSTM)
    cell = (nn.LSTMCell if lstm else nn.GRUCell)(policy.memory.input_size, policy.memory.hidden_size)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in policy.memory.state_dict().items()})
    h = c = torch.zeros(1, policy.memory.hidden_size)
    values = []
    for seen in episode:
        features = policy.encoder(seen[None])
        if lstm:
            h, c = cell(features, (h, c))
        else:
            h = cell(features, h)
        values.append(float(policy.critic(h)))
    return values


@torch.no_grad()
@pytest.mark.parametrize("n_steps", [5, 30])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_of_states_and_true_successors_come_from_the_episode_alone(kind: Kind, mode: str, n_steps: int) -> None:
    collector = counter(mode, n_steps)
    policy = remembering(collector.world, kind)
    known: dict[tuple[float, int], float] = {}
    seen = cut = 0
    for step in range(30 // n_steps):
        rollout = collector.collect(policy, None, seed=0, step=step)
        found = trajectories(rollout, policy, None)
        for b, t in rollout.mask.nonzero().tolist():
            number, time = rollout.observations.vector[b, t].tolist()
            if (number, 0) not in known:
                # an episode of this world is known from its first observation: (number, 0), (number, 1), …
                episode = [torch.tensor([number, float(i)]) for i in range(7)]
                known |= {(number, i): value for i, value in enumerate(plainly(policy, episode))}
            assert float(found.values[b, t]) == pytest.approx(known[number, int(time)], abs=1e-5)
            if not rollout.terminated[b, t]:
                assert float(found.next_values[b, t]) == pytest.approx(known[number, int(time) + 1], abs=1e-5)
                cut += int(rollout.truncated[b, t])
            seen += 1
    assert seen > 40
    assert cut > 3
    collector.world.close()


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_taken_anew_are_those_of_the_present_memory(kind: Kind, mode: str) -> None:
    collector = counter(mode, 30)
    policy = remembering(collector.world, kind)
    rollout = collector.collect(policy, None, seed=0, step=0)
    for parameter in policy.memory.parameters():
        parameter.add_(0.1)
    batch = prepare(rollout, policy, None, AdvantageSettings(), anew=True)
    torch.testing.assert_close(batch.old_value, policy(batch.units).value, rtol=1e-5, atol=1e-5)
    assert torch.equal(batch.old_logp, rollout.sampler_logp[rollout.mask])
    found = trajectories(remembered_anew(rollout, policy, None), policy, None)
    cut = 0
    for b, t in rollout.mask.nonzero().tolist():
        number, time = rollout.observations.vector[b, t].tolist()
        known = plainly(policy, [torch.tensor([number, float(i)]) for i in range(int(time) + 2)])
        assert float(found.values[b, t]) == pytest.approx(known[-2], abs=1e-5)
        if not rollout.terminated[b, t]:
            assert float(found.next_values[b, t]) == pytest.approx(known[-1], abs=1e-5)
            cut += int(rollout.truncated[b, t])
    assert cut > 3
    collector.world.close()


@pytest.mark.parametrize("kind", KINDS)
def test_an_episode_leaves_nothing_behind_in_the_next(kind: Kind) -> None:
    collector = counter("next_step", 20)
    policy = remembering(collector.world, kind)
    rollout = collector.collect(policy, None, seed=0, step=0)
    units = prepare(rollout, policy, None, AdvantageSettings()).units
    assert isinstance(units, Sequences)
    before = policy(units)
    # change all that was seen in each environment's first episode, and the memory at the start
    episode = units.fresh.long().cumsum(1)
    vector = units.observations.vector + 100.0 * (episode == 0)[..., None]
    changed = dataclasses.replace(units, observations=Observations(vector=vector), state=units.state + 3)
    after = policy(changed)
    later = (episode > 0)[units.mask]
    assert bool((before.logp != after.logp)[~later].any())
    assert torch.equal(before.logp[later], after.logp[later])
    assert torch.equal(before.value[later], after.value[later])
    # and what is seen on a step that only resets changes nothing at all
    vector = units.observations.vector + 100.0 * (~units.mask)[..., None]
    assert bool((~units.mask).any())
    idle = policy(dataclasses.replace(units, observations=Observations(vector=vector)))
    assert torch.equal(before.logp, idle.logp)
    collector.world.close()


def test_a_sequences_gradient_reaches_back_to_its_episodes_first_step() -> None:
    collector = counter("same_step", 12)
    policy = remembering(collector.world, "gru")
    rollout = collector.collect(policy, None, seed=0, step=0)
    units = prepare(rollout, policy, None, AdvantageSettings()).units
    assert isinstance(units, Sequences)
    vector = units.observations.vector.clone().requires_grad_()
    seen = policy(dataclasses.replace(units, observations=Observations(vector=vector)))
    # the last step of row 0 depends on its own episode's steps and on no other
    starts = units.fresh[0].nonzero()[-1].item()
    seen.logp[11].backward()
    assert vector.grad is not None
    moved = (vector.grad.abs().sum(-1) > 0).nonzero().tolist()
    assert moved == [[0, t] for t in range(int(starts), 12)]
    collector.world.close()


def test_pieces_of_a_hand_made_case() -> None:
    fresh = torch.tensor([[0, 0, 1, 0, 0], [0, 1, 1, 0, 1]], dtype=torch.bool)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]], dtype=torch.bool)
    units = Sequences(
        observations=Observations(vector=torch.zeros(2, 5, 1)),
        actions=torch.zeros(2, 5),
        state=torch.zeros(2, 1),
        fresh=fresh,
        mask=mask,
    )
    # actions in order: row 0 steps 0–4 are 0–4; row 1 steps 0, 2, 3, 4 are 5–8
    # pieces: [0 1], [2 3 4], [5], [6 7], [8]; the longest first: [2 3 4], [0 1], [6 7], [5], [8]
    pieces = Pieces.of(units)
    assert pieces.unit.tolist() == [0, 0, 1, 1, 1]
    assert pieces.fresh.tolist() == [True, False, True, False, True]
    assert pieces.batch_sizes.tolist() == [5, 3, 1]
    assert pieces.order.tolist() == [2, 0, 6, 5, 8, 3, 1, 7, 4]
    assert pieces.order[pieces.place].tolist() == list(range(9))
    assert units.sizes.tolist() == units.lengths.tolist() == [5, 4]


def learnt(recurrent: Kind | None) -> float:
    """Mean return in the world of the cue, after learning."""
    settings = WorldSettings(num_envs=16, autoreset="same_step", vectorization="sync")
    world = make_world("BridleTest/Cue-v0", settings)
    network = NetworkSettings(hidden=(16,), recurrent=recurrent, recurrent_width=16)
    policy = build_policy(world.observations, world.actions, network, seed=0)
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=0.01))
    optimiser = Optimiser([group], total_steps=40)
    collector = Collector(world, 12)
    collector.restart(seed=0, step=0)
    ppo_settings = PPOSettings(epochs=4, minibatches=2)
    for step in range(40):
        batch = prepare(collector.collect(policy, None, seed=0, step=step), policy, None, AdvantageSettings(lam=1.0))
        list(ppo.update(policy, batch, optimiser, ppo_settings, seed=0, step=step))
    score = evaluate(world, policy, None, episodes=64, deterministic=True, seed=0)
    world.close()
    return score.mean


@pytest.mark.parametrize("kind", KINDS)
def test_a_memory_recalls_the_cue(kind: Kind) -> None:
    assert learnt(kind) == 1.0


def test_without_a_memory_the_cue_is_lost() -> None:
    assert learnt(None) < 0.7  # 0.5, and 3.2 standard errors of 64 tosses


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spoil", [False, True])
def test_the_endless_world_with_a_memory(mode: str, spoil: bool) -> None:
    settings = WorldSettings(num_envs=4, autoreset=mode, vectorization="sync")
    world = make_world("BridleTest/Endless-v0", settings)
    network = NetworkSettings(hidden=(8,), recurrent="gru", recurrent_width=8)
    policy = build_policy(world.observations, world.actions, network, seed=0)
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=0.02))
    optimiser = Optimiser([group], total_steps=60)
    collector = Collector(world, 8)
    collector.restart(seed=0, step=0)
    for step in range(60):
        rollout = collector.collect(policy, None, seed=0, step=step)
        if spoil:
            ended = rollout.terminated | rollout.truncated
            rollout = dataclasses.replace(
                rollout,
                terminated=ended,
                truncated=torch.zeros_like(ended),
                cut=rollout.cut.select(slice(0)),
                memory=dataclasses.replace(rollout.memory, cut=rollout.memory.cut[:0]),
            )
        batch = prepare(rollout, policy, None, AdvantageSettings(gamma=0.8))
        list(ppo.update(policy, batch, optimiser, PPOSettings(epochs=3, minibatches=1), seed=0, step=step))
    rollout = collector.collect(policy, None, seed=0, step=60)
    mean = float(trajectories(rollout, policy, None).values[rollout.mask].mean())
    world.close()
    if spoil:
        # a memory can count: 2.952, 2.44, 1.8 and 1 before the "end"
        assert mean < 2.5
    else:
        assert mean == pytest.approx(5.0, rel=0.03)


def test_settings_that_cannot_work_with_a_memory_are_refused() -> None:
    with pytest.raises(ConfigError, match="shared_trunk=False"):
        NetworkSettings(recurrent="lstm", shared_trunk=False)
    with pytest.raises(ConfigError, match="recurrent_width=0"):
        NetworkSettings(recurrent_width=0)
    for memory in (nn.GRU(2, 2, num_layers=2), nn.GRU(2, 2, bidirectional=True), nn.LSTM(2, 3, proj_size=1)):
        with pytest.raises(ValueError, match="one layer"):
            RecurrentActorCritic(
                encoder=nn.Identity(), memory=memory, actor=nn.Linear(2, 2), critic=nn.Linear(2, 1), head=nn.Identity()
            )
