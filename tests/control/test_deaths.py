"""An environment's process that dies is made anew: its episode is cut where it was last seen, and nothing else changes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bridle.control.collect import Collector, Rollout
from bridle.control.environments import World, WorldStep
from bridle.control.evaluate import evaluate
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.prepare import prepare, trajectories
from bridle.control.scaling import RewardScale, observed
from bridle.core.moments import Moments
from bridle.errors import ConfigError, WorldError
from bridle.learn import ppo
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from tests.control.test_collect import reading_policy
from tests.control.worlds import MODES

# from CPython 3.12 on, multiprocessing warns of any fork while threads run; torch has some
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

GAMMA = 0.8


def mortal(env: str, n_steps: int, *, num_envs: int = 2, limit: int = 999, **settings: Any) -> Collector:
    world = WorldSettings(num_envs=num_envs, vectorization="async", on_death="restart", death_limit=limit, **settings)
    collector = Collector(make_world(f"BridleTest/{env}-v0", world), n_steps)
    collector.restart(seed=5, step=1)
    return collector


def steps(world: World, count: int) -> list[WorldStep]:
    return [world.step(np.zeros(world.num_envs, np.int64)) for _ in range(count)]


def tickets(folder: Path, count: int) -> str:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        (folder / str(number)).touch()
    return f"tickets={folder}"


@pytest.mark.parametrize(("mode", "n_steps"), [("same_step", 6), ("next_step", 1), ("disabled", 24)])
def test_a_step_that_never_came_back_counts_for_nothing_and_the_one_before_is_cut(mode: str, n_steps: int) -> None:
    """The Counter shows (m, t), V(m, t) = m + t/8, and a life of 1 + m % 5 steps ends with one that is lost."""
    collector, policy = mortal("Mortal", n_steps, autoreset=mode), reading_policy()
    lost = taken = 0
    for step in range(1, 24 // n_steps + 1):
        rollout = collector.collect(policy, None, seed=5, step=step)
        seen = trajectories(rollout, policy, None)
        batch = prepare(rollout, policy, None, AdvantageSettings(estimator="td", gamma=GAMMA))
        number, t = rollout.observations.vector.unbind(-1)
        assert torch.equal(rollout.mask, ~rollout.lost)
        assert torch.equal(rollout.lost, t == number % 5)
        assert torch.equal(seen.next_values[rollout.mask], (number + (t + 1) / 8)[rollout.mask])
        target = number + (t + 1) / 4 + GAMMA * (number + (t + 1) / 8)
        assert torch.allclose(batch.returns, target[rollout.mask], rtol=1e-6)
        assert not (rollout.terminated | rollout.truncated).any()
        assert rollout.episodes == ()
        assert len(batch) == rollout.steps == int(rollout.mask.sum())
        lost, taken = lost + int(rollout.lost.sum()), taken + rollout.steps
        after = t[:, 1:][rollout.lost[:, :-1]]
        assert torch.equal(after, torch.zeros_like(after))
    assert lost > 6
    assert len(collector.world.told()) == len(collector.world.replacements) == lost
    assert taken + lost == 48
    collector.world.close()


def test_episodes_numbers_statistics_and_memory_begin_anew_with_the_environment() -> None:
    collector = mortal("Mortal", 24)
    world = collector.world
    policy = build_policy(world.observations, world.actions, NetworkSettings(hidden=(4,), recurrent="gru"), seed=0)
    rollout = collector.collect(policy, None, seed=5, step=1)
    world.close()
    batch = prepare(rollout, policy, None, AdvantageSettings())
    numbers = rollout.observations.vector[..., 0][rollout.mask]
    changes = (batch.episode[1:] != batch.episode[:-1]) == (numbers[1:] != numbers[:-1])
    assert changes.all()
    moments = observed(Moments.empty((2,)), rollout.observations, rollout.mask, torch.ones(2, dtype=torch.bool))
    assert torch.allclose(moments.mean[0], numbers.double().mean())
    assert rollout.memory is not None
    assert torch.equal(rollout.memory.fresh[:, 1:], rollout.lost[:, :-1])
    scale = RewardScale.fresh(2).updated(rollout.rewards, rollout.lost, rollout.mask, gamma=GAMMA)
    assert float(scale.moments.count) == rollout.steps
    returns = []
    for b in range(2):
        running = 0.0
        for t in range(24):
            running = 0.0 if rollout.lost[b, t] else GAMMA * running + float(rollout.rewards[b, t])
            returns += [] if rollout.lost[b, t] else [running]
        assert float(scale.running[b]) == pytest.approx(running)
    assert float(scale.moments.mean) == pytest.approx(np.mean(returns))


def learned_value(spoil: Callable[[Rollout], Rollout]) -> float:
    """V of the one state of the endless world, in which one step in twenty is death, after learning."""
    collector, updates = mortal("Frail", 8), 40
    world = collector.world
    policy = build_policy(world.observations, world.actions, NetworkSettings(hidden=(8,)), seed=0)
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=0.03))
    optimiser = Optimiser([group], total_steps=updates)
    for step in range(updates):
        rollout = spoil(collector.collect(policy, None, seed=0, step=step))
        batch = prepare(rollout, policy, None, AdvantageSettings(gamma=GAMMA))
        list(ppo.update(policy, batch, optimiser, PPOSettings(epochs=3, minibatches=1), seed=0, step=step))
    assert len(world.told()) > 20
    value = float(policy.values(collector.collect(policy, None, seed=0, step=updates).last, None)[0].detach())
    world.close()
    return value


def test_the_endless_world_is_worth_one_over_one_minus_gamma_however_often_it_dies() -> None:
    assert learned_value(lambda rollout: rollout) == pytest.approx(5.0, rel=0.03)


def test_taking_death_for_a_termination_misses_it() -> None:
    def terminate(rollout: Rollout) -> Rollout:
        before = torch.cat([rollout.lost[:, 1:], torch.zeros_like(rollout.lost[:, :1])], dim=1)
        return dataclasses.replace(rollout, terminated=rollout.terminated | before & rollout.mask)

    # of the steps that count, one in twenty is the last, but none of a rollout's last ones: V = 1 + 0.8 (1 − 1/20 · 7/8) V,
    # which is 4.25; with sixteen steps a rollout it wavers
    assert 3 < learned_value(terminate) < 4.6


@pytest.mark.parametrize("where", ["step", "reset"])
@pytest.mark.parametrize("mode", MODES)
def test_what_led_to_a_state_leads_there_again_though_nobody_dies_this_time(
    mode: str, where: str, tmp_path: Path
) -> None:
    asked = (tickets(tmp_path / "tickets", 3), f"where={where}")
    policy = reading_policy()
    collectors = [mortal("Fated", 8, autoreset=mode, kwargs=asked) for _ in range(2)]
    first, again = collectors
    for step in range(2):
        first.collect(policy, None, seed=5, step=step)
    assert len(first.world.replacements) == 3
    kept = first.state()
    assert again.replay(kept, policy, seed=5)
    assert again.world.told() == []
    for name, value in again.state().items():
        assert torch.equal(value, kept[name])
    tickets(tmp_path / "tickets", 1)
    then = [collector.collect(policy, None, seed=5, step=2) for collector in (first, again)]
    assert len(first.world.replacements) == 4
    assert torch.equal(then[0].observations.vector[:, 0], then[1].observations.vector[:, 0])
    plain = make_world("BridleTest/Counter-v0", WorldSettings(num_envs=2, autoreset=mode))
    assert not Collector(plain, 8).replay(kept, policy, seed=5)
    for collector in collectors:
        collector.world.close()


@pytest.mark.parametrize("mode", MODES)
def test_a_death_between_episodes_costs_no_transition_where_the_last_one_came_back(mode: str, tmp_path: Path) -> None:
    asked = (tickets(tmp_path / "tickets", 2), "where=reset")
    collector = mortal("Fated", 24, autoreset=mode, kwargs=asked)
    rollout = collector.collect(reading_policy(), None, seed=5, step=1)
    collector.world.close()
    number, t = rollout.observations.vector.unbind(-1)
    last = (t == number % 5) & rollout.mask
    assert int((rollout.lost & (t == number % 5)).sum()) == (2 if mode == "same_step" else 0)
    assert torch.equal(last, rollout.terminated | rollout.truncated)
    assert len(rollout.episodes) == int(last.sum())


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("kill", "the process of environment . died, killed by signal 9 .out of memory, or killed from outside; .*;"),
        ("leave", "the process of environment ., after action 0, died, left with exit code 7;"),
        ("raise", "of environment ., after action 0, raised KeyError: 'the.nbattery is empty';"),
        ("hang", "the process of environment ., after action 0, did not answer within 2 s;"),
    ],
)
@pytest.mark.parametrize("limit", [0, 1])
def test_the_death_after_the_last_that_is_allowed_ends_it_and_is_named(
    how: str, words: str, limit: int, tmp_path: Path
) -> None:
    asked = (tickets(tmp_path / "tickets", 1 + limit), f"how={how}")
    changes: dict[str, Any] = {"num_envs": 1, "kwargs": asked, "step_timeout": 2.0 if how == "hang" else None}
    if limit:
        world = mortal("Fated", 8, limit=limit, **changes).world
        assert [bool(step.lost[0]) for step in steps(world, 5)].count(True) == 1
        (line,) = world.told()
        assert line.startswith("environment 0 ")
        assert line.endswith("; made anew (1 of at most 1)")
        assert "\n" not in line
    else:
        world = make_world("BridleTest/Fated-v0", WorldSettings(vectorization="async", **changes))
        world.reset(5)
    way = (
        "1 were made anew before it, as many as world.death_limit allows" if limit else "--world.on-death restart makes"
    )
    with pytest.raises(WorldError, match=f"step.*{words.replace(' died', '.* died')} {way}") as found:
        steps(world, 20)
    assert "\n" not in str(found.value)
    world.close()


def test_one_that_hangs_is_ended_and_only_its_own_step_is_lost(tmp_path: Path) -> None:
    asked = (tickets(tmp_path / "tickets", 1), "how=hang")
    world = mortal("Fated", 8, kwargs=asked, step_timeout=2.0).world
    assert world._processes is not None
    before = list(world._processes.processes)
    lost = np.array([step.lost for step in steps(world, 8)])
    (which,) = (index for index, process in enumerate(before) if process is not world._processes.processes[index])
    hung = before[which]
    assert hung is not None
    assert hung.exitcode == -9
    assert lost.sum(axis=0).tolist() == [int(which == 0), int(which == 1)]
    assert world.told() == [f"environment {which} did not answer within 2 s; made anew (1 of at most 999)"]
    world.close()


def test_a_seeded_reset_shows_what_it_would_have_shown(tmp_path: Path) -> None:
    """Processes that are killed between two calls, as a machine out of memory kills them."""
    world = mortal("Counter", 8).world
    before = world.reset(7).vector
    for process in world._processes.processes if world._processes is not None else ():
        assert process is not None
        process.kill()
        process.join()
    assert torch.equal(world.reset(7).vector, before)
    assert len(world.told()) == 2
    assert not world.replacements
    world.close()


def test_an_episode_of_an_evaluation_whose_environment_died_is_played_anew(tmp_path: Path) -> None:
    asked = (tickets(tmp_path / "tickets", 2),)
    world = mortal("Fated", 8, kwargs=asked).world
    score = evaluate(world, reading_policy(), None, episodes=12, deterministic=True, seed=0)
    assert len(world.told()) == 2
    world.close()
    for return_, length in zip(score.returns, score.lengths, strict=True):
        number = (return_ - length * (length + 1) / 8) / length
        assert length == 1 + number % 5


def test_only_processes_of_their_own_can_be_made_anew() -> None:
    with pytest.raises(ConfigError, match=r"on_death='restart': expected \"fail\", or vectorization \"async\""):
        WorldSettings(on_death="restart")
    with pytest.raises(ConfigError, match="death_limit=0"):
        WorldSettings(death_limit=0)
    for timeout in (0.0, -1.0, 1e7, float("nan")):
        with pytest.raises(ConfigError, match=r"step_timeout=.*: expected seconds in \(0, 1e\+06\]"):
            WorldSettings(step_timeout=timeout)
