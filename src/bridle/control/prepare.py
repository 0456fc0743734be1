"""From a rollout to a batch: values of every state and true successor, advantages, returns, units."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bridle.batch import Batch, Trajectories
from bridle.control.collect import Memory, Rollout
from bridle.control.observations import Observations
from bridle.control.policy import ControlPolicy, Sequences, Transitions
from bridle.control.scaling import normalise
from bridle.core.moments import Moments
from bridle.learn.advantages import AdvantageSettings, estimate

__all__ = ["prepare", "remembered_anew", "trajectories"]


_MOST_IMAGES = 1024
"""States valued at once where they hold images, whose features take much memory."""


@torch.no_grad()
def trajectories(
    rollout: Rollout, policy: ControlPolicy, moments: Moments | None, *, rewards: Float[Tensor, "B T"] | None = None
) -> Trajectories:
    """Evaluate V(s_t) and V of the true successors, all states in one batched call; what acting has found is taken over.

    The successor of a step is the next column's state, except where the episode was truncated: there it is the state
    that was cut off, and where it terminated it counts for nothing. ``rewards`` stand in for the rollout's own.
    """
    B, T = rollout.mask.shape
    # the critic asks for no mask
    shown, last_shown = (o.with_mask(None) for o in (rollout.observations, rollout.last))
    memory, values = rollout.memory, rollout.values
    asked = [last_shown, rollout.cut] if values is not None else [shown.flatten(), last_shown, rollout.cut]
    states = normalise(Observations.cat(asked), moments)
    state = None if memory is None else torch.cat([memory.before.flatten(0, 1), memory.last, memory.cut])
    found = _values(policy, states, None if state is None else state[-len(states) :]).float().cpu()
    if values is None:
        values, found = found[: B * T].view(B, T), found[B * T :]
    next_values = torch.cat([values[:, 1:], found[:B, None]], dim=1)
    next_values[rollout.truncated] = found[B:]
    return Trajectories(
        rewards=rollout.rewards if rewards is None else rewards,
        values=values,
        next_values=next_values,
        terminated=rollout.terminated,
        truncated=rollout.truncated,
        mask=rollout.mask,
    )


def prepare(
    rollout: Rollout,
    policy: ControlPolicy,
    moments: Moments | None,
    settings: AdvantageSettings,
    *,
    rewards: Float[Tensor, "B T"] | None = None,
    anew: bool = False,
) -> Batch:
    """Lay the valid transitions out flat, environment by environment, with their advantages and returns.

    Args:
        rollout: T steps of B environments.
        policy: its critic values the states.
        moments: the observation statistics that the rollout was collected with.
        settings: which estimator, with which γ and λ.
        rewards: [B, T], in place of the rollout's own (scaled ones).
        anew: the policy has learnt since it collected, so that its memory would hold something else by now.
    """
    if anew:
        rollout = replace(remembered_anew(rollout, policy, moments), values=None)
    seen = trajectories(rollout, policy, moments, rewards=rewards)
    advantages, returns = estimate(seen, settings)
    mask = rollout.mask
    device = next(policy.parameters()).device
    units = _units(rollout, moments, device)
    return Batch(
        units=units,
        old_logp=rollout.sampler_logp[mask].to(device),
        old_value=seen.values[mask].to(device),
        advantages=advantages[mask].to(device),
        returns=returns[mask].to(device),
        episode=_episodes(rollout)[mask].to(device),
    )


@torch.no_grad()
def remembered_anew(rollout: Rollout, policy: ControlPolicy, moments: Moments | None) -> Rollout:
    """Return the rollout with what the present policy would have remembered; as it is, without a memory.

    Where the rollout begins in the middle of an episode, the memory goes on from what was remembered then.
    """
    memory = rollout.memory
    if memory is None:
        return rollout
    B, T = rollout.mask.shape
    device = next(policy.parameters()).device
    states = normalise(rollout.observations.flatten(), moments).to(device)
    initial = policy.initial_state(B)
    assert initial is not None
    state, fresh = memory.before[:, 0].to(device), memory.fresh.to(device)
    befores, afters = [], []
    for t in range(T):
        before = torch.where(fresh[:, t, None], initial, state)
        _, after = policy.distribution(states.select(slice(t, None, T)), before)
        assert after is not None
        befores.append(before)
        afters.append(after)
        state = after
    cut = torch.stack(afters, dim=1).cpu()[rollout.truncated]
    # where the episode ended with the last step, nothing asks for what comes after it
    anew = Memory(before=torch.stack(befores, dim=1).cpu(), fresh=memory.fresh, last=state.cpu(), cut=cut)
    return replace(rollout, memory=anew)


def _values(policy: ControlPolicy, states: Observations, state: Tensor | None) -> Float[Tensor, " n"]:
    device = next(policy.parameters()).device
    size = _MOST_IMAGES if states.images else len(states)
    parts = [slice(at, at + size) for at in range(0, len(states), size)]
    return torch.cat(
        [
            policy.values(states.select(part).to(device), None if state is None else state[part].to(device))
            for part in parts
        ]
    )


def _units(rollout: Rollout, moments: Moments | None, device: torch.device) -> Transitions | Sequences:
    observations, memory = normalise(rollout.observations, moments), rollout.memory
    if memory is None:
        mask = rollout.mask
        return Transitions(observations=observations.select(mask).to(device), actions=rollout.actions[mask].to(device))
    return Sequences(
        observations=observations.to(device),
        actions=rollout.actions.to(device),
        state=memory.before[:, 0].to(device),
        fresh=memory.fresh.to(device),
        mask=rollout.mask.to(device),
    )


def _episodes(rollout: Rollout) -> Int[Tensor, "B T"]:
    """Number the episodes, or pieces of them, within the rollout; no two environments share a number."""
    B, T = rollout.mask.shape
    ended = (rollout.terminated | rollout.truncated | rollout.lost).long()
    before = ended.cumsum(dim=1) - ended
    return before + torch.arange(B)[:, None] * (T + 1)
