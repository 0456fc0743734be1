from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from bridle.errors import ModelError, NonFiniteStep
from bridle.language.comparisons import Comparison
from bridle.language.reward_evaluation import (
    Interval,
    folds,
    held_out,
    judge_quality,
    length_rule,
    mean_interval,
    wilson_interval,
)
from bridle.language.reward_model import (
    LossSettings,
    batch_of_step,
    check_lengths,
    check_score_head,
    normalise_scores,
    pair_accuracy,
    pair_margin,
    score_sequences,
    sequence_scores,
    steps_per_epoch,
    train_step,
)
from bridle.learn.optim import Group, Optimiser, OptimSettings
from bridle.random import torch_rng

PAD = 0
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=1, pad_token_id=PAD,
    ),
    "gpt2": GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=1, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=2,
    ),
    "bert": BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, num_labels=1, pad_token_id=PAD,
    ),
}  # fmt: skip


def reward_model(family: str = "llama", scale: float = 30.0) -> PreTrainedModel:
    with torch_rng(3, "test-reward-model"):
        model = AutoModelForSequenceClassification.from_config(CONFIGS[family])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(("score", "classifier")):
                parameter.mul_(scale)
            elif parameter.ndim == 2:
                parameter.mul_(5)  # at the families' own initial scale all texts score nearly the same
    return model.eval()


def sequences(count: int, *, longest: int = 12) -> list[Tensor]:
    with torch_rng(5, "test-sequences"):
        return [torch.randint(3, 40, (2 + (7 * i) % (longest - 1),)) for i in range(count)]


def alone(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    """The class's own score, as anybody would ask for it: one text, no padding."""
    return model(input_ids=sequence[None]).logits[0, 0]


def unpadded(model: PreTrainedModel, texts: list[Tensor]) -> Tensor:
    """The class's own scores, texts of one length at a time, so that nothing is padded."""
    scores = torch.empty(len(texts))
    for length in {len(text) for text in texts}:
        same = [i for i, text in enumerate(texts) if len(text) == length]
        scores[same] = model(input_ids=torch.stack([texts[i] for i in same])).logits[:, 0]
    return scores


# Scoring


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_padded_scores_are_the_classs_own(family: str) -> None:
    model, texts = reward_model(family), sequences(9)
    expected = torch.stack([alone(model, text) for text in texts])
    assert expected.std() > 0.05
    torch.testing.assert_close(sequence_scores(model, texts), expected, rtol=1e-4, atol=1e-5)
    check_score_head(model)


@torch.no_grad()
def test_a_text_that_ends_in_the_pad_token_is_read_at_its_end() -> None:
    model = reward_model()
    text = torch.tensor([5, 9, 7, PAD])
    hidden = model.model(input_ids=text[None]).last_hidden_state[0, -1]
    expected = model.score(hidden)[0]
    scores = sequence_scores(model, [text, torch.tensor([5, 9, 7, 8, 11, 12])])
    torch.testing.assert_close(scores[0], expected, rtol=1e-4, atol=1e-5)
    assert abs(scores[0] - alone(model, text)) > 1e-3  # the class itself reads one token too early


@torch.no_grad()
def test_scores_do_not_depend_on_the_cut_into_batches() -> None:
    model, texts = reward_model(), sequences(17)
    expected = score_sequences(model, texts, micro_tokens=None)
    torch.testing.assert_close(score_sequences(model, texts, micro_tokens=20), expected, rtol=1e-5, atol=1e-5)
    assert score_sequences(model, []).shape == (0,)


def test_a_class_that_does_more_than_its_head_says_is_refused() -> None:
    class Shifted(LlamaForSequenceClassification):
        def forward(self, *args: object, **kwargs: object) -> SequenceClassifierOutputWithPast:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 1
            return output

    with torch_rng(0, "test"):
        model = Shifted(CONFIGS["llama"]).eval()
    with pytest.raises(ModelError, match=r"Shifted scores .* from the last token's hidden state but .* by itself"):
        check_score_head(model)


def test_a_text_beyond_the_context_is_refused() -> None:
    check_lengths(reward_model(), [torch.ones(32, dtype=torch.int64)], "shorten it")
    with pytest.raises(ModelError, match="a text of 33 tokens exceeds the reward model's context of 32; shorten it"):
        check_lengths(reward_model(), [torch.ones(33, dtype=torch.int64)], "shorten it")


# The loss and its step


def pairs(count: int, *, margin: float = 0.0) -> list[Comparison]:
    texts = sequences(2 * count)
    return [
        Comparison(answers=(texts[2 * i], texts[2 * i + 1]), lengths=(3, 4), margin=margin * i) for i in range(count)
    ]


def rankings(counts: list[int]) -> list[Comparison]:
    texts = iter(sequences(sum(counts)))
    return [Comparison(answers=tuple(itertools.islice(texts, k)), lengths=tuple(range(k))) for k in counts]


def sgd_like(model: PreTrainedModel) -> Optimiser:
    settings = OptimSettings(lr=0.0, max_grad_norm=None)
    return Optimiser(
        [Group(name="reward", parameters=dict(model.named_parameters()), settings=settings)], total_steps=9
    )


def gradient_norm(model: PreTrainedModel, loss: Tensor) -> float:
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return math.sqrt(sum(float((g.double() ** 2).sum()) for g in gradients if g is not None))


@pytest.mark.parametrize("micro_tokens", [None, 30])
def test_a_step_on_pairs_is_bradley_terry_divided_once(micro_tokens: int | None) -> None:
    model, batch = reward_model(), pairs(5, margin=0.25)
    losses, margins = [], []
    for i, comparison in enumerate(batch):
        better, worse = (alone(model, answer) for answer in comparison.answers)
        gap = better - worse - 0.25 * i
        losses.append(torch.log1p(torch.exp(-gap)) + 0.1 * (better + worse) ** 2)
        margins.append(float((better - worse).detach()))
    expected = sum(losses) / 5
    step = train_step(model, batch, sgd_like(model), LossSettings(centering=0.1, micro_tokens=micro_tokens))
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert step.grad_norm == pytest.approx(gradient_norm(model, expected), rel=1e-4)
    assert step.margin == pytest.approx(sum(margins) / 5, rel=1e-4)
    assert step.accuracy == sum(m > 0 for m in margins) / 5


@pytest.mark.parametrize("micro_tokens", [None, 30])
def test_a_step_on_rankings_is_plackett_luce_divided_once(micro_tokens: int | None) -> None:
    model, batch = reward_model(), rankings([4, 2, 3])
    losses, shares = [], []
    for comparison in batch:
        scores = [alone(model, answer) for answer in comparison.answers]
        # the probability that picking without replacement by exp(score) gives this order
        chances = [torch.exp(s) / sum(torch.exp(other) for other in scores[i:]) for i, s in enumerate(scores)]
        losses.append(-sum(torch.log(chance) for chance in chances))
        ordered = [a > b for a, b in itertools.combinations([float(s.detach()) for s in scores], 2)]
        shares.append(sum(ordered) / len(ordered))
    expected = sum(losses) / 3
    step = train_step(model, batch, sgd_like(model), LossSettings(micro_tokens=micro_tokens))
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    assert step.grad_norm == pytest.approx(gradient_norm(model, expected), rel=1e-4)
    assert step.accuracy == pytest.approx(sum(shares) / 3)


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    model = reward_model()
    with torch.no_grad():
        model.score.weight[0, 0] = math.nan
    before = model.model.embed_tokens.weight.clone()
    with pytest.raises(NonFiniteStep, match="the loss"):
        train_step(model, pairs(2), sgd_like(model), LossSettings())
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_a_text_without_a_token_has_no_score() -> None:
    with pytest.raises(ValueError, match="a sequence is empty"):
        sequence_scores(reward_model(), [torch.tensor([3, 4]), torch.zeros(0, dtype=torch.int64)])


def test_every_epoch_sees_every_comparison_once_in_its_own_order() -> None:
    assert steps_per_epoch(10, 4) == 3
    epochs = [[i for s in range(3) for i in batch_of_step(10, 4, seed=1, step=3 * e + s)] for e in range(2)]
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert epochs[0] != epochs[1]
    assert [len(batch_of_step(10, 4, seed=1, step=s)) for s in range(6)] == [4, 4, 2, 4, 4, 2]
    assert batch_of_step(10, 4, seed=1, step=4) == epochs[1][4:8]
    assert batch_of_step(10, 4, seed=2, step=4) != epochs[1][4:8]


def test_pair_accuracy_and_margin_by_hand() -> None:
    assert pair_accuracy([3.0, 2.0, 1.0]) == 1.0
    assert pair_accuracy([1.0, 2.0, 3.0]) == 0.0
    assert pair_accuracy([2.0, 3.0, 1.0]) == pytest.approx(2 / 3)
    assert pair_accuracy([1.0, 1.0]) == 0.5
    assert pair_margin([4.0, 1.0, 3.0]) == pytest.approx((3 + 1 - 2) / 3)


def test_a_comparison_refuses_what_cannot_be_compared() -> None:
    text = torch.tensor([1, 2])
    with pytest.raises(ValueError, match="K >= 2"):
        Comparison(answers=(text,), lengths=(1,))
    with pytest.raises(ValueError, match="without tokens"):
        Comparison(answers=(text, text[:0]), lengths=(1, 0))
    with pytest.raises(ValueError, match="pairs only"):
        Comparison(answers=(text, text, text), lengths=(1, 1, 1), margin=0.5)


# Normalising


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_normalised_scores_have_mean_0_and_deviation_1_by_the_class_itself(family: str) -> None:
    model, texts = reward_model(family), sequences(60)
    before = unpadded(model, texts)
    found = normalise_scores(model, texts, micro_tokens=50)
    after = unpadded(model, texts)
    assert found.mean == pytest.approx(float(before.mean()), abs=1e-4)
    assert found.deviation == pytest.approx(float(before.std(correction=0)), rel=1e-4)
    assert float(after.mean()) == pytest.approx(0, abs=1e-4)
    assert float(after.std(correction=0)) == pytest.approx(1, abs=1e-4)
    wanted = (before - before.mean()) / before.std(correction=0)
    # what is left is what the record says, up to the change of scale that it brings with it
    assert float((after - wanted).pow(2).mean().sqrt()) <= found.residual * 1.5 + 1e-3


@torch.no_grad()
def test_behind_a_layer_norm_normalising_changes_no_difference() -> None:
    model, texts = reward_model("gpt2"), sequences(60)
    with torch.no_grad():  # Σ_i β_i/γ_i must not vanish for a constant direction to exist
        model.transformer.ln_f.bias.fill_(0.3)
    before = unpadded(model, texts)
    found = normalise_scores(model, texts)
    after = unpadded(model, texts)
    assert found.residual < 1e-2
    torch.testing.assert_close(after, (before - before.mean()) / before.std(correction=0), rtol=1e-2, atol=1e-2)


def test_a_class_without_a_linear_head_is_not_normalised() -> None:
    with pytest.raises(ModelError, match="no linear head"):
        normalise_scores(reward_model("bert"), sequences(3))


# Evaluating


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    # Newcombe 1998, table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals_as_published(successes: int, count: int, low: float, high: float) -> None:
    interval = wilson_interval(successes / count, count)
    assert interval.low == pytest.approx(low, abs=5e-5)
    assert interval.high == pytest.approx(high, abs=5e-5)


def test_mean_interval_by_hand() -> None:
    assert mean_interval([1.0, 2.0, 3.0]) == Interval(
        low=pytest.approx(2 - 1.959964 / math.sqrt(3), abs=1e-6),
        high=pytest.approx(2 + 1.959964 / math.sqrt(3), abs=1e-6),
    )


def test_quality_is_held_against_the_length_rule_of_the_training_set() -> None:
    def pair(better: int, worse: int) -> Comparison:
        return Comparison(answers=(torch.tensor([1]), torch.tensor([2])), lengths=(better, worse))

    assert length_rule([pair(1, 2), pair(1, 2), pair(2, 1)]) == -1.0
    assert length_rule([pair(2, 1), pair(2, 1), pair(1, 2)]) == 1.0
    judged = [pair(1, 2), pair(2, 1), pair(3, 3), pair(1, 5)]
    quality = judge_quality(judged, [[1.0, 0.0], [2.0, -1.0], [0.0, 1.0], [1.0, 1.0]], [-1.0] * 4)
    assert quality.accuracy == (1 + 1 + 0 + 0.5) / 4
    assert quality.length_accuracy == (1 + 0 + 0.5 + 1) / 4
    assert quality.margin == (1 + 3 - 1 + 0) / 4
    assert quality.advantage == pytest.approx(quality.accuracy - quality.length_accuracy)
    assert quality.advantage_interval == mean_interval([0.0, 1.0, -0.5, -0.5])
    assert quality.accuracy_interval == wilson_interval(quality.accuracy, 4)


def test_folds_hold_everything_out_once_and_keep_prompts_together() -> None:
    groups = [0, 1, 1, 2, 3, 4, 4, 4, 5, 6]
    cut = folds(groups, 3, seed=4)
    assert sorted(i for _, away in cut for i in away) == list(range(10))
    for training, away in cut:
        assert sorted(training + away) == list(range(10))
        assert not {groups[i] for i in training} & {groups[i] for i in away}
    assert folds(groups, 3, seed=5) != cut


def test_holding_out_keeps_prompts_together() -> None:
    groups = [0, 0, 1, 2, 3, 3, 4, 5, 6, 7]
    training, away = held_out(groups, 0.25, seed=1)
    assert len({groups[i] for i in away}) == 2
    assert sorted(training + away) == list(range(10))
    assert not {groups[i] for i in training} & {groups[i] for i in away}
