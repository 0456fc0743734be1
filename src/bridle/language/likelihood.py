"""Supervised fine-tuning: one optimiser step on demonstrations, and the likelihood of those held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bridle.core.head import HeadSlopes
from bridle.core.losses import sft_loss
from bridle.errors import NonFiniteStep
from bridle.language.causal import CausalModel
from bridle.language.data import Encoded, collate
from bridle.learn.memory import MicroBudget, within_memory
from bridle.learn.optim import Optimiser
from bridle.learn.step import micro_batches
from bridle.random import permutation

__all__ = ["HeldOut", "LikelihoodStep", "add_likelihood", "batch_of_step", "held_out_loss", "likelihood_step"]

Computing = Callable[[], AbstractContextManager[object]]
"""Sets the compute dtype for a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LikelihoodStep:
    """What one optimiser step saw, under the weights before it."""

    loss: float
    """Mean of −log π over the target tokens of the whole batch, nats per token."""
    target_tokens: int
    """Tokens that were learnt."""
    tokens: int
    """Tokens that were read, prompts included, padding not."""
    grad_norm: float
    """L2 norm of the gradient before clipping."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """How likely the model finds demonstrations it was not shown."""

    loss: float
    """Mean of −log π over their target tokens, nats per token."""
    target_tokens: int
    """How many there are."""

    @property
    def perplexity(self) -> float:
        """e^loss, the number of equally likely tokens it is as unsure as; infinite beyond the range of a float."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


def batch_of_step(count: int, batch_size: int, *, seed: int, step: int) -> list[int]:
    """Return which of ``count`` demonstrations step ``step`` (from 0) learns: each epoch has its keyed order, cut up."""
    epoch, place = divmod(step, math.ceil(count / batch_size))
    order = permutation(count, seed, "sft-order", epoch)
    return [int(i) for i in order[place * batch_size : (place + 1) * batch_size]]


def likelihood_step(
    model: CausalModel,
    batch: Sequence[Encoded],
    optimiser: Optimiser,
    *,
    micro_tokens: MicroBudget | int,
    computing: Computing,
) -> LikelihoodStep:
    """Take one optimiser step on −(1/M) Σ log π(token) over the M target tokens of the whole batch.

    The sum is divided once, by the count of the whole batch, so the gradient does not depend on padding, on
    ``micro_tokens`` (rows × longest row of a forward pass) or on how answers of unlike length fall together, beyond
    rounding. Raises NonFiniteStep with the batch's positions where loss or gradient is not finite; nothing is moved.
    """
    optimiser.zero_grad()
    try:
        total = within_memory(
            micro_tokens,
            torch.tensor([len(item) for item in batch]),
            lambda tokens: add_likelihood(model, batch, micro_tokens=tokens, computing=computing),
            optimiser.zero_grad,
        )
    except NonFiniteStep:
        optimiser.zero_grad()
        raise
    norms = optimiser.step(torch.arange(len(batch)))
    return LikelihoodStep(
        loss=total,
        target_tokens=sum(int(item.learnt.sum()) for item in batch),
        tokens=sum(len(item) for item in batch),
        grad_norm=math.sqrt(sum(norm**2 for norm in norms.values())),
    )


def add_likelihood(
    model: CausalModel, batch: Sequence[Encoded], *, micro_tokens: int | None, computing: Computing
) -> float:
    """Add to the weights' gradients that of −(1/M) Σ log π(token) over the batch's M target tokens; return the loss.

    Raises:
        NonFiniteStep: the loss is not finite.
    """
    targets = sum(int(item.learnt.sum()) for item in batch)
    total = 0.0
    learn = _learn_at_once if model.fused else _learn
    for index in micro_batches(torch.tensor([len(item) for item in batch]), micro_tokens):
        total += learn(model, [batch[i] for i in index.tolist()], targets, len(batch), computing)
    return total


def _learn_at_once(
    model: CausalModel, items: Sequence[Encoded], targets: int, count: int, computing: Computing
) -> float:
    """Add one micro-batch's gradient of −(1/targets) Σ log π, each token's logits computed once; return its loss."""
    tokens = collate(items, 0)
    with computing():
        states = model(tokens.input_ids.to(model.device), tokens.rows.to(model.device), tokens.columns.to(model.device))
        found, slope = model.answers(
            states.features.detach(),
            tokens.targets.to(model.device),
            weighing=lambda _, seen: HeadSlopes(logp=torch.full_like(seen.logp, -1.0 / targets)),
        )
    loss = _finite(sft_loss(found.logp).sum() / targets, count)
    if states.features.requires_grad:
        states.features.backward(slope)
    return loss


def _learn(model: CausalModel, items: Sequence[Encoded], targets: int, count: int, computing: Computing) -> float:
    """The same by autograd, for a model whose own forward makes the logits."""
    (losses,) = token_losses(model, items, None, computing)
    loss = losses.sum() / targets
    found = _finite(loss.detach(), count)
    loss.backward()  # type: ignore[no-untyped-call]
    return found


def _finite(loss: Float[Tensor, ""], count: int) -> float:
    if not bool(torch.isfinite(loss)):
        raise NonFiniteStep("the loss", tuple(range(count)))
    return float(loss)


@torch.no_grad()
def held_out_loss(
    model: CausalModel, items: Sequence[Encoded], *, micro_tokens: MicroBudget | int, computing: Computing
) -> HeldOut:
    """Mean −log π over all target tokens of ``items``, each token counted once."""
    losses = within_memory(
        micro_tokens,
        torch.tensor([len(item) for item in items]),
        lambda tokens: torch.cat([part.double().cpu() for part in token_losses(model, items, tokens, computing)]),
    )
    return HeldOut(loss=float(losses.mean()), target_tokens=len(losses))


def token_losses(
    model: CausalModel, items: Sequence[Encoded], micro_tokens: int | None, computing: Computing
) -> Iterator[Float[Tensor, " n"]]:
    """Yield −log π of the target tokens, micro-batch by micro-batch, rows of alike length together."""
    device = model.device
    for index in micro_batches(torch.tensor([len(item) for item in items]), micro_tokens):
        tokens = collate([items[i] for i in index.tolist()], 0)
        with computing():
            states = model(tokens.input_ids.to(device), tokens.rows.to(device), tokens.columns.to(device))
            logp, _ = model.logprobs(states.features, tokens.targets.to(device), with_entropy=False)
        yield sft_loss(logp)
