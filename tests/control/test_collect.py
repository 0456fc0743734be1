from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bridle.control.actor_critic import ActorCritic, ImageActorCritic
from bridle.control.collect import Collector, Episode, Rollout, Stop
from bridle.control.heads import CategoricalHead
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import Transitions
from bridle.control.prepare import prepare, trajectories
from bridle.core.moments import Moments
from bridle.learn import ppo
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from tests.control.worlds import MODES


class Reading(nn.Module):
    """A critic that reads the state off: V = number + t/8, exact in float32."""

    def forward(self, observations: Tensor) -> Tensor:
        return observations @ torch.tensor([[1.0], [0.125]])


class ReadingImages(nn.Module):
    """The same times ``worth``, read off the first pixel, and checked against all that is shown beside it."""

    def __init__(self, worth: float = 1.0) -> None:
        super().__init__()
        self.worth = worth

    def forward(self, seen: Observations) -> Tensor:
        (image,) = seen.images
        high, low, t = image[:, :, 0, 0].float().T
        number = 256 * high + low
        if seen.vector.shape[1]:
            bits, tens, ones, exact, times = seen.vector.split([10, 20, 10, 2, 5], dim=1)
            hundreds, tens = tens.split(10, dim=1)
            assert torch.equal(bits @ 2.0 ** torch.arange(9, -1, -1), number)
            digits = [digit.argmax(1) for digit in (hundreds, tens, ones)]
            assert torch.equal(100 * digits[0] + 10 * digits[1] + digits[2], number.long())
            assert torch.equal(exact, torch.stack([number, t], dim=1))
            assert torch.equal(times.argmax(1), t.long() % 5)
        return self.worth * (number + t / 8)[:, None]


class Blind(nn.Module):
    """An actor of two actions that looks at nothing."""

    def forward(self, seen: Observations) -> Tensor:
        return torch.zeros(len(seen), 2)


def reading_policy(env: str = "Counter") -> ActorCritic:
    if env == "Counter":
        return ActorCritic(actor=nn.Linear(2, 2), critic=Reading(), head=CategoricalHead())
    # of images alone values are said while acting, of the others afterwards
    kind = ImageActorCritic if env == "ImageCounter" else ActorCritic
    policy = kind(actor=Blind(), critic=ReadingImages(), head=CategoricalHead())
    policy.register_parameter("unused", nn.Parameter(torch.zeros(())))
    return policy


def counter(mode: str, n_steps: int, num_envs: int = 3, env: str = "Counter") -> Collector:
    settings = WorldSettings(num_envs=num_envs, autoreset=mode, vectorization="sync")
    world = make_world(f"BridleTest/{env}-v0", settings)
    collector = Collector(world, n_steps)
    collector.restart(seed=5, step=1)
    return collector


def valid(collector: Collector, rollouts: int, env: str = "Counter") -> list[list[tuple[float, ...]]]:
    """(V(s), r, V(s') or 0 where terminated, terminated, truncated) of each environment's valid steps over several rollouts."""
    seen: list[list[tuple[float, ...]]] = [[] for _ in range(collector.world.num_envs)]
    policy = reading_policy(env)
    for step in range(1, rollouts + 1):
        rollout = collector.collect(policy, None, seed=5, step=step)
        t = trajectories(rollout, policy, None)
        for b, row in enumerate(seen):
            fields = (t.values, t.rewards, t.next_values, t.terminated, t.truncated)
            steps = [[float(f[b, i]) for f in fields] for i in rollout.mask[b].nonzero()[:, 0]]
            row += [(v, r, 0.0 if end else successor, end, cut) for v, r, successor, end, cut in steps]
    collector.world.close()
    return seen


@pytest.mark.parametrize("env", ["Counter", "ImageCounter", "DictCounter"])
@pytest.mark.parametrize("n_steps", [1, 7, 24])
@pytest.mark.parametrize("mode", MODES)
def test_values_of_true_successors_in_every_autoreset_mode(mode: str, n_steps: int, env: str) -> None:
    reference = valid(counter("same_step", 48), 1)
    told = valid(counter(mode, n_steps, env=env), 48 // n_steps, env)
    for found, expected in zip(told, reference, strict=True):
        assert found == expected[: len(found)]
        assert len(found) >= 42 // 2
        for value, reward, next_value, terminated, truncated in found:
            number, t = divmod(value, 1)
            assert reward == number + 0.25 * (8 * t + 1)
            assert next_value == (0 if terminated else value + 0.125)
            end = 8 * t + 1 == 1 + number % 5
            assert terminated == (end and number % 2 == 1)
            assert truncated == (end and number % 2 == 0)


@pytest.mark.parametrize("missing", [[], [4], [0, 5], [0, 1, 2, 3, 4, 5]])
def test_a_mask_selects_what_it_says(missing: list[int]) -> None:
    vector, image = torch.arange(12.0).view(2, 3, 2), torch.arange(6, dtype=torch.uint8).view(2, 3, 1, 1, 1)
    mask = torch.tensor([place not in missing for place in range(6)]).view(2, 3)
    found = Observations(vector=vector, images=(image,), mask=mask[..., None]).select(mask)
    left = [place for place in range(6) if place not in missing]
    assert found.vector.tolist() == [[2.0 * place, 2.0 * place + 1] for place in left]
    assert found.images[0].shape == (len(left), 1, 1, 1)
    assert found.images[0].flatten().tolist() == left
    assert found.mask is not None
    assert bool(found.mask.all())


def test_values_said_while_acting_serve_until_the_critic_has_learnt() -> None:
    collector, policy = counter("next_step", 9, env="ImageCounter"), reading_policy("ImageCounter")
    rollout = collector.collect(policy, None, seed=5, step=1)
    collector.world.close()
    asked = dataclasses.replace(rollout, values=None)
    before, said = (trajectories(one, policy, None) for one in (asked, rollout))
    assert rollout.values is not None
    assert torch.equal(said.values, before.values)
    assert torch.equal(said.next_values, before.next_values)
    policy.critic = ReadingImages(worth=2.0)
    assert torch.equal(prepare(rollout, policy, None, AdvantageSettings()).old_value, rollout.values[rollout.mask])
    anew = prepare(rollout, policy, None, AdvantageSettings(), anew=True)
    assert torch.equal(anew.old_value, 2 * rollout.values[rollout.mask])


def test_episodes_span_rollouts_and_are_told_once() -> None:
    def episodes(n_steps: int, rollouts: int) -> list[Episode]:
        collector, policy, told = counter("same_step", n_steps, num_envs=1), reading_policy(), []
        for step in range(rollouts):
            told += collector.collect(policy, None, seed=0, step=step).episodes
        collector.world.close()
        return told

    assert episodes(1, 40) == episodes(8, 5) == episodes(40, 1)


@pytest.mark.parametrize("mode", MODES)
def test_an_episode_is_told_with_its_own_actions_and_rewards_alone(mode: str) -> None:
    collector = counter(mode, 40)
    told = collector.collect(reading_policy(), None, seed=0, step=0).episodes
    collector.world.close()
    assert len(told) > 20
    for episode in told:
        # an episode of length n that began at number m pays Σ_{t=1}^{n} (m + t/4)
        number = (episode.return_ - episode.length * (episode.length + 1) / 8) / episode.length
        assert episode.length == 1 + number % 5
        assert episode.stop is (Stop.TRUNCATED if number % 2 == 0 else Stop.TERMINATED)


def test_dummy_steps_count_in_no_budget() -> None:
    collector, policy = counter("next_step", 30), reading_policy()
    rollout = collector.collect(policy, None, seed=0, step=0)
    batch = prepare(rollout, policy, None, AdvantageSettings())
    assert rollout.steps == len(batch) == len(batch.units) == int(rollout.mask.sum())
    assert 45 <= rollout.steps < 90
    collector.world.close()


def test_a_rollout_of_one_step_is_never_empty() -> None:
    collector, policy = counter("next_step", 1, num_envs=2), reading_policy()
    for step in range(40):
        assert collector.collect(policy, None, seed=0, step=step).steps >= 1
    collector.world.close()


def test_a_restart_depends_on_its_key_alone() -> None:
    collector, policy = counter("same_step", 6), reading_policy()
    first = collector.collect(policy, None, seed=1, step=9)
    collector.collect(policy, None, seed=1, step=10)
    collector.restart(seed=5, step=1)
    again = collector.collect(policy, None, seed=1, step=9)
    assert torch.equal(first.observations.vector, again.observations.vector)
    for name in ("actions", "sampler_logp", "rewards", "mask"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    collector.restart(seed=5, step=2)
    assert not torch.equal(
        collector.collect(policy, None, seed=1, step=9).observations.vector, first.observations.vector
    )
    collector.world.close()


def test_no_rollout_before_a_start() -> None:
    world = make_world("BridleTest/Counter-v0", WorldSettings(num_envs=1))
    with pytest.raises(RuntimeError, match="restart"):
        Collector(world, 1).collect(reading_policy(), None, seed=0, step=0)
    world.close()


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("env", ["CartPole-v1", "BridleTest/Target-v0"])
def test_the_first_trainer_forward_agrees_with_the_sampler(env: str, shared: bool) -> None:
    world = make_world(env, WorldSettings(num_envs=8))
    policy = build_policy(world.observations, world.actions, NetworkSettings(shared_trunk=shared), seed=3)
    moments = Moments.empty((world.observations.width,)).updated(
        torch.linspace(-2, 2, 5 * world.observations.width).view(5, -1)
    )
    collector = Collector(world, 64)
    collector.restart(seed=0, step=1)
    rollout = collector.collect(policy, moments, seed=0, step=1)
    batch = prepare(rollout, policy, moments, AdvantageSettings())
    gap = (policy(batch.units).logp.detach() - batch.old_logp).abs()
    assert float(gap.mean()) <= 1e-5
    assert float(gap.max()) <= 1e-4
    if env == "BridleTest/Target-v0":
        assert float(rollout.actions.abs().max()) > 1  # kept as drawn, beyond the box
    world.close()


def test_the_batch_is_laid_out_environment_by_environment() -> None:
    collector, policy = counter("next_step", 20), reading_policy()
    rollout = collector.collect(policy, None, seed=0, step=0)
    batch = prepare(rollout, policy, None, AdvantageSettings(estimator="td", gamma=0.5))
    assert isinstance(batch.units, Transitions)
    row = 0
    last: tuple[int, float] | None = None
    for b in range(3):
        for t in range(20):
            if not rollout.mask[b, t]:
                continue
            number, time = rollout.observations.vector[b, t].tolist()
            assert batch.units.observations.vector[row].tolist() == [number, time]
            assert int(batch.units.actions[row]) == int(rollout.actions[b, t])
            bootstrap = 0.0 if rollout.terminated[b, t] else 0.5 * (number + (time + 1) / 8)
            target = number + 0.25 * (time + 1) + bootstrap
            assert float(batch.returns[row]) == pytest.approx(target, rel=1e-6)
            assert float(batch.old_value[row]) == number + time / 8
            if time > 0 and last is not None and last[0] == b and t > 0:
                assert int(batch.episode[row]) == last[1]
            elif last is not None:
                assert int(batch.episode[row]) != last[1]
            last = (b, int(batch.episode[row]))
            row += 1
    assert row == len(batch)
    collector.world.close()


SEEN_ENDLESS = ("Endless", "EndlessDict", "EndlessImage", "EndlessBoth")


def learned_value(mode: str, spoil: Callable[[Rollout], Rollout], *, env: str = "Endless", gamma: float = 0.8) -> float:
    """V of the one state of the endless world, cut every four steps, after learning."""
    world = make_world(f"BridleTest/{env}-v0", WorldSettings(num_envs=4, autoreset=mode, vectorization="sync"))
    policy = build_policy(world.observations, world.actions, NetworkSettings(hidden=(8,)), seed=0)
    lr, updates = {"EndlessImage": (3e-4, 25), "EndlessBoth": (0.01, 25)}.get(env, (0.03, 40))
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=lr))
    optimiser = Optimiser([group], total_steps=updates)
    collector = Collector(world, 8)
    collector.restart(seed=0, step=0)
    settings = PPOSettings(epochs=3, minibatches=1)
    for step in range(updates):
        rollout = spoil(collector.collect(policy, None, seed=0, step=step))
        batch = prepare(rollout, policy, None, AdvantageSettings(gamma=gamma))
        list(ppo.update(policy, batch, optimiser, settings, seed=0, step=step))
    value = float(policy.values(collector.collect(policy, None, seed=0, step=updates).last, None)[0].detach())
    world.close()
    return value


@pytest.mark.parametrize("env", SEEN_ENDLESS)
@pytest.mark.parametrize("mode", MODES)
def test_the_endless_world_is_worth_one_over_one_minus_gamma(mode: str, env: str) -> None:
    assert learned_value(mode, lambda rollout: rollout, env=env) == pytest.approx(5.0, rel=0.03)


@pytest.mark.parametrize("env", SEEN_ENDLESS)
def test_taking_truncation_for_termination_misses_it(env: str) -> None:
    def merge(rollout: Rollout) -> Rollout:
        ended = rollout.terminated | rollout.truncated
        nothing = torch.zeros_like(ended)
        return dataclasses.replace(rollout, terminated=ended, truncated=nothing, cut=rollout.cut.select(slice(0)))

    # four steps to the "end": the mean of 1, 1.8, 2.44 and 2.952 is what such a critic learns
    assert learned_value("same_step", merge, env=env) == pytest.approx(2.048, rel=0.1)
