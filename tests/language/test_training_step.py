"""The training step's shortcuts against the plain path: the gradient of one is that of the other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bridle.language.causal import CausalModel
from bridle.language.policy import LanguagePolicy, critic_from_actor, value_head
from bridle.language.segments import Segments
from bridle.learn.ppo import PPOObjective, PPOSettings
from bridle.learn.step import Minibatch, accumulate
from tests.core.memory import watch_allocations
from tests.language.tiny import tiny_model


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_policy(
    critic: str = "own", family: str = "llama", *, leashed: bool = False, recompute: bool = False, **shape: object
) -> LanguagePolicy:
    actor = CausalModel(tiny_model(family, **shape))
    reference = CausalModel(tiny_model(family, seed=1, **shape)).requires_grad_(False)
    head = critic_from_actor(actor.model) if critic == "own" else value_head(actor.width)
    with torch.no_grad():
        (head.head if critic == "own" else head).weight.copy_(torch.linspace(-0.3, 0.3, actor.width)[None])
    return LanguagePolicy(
        actor, head, temperature=0.8, reference=reference, leashed=leashed, recompute=recompute
    ).eval()


def some_segments() -> Segments:
    lengths = [(3, 9), (1, 1), (7, 20), (2, 4), (5, 5), (4, 12)]
    draws = [(draw(p, seed=i), draw(t, seed=90 + i)) for i, (p, t) in enumerate(lengths)]
    ids = [tuple((x.abs() * 40).long() % 90 + 3 for x in pair) for pair in draws]
    return Segments.of([p for p, _ in ids], [t for _, t in ids])


def some_minibatch(count: int, old_logp: Tensor) -> Minibatch:
    return Minibatch(
        actions=torch.arange(count),
        old_logp=old_logp + 0.2 * draw(count, seed=1),
        old_value=draw(count, seed=2),
        advantages=draw(count, seed=3),
        returns=draw(count, seed=4),
        weights=draw(count, seed=5).abs(),
        ref_logp=old_logp + 0.3 * draw(count, seed=6),
    )


def gradients(policy: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


OBJECTIVES = {
    "plain": (PPOSettings(), 0.0),
    "entropy": (PPOSettings(entropy_coefficient=0.3, value_clip=0.5), 0.0),
    "exact": (PPOSettings(kl_loss="exact"), 0.7),
    "everything": (PPOSettings(kl_loss="exact", entropy_coefficient=0.2, dual_clip=2.0), 0.7),
    "k3": (PPOSettings(kl_loss="k3"), 0.7),
}


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("critic", ["own", "trunk"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_one_pass_has_the_gradient_of_autograd(kind: str, critic: str, family: str) -> None:
    settings, coefficient = OBJECTIVES[kind]
    policy = make_policy(critic, family, leashed=settings.kl_loss == "exact")
    segments = some_segments()
    with torch.no_grad():
        part = some_minibatch(int(segments.sizes.sum()), policy(segments).logp)
    objective = PPOObjective(settings=settings, kl_coefficient=coefficient, critic_only=False)

    evaluation = policy(segments)
    (part.weights * objective.loss(evaluation, part)).sum().backward()
    expected = gradients(policy)
    seen = accumulate(policy, segments, part, objective, micro_budget=None)
    found = gradients(policy)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4, msg=name)
    for name in ("logp", "entropy", "value"):
        torch.testing.assert_close(getattr(seen, name), getattr(evaluation, name).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("critic", ["own", "trunk"])
@pytest.mark.parametrize("budget", [1, 30, 64, 100_000])
def test_any_micro_batch_budget_gives_the_same_gradient(critic: str, budget: int) -> None:
    policy = make_policy(critic, leashed=True)
    segments = some_segments()
    with torch.no_grad():
        part = some_minibatch(int(segments.sizes.sum()), policy(segments).logp)
    objective = PPOObjective(settings=PPOSettings(kl_loss="exact"), kl_coefficient=0.5, critic_only=False)
    whole = accumulate(policy, segments, part, objective, micro_budget=None)
    expected = gradients(policy)
    cut = accumulate(policy, segments, part, objective, micro_budget=budget)
    for name, found in gradients(policy).items():
        theirs = expected[name]
        torch.testing.assert_close(found, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4, msg=name)
    torch.testing.assert_close(cut.logp, whole.logp, atol=1e-5, rtol=1e-5)


def test_the_plain_path_has_the_same_gradient() -> None:
    policy = make_policy()
    segments = some_segments()
    with torch.no_grad():
        part = some_minibatch(int(segments.sizes.sum()), policy(segments).logp)
    objective = PPOObjective(settings=PPOSettings(entropy_coefficient=0.1), kl_coefficient=0.0, critic_only=False)
    accumulate(policy, segments, part, objective, micro_budget=40)
    expected = gradients(policy)
    policy.actor.form = None
    accumulate(policy, segments, part, objective, micro_budget=40)
    for name, found in gradients(policy).items():
        theirs = expected[name]
        torch.testing.assert_close(found, theirs, atol=1e-5 * float(theirs.abs().max()), rtol=1e-4, msg=name)


def test_a_frozen_actor_gets_no_gradient_and_the_critic_its_own() -> None:
    policy = make_policy()
    segments = some_segments()
    with torch.no_grad():
        part = some_minibatch(int(segments.sizes.sum()), policy(segments).logp)
    objective = PPOObjective(settings=PPOSettings(), kl_coefficient=0.0, critic_only=True)
    both = PPOObjective(settings=PPOSettings(), kl_coefficient=0.0, critic_only=False)
    accumulate(policy, segments, part, both, micro_budget=None)
    expected = {name: g for name, g in gradients(policy).items() if name.startswith("critic")}
    with policy.frozen_actor():
        accumulate(policy, segments, part, objective, micro_budget=None)
    found = gradients(policy)
    assert found.keys() == expected.keys()
    for name, theirs in expected.items():
        torch.testing.assert_close(found[name], theirs, atol=1e-7, rtol=1e-5, msg=name)


def test_one_micro_batch_never_holds_the_logits_of_all_its_actions() -> None:
    """V = 5,000 and 51 actions in chunks of 8 rows: nothing of 51 × V numbers is ever allocated."""
    policy = make_policy(vocab_size=5000, hidden_size=16, tie_word_embeddings=True)
    segments = some_segments()
    with torch.no_grad():
        part = some_minibatch(int(segments.sizes.sum()), policy(segments).logp)
    objective = PPOObjective(settings=PPOSettings(entropy_coefficient=0.1), kl_coefficient=0.0, critic_only=False)
    with pytest.MonkeyPatch.context() as patch, watch_allocations() as seen:
        patch.setattr("bridle.core._vocabulary._CHUNK_NUMBERS", 8 * 5000)
        patch.setattr("bridle.language.vocabulary._KEPT_NUMBERS", 8 * 5200)
        accumulate(policy, segments, part, objective, micro_budget=None)
    assert 5000 * 16 <= seen.largest < 51 * 5000 / 2


@pytest.mark.parametrize("critic", ["own", "trunk"])
def test_recomputed_layers_give_the_same_gradient(critic: str) -> None:
    segments, found, ran = some_segments(), [], []
    objective = PPOObjective(settings=PPOSettings(), kl_coefficient=0.0, critic_only=False)
    for recompute in (False, True):
        policy = make_policy(critic, recompute=recompute, num_hidden_layers=4)
        with torch.no_grad():
            part = some_minibatch(int(segments.sizes.sum()), policy(segments).logp)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        for layer in policy.actor.model.model.layers:
            layer.mlp.register_forward_pre_hook(count)
        accumulate(policy, segments, part, objective, micro_budget=None)
        assert not any(module.training for module in policy.modules())
        found.append(gradients(policy))
        ran.append(calls)
    assert ran == [4, 8]
    assert found[0].keys() == found[1].keys()
    for name, theirs in found[0].items():
        torch.testing.assert_close(found[1][name], theirs, atol=1e-6 * float(theirs.abs().max()), rtol=1e-5, msg=name)
