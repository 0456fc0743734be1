"""What collecting and learning ask of a policy in this world, and the units that they hand to it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from bridle.batch import Evaluation
from bridle.control.distributions import Distribution
from bridle.control.observations import Observations, pick

__all__ = ["Acted", "Acting", "ControlPolicy", "Sequences", "Transitions"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Transitions:
    """The units of a memoryless policy: one action in one state each."""

    observations: Observations
    """[N, …] encoded and normalised."""
    actions: Tensor
    """[N] or [N, A]: the policy's own, before squashing and clipping."""

    def __len__(self) -> int:
        """Return the number of units, N."""
        return len(self.actions)

    @property
    def sizes(self) -> Int[Tensor, " N"]:
        """[N] one action each."""
        return torch.ones(len(self), dtype=torch.int64)

    @property
    def lengths(self) -> Int[Tensor, " N"]:
        """[N] all cost alike."""
        return self.sizes

    def select(self, index: Int[Tensor, " M"] | slice) -> Self:
        """Return the transitions at ``index``, in that order; a stretch of them shares memory."""
        if isinstance(index, Tensor):
            index = index.to(self.actions.device)
        return type(self)(observations=self.observations.select(index), actions=pick(self.actions, index))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The units of a policy with a memory: all steps of one environment in a rollout each."""

    observations: Observations
    """[U, T, …] encoded and normalised."""
    actions: Tensor
    """[U, T] or [U, T, A]: the policy's own, before squashing and clipping."""
    state: Float[Tensor, "U S"]
    """[U, S] the memory before the first step."""
    fresh: Bool[Tensor, "U T"]
    """[U, T] True where a step is the first of an episode: the memory before it is the initial one."""
    mask: Bool[Tensor, "U T"]
    """[U, T] True where an action was taken; elsewhere an environment only reset itself, and nothing is remembered."""

    def __len__(self) -> int:
        """Return the number of units, U."""
        return len(self.actions)

    @property
    def sizes(self) -> Int[Tensor, " U"]:
        """[U] actions taken in each."""
        return self.mask.sum(1).cpu()

    @property
    def lengths(self) -> Int[Tensor, " U"]:
        """[U] what each costs: its actions."""
        return self.sizes

    def select(self, index: Int[Tensor, " M"] | slice) -> Self:
        """Return the sequences at ``index``, in that order; a stretch of them shares memory."""
        if isinstance(index, Tensor):
            index = index.to(self.actions.device)
        return type(self)(
            observations=self.observations.select(index),
            actions=self.actions[index],
            state=self.state[index],
            fresh=self.fresh[index],
            mask=self.mask[index],
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """What a policy does in n states."""

    actions: Tensor
    """[n] or [n, A]: the policy's own, before squashing and clipping."""
    logp: Float[Tensor, " n"]
    """[n] log-probability of each under the distribution it was drawn from, nats."""
    state: Float[Tensor, "n S"] | None
    """[n, S] the memory after these states; None without one."""
    value: Float[Tensor, " n"] | None = None
    """[n] V of these states, in units of return, where it is found on the way; None where it would take a pass of its own."""


class Acting:
    """A policy acting through the steps of a rollout by drawing, its weights as they are; it writes down what it did."""

    def __init__(self, policy: ControlPolicy, draws: np.random.Generator) -> None:
        """Act with ``policy``, drawing from ``draws``."""
        self._policy = policy
        self._draws = draws
        self._acted: list[Acted] = []

    def act(self, observations: Observations, state: Tensor | None) -> tuple[NDArray[Any], Tensor | None]:
        """Act in n states; return the actions [n] or [n, A], before squashing and clipping, and the memory after them."""
        acted = self._policy.act(observations, state, self._draws)
        self._acted.append(acted)
        return acted.actions.cpu().numpy(), acted.state

    def actions(self) -> Tensor:
        """[n, T] or [n, T, A]: all actions so far."""
        return torch.stack([acted.actions for acted in self._acted], dim=1).cpu()

    def logp(self) -> Float[Tensor, "n T"]:
        """[n, T] log-probability of each under the distribution that it was drawn from, nats."""
        return torch.stack([acted.logp for acted in self._acted], dim=1).cpu()

    def values(self) -> Float[Tensor, "n T"] | None:
        """[n, T] V of the states acted in, in units of return; None where acting does not find it on the way."""
        found = [acted.value for acted in self._acted if acted.value is not None]
        return torch.stack(found, dim=1).cpu() if found and len(found) == len(self._acted) else None


class ControlPolicy(nn.Module, ABC):
    """What collecting and learning ask of a policy.

    A memoryless policy implements :meth:`forward`, :meth:`distribution` and :meth:`values`, and hands the ``state`` that it
    is given, None, back. One with a memory also implements :meth:`initial_state`; its units are then
    :class:`Sequences`. Collecting calls :meth:`acting`, :meth:`play`, :meth:`values` and :meth:`initial_state` alone.
    """

    @abstractmethod
    def forward(self, units: Any) -> Evaluation:
        """Evaluate the actions taken: in the order of the units, and within one in the order of its steps."""

    @abstractmethod
    def distribution(self, observations: Observations, state: Tensor | None) -> tuple[Distribution, Tensor | None]:
        """π(· | s) for n states, and the memory after them."""

    @abstractmethod
    def values(self, observations: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
        """V(s) for n states, in units of return; ``state`` is the memory before them."""

    def initial_state(self, n: int) -> Float[Tensor, "n S"] | None:
        """Return the memory at the start of n episodes; None without one."""
        return None

    def act(self, observations: Observations, state: Tensor | None, draws: np.random.Generator | None) -> Acted:
        """Act in n states: by drawing, or without ``draws`` with the most likely actions."""
        distribution, state = self.distribution(observations, state)
        actions = distribution.mode() if draws is None else distribution.draw(draws)
        return Acted(actions=actions, logp=distribution.log_prob(actions), state=state)

    def acting(self, first: Observations, steps: int, draws: np.random.Generator) -> Acting:
        """Begin a rollout of ``steps`` steps; all states are of the form of the ``first`` ones."""
        return Acting(self, draws)

    def play(self, actions: NDArray[Any]) -> NDArray[Any]:
        """Turn the policy's own actions into what is played, in units of half the box's width; here they are the same."""
        return actions

    def unit_distribution(self, units: Any) -> Distribution:
        """Return π(· | s) of every action in ``units``, in the order of :meth:`forward`."""
        return self.distribution(units.observations, None)[0]

    def actor_parameters(self) -> dict[str, nn.Parameter]:
        """All that π depends on, by name: every parameter outside the module called ``critic``; override it for another name.

        TRPO moves these and no others, and refuses a policy whose values depend on one of them.
        """
        return {name: p for name, p in self.named_parameters() if name.partition(".")[0] != "critic"}

    def freeze(self, units: Any) -> Distribution:
        """Return the present distributions of ``units`` as constants, to measure later ones against."""
        with torch.no_grad():
            return self.unit_distribution(units).detach()

    def kl(self, units: Any, frozen: Any) -> Float[Tensor, " n"]:
        """KL(frozen ‖ present) of every action's distribution, nats; differentiable twice."""
        distance: Tensor = frozen.kl(self.unit_distribution(units))
        return distance
