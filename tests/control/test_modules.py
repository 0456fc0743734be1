"""Steps on any modules, which autograd runs there and back, against the same one by one, and against autograd in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bridle.batch import Batch
from bridle.control import ActorCritic, BernoulliHead, CategoricalHead, GaussianHead, compiled
from bridle.control.policy import Transitions
from bridle.errors import NonFiniteStep
from bridle.learn import ppo
from bridle.learn.minibatches import minibatches
from bridle.learn.optim import Optimiser
from bridle.learn.record import UpdateStep
from bridle.learn.step import HandDifferentiated, plain_vjp
from tests.control.test_descending import (
    OPTIM,
    PLAIN,
    batch_of,
    learn,
    optimiser_of,
    require_alike,
    spoilt,
)
from tests.control.test_small import units

pytestmark = pytest.mark.usefixtures("small_code")

WIDTH = 5


class Residual(nn.Module):
    """A network that is no perceptron."""

    def __init__(self, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, 16), nn.Linear(16, outputs)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.dropout(torch.tanh(self.second(x))))


class Turned(Residual):
    """The same, whose outputs do not lie row by row."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).T.contiguous().T


class OneByOne(ActorCritic):
    """A policy that takes no steps by itself."""

    def descend(self, *_: Any) -> None:
        return None


def on_a_trunk(outputs: int) -> dict[str, nn.Module]:
    trunk = nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.LayerNorm(24))
    return {"trunk": trunk, "actor": nn.Linear(24, outputs), "critic": nn.Linear(24, 1)}


NETS: dict[str, Callable[[int], dict[str, nn.Module]]] = {
    "a residual sum": lambda outputs: {"actor": Residual(outputs), "critic": Residual(1)},
    "dropout": lambda outputs: {"actor": Residual(outputs, 0.3), "critic": Residual(1, 0.1)},
    "a trunk": on_a_trunk,
    "not row by row": lambda outputs: {"actor": Turned(outputs), "critic": Residual(1)},
    "one weight": lambda outputs: {"actor": nn.Linear(WIDTH, outputs, bias=False), "critic": nn.Linear(WIDTH, 1)},
}
KINDS = [("discrete", 2), ("discrete", 7), ("box", 3)]


def build(nets: str = "a residual sum", kind: str = "discrete", size: int = 2) -> ActorCritic:
    torch.manual_seed(2)
    head = CategoricalHead() if kind == "discrete" else GaussianHead(size, -0.3)
    return ActorCritic(**NETS[nets](size), head=head)  # type: ignore[arg-type]


def batch_for(policy: ActorCritic, kind: str = "discrete", size: int = 2, rows: int = 300) -> Batch:
    return batch_of(policy, WIDTH, kind, size, rows)  # type: ignore[arg-type]


def one_by_one(policy: ActorCritic) -> ActorCritic:
    own = copy.deepcopy(policy)
    own.__class__ = OneByOne
    return own


def drawn_alike(policy: ActorCritic, batch: Batch, asked: ppo.PPOSettings, own: Optimiser | None = None) -> Any:
    torch.manual_seed(7)  # for dropout
    return learn(policy, batch, asked, own)


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many steps were taken by :meth:`ActorCritic.descend` each time; −1 where it refused."""
    taken: list[int] = []
    descend = ActorCritic.descend

    def counted(policy: ActorCritic, *given: Any) -> Any:
        found = descend(policy, *given)
        taken.append(-1 if found is None else len(found.norms))
        return found

    monkeypatch.setattr(ActorCritic, "descend", counted)
    return taken


@pytest.mark.parametrize("nets", NETS)
@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_steps_are_those_taken_one_by_one(nets: str, kind: str, size: int, ahead: list[int]) -> None:
    policy = build(nets, kind, size)
    batch = batch_for(policy, kind, size)
    for asked in (PLAIN, replace(PLAIN, clip_high=0.4, entropy_coefficient=0.0, per="episode", whiten="batch")):
        together, single = copy.deepcopy(policy), one_by_one(policy)
        found = drawn_alike(together, batch, asked)
        assert ahead.pop() == len(found) == PLAIN.epochs * PLAIN.minibatches
        expected = drawn_alike(single, batch, asked, optimiser_of(single, flat=False))
        require_alike(found, expected, 1e-4, 2e-5)
        for mine, other in zip(together.parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("kind", "size"), KINDS)
def test_the_gradient_is_that_of_the_loss_as_written(kind: str, size: int) -> None:
    """Schulman et al. 2017, eqs. (7) and (9), in float64 with the distributions of PyTorch; see test_descending."""
    policy, asked = build("a trunk", kind, size), replace(PLAIN, epochs=1, minibatches=1, whiten="none")
    batch, exact = batch_for(policy, kind, size), copy.deepcopy(policy).double()
    given = batch.units
    assert isinstance(given, Transitions)
    features = exact.trunk(given.observations.vector.double())
    outputs, value = exact.actor(features), exact.critic(features)[:, 0]
    if kind == "discrete":
        pi = torch.distributions.Categorical(logits=outputs)
        logp, entropy = pi.log_prob(given.actions), pi.entropy()
    else:
        normal = torch.distributions.Normal(outputs, exact.head.log_std.exp())  # type: ignore[operator,union-attr]
        logp, entropy = normal.log_prob(given.actions.double()).sum(1), normal.entropy().sum(1)
    r, a = (logp - batch.old_logp.double()).exp(), batch.advantages.double()
    surrogate = torch.minimum(r * a, r.clamp(1 - 0.15, 1 + 0.15) * a)
    (-surrogate + 0.5 * (value - batch.returns.double()).square() / 2 - 0.02 * entropy).mean().backward()
    optimiser = optimiser_of(policy, settings=replace(OPTIM, max_grad_norm=None))
    (step,) = learn(policy, batch, asked, optimiser)
    torch.testing.assert_close(step.seen.logp.double(), logp.detach()[step.actions], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.seen.entropy.double(), entropy.detach()[step.actions], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.seen.value.double(), value.detach()[step.actions], rtol=1e-5, atol=1e-5)
    state = optimiser.state()
    for name, parameter in exact.named_parameters():
        mine = state[f"policy/{name}/exp_avg"].double() / (1 - OPTIM.beta1)
        torch.testing.assert_close(mine, parameter.grad, rtol=1e-4, atol=1e-6)


class Scaled(ActorCritic):
    """A policy that evaluates in another way."""

    def forward(self, units: Transitions) -> Any:
        found = super().forward(units)
        return replace(found, value=2 * found.value)


class Sharper(CategoricalHead):
    """A head that says something else."""

    def forward(self, outputs: Tensor, mask: Tensor | None = None) -> Any:
        return super().forward(2 * outputs, mask)


class ByHand(ActorCritic, HandDifferentiated):
    """A policy with a way of its own to the gradient."""

    def vjp(self, units: Transitions) -> Any:
        return plain_vjp(self, units)


class Called(ActorCritic):
    """A policy that is called otherwise than it is evaluated."""

    def __call__(self, units: Transitions) -> Any:
        return super().__call__(units)


REFUSED: dict[str, Callable[[ActorCritic], object]] = {
    "a gradient by hand": lambda policy: setattr(policy, "__class__", ByHand),
    "another call": lambda policy: setattr(policy, "__class__", Called),
    "a compiled call": lambda policy: setattr(policy, "_compiled_call_impl", policy.forward),
    "another forward": lambda policy: setattr(policy, "__class__", Scaled),
    "a forward of its own": lambda policy: setattr(policy, "forward", policy.forward),
    "a hook": lambda policy: policy.register_forward_hook(lambda *_: None),
    "a hook of the head": lambda policy: policy.head.register_forward_hook(lambda *_: None),
    "another head": lambda policy: setattr(policy, "head", Sharper()),
    "switches": lambda policy: setattr(policy, "head", BernoulliHead()),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_it_does_not_know_is_learnt_step_by_step(why: str, ahead: list[int]) -> None:
    policy = build()
    batch = batch_for(policy)
    if why == "switches":
        batch = replace(batch, units=replace(batch.units, actions=torch.ones(300, 2, dtype=torch.int64)))  # type: ignore[type-var]
    REFUSED[why](policy)
    learn(policy, batch, PLAIN)
    assert ahead == [-1]


@pytest.mark.parametrize("why", ["masked", "not compiled", "squashed", "float64"])
def test_where_it_cannot_it_takes_no_step(why: str, ahead: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, size = ("box", 3) if why == "squashed" else ("discrete", 2)
    policy = build(kind=kind, size=size)
    batch = batch_for(policy, kind, size)
    if why == "masked":
        seen = batch.units.observations.with_mask(torch.ones(300, 2, dtype=torch.bool))  # type: ignore[attr-defined]
        batch = replace(batch, units=replace(batch.units, observations=seen))  # type: ignore[type-var]
    if why == "not compiled":
        monkeypatch.setattr(compiled, "library", None)
    if why == "squashed":
        policy.head = GaussianHead(3, squash=True)
    if why == "float64":
        policy.double()
        seen = batch.units.observations  # type: ignore[attr-defined]
        batch = replace(batch, units=replace(batch.units, observations=seen.with_vector(seen.vector.double())))  # type: ignore[type-var]
    single = one_by_one(policy)
    require_alike(learn(policy, batch, PLAIN), learn(single, batch, PLAIN), 0.0, 0.0)
    assert ahead == [-1]


def test_hooks_of_modules_and_weights_are_called() -> None:
    policy = build("a trunk", "box", 3)
    batch, seen = batch_for(policy, "box", 3), []
    policy.trunk.register_forward_hook(lambda *_: seen.append("forward"))
    policy.actor.register_full_backward_hook(lambda *_: seen.append("backward"))
    policy.head.log_std.register_hook(lambda slope: seen.append("log_std"))  # type: ignore[union-attr,operator]
    learn(policy, batch, PLAIN)
    assert {name: seen.count(name) for name in seen} == {"forward": 6, "backward": 6, "log_std": 6}


def test_a_gradient_of_ones_own_is_the_one_that_counts(ahead: list[int]) -> None:
    """As where a hook keeps a gradient in another form; the steps are those of the optimiser then."""
    policy = build()
    batch, single = batch_for(policy), one_by_one(policy)
    for own in (policy, single):

        def doubled(parameter: Tensor) -> None:
            parameter.grad = 2 * parameter.grad  # type: ignore[operator]

        own.actor.last.weight.register_post_accumulate_grad_hook(doubled)  # type: ignore[union-attr,operator]
    require_alike(learn(policy, batch, PLAIN), learn(single, batch, PLAIN), 0.0, 0.0)
    assert ahead == [0]


@pytest.mark.parametrize("bonus", [0.0, 0.02])
def test_actions_that_a_network_forbids_by_itself_are_learnt_step_by_step(bonus: float, ahead: list[int]) -> None:
    """A logit of −inf has an entropy of its own, which the plain path knows."""

    class Forbidding(Residual):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).index_fill(1, torch.tensor([6]), -torch.inf)

    policy = build(kind="discrete", size=7)
    policy.actor = Forbidding(7)
    batch = batch_of(policy, WIDTH, "discrete", 6, 300)  # type: ignore[arg-type]
    single, asked = one_by_one(policy), replace(PLAIN, entropy_coefficient=bonus)
    require_alike(learn(policy, batch, asked), learn(single, batch, asked), 0.0, 0.0)
    assert ahead == [0]


class Remembering(nn.Module):
    """A network that draws, and keeps what it has seen; it says −inf of an action, which leaves each step to the plain path."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop, self.last = nn.BatchNorm1d(WIDTH), nn.Dropout(0.2), nn.Linear(WIDTH, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.drop(self.norm(x))).index_fill(1, torch.tensor([6]), -torch.inf)


def test_where_it_stops_draws_and_buffers_are_as_if_it_had_not_tried(ahead: list[int]) -> None:
    policy = build(kind="discrete", size=7)
    policy.actor = Remembering()
    batch = batch_of(policy, WIDTH, "discrete", 6, 300)  # type: ignore[arg-type]
    single = one_by_one(policy)
    require_alike(drawn_alike(policy, batch, PLAIN), drawn_alike(single, batch, PLAIN), 0.0, 0.0)
    assert ahead == [0]
    for mine, other in zip(policy.state_dict().values(), single.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
    before = 1  # what the batch was made with
    assert policy.actor.norm.num_batches_tracked == before + PLAIN.epochs * PLAIN.minibatches  # type: ignore[union-attr]


def test_steps_before_one_that_raises_are_counted() -> None:
    """Whoever catches what a module raises goes on with moments and counts that belong together."""
    policy = build()
    batch, single, called = batch_for(policy), one_by_one(policy), [0]

    def third(*_: Any) -> None:
        called[0] += 1
        if called[0] == 3:
            raise RuntimeError("third")

    optimisers = [optimiser_of(own) for own in (policy, single)]
    for own, optimiser in zip((policy, single), optimisers, strict=True):
        called[0] = 0
        hook = own.actor.register_forward_hook(third)
        with pytest.raises(RuntimeError, match="third"):
            learn(own, batch, PLAIN, optimiser)
        hook.remove()
        counts = [value for name, value in optimiser.state().items() if name.endswith("step")]
        assert counts
        assert all(value == 2 for value in counts)
    found, expected = (learn(own, batch, PLAIN, o) for own, o in zip((policy, single), optimisers, strict=True))
    require_alike(found, expected, 1e-4, 2e-5)
    for mine, other in zip(policy.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=2e-5)


def test_one_deviation_for_all_coordinates_is_learnt(ahead: list[int]) -> None:
    policy = build(kind="box", size=3)
    policy.head.log_std = nn.Parameter(torch.tensor(-0.3))
    batch = batch_for(policy, "box", 3)
    single = one_by_one(policy)
    require_alike(learn(policy, batch, PLAIN), learn(single, batch, PLAIN), 0.0, 0.0)
    assert ahead == [-1]


@pytest.mark.parametrize(("kind", "size"), [KINDS[0], KINDS[2]])
def test_it_stops_before_a_step_that_is_not_finite(kind: str, size: int) -> None:
    policy = build(kind=kind, size=size)
    whole = batch_for(policy, kind, size, 90)
    row = int(learn(copy.deepcopy(policy), whole, PLAIN)[1].actions[5])  # learnt from in the second step
    batch, ends = spoilt(whole, row), []
    for own in (policy, one_by_one(policy)):
        optimiser, steps = optimiser_of(own), list[UpdateStep]()
        with pytest.raises(NonFiniteStep, match="the gradient of policy") as caught:
            steps.extend(ppo.update(own, batch, optimiser, PLAIN, seed=4, step=2))
        assert row in caught.value.rows
        assert caught.value.evidence is not None
        assert caught.value.evidence.taken == 1
        assert all(not bool(p.grad.any()) for p in own.parameters())  # type: ignore[union-attr]
        ends.append((caught.value.parameters, caught.value.rows, list(own.parameters())))
    (names, rows, weights), (theirs, others, expected) = ends
    assert (names, rows) == (theirs, others)
    for mine, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("which", ["actor", "critic"])
def test_answers_that_are_not_finite_are_told(which: str) -> None:
    policy = build()
    batch, optimiser = batch_for(policy), optimiser_of(policy)
    with torch.no_grad():
        policy.get_submodule(which).last.bias.fill_(float("nan"))  # type: ignore[union-attr,operator]
    with pytest.raises(NonFiniteStep, match="the policy's " + {"actor": "log-prob", "critic": "value"}[which]):
        learn(policy, batch, PLAIN, optimiser)
    assert not optimiser.state()


def test_an_action_that_there_is_not_is_refused() -> None:
    policy = build()
    batch = batch_for(policy)
    batch.units.actions[7] = 2  # type: ignore[attr-defined]
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        learn(policy, batch, PLAIN)


def test_a_frozen_part_stays_as_the_optimiser_has_it(ahead: list[int]) -> None:
    policy = build("a trunk", "box", 3)
    batch = batch_for(policy, "box", 3)
    policy.trunk.requires_grad_(False)
    policy.head.log_std.requires_grad_(False)  # type: ignore[union-attr,operator]
    single = one_by_one(policy)
    before = [p.detach().clone() for p in (*policy.trunk.parameters(), *policy.head.parameters())]
    require_alike(learn(policy, batch, PLAIN), learn(single, batch, PLAIN), 1e-4, 2e-5)
    assert ahead == [6]
    after = (*policy.trunk.parameters(), *policy.head.parameters())
    assert all(torch.equal(mine, was) for mine, was in zip(after, before, strict=True))


def test_what_follows_on_another_pass_is_the_same_minibatches() -> None:
    """States are picked by the minibatch's own positions."""
    policy = build()
    batch = batch_for(policy, rows=50)
    orders = [torch.randperm(50, generator=torch.Generator().manual_seed(s)) for s in range(2)]
    for rows, given, part in minibatches(batch, 3, orders=orders, whiten_here=False, per="action"):
        assert torch.equal(rows, part.actions)
        assert isinstance(given, Transitions)
        assert torch.equal(given.observations.vector, units(WIDTH, "discrete", 2, 50, 3).observations.vector[rows])
