"""Worlds small enough to be solved: a chain and a grid, their exact values, and episodes drawn from them.

The last state of ``transitions`` is terminal: nothing follows it and its value is 0. Exact quantities come from linear
algebra in float64 and from nothing in ``bridle.core``, so that they can be held against it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bridle.random import generator

__all__ = ["Episodes", "World", "chain", "grid"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Episodes:
    """B episodes of at most T steps, padded on the right; the fields are those of ``bridle.batch.Trajectories``."""

    states: Int[Tensor, "B T"]
    """[B, T] s_t."""
    successors: Int[Tensor, "B T"]
    """[B, T] s_{t+1}; S, the terminal state, where the episode ended."""
    actions: Int[Tensor, "B T"]
    """[B, T] a_t."""
    rewards: Float[Tensor, "B T"]
    """[B, T] r_t, in units of reward."""
    terminated: Bool[Tensor, "B T"]
    """[B, T] the episode ended."""
    truncated: Bool[Tensor, "B T"]
    """[B, T] it was cut at step T."""
    mask: Bool[Tensor, "B T"]
    """[B, T] True where an action was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """A world of S states and A actions, its discount and where episodes begin."""

    transitions: Float[Tensor, "S A S+1"]
    """[S, A, S+1] probability of each successor; the last one is the terminal state."""
    rewards: Float[Tensor, "S A S+1"]
    """[S, A, S+1] reward of each step."""
    start: Float[Tensor, " S"]
    """[S] probability that an episode begins there."""
    gamma: float
    """Discount per step."""

    def values(self, policy: Float[Tensor, "*R S A"]) -> Float[Tensor, "*R S"]:
        """Return the exact V of ``policy``, the solution of (I − γ P_π) V = r_π; gradient flows to ``policy``."""
        successor = torch.einsum("...sa,sat->...st", policy, self.transitions[:, :, :-1])
        reward = torch.einsum("...sa,sat,sat->...s", policy, self.transitions, self.rewards)
        eye = torch.eye(len(self.start), dtype=policy.dtype)
        solved: Tensor = torch.linalg.solve(eye - self.gamma * successor, reward)
        return solved

    def action_values(self, policy: Float[Tensor, "*R S A"]) -> Float[Tensor, "*R S A"]:
        """Return the exact Q(s, a) = Σ_s' P(s' | s, a) (r + γ V(s'))."""
        reward = torch.einsum("sat,sat->sa", self.transitions, self.rewards)
        return reward + self.gamma * torch.einsum("sat,...t->...sa", self.transitions[:, :, :-1], self.values(policy))

    def advantages(self, policy: Float[Tensor, "*R S A"]) -> Float[Tensor, "*R S A"]:
        """Return the exact A(s, a) = Q(s, a) − V(s)."""
        return self.action_values(policy) - self.values(policy).unsqueeze(-1)

    def expected_return(self, policy: Float[Tensor, "*R S A"]) -> Float[Tensor, "*R"]:
        """Return J(π) = Σ_s start(s) V(s), the discounted return that an episode brings on average."""
        return (self.values(policy) * self.start).sum(-1)

    def visits(self, policy: Float[Tensor, "S A"]) -> Float[Tensor, " S"]:
        """Return Σ_t γ^t P(s_t = s), the discounted number of visits to each state in an episode."""
        successor = torch.einsum("sa,sat->st", policy, self.transitions[:, :, :-1])
        eye = torch.eye(len(self.start), dtype=policy.dtype)
        solved: Tensor = torch.linalg.solve((eye - self.gamma * successor).T, self.start)
        return solved

    def draw(
        self,
        policy: Float[Tensor, "B S A"],
        *,
        steps: int,
        rng: np.random.Generator,
        first: tuple[Int[Tensor, " B"], Int[Tensor, " B"]] | None = None,
    ) -> Episodes:
        """Draw one episode for each of the B policies, cut after ``steps``; ``first`` sets (s_0, a_0)."""
        rows, terminal = policy.shape[0], self.start.shape[0]
        acts = policy.detach().cumsum(-1).numpy()
        moves = self.transitions.cumsum(-1).numpy()
        state = _pick(np.broadcast_to(self.start.cumsum(0).numpy(), (rows, terminal)), rng)
        if first is not None:
            state = first[0].numpy()
        alive = np.ones(rows, dtype=bool)
        steps_taken: list[tuple[np.ndarray, ...]] = []
        for t in range(steps):
            inside = np.where(alive, state, 0)
            action = _pick(acts[np.arange(rows), inside], rng)
            if first is not None and t == 0:
                action = first[1].numpy()
            successor = np.where(alive, _pick(moves[inside, action], rng), terminal)
            steps_taken.append((inside, successor, action, alive))
            state, alive = successor, alive & (successor != terminal)
            if not alive.any():
                break
        s, s2, a, mask = (torch.from_numpy(np.stack(kept, 1)) for kept in zip(*steps_taken, strict=True))
        ended = mask & (s2 == terminal)
        cut = torch.zeros_like(mask)
        cut[:, -1] = mask[:, -1] & ~ended[:, -1]
        rewards = torch.where(mask, self.rewards[s, a, s2], 0.0)
        return Episodes(states=s, successors=s2, actions=a, rewards=rewards, terminated=ended, truncated=cut, mask=mask)


def _pick(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index a row, by the inverse of the cumulative probabilities."""
    drawn = rng.random(len(cumulative))[:, None] * cumulative[:, -1:]
    picked: np.ndarray = (drawn >= cumulative).sum(1)
    return picked


def chain(states: int = 9, gamma: float = 0.95, slip: float = 0.1) -> tuple[World, Float[Tensor, "S A"]]:
    """Return a corridor and a policy for it: left (0) and right (1), reward 1 at the right end, 0 at the left.

    A step goes astray with probability ``slip``. The policy goes right with probability 0.5 to 0.7, by the state.
    """
    transitions = torch.zeros(states, 2, states + 1, dtype=torch.float64)
    rewards = torch.zeros_like(transitions)
    for s in range(states):
        for action, way in enumerate((-1, 1)):
            for move, share in ((way, 1 - slip), (-way, slip)):
                inside = 0 <= s + move < states
                transitions[s, action, s + move if inside else states] += share
    rewards[-1, :, -1] = 1.0
    start = torch.zeros(states, dtype=torch.float64)
    start[states // 2] = 1.0
    right = 0.5 + 0.2 * torch.from_numpy(generator(0, "learn.chain").random(states))
    return World(transitions=transitions, rewards=rewards, start=start, gamma=gamma), torch.stack([1 - right, right], 1)


def grid(size: int = 5, gamma: float = 0.97, slip: float = 0.1) -> World:
    """Return a square room: up, down, left, right; from a corner to the opposite one past a row of pits.

    The goal ends the episode with 1, a pit with −1, and each step costs 0.02; walls stop a step. With probability
    ``slip`` the way is drawn anew.
    """
    cells, terminal = size * size, size * size
    goal, pits = cells - 1, {2 * size + column for column in range(1, size - 1)}
    ways = ((-1, 0), (1, 0), (0, -1), (0, 1))
    transitions = torch.zeros(cells, 4, cells + 1, dtype=torch.float64)
    rewards = torch.zeros_like(transitions)
    for s in range(cells):
        for action in range(4):
            for other, (down, across) in enumerate(ways):
                share = slip / 4 + (1 - slip) * (other == action)
                row, column = min(max(s // size + down, 0), size - 1), min(max(s % size + across, 0), size - 1)
                target = row * size + column
                ends = target == goal or target in pits
                to = terminal if ends else target
                gained = (1.0 if target == goal else -1.0 if target in pits else 0.0) - 0.02
                before = transitions[s, action, to].clone()
                transitions[s, action, to] += share
                mean = (rewards[s, action, to] * before + gained * share) / transitions[s, action, to]
                rewards[s, action, to] = mean
    start = torch.zeros(cells, dtype=torch.float64)
    start[0] = 1.0
    return World(transitions=transitions, rewards=rewards, start=start, gamma=gamma)
