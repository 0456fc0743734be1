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
from bridle.control.perceptrons import Activation, Array, Frozen, Perceptrons
from bridle.control.policy import Acted, Acting, Transitions
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
        self._width = cast(nn.Linear, cast(nn.Sequential, actor)[-1]).out_features

    def vjp(self, units: Transitions) -> tuple[Seen, Pullback]:
        """Evaluate the actions taken, without a graph; the second half adds to the weights' gradients.

        See :func:`bridle.learn.step.accumulate`.
        """
        if not (self._by_hand(units.observations) and self._nets.learn):
            return plain_vjp(self, units)
        inputs, chosen = units.observations.vector.contiguous().numpy(), units.actions.numpy()
        runs = self._nets.run(inputs)
        outputs, (values,) = [outputs for run in runs for outputs in run.outputs]
        log_std = self._log_std()
        found = _Softmax.of(outputs) if log_std is None else _Normal.of(outputs, chosen, log_std)

        def pull_back(slopes: Slopes) -> None:
            logp = None if slopes.logp is None else slopes.logp.numpy()
            entropy = None if slopes.entropy is None else slopes.entropy.numpy()
            to_critic = np.zeros_like(values) if slopes.value is None else slopes.value.numpy()
            if isinstance(found, _Softmax):
                to_actor = found.gradient(chosen, logp, entropy)
            else:
                to_actor, spread = found.gradient(logp, entropy)
                self._spread(spread)
            left = [to_actor, to_critic[None]]
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

    def acting(self, first: Observations, steps: int, draws: np.random.Generator) -> Acting:
        """Begin a rollout of ``steps`` steps; all states are of the form of the ``first`` ones."""
        if not self._by_hand(first):
            return super().acting(first, steps, draws)
        actor, log_std = self._nets.frozen(0, len(first)), self._log_std()
        if log_std is None:
            return _Choosing(self, draws, actor=actor, width=self._width, steps=steps, rows=len(first))
        return _Drawing(self, draws, actor=actor, log_std=log_std, steps=steps, rows=len(first))

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


class _Choosing(Acting):
    """Discrete actions by the Gumbel-max trick, all noise drawn at once: argmax_a (z_a + g_a) is a draw of softmax(z).

    Source: Maddison, Tarlow & Minka 2014, "A* sampling", §2.
    """

    def __init__(
        self, policy: ActorCritic, draws: np.random.Generator, *, actor: Frozen, width: int, steps: int, rows: int
    ) -> None:
        super().__init__(policy, draws)
        self._actor = actor
        self._gumbel = draws.gumbel(size=(steps, rows, width)).astype(np.float32)
        self._logits = np.empty((steps, rows, width), dtype=np.float32)
        self._chosen = np.empty((steps, rows), dtype=np.int64)
        self._at = 0

    def act(self, observations: Observations, state: Tensor | None) -> tuple[NDArray[Any], Tensor | None]:
        """Draw one action in each of n states."""
        at = self._at
        self._at += 1
        logits, noisy = self._logits[at], self._gumbel[at]
        self._actor.outputs(observations.vector.numpy(), logits)
        noisy += logits
        return noisy.argmax(axis=1, out=self._chosen[at]), state

    def actions(self) -> Tensor:
        """[n, T]: all actions so far."""
        return torch.from_numpy(self._chosen[: self._at].T.copy())

    def logp(self) -> Float[Tensor, "n T"]:
        """[n, T] log-probability of each under the distribution that it was drawn from, nats."""
        logp = torch.log_softmax(torch.from_numpy(self._logits[: self._at]), -1)
        chosen = torch.from_numpy(self._chosen[: self._at])
        return logp.gather(-1, chosen[..., None])[..., 0].T.contiguous()


class _Drawing(Acting):
    """Gaussian actions, all noise drawn at once."""

    def __init__(
        self, policy: ActorCritic, draws: np.random.Generator, *, actor: Frozen, log_std: Array, steps: int, rows: int
    ) -> None:
        super().__init__(policy, draws)
        self._actor, self._log_std = actor, log_std
        noise = draws.standard_normal((steps, rows, len(log_std))).astype(np.float32)
        noise *= np.exp(log_std)
        self._noise = noise
        self._mean = np.empty_like(noise)
        self._at = 0

    def act(self, observations: Observations, state: Tensor | None) -> tuple[NDArray[Any], Tensor | None]:
        """Draw μ + σ ε."""
        at = self._at
        self._at += 1
        self._actor.outputs(observations.vector.numpy(), self._mean[at])
        self._noise[at] += self._mean[at]
        return self._noise[at], state

    def actions(self) -> Tensor:
        """[n, T, A]: all actions so far."""
        return torch.from_numpy(self._noise[: self._at].swapaxes(0, 1).copy())

    def logp(self) -> Float[Tensor, "n T"]:
        """[n, T] log-probability of each under the distribution that it was drawn from, nats."""
        shape, width = self._noise[: self._at].shape[:2], len(self._log_std)
        mean, drawn = (numbers[: self._at].reshape(-1, width) for numbers in (self._mean, self._noise))
        logp = _Normal.of(mean.T, drawn, self._log_std).logp
        return torch.from_numpy(logp.reshape(shape).T.copy())


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
