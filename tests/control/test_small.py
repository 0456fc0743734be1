"""The fast path of small agents against the plain one, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gymnasium import spaces

from bridle.batch import Batch
from bridle.control import compiled
from bridle.control.actor_critic import ActorCritic
from bridle.control.networks import NetworkSettings, build_policy
from bridle.control.observations import Observations
from bridle.control.policy import Transitions
from bridle.control.small import SmallActorCritic
from bridle.control.spaces import action_spec, observation_spec
from bridle.errors import NonFiniteStep
from bridle.learn import ppo
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.step import HandDifferentiated, Seen, Slopes, plain_vjp

SHAPES = [
    (4, "discrete", 2, NetworkSettings()),
    (9, "discrete", 5, NetworkSettings(hidden=(32,), activation="relu")),
    (17, "box", 6, NetworkSettings(initial_log_std=-0.4)),
    (3, "box", 1, NetworkSettings(hidden=(16, 48, 8))),
    (700, "box", 2, NetworkSettings(hidden=(128, 128), activation="relu")),
]


@pytest.fixture(params=["compiled", "NumPy"], autouse=True)
def form(request: pytest.FixtureRequest, small_library: object, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether the networks run compiled, or by NumPy and PyTorch."""
    if request.param == "compiled" and isinstance(small_library, str):
        pytest.skip(f"not compiled: {small_library}")
    monkeypatch.setattr(compiled, "library", small_library if request.param == "compiled" else None)
    return str(request.param)


def build(width: int, kind: str, size: int, settings: NetworkSettings) -> SmallActorCritic:
    seen = observation_spec(spaces.Box(-1, 1, (width,)), "here")
    acts = action_spec(spaces.Discrete(size) if kind == "discrete" else spaces.Box(-1, 1, (size,)), "here")
    policy = build_policy(seen, acts, settings, seed=1)
    assert isinstance(policy, SmallActorCritic)
    with torch.no_grad():  # away from the small last layer, so that every term of the gradient counts
        for parameter in policy.parameters():
            parameter.add_(
                0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            )
    return policy


def units(width: int, kind: str, size: int, rows: int, seed: int = 0) -> Transitions:
    noise = torch.Generator().manual_seed(seed)
    vector = torch.randn(rows, width, generator=noise)
    drawn = torch.randint(size, (rows,), generator=noise) if kind == "discrete" else None
    actions = torch.randn(rows, size, generator=noise) if drawn is None else drawn
    return Transitions(observations=Observations(vector=vector), actions=actions)


def slopes(rows: int) -> Slopes:
    noise = torch.Generator().manual_seed(5)
    return Slopes(**{n: torch.randn(rows, generator=noise) / rows for n in ("logp", "entropy", "value")})


def gradients(policy: ActorCritic, given: Transitions, how: Callable, along: Slopes) -> tuple[Seen, list]:
    policy.zero_grad()
    seen, pull_back = how(given)
    pull_back(along)
    return seen, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES)
@pytest.mark.parametrize("rows", [1, 64, 513])
def test_answers_and_gradients_are_those_of_the_plain_path(
    width: int, kind: str, size: int, settings: NetworkSettings, rows: int
) -> None:
    policy, given = build(width, kind, size, settings), units(width, kind, size, rows)
    assert isinstance(policy, HandDifferentiated)
    along = slopes(rows)
    for part in (along, Slopes(value=along.value), Slopes(logp=along.logp), Slopes(entropy=along.entropy)):
        fast, found = gradients(policy, given, policy.vjp, part)
        plain, expected = gradients(policy, given, lambda u: plain_vjp(policy, u), part)
        for name in ("logp", "entropy", "value"):
            # two float32 sums of up to 700 terms, in different orders
            torch.testing.assert_close(getattr(fast, name), getattr(plain, name).detach(), rtol=1e-5, atol=1e-5)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES)
def test_it_acts_and_values_as_the_plain_path(width: int, kind: str, size: int, settings: NetworkSettings) -> None:
    policy = build(width, kind, size, settings)
    seen = units(width, kind, size, 33).observations
    with torch.no_grad():
        for draws in (None, 7):
            mine = policy.act(seen, None, None if draws is None else np.random.default_rng(draws))
            theirs = ActorCritic.act(policy, seen, None, None if draws is None else np.random.default_rng(draws))
            torch.testing.assert_close(mine.actions, theirs.actions, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(mine.logp, theirs.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            policy.values(seen, None), ActorCritic.values(policy, seen, None), rtol=1e-5, atol=2e-6
        )


def test_what_it_drew_it_finds_as_likely_again() -> None:
    """The sampler's log-probabilities and the trainer's first forward come from different buffers and row counts."""
    policy = build(*SHAPES[0])
    seen = units(*SHAPES[0][:3], 2048).observations
    with torch.no_grad():
        acted = [policy.act(seen.select(slice(i, i + 64)), None, np.random.default_rng(i)) for i in range(0, 2048, 64)]
    given = Transitions(observations=seen, actions=torch.cat([a.actions for a in acted]))
    evaluation, _ = policy.vjp(given)
    torch.testing.assert_close(evaluation.logp, torch.cat([a.logp for a in acted]), rtol=0, atol=2e-6)


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES)
def test_acting_through_a_rollout_writes_down_what_the_plain_path_says(
    width: int, kind: str, size: int, settings: NetworkSettings
) -> None:
    policy, steps, rows = build(width, kind, size, settings), 7, 12
    seen = units(width, kind, size, steps * rows).observations
    each = [seen.select(slice(at, at + rows)) for at in range(0, steps * rows, rows)]
    with torch.no_grad():
        acting = policy.acting(each[0], steps, np.random.default_rng(3))
        taken = [np.array(acting.act(shown, None)[0]) for shown in each]
        assert np.array_equal(acting.actions().swapaxes(0, 1).numpy(), np.stack(taken))
        plain = ActorCritic.forward(
            policy, Transitions(observations=seen, actions=torch.from_numpy(np.concatenate(taken)))
        )
    torch.testing.assert_close(acting.logp().T.flatten(), plain.logp, rtol=1e-5, atol=2e-5)


def test_choosing_is_a_draw_of_the_softmax() -> None:
    """Pearson's χ² of 40,000 draws in one state against the plain path's π; 4 degrees of freedom, 99.99 % at 23.5."""
    policy, steps, rows = build(*SHAPES[1]), 200, 200
    state = units(9, "discrete", 5, 1).observations
    shown = state.select(torch.zeros(rows, dtype=torch.int64))
    with torch.no_grad():
        acting = policy.acting(shown, steps, np.random.default_rng(11))
        counts = np.bincount(np.concatenate([acting.act(shown, None)[0] for _ in range(steps)]), minlength=5)
        expected = steps * rows * policy.distribution(state, None)[0].log_probs[0].exp().numpy()
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_gaussian_actions_have_the_deviation_that_they_say() -> None:
    policy, steps, rows = build(*SHAPES[2]), 200, 100
    shown = units(17, "box", 6, rows).observations
    with torch.no_grad():
        acting = policy.acting(shown, steps, np.random.default_rng(11))
        drawn = np.stack([np.array(acting.act(shown, None)[0]) for _ in range(steps)])
        mean, deviation = policy.actor(shown.vector).numpy(), policy.head.log_std.exp().numpy()  # type: ignore[union-attr]
    z = (drawn - mean) / deviation
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    assert np.abs(z.reshape(-1, 6).std(axis=0) - 1).max() < 4 / np.sqrt(2 * z.size / 6)


def test_two_passes_before_their_gradients_do_not_mix() -> None:
    policy = build(*SHAPES[2])
    one, other = units(17, "box", 6, 40, seed=1), units(17, "box", 6, 40, seed=2)
    along = slopes(40)
    expected = [a + b for a, b in zip(*(gradients(policy, u, policy.vjp, along)[1] for u in (one, other)), strict=True)]
    policy.zero_grad()
    pulls = [policy.vjp(u)[1] for u in (one, other)]
    for pull_back in pulls:
        pull_back(along)
    for mine, theirs in zip([p.grad for p in policy.parameters()], expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)


def test_it_follows_its_weights_into_a_flat_buffer_and_through_a_step() -> None:
    policy, given = build(*SHAPES[0]), units(*SHAPES[0][:3], 50)
    before = policy.vjp(given)[0].logp.clone()
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings(lr=0.05))
    optimiser = Optimiser([group], total_steps=1, flat=True)
    torch.testing.assert_close(policy.vjp(given)[0].logp, before)
    seen, pull_back = policy.vjp(given)
    pull_back(slopes(50))
    optimiser.step()
    after = policy.vjp(given)[0].logp
    assert float((after - before).abs().max()) > 1e-3
    torch.testing.assert_close(after, policy(given).logp.detach(), rtol=1e-5, atol=2e-6)
    assert torch.equal(seen.logp, before)


def test_a_copy_learns_by_itself() -> None:
    policy, given = build(*SHAPES[0]), units(*SHAPES[0][:3], 50)
    policy.vjp(given)[1](slopes(50))
    other = copy.deepcopy(policy)
    before = [parameter.grad.clone() for parameter in policy.parameters()]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    seen, pull_back = other.vjp(given)
    pull_back(slopes(50))
    torch.testing.assert_close(seen.logp, other(given).logp.detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(mine, parameter.grad) for mine, parameter in zip(before, policy.parameters(), strict=True))


def move_the_critic(policy: SmallActorCritic) -> None:
    critic = Group(name="critic", parameters=dict(policy.critic.named_parameters()), settings=OptimSettings())
    Optimiser([critic], total_steps=1, flat=True)


def replace_a_weight(policy: SmallActorCritic) -> None:
    layer = policy.actor[2]
    layer.weight = torch.nn.Parameter(layer.weight.detach().clone())


def load_by_assignment(policy: SmallActorCritic) -> None:
    policy.load_state_dict({name: value.clone() for name, value in policy.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [move_the_critic, replace_a_weight, load_by_assignment])
def test_it_follows_single_weights_that_move_or_are_replaced(change: Callable[[SmallActorCritic], None]) -> None:
    policy, given = build(*SHAPES[0]), units(*SHAPES[0][:3], 50)
    policy.vjp(given)
    change(policy)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.3)
        plain, found = policy(given), policy.vjp(given)[0]
        torch.testing.assert_close(found.logp, plain.logp, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.value, plain.value, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(policy.values(given.observations, None), plain.value, rtol=1e-5, atol=1e-5)
    along = slopes(50)
    found, expected = (gradients(policy, given, how, along)[1] for how in (policy.vjp, lambda u: plain_vjp(policy, u)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("part", ["actor", "critic", "head"])
def test_frozen_weights_get_no_gradient(part: str) -> None:
    policy, given = build(*SHAPES[2]), units(*SHAPES[2][:3], 50)
    policy.get_submodule(part).requires_grad_(False)
    policy.vjp(given)[1](slopes(50))
    assert all((p.grad is None) is not p.requires_grad for p in policy.parameters())


def test_extreme_logits_stay_finite() -> None:
    """A probability that underflows to 0 has no entropy and no slope, rather than NaN."""
    policy, given = build(*SHAPES[0]), units(*SHAPES[0][:3], 8)
    with torch.no_grad():
        policy.actor[-1].bias.copy_(torch.tensor([200.0, -200.0]))
    _, found = gradients(policy, given, policy.vjp, slopes(8))
    assert all(bool(g.isfinite().all()) for g in found)


@pytest.mark.parametrize(
    "settings", [NetworkSettings(squash=True), NetworkSettings(std="state"), NetworkSettings(hidden=())]
)
def test_what_it_cannot_do_is_left_to_the_plain_path(settings: NetworkSettings) -> None:
    seen, acts = observation_spec(spaces.Box(-1, 1, (3,)), "here"), action_spec(spaces.Box(-1, 1, (2,)), "here")
    assert not isinstance(build_policy(seen, acts, settings, seed=0), SmallActorCritic)


def test_masked_actions_take_the_plain_path() -> None:
    policy, given = build(*SHAPES[1]), units(*SHAPES[1][:3], 6)
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 0] = False
    masked = Transitions(observations=given.observations.with_mask(mask), actions=given.actions.clamp(min=1))
    seen, _ = policy.vjp(masked)
    torch.testing.assert_close(seen.logp, policy(masked).logp)


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_one_weight_that_is_nan_never_passes_for_a_step(kind: str) -> None:
    """Nobody asks its answers whether they are finite: each weight's fault must show in the gradient's norm."""
    for spoilt in range(len(list(build(4, kind, 2, NetworkSettings()).parameters()))):
        policy, given = build(4, kind, 2, NetworkSettings()), units(4, kind, 2, 8)
        with torch.no_grad():
            stored = plain_vjp(policy, given)[0]
        parameters = dict(policy.named_parameters())
        optimiser = Optimiser([Group(name="policy", parameters=parameters, settings=OptimSettings())], total_steps=1)
        with torch.no_grad():
            list(parameters.values())[spoilt].view(-1)[0] = float("nan")
        before = [parameter.detach().clone() for parameter in policy.parameters()]
        batch = Batch(
            units=given,
            old_logp=stored.logp,
            old_value=stored.value,
            advantages=torch.tensor([1.0, -1.0] * 4),
            returns=torch.ones(8),
            episode=torch.zeros(8, dtype=torch.int64),
        )
        with np.errstate(over="ignore", invalid="ignore"), pytest.raises(NonFiniteStep):
            list(ppo.update(policy, batch, optimiser, PPOSettings(epochs=1, minibatches=1), seed=0, step=0))
        after = list(policy.parameters())
        assert all(torch.equal(a, b) or torch.isnan(b).any() for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES)
def test_side_by_side_under_a_flat_optimiser_they_learn_as_the_plain_path(
    width: int, kind: str, size: int, settings: NetworkSettings, form: str
) -> None:
    """There the weights lie evenly spaced, and both nets run as one stack; compiled ones do wherever they lie."""
    policy, given, along = build(width, kind, size, settings), units(width, kind, size, 70), slopes(70)
    seen, expected = gradients(policy, given, lambda u: plain_vjp(policy, u), along)
    if form == "NumPy":
        assert len(policy._nets.run(given.observations.vector)) == 2
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings())
    optimiser = Optimiser([group], total_steps=1, flat=True)
    if form == "NumPy":
        assert len(policy._nets.run(given.observations.vector)) == 1
    for _ in range(2):  # the second time in buffers that the first one wrote over
        optimiser.zero_grad()
        found, pull_back = policy.vjp(given)
        pull_back(along)
        torch.testing.assert_close(found.logp, seen.logp.detach(), rtol=1e-5, atol=1e-5)
        for parameter, theirs in zip(policy.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, theirs, rtol=2e-4, atol=2e-6)


def test_slopes_may_lie_in_any_way() -> None:
    """Every other number of a longer row, the same number throughout, and float64: what other objectives may hand over."""
    policy, rows = build(*SHAPES[2]), 40
    given, along = units(*SHAPES[2][:3], rows), slopes(2 * rows)
    odd = Slopes(
        logp=None if along.logp is None else along.logp[::2],
        entropy=torch.tensor(0.1).expand(rows),
        value=None if along.value is None else along.value[::2].double(),
    )
    found, expected = (gradients(policy, given, how, odd)[1] for how in (policy.vjp, lambda u: plain_vjp(policy, u)))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("width", [3, 5])
def test_states_of_another_width_are_refused(width: int) -> None:
    policy, given = build(*SHAPES[0]), units(width, "discrete", 2, 12)
    acting = policy.acting(units(*SHAPES[0][:3], 12).observations, 1, np.random.default_rng(0))
    for ask in (lambda: policy.vjp(given), lambda: acting.act(given.observations, None)):
        with pytest.raises(ValueError, match=r"states of shape|matmul"):
            ask()


def test_buffers_of_few_sizes_are_kept() -> None:
    """Values are asked for as many states as a rollout has and as many more as it has cut: each time another number."""
    policy = build(*SHAPES[0])
    with torch.no_grad():
        for rows in range(1, 30):
            policy.values(units(*SHAPES[0][:3], rows).observations, None)
    assert len(policy._nets._alone[1].free) <= 4
