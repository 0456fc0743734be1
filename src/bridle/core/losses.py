"""Losses, one value per action (or comparison, or target token), each with its closed-form gradient beside it.

Nothing here averages: the caller sums and divides once by the count of the whole minibatch. ``f_grad`` is the
derivative of each element's loss with respect to the tensor named first, as written on paper and not taken from
autograd.

Everything but the tensors named first (``logp``, ``values``, ``chosen`` and ``rejected``, ``scores``) is a constant:
old log-probabilities, advantages, returns and margins receive no gradient. Half-precision inputs are computed and
returned in float32, float64 stays float64.

Ratios far from 1. exp(logp − old_logp) overflows to inf above a difference of about 88.7 nats in float32 (709 in
float64) and underflows to 0 below −103 (−745). An infinite ratio appears in a loss or gradient only where that ratio
is what the formula selects (A < 0, no dual clip): there the loss is inf, because the true number is too large to write
down. A clipped ratio or an advantage of 0 gives the finite loss and the gradient 0, never NaN, by autograd as by
closed form.

Sources: Schulman et al. 2017, "Proximal Policy Optimization Algorithms" (arXiv:1707.06347); Sutton & Barto 2018,
"Reinforcement Learning: An Introduction", 2nd edition; the others with the functions.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from bridle.core._checks import (
    at_least_float32,
    check_bool,
    check_dim,
    check_range,
    check_same_shape,
    constant,
    in_dtype,
)

__all__ = [
    "clipped_surrogate_loss",
    "clipped_surrogate_loss_grad",
    "clipped_value_loss",
    "clipped_value_loss_grad",
    "importance_ratio",
    "importance_ratio_grad",
    "listwise_loss",
    "listwise_loss_grad",
    "pairwise_loss",
    "pairwise_loss_grad",
    "policy_gradient_loss",
    "policy_gradient_loss_grad",
    "ratio_loss",
    "ratio_loss_grad",
    "sft_loss",
    "sft_loss_grad",
    "value_loss",
    "value_loss_grad",
]


def importance_ratio(logp: Float[Tensor, " N"], old_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return how much likelier each action is now than under the policy that took it.

        r = π(a | s) / π_old(a | s) = exp(logp − old_logp)

    Args:
        logp: [N] log π(a | s), nats.
        old_logp: [N] log π_old(a | s), nats.

    Returns:
        [N] r ≥ 0, inf where it overflows.

    Raises:
        ValueError: shapes differ.

    Source: Schulman et al. 2017 (PPO), §3, above eq. (6); one step's factor in Sutton & Barto 2018, eq. (5.3).
    """
    return _log_ratio(logp, old_logp).exp()


def importance_ratio_grad(logp: Float[Tensor, " N"], old_logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return ∂r/∂logp = r of :func:`importance_ratio`, [N]."""
    return importance_ratio(logp, old_logp).detach()


def policy_gradient_loss(logp: Float[Tensor, " N"], advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the actor's loss of the plain actor–critic (A2C).

        L = −logp · A

    Args:
        logp: [N] log π(a | s), nats.
        advantages: [N] A, in units of return; constants.

    Returns:
        [N] L, nats × units of return.

    Raises:
        ValueError: shapes differ.

    Source: Sutton & Barto 2018, eq. (13.11), and with the TD residual as A eq. (13.14).
    """
    check_same_shape("logp", logp, advantages=advantages)
    dtype = at_least_float32(logp, advantages)
    return -logp.to(dtype) * advantages.detach().to(dtype)


def policy_gradient_loss_grad(logp: Float[Tensor, " N"], advantages: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return ∂L/∂logp = −A of :func:`policy_gradient_loss`, [N]."""
    check_same_shape("logp", logp, advantages=advantages)
    return -advantages.detach().to(at_least_float32(logp, advantages))


def ratio_loss(
    logp: Float[Tensor, " N"], old_logp: Float[Tensor, " N"], advantages: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return the surrogate without a clip, the conservative policy iteration objective with its sign turned.

        L = −r A, r = exp(logp − old_logp)

    Args:
        logp: [N] log π(a | s), nats.
        old_logp: [N] log π_old(a | s), nats; constants.
        advantages: [N] A, in units of return; constants. Where A = 0 the loss is 0 whatever the ratio.

    Returns:
        [N] L, in units of return.

    Raises:
        ValueError: shapes differ.

    Source: Schulman et al. 2017 (PPO), eq. (6).
    """
    log_ratio, adv = _surrogate_inputs(logp, old_logp, advantages)
    return -log_ratio.masked_fill(adv == 0.0, 0.0).exp() * adv


def ratio_loss_grad(
    logp: Float[Tensor, " N"], old_logp: Float[Tensor, " N"], advantages: Float[Tensor, " N"]
) -> Float[Tensor, " N"]:
    """Return ∂L/∂logp = −r A of :func:`ratio_loss`, [N]."""
    return ratio_loss(logp, old_logp, advantages).detach()


def clipped_surrogate_loss(
    logp: Float[Tensor, " N"],
    old_logp: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """Return PPO's clipped surrogate with its sign turned.

        L = −min(r A, clip(r, 1 − ε, 1 + ε_high) A);  with dual_clip c, where A < 0: −max(that min, c A)

    Which is −A · r held to one side only: r ≤ 1 + ε_high where A ≥ 0; 1 − ε ≤ r (≤ c) where A < 0. On the other side
    min() takes the unclipped term, and the gradient lives outside the range as well.

    Args:
        logp: [N] log π(a | s), nats.
        old_logp: [N] log π_old(a | s), nats; constants.
        advantages: [N] A, in units of return; constants.
        clip: ε, 0 < ε < 1.
        clip_high: ε_high > 0 of the upper side; ε by default.
        dual_clip: c > 1, the largest ratio that counts where A < 0; no such bound by default.

    Returns:
        [N] L, in units of return.

    Raises:
        ValueError: shapes differ, or a clip is out of range.

    Source: Schulman et al. 2017 (PPO), eq. (7). Dual clip: Ye et al. 2020, "Mastering Complex Control in MOBA Games
    with Deep Reinforcement Learning" (arXiv:1912.09729), eq. (5). Two sides: Yu et al. 2025, "DAPO"
    (arXiv:2503.14476), eq. (8).
    """
    log_ratio, adv = _surrogate_inputs(logp, old_logp, advantages)
    active, held = _hold_ratio(log_ratio.detach(), adv, clip, clip_high, dual_clip)
    # exp sees only ratios that count: an overflow in the branch not taken would make autograd's 0 · ∞ a NaN.
    ratio = torch.where(active, log_ratio.masked_fill(~active, 0.0).exp(), held)
    return -ratio * adv


def clipped_surrogate_loss_grad(
    logp: Float[Tensor, " N"],
    old_logp: Float[Tensor, " N"],
    advantages: Float[Tensor, " N"],
    *,
    clip: float = 0.2,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, " N"]:
    """Return ∂L/∂logp of :func:`clipped_surrogate_loss`, [N]: −r A where the ratio is not held, else 0."""
    log_ratio, adv = _surrogate_inputs(constant(logp), old_logp, advantages)
    high = _upper_clip(clip, clip_high, dual_clip)
    ratio = log_ratio.exp_()
    # min() takes the unclipped term, whose slope this is; where an infinite ratio meets A = 0 NaN compares false
    bound = ratio.clamp(1.0 - clip, 1.0 + high).mul_(adv)
    surrogate = ratio * adv
    active = surrogate <= bound
    if dual_clip is not None:
        active &= (adv >= 0.0) | (ratio <= dual_clip)
    return surrogate.neg_().masked_fill_(~active, 0.0)


def value_loss(values: Float[Tensor, " N"], returns: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the critic's squared error.

        L = ½ (V − R)²

    Args:
        values: [N] V(s), in units of return.
        returns: [N] regression targets R, in units of return; constants.

    Returns:
        [N] L, in squared units of return.

    Raises:
        ValueError: shapes differ.

    Source: Schulman et al. 2017 (PPO), eq. (9), L^VF, with the half that makes the gradient V − R; Sutton & Barto 2018,
    eqs. (9.4) and (9.7).
    """
    return _value_error(values, returns).square().mul(0.5)


def value_loss_grad(values: Float[Tensor, " N"], returns: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return ∂L/∂V = V − R of :func:`value_loss`, [N]."""
    return _value_error(constant(values), returns)


def clipped_value_loss(
    values: Float[Tensor, " N"], old_values: Float[Tensor, " N"], returns: Float[Tensor, " N"], *, clip: float
) -> Float[Tensor, " N"]:
    """Return the worse of the critic's squared error and that of a value held near the old one.

        L = ½ max((V − R)², (V_old + clamp(V − V_old, −clip, clip) − R)²)

    Args:
        values: [N] V(s), in units of return.
        old_values: [N] V(s) when the batch was prepared, in units of return; constants.
        returns: [N] regression targets R, in units of return; constants.
        clip: > 0, in units of return.

    Returns:
        [N] L, in squared units of return.

    Raises:
        ValueError: shapes differ, or clip is out of range.

    Source: OpenAI's PPO code; described in Engstrom et al. 2020, "Implementation Matters in Deep Policy Gradients"
    (arXiv:2005.12729), §3, item 1, whose formula prints min where that code has max.
    """
    error, held, active = _clipped_value(values, old_values, returns, clip)
    return torch.where(active, error, held).square().mul(0.5)


def clipped_value_loss_grad(
    values: Float[Tensor, " N"], old_values: Float[Tensor, " N"], returns: Float[Tensor, " N"], *, clip: float
) -> Float[Tensor, " N"]:
    """Return ∂L/∂V of :func:`clipped_value_loss`, [N]: V − R where that is the error that counts, else 0."""
    error, _, active = _clipped_value(values.detach(), old_values, returns, clip)
    return error.masked_fill(~active, 0.0)


def sft_loss(logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return the negative log-likelihood of each target token.

        L = −log π(y_t | y_{<t}, x)

    Args:
        logp: [N] log-probabilities of the target tokens, nats.

    Returns:
        [N] L, nats.

    Source: the maximum-likelihood objective; Ouyang et al. 2022, "Training language models to follow instructions with
    human feedback" (arXiv:2203.02155), §3.5, supervised fine-tuning.
    """
    return -logp.to(at_least_float32(logp))


def sft_loss_grad(logp: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """Return ∂L/∂logp = −1 of :func:`sft_loss`, [N]."""
    return torch.full_like(logp, -1.0, dtype=at_least_float32(logp))


def pairwise_loss(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    *,
    margin: Float[Tensor, " P"] | float | None = None,
    centering: float = 0.0,
) -> Float[Tensor, " P"]:
    """Return the Bradley–Terry loss of each comparison, with a margin and a pull of the pair's sum towards 0.

        L = −log σ(s⁺ − s⁻ − m) + c (s⁺ + s⁻)²

    Args:
        chosen: [P] scores s⁺ of the preferred answers.
        rejected: [P] scores s⁻ of the others.
        margin: [P] (or one number) m, how far apart the pair ought to be; a constant, 0 by default.
        centering: c ≥ 0. Differences alone leave the scores' zero undetermined; this fixes it at the mean.

    Returns:
        [P] L, nats.

    Raises:
        ValueError: shapes differ, or centering is out of range.

    Source: Bradley & Terry 1952; Stiennon et al. 2020, "Learning to summarize from human feedback" (arXiv:2009.01325),
    §3.4; Ouyang et al. 2022 (arXiv:2203.02155), eq. (1). Margin: Touvron et al. 2023, "Llama 2" (arXiv:2307.09288),
    eq. (2). Centring: Eisenstein et al. 2023, "Helping or Herding?" (arXiv:2312.09244), eq. (2).
    """
    gap, total = _pair(chosen, rejected, margin, centering)
    return -logsigmoid(gap) + centering * total.square()


def pairwise_loss_grad(
    chosen: Float[Tensor, " P"],
    rejected: Float[Tensor, " P"],
    *,
    margin: Float[Tensor, " P"] | float | None = None,
    centering: float = 0.0,
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Return (∂L/∂s⁺, ∂L/∂s⁻) of :func:`pairwise_loss`: ∓σ(−(s⁺ − s⁻ − m)) + 2c (s⁺ + s⁻), each [P]."""
    gap, total = _pair(chosen.detach(), rejected.detach(), margin, centering)
    surprise = torch.sigmoid(-gap)
    pull = 2.0 * centering * total
    return pull - surprise, pull + surprise


def listwise_loss(scores: Float[Tensor, "P K"], *, mask: Bool[Tensor, "P K"] | None = None) -> Float[Tensor, " P"]:
    """Return the Plackett–Luce loss of each ranking.

        L = −Σ_k [s_k − logsumexp_{j ≥ k} s_j],  scores in ranked order, best first

    Each place is won against those ranked below it; with K = 2 it is :func:`pairwise_loss`. Takes memory for [P, K, K].

    Args:
        scores: [P, K] scores of the K answers to each prompt, the best answer first.
        mask: [P, K] True where there is an answer; all of them by default. Absent answers take part in nothing; a row
        with
            fewer than two answers has loss 0.

    Returns:
        [P] L, nats per ranking (a sum over its places, not a mean).

    Raises:
        ValueError: scores are not [P, K], or the mask is not bool or not of that shape.

    Source: Plackett 1975; Luce 1959; as a loss Xia, Liu, Wang, Zhang & Li 2008, "Listwise Approach to Learning to Rank:
    Theory and Algorithm", the likelihood loss (ListMLE).
    """
    behind, present = _score_gaps(scores, mask)
    return behind.logsumexp(-1).masked_fill(~present, 0.0).sum(-1)


def listwise_loss_grad(
    scores: Float[Tensor, "P K"], *, mask: Bool[Tensor, "P K"] | None = None
) -> Float[Tensor, "P K"]:
    """Return ∂L/∂s_i = Σ_{k ≤ i} softmax_{j ≥ k}(s)_i − 1 of :func:`listwise_loss`, [P, K]; 0 where absent."""
    behind, present = _score_gaps(scores.detach(), mask)
    won_by = behind.softmax(-1).masked_fill(~present.unsqueeze(-1), 0.0)
    return won_by.sum(-2).sub_(1.0).masked_fill_(~present, 0.0)


def _log_ratio(logp: Tensor, old_logp: Tensor) -> Tensor:
    check_same_shape("logp", logp, old_logp=old_logp)
    dtype = at_least_float32(logp, old_logp)
    return logp.to(dtype) - old_logp.detach().to(dtype)


def _surrogate_inputs(logp: Tensor, old_logp: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    check_same_shape("logp", logp, old_logp=old_logp, advantages=advantages)
    dtype = at_least_float32(logp, old_logp, advantages)
    return in_dtype(logp, dtype) - in_dtype(constant(old_logp), dtype), in_dtype(constant(advantages), dtype)


def _upper_clip(clip: float, clip_high: float | None, dual_clip: float | None) -> float:
    """Return ε_high, once all three are in their ranges."""
    high = clip if clip_high is None else clip_high
    check_range("clip", clip, 0.0, 1.0, closed=False)
    check_range("clip_high", high, 0.0, math.inf, closed=False)
    if dual_clip is not None:
        check_range("dual_clip", dual_clip, 1.0, math.inf, closed=False)
    return high


def _hold_ratio(
    log_ratio: Tensor, adv: Tensor, clip: float, clip_high: float | None, dual_clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return where the ratio itself counts, and the ratio held to the one side that the advantage's sign allows."""
    high = _upper_clip(clip, clip_high, dual_clip)
    ratio = log_ratio.exp()
    above = ratio.clamp(1.0 - clip, dual_clip)
    below = ratio.clamp(max=1.0 + high)
    held = torch.where(adv < 0.0, above, below)
    return held == ratio, held


def _value_error(values: Tensor, returns: Tensor) -> Tensor:
    check_same_shape("values", values, returns=returns)
    dtype = at_least_float32(values, returns)
    return in_dtype(values, dtype) - in_dtype(constant(returns), dtype)


def _clipped_value(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the error of V, that of V held near V_old (a constant), and where the first one counts."""
    check_same_shape("values", values, old_values=old_values, returns=returns)
    check_range("clip", clip, 0.0, math.inf, closed=False)
    dtype = at_least_float32(values, old_values, returns)
    value, old, target = values.to(dtype), old_values.detach().to(dtype), returns.detach().to(dtype)
    moved = value.detach() - old
    error, held = value - target, old + moved.clamp(-clip, clip) - target
    active = (moved.abs() <= clip) | (error.detach().abs() >= held.abs())
    return error, held, active


def _pair(chosen: Tensor, rejected: Tensor, margin: Tensor | float | None, centering: float) -> tuple[Tensor, Tensor]:
    """Return (s⁺ − s⁻ − m, s⁺ + s⁻)."""
    check_same_shape("chosen", chosen, rejected=rejected, margin=margin if isinstance(margin, Tensor) else None)
    check_range("centering", centering, 0.0, math.inf)
    dtype = at_least_float32(chosen, rejected)
    better, worse = chosen.to(dtype), rejected.to(dtype)
    gap = better - worse
    if margin is not None:
        gap = gap - (margin.detach().to(dtype) if isinstance(margin, Tensor) else margin)
    return gap, better + worse


def _score_gaps(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return [P, K, K] s_j − s_k for the present j ≥ k (−inf elsewhere; finite where k is absent), and [P, K] presence.

    Differences first, then logsumexp: with scores around ±1e4 the other order would lose the loss in their rounding.
    """
    check_dim("scores", scores, 2, "[P, K]")
    check_same_shape("scores", scores, mask=mask)
    check_bool(mask=mask)
    present = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    s = scores.to(at_least_float32(scores)).masked_fill(~present, 0.0)
    size = scores.shape[1]
    itself = torch.eye(size, dtype=torch.bool, device=scores.device)
    at_or_behind = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu()
    compared = (at_or_behind & present.unsqueeze(-2)) | itself
    return (s.unsqueeze(-2) - s.unsqueeze(-1)).masked_fill(~compared, -math.inf), present
