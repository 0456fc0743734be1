"""PPO and A2C where everything can be enumerated."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch

from bridle.batch import Batch
from bridle.errors import ConfigError, NonFiniteStep
from bridle.learn import a2c, ppo
from bridle.learn.a2c import A2CSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.record import UpdateStep, last_logp, summarise
from tests.learn.tabular import Table, batch_of, optimiser_of, singles

REWARDS = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64)
START = torch.softmax(torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64), 0)


def expected_draws(table: Table, scale: int = 300) -> list[int]:
    """Actions in the proportions of the policy, so that a batch's mean is the policy's expectation up to rounding."""
    counts = (table.probabilities * scale).round().long()
    return [a for a, c in enumerate(counts.tolist()) for _ in range(c)]


def gradients_of(table: Table, learn: Callable[..., Iterator[UpdateStep]], batch: Batch) -> dict[str, torch.Tensor]:
    """What the optimiser is given at the first step."""
    seen: dict[str, torch.Tensor] = {}
    optimiser = optimiser_of(table)
    move = optimiser.step

    def step(rows: torch.Tensor) -> dict[str, float]:
        seen.update(logits=table.logits.grad.clone(), value=table.value.grad.clone())
        return move(rows)

    optimiser.step = step
    list(learn(table, batch, optimiser))
    return seen


def test_every_minibatch_is_a_step_and_the_first_ratio_is_one() -> None:
    table = Table([0.2, 0.0, -0.1])
    batch = batch_of(table, singles([0, 1, 2, 0, 1, 2, 0, 1]), torch.linspace(-1, 1, 8, dtype=torch.float64))
    steps = list(ppo.update(table, batch, optimiser_of(table), PPOSettings(epochs=3, minibatches=4), seed=0, step=0))
    assert len(steps) == 12
    assert all(s.applied for s in steps)
    assert float(steps[0].gap.maximum) == 0.0
    torch.testing.assert_close(steps[0].ratio, torch.ones(2, dtype=torch.float64))
    assert all(s.gap is None for s in steps[1:])
    assert summarise(steps)["optimiser_steps"] == 12


def test_first_step_has_the_policy_gradient() -> None:
    """At ratio 1 the gradient of the clipped objective is that of A log π, so PPO's first step is A2C's."""
    advantages = torch.tensor([0.5, -1.0, 2.0, 0.25], dtype=torch.float64)
    once = PPOSettings(epochs=1, minibatches=1, whiten="none")
    gradients = []
    for learn in (
        lambda t, b, o: ppo.update(t, b, o, once, seed=0, step=0),
        lambda t, b, o: a2c.update(t, b, o, A2CSettings()),
    ):
        table = Table([0.1, 0.2, 0.3])
        table.logits.grad = torch.full((3,), 9.0, dtype=torch.float64)  # left by a step that was refused
        gradients.append(gradients_of(table, learn, batch_of(table, singles([0, 1, 2, 1]), advantages)))
    expected = -(torch.tensor([0.5, -0.75, 2.0], dtype=torch.float64) - 1.75 * START) / 4
    for gradient in gradients:
        torch.testing.assert_close(gradient["logits"], expected)
        torch.testing.assert_close(gradient["value"], -advantages.mean())


def test_without_a_signal_the_leash_keeps_its_strength() -> None:
    """Equal advantages are no signal; what is left is β ∇KL, however the advantages would have been whitened."""
    gradients = []
    for whiten in ("batch", "minibatch", "none"):
        table = Table([0.1, 0.2, 0.3])
        table.reference = torch.zeros(3, dtype=torch.float64)
        batch = batch_of(table, singles([0, 1, 2, 1]), torch.zeros(4, dtype=torch.float64))
        settings = PPOSettings(epochs=1, minibatches=1, whiten=whiten, kl_loss="exact")
        run = partial(ppo.update, settings=settings, seed=0, step=0, kl_coefficient=0.05)
        gradients.append(gradients_of(table, run, batch)["logits"])
    p = START
    log_ratio = p.log() + torch.log(torch.tensor(3.0, dtype=torch.float64))
    expected = 0.05 * p * (log_ratio - (p * log_ratio).sum())
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected)


def test_a2c_gradient_by_hand() -> None:
    """∇ of −mean A log π is −mean A (e_a − π); of ½(V − R)² it is V − R; of −c H it is c Σ... zero at the uniform policy."""
    table = Table([0.0, 0.0, 0.0], value=1.0)
    batch = batch_of(
        table,
        singles([0, 2]),
        torch.tensor([3.0, -1.5], dtype=torch.float64),
        torch.tensor([2.0, 4.0], dtype=torch.float64),
    )
    steps: list[UpdateStep] = []

    def learn(*given: Any) -> list[UpdateStep]:
        steps.extend(a2c.update(*given, A2CSettings(entropy_coefficient=0.3)))
        return steps

    seen = gradients_of(table, learn, batch)
    torch.testing.assert_close(seen["logits"], torch.tensor([-1.25, 0.25, 1.0], dtype=torch.float64))
    torch.testing.assert_close(seen["value"], torch.tensor(-2.0, dtype=torch.float64))
    assert steps[0].value_loss == pytest.approx((0.5 + 4.5) / 2)


@pytest.mark.parametrize(
    ("kl_loss", "whiten"), [("exact", "none"), ("k2", "none"), ("exact", "batch"), ("exact", "minibatch")]
)
def test_the_leash_in_the_loss_has_its_known_optimum(kl_loss: str, whiten: str) -> None:
    """max E[r] − β KL(π‖π_ref) has the solution π ∝ π_ref exp(r/β); PPO on expected batches must end there.

    Whitening changes the advantages' unit, not the optimum: β is reward per nat all the same.
    """
    beta = 0.4
    table = Table([0.5, 0.0, -0.5])
    optimum = torch.softmax(table.reference + REWARDS / beta, 0)
    optimiser = optimiser_of(table, lr=0.05)
    settings = PPOSettings(epochs=2, minibatches=1, whiten=whiten, kl_loss=kl_loss)
    for step in range(120):
        actions = expected_draws(table)
        baseline = float((table.probabilities * REWARDS).sum())
        batch = batch_of(table, singles(actions), REWARDS[actions] - baseline)
        list(ppo.update(table, batch, optimiser, settings, seed=0, step=step, kl_coefficient=beta))
    torch.testing.assert_close(table.probabilities, optimum, atol=0.02, rtol=0)


def test_the_leash_in_the_reward_has_the_same_optimum() -> None:
    beta = 0.4
    table = Table([0.5, 0.0, -0.5])
    ref = torch.log_softmax(table.reference, 0)
    optimum = torch.softmax(table.reference + REWARDS / beta, 0)
    optimiser = optimiser_of(table, lr=0.05)
    for step in range(120):
        actions = expected_draws(table)
        shaped = REWARDS - beta * (torch.log(table.probabilities) - ref)
        advantages = shaped[actions] - float((table.probabilities * shaped).sum())
        batch = batch_of(table, singles(actions), advantages)
        list(
            ppo.update(table, batch, optimiser, PPOSettings(epochs=2, minibatches=1, whiten="none"), seed=0, step=step)
        )
    torch.testing.assert_close(table.probabilities, optimum, atol=0.02, rtol=0)


def test_clipping_holds_the_policy_back() -> None:
    """Many steps on one batch: with the clip the good action's ratio stops near 1 + ε, without it it runs away."""

    def final_ratio(clip: float | None) -> float:
        table = Table([0.0, 0.0, 0.0])
        batch = batch_of(table, singles([0, 1, 2]), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
        settings = PPOSettings(epochs=150, minibatches=1, clip=clip, whiten="none")
        steps = list(ppo.update(table, batch, optimiser_of(table, lr=0.005), settings, seed=0, step=0))
        return float((last_logp(steps, batch.old_logp) - batch.old_logp).exp()[0])

    assert final_ratio(0.2) < 1.3
    assert final_ratio(None) > 1.6


def test_target_kl_ends_the_update_before_the_step() -> None:
    table = Table([0.0, 0.0, 0.0])
    batch = batch_of(table, singles([0, 1, 2]), torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    settings = PPOSettings(epochs=50, minibatches=1, target_kl=0.01, whiten="none")
    steps = []
    before = table.logits.detach().clone()
    for record in ppo.update(table, batch, optimiser_of(table, lr=0.02), settings, seed=0, step=0):
        steps.append(record)
        if record.applied:
            before = table.logits.detach().clone()
    assert 1 < len(steps) < 50
    assert [s.applied for s in steps] == [True] * (len(steps) - 1) + [False]
    assert steps[-1].old_kl > 0.01 >= steps[-2].old_kl
    assert torch.equal(table.logits.detach(), before)
    assert table.logits.grad is None


def test_warm_up_moves_the_critic_alone() -> None:
    table = Table([0.3, 0.0, -0.3])
    before = table.logits.detach().clone()
    batch = batch_of(table, singles([0, 1, 2]), torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64))
    list(
        ppo.update(
            table,
            batch,
            optimiser_of(table),
            PPOSettings(entropy_coefficient=0.1, kl_loss="exact", minibatches=1),
            seed=0,
            step=0,
            kl_coefficient=1.0,
            critic_only=True,
            extra_loss=lambda *_: [table.logits.sum()],
        )
    )
    assert torch.equal(table.logits.detach(), before)
    assert table.value.item() != 0.0


def test_extra_loss_is_added_to_every_step() -> None:
    """With no advantage the only pull is the extra loss: a likelihood of action 1."""
    table = Table([0.0, 0.0, 0.0])
    batch = batch_of(table, singles([0, 1, 2, 0]), torch.zeros(4, dtype=torch.float64))
    asked: list[int] = []
    said: list[float] = []

    def likelihood(taken: int, tokens: int | None) -> Iterator[torch.Tensor]:
        asked.append(taken)
        for share in (0.25, 0.75):  # it comes in parts
            loss = -share * torch.log_softmax(table.logits, 0)[1]
            said.append(float(loss.detach()))
            yield loss

    steps = list(
        ppo.update(
            table,
            batch,
            optimiser_of(table),
            PPOSettings(epochs=2, minibatches=2),
            seed=0,
            step=0,
            extra_loss=likelihood,
        )
    )
    assert asked == [0, 1, 2, 3]
    assert summarise(steps)["extra_loss"] == pytest.approx(sum(said) / 4)
    assert table.probabilities.argmax() == 1
    with pytest.raises(NonFiniteStep, match="extra"):
        list(
            ppo.update(
                table,
                batch,
                optimiser_of(table),
                PPOSettings(),
                seed=0,
                step=0,
                extra_loss=lambda *_: [table.logits.sum() * float("nan")],
            )
        )


def test_entropy_bonus_flattens() -> None:
    table = Table([2.0, 0.0, -1.0])
    before = -(table.probabilities * table.probabilities.log()).sum()
    batch = batch_of(table, singles([0, 1, 2]), torch.zeros(3, dtype=torch.float64))
    list(
        ppo.update(
            table, batch, optimiser_of(table), PPOSettings(entropy_coefficient=1.0, minibatches=1), seed=0, step=0
        )
    )
    assert -(table.probabilities * table.probabilities.log()).sum() > before


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0},
        {"minibatches": 0},
        {"clip": 1.5},
        {"clip": None, "clip_high": 0.3},
        {"dual_clip": 0.5},
        {"target_kl": -1.0},
        {"value_coefficient": -0.1},
    ],
)
def test_settings_that_cannot_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        PPOSettings(**bad)
