"""How far AdamW moves a weight in one step: whether that can leave float32's range is known before it is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["SAFE", "after_step", "reach"]

SAFE = 1e38
"""Weights that stay below this are finite: float32 and bfloat16 reach to 3.4e38."""


def reach(beta1: float, beta2: float) -> float:
    """Return c with |Δ| ≤ c · lr for every step of Adam, whatever the gradients were; infinite where there is none.

    With g_i the gradients up to step t, by Cauchy and Schwarz
        |m_t| = (1 − β₁) |Σ β₁^{t−i} g_i| ≤ (1 − β₁) (Σ q^{t−i})^{1/2} (Σ β₂^{t−i} g_i²)^{1/2}
              ≤ (1 − β₁) / ((1 − q)(1 − β₂))^{1/2} · v_t^{1/2}
    for q = β₁²/β₂ < 1, and the corrections of the bias, (1 − β₂^t)^{1/2} / (1 − β₁^t), are at most 1/(1 − β₁).
    """
    if beta1**2 >= beta2 and beta1:
        return math.inf
    q = beta1**2 / beta2 if beta1 else 0.0
    return 1 / math.sqrt((1 - q) * (1 - beta2))


def after_step(
    slots: Mapping[str, Tensor], *, lr: float, beta1: float, beta2: float, eps: float, decay: float, step: int
) -> Tensor:
    """Return the weights after AdamW's step number ``step`` (from 1): Loshchilov & Hutter 2019, Algorithm 2, as written.

    Args:
        slots: "value", "grad" (after clipping), "exp_avg" and "exp_avg_sq" before the step, all of one shape.
        lr: learning rate.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        eps: added to the root of the second moment.
        decay: decoupled weight decay.
        step: t.
    """
    value, grad = slots["value"], slots["grad"]
    m = beta1 * slots["exp_avg"] + (1 - beta1) * grad
    v = beta2 * slots["exp_avg_sq"] + (1 - beta2) * grad.square()
    rate = torch.tensor(lr / (1 - beta1**step), dtype=value.dtype, device=value.device)  # which may overflow by itself
    return value * (1 - lr * decay) - rate * m / (v.sqrt() / math.sqrt(1 - beta2**step) + eps)
