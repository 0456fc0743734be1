"""What a vocabulary head says of some tokens, and the gradient of a loss of it, in one pass over the logits.

A loss per action whose derivative is known in closed form needs the logits once: as soon as a chunk's log-probabilities
are there, so is what the loss does to that chunk's logits. So nothing is kept for a backward pass, and nothing computed
twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.core._checks import check_targets
from bridle.core._vocabulary import Projection, Shaping, check_projection, chunks, rows_per_chunk

__all__ = ["HeadAnswers", "HeadSlopes", "VocabularyHead", "Weighing", "head_answers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class VocabularyHead:
    """Output weights, and how they make logits of hidden states: see :func:`bridle.core.logprobs.token_logprobs`."""

    weight: Float[Tensor, "V D"]
    """[V, D] of the output projection."""
    bias: Float[Tensor, " V"] | None = None
    """[V] of the output projection; none by default. −inf forbids a token."""
    scale: float = 1.0
    """Factor that some families put on the logits, ≠ 0."""
    softcap: float | None = None
    """Bound that some families put on the logits, > 0; none by default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadAnswers:
    """What π = softmax(z/τ) says at n positions."""

    logp: Float[Tensor, " n"]
    """[n] log π(target), nats, ≤ 0."""
    entropy: Float[Tensor, " n"]
    """[n] −Σ_v π_v log π_v, nats."""
    kl: Float[Tensor, " n"] | None
    """[n] Σ_v π_v log(π_v/ref_v), nats; None without a reference."""
    ref_logp: Float[Tensor, " n"] | None
    """[n] log ref(target), nats, ≤ 0; None without a reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSlopes:
    """∂ loss / ∂ each answer at n positions, weights included; None where the loss does not hold it."""

    logp: Float[Tensor, " n"] | None = None
    """[n] units of loss per nat."""
    entropy: Float[Tensor, " n"] | None = None
    """[n] units of loss per nat."""
    kl: Float[Tensor, " n"] | None = None
    """[n] units of loss per nat."""


Weighing = Callable[[slice, HeadAnswers], HeadSlopes]
"""Given some of the positions, and the answers there, the loss's derivatives with respect to those answers."""


def head_answers(
    hidden: Float[Tensor, "N D"],
    head: VocabularyHead,
    targets: Int[Tensor, " N"],
    *,
    reference: tuple[Float[Tensor, "M E"], VocabularyHead] | None = None,
    temperature: float = 1.0,
    chunk: int | None = None,
    weighing: Weighing | None = None,
    weight_grad: Float[Tensor, "V D"] | None = None,
    bias_grad: Float[Tensor, " V"] | None = None,
) -> tuple[HeadAnswers, Float[Tensor, "N D"] | None]:
    """Return log-probabilities, entropies and KLs of N positions; with ``weighing`` also ∂ loss / ∂ hidden.

        ∂/∂(z/τ) = a (1[target] − π) − b π (log π + H) + c π (log π − log ref − KL),   (a, b, c) the loss's slopes

    No autograd: nothing here holds a graph. In memory three [chunk, V] blocks, four with a reference, whatever N.

    Args:
        hidden: [N, D] last hidden states at the positions that predict the targets.
        head: the policy's output weights.
        targets: [N] token ids, 0 ≤ id < V.
        reference: its own hidden states [M = N, E] at those positions, and its head; constants.
        temperature: τ > 0, of both.
        chunk: rows at a time, ≥ 1; by default as many as make a float32 block of 32 MiB.
        weighing: called for each chunk in order; an action's slopes may depend on that action's answers alone.
        weight_grad: ∂ loss / ∂ weight is added to it, in place, if given.
        bias_grad: the same for the bias.

    Returns:
        (the answers, ∂ loss / ∂ hidden [N, D] in hidden's dtype; None without ``weighing``).

    Raises:
        ValueError: shapes do not fit, a target is not in the vocabulary, or a number is out of range.

    Source: as :func:`bridle.core.logprobs.token_logprobs` and :func:`bridle.core.divergence.exact_kl`. That a loss's
    gradient is taken while a chunk's logits are at hand: Hsu et al. 2024 (Liger Kernel), FusedLinearCrossEntropy.
    """
    check_projection(hidden, head.weight, head.bias)
    check_targets(targets, hidden.shape[0], head.weight.shape[0])
    rows = rows_per_chunk(chunk, head.weight.shape[0])
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        own = _Side(hidden, head, temperature, rows)
        other = None
        if reference is not None:
            check_projection(reference[0], reference[1].weight, reference[1].bias, prefix="ref_")
            if reference[0].shape[0] != hidden.shape[0] or reference[1].weight.shape[0] != head.weight.shape[0]:
                raise ValueError("the reference has other positions or another vocabulary than the policy")
            other = _Side(reference[0], reference[1], temperature, rows)
        return _run(own, other, targets, rows, weighing, (weight_grad, bias_grad))


class _Side:
    """A head over its hidden states, and the block its logits are written into, over and over."""

    def __init__(self, hidden: Tensor, head: VocabularyHead, temperature: float, rows: int) -> None:
        shaping = Shaping(temperature=temperature, scale=head.scale, softcap=head.softcap)
        self.projection = Projection(hidden, head.weight, head.bias, shaping)
        self.block = hidden.new_empty(min(rows, len(hidden)), head.weight.shape[0], dtype=self.projection.dtype)

    def logits(self, inputs: Tensor) -> Tensor:
        return self.projection.logits(inputs, out=self.block[: len(inputs)])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """One chunk's distribution."""

    z: Tensor
    """[n, V] logits less each row's largest."""
    e: Tensor
    """[n, V] their exponentials."""
    total: Tensor
    """[n, 1] the sums of those: π = e/total."""
    gap: Tensor | None
    """[n, V] log π − log ref."""


def _run(
    own: _Side,
    other: _Side | None,
    targets: Tensor,
    rows: int,
    weighing: Weighing | None,
    grads: tuple[Tensor | None, Tensor | None],
) -> tuple[HeadAnswers, Tensor | None]:
    hidden, count = own.projection.hidden, len(own.projection.hidden)
    logp, entropy, kl, ref_logp = hidden.new_zeros(4, count, dtype=own.projection.dtype).unbind(0)
    hidden_grad = None if weighing is None else torch.zeros_like(hidden)
    exponentials, products = torch.empty_like(own.block), torch.empty_like(own.block)
    for part in chunks(count, rows):
        inputs = own.projection.inputs(part)
        z = own.logits(inputs)
        raw = z.clone() if own.projection.shaping.softcap is not None and weighing is not None else z
        z.sub_(z.amax(-1, keepdim=True))
        e, product = torch.exp(z, out=exponentials[: len(z)]), products[: len(z)]
        total = e.sum(-1, keepdim=True)
        log_total = total.log()
        logp[part] = (z.gather(1, targets[part, None]) - log_total)[:, 0]
        entropy[part] = (log_total - torch.mul(e, z, out=product).sum(-1, keepdim=True) / total)[:, 0]
        gap = None
        if other is not None:
            gap = _log_softmax_(other.logits(other.projection.inputs(part)), product).neg_().add_(z).sub_(log_total)
            kl[part] = (torch.mul(e, gap, out=product).sum(-1, keepdim=True) / total)[:, 0]
            ref_logp[part] = logp[part] - gap.gather(1, targets[part, None])[:, 0]
        if weighing is None or hidden_grad is None:
            continue
        theirs = {"kl": None, "ref_logp": None} if gap is None else {"kl": kl[part], "ref_logp": ref_logp[part]}
        found = HeadAnswers(logp=logp[part], entropy=entropy[part], **theirs)
        chunk = _Chunk(z=z, e=e, total=total, gap=gap)
        grad = _gradient(weighing(part, found), found, chunk, targets[part])
        if grad is not None:
            _spread(own.projection, own.projection.through_softcap(grad, raw), inputs, hidden_grad[part], grads)
    theirs = {"kl": None, "ref_logp": None} if other is None else {"kl": kl, "ref_logp": ref_logp}
    return HeadAnswers(logp=logp, entropy=entropy, **theirs), hidden_grad


def _gradient(slopes: HeadSlopes, found: HeadAnswers, chunk: _Chunk, targets: Tensor) -> Tensor | None:
    """∂ loss / ∂ logits of a chunk, in the place of its exponentials; its other blocks are spent. None: it is 0."""
    a, b, c = (None if slope is None else slope[:, None] for slope in (slopes.logp, slopes.entropy, slopes.kl))
    if a is None and b is None and c is None:
        return None
    grad, total = chunk.e, chunk.total
    if b is None and c is None:
        assert a is not None
        grad.mul_(-a / total)
    else:
        # what multiplies π = e/total: −a − b (log π + H) + c (gap − KL)
        factor = chunk.z
        offset = torch.zeros_like(total) if a is None else -a
        if b is None:
            factor.zero_()
        else:
            factor.mul_(-b)
            offset = offset + b * total.log() - b * found.entropy[:, None]
        if c is not None:
            assert chunk.gap is not None
            assert found.kl is not None
            factor.add_(chunk.gap.mul_(c))
            offset = offset - c * found.kl[:, None]
        grad.mul_(factor.add_(offset)).div_(total)
    return grad if a is None else grad.scatter_add_(1, targets[:, None], a.to(grad.dtype))


def _spread(
    projection: Projection,
    grad: Tensor,
    inputs: Tensor,
    hidden_grad: Tensor,
    grads: tuple[Tensor | None, Tensor | None],
) -> None:
    """Take the gradient of a chunk's logits on to its hidden states, and add it to those of weight and bias."""
    weight_grad, bias_grad = grads
    hidden_grad.copy_((grad @ projection.weight).mul_(projection.shaping.inner))
    if weight_grad is not None:
        if weight_grad.dtype == grad.dtype:
            weight_grad.addmm_(grad.t(), inputs)
        else:
            weight_grad.add_(grad.t() @ inputs)
    if bias_grad is not None:
        bias_grad.add_(grad.sum(0), alpha=projection.shaping.inner)


def _log_softmax_(z: Tensor, spare: Tensor) -> Tensor:
    """Turn logits into log-probabilities, in place; ``spare`` is written over."""
    z.sub_(z.amax(-1, keepdim=True))
    return z.sub_(torch.exp(z, out=spare).sum(-1, keepdim=True).log_())
