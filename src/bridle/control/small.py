"""The fast path of small agents: two perceptrons evaluated, and differentiated, by hand.

The plain path is :class:`ActorCritic` on the same weights, and the oracle of this one: the same numbers up to float32's
rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.control.actor_critic import ActorCritic
from bridle.control.heads import CategoricalHead, GaussianHead
from bridle.control.observations import Observations
from bridle.control.perceptrons import Activation, Array, Perceptrons
from bridle.control.policy import Acted, Transitions
from bridle.learn.step import HandDifferentiated, Pullback, Seen, Slopes, plain_vjp

__all__ = ["SmallActorCritic", "by_hand"]

_BLOCK = 512
"""States valued at once, so that their layers stay in a cache."""
_HALF_LOG_TAU = 0.5 * math.log(2 * math.pi)


class SmallActorCritic(ActorCritic, HandDifferentiated):
    """An actor and a critic, perceptrons of their own over a vector, for discrete or Gaussian actions.

    What it cannot do by hand (another device, action masks, frozen weights, a second derivative) it does as
    :class:`ActorCritic` does.
    """

    def __init__(
        self,
        *,
        actor: nn.Module,
        critic: nn.Module,
        head: nn.Module,
        activation: Activation,
    ) -> None:
        """Take perceptrons of the same hidden layers, one at least, each followed by ``activation``; and a head that
        :func:`by_hand` is true of.
        """
        super().__init__(actor=actor, critic=critic, head=head)
        self._nets = Perceptrons((actor, critic), activation)

    def vjp(self, units: Transitions) -> tuple[Seen, Pullback]:
        """Evaluate the actions taken, without a graph; the second half adds to the weights' gradients.

        See :func:`bridle.learn.step.accumulate`.
        """
        if not (self._by_hand(units.observations) and self._nets.learn):
            return plain_vjp(self, units)
        inputs, chosen = units.observations.vector.contiguous().numpy(), units.actions.numpy()
        with torch.no_grad():
            runs = self._nets.run(inputs)
        outputs, (values,) = [outputs for run in runs for outputs in run.outputs]
        log_std = self._log_std()
        found = _Softmax.of(outputs) if log_std is None else _Normal.of(outputs, chosen, log_std)

        def pull_back(slopes: Slopes) -> None:
            logp, entropy, value = (
                None if slope is None else slope.numpy() for slope in (slopes.logp, slopes.entropy, slopes.value)
            )
            to_critic = np.zeros((1, len(chosen)), dtype=np.float32) if value is None else value[None]
            if isinstance(found, _Softmax):
                to_actor = found.gradient(chosen, logp, entropy)
            else:
                to_actor, spread = found.gradient(logp, entropy)
                self._spread(spread)
            left = [to_actor, to_critic]
            with torch.no_grad():
                for run in runs:
                    run.pull_back([left.pop(0) for _ in run.outputs])

        logp = found.of_actions(chosen) if isinstance(found, _Softmax) else found.logp
        entropy, value = torch.from_numpy(found.entropy()), torch.from_numpy(values.copy())
        return Seen(logp=torch.from_numpy(logp), entropy=entropy, value=value), pull_back

    def act(self, observations: Observations, state: Tensor | None, draws: np.random.Generator | None) -> Acted:
        """Act in n states: by drawing, or without ``draws`` with the most likely actions."""
        if not self._by_hand(observations):
            return super().act(observations, state, draws)
        outputs = self._nets.outputs(0, observations.vector.contiguous().numpy())
        log_std = self._log_std()
        if log_std is None:
            seen = _Softmax.of(outputs)
            chosen: NDArray[Any] = outputs.argmax(0) if draws is None else seen.draw(draws)
            logp = seen.of_actions(chosen)
        else:
            chosen = outputs.T.copy()
            if draws is not None:
                chosen += np.exp(log_std) * draws.standard_normal(chosen.shape).astype(np.float32)
            logp = _Normal.of(outputs, chosen, log_std).logp
        return Acted(actions=torch.from_numpy(chosen), logp=torch.from_numpy(logp), state=state)

    def values(self, observations: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return."""
        if not self._by_hand(observations) or torch.is_grad_enabled():
            return super().values(observations, state)
        vector = observations.vector.contiguous().numpy()
        parts = [self._nets.outputs(1, vector[at : at + _BLOCK])[0] for at in range(0, len(vector), _BLOCK)]
        return torch.from_numpy(np.concatenate(parts) if parts else np.empty(0, dtype=np.float32))

    def _log_std(self) -> Array | None:
        """Return log σ [A] of Gaussian actions; None of discrete ones."""
        spread = self.head._parameters.get("log_std")
        return None if spread is None else spread.detach().numpy()

    def _spread(self, slope: Array) -> None:
        """Add to the gradient of log σ."""
        log_std = cast(nn.Parameter, self.head.log_std)
        if log_std.requires_grad:
            log_std.grad = torch.zeros_like(log_std) if log_std.grad is None else log_std.grad
            log_std.grad += torch.from_numpy(slope)

    def _by_hand(self, observations: Observations) -> bool:
        vector = observations.vector
        return observations.mask is None and vector.dtype is torch.float32 and vector.device.type == "cpu"


@dataclass(frozen=True, slots=True)
class _Softmax:
    """π = softmax(z) of n states, actions along the first axis."""

    logp: Array
    """[A, n] log π, nats."""
    p: Array
    """[A, n]"""

    @classmethod
    def of(cls, z: Array) -> _Softmax:
        logp: Array = torch.log_softmax(torch.from_numpy(z), 0).numpy()
        return cls(logp, np.exp(logp))

    def draw(self, draws: np.random.Generator) -> NDArray[np.int64]:
        """Draw by the inverse of the cumulative distribution; an action of probability 0 is never drawn."""
        cumulative = self.p.cumsum(axis=0)
        total = cumulative[-1]
        below = np.minimum(draws.random(total.shape) * total, np.nextafter(total, np.float32(0)))
        chosen: NDArray[np.int64] = (cumulative <= below).sum(axis=0)
        return chosen

    def of_actions(self, chosen: NDArray[np.int64]) -> Array:
        """Return log π of an action [n] in each state."""
        return self.logp[chosen, np.arange(len(chosen))]

    def entropy(self) -> Array:
        """H = −Σ_a π log π; log π is finite wherever the logits are, so a π of 0 adds nothing."""
        entropy: Array = np.negative(np.add.reduce(self.p * self.logp, axis=0))
        return entropy

    def gradient(self, chosen: NDArray[np.int64], logp: Array | None, entropy: Array | None) -> Array:
        """Return ∂/∂z [A, n]: of log π(a) it is e_a − π, of H it is −π (log π + H)."""
        if logp is None:
            dz = np.zeros_like(self.p)
        else:
            dz = np.subtract(np.equal(np.arange(len(self.p))[:, None], chosen), self.p)
            dz *= logp
        if entropy is not None:
            dz -= self.p * (self.logp + self.entropy()) * entropy
        return dz


@dataclass(frozen=True, slots=True)
class _Normal:
    """N(μ, σ²) of n actions of A coordinates, coordinates along the first axis."""

    logp: Array
    """[n] log π(a | s), nats."""
    z: Array
    """[A, n] (a − μ)/σ."""
    log_std: Array
    """[A] log σ."""

    @classmethod
    def of(cls, mean: Array, actions: Array, log_std: Array) -> _Normal:
        z = (actions.T - mean) * np.exp(-log_std)[:, None]
        logp = (z * z).sum(axis=0) * np.float32(-0.5) - np.float32(log_std.sum() + len(log_std) * _HALF_LOG_TAU)
        return cls(logp, z, log_std)

    def entropy(self) -> Array:
        """H = Σ_i [log σ_i + ½ log 2πe], the same in every state."""
        return np.full(self.z.shape[1], (self.log_std + np.float32(_HALF_LOG_TAU + 0.5)).sum(), dtype=np.float32)

    def gradient(self, logp: Array | None, entropy: Array | None) -> tuple[Array, Array]:
        """Return ∂/∂μ [A, n] and ∂/∂log σ [A]: of log π they are z/σ and z² − 1, of H 0 and 1."""
        mean, log_std = np.zeros_like(self.z), np.zeros(len(self.z), dtype=np.float32)
        if logp is not None:
            np.multiply(self.z, logp, out=mean)
            log_std += (mean * self.z).sum(axis=1) - logp.sum()
            mean *= np.exp(-self.log_std)[:, None]
        if entropy is not None:
            log_std += entropy.sum()
        return mean, log_std


def by_hand(head: nn.Module) -> bool:
    """Whether actions of this head can be taken and differentiated by hand: discrete ones, or a plain Gaussian's."""
    gaussian = isinstance(head, GaussianHead) and head.log_std is not None and not head.squash
    return gaussian or isinstance(head, CategoricalHead)
