"""The reward model: one score per text, learnt from answers that somebody compared.

A sequence classifier with one output reads a prompt with its answer and scores the last token's hidden state. It is
trained so that better answers get higher scores: pairs by Bradley–Terry, K ranked answers by Plackett–Luce.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from bridle.core.losses import listwise_loss, pairwise_loss
from bridle.errors import ConfigError, ModelError, NonFiniteStep
from bridle.language.backbones import hidden_at
from bridle.language.comparisons import Comparison
from bridle.language.models import context_length
from bridle.learn.memory import MicroBudget, within_memory
from bridle.learn.optim import Optimiser
from bridle.learn.step import micro_batches
from bridle.random import permutation

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = [
    "LossSettings",
    "TrainingStep",
    "add_comparisons",
    "batch_of_step",
    "check_lengths",
    "check_score_head",
    "normalise_scores",
    "pair_accuracy",
    "score_sequences",
    "sequence_scores",
    "steps_per_epoch",
    "train_step",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What the scores are fitted to."""

    centering: float = 0.0
    """Weight of (chosen + rejected)², which keeps the scores of pairs around 0 (Eisenstein et al. 2023); >= 0."""
    micro_tokens: int | None = 16_384
    """Padded tokens of one forward pass at most; None takes the whole batch at once. Never changes the gradient."""

    def __post_init__(self) -> None:
        """Refuse values outside their ranges."""
        if not (math.isfinite(self.centering) and self.centering >= 0):
            raise ConfigError.of("centering", self.centering, "a finite number >= 0")
        if self.micro_tokens is not None and self.micro_tokens < 1:
            raise ConfigError.of("micro_tokens", self.micro_tokens, "a number of tokens >= 1")


# Scoring


def sequence_scores(model: PreTrainedModel, sequences: Sequence[Int[Tensor, " L"]]) -> Float[Tensor, " B"]:
    """Score each token sequence at its last token, in one right-padded forward pass, float32.

    The position comes from the lengths, so a sequence that ends in the pad token is still read at its end. A class
    without a head per token (BERT and its kind) pools by itself, from the attention mask.

    Raises:
        ValueError: a sequence has no token to be read at.
    """
    if not all(len(sequence) for sequence in sequences):
        raise ValueError("a sequence is empty: there is no last token to read its score at")
    hidden, head = _last_hidden(model, sequences)
    if head is None:
        return hidden[:, 0].float()
    with torch.autocast(model.device.type, enabled=False):  # bfloat16 would leave a score two or three digits
        return nn.functional.linear(hidden.float(), head.weight.float())[:, 0]


def _last_hidden(
    model: PreTrainedModel, sequences: Sequence[Int[Tensor, " L"]]
) -> tuple[Float[Tensor, "B D"], nn.Linear | None]:
    """Return the hidden state of each sequence's last token and the head for it, or the class's own scores and None."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=model.device)
    ids = pad_sequence(list(sequences), batch_first=True, padding_value=_filler(model)).to(model.device)
    head = _token_head(model)
    if head is None:
        mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
        return model(input_ids=ids, attention_mask=mask.long()).logits, None
    # A causal model never looks ahead to the padding; without a mask its attention takes the kernel that skips half.
    return hidden_at(model.base_model, ids, torch.arange(len(sequences), device=model.device), lengths - 1), head


def _filler(model: PreTrainedModel) -> int:
    pad = model.config.get_text_config().pad_token_id
    return 0 if pad is None else int(pad)


def _token_head(model: PreTrainedModel) -> nn.Linear | None:
    """Return the layer that scores one hidden state; every decoder's classifier in transformers calls it ``score``."""
    head = getattr(model, "score", None)
    return head if isinstance(head, nn.Linear) and head.bias is None else None


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel, sequences: Sequence[Int[Tensor, " L"]], *, micro_tokens: int | None = 16_384
) -> Float[Tensor, " B"]:
    """Score many sequences without gradients, batched by length; float32, on the CPU, in the order given."""
    scores = torch.empty(len(sequences))
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    for index in micro_batches(lengths, micro_tokens):
        if len(index) > 0:
            scores[index] = sequence_scores(model, [sequences[i] for i in index.tolist()]).cpu()
    return scores


@torch.no_grad()
def check_score_head(model: PreTrainedModel) -> None:
    """Refuse a class whose own score differs from :func:`sequence_scores`: it reads another token, or looks ahead.

    Raises :class:`ModelError`; asked once after loading, on three tokens that are not padding, beside a longer text.
    """
    ids = [token for token in range(model.config.get_text_config().vocab_size) if token != _filler(model)][:3]
    own = model(input_ids=torch.tensor([ids], device=model.device)).logits[0, 0].float()
    ours = sequence_scores(model, [torch.tensor(ids), torch.tensor(ids * 2)])[0]
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance):
        raise ModelError(
            f"{type(model).__name__} scores {ours:.6g} from the last token's hidden state but {own:.6g} by itself; "
            "this class is not supported as a reward model"
        )


def check_lengths(model: PreTrainedModel, sequences: Sequence[Int[Tensor, " L"]], remedy: str) -> None:
    """Refuse a sequence longer than the model's context; raises :class:`ModelError` with ``remedy``."""
    limit = context_length(model.config)
    longest = max((len(sequence) for sequence in sequences), default=0)
    if limit is not None and longest > limit:
        raise ModelError(f"a text of {longest} tokens exceeds the reward model's context of {limit}; {remedy}")


# Training


def steps_per_epoch(comparisons: int, batch_size: int) -> int:
    """Count the optimiser steps of one pass; the last one may hold fewer comparisons."""
    return math.ceil(comparisons / batch_size)


def batch_of_step(count: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """Return which of ``count`` comparisons step ``step`` (from 0) sees: each epoch has its keyed order, cut up."""
    epoch, place = divmod(step, steps_per_epoch(count, batch_size))
    order = permutation(count, seed, "reward-order", epoch)
    return [int(i) for i in order[place * batch_size : (place + 1) * batch_size]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingStep:
    """What one optimiser step saw, under the weights before it."""

    loss: float
    """Mean loss per comparison, nats."""
    accuracy: float
    """Mean over comparisons of the share of its pairs of answers in the right order; ties count half."""
    margin: float
    """Mean over comparisons of the mean score difference, better minus worse, over its pairs."""
    reward_mean: float
    """Mean score of all answers."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""


def train_step(
    model: PreTrainedModel,
    batch: Sequence[Comparison],
    optimiser: Optimiser,
    settings: LossSettings,
    *,
    budget: MicroBudget | None = None,
) -> TrainingStep:
    """Take one optimiser step on mean_p loss_p over the batch's comparisons.

    Pairs: −log σ(r_chosen − r_rejected − margin) + centering·(r_chosen + r_rejected)². K answers: Plackett–Luce, which
    for K = 2 is Bradley–Terry, so the two may be mixed if ``centering`` is 0. The sum is divided once, by the number
    of comparisons, so micro-batches do not change the gradient beyond rounding. ``budget`` stands in for
    ``settings.micro_tokens`` and shrinks where memory runs out.

    Raises:
        NonFiniteStep: the loss or the gradient is not finite; nothing was moved.
    """
    optimiser.zero_grad()
    try:
        total, parts = within_memory(
            budget or settings.micro_tokens,
            _costs(batch),
            lambda tokens: add_comparisons(model, batch, replace(settings, micro_tokens=tokens)),
            optimiser.zero_grad,
        )
    except NonFiniteStep:
        optimiser.zero_grad()
        raise
    norms = optimiser.step(torch.arange(len(batch)))
    return TrainingStep(
        loss=total,
        accuracy=sum(pair_accuracy(row) for row in parts) / len(parts),
        margin=sum(pair_margin(row) for row in parts) / len(parts),
        reward_mean=float(torch.cat(parts).mean()),
        grad_norm=math.sqrt(sum(norm**2 for norm in norms.values())),
    )


def add_comparisons(
    model: PreTrainedModel, batch: Sequence[Comparison], settings: LossSettings
) -> tuple[float, list[Float[Tensor, " K"]]]:
    """Add to the weights' gradients that of mean_p loss_p; return the loss and each comparison's scores.

    Raises:
        NonFiniteStep: the loss is not finite.
    """
    total, parts = 0.0, []
    for index in micro_batches(_costs(batch), settings.micro_tokens):
        members = [batch[i] for i in index.tolist()]
        scores, mask = _comparison_scores(model, members)
        loss = _losses(scores, mask, members, settings.centering).sum() / len(batch)
        if not bool(torch.isfinite(loss)):
            raise NonFiniteStep("the loss", tuple(range(len(batch))))
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        parts += [row[own].detach().cpu() for row, own in zip(scores, mask, strict=True)]
    return total, parts


def _costs(batch: Sequence[Comparison]) -> Int[Tensor, " P"]:
    """Padded tokens of each comparison's answers."""
    return torch.tensor([len(c.answers) * max(len(answer) for answer in c.answers) for c in batch])


def _comparison_scores(
    model: PreTrainedModel, batch: Sequence[Comparison]
) -> tuple[Float[Tensor, "P K"], Bool[Tensor, "P K"]]:
    flat = sequence_scores(model, [answer for comparison in batch for answer in comparison.answers])
    counts = [len(comparison.answers) for comparison in batch]
    scores = pad_sequence(list(torch.split(flat, counts)), batch_first=True)
    mask = torch.arange(max(counts), device=flat.device) < torch.tensor(counts, device=flat.device)[:, None]
    return scores, mask


def _losses(
    scores: Float[Tensor, "P K"], mask: Bool[Tensor, "P K"], batch: Sequence[Comparison], centering: float
) -> Float[Tensor, " P"]:
    if scores.shape[1] > 2:
        return listwise_loss(scores, mask=mask)
    margin = torch.tensor([comparison.margin for comparison in batch], device=scores.device)
    return pairwise_loss(scores[:, 0], scores[:, 1], margin=margin, centering=centering)


def pair_accuracy(scores: Float[Tensor, " K"] | Sequence[float]) -> float:
    """Share of the K(K−1)/2 pairs in which the earlier (better) of the answers scores higher; a tie counts half.

    2·accuracy − 1 is Kendall's τ_a between the scores and the ranking (Kendall 1938).
    """
    values = [float(score) for score in scores]
    wins = [(a > b) + 0.5 * (a == b) for i, a in enumerate(values) for b in values[i + 1 :]]
    return sum(wins) / len(wins)


def pair_margin(scores: Float[Tensor, " K"] | Sequence[float]) -> float:
    """Mean over the K(K−1)/2 pairs of the earlier (better) answer's score minus the later's."""
    values = [float(score) for score in scores]
    gaps = [a - b for i, a in enumerate(values) for b in values[i + 1 :]]
    return sum(gaps) / len(gaps)


# Normalising


@dataclass(frozen=True, slots=True, kw_only=True)
class Normalisation:
    """What :func:`normalise_scores` found, and what folding it into the head left behind."""

    mean: float
    """Mean score of the given texts before, in units of score."""
    deviation: float
    """Their population standard deviation before."""
    residual: float
    """Root mean square, in units of the new score, of the part of the mean that no bias-free head can take out."""


@torch.no_grad()
def normalise_scores(
    model: PreTrainedModel, sequences: Sequence[Int[Tensor, " L"]], *, micro_tokens: int | None = 16_384
) -> Normalisation:
    """Rescale the head so that the scores of ``sequences`` have mean 0 and population deviation 1.

    These classes have no bias in their head, and a constant kept beside the weights would be lost on whoever opens the
    folder elsewhere; so the head takes the constant from the hidden states h_i themselves. With
    u = argmin Σ_i (1 − u·h_i)² + ridge‖u‖², the direction along which they are most nearly 1, and ū = mean_i u·h_i,

        w' = (w − (μ/ū) u) / σ',     σ' the deviation of (w − (μ/ū) u)·h_i.

    Mean and deviation are then exact; the scores' differences move by what ``residual`` says (0 behind a LayerNorm,
    whose outputs lie in a hyperplane). Texts of one score only keep their deviation of 0.

    Raises:
        ModelError: the class has no linear head per token, or its scores are not finite.
    """
    head = _token_head(model)
    if head is None:
        raise ModelError(f"{type(model).__name__} has no linear head to fold a scale into; leave normalise off")
    count = len(sequences)
    width = head.in_features
    total, gram = torch.zeros(width, dtype=torch.float64), torch.zeros(width, width, dtype=torch.float64)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    for index in micro_batches(lengths, micro_tokens):
        hidden, _ = _last_hidden(model, [sequences[i] for i in index.tolist()])
        hidden = hidden.double().cpu()
        total += hidden.sum(dim=0)
        gram += hidden.T @ hidden
    centre = total / count
    covariance = gram / count - centre.outer(centre)
    weight = head.weight[0].double().cpu()
    mean, deviation = float(weight @ centre), math.sqrt(max(float(weight @ covariance @ weight), 0.0))
    if not math.isfinite(mean + deviation):
        raise ModelError(
            "the reward model's scores are not finite, so they cannot be normalised; lower the learning rate"
        )
    ridge = 1e-6 * float(gram.diagonal().mean()) * torch.eye(width, dtype=torch.float64)
    constant = torch.linalg.solve(gram + ridge, total)
    constant /= constant @ centre
    changed = weight - mean * constant
    scale = math.sqrt(max(float(changed @ covariance @ changed), 0.0)) or 1.0
    head.weight.copy_((changed / scale)[None].to(head.weight))
    spread = math.sqrt(max(float(constant @ covariance @ constant), 0.0))
    return Normalisation(mean=mean, deviation=deviation, residual=abs(mean) * spread / scale)
