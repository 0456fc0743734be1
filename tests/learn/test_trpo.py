"""TRPO where the policy, its Fisher matrix and the world can be enumerated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import pytest
import torch
from torch import Tensor, nn

from bridle.batch import Batch, Evaluation
from bridle.errors import ConfigError, NonFiniteStep
from bridle.learn import trpo
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.record import UpdateStep, summarise
from bridle.learn.trpo import TRPOSettings
from bridle.random import generator

EXACT = TRPOSettings(whiten=False, cg_damping=0.0, cg_iterations=50, critic_epochs=1, critic_minibatches=1)


@dataclass(frozen=True)
class Pairs:
    """Units of one action in one of a few states."""

    states: Tensor
    actions: Tensor

    def __len__(self) -> int:
        return len(self.states)

    @property
    def sizes(self) -> Tensor:
        return torch.ones(len(self), dtype=torch.int64)

    @property
    def lengths(self) -> Tensor:
        return self.sizes

    def select(self, index: Tensor | slice) -> Self:
        return type(self)(self.states[index], self.actions[index])


class Softmax(nn.Module):
    """π(·|s) = softmax of a network of the state's features; V(s) a table, or on the network's hidden layer."""

    def __init__(self, features: Tensor, actions: int, *, shared: bool = False) -> None:
        super().__init__()
        draws = generator(0, "policy")
        hidden = 4
        self.features = features
        self.inner = nn.Parameter(torch.from_numpy(draws.standard_normal((hidden, features.shape[1]))))
        self.outer = nn.Parameter(torch.from_numpy(draws.standard_normal((actions, hidden))))
        self.value = nn.Parameter(torch.zeros(len(features), dtype=torch.float64))
        self.shared = shared

    def logp(self, states: Tensor) -> Tensor:
        return torch.log_softmax(torch.tanh(self.features @ self.inner.T) @ self.outer.T, dim=-1)[states]

    def forward(self, units: Pairs) -> Evaluation:
        logp = self.logp(units.states)
        value = self.value + torch.tanh(self.features @ self.inner.T).sum(-1) if self.shared else self.value
        return Evaluation(
            logp=logp.gather(-1, units.actions[:, None])[:, 0],
            entropy=-(logp.exp() * logp).sum(-1),
            value=value[units.states],
        )

    def actor_parameters(self) -> dict[str, nn.Parameter]:
        return {"inner": self.inner, "outer": self.outer}

    def freeze(self, units: Pairs) -> Tensor:
        return self.logp(units.states).detach()

    def kl(self, units: Pairs, frozen: Tensor) -> Tensor:
        return (frozen.exp() * (frozen - self.logp(units.states))).sum(-1)


class Table(Softmax):
    """π(·|s) = softmax(logits[s])."""

    def __init__(self, states: int, actions: int) -> None:
        super().__init__(torch.eye(states, dtype=torch.float64), actions)
        self.logits = nn.Parameter(torch.zeros(states, actions, dtype=torch.float64))

    def logp(self, states: Tensor) -> Tensor:
        return torch.log_softmax(self.logits, dim=-1)[states]

    def actor_parameters(self) -> dict[str, nn.Parameter]:
        return {"logits": self.logits}


def critic_optimiser(policy: Softmax) -> Optimiser:
    group = Group(name="critic", parameters={"value": policy.value}, settings=OptimSettings(lr=0.1))
    return Optimiser([group], total_steps=1)


def every_pair(policy: Softmax, advantages: Tensor) -> Batch:
    """Every action once in every state, said to be drawn evenly: E[π/q · A] is then the mean over states of Σ_a π A."""
    states, actions = advantages.shape
    units = Pairs(torch.arange(states).repeat_interleave(actions), torch.arange(actions).repeat(states))
    return Batch(
        units=units,
        old_logp=torch.full((states * actions,), -torch.tensor(float(actions)).log(), dtype=torch.float64),
        old_value=torch.zeros(states * actions, dtype=torch.float64),
        advantages=advantages.flatten(),
        returns=torch.ones(states * actions, dtype=torch.float64),
        episode=torch.arange(states * actions),
    )


def problem() -> tuple[Softmax, Batch]:
    draws = generator(1, "problem")
    policy = Softmax(torch.from_numpy(draws.standard_normal((5, 3))), actions=3)
    return policy, every_pair(policy, torch.from_numpy(draws.standard_normal((5, 3))))


def actor_of(policy: Softmax) -> Tensor:
    return torch.cat([p.detach().flatten() for p in policy.actor_parameters().values()])


def enumerated(policy: Softmax, batch: Batch) -> tuple[Tensor, Tensor]:
    """g = mean_s Σ_a A ∇π and F = mean_s Σ_a π ∇log π ∇log πᵀ, one pair of state and action at a time."""
    parameters = list(policy.actor_parameters().values())
    size, states = len(actor_of(policy)), len(policy.features)
    g, fisher = torch.zeros(size, dtype=torch.float64), torch.zeros(size, size, dtype=torch.float64)
    for unit, advantage in enumerate(batch.advantages.tolist()):
        logp = policy(batch.units.select(torch.tensor([unit]))).logp.sum()
        score = torch.cat([part.flatten() for part in torch.autograd.grad(logp, parameters)])
        share = logp.detach().exp() / states
        g += share * advantage * score
        fisher += share * torch.outer(score, score)
    return g, fisher


def step_of(policy: Softmax, batch: Batch, settings: TRPOSettings) -> UpdateStep:
    return next(trpo.update(policy, batch, critic_optimiser(policy), settings, seed=0, step=0))


def kl_between(old: Softmax, new: Softmax) -> float:
    states = torch.arange(len(old.features))
    frozen = old.logp(states).detach()
    return float((frozen.exp() * (frozen - new.logp(states).detach())).sum(-1).mean())


def copy_of(policy: Softmax) -> Softmax:
    twin = Softmax(policy.features, len(policy.outer))
    twin.load_state_dict(policy.state_dict())
    return twin


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_the_step_is_the_damped_natural_gradient_of_the_enumerated_problem(damping: float) -> None:
    """d = √(2δ / gᵀ(F+cI)⁻¹g) (F+cI)⁻¹g; without damping F is singular here, and any solution is as good."""
    policy, batch = problem()
    g, fisher = enumerated(policy, batch)
    start = actor_of(policy)
    record = step_of(policy, batch, replace(EXACT, max_kl=1e-6, cg_damping=damping))
    damped = fisher + damping * torch.eye(len(g), dtype=torch.float64)
    direction = torch.linalg.lstsq(damped, g[:, None], driver="gelsd").solution[:, 0]
    expected = torch.sqrt(2e-6 / (g @ direction)) * direction * record.trust_region.share
    moved = actor_of(policy) - start
    assert record.applied
    torch.testing.assert_close(damped @ moved, damped @ expected, rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(
        moved @ damped @ moved,
        2e-6 * torch.tensor(record.trust_region.share) ** 2,
        rtol=1e-4,
        atol=0,
        check_dtype=False,
    )
    assert record.trust_region.predicted_improvement == pytest.approx(
        float(g @ expected) / record.trust_region.share, rel=1e-4
    )


def test_kl_reaches_the_bound_as_it_shrinks() -> None:
    """|KL/δ − 1| falls with √δ: the full step is right to second order. Only steps taken whole are compared."""
    errors = []
    for radius in (1e-2, 1e-4, 1e-6):
        policy, batch = problem()
        old = copy_of(policy)
        record = step_of(policy, batch, replace(EXACT, max_kl=radius))
        reached = kl_between(old, policy)
        assert reached == pytest.approx(record.trust_region.kl, rel=1e-9)
        errors.append(abs(reached / (radius * record.trust_region.share**2) - 1))
    assert errors[0] < 0.5
    assert errors[1] == pytest.approx(errors[0] / 10, rel=0.5)
    assert errors[2] == pytest.approx(errors[1] / 10, rel=0.3)


def test_the_kl_is_from_the_old_policy_to_the_new() -> None:
    policy, batch = problem()
    old = copy_of(policy)
    record = step_of(policy, batch, replace(EXACT, max_kl=0.3))
    assert record.trust_region.kl == pytest.approx(kl_between(old, policy))
    assert record.trust_region.kl != pytest.approx(kl_between(policy, old), rel=1e-3)


@pytest.mark.parametrize("radius", [1e-4, 1e-2, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_no_step_leaves_the_region_or_lowers_the_surrogate(radius: float, damping: float) -> None:
    policy, batch = problem()
    old = copy_of(policy)
    record = step_of(policy, batch, replace(EXACT, max_kl=radius, cg_damping=damping))
    assert kl_between(old, policy) <= radius * (1 + 1e-12)
    value = [
        float((p.logp(torch.arange(5)).exp().detach().flatten() * batch.advantages).sum() / 5) for p in (old, policy)
    ]
    assert record.trust_region.improvement == pytest.approx(value[1] - value[0])
    assert record.applied == (value[1] > value[0])


def test_the_line_search_takes_the_longest_length_that_will_do() -> None:
    """At a wide region the quadratic model is wrong: the full step, and the length before the one taken, break a rule."""
    policy, batch = problem()
    old, start = copy_of(policy), actor_of(policy)
    settings = replace(EXACT, max_kl=1.0, line_search_shrink=0.7)
    record = step_of(policy, batch, settings)
    region = record.trust_region
    assert region.lengths_tried > 1
    assert region.share == pytest.approx(0.7 ** (region.lengths_tried - 1))
    full = (actor_of(policy) - start) / region.share
    longer = copy_of(old)
    parts = (start + full * region.share / 0.7).split([p.numel() for p in policy.actor_parameters().values()])
    with torch.no_grad():
        for parameter, part in zip(longer.actor_parameters().values(), parts, strict=True):
            parameter.copy_(part.view_as(parameter))
    rise = (longer.logp(torch.arange(5)).exp() - old.logp(torch.arange(5)).exp()).detach().flatten()
    gain = float((rise * batch.advantages).sum())
    assert kl_between(old, longer) > 1.0 or gain <= 0


class Lying(Softmax):
    """Says that every move worsens the surrogate: after the first look all log-probabilities of good actions have fallen."""

    def forward(self, units: Pairs) -> Evaluation:
        e = super().forward(units)
        return e if torch.is_grad_enabled() else replace(e, logp=e.logp - 1.0)


def test_a_step_that_does_not_improve_is_refused_to_the_bit() -> None:
    _, batch = problem()
    batch = replace(batch, advantages=batch.advantages.abs())
    policy = Lying(problem()[0].features, 3)
    start = actor_of(policy)
    records = list(trpo.update(policy, batch, critic_optimiser(policy), EXACT, seed=0, step=0))
    assert not records[0].applied
    assert torch.equal(actor_of(policy), start)
    region = records[0].trust_region
    assert (region.share, region.kl, region.improvement, region.lengths_tried) == (0.0, 0.0, 0.0, 10)
    assert all(r.applied for r in records[1:])
    metrics = summarise(records)
    assert metrics["trust_region/share"] == 0.0
    assert metrics["stopped_by_target_kl"] == 0.0


def test_without_a_signal_nothing_moves() -> None:
    policy, batch = problem()
    start = actor_of(policy)
    record = step_of(policy, replace(batch, advantages=torch.full((15,), 3.0, dtype=torch.float64)), TRPOSettings())
    assert not record.applied
    assert record.trust_region.lengths_tried == 0
    assert torch.equal(actor_of(policy), start)


def test_whitening_takes_the_size_of_the_advantages_away() -> None:
    moved = []
    for scale in (1.0, 100.0):
        policy, batch = problem()
        start = actor_of(policy)
        step_of(policy, replace(batch, advantages=scale * batch.advantages), TRPOSettings(critic_minibatches=1))
        moved.append(actor_of(policy) - start)
    torch.testing.assert_close(moved[0], moved[1])


def test_the_critic_learns_apart_from_the_actor() -> None:
    policy, batch = problem()
    settings = TRPOSettings(critic_epochs=40, critic_minibatches=3)
    steps = trpo.update(policy, batch, critic_optimiser(policy), settings, seed=0, step=0)
    first = next(steps)
    after_actor, before = actor_of(policy), policy.value.detach().clone()
    assert not before.any()
    rest = list(steps)
    assert torch.equal(actor_of(policy), after_actor)
    assert len(rest) == 120
    assert all(r.trust_region is None and r.gap is None for r in rest)
    assert first.gap is not None
    torch.testing.assert_close(policy.value.detach(), torch.ones(5, dtype=torch.float64), atol=0.1, rtol=0)
    metrics = summarise([first, *rest])
    assert metrics["trust_region/kl"] == pytest.approx(first.trust_region.kl)
    assert metrics["grad_norm/critic"] > 0
    assert metrics["grad_norm/actor"] == pytest.approx(first.grad_norms["actor"])


def test_a_shared_trunk_is_refused_in_one_line() -> None:
    policy = Softmax(problem()[0].features, 3, shared=True)
    start = actor_of(policy)
    with pytest.raises(ConfigError, match="actor's parameters") as caught:
        step_of(policy, problem()[1], TRPOSettings())
    assert "\n" not in str(caught.value)
    assert torch.equal(actor_of(policy), start)


def test_an_optimiser_that_holds_the_actor_is_refused() -> None:
    policy, batch = problem()
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=OptimSettings())
    with pytest.raises(ValueError, match="actor"):
        next(trpo.update(policy, batch, Optimiser([group], total_steps=1), TRPOSettings(), seed=0, step=0))


def test_a_gradient_that_is_not_finite_moves_nothing() -> None:
    policy, batch = problem()
    start = actor_of(policy)
    with pytest.raises(NonFiniteStep):
        step_of(policy, replace(batch, advantages=torch.full((15,), float("inf"), dtype=torch.float64)), EXACT)
    assert torch.equal(actor_of(policy), start)


@dataclass(frozen=True)
class Chain:
    """A random finite world: P[s, a, s'], r[s, a], where everything follows from linear equations."""

    transitions: Tensor
    rewards: Tensor
    gamma: float

    @classmethod
    def drawn(cls, states: int, actions: int, gamma: float) -> Self:
        draws = generator(7, "world")
        transitions = torch.from_numpy(draws.dirichlet([0.3] * states, (states, actions)))
        return cls(transitions, torch.from_numpy(draws.standard_normal((states, actions))), gamma)

    def values(self, policy: Tensor) -> Tensor:
        """V solves V = r_π + γ P_π V."""
        moves = torch.einsum("sa,sat->st", policy, self.transitions)
        eye = torch.eye(len(moves), dtype=torch.float64)
        return torch.linalg.solve(eye - self.gamma * moves, (policy * self.rewards).sum(-1))

    def advantages(self, policy: Tensor) -> Tensor:
        values = self.values(policy)
        return self.rewards + self.gamma * self.transitions @ values - values[:, None]

    def visits(self, policy: Tensor) -> Tensor:
        """(1 − γ) Σ_t γ^t P(s_t = s) from an even start."""
        moves = torch.einsum("sa,sat->st", policy, self.transitions)
        start = torch.full((len(moves),), 1 / len(moves), dtype=torch.float64)
        eye = torch.eye(len(moves), dtype=torch.float64)
        return (1 - self.gamma) * torch.linalg.solve((eye - self.gamma * moves).T, start)

    def optimum(self) -> float:
        values = torch.zeros(len(self.rewards), dtype=torch.float64)
        for _ in range(2000):
            values = (self.rewards + self.gamma * self.transitions @ values).max(-1).values
        return float(values.mean())


def test_with_exact_advantages_every_update_improves_the_return() -> None:
    """Theorem 1 of the paper at work: small regions, exact advantages weighed by exact visits, no step down."""
    world = Chain.drawn(states=6, actions=3, gamma=0.9)
    policy = Table(6, 3)
    returns = []
    for _ in range(150):
        present = policy.logp(torch.arange(6)).exp().detach()
        returns.append(float(world.values(present).mean()))
        weighed = 6 * world.visits(present)[:, None] * world.advantages(present)
        step_of(policy, every_pair(policy, weighed), replace(EXACT, max_kl=0.01))
    gains = torch.tensor(returns).diff()
    assert bool((gains >= -1e-12).all())
    assert returns[0] < world.optimum() - 0.5
    assert returns[-1] == pytest.approx(world.optimum(), abs=0.02)


@pytest.mark.parametrize(
    "bad",
    [
        {"max_kl": 0.0},
        {"max_kl": float("inf")},
        {"cg_iterations": 0},
        {"cg_damping": -0.1},
        {"line_search_steps": 0},
        {"line_search_shrink": 1.0},
        {"critic_epochs": 0},
        {"critic_minibatches": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        TRPOSettings(**bad)
