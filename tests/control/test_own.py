"""A user's own modules: those that compute a perceptron run on the fast path, and nobody notices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

from bridle.control import ActorCritic, CategoricalHead, ControlPolicy, GaussianHead, compiled
from bridle.control.own import OwnPerceptrons, quickened
from bridle.control.policy import Transitions
from bridle.control.reading import read
from bridle.learn import ppo
from bridle.learn.ppo import PPOSettings
from bridle.learn.step import Slopes, plain_vjp
from tests.control.test_descending import batch_of, optimiser_of
from tests.control.test_small import gradients, slopes, units

WIDTH = 5


class Tower(nn.Module):
    """As users write them; ``way`` is what stands in the place of the plain forward pass."""

    def __init__(self, outputs: int = 1, way: Callable[[Any, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, outputs)
        self.way = way
        self.loud = self.seen = 0
        self.kept: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return plainly(self, x) if self.way is None else self.way(self, x)


def plainly(own: Tower, x: Tensor) -> Tensor:
    return own.last(torch.tanh(own.first(x)))


def by_functions(own: Tower, x: Tensor) -> Tensor:
    return functional.linear(
        functional.linear(x, own.first.weight, own.first.bias).tanh(), own.last.weight, own.last.bias
    )


def by_other_functions(own: Tower, x: Tensor) -> Tensor:
    hidden = functional.layer_norm(own.first(x), (16,))
    return functional.linear(functional.gelu(hidden, approximate="tanh"), own.last.weight)


def sequence(*between: nn.Module, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.Linear(WIDTH, 16, bias=bias), *between, nn.Linear(16, 1))


READ = {
    "as users write them": lambda: Tower(),
    "by functions": lambda: Tower(way=by_functions),
    "a branch on what is kept": lambda: Tower(way=lambda own, x: plainly(own, x) * 2 if own.loud else plainly(own, x)),
    "in sequence": lambda: sequence(nn.Tanh()),
    "in place": lambda: sequence(nn.ReLU(inplace=True)),
    "in parts": lambda: sequence(nn.Sequential(nn.ReLU(), nn.Identity())),
    "deeper": lambda: sequence(nn.Tanh(), nn.Linear(16, 16), nn.Tanh()),
    "two activations": lambda: sequence(nn.ELU(0.7), nn.Linear(16, 16), nn.LeakyReLU(0.2, inplace=True)),
    "a norm": lambda: sequence(nn.LayerNorm(16), nn.Tanh()),
    "a norm behind, and another": lambda: sequence(
        nn.SiLU(inplace=True), nn.LayerNorm(16, bias=False), nn.Linear(16, 16), nn.GELU()
    ),
    "a norm without weights twice": lambda: twice_normed(nn.LayerNorm(16, elementwise_affine=False)),
    "no bias": lambda: sequence(nn.LayerNorm(16), nn.ReLU(), bias=False),
    "by other functions": lambda: Tower(way=by_other_functions),
    "a method": lambda: Tower(way=lambda own, x: own.last(own.first(x).sigmoid())),
}


def known_to_numpy(name: str) -> bool:
    """Whether a network of READ is of tanh or ReLU and biases alone."""
    return all(word not in name for word in ("norm", "two", "bias", "other", "method"))


def counts(own: Tower, x: Tensor) -> Tensor:
    own.seen += 1
    return plainly(own, x)


def keeps(own: Tower, x: Tensor) -> Tensor:
    own.kept.append(x)
    return plainly(own, x)


def without_gradient(own: Tower, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = torch.tanh(own.first(x))
    return own.last(hidden)


def in_inference(own: Tower, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return plainly(own, x)


def rounded(own: Tower, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return plainly(own, x)


def tied(own: Tower, x: Tensor) -> Tensor:
    hidden = torch.tanh(functional.linear(torch.tanh(own.first(x)), own.first.weight.T, own.first.bias[:WIDTH]))
    return own.last(torch.tanh(own.first(hidden)))


def twice() -> nn.Module:
    layer = nn.Linear(WIDTH, WIDTH)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(WIDTH, 1))


def twice_normed(norm: nn.Module) -> nn.Module:
    return sequence(norm, nn.SiLU(), nn.Linear(16, 16), norm, nn.SiLU())


def hooked() -> nn.Module:
    own = sequence(nn.Tanh())
    own[1].register_forward_hook(lambda *_: None)
    return own


def with_parameter(register: Callable[[Tensor], object]) -> nn.Module:
    own = sequence(nn.Tanh())
    register(own[0].weight)
    return own


def with_hook(own: nn.Module) -> nn.Module:
    own.register_forward_pre_hook(lambda *_: None)
    return own


def with_parameter_hook(own: nn.LayerNorm) -> nn.Module:
    own.weight.register_hook(halve)
    return own


def read_before(own: Tower, x: Tensor) -> Tensor:
    hidden = torch.tanh(own.first(x))
    functional.silu(hidden.detach(), inplace=True)
    return own.last(hidden)


def bias_for_all() -> nn.Module:
    own = sequence(nn.Tanh())
    own[0].bias = nn.Parameter(torch.zeros(1))
    return own


def scaled_by_what_is_kept() -> nn.Module:
    scale = torch.full((16,), 2.0)
    return Tower(way=lambda own, x: own.last(torch.tanh(functional.layer_norm(own.first(x), (16,), scale))))


def halve(slope: Tensor) -> Tensor:
    return slope / 2


def shrink(weight: Tensor) -> None:
    weight.grad = None if weight.grad is None else weight.grad / 2


OTHER = {
    "another activation": lambda: sequence(nn.Mish()),
    "an activation asked for in another way": lambda: sequence(nn.Softplus(beta=2.0)),
    "a strength below 0": lambda: sequence(nn.LeakyReLU(-0.1)),
    "a strength that is a tensor": lambda: Tower(
        way=lambda own, x: own.last(functional.leaky_relu(own.first(x), torch.tensor(0.1)))  # type: ignore[arg-type]
    ),
    "written elsewhere": lambda: Tower(
        way=lambda own, x: own.last(torch.sigmoid(own.first(x), out=torch.empty(len(x), 16)))
    ),
    "an activation twice": lambda: sequence(nn.Tanh(), nn.Tanh()),
    "none": lambda: sequence(nn.Identity()),
    "nothing hidden": lambda: nn.Linear(WIDTH, 1),
    "ends in one": lambda: nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh()),
    "dropout": lambda: sequence(nn.Tanh(), nn.Dropout()),
    "a norm of what is seen": lambda: nn.Sequential(nn.LayerNorm(WIDTH), *sequence(nn.Tanh())),
    "a norm at the end": lambda: nn.Sequential(*sequence(nn.Tanh()), nn.LayerNorm(1)),
    "a norm over other axes": lambda: Tower(
        way=lambda own, x: own.last(functional.layer_norm(torch.tanh(own.first(x)), (2, 16)))
    ),
    "a norm twice": lambda: sequence(nn.LayerNorm(16), nn.LayerNorm(16), nn.Tanh()),
    "a norm shared": lambda: twice_normed(nn.LayerNorm(16)),
    "a norm with a hook": lambda: sequence(with_hook(nn.LayerNorm(16)), nn.Tanh()),
    "a norm with a weight's hook": lambda: sequence(with_parameter_hook(nn.LayerNorm(16)), nn.Tanh()),
    "a norm's weight made of another": lambda: Tower(
        way=lambda own, x: own.last(torch.tanh(functional.layer_norm(own.first(x), (16,), 2 * own.last.weight[0])))
    ),
    "a norm by groups": lambda: sequence(nn.GroupNorm(1, 16), nn.Tanh()),
    "a norm by root mean square": lambda: sequence(nn.RMSNorm(16), nn.Tanh()),
    "a norm alone": lambda: sequence(nn.LayerNorm(16)),
    "a bias for all": bias_for_all,
    "a weight that is no parameter": scaled_by_what_is_kept,
    "changed in place": lambda: Tower(way=lambda own, x: own.last(torch.tanh(own.first(x)).mul_(2))),
    "changed in place and read before": lambda: Tower(way=read_before),
    "dropout behind a norm": lambda: sequence(nn.LayerNorm(16), nn.SiLU(), nn.Dropout(0.1)),
    "float64": lambda: sequence(nn.Tanh()).double(),
    "weights made of others": lambda: nn.Sequential(
        parametrizations.weight_norm(nn.Linear(WIDTH, 16)), nn.Tanh(), nn.Linear(16, 1)
    ),
    "a layer twice": twice,
    "a weight turned": lambda: Tower(way=tied),
    "a hook": hooked,
    "a hook of a weight": lambda: with_parameter(lambda w: w.register_hook(halve)),
    "a hook after a weight's": lambda: with_parameter(lambda w: w.register_post_accumulate_grad_hook(shrink)),
    "counts": lambda: Tower(way=counts),
    "keeps": lambda: Tower(way=keeps),
    "past a layer": lambda: Tower(way=lambda own, x: plainly(own, x) + x[:, :1]),
    "scaled": lambda: Tower(way=lambda own, x: plainly(own, 2 * x)),
    "cut": lambda: Tower(way=lambda own, x: own.last(torch.tanh(own.first(x)).detach())),
    "without a gradient": lambda: Tower(way=without_gradient),
    "in inference": lambda: Tower(way=in_inference),
    "rounded": lambda: Tower(way=rounded),
    "by the number of rows": lambda: Tower(
        way=lambda own, x: plainly(own, x) if len(x) > 1 else own.last(own.first(x))
    ),
    "by the numbers": lambda: Tower(way=lambda own, x: plainly(own, x) if x.sum() < 9 else own.last(own.first(x))),
    "noise": lambda: Tower(way=lambda own, x: plainly(own, x) if torch.rand(()) >= 0 else x),
    "raises": lambda: Tower(way=lambda own, x: own.nowhere),
}


def policy_of(
    build: Callable[[], nn.Module], head: nn.Module | None = None, actor: Callable[[], nn.Module] | None = None
) -> ActorCritic:
    torch.manual_seed(3)
    policy = ActorCritic(actor=(actor or build)(), critic=build(), head=head or GaussianHead(1, -0.3))
    with torch.no_grad():
        for parameter in policy.parameters():  # of a layer that is shared, so that no two are alike
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return policy


def require_the_plain_ones_numbers(plain: ActorCritic) -> None:
    given = units(WIDTH, "box", 1, 33)
    policy = quickened(copy.deepcopy(plain), WIDTH)
    assert isinstance(policy, OwnPerceptrons)
    assert policy.state_dict().keys() == plain.state_dict().keys()
    with torch.no_grad():
        policy.acting(given.observations, 1, np.random.default_rng(0))
        mine, theirs = policy.values(given.observations, None), plain.values(given.observations, None)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)
    fast, found = gradients(policy, given, policy.vjp, slopes(33))
    slow, expected = gradients(plain, given, lambda u: plain_vjp(plain, u), slopes(33))
    torch.testing.assert_close(fast.logp, slow.logp, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", READ)
def test_a_perceptron_runs_on_the_fast_path_with_the_plain_ones_numbers(name: str) -> None:
    if compiled.library is None and not known_to_numpy(name):
        pytest.skip("there is no compiled library")
    require_the_plain_ones_numbers(policy_of(READ[name]))


@pytest.mark.parametrize("form", ["compiled", "NumPy"])
def test_actor_and_critic_need_not_be_alike(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "NumPy":
        monkeypatch.setattr(compiled, "library", None)
    wide = nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 1))
    for actor in (wide, sequence(nn.ReLU())):
        require_the_plain_ones_numbers(policy_of(READ["in sequence"], actor=lambda actor=actor: actor))  # type: ignore[misc]


def test_without_compiled_code_what_numpy_does_not_know_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", None)
    for name, build in READ.items():
        assert isinstance(quickened(policy_of(build), WIDTH), OwnPerceptrons) is known_to_numpy(name), name


def test_what_can_no_longer_run_compiled_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a rollout, too: a norm's weights laid out so that compiled code cannot read them."""
    if compiled.library is None:
        pytest.skip("there is no compiled library")
    plain, given = policy_of(READ["a norm"]), units(WIDTH, "box", 1, 33)
    policy = quickened(copy.deepcopy(plain), WIDTH)
    assert isinstance(policy, OwnPerceptrons)
    rolled(policy, given)
    norm = policy.critic[1]  # type: ignore[index]
    norm.weight.data = norm.weight.detach().repeat_interleave(2)[::2]
    assert not policy._nets.able
    torch.testing.assert_close(policy.values(given.observations, None), plain.values(given.observations, None))
    torch.testing.assert_close(policy.vjp(given)[0].value, plain.values(given.observations, None))


@pytest.mark.parametrize("build", OTHER.values(), ids=OTHER)
def test_any_other_module_is_left_as_it_is(build: Callable[[], nn.Module]) -> None:
    policy = policy_of(build)
    assert read(policy.actor, torch.zeros(2, WIDTH)) is None
    assert quickened(policy, WIDTH) is policy


def test_statistics_and_draws_are_not_touched_by_looking() -> None:
    for between in (nn.BatchNorm1d(16), nn.Dropout()):
        module = sequence(between, nn.Tanh())
        before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
        assert read(module, torch.ones(2, WIDTH)) is None
        torch.testing.assert_close(module.state_dict(), before, rtol=0, atol=0)
        assert torch.equal(state, torch.get_rng_state())


def test_a_module_that_keeps_what_it_sees_first_has_not_seen_anything_yet() -> None:
    """Nor has it drawn: it is a copy that is looked at."""

    def centred(own: Tower, x: Tensor) -> Tensor:
        if not own.kept:
            own.kept.append(x.mean(0) + torch.rand(()))
        return plainly(own, x - own.kept[0])

    policy = policy_of(lambda: Tower(way=centred))
    state = torch.get_rng_state()
    assert quickened(policy, WIDTH) is policy
    assert not any(net.kept for net in (policy.actor, policy.critic))  # type: ignore[union-attr]
    assert torch.equal(state, torch.get_rng_state())


def test_a_module_that_cannot_be_copied_is_left_as_it_is() -> None:
    policy = policy_of(lambda: Tower())
    policy.actor.kept.append(threading.Lock())  # type: ignore[union-attr, arg-type]
    assert quickened(policy, WIDTH) is policy


def test_a_policy_of_another_kind_is_left_as_it_is() -> None:
    class Head(CategoricalHead):
        """Somebody's own."""

    class Policy(ActorCritic):
        """Somebody's own."""

    def tower() -> nn.Module:
        return sequence(nn.Tanh())

    actor, critic = tower(), tower()
    left: list[ControlPolicy] = [
        policy_of(tower, head=GaussianHead(2)),
        policy_of(tower, head=Head()),
        policy_of(lambda: Tower(2)),
        Policy(actor=actor, critic=critic, head=CategoricalHead()),
        ActorCritic(actor=actor, critic=actor, head=CategoricalHead()),
        ActorCritic(actor=actor, critic=critic, head=CategoricalHead(), trunk=nn.Tanh()),
    ]
    watched, spread = policy_of(tower), policy_of(tower)
    watched.register_forward_pre_hook(lambda *_: None)
    spread.head.log_std.register_hook(halve)  # type: ignore[union-attr, operator]
    for policy in (*left, watched, spread):
        assert quickened(policy, WIDTH) is policy


def rolled(policy: ControlPolicy, given: Transitions) -> Tensor:
    """Values during a rollout that begins in these states."""
    with torch.no_grad():
        policy.acting(given.observations, 1, np.random.default_rng(0))
        return policy.values(given.observations, None)


def test_a_module_that_changes_is_followed_from_the_next_rollout_on() -> None:
    policy, given = quickened(policy_of(READ["a branch on what is kept"]), WIDTH), units(WIDTH, "box", 1, 4)
    assert isinstance(policy, OwnPerceptrons)
    before, critic = rolled(policy, given), policy.critic
    assert isinstance(critic, Tower)
    critic.loud = 1
    torch.testing.assert_close(rolled(policy, given), 2 * before)
    critic.loud = 0
    called: list[int] = []
    hook = critic.last.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(rolled(policy, given), before)
    assert called
    hook.remove()
    critic.last = nn.Linear(16, 1)
    torch.testing.assert_close(rolled(policy, given), critic(given.observations.vector)[:, 0].detach())


@pytest.mark.parametrize("name", ["critic.0.weight", "head.log_std"])
def test_a_hook_of_a_weight_is_followed_from_the_next_rollout_on(name: str) -> None:
    policy, given = quickened(policy_of(READ["in sequence"]), WIDTH), units(WIDTH, "box", 1, 4)
    assert isinstance(policy, OwnPerceptrons)
    rolled(policy, given)
    _, before = gradients(policy, given, policy.vjp, slopes(4))
    hook = policy.get_parameter(name).register_hook(halve)
    rolled(policy, given)
    _, found = gradients(policy, given, policy.vjp, slopes(4))
    for (own, _), mine, its in zip(policy.named_parameters(), found, before, strict=True):
        torch.testing.assert_close(mine, its / 2 if own == name else its, rtol=2e-4, atol=2e-6)
    hook.remove()


def test_before_its_first_rollout_it_is_run_as_it_is() -> None:
    called: list[int] = []
    policy, given = quickened(policy_of(READ["in sequence"]), WIDTH), units(WIDTH, "box", 1, 4)
    policy.critic.register_forward_hook(lambda *_: called.append(1))  # type: ignore[union-attr]
    policy.vjp(given)  # type: ignore[operator]
    assert called


@pytest.mark.parametrize("kind", ["discrete", "box"])
def test_it_learns_as_the_plain_policy_does(kind: str) -> None:
    head, outputs = (CategoricalHead(), 3) if kind == "discrete" else (GaussianHead(3), 3)
    plain = policy_of(lambda: Tower(), head=head, actor=lambda: Tower(outputs))
    policy = quickened(copy.deepcopy(plain), WIDTH)
    batch = batch_of(plain, WIDTH, kind, outputs, 200)  # type: ignore[arg-type]
    settings = PPOSettings(epochs=2, minibatches=3, entropy_coefficient=0.01)
    policy.acting(batch.units.observations, 1, np.random.default_rng(0))  # type: ignore[attr-defined]
    before = copy.deepcopy(plain.state_dict())
    for own in (policy, plain):
        list(ppo.update(own, batch, optimiser_of(own), settings, seed=4, step=2))  # type: ignore[arg-type]
    assert all(not torch.equal(weight, before[name]) for name, weight in policy.named_parameters())
    for mine, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_frozen_weights_stay() -> None:
    policy = quickened(policy_of(READ["in sequence"]), WIDTH)
    given = units(WIDTH, "box", 1, 4)
    policy.actor[0].weight.requires_grad_(False)  # type: ignore[union-attr, index]
    rolled(policy, given)
    policy.vjp(given)[1](Slopes(logp=torch.ones(4)))  # type: ignore[operator]
    assert policy.actor[0].weight.grad is None  # type: ignore[union-attr, index]
    assert policy.actor[2].weight.grad is not None  # type: ignore[union-attr, index]
