"""Log-probabilities and entropies of tokens: straight from hidden states, or from logits.

The policy is softmax(z/τ): every log-probability and entropy here is that of the distribution at temperature τ, in
nats. Half-precision inputs are computed and returned in float32, float64 stays float64.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from bridle.core._checks import at_least_float32, check_dim, check_range, check_targets
from bridle.core._vocabulary import Projection, ProjectionGrad, Shaping, check_projection, chunks, rows_per_chunk

__all__ = ["entropy_from_logits", "entropy_from_logits_grad", "logprobs_from_logits", "token_logprobs"]


def token_logprobs(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "V D"],
    targets: Int[Tensor, " N"],
    *,
    bias: Float[Tensor, " V"] | None = None,
    temperature: float = 1.0,
    scale: float = 1.0,
    softcap: float | None = None,
    chunk: int | None = None,
    with_entropy: bool = True,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Return each target token's log-probability and the entropy of its distribution, without [N, V] logits.

        z = softcap · tanh(scale · (h Wᵀ + b) / softcap), or scale · (h Wᵀ + b);   π = softmax(z/τ)
        logp = log π(target),   H = −Σ_v π_v log π_v

    Forward and backward work on ``chunk`` rows at a time; backward computes the logits again. In memory: one [chunk,
    V] block forward (two with entropy), up to three backward. Gradients reach ``hidden``, ``weight`` (which may be
    tied to the embedding) and ``bias``, through logp and entropy both, once: no second derivative.

    Args:
        hidden: [N, D] the model's last hidden states at the positions that predict the targets.
        weight: [V, D] of the output projection.
        targets: [N] token ids, 0 ≤ id < V.
        bias: [V] of the output projection; none by default. −inf forbids a token.
        temperature: τ > 0.
        scale: factor that some families put on the logits, ≠ 0.
        softcap: bound that some families put on the logits, > 0; none by default.
        chunk: rows at a time, ≥ 1; by default as many as make a float32 block of 32 MiB.
        with_entropy: False leaves the entropy out, to save a pass over the block; it is then 0.

    Returns:
        (logp [N] ≤ 0, entropy [N] in 0 … log V), nats.

    Raises:
        ValueError: shapes do not fit, a target is not in the vocabulary, or a number is out of range.

    Source: the definitions; Shannon 1948, §6 for H. Derivatives: ∂logp/∂(z/τ) = 1[target] − π,
    ∂H/∂(z/τ) = −π (log π + H).
    """
    check_projection(hidden, weight, bias)
    check_targets(targets, hidden.shape[0], weight.shape[0])
    shaping = Shaping(temperature=temperature, scale=scale, softcap=softcap)
    rows = rows_per_chunk(chunk, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):  # float32 is promised, whatever the caller computes in
        logp, entropy = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, targets, shaping, rows, with_entropy
        )
    return logp, entropy


def logprobs_from_logits(
    logits: Float[Tensor, "N V"], targets: Int[Tensor, " N"], *, temperature: float = 1.0
) -> Float[Tensor, " N"]:
    """Return each target's log-probability under softmax(logits/τ).

        logp = z_target/τ − logsumexp_v(z_v/τ)

    Args:
        logits: [N, V] z; −inf forbids an action.
        targets: [N] actions, 0 ≤ id < V.
        temperature: τ > 0.

    Returns:
        [N] logp ≤ 0, nats; −inf for a forbidden action.

    Raises:
        ValueError: shapes do not fit, a target is out of range, or τ is.

    Source: the definition; Sutton & Barto 2018, eq. (13.2), the soft-max in action preferences.
    """
    check_dim("logits", logits, 2, "[N, V]")
    check_targets(targets, *logits.shape)
    return _log_softmax(logits, temperature).gather(1, targets.unsqueeze(1)).squeeze(1)


def entropy_from_logits(logits: Float[Tensor, "N V"], *, temperature: float = 1.0) -> Float[Tensor, " N"]:
    """Return the entropy of softmax(logits/τ), the bonus that keeps a policy exploring.

        H = −Σ_v π_v log π_v, with 0 log 0 = 0

    Args:
        logits: [N, V] z; −inf forbids an action.
        temperature: τ > 0.

    Returns:
        [N] H in 0 … log V, nats.

    Raises:
        ValueError: logits are not [N, V], or τ is out of range.

    Source: Shannon 1948, §6; as a bonus Schulman et al. 2017 (PPO), eq. (9), S.
    """
    check_dim("logits", logits, 2, "[N, V]")
    logp = _log_softmax(logits, temperature)
    return -(logp.exp() * logp.masked_fill(logp == -math.inf, 0.0)).sum(-1)


def entropy_from_logits_grad(logits: Float[Tensor, "N V"], *, temperature: float = 1.0) -> Float[Tensor, "N V"]:
    """Return ∂H/∂z_v = −π_v (log π_v + H)/τ of :func:`entropy_from_logits`, [N, V]."""
    check_dim("logits", logits, 2, "[N, V]")
    logp = _log_softmax(logits.detach(), temperature)
    finite = logp.masked_fill(logp == -math.inf, 0.0)
    p = logp.exp()
    entropy = -(p * finite).sum(-1, keepdim=True)
    return -p * (finite + entropy) / temperature


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    check_range("temperature", temperature, 0.0, math.inf, closed=False)
    return (logits.to(at_least_float32(logits)) / temperature).log_softmax(-1)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        shaping: Shaping,
        rows: int,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        projection = Projection(hidden, weight, bias, shaping)
        count = hidden.shape[0]
        logp, norm, entropy = hidden.new_zeros(3, count, dtype=projection.dtype).unbind(0)
        for part in chunks(count, rows):
            z = projection.logits(projection.inputs(part))
            peak = z.amax(-1, keepdim=True)
            z.sub_(peak)
            at_target = z.gather(1, targets[part].unsqueeze(1)).squeeze(1)
            if with_entropy:
                p = z.exp()
                total = p.sum(-1)
                mean_z = p.mul_(z).sum(-1).div_(total)
            else:
                total = z.exp_().sum(-1)
            log_total = total.log_()
            torch.sub(at_target, log_total, out=logp[part])
            torch.add(peak.squeeze(1), log_total, out=norm[part])
            if with_entropy:
                torch.sub(log_total, mean_z, out=entropy[part])
        ctx.save_for_backward(hidden, weight, bias, targets, norm, entropy)
        ctx.shaping, ctx.rows = shaping, rows
        ctx.set_materialize_grads(False)  # an entropy that no loss reads costs nothing on the way back
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, norm, entropy = ctx.saved_tensors
        if grad_logp is None:
            grad_logp = torch.zeros_like(norm)
        projection = Projection(hidden, weight, bias, ctx.shaping)
        grads = ProjectionGrad(projection, bias, ctx.needs_input_grad[:3])
        for part in chunks(hidden.shape[0], ctx.rows):
            inputs = projection.inputs(part)
            z = projection.logits(inputs)
            capped = z.clone() if ctx.shaping.softcap is not None else z
            log_p = z.sub_(norm[part].unsqueeze(1))
            d_logp = grad_logp[part].unsqueeze(1)
            if grad_entropy is not None:
                d_entropy = grad_entropy[part].unsqueeze(1)
                grad = log_p.add(entropy[part].unsqueeze(1)).mul_(d_entropy).add_(d_logp)
                grad.mul_(log_p.exp_()).neg_()
            else:
                grad = log_p.exp_().mul_(-d_logp)
            grad.scatter_add_(1, targets[part].unsqueeze(1), d_logp)
            grads.add(part, projection.through_softcap(grad, capped), inputs)
        return (*grads.result(weight, bias), None, None, None, None)
