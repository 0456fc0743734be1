"""What a small agent's outputs come to, and the way back, by hand: the oracle of what ``small.c`` does of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Normal", "Softmax"]

_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class Softmax:
    """π = softmax(z) of n states, and the actions chosen there."""

    def __init__(self, z: Float[Tensor, "A n"], chosen: Int[Tensor, " n"]) -> None:
        """Find log π(a) and the entropy [n], nats."""
        logp = torch.log_softmax(z, 0)
        self._chosen, self._logp = chosen.numpy(), logp.numpy()
        self._p = np.exp(self._logp)
        self.logp: Float[Tensor, " n"] = torch.from_numpy(self._logp[self._chosen, np.arange(len(self._chosen))])
        # log π is finite wherever the logits are, so a π of 0 adds nothing
        self._entropy = np.negative(np.add.reduce(self._p * self._logp, axis=0))
        self.entropy: Float[Tensor, " n"] = torch.from_numpy(self._entropy)

    def gradient(self, logp: Float[Tensor, " n"] | None, entropy: Float[Tensor, " n"] | None) -> Float[Tensor, "A n"]:
        """Return ∂/∂z: of log π(a) it is e_a − π, of H it is −π (log π + H)."""
        if logp is None:
            dz = np.zeros_like(self._p)
        else:
            dz = np.subtract(np.equal(np.arange(len(self._p))[:, None], self._chosen), self._p)
            dz *= logp.numpy()
        if entropy is not None:
            dz -= self._p * (self._logp + self._entropy) * entropy.numpy()
        return torch.from_numpy(dz)


class Normal:
    """N(μ, σ²) of n actions of A coordinates."""

    def __init__(self, mean: Float[Tensor, "A n"], actions: Float[Tensor, "n A"], log_std: Float[Tensor, " A"]) -> None:
        """Find log π(a | s) and the entropy [n], nats; the entropy is the same in every state."""
        self._log_std, n = log_std.numpy(), mean.shape[1]
        self._z = (actions.numpy().T - mean.numpy()) * np.exp(-self._log_std)[:, None]
        still = np.float32(self._log_std.sum() + len(self._log_std) * _HALF_LOG_TAU)
        self.logp: Float[Tensor, " n"] = torch.from_numpy((self._z * self._z).sum(axis=0) * np.float32(-0.5) - still)
        self.entropy: Float[Tensor, " n"] = (log_std + (_HALF_LOG_TAU + 0.5)).sum().expand(n).clone()
        self.spread: Float[Tensor, " A"] = torch.zeros_like(log_std)
        """[A] ∂/∂ log σ, once :meth:`gradient` has been called"""

    def gradient(self, logp: Float[Tensor, " n"] | None, entropy: Float[Tensor, " n"] | None) -> Float[Tensor, "A n"]:
        """Return ∂/∂μ and fill ``spread``: of log π they are z/σ and z² − 1, of H 0 and 1."""
        mean, spread = np.zeros_like(self._z), self.spread.numpy()
        if logp is not None:
            along = logp.numpy()
            np.multiply(self._z, along, out=mean)
            spread += (mean * self._z).sum(axis=1) - along.sum()
            mean *= np.exp(-self._log_std)[:, None]
        if entropy is not None:
            spread += entropy.numpy().sum()
        return torch.from_numpy(mean)
