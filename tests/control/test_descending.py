"""Optimiser steps in one compiled call against the same steps one by one, and against autograd."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from bridle.batch import Batch
from bridle.control import compiled, descending
from bridle.control.actor_critic import ActorCritic
from bridle.control.descending import Descending
from bridle.control.networks import NetworkSettings
from bridle.control.small import SmallActorCritic
from bridle.errors import NonFiniteStep
from bridle.learn import ppo
from bridle.learn.memory import MicroBudget
from bridle.learn.minibatches import minibatches
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.learn.ppo import PPOObjective, PPOSettings
from bridle.learn.record import UpdateStep, summarise
from bridle.random import generator
from tests.built import source_named
from tests.control.test_small import SHAPES, build, units

OPTIM = OptimSettings(lr=0.004, eps=1e-2, weight_decay=0.1, max_grad_norm=0.3)
PLAIN = PPOSettings(
    epochs=2, minibatches=3, clip=0.15, value_coefficient=0.5, entropy_coefficient=0.02, whiten="minibatch"
)


pytestmark = pytest.mark.usefixtures("small_code")


class OneByOne(SmallActorCritic):
    """The same policy, which takes no steps by itself."""

    def descend(self, *_: Any) -> None:
        return None


class Plain(ActorCritic):
    """Modules without their fast path, which take no steps by themselves either."""

    def descend(self, *_: Any) -> None:
        return None


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def batch_of(policy: SmallActorCritic, width: int, kind: str, size: int, rows: int) -> Batch:
    """A rollout of a policy a little off this one, so that some ratios are clipped on either side."""
    given, noise = units(width, kind, size, rows, seed=3), torch.Generator().manual_seed(8)
    with torch.no_grad():
        plain = policy(given)
    return Batch(
        units=given,
        old_logp=plain.logp + 0.2 * torch.randn(rows, generator=noise),
        old_value=plain.value + 0.1 * torch.randn(rows, generator=noise),
        advantages=torch.randn(rows, generator=noise),
        returns=torch.randn(rows, generator=noise),
        episode=torch.arange(rows) // 7,
    )


def optimiser_of(policy: ActorCritic, *, flat: bool = True, settings: OptimSettings = OPTIM) -> Optimiser:
    group = Group(name="policy", parameters=dict(policy.named_parameters()), settings=settings)
    return Optimiser([group], total_steps=1, flat=flat)


def as_(kind: type[ActorCritic], policy: SmallActorCritic) -> Any:
    """A copy of the policy that learns in another way."""
    own = copy.deepcopy(policy)
    if kind is not ActorCritic:
        own.__class__ = kind
        return own
    return Plain(actor=own.actor, critic=own.critic, head=own.head)


def learn(policy: ActorCritic, batch: Batch, settings: PPOSettings, optimiser: Optimiser | None = None, **options: Any):  # type: ignore[no-untyped-def]
    own = optimiser_of(policy) if optimiser is None else optimiser
    return list(ppo.update(policy, batch, own, settings, seed=4, step=2, **options))


def require_alike(mine: Sequence[UpdateStep], theirs: Sequence[UpdateStep], rtol: float, atol: float) -> None:
    assert [(s.epoch, s.minibatch, s.applied) for s in mine] == [(s.epoch, s.minibatch, s.applied) for s in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert torch.equal(a.actions, b.actions)
        for name in ("logp", "entropy", "value"):
            torch.testing.assert_close(getattr(a.seen, name), getattr(b.seen, name), rtol=rtol, atol=atol)
        assert a.grad_norms == pytest.approx(dict(b.grad_norms), rel=10 * rtol)
    for name, value in summarise(mine).items():
        assert value == pytest.approx(summarise(theirs)[name], rel=1e-3, abs=1e-4, nan_ok=True), name


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES)
@pytest.mark.parametrize("rows", [3, 100, 700])
def test_steps_in_one_call_are_those_taken_one_by_one(
    width: int, kind: str, size: int, settings: NetworkSettings, rows: int
) -> None:
    """With AdamW as PyTorch has it and autograd too: minibatches of unequal sizes, weight decay, clipped gradients."""
    policy = build(width, kind, size, settings)
    batch = batch_of(policy, width, kind, size, rows)
    for asked in (PLAIN, replace(PLAIN, clip_high=0.4, entropy_coefficient=0.0, per="episode", whiten="batch")):
        together, single, plain = (as_(kind_, policy) for kind_ in (SmallActorCritic, OneByOne, ActorCritic))
        found = learn(together, batch, asked)
        assert rows < 100 or 0 < summarise(found)["clip_fraction"] < 1
        require_alike(found, learn(single, batch, asked), 1e-3, 1e-4)
        require_alike(found, learn(plain, batch, asked, optimiser_of(plain, flat=False)), 1e-3, 1e-4)
        for mine, one, other in zip(together.parameters(), single.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES)
def test_the_gradient_is_that_of_the_loss_as_written(
    width: int, kind: str, size: int, settings: NetworkSettings
) -> None:
    """After one step from nothing AdamW's first moment is (1 − β₁) g; g by autograd through ``core.losses``."""
    policy, asked = build(width, kind, size, settings), replace(PLAIN, epochs=1, minibatches=1, whiten="none")
    batch = batch_of(policy, width, kind, size, 300)
    plain = as_(ActorCritic, policy)
    objective = PPOObjective(settings=asked, kl_coefficient=0.0, critic_only=False)
    ((_, given, part),) = minibatches(batch, 1, orders=[None], whiten_here=False, per="action")
    (part.weights * objective.loss(plain(given), part)).sum().backward()
    optimiser = optimiser_of(policy, settings=replace(OPTIM, max_grad_norm=None))
    (step,) = learn(policy, batch, asked, optimiser)
    state, expected = optimiser.state(), {name: p.grad for name, p in plain.named_parameters()}
    assert step.grad_norms["policy"] == pytest.approx(
        float(torch.cat([g.flatten() for g in expected.values()]).norm()), rel=1e-4
    )
    for name, gradient in expected.items():
        torch.testing.assert_close(state[f"policy/{name}/exp_avg"] / (1 - OPTIM.beta1), gradient, rtol=2e-4, atol=5e-6)


@pytest.mark.parametrize(
    "other",
    [
        {"value_clip": 0.1},
        {"dual_clip": 2.0},
        {"clip": None},
        {"target_kl": 10.0},
        {"micro_batch_tokens": 20},
        {"budget": MicroBudget(20)},
        {"critic_only": True},
        {"extra_loss": lambda taken, tokens: []},
        {"kl_loss": "k2", "kl_coefficient": 0.3},
        {"kl_loss": "k3", "kl_coefficient": 0.3},
    ],
    ids=lambda other: " ".join(str(other[name]) if name == "kl_loss" else name for name in other),
)
def test_what_it_does_not_know_is_learnt_step_by_step(other: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(*SHAPES[0])
    batch, plain = batch_of(policy, *SHAPES[0][:3], 60), as_(ActorCritic, policy)
    batch = replace(batch, ref_logp=batch.old_logp - 0.3)
    own = {name: value for name, value in other.items() if name in PPOSettings.__dataclass_fields__}
    options = {name: value for name, value in other.items() if name not in own}
    monkeypatch.setattr(SmallActorCritic, "descend", None)
    asked = replace(PLAIN, **own)
    require_alike(learn(policy, batch, asked, **options), learn(plain, batch, asked, **options), 1e-3, 1e-4)


@pytest.mark.parametrize(
    "why", ["two groups", "apart", "a gradient of one's own", "a frozen weight", "masked", "NumPy"]
)
def test_where_it_cannot_it_takes_no_step(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = build(*SHAPES[2])
    batch = batch_of(policy, *SHAPES[2][:3], 60)
    if why == "a frozen weight":
        policy.head.log_std.requires_grad_(False)  # type: ignore[union-attr]
    if why == "masked":
        seen = batch.units.observations.with_mask(torch.ones(60, 6, dtype=torch.bool))  # type: ignore[attr-defined]
        batch = replace(batch, units=replace(batch.units, observations=seen))  # type: ignore[type-var]
    if why == "NumPy":
        monkeypatch.setattr(compiled, "library", None)
    plain = as_(ActorCritic, policy)
    optimiser = optimiser_of(policy, flat=why != "apart")
    if why == "two groups":
        of = {name: dict(policy.get_submodule(name).named_parameters()) for name in ("actor", "critic")}
        groups = [Group(name=name, parameters=parameters, settings=OPTIM) for name, parameters in of.items()]
        optimiser = Optimiser(groups, total_steps=1, flat=True)
    if why == "a gradient of one's own":
        monkeypatch.setattr(optimiser, "zero_grad", lambda: policy.zero_grad())
    called: list[Any] = []
    descend = SmallActorCritic.descend
    monkeypatch.setattr(SmallActorCritic, "descend", lambda *a: called.append(descend(*a)) or called[-1])
    found = learn(policy, batch, PLAIN, optimiser)
    assert not any(called) or why == "a frozen weight"  # then autograd takes them; see test_modules
    if why not in ("two groups", "a gradient of one's own"):
        require_alike(found, learn(plain, batch, PLAIN), 1e-3, 1e-4)


def spoilt(batch: Batch, row: int) -> Batch:
    """A return whose error is finite, and its square not."""
    returns = batch.returns.clone()
    returns[row] = 1e25
    return replace(batch, returns=returns)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]], ids=["discrete", "box"])
def test_it_stops_before_a_step_that_is_not_finite(shape: tuple[int, str, int, NetworkSettings]) -> None:
    policy = build(*shape)
    whole = batch_of(policy, *shape[:3], 90)
    row = int(learn(as_(SmallActorCritic, policy), whole, PLAIN)[1].actions[5])  # learnt from in the second step
    batch, ends = spoilt(whole, row), []
    for kind in (SmallActorCritic, OneByOne):
        own = as_(kind, policy)
        optimiser, steps = optimiser_of(own), []
        with pytest.raises(NonFiniteStep, match="the gradient of policy") as caught:
            steps.extend(ppo.update(own, batch, optimiser, PLAIN, seed=4, step=2))
        assert row in caught.value.rows
        assert caught.value.evidence is not None
        assert caught.value.evidence.taken == 1
        assert all(not bool(p.grad.any()) for p in own.parameters())
        ends.append((caught.value.parameters, caught.value.rows, list(own.parameters()), optimiser.state()))
    (names, rows, weights, state), (theirs, others, expected, state_of) = ends
    assert (names, rows) == (theirs, others)
    for mine, other in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    for name, value in state.items():
        torch.testing.assert_close(value, state_of[name], rtol=1e-4, atol=1e-7)


def test_each_weight_that_is_nan_stops_it() -> None:
    for spoilt_one in range(len(list(build(*SHAPES[0]).parameters()))):
        policy = build(*SHAPES[0])
        batch, optimiser = batch_of(policy, *SHAPES[0][:3], 30), optimiser_of(policy)
        with torch.no_grad():
            list(policy.parameters())[spoilt_one].view(-1)[0] = float("nan")
        with pytest.raises(NonFiniteStep):
            learn(policy, batch, PLAIN, optimiser)
        assert not optimiser.state()


def test_a_step_that_could_leave_the_range_is_looked_at() -> None:
    """As :func:`bridle.learn.reach.reach` bounds it; the first step of each weight is lr · sign(g), almost."""
    policy = build(*SHAPES[0])
    batch, optimiser = batch_of(policy, *SHAPES[0][:3], 30), optimiser_of(policy, settings=replace(OPTIM, lr=3.5e38))
    assert optimiser.flat_adam(1) is None
    with pytest.raises(NonFiniteStep, match="a weight of policy after its step"):
        learn(policy, batch, PLAIN, optimiser)
    close = optimiser_of(build(*SHAPES[0]), settings=replace(OPTIM, lr=1e35, weight_decay=0.0))
    assert close.flat_adam(2) is not None
    assert close.flat_adam(20) is None


def test_an_action_that_there_is_not_is_refused() -> None:
    policy = build(*SHAPES[0])
    batch = batch_of(policy, *SHAPES[0][:3], 30)
    batch.units.actions[7] = 2  # type: ignore[attr-defined]
    with pytest.raises(IndexError, match="action 2 of 2"):
        learn(policy, batch, PLAIN)


def test_steps_are_counted_and_kept_as_those_of_the_optimiser() -> None:
    policy = build(*SHAPES[2])
    batch, optimiser = batch_of(policy, *SHAPES[2][:3], 60), optimiser_of(policy)
    learn(policy, batch, PLAIN, optimiser)
    state = optimiser.state()
    assert {int(value) for name, value in state.items() if name.endswith("/step")} == {6}
    other = as_(OneByOne, policy)
    taken_up = optimiser_of(other)
    taken_up.load_state(state)
    require_alike(learn(policy, batch, PLAIN, optimiser), learn(other, batch, PLAIN, taken_up), 1e-3, 1e-4)
    assert all(not bool(p.grad.any()) for p in policy.parameters())


def test_buffers_have_as_many_rows_as_compiled_code_takes_at_a_time() -> None:
    assert f"#define ROWS {descending._ROWS} " in source_named("small.c").read_text()


@pytest.mark.parametrize(("width", "kind", "size", "settings"), SHAPES[:3])
def test_what_is_made_for_it_is_of_float32_whatever_is_the_default(
    width: int, kind: str, size: int, settings: NetworkSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code writes float32 into what it is given: read as float64, two numbers would be one."""
    policy = build(width, kind, size, settings)
    batch, real, found = batch_of(policy, width, kind, size, 100), Descending.steps, []
    for dtype in (torch.float32, torch.float64):
        taken: list[int] = []

        def steps(own: Descending, *given: Any, dtype: torch.dtype = dtype, taken: list[int] = taken) -> Any:
            with by_default(dtype):  # what else an update makes would be float64, too, and no longer go this way
                own.__init__(own.stack)  # type: ignore[misc]
                done = real(own, *given)
            assert done is not None
            taken.append(len(done.norms))
            return done

        monkeypatch.setattr(Descending, "steps", steps)
        own, alone = as_(SmallActorCritic, policy), as_(OneByOne, policy)
        records = learn(own, batch, PLAIN)
        assert sum(taken) == PLAIN.epochs * PLAIN.minibatches
        with by_default(dtype):
            records += learn(alone, batch, PLAIN)
            acting = own.acting(batch.units.observations, 1, generator(0, "test"))
            acting.act(batch.units.observations, None)
            found.append([acting.actions(), acting.logp(), *own.parameters(), *alone.parameters()])
        found[-1] += [getattr(step.seen, name) for step in records for name in ("logp", "entropy", "value")]
        found[-1] += [torch.tensor([*step.grad_norms.values()]) for step in records]
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(other, mine, rtol=1e-4, atol=1e-5, check_dtype=False)


def test_a_copy_descends_by_itself() -> None:
    policy = build(*SHAPES[0])
    batch = batch_of(policy, *SHAPES[0][:3], 60)
    learn(policy, batch, PLAIN)
    other = copy.deepcopy(policy)
    before = [p.detach().clone() for p in policy.parameters()]
    learn(other, batch, PLAIN)
    assert all(torch.equal(mine, was) for mine, was in zip(policy.parameters(), before, strict=True))
