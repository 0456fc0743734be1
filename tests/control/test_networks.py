from __future__ import annotations

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import Tensor, nn

from bridle.batch import Evaluation
from bridle.control.actor_critic import ActorCritic
from bridle.control.collect import Collector
from bridle.control.distributions import Bernoulli, Categorical, DiagonalGaussian, MultiCategorical, SquashedGaussian
from bridle.control.evaluate import evaluate
from bridle.control.heads import CategoricalHead
from bridle.control.images import NATURE_WIDTH, NatureCNN
from bridle.control.making import WorldSettings, make_world
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import ControlPolicy
from bridle.control.prepare import prepare
from bridle.control.recurrent import RecurrentActorCritic
from bridle.control.spaces import ActionSpec, ObservationSpec, action_spec, observation_spec
from bridle.errors import ConfigError
from bridle.learn import ppo
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings

ATARI = spaces.Box(0, 255, (4, 84, 84), np.uint8)


def built(
    seen: spaces.Space[object],
    done: spaces.Space[object],
    settings: NetworkSettings = NetworkSettings(),  # noqa: B008
) -> ControlPolicy:
    return build_policy(observation_spec(seen, "w"), action_spec(done, "w"), settings, seed=0)


def test_the_nature_cnn_has_the_published_sizes() -> None:
    cnn = NatureCNN((4, 84, 84))
    shapes = [tuple(p.shape) for name, p in cnn.named_parameters() if name.endswith("weight")]
    assert shapes == [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3), (512, 3136)]
    strides = [layer.stride for layer in cnn.layers if isinstance(layer, nn.Conv2d)]
    assert strides == [(4, 4), (2, 2), (1, 1)]
    # with 18 actions and no critic, that of Mnih et al. has 1,693,362 weights
    assert sum(p.numel() for p in cnn.parameters()) + 18 * 513 == 1_693_362


def test_an_image_is_divided_by_255_and_nothing_else() -> None:
    cnn = NatureCNN((1, 36, 36))
    image = torch.randint(0, 256, (2, 1, 36, 36), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x: Tensor = image.float() / 255
    for layer in cnn.layers:
        x = layer(x)
    torch.testing.assert_close(cnn(image), x, rtol=1e-5, atol=1e-6)
    assert bool((x != 0).any())


@pytest.mark.parametrize(
    ("seen", "done", "settings", "family"),
    [
        (spaces.Box(-1, 1, (3,)), spaces.Discrete(2), NetworkSettings(), Categorical),
        (spaces.Discrete(3), spaces.MultiDiscrete([2, 3]), NetworkSettings(), MultiCategorical),
        (spaces.MultiBinary(3), spaces.MultiBinary(2), NetworkSettings(shared_trunk=True), Bernoulli),
        (spaces.MultiDiscrete([2, 2]), spaces.Box(-1, 1, (2,)), NetworkSettings(), DiagonalGaussian),
        (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), NetworkSettings(std="state"), DiagonalGaussian),
        (spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), NetworkSettings(squash=True), SquashedGaussian),
        (ATARI, spaces.Discrete(6), NetworkSettings(), Categorical),
        (ATARI, spaces.Discrete(6), NetworkSettings(shared_trunk=False), Categorical),
        (spaces.Dict({"eye": ATARI, "x": spaces.Discrete(2)}), spaces.Discrete(6), NetworkSettings(), Categorical),
        (spaces.Tuple((ATARI, ATARI)), spaces.Discrete(6), NetworkSettings(recurrent="gru"), Categorical),
    ],
)
def test_a_policy_is_picked_from_the_spaces(
    seen: spaces.Space[object], done: spaces.Space[object], settings: NetworkSettings, family: type
) -> None:
    policy = built(seen, done, settings)
    seen.seed(0)
    observations = observation_spec(seen, "w").encode_each([seen.sample() for _ in range(3)])
    state = policy.initial_state(3)
    distribution, _ = policy.distribution(observations, state)
    assert isinstance(distribution, family)
    acted = policy.act(observations, state, np.random.default_rng(0))
    assert acted.logp.shape == (3,)
    assert all(
        done.contains(action) for action in action_spec(done, "w").to_world(policy.play(acted.actions.detach().numpy()))
    )
    assert policy.values(observations, state).shape == (3,)
    assert distribution.entropy().shape == distribution.kl(distribution.detach()).shape == (3,)
    # every parameter has its part in what is learned
    logp = distribution.log_prob(acted.actions.detach())
    (logp.sum() + policy.values(observations, state).sum() + distribution.entropy().sum()).backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())


def test_an_image_alone_has_one_trunk_and_numbers_beside_it_have_hidden_layers() -> None:
    alone = built(ATARI, spaces.Discrete(6))
    assert isinstance(alone, ActorCritic)
    assert isinstance(alone.actor, nn.Sequential)
    assert tuple(alone.actor[0].weight.shape) == (6, NATURE_WIDTH)  # type: ignore[union-attr,arg-type]
    both = built(spaces.Dict({"eye": ATARI, "x": spaces.Box(0, 1, (3,))}), spaces.Discrete(6))
    shapes = {name: tuple(p.shape) for name, p in both.named_parameters()}
    assert shapes["trunk.hidden.0.weight"] == (64, NATURE_WIDTH + 3)
    assert shapes["actor.0.weight"] == (6, 64)


def test_the_deviation_depends_on_the_state_only_if_so_asked() -> None:
    x = Observations(vector=torch.tensor([[1.0, 0.0, 0.0], [0.0, 5.0, -5.0]]))
    for std, equal in (("parameter", True), ("state", False)):
        settings = NetworkSettings(std=std, initial_log_std=-0.7)  # type: ignore[arg-type]
        found = built(spaces.Box(-1, 1, (3,)), spaces.Box(-1, 1, (2,)), settings).distribution(x, None)[0]
        assert isinstance(found, DiagonalGaussian)
        assert torch.equal(found.log_std[0], found.log_std[1]) is equal
        torch.testing.assert_close(found.log_std.detach(), torch.full((2, 2), -0.7), rtol=0, atol=0.05)


def test_squashing_plays_tanh_and_keeps_what_was_drawn() -> None:
    world = make_world("BridleTest/Target-v0", WorldSettings(num_envs=4))
    settings = NetworkSettings(hidden=(8,), squash=True, initial_log_std=1.0)
    policy = build_policy(world.observations, world.actions, settings, seed=0)
    collector = Collector(world, 32)
    collector.restart(seed=0, step=0)
    rollout = collector.collect(policy, None, seed=0, step=0)
    assert float(rollout.actions.abs().max()) > 3
    played = policy.play(rollout.actions.numpy())
    np.testing.assert_allclose(played, np.tanh(rollout.actions.numpy()))
    # the world pays −distance² in its own units, half widths 2 and 5
    goals = np.where(rollout.observations.vector.numpy()[..., 1:] == 1, [[[2.0, -7.0]]], [[[4.0, -3.0]]])
    away = (np.array([3.0, -5.0]) + played * np.array([2.0, 5.0]) - goals) / np.array([2.0, 5.0])
    np.testing.assert_allclose(rollout.rewards.numpy(), -np.square(away).sum(-1), rtol=1e-4, atol=1e-5)
    world.close()


@pytest.mark.parametrize(
    ("env", "settings", "least"),
    [
        ("MatchDigits", NetworkSettings(hidden=(16,)), 0.99),
        ("MatchBits", NetworkSettings(hidden=(16,)), 0.99),
        ("Target", NetworkSettings(hidden=(16,), squash=True, initial_log_std=-0.5), -0.02),
        ("Target", NetworkSettings(hidden=(16,), std="state", initial_log_std=-0.5), -0.02),
    ],
)
def test_every_kind_of_action_learns(env: str, settings: NetworkSettings, least: float) -> None:
    world = make_world(f"BridleTest/{env}-v0", WorldSettings(num_envs=16))
    policy = build_policy(world.observations, world.actions, settings, seed=0)
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=0.01))
    optimiser = Optimiser([group], total_steps=30)
    collector = Collector(world, 16)
    collector.restart(seed=0, step=0)
    before = evaluate(world, policy, None, episodes=32, deterministic=False, seed=0).mean
    collector.restart(seed=0, step=0)
    for step in range(30):
        optimiser.schedule(step)
        batch = prepare(collector.collect(policy, None, seed=0, step=step), policy, None, AdvantageSettings())
        list(ppo.update(policy, batch, optimiser, PPOSettings(), seed=0, step=step))
    after = evaluate(world, policy, None, episodes=32, deterministic=True, seed=0).mean
    world.close()
    assert before < least - 0.3
    assert after >= least


def test_squashing_an_unbounded_box_is_refused() -> None:
    unbounded = spaces.Box(-np.inf, np.inf, (2,))
    with pytest.raises(ConfigError, match="squash=True"):
        built(spaces.Discrete(2), unbounded, NetworkSettings(squash=True))


@pytest.mark.parametrize(
    ("field", "value"),
    [("hidden", (0,)), ("activation", "x"), ("std", "x"), ("recurrent", "x"), ("initial_log_std", np.inf)],
)
def test_settings_that_cannot_work_are_refused(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{field}="):
        NetworkSettings(**{field: value})  # type: ignore[arg-type]


class Waves(nn.Module):
    """A network of one's own: sines of what is seen."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, seen: Tensor) -> Tensor:
        return torch.sin(self.linear(seen))


def own_modules(observations: ObservationSpec, actions: ActionSpec) -> ControlPolicy:
    trunk = Waves(observations.width, 16)
    return ActorCritic(trunk=trunk, actor=nn.Linear(16, actions.width), critic=nn.Linear(16, 1), head=CategoricalHead())


class OwnPolicy(ControlPolicy):
    """A policy of one's own from the ground up: one table of logits and values for all states."""

    def __init__(self, observations: ObservationSpec, actions: ActionSpec) -> None:
        super().__init__()
        self.table = nn.Linear(observations.width, actions.width + 1)

    def forward(self, units: object) -> Evaluation:
        seen = units.observations  # type: ignore[attr-defined]
        distribution, _ = self.distribution(seen, None)
        logp = distribution.log_prob(units.actions)  # type: ignore[attr-defined]
        return Evaluation(logp=logp, entropy=distribution.entropy(), value=self.values(seen, None))

    def distribution(self, observations: Observations, state: Tensor | None) -> tuple[Categorical, Tensor | None]:
        return Categorical(logits=self.table(observations.vector)[:, :-1], mask=observations.mask), state

    def values(self, observations: Observations, state: Tensor | None) -> Tensor:
        return self.table(observations.vector)[:, -1]


@pytest.mark.parametrize("factory", ["own_modules", "OwnPolicy"])
def test_a_module_of_ones_own_learns(factory: str) -> None:
    world = make_world("CartPole-v1", WorldSettings(num_envs=8))
    settings = NetworkSettings(factory=f"{__name__}:{factory}")
    policy = build_policy(world.observations, world.actions, settings, seed=0)
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=0.01))
    optimiser = Optimiser([group], total_steps=12)
    collector = Collector(world, 64)
    collector.restart(seed=0, step=0)
    lengths = []
    for step in range(12):
        rollout = collector.collect(policy, None, seed=0, step=step)
        lengths.append(sum(e.length for e in rollout.episodes) / max(1, len(rollout.episodes)))
        batch = prepare(rollout, policy, None, AdvantageSettings())
        list(ppo.update(policy, batch, optimiser, PPOSettings(), seed=0, step=step))
    world.close()
    assert max(lengths[-3:]) > 1.5 * lengths[0]


@pytest.mark.parametrize("recurrent", [None, "lstm"])
def test_freezing_and_kl(recurrent: str | None) -> None:
    world = make_world("CartPole-v1", WorldSettings(num_envs=3))
    settings = NetworkSettings(hidden=(8,), recurrent=recurrent)  # type: ignore[arg-type]
    policy = build_policy(world.observations, world.actions, settings, seed=0)
    assert isinstance(policy, RecurrentActorCritic) == (recurrent is not None)
    collector = Collector(world, 9)
    collector.restart(seed=0, step=0)
    units = prepare(collector.collect(policy, None, seed=0, step=0), policy, None, AdvantageSettings()).units
    frozen = policy.freeze(units)
    assert float(policy.kl(units, frozen).detach().abs().max()) < 1e-6
    before = policy.unit_distribution(units)
    assert isinstance(before, Categorical)
    p = before.log_probs.detach().exp()
    with torch.no_grad():
        for parameter in policy.actor_parameters().values():
            parameter.add_(0.1 * torch.ones_like(parameter).cumsum(0))
    after = policy.unit_distribution(units)
    assert isinstance(after, Categorical)
    kl = policy.kl(units, frozen)
    torch.testing.assert_close(kl, (p * (p.log() - after.log_probs)).sum(-1), rtol=1e-3, atol=1e-6)
    assert kl.shape == (int(units.sizes.sum()),)
    world.close()


def test_a_factory_sees_the_spaces() -> None:
    made = gymnasium.make("CartPole-v1")
    policy = own_modules(observation_spec(made.observation_space, "w"), action_spec(made.action_space, "w"))
    assert policy.values(Observations(vector=torch.zeros(2, 4)), None).shape == (2,)
