"""The laws behind the figures of docs/learn, on short forms of the experiments.

Exact quantities are checked against definitions written out here; estimates against exact quantities, within
standard errors.
"""

from __future__ import annotations

from pathlib import Path

import actor_critic
import bias_and_variance
import clipped_surrogate
import critic_on_a_chain
import gae_weights
import numpy as np
import pytest
import sft_is_not_enough
import td_residual
import torch
import trust_region
import update_size
from learn_world import World, chain, grid

from bridle.core.divergence import exact_kl
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.quickstart.gold import gold_score
from bridle.quickstart.kitchen import answer_for, orders, prompt_for
from bridle.quickstart.model import new_model, new_tokenizer
from bridle.random import generator


def uniform(world: World) -> torch.Tensor:
    return torch.full(world.transitions.shape[:2], 1 / world.transitions.shape[1], dtype=torch.float64)


WORLDS = {"chain": chain(), "grid": (grid(), uniform(grid()))}
in_both_worlds = pytest.mark.parametrize("name", list(WORLDS))


@in_both_worlds
def test_exact_values_are_those_of_endless_sweeps(name: str) -> None:
    world, policy = WORLDS[name]
    values = [0.0] * (len(world.start) + 1)
    into, gain, chosen = world.transitions.tolist(), world.rewards.tolist(), policy.tolist()
    for _ in range(600):
        values = [
            sum(
                share * p * (r + world.gamma * v)
                for share, row, got in zip(chosen[s], into[s], gain[s], strict=True)
                for p, r, v in zip(row, got, values, strict=True)
                if p
            )
            for s in range(len(world.start))
        ] + [0.0]
    assert world.values(policy).tolist() == pytest.approx(values[:-1], abs=1e-6)


@in_both_worlds
def test_drawn_episodes_bring_what_the_exact_values_say(name: str) -> None:
    world, policy = WORLDS[name]
    e = world.draw(policy.expand(4000, -1, -1), steps=500, rng=generator(0, "tests.learn"))
    assert not e.truncated.any()
    assert torch.equal(e.terminated.sum(1), torch.ones(4000, dtype=torch.int64))
    returns = (e.rewards * world.gamma ** torch.arange(e.rewards.shape[1])).sum(1)
    error = float(returns.mean() - world.expected_return(policy))
    assert abs(error) < 4 * float(returns.std()) / 4000**0.5
    visits = torch.bincount(e.states[:, 0], minlength=len(world.start)) / 4000
    assert visits.tolist() == pytest.approx(world.start.tolist(), abs=0.04)


@in_both_worlds
def test_advantages_average_to_nothing_and_visits_count_discounted_steps(name: str) -> None:
    world, policy = WORLDS[name]
    assert float((policy * world.advantages(policy)).sum(1).abs().max()) < 1e-12
    # Σ_s visits(s) r_π(s) is the expected return, told from the other end.
    reward = (policy.unsqueeze(2) * world.transitions * world.rewards).sum((1, 2))
    assert float(world.visits(policy) @ reward) == pytest.approx(float(world.expected_return(policy)), abs=1e-12)


def test_the_td_critic_satisfies_bellman_on_its_own_episodes_and_monte_carlo_is_the_mean_return() -> None:
    world, policy = chain()
    e = world.draw(policy.expand(20, -1, -1), steps=1000, rng=generator(1, "tests.learn"))
    td = torch.cat([critic_on_a_chain.fit(e, 1, world, 1)[0], torch.zeros(1)])
    mc = critic_on_a_chain.fit(e, 1, world, None)[0]
    for s in range(len(world.start)):
        here = e.mask & (e.states == s)
        expected = (e.rewards + world.gamma * td[e.successors])[here].mean()
        assert float(td[s]) == pytest.approx(float(expected), abs=1e-4)
        returns = [
            sum(float(e.rewards[b, k]) * world.gamma ** (k - t) for k in range(t, e.rewards.shape[1]))
            for b, t in here.nonzero().tolist()
        ]
        assert float(mc[s]) == pytest.approx(float(np.mean(returns)), abs=1e-9)


def test_more_episodes_make_every_critic_better_and_td_the_best() -> None:
    errors = critic_on_a_chain.measure(episodes=(5, 50), learners=40)["error"]
    assert all(late < early / 2 for early, late in errors.values())
    assert errors["TD"][1] < errors["4-step"][1] < errors["Monte Carlo"][1]


def test_the_mean_residual_is_the_advantage_and_a_wrong_critic_moves_it_as_algebra_says() -> None:
    world, policy = chain()
    figures = td_residual.measure(episodes=2000)
    exact = torch.tensor(figures["advantages"], dtype=torch.float64)
    for name in ("exact critic", "wrong critic"):
        of = {what: torch.tensor(figures[name][what], dtype=torch.float64) for what in figures[name]}
        wrong = of["values"] - world.values(policy)
        moved = world.gamma * world.transitions[:, :, :-1] @ wrong - wrong.unsqueeze(1)
        assert float(((of["mean"] - exact - moved) / of["standard_error"]).abs().max()) < 4.5
    assert float(moved.abs().max()) > 0.1


def test_sampled_bias_is_the_exact_bias_and_lambda_1_has_none() -> None:
    figures = bias_and_variance.measure(episodes=400)
    lam = figures["lam"]
    assert figures["cut"] == 0
    rows = zip(lam["squared_bias"], figures["exact_squared_bias"], lam["standard_error"], strict=True)
    assert all(abs(found - exact) < 4 * error for found, exact, error in rows)
    assert figures["exact_squared_bias"][-1] == pytest.approx(0.0, abs=1e-20)
    assert figures["exact_squared_bias"][0] > 1e-3
    assert lam["variance"][-1] > 4 * lam["variance"][0]
    # n = 1 is λ = 0, and an n beyond every episode is λ = 1.
    assert figures["n"]["variance"][0] == pytest.approx(lam["variance"][0])
    assert figures["n"]["variance"][-1] == pytest.approx(lam["variance"][-1], rel=1e-3)


def test_the_committed_error_is_u_shaped_in_lambda_and_in_n() -> None:
    figures = bias_and_variance.EXPERIMENT.figures
    for name in ("lam", "n"):
        of = figures[name]
        error = [b + v / bias_and_variance.AVERAGED for b, v in zip(of["squared_bias"], of["variance"], strict=True)]
        assert 2 * min(error) < min(error[0], error[-1])


def test_gae_is_the_mixture_of_n_step_advantages() -> None:
    figures = gae_weights.measure()
    assert figures["identity_error"] < 1e-12
    for lam, residuals, mixture in zip(figures["lam"], figures["residuals"], figures["n_step"], strict=True):
        assert sum(mixture) == pytest.approx(1.0)
        # A^(n) holds δ_{t+l} with γ^l for every l < n, so the weight of δ_{t+l} is γ^l times that of all n > l.
        assert residuals == pytest.approx([0.99**k * sum(mixture[k:]) for k in range(len(mixture))])
        assert lam == 0.0 or residuals[1] == pytest.approx(0.99 * lam)


def test_the_clipped_objective_is_a_lower_bound_and_its_gradient_its_slope() -> None:
    figures = clipped_surrogate.measure()
    log_ratio = np.log(figures["ratio"])
    for name in ("A = +1", "A = −1"):
        objective, gradient, free = (np.array(figures[name][n]) for n in ("objective", "gradient", "unclipped"))
        assert (objective <= free + 1e-12).all()
        slope = np.gradient(objective, log_ratio)
        kink = np.abs(np.array(figures["ratio"]) - (1.2 if name == "A = +1" else 0.8)) < 0.025
        assert np.abs(slope - gradient)[1:-1][~kink[1:-1]].max() < 0.02


def test_surrogate_and_return_share_their_slope_and_part_further_out() -> None:
    world = grid()
    x = trust_region.features(world)
    theta = torch.from_numpy(generator(0, "tests.learn.theta").standard_normal((3, 4)))
    new = theta.clone().requires_grad_()
    (promised,) = torch.autograd.grad(trust_region.surrogate(world, x @ theta, x @ new), new)
    (true,) = torch.autograd.grad(world.expected_return((x @ new).softmax(1)), new)
    assert promised.flatten().tolist() == pytest.approx(true.flatten().tolist(), abs=1e-12)
    figures = trust_region.measure(kls=(1e-6, 0.01, 1.0))
    assert figures["got"][0] == pytest.approx(figures["promised"][0], rel=0.01)
    assert figures["got"][1] > 0 > figures["got"][2]
    assert figures["promised"][2] > 0.3


def test_a_step_has_the_kl_that_was_asked_for() -> None:
    world = grid()
    x, theta = trust_region.features(world), torch.zeros(3, 4, dtype=torch.float64)
    new = trust_region.step(world, x, theta, trust_region.natural_gradient(world, x, theta), 0.01)
    visits = world.visits((x @ theta).softmax(1))
    found = (visits / visits.sum() * exact_kl(x @ theta, x @ new)).sum()
    assert float(found) == pytest.approx(0.01, rel=1e-6)


def test_along_the_natural_gradient_the_slope_of_the_kl_is_the_gradient() -> None:
    world = grid()
    x = trust_region.features(world)
    theta = torch.from_numpy(generator(0, "tests.learn.theta").standard_normal((3, 4)))
    old = (x @ theta).log_softmax(1)
    visits = world.visits(old.exp())
    new = (theta + 1e-5 * trust_region.natural_gradient(world, x, theta)).requires_grad_()
    kl = (visits / visits.sum() * (old.exp() * (old - (x @ new).log_softmax(1))).sum(1)).sum()
    (slope,) = torch.autograd.grad(kl, new)  # F d for a short step d
    start = theta.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(world.expected_return((x @ start).softmax(1)), start)
    assert (slope / 1e-5).flatten().tolist() == pytest.approx(gradient.flatten().tolist(), abs=2e-4)


def test_taking_a_critic_off_keeps_the_mean_of_the_gradient_and_lowers_its_variance() -> None:
    world = grid()
    batches, states = 400, len(world.start)
    critic = torch.cat([world.values(uniform(world)), torch.zeros(1)]).expand(batches, -1)
    logits = torch.zeros(batches, states, 4, dtype=torch.float64)
    policy = logits.softmax(-1).repeat_interleave(actor_critic.EPISODES, 0)
    e = world.draw(policy, steps=1000, rng=generator(0, "tests.learn.actor"))
    bare, held = (
        actor_critic.gradients(logits, e, actor_critic.weights_of(e, critic, world, lam)).flatten(1)
        for lam in (None, 1.0)
    )
    difference = bare - held
    scores = difference.mean(0) / (difference.std(0) / batches**0.5 + 1e-12)
    assert float(scores.abs().max()) < 4.5
    assert float(held.var(0).sum()) < 0.6 * float(bare.var(0).sum())


def test_the_committed_learning_curves_are_ordered_as_their_noise() -> None:
    figures = actor_critic.EXPERIMENT.figures
    of = [figures[name] for name in actor_critic.METHODS]
    assert of[0]["variance"] > of[1]["variance"] > of[2]["variance"]
    assert sum(of[0]["mean"]) < sum(of[1]["mean"]) < sum(of[2]["mean"])
    assert all(method["rate"] not in (actor_critic.RATES[0], actor_critic.RATES[-1]) for method in of)


def test_the_clip_holds_a_real_update_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(update_size, "EPOCHS", 12)
    world = grid()
    logits = update_size.half_trained(world)
    free, held = (update_size.one_update(world, logits, clip, seed=0) for clip in (None, 0.2))
    assert len(free["kl"]) == 12
    assert free["kl"][0] == pytest.approx(held["kl"][0], rel=0.2)  # the clip has nothing to cut yet
    assert free["kl"][-1] > 3 * held["kl"][-1]
    assert free["largest"][-1] > held["largest"][-1] > 1.2
    assert free["smallest"][-1] < held["smallest"][-1] < 0.8


def test_small_changes_are_small_and_ruin_right_answers() -> None:
    known, _ = orders(0, 240)
    for i, order in enumerate(known[:30]):
        rng = generator(i, "tests.learn.kitchen")
        prompt, answer = prompt_for(order, rng), answer_for(order, rng)
        assert gold_score(prompt, answer) == 1.0
        ruined = sft_is_not_enough.ruined_versions(prompt, answer)
        assert len(ruined) >= 5
        for version in ruined:
            assert gold_score(prompt, version) <= 0.5
            words, changed = answer.split(), version.split()
            added = " ".join(changed).count("do not")
            swapped = len(words) == len(changed) and sum(a != b for a, b in zip(words, changed, strict=True)) == 1
            left_out = len(changed) < len(words) and answer.count(".") - version.count(".") == 1
            assert added + swapped + left_out == 1


def test_the_judges_say_what_the_models_say(tmp_path: Path) -> None:
    tokenizer = new_tokenizer()
    model = new_model(tokenizer, 0)
    save_model(tmp_path / "sft" / "policy", model, tokenizer)
    reward, _ = load_reward_model(ModelSettings(path=str(tmp_path / "sft" / "policy")), seed=1)
    save_model(tmp_path / "reward" / "reward", reward, tokenizer)
    judges = sft_is_not_enough.Judges(tmp_path)
    prompt, answers = "make a soup with leek and carrot .", ["wash the leek .", "serve the soup and cut it ."]
    losses, scores = judges(prompt, answers)
    for answer, loss, score in zip(answers, losses.tolist(), scores.tolist(), strict=True):
        asked = tokenizer.encode(prompt)
        ids = torch.tensor([[*asked, *tokenizer.encode(answer, add_special_tokens=False), tokenizer.eos_token_id]])
        with torch.no_grad():
            logp = model(ids).logits.double().log_softmax(-1)[0, len(asked) - 1 : -1]
            expected = -logp.gather(1, ids[0, len(asked) :].unsqueeze(1)).sum()
            assert loss == pytest.approx(float(expected), abs=1e-3)
            assert score == pytest.approx(float(reward(ids).logits[0, 0]), abs=1e-4)
    found = sft_is_not_enough.judged(tmp_path, 2)
    assert len(found["wording"]) == 2
    assert all(gold <= 0.5 for gold in found["ruined_gold"])


def test_the_committed_kitchen_shows_what_its_page_says() -> None:
    figures = sft_is_not_enough.EXPERIMENT.figures
    wording, nearest = np.abs(figures["wording"]), np.abs(figures["nearest"])
    assert len(wording) == 240
    assert np.median(wording) > 2 * np.median(nearest)
    assert np.mean(figures["likelier"]) > 0.25
    assert figures["summary"] == pytest.approx(sft_is_not_enough.summary(figures), rel=1e-5)
    assert np.mean(figures["reward_prefers"]) > np.mean(figures["loss_prefers"])
    example = figures["example"]
    for name in example.keys() - {"prompt"}:
        judged = gold_score(example["prompt"], example[name]["answer"])
        assert judged == pytest.approx(example[name]["gold"], rel=1e-5)
