"""Small agents acting through a rollout: what can be done once for all of its steps is."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from bridle.control import compiled
from bridle.control.observations import Observations
from bridle.control.perceptrons import Frozen
from bridle.control.policy import Acting, ControlPolicy
from bridle.control.small_heads import Normal

__all__ = ["Choosing", "Drawing"]


class Choosing(Acting):
    """Discrete actions by the Gumbel-max trick, all noise drawn at once: argmax_a (z_a + g_a) is a draw of softmax(z).

    Source: Maddison, Tarlow & Minka 2014, "A* sampling", §2.
    """

    def __init__(
        self,
        policy: ControlPolicy,
        draws: np.random.Generator,
        *,
        actor: Frozen | compiled.Frozen,
        width: int,
        steps: int,
        rows: int,
    ) -> None:
        super().__init__(policy, draws)
        self._actor = actor
        self._gumbel = draws.gumbel(size=(steps, rows, width)).astype(np.float32)
        self._logits = torch.empty(steps, rows, width, dtype=torch.float32)
        self._chosen = np.empty((steps, rows), dtype=np.int64)
        self._at = 0
        logits, arrays = self._logits.unbind(), self._logits.numpy()
        self._each = list(zip(logits, arrays, self._gumbel, self._chosen, strict=True))

    def act(self, observations: Observations, state: Tensor | None) -> tuple[NDArray[Any], Tensor | None]:
        """Draw one action in each of n states."""
        out, logits, noisy, chosen = self._each[self._at]
        self._at += 1
        self._actor.outputs(observations.vector.contiguous(), out)
        noisy += logits
        return noisy.argmax(axis=1, out=chosen), state

    def actions(self) -> Tensor:
        """[n, T]: all actions so far."""
        return torch.from_numpy(self._chosen[: self._at].T.copy())

    def logp(self) -> Float[Tensor, "n T"]:
        """[n, T] log-probability of each under the distribution that it was drawn from, nats."""
        logp = torch.log_softmax(self._logits[: self._at], -1)
        chosen = torch.from_numpy(self._chosen[: self._at])
        return logp.gather(-1, chosen[..., None])[..., 0].T.contiguous()


class Drawing(Acting):
    """Gaussian actions, all noise drawn at once."""

    def __init__(
        self,
        policy: ControlPolicy,
        draws: np.random.Generator,
        *,
        actor: Frozen | compiled.Frozen,
        log_std: Float[Tensor, " A"],
        steps: int,
        rows: int,
    ) -> None:
        super().__init__(policy, draws)
        self._actor, self._log_std = actor, log_std
        noise = draws.standard_normal((steps, rows, len(log_std))).astype(np.float32)
        noise *= log_std.exp().numpy()
        self._noise = noise
        self._mean = torch.from_numpy(np.empty_like(noise))
        self._at = 0
        mean, arrays = self._mean.unbind(), self._mean.numpy()
        self._each = list(zip(mean, arrays, noise, strict=True))

    def act(self, observations: Observations, state: Tensor | None) -> tuple[NDArray[Any], Tensor | None]:
        """Draw μ + σ ε."""
        out, mean, noise = self._each[self._at]
        self._at += 1
        self._actor.outputs(observations.vector.contiguous(), out)
        noise += mean
        return noise, state

    def actions(self) -> Tensor:
        """[n, T, A]: all actions so far."""
        return torch.from_numpy(self._noise[: self._at].swapaxes(0, 1).copy())

    def logp(self) -> Float[Tensor, "n T"]:
        """[n, T] log-probability of each under the distribution that it was drawn from, nats."""
        shape, width = self._noise[: self._at].shape[:2], len(self._log_std)
        mean = self._mean[: self._at].reshape(-1, width)
        drawn = torch.from_numpy(self._noise[: self._at].reshape(-1, width))
        logp = Normal(mean.T, drawn, self._log_std).logp
        return logp.view(shape).T.contiguous()
