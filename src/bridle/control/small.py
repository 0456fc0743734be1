"""The fast path of small agents: two perceptrons evaluated, and differentiated, by hand.

The plain path is :class:`ActorCritic` on the same weights, and the oracle of this one: the same numbers up to float32's
rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.control import compiled, small_heads
from bridle.control.acting import Choosing, Drawing
from bridle.control.actor_critic import ActorCritic
from bridle.control.descending import Descending
from bridle.control.forms import Activation, Form, Place, places_of, plain
from bridle.control.observations import Observations
from bridle.control.perceptrons import Perceptrons
from bridle.control.policy import Acted, Acting, Transitions
from bridle.learn.descent import ClippedTerms, Descended
from bridle.learn.minibatches import Minibatches
from bridle.learn.optim import FlatAdam
from bridle.learn.step import HandDifferentiated, Pullback, Seen, Slopes, plain_vjp

__all__ = ["SmallActorCritic"]

_BLOCK = 512
"""States valued at once, so that their layers stay in a cache."""


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
        :func:`~bridle.control.heads.by_hand` is true of.
        """
        super().__init__(actor=actor, critic=critic, head=head)
        places = [places_of(cast(nn.Sequential, net)) for net in (actor, critic)]
        self._begin([(plain(activation, len(own) // 2), own) for own in places])

    def _begin(self, nets: Sequence[tuple[Form, Sequence[Place]]]) -> None:
        """Take hold of the parameters of actor and critic."""
        self._nets = Perceptrons(nets)
        home, name = nets[0][1][-1]
        self._width = len(home[name])
        self._descending: Descending | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of a copy what points at the weights of this one."""
        return self.__dict__ | {"_descending": None}

    def vjp(self, units: Transitions) -> tuple[Seen, Pullback]:
        """Evaluate the actions taken, without a graph; the second half adds to the weights' gradients.

        See :func:`bridle.learn.step.accumulate`.
        """
        if not (self._by_hand(units.observations) and self._nets.learn):
            return plain_vjp(self, units)
        runs = self._nets.run(units.observations.vector.contiguous())
        outputs, values = [outputs for run in runs for outputs in run.outputs]
        heads = small_heads if compiled.library is None else compiled
        log_std = self._log_std()
        found: Any = (
            heads.Softmax(outputs, units.actions) if log_std is None else heads.Normal(outputs, units.actions, log_std)
        )

        def pull_back(slopes: Slopes) -> None:
            to_logp, to_entropy, to_value = map(_plain, (slopes.logp, slopes.entropy, slopes.value))
            to_actor = found.gradient(to_logp, to_entropy)
            if log_std is not None:
                self._spread(found.spread)
            left = [to_actor, torch.zeros_like(values) if to_value is None else to_value[None]]
            for run in runs:
                run.pull_back([left.pop(0) for _ in run.outputs])

        return Seen(logp=found.logp, entropy=found.entropy, value=values[0].clone()), pull_back

    _known_vjp = vjp

    def descend(self, units: Transitions, parts: Minibatches, terms: ClippedTerms, adam: FlatAdam) -> Descended | None:
        """Take steps in one compiled call; see :class:`bridle.learn.descent.Descends`."""
        log_std = self.head._parameters.get("log_std")
        learn = self._nets.learn and (log_std is None or log_std.requires_grad) and self._evaluates_plainly()
        stack = self._nets.stack() if learn and self._by_hand(units.observations) else None
        if stack is None:
            return super().descend(units, parts, terms, adam)
        if self._descending is None or self._descending.stack is not stack:
            self._descending = Descending(stack)
        return self._descending.steps(units, parts, log_std, terms, adam)

    def act(self, observations: Observations, state: Tensor | None, draws: np.random.Generator | None) -> Acted:
        """Act in n states: by drawing, or without ``draws`` with the most likely actions."""
        if not self._by_hand(observations):
            return super().act(observations, state, draws)
        outputs = self._nets.outputs(0, observations.vector.contiguous())
        log_std = self._log_std()
        if log_std is None:
            logs = torch.log_softmax(outputs, 0)
            chosen = logs.argmax(0) if draws is None else _drawn(logs.exp().numpy(), draws)
            return Acted(actions=chosen, logp=logs.gather(0, chosen[None])[0], state=state)
        chosen = outputs.T.clone(memory_format=torch.contiguous_format)
        if draws is not None:
            noise = torch.from_numpy(draws.standard_normal(tuple(chosen.shape)).astype(np.float32))
            chosen += noise.mul_(log_std.exp())
        return Acted(actions=chosen, logp=small_heads.Normal(outputs, chosen, log_std).logp, state=state)

    def acting(self, first: Observations, steps: int, draws: np.random.Generator) -> Acting:
        """Begin a rollout of ``steps`` steps; all states are of the form of the ``first`` ones."""
        if not self._by_hand(first):
            return super().acting(first, steps, draws)
        actor, log_std = self._nets.frozen(0, len(first)), self._log_std()
        if log_std is None:
            return Choosing(self, draws, actor=actor, width=self._width, steps=steps, rows=len(first))
        return Drawing(self, draws, actor=actor, log_std=log_std, steps=steps, rows=len(first))

    def play(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Play actions as they are: what is by hand is not squashed."""
        return actions

    def values(self, observations: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return."""
        if not self._by_hand(observations) or torch.is_grad_enabled():
            return super().values(observations, state)
        vector = observations.vector.contiguous()
        parts = [self._nets.outputs(1, vector[at : at + _BLOCK])[0] for at in range(0, len(vector), _BLOCK)]
        return torch.cat(parts) if parts else vector.new_empty(0)

    def _log_std(self) -> Float[Tensor, " A"] | None:
        """Return log σ [A] of Gaussian actions; None of discrete ones."""
        spread = self.head._parameters.get("log_std")
        return None if spread is None else spread.detach()

    def _spread(self, slope: Float[Tensor, " A"]) -> None:
        """Add to the gradient of log σ."""
        log_std = cast(nn.Parameter, self.head.log_std)
        if log_std.requires_grad:
            log_std.grad = torch.zeros_like(log_std) if log_std.grad is None else log_std.grad
            log_std.grad += slope

    def _by_hand(self, observations: Observations) -> bool:
        vector = observations.vector
        return observations.mask is None and vector.dtype is torch.float32 and vector.device.type == "cpu"


def _plain(slope: Float[Tensor, " n"] | None) -> Float[Tensor, " n"] | None:
    """Lay slopes as the networks read them: float32 numbers one after the other."""
    return None if slope is None else slope.to(torch.float32).contiguous()


def _drawn(p: NDArray[np.float32], draws: np.random.Generator) -> Int[Tensor, " n"]:
    """Draw from p [A, n] by the inverse of the cumulative distribution; an action of probability 0 is never drawn."""
    cumulative = p.cumsum(axis=0)
    total = cumulative[-1]
    below = np.minimum(draws.random(total.shape) * total, np.nextafter(total, np.float32(0)))
    return torch.from_numpy((cumulative <= below).sum(axis=0))
