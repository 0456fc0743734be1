"""From judged answers to a batch: where the score lands, what a cut means, whose log-probs are old."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bridle.core.moments import Moments
from bridle.errors import ConfigError, NonFiniteStep, SamplerMismatch
from bridle.language.causal import CausalModel
from bridle.language.collect import Episode, PromptTokens, collect, prompts_of_step
from bridle.language.policy import LanguagePolicy, critic_from_actor, value_head
from bridle.language.prepare import look, prepare, read_reference, read_values
from bridle.language.sampler import ReferenceSampler, Sampler, SamplingSettings, Stop
from bridle.language.sampler.serving import embedded_sampler
from bridle.language.scorers import Answers, Scores
from bridle.language.segments import Segments, layout, pad_flat
from bridle.language.shaping import KLSettings, ShapingSettings, score_rewards, token_rewards
from bridle.learn.advantages import AdvantageSettings
from tests.language.tiny import tiny_model

STOP = 2


class CountsThrees:
    """A judge for tests: the share of token 3."""

    name = "threes"

    def __call__(self, answers: Answers) -> Scores:
        scores = [float((ids == 3).float().mean()) for ids in answers.completion_ids]
        return Scores(total=scores, components={self.name: scores})


def make_policy(critic: str = "own") -> tuple[LanguagePolicy, CausalModel]:
    actor = CausalModel(tiny_model("llama"))
    reference = copy.deepcopy(actor).requires_grad_(False)
    head = critic_from_actor(actor.model) if critic == "own" else value_head(actor.width)
    with torch.no_grad():
        (head.head if critic == "own" else head).weight.copy_(torch.linspace(-0.1, 0.1, actor.width)[None])
    return LanguagePolicy(actor, head, temperature=0.9, reference=reference).eval(), reference


def rollout(policy: LanguagePolicy, limit: int = 10, k: int = 2, sampler: Sampler | None = None) -> list[Episode]:
    prompts = [PromptTokens(ids=torch.arange(3, 5 + n), text=f"p{n}", columns={"n": n}) for n in range(6)]
    sampler = sampler or ReferenceSampler(policy.actor.model, [STOP])
    settings = SamplingSettings(max_new_tokens=limit, temperature=0.9)
    return collect(
        sampler,
        CountsThrees(),
        lambda ids: " ".join(map(str, ids.tolist())),
        prompts,
        settings,
        answers_per_prompt=k,
        seed=0,
        stream="rollout",
        step=1,
    )


def prepared(policy: LanguagePolicy, reference: CausalModel, episodes: list[Episode], **changes: object) -> object:
    options = {
        "shaping": ShapingSettings(),
        "kl": KLSettings(where="reward"),
        "kl_coefficient": 0.1,
        "advantage": AdvantageSettings(gamma=1.0, lam=0.95),
        "micro_batch_tokens": None,
    }
    return prepare(episodes, policy, reference, Moments.empty(), **{**options, **changes})


def test_segments_find_the_actions_and_the_states_that_chose_them() -> None:
    segments = Segments.of([torch.tensor([7, 8]), torch.tensor([9])], [torch.tensor([1]), torch.tensor([2, 3, 4])])
    place = layout(segments, torch.device("cpu"))
    assert place.input_ids.tolist() == [[7, 8, 1, 0], [9, 2, 3, 4]]
    assert place.rows.tolist() == [0, 1, 1, 1]
    assert place.columns.tolist() == [1, 0, 1, 2]
    assert place.targets.tolist() == [1, 2, 3, 4]
    assert place.last.tolist() == [2, 3]
    assert segments.sizes.tolist() == [1, 3]
    with pytest.raises(ValueError, match="answer of no token"):
        Segments.of([torch.tensor([1])], [torch.tensor([], dtype=torch.int64)])


def test_the_score_sits_on_the_last_action_and_the_sum_is_score_minus_leash() -> None:
    flat = torch.tensor([-1.0, -2.0, -0.5, -1.5, -3.0])
    old, mask = pad_flat(flat, torch.tensor([2, 3]))
    ref, _ = pad_flat(flat - torch.tensor([0.1, -0.2, 0.3, 0.0, 0.5]), torch.tensor([2, 3]))
    rewards = token_rewards(torch.tensor([10.0, 20.0]), old, ref, mask, 0.5)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 10.1, 0.0], [-0.15, 0.0, 19.75]]), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("critic", ["own", "trunk"])
def test_reading_is_that_of_plain_forwards(critic: str) -> None:
    """Log-probs, values and the value after the end against one unpadded forward per answer; in any micro-batches."""
    policy, reference = make_policy(critic)
    episodes = rollout(policy)
    assert {e.stop for e in episodes} == {Stop.EOS, Stop.LENGTH}
    segments = Segments.of([e.prompt.ids for e in episodes], [e.ids for e in episodes])
    everyone = torch.arange(len(segments))
    seen, value, last_value = (
        look(policy, reference, segments, everyone, budget=None),
        *read_values(policy, segments, budget=None),
    )
    ref_logp, _ = read_reference(policy, reference, segments, budget=None, logp=True, features=False)
    cut = look(policy, reference, segments, everyone, budget=20)
    for name in ("logp", "entropy", "ref_logp", "exact_kl"):
        torch.testing.assert_close(getattr(cut, name), getattr(seen, name), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(seen.ref_logp, ref_logp, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(read_values(policy, segments, budget=20)[0], value, atol=2e-6, rtol=1e-5)
    again, features = read_reference(policy, reference, segments, budget=20, logp=True, features=True)
    torch.testing.assert_close(again, ref_logp, atol=2e-6, rtol=1e-5)
    assert [len(one) for one in features] == segments.sizes.tolist()
    torch.testing.assert_close(seen.exact_kl, torch.zeros_like(seen.exact_kl), atol=1e-6, rtol=0)
    start = 0
    for u, e in enumerate(episodes):
        stop, p = start + len(e.ids), len(e.prompt.ids)
        ids = torch.cat([e.prompt.ids, e.ids])[None]
        with torch.no_grad():
            logits = policy.actor.model(ids).logits[0] / 0.9
            trunk = policy.critic.backbone if critic == "own" else policy.actor.model.base_model
            head = policy.critic.head if critic == "own" else policy.critic
            values = head(trunk(ids).last_hidden_state)[0, :, 0]
        logp = torch.log_softmax(logits, -1)[p - 1 : -1].gather(1, e.ids[:, None])[:, 0]
        torch.testing.assert_close(seen.logp[start:stop], logp, atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(value[start:stop], values[p - 1 : -1], atol=2e-6, rtol=1e-5)
        torch.testing.assert_close(last_value[u], values[-1], atol=2e-6, rtol=1e-5)
        start = stop


def test_first_forward_agrees_with_the_sampler() -> None:
    policy, reference = make_policy()
    found = prepared(policy, reference, rollout(policy))
    assert float(found.gap.mean) < 1e-5
    assert float(found.gap.maximum) < 1e-4
    assert not found.recomputed
    assert torch.equal(found.batch.old_logp, torch.cat([e.sampler_logp for e in rollout(policy)]))


def test_a_share_of_the_answers_is_looked_at_and_their_columns_are_those_of_a_look_at_all() -> None:
    policy, reference = make_policy()
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(1.1)
    episodes = rollout(policy, k=5)
    some = prepared(policy, reference, episodes, kl=KLSettings(exact_share=0.4)).look
    every = prepared(policy, reference, episodes, kl=KLSettings(exact_share=1.0)).look
    assert some.units.tolist() == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22, 25, 27]
    assert every.units.tolist() == list(range(30))
    for name in ("logp", "entropy", "ref_logp", "exact_kl"):
        whole = getattr(every, name)[some.actions]
        torch.testing.assert_close(getattr(some, name), whole, atol=2e-6, rtol=1e-5)
    sizes = torch.tensor([len(e.ids) for e in episodes])
    per_answer = every.per_answer("exact_kl", sizes)[some.units]
    torch.testing.assert_close(some.per_answer("exact_kl", sizes), per_answer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("on_length", ["score", "bootstrap"])
def test_the_samplers_values_serve_where_it_has_them(on_length: str) -> None:
    """With the critic on the actor's trunk the engine hands over V(s_t); batches are those of reading the values anew."""
    policy, reference = make_policy("trunk")
    engine = embedded_sampler(policy.actor, [STOP], value_head=policy.critic)
    episodes = rollout(policy, sampler=engine)
    assert all(e.values is not None for e in episodes)
    shaping = ShapingSettings(on_length=on_length)
    with pytest.MonkeyPatch.context() as patch:
        asked = []
        read = policy.values
        patch.setattr(policy, "values", lambda part: asked.append(part) or read(part))
        kept = prepared(policy, reference, episodes, shaping=shaping)
    cut = sum(e.stop is Stop.LENGTH for e in episodes)
    assert cut > 0
    assert sum(len(part) for part in asked) == (cut if on_length == "bootstrap" else 0)
    anew = prepared(policy, reference, [replace(e, values=None) for e in episodes], shaping=shaping)
    for name in ("old_value", "advantages", "returns"):
        torch.testing.assert_close(getattr(kept.batch, name), getattr(anew.batch, name), atol=1e-5, rtol=1e-5)


def test_the_reference_is_asked_for_what_the_leash_reads() -> None:
    policy, reference = make_policy()
    episodes = rollout(policy)
    for kl, coefficient, ids, features in [
        (KLSettings(where="reward"), 0.1, True, False),
        (KLSettings(where="reward"), 0.0, False, False),
        (KLSettings(where="none"), 0.0, False, False),
        (KLSettings(where="loss", estimator="k3"), 0.1, True, False),
        (KLSettings(where="loss", estimator="exact"), 0.1, False, True),
        (KLSettings(where="loss"), 0.1, False, True),
        (KLSettings(where="none", estimator="exact"), 0.0, False, False),
    ]:
        batch = prepared(policy, reference, episodes, kl=kl, kl_coefficient=coefficient).batch
        assert (batch.ref_logp is not None) == ids
        assert (batch.units.ref_features is not None) == features


@pytest.mark.parametrize("fused", [True, False])
def test_a_look_tells_the_references_own_log_probs(fused: bool) -> None:
    policy, reference = make_policy()
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(1.5)
    if not fused:
        policy.actor.form = reference.form = None
    episodes = rollout(policy)
    segments = Segments.of([e.prompt.ids for e in episodes], [e.ids for e in episodes])
    seen = look(policy, reference, segments, torch.arange(len(segments)), budget=None)
    expected, _ = read_reference(policy, reference, segments, budget=None, logp=True, features=False)
    torch.testing.assert_close(seen.ref_logp, expected, atol=2e-6, rtol=1e-5)
    assert (seen.ref_logp - seen.logp).abs().mean() > 0.01


def test_a_look_at_all_answers_reads_the_reference_for_the_leash_too(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference = make_policy()
    with torch.no_grad():
        reference.model.lm_head.weight.mul_(1.1)
    episodes, rows = rollout(policy, k=5), []
    read = reference.states
    monkeypatch.setattr(reference, "states", lambda ids, *given: rows.append(len(ids)) or read(ids, *given))
    kl = KLSettings(where="reward", exact_share=0.4)
    some = prepared(policy, reference, episodes, kl=kl, kl_coefficient=0.1).batch
    assert sum(rows) == 12 + 30
    every = prepared(policy, reference, episodes, kl=replace(kl, exact_share=1.0), kl_coefficient=0.1).batch
    assert sum(rows) == 12 + 30 + 30
    assert some.ref_logp is not None
    assert every.ref_logp is not None
    torch.testing.assert_close(every.ref_logp, some.ref_logp, atol=2e-6, rtol=1e-5)


def test_another_policy_than_the_sampler_is_noticed() -> None:
    policy, reference = make_policy()
    episodes = rollout(policy)
    with torch.no_grad():
        policy.actor.model.lm_head.weight.mul_(1.002)
    found = prepared(policy, reference, episodes)
    assert found.recomputed
    assert not torch.equal(found.batch.old_logp, torch.cat([e.sampler_logp for e in episodes]))
    with torch.no_grad():
        policy.actor.model.lm_head.weight.mul_(1.5)
    with pytest.raises(SamplerMismatch, match="nats per token"):
        prepared(policy, reference, episodes)


def test_the_plain_path_asks_the_reference_again_instead_of_keeping_its_logits() -> None:
    """The exact KL of the loss is the same with and without kept features, and no [N, V] logits of a rollout are kept."""
    policy, reference = make_policy()
    episodes = rollout(policy)
    with torch.no_grad():
        policy.actor.model.lm_head.weight.mul_(1.001)
    leash = KLSettings(where="loss", estimator="exact")
    fused = prepared(policy, reference, episodes, kl=leash)
    kept = policy(fused.batch.units).exact_kl
    policy.actor.form = reference.form = None
    policy._leashed = True
    plain = prepared(policy, reference, episodes, kl=leash)
    assert plain.batch.units.ref_features is None
    assert kept.max() > 0
    torch.testing.assert_close(policy(plain.batch.units).exact_kl, kept, atol=1e-5, rtol=1e-3)


def test_log_probs_that_are_not_numbers_stop_the_run() -> None:
    policy, reference = make_policy()
    episodes = rollout(policy)
    with torch.no_grad():
        policy.actor.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteStep, match="the policy's log-probability"):
        prepared(policy, reference, episodes)


def test_cut_answers_are_scored_or_bootstrapped_never_both() -> None:
    """γ = λ = 1, no leash: the return of every action is the score, or the value after the last token."""
    policy, reference = make_policy()
    episodes = rollout(policy)
    exact = AdvantageSettings(gamma=1.0, lam=1.0)
    for on_length in ("score", "bootstrap"):
        found = prepared(
            policy,
            reference,
            episodes,
            kl_coefficient=0.0,
            advantage=exact,
            shaping=ShapingSettings(on_length=on_length),
        )
        start = 0
        for u, e in enumerate(episodes):
            returns = found.batch.returns[start : start + len(e.ids)]
            cut = e.stop is Stop.LENGTH and on_length == "bootstrap"
            expected = found.last_value[u] if cut else torch.tensor(e.score)
            torch.testing.assert_close(returns, expected.expand(len(e.ids)), atol=1e-5, rtol=1e-5)
            start += len(e.ids)


def test_value_of_always_cut_scored_episodes_stays_bounded() -> None:
    """γ = 1 and every row cut: targets are the scores however large the critic already is; the next one cannot grow."""
    policy, reference = make_policy()
    episodes = rollout(policy, limit=1)
    episodes = [e for e in episodes if e.stop is Stop.LENGTH]
    with torch.no_grad():
        policy.critic.head.bias.fill_(1e4)
    found = prepared(policy, reference, episodes, kl_coefficient=0.0)
    torch.testing.assert_close(found.batch.returns, torch.tensor([e.score for e in episodes]), atol=1e-2, rtol=0)


def test_shaping_in_its_order() -> None:
    stops = [Stop.EOS, Stop.LENGTH, Stop.EOS, Stop.LENGTH]
    shape, cut, moments = score_rewards(
        [1.0, 2.0, 3.0, 10.0], stops, ShapingSettings(missing_eos_penalty=1.0, clip=4.0), Moments.empty()
    )
    assert shape.tolist() == [1.0, 1.0, 3.0, 4.0]
    assert not cut.any()
    assert float(moments.mean) == pytest.approx((1 + 1 + 3 + 9) / 4)
    scaled, _, later = score_rewards([2.0, 4.0], stops[:1] * 2, ShapingSettings(scale=True), Moments.empty())
    torch.testing.assert_close(scaled, torch.tensor([2.0, 4.0]))
    again, _, _ = score_rewards([6.0, 8.0], stops[:1] * 2, ShapingSettings(scale=True), later)
    torch.testing.assert_close(again, torch.tensor([6.0, 8.0]) / torch.tensor(5.0).sqrt())


@given(st.lists(st.tuples(st.floats(-100, 100), st.booleans()), min_size=1, max_size=20))
def test_bootstrapped_answers_count_in_no_statistic(rows: list[tuple[float, bool]]) -> None:
    scores = [s for s, _ in rows]
    stops = [Stop.LENGTH if cut else Stop.EOS for _, cut in rows]
    settings = ShapingSettings(on_length="bootstrap", whiten=True)
    shaped, cut, moments = score_rewards(scores, stops, settings, Moments.empty())
    kept = [s for s, stop in zip(scores, stops, strict=True) if stop is Stop.EOS]
    alone, _, _ = score_rewards(kept, [Stop.EOS] * len(kept), settings, Moments.empty())
    torch.testing.assert_close(shaped[~cut], alone)
    assert not shaped[cut].any()
    assert float(moments.count) == len(kept)


def test_prompts_come_in_keyed_epochs_and_none_is_skipped() -> None:
    seen = [i for step in range(10) for i in prompts_of_step(7, 5, seed=3, step=step)]
    for epoch in range(7):
        assert sorted(seen[7 * epoch : 7 * epoch + 7]) == list(range(7))
    assert prompts_of_step(7, 5, seed=3, step=4) == seen[20:25]
    assert seen[:7] != seen[7:14]


@pytest.mark.parametrize(
    ("settings", "bad"),
    [
        (KLSettings, {"where": "loss", "estimator": "k1"}),
        (KLSettings, {"where": "reward", "estimator": "k3"}),
        (KLSettings, {"coefficient": -0.1}),
        (KLSettings, {"target": 5.0, "coefficient": 0.0}),
        (ShapingSettings, {"on_length": "bootstrap", "missing_eos_penalty": 1.0}),
        (ShapingSettings, {"missing_eos_penalty": -1.0}),
        (ShapingSettings, {"clip": 0.0}),
    ],
)
def test_combinations_that_cannot_work_are_refused(settings: type, bad: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        settings(**bad)
