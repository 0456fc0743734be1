"""The fast path of small agents: two perceptrons evaluated, and differentiated, by hand.

In networks of two layers of 64 the machine spends its time between the operations, not in them. So the forward pass writes
into buffers that are kept, and the backward pass is the chain rule written out. The plain path is :class:`ActorCritic` on
the same weights, and the oracle of this one: the same numbers up to float32's rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.control.actor_critic import ActorCritic
from bridle.control.heads import CategoricalHead, GaussianHead
from bridle.control.observations import Observations
from bridle.control.policy import Acted, Transitions
from bridle.learn.step import HandDifferentiated, Pullback, Seen, Slopes, plain_vjp

__all__ = ["SmallActorCritic", "by_hand"]

Array = NDArray[np.float32]
Activation = Literal["tanh", "relu"]

_TWO = np.float32(2)
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
        self._activation: Activation = activation
        self._weights: _Weights | None = None
        self._free: list[_Pass] = []
        self._lone: dict[int, list[_Layer]] = {}

    def vjp(self, units: Transitions) -> tuple[Seen, Pullback]:
        """Evaluate the actions taken, without a graph; the second half adds to the weights' gradients.

        See :func:`bridle.learn.step.accumulate`.
        """
        if not self._by_hand(units.observations):
            return plain_vjp(self, units)
        weights = self._present()
        if not all(parameter.requires_grad for parameter in weights.parameters):
            return plain_vjp(self, units)
        inputs, chosen = units.observations.vector.contiguous().numpy(), units.actions.numpy()
        work = self._take(len(chosen), weights)
        outputs = work.forward(weights, inputs, self._activation)
        logits, values = outputs[:-1], outputs[-1].copy()
        if isinstance(self.head, CategoricalHead):
            found: _Softmax | _Normal = _Softmax.of(logits)
            logp, entropy = found.logp[chosen, np.arange(len(chosen))], found.entropy()
        else:
            found = _Normal.of(logits, chosen, cast(Tensor, self.head.log_std).detach().numpy())
            logp, entropy = found.logp, found.entropy()

        def pull_back(slopes: Slopes) -> None:
            along = [None if slope is None else slope.numpy() for slope in (slopes.logp, slopes.entropy, slopes.value)]
            outputs[:] = 0
            if isinstance(found, _Softmax):
                found.gradient(outputs[:-1], chosen, along[0], along[1])
            else:
                spread, slope = cast(Tensor, self.head.log_std), found.gradient(outputs[:-1], along[0], along[1])
                if spread.requires_grad:
                    spread.grad = spread.new_zeros(spread.shape) if spread.grad is None else spread.grad
                    spread.grad += torch.from_numpy(slope)
            if along[2] is not None:
                outputs[-1] = along[2]
            work.backward(weights, inputs, outputs, self._activation, weights.gradients())
            self._free.append(work)
            del self._free[:-4]

        seen = Seen(logp=torch.from_numpy(logp), entropy=torch.from_numpy(entropy), value=torch.from_numpy(values))
        return seen, pull_back

    def act(self, observations: Observations, state: Tensor | None, draws: np.random.Generator | None) -> Acted:
        """Act in n states: by drawing, or without ``draws`` with the most likely actions."""
        if not self._by_hand(observations):
            return super().act(observations, state, draws)
        outputs = self._alone(self._present().actor, observations.vector)
        if isinstance(self.head, CategoricalHead):
            seen = _Softmax.of(outputs)
            chosen: NDArray[Any] = outputs.argmax(0) if draws is None else seen.draw(draws)
            logp = seen.logp[chosen, np.arange(len(chosen))]
            return Acted(actions=torch.from_numpy(chosen), logp=torch.from_numpy(logp), state=state)
        log_std = cast(Tensor, self.head.log_std).detach().numpy()
        actions = outputs.T.copy()
        if draws is not None:
            actions += np.exp(log_std) * draws.standard_normal(actions.shape).astype(np.float32)
        logp = _Normal.of(outputs, actions, log_std).logp
        return Acted(actions=torch.from_numpy(actions), logp=torch.from_numpy(logp), state=state)

    def values(self, observations: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return."""
        if not self._by_hand(observations) or torch.is_grad_enabled():
            return super().values(observations, state)
        return torch.from_numpy(self._alone(self._present().critic, observations.vector)[0])

    def _take(self, rows: int, weights: _Weights) -> _Pass:
        """Lend buffers for a pass over ``rows`` states, there and back."""
        for place, kept in enumerate(self._free):
            if kept.rows == rows:
                return self._free.pop(place)
        return _Pass(rows, weights)

    def _by_hand(self, observations: Observations) -> bool:
        vector = observations.vector
        return observations.mask is None and vector.dtype is torch.float32 and vector.device.type == "cpu"

    def _present(self) -> _Weights:
        """Return the weights as arrays; made anew where they have moved in memory or others stand in their place."""
        if self._weights is None or not self._weights.current():
            self._weights = _Weights(self.actor, self.critic, self._activation)
            self._free.clear()
            self._lone.clear()
        return self._weights

    def _alone(self, net: list[tuple[Array, Array]], vector: Float[Tensor, "n D"]) -> Array:
        """Run one net; return its outputs [A, n]."""
        rows = len(vector)
        if rows not in self._lone:
            if len(self._lone) >= 4:
                self._lone.clear()
            self._lone[rows] = [_Layer(rows, len(weight)) for weight, _ in net[:-1]]
        below: Array = vector.contiguous().numpy()
        for (weight, bias), hidden in zip(net, self._lone[rows], strict=False):
            np.matmul(below, weight.T, out=hidden.array)
            hidden.array += bias
            if self._activation == "tanh":
                hidden.array *= _TWO
            hidden.activate(self._activation)
            below = hidden.array
        weight, bias = net[-1]
        outputs: Array = (below @ weight.T + bias).T
        return outputs


@dataclass(frozen=True, slots=True)
class _Softmax:
    """π = softmax(z) of n states, actions along the first axis."""

    logp: Array
    """[A, n] log π, nats."""
    p: Array
    """[A, n]"""

    @classmethod
    def of(cls, z: Array) -> _Softmax:
        shifted = z - z.max(axis=0)
        p = np.exp(shifted)
        total = p.sum(axis=0)
        shifted -= np.log(total)
        p /= total
        return cls(shifted, p)

    def draw(self, draws: np.random.Generator) -> NDArray[np.int64]:
        """Draw by the inverse of the cumulative distribution; an action of probability 0 is never drawn."""
        cumulative = self.p.cumsum(axis=0)
        total = cumulative[-1]
        below = np.minimum(draws.random(total.shape) * total, np.nextafter(total, np.float32(0)))
        chosen: NDArray[np.int64] = (cumulative <= below).sum(axis=0)
        return chosen

    def entropy(self) -> Array:
        """H = −Σ_a π log π, with 0 log 0 = 0."""
        entropy: Array = -np.where(self.p > 0, self.p * self.logp, np.float32(0)).sum(axis=0)
        return entropy

    def gradient(self, dz: Array, chosen: NDArray[np.int64], logp: Array | None, entropy: Array | None) -> None:
        """Add to ``dz`` [A, n]: ∂/∂z of log π(a) is e_a − π, of H it is −π (log π + H)."""
        if logp is not None:
            dz -= self.p * logp
            dz[chosen, np.arange(len(chosen))] += logp
        if entropy is not None:
            dz -= np.where(self.p > 0, self.p * (self.logp + self.entropy()), np.float32(0)) * entropy


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

    def gradient(self, mean: Array, logp: Array | None, entropy: Array | None) -> Array:
        """Write ∂/∂μ to ``mean`` [A, n] and return ∂/∂log σ [A]: of log π they are z/σ and z² − 1, of H 0 and 1."""
        log_std = np.zeros(len(self.z), dtype=np.float32)
        if logp is not None:
            np.multiply(self.z, logp, out=mean)
            log_std += (mean * self.z).sum(axis=1) - logp.sum()
            mean *= np.exp(-self.log_std)[:, None]
        if entropy is not None:
            log_std += entropy.sum()
        return log_std


def by_hand(head: nn.Module) -> bool:
    """Whether actions of this head can be taken and differentiated by hand: discrete ones, or a plain Gaussian's."""
    gaussian = isinstance(head, GaussianHead) and head.log_std is not None and not head.squash
    return gaussian or isinstance(head, CategoricalHead)


class _Layer:
    """What a hidden layer holds for n states: the same memory as NumPy and as PyTorch see it, whole and in halves."""

    def __init__(self, rows: int, width: int, memory: Array | None = None) -> None:
        own = np.empty(rows * width, dtype=np.float32) if memory is None else memory
        self.array: Array = own[: rows * width].reshape(rows, width)
        self.tensor = torch.from_numpy(self.array)
        self.halves = self.array[:, : width // 2], self.array[:, width // 2 :]

    def activate(self, activation: Activation) -> None:
        """Apply the activation in place: tanh y = 2 σ(2y) − 1, where 2y is what is here; PyTorch's σ is faster than tanh."""
        if activation == "relu":
            np.maximum(self.array, np.float32(0), out=self.array)
            return
        self.tensor.sigmoid_()
        self.array *= _TWO
        self.array -= np.float32(1)

    def slope(self, activation: Activation) -> Array:
        """Return the activation's slope, 1 − h² or [h > 0], written over what is here."""
        if activation == "relu":
            return np.sign(self.array, out=self.array)
        np.multiply(self.array, self.array, out=self.array)
        return np.subtract(np.float32(1), self.array, out=self.array)


class _Weights:
    """The weights of actor and critic, layer by layer.

    A pass through both treats them as one net: a hidden layer holds the actor's units and then the critic's. The first layer's
    weights stand on top of each other, the last ones' side by side with zeros between. What feeds a tanh is doubled here, once
    for all states.
    """

    def __init__(self, actor: nn.Module, critic: nn.Module, activation: Activation) -> None:
        # a module looks its parameters up here; asking the module itself would take most of a small pass's time
        homes = [layer._parameters for net in (actor, critic) for layer in _linears(net)]
        places = [(home, name, cast(Tensor, home[name])) for home in homes for name in ("weight", "bias")]
        self.parameters = [parameter for _, _, parameter in places]
        self._places = [(*place, place[-1].data_ptr()) for place in places]
        self._known: list[Tensor] = []
        self._gradients: list[Array] = []
        self.actor, self.critic = (
            [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in _linears(net)]
            for net in (actor, critic)
        )
        self.scale = _TWO if activation == "tanh" else np.float32(1)
        first, last = self.actor[0][0], self.actor[-1][0]
        self.first = np.empty((2 * len(first), first.shape[1]), dtype=np.float32)
        self.inner = [(one, other) for (one, _), (other, _) in zip(self.actor, self.critic, strict=True)][1:-1]
        self.scaled = [(np.empty_like(one), np.empty_like(other)) for one, other in self.inner]
        self.biases = [np.empty(2 * len(bias), dtype=np.float32) for _, bias in self.actor[:-1]]
        self.bias_tensors = [torch.from_numpy(bias) for bias in self.biases]
        self.last = np.zeros((len(last) + 1, 2 * last.shape[1]), dtype=np.float32)
        self.last_bias = np.empty((len(last) + 1, 1), dtype=np.float32)

    def current(self) -> bool:
        """Whether the weights are still the layers' own and lie where they lay; a flat optimiser may move some of them."""
        return all(home[name] is own and own.data_ptr() == place for home, name, own, place in self._places)

    def gradients(self) -> list[Array]:
        """Return the parameters' gradients as arrays to add to; zero where there were none."""
        present = [parameter.grad for parameter in self.parameters]
        if not self._gradients or any(one is not other for one, other in zip(present, self._known, strict=True)):
            for parameter in self.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._known = [cast(Tensor, parameter.grad) for parameter in self.parameters]
            self._gradients = [gradient.numpy() for gradient in self._known]
        return self._gradients

    def join(self) -> None:
        """Bring the two nets' present weights together."""
        half = len(self.first) // 2
        np.multiply(self.actor[0][0], self.scale, out=self.first[:half])
        np.multiply(self.critic[0][0], self.scale, out=self.first[half:])
        for own, scaled in zip(self.inner, self.scaled, strict=True):
            for weight, copy in zip(own, scaled, strict=True):
                np.multiply(weight, self.scale, out=copy)
        for (_, one), (_, other), bias in zip(self.actor, self.critic, self.biases, strict=False):
            np.multiply(one, self.scale, out=bias[: len(one)])
            np.multiply(other, self.scale, out=bias[len(one) :])
        width = self.last.shape[1] // 2
        self.last[:-1, :width] = self.actor[-1][0]
        self.last[-1:, width:] = self.critic[-1][0]
        self.last_bias[:-1, 0] = self.actor[-1][1]
        self.last_bias[-1, 0] = self.critic[-1][1][0]


class _Pass:
    """What a pass over n states through both nets writes, there and back.

    Half of its speed is memory that fits a cache: the backward pass writes over the hidden layers as it has read them.
    """

    def __init__(self, rows: int, weights: _Weights) -> None:
        self.rows = rows
        widths = [len(bias) for bias in weights.biases]
        self.hidden = [_Layer(rows, width) for width in widths]
        scratch = [np.empty(rows * max(widths), dtype=np.float32) for _ in range(2)]
        self.slopes = [_Layer(rows, width, scratch[depth % 2]) for depth, width in enumerate(widths)]
        self.outputs = np.empty((len(weights.last), rows), dtype=np.float32)

    def forward(self, weights: _Weights, vector: Array, activation: Activation) -> Array:
        """Fill the hidden layers; return the outputs [A + 1, n], the last row the value."""
        weights.join()
        for depth, (hidden, bias) in enumerate(zip(self.hidden, weights.bias_tensors, strict=True)):
            if depth == 0:
                np.matmul(vector, weights.first.T, out=hidden.array)
            else:
                below = self.hidden[depth - 1].halves
                for one, weight, out in zip(below, weights.scaled[depth - 1], hidden.halves, strict=True):
                    np.matmul(one, weight.T, out=out)
            hidden.tensor.add_(bias)
            hidden.activate(activation)
        np.matmul(weights.last, self.hidden[-1].array.T, out=self.outputs)
        self.outputs += weights.last_bias
        return self.outputs

    def backward(
        self, weights: _Weights, vector: Array, outputs: Array, activation: Activation, gradients: list[Array]
    ) -> None:
        """Add to the gradients of all weights and biases, the actor's and then the critic's; once."""
        half = len(gradients) // 2
        actor, critic = gradients[:half], gradients[half:]
        own, other = self.hidden[-1].halves
        actor[-2] += outputs[:-1] @ own
        critic[-2] += outputs[-1:] @ other
        sums = outputs.sum(axis=1)
        actor[-1] += sums[:-1]
        critic[-1] += sums[-1:]
        for depth in reversed(range(len(self.hidden))):
            slope, place = self.slopes[depth], 2 * depth
            if depth == len(self.hidden) - 1:
                np.matmul(outputs.T, weights.last, out=slope.array)
            else:
                above = self.slopes[depth + 1].halves
                for one, weight, out in zip(above, weights.inner[depth], slope.halves, strict=True):
                    np.matmul(one, weight, out=out)
            slope.array *= self.hidden[depth].slope(activation)
            sums = torch.sum(slope.tensor, 0).numpy()
            width = len(sums) // 2
            actor[place + 1] += sums[:width]
            critic[place + 1] += sums[width:]
            if depth == 0:
                both = vector.T @ slope.array
                actor[0] += both[:, :width].T
                critic[0] += both[:, width:].T
            else:
                one, other = slope.halves
                under, beside = self.hidden[depth - 1].halves
                actor[place] += one.T @ under
                critic[place] += other.T @ beside


def _linears(net: nn.Module) -> list[nn.Linear]:
    return [layer for layer in cast(nn.Sequential, net) if isinstance(layer, nn.Linear)]
