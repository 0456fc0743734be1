"""What a language PPO run carries from step to step, into a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bridle.core.divergence import AdaptiveCoefficient
from bridle.core.moments import Moments
from bridle.language.prepare import Prepared
from bridle.language.roles import Roles
from bridle.language.shaping import KLSettings
from bridle.learn.optim import Optimiser
from bridle.learn.state import learnt_state, load_learnt
from bridle.runs import Checkpoint
from bridle.runs.checkpoints import load_tensors, save_tensors

__all__ = ["State", "restore", "save"]


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a run carries from step to step besides weights and optimiser."""

    moments: Moments
    """Of all scores so far."""
    kl_coefficient: float
    """β, reward per nat."""
    controller: AdaptiveCoefficient | None
    """What steers β; None if it is fixed."""

    def after(self, prepared: Prepared, exact_kl: float, answers: int) -> State:
        """Take in the scores, and steer the leash by this step's KL."""
        if self.controller is None:
            return replace(self, moments=prepared.moments)
        controller = self.controller.updated(exact_kl, answers)
        return State(moments=prepared.moments, kl_coefficient=controller.coefficient, controller=controller)


def save(roles: Roles, optimiser: Optimiser, state: State, folder: Path) -> None:
    """Write weights, moments and what else a run carries."""
    roles.save_policy(folder / "policy")
    with roles.masters.in_place():
        save_tensors(folder / "critic.safetensors", learnt_state(roles.policy.critic))
    save_tensors(folder / "optimiser.safetensors", optimiser.state())
    m = state.moments
    carried = {"count": m.count, "mean": m.mean, "m2": m.m2}
    save_tensors(
        folder / "state.safetensors",
        carried | {"kl_coefficient": torch.tensor(state.kl_coefficient, dtype=torch.float64)},
    )


def restore(kl: KLSettings, roles: Roles, optimiser: Optimiser, checkpoint: Checkpoint | None) -> State:
    """Return the state at the beginning, or what a checkpoint kept."""
    controller = kl.controller()
    if checkpoint is None:
        coefficient = 0.0 if kl.where == "none" else kl.coefficient
        return State(moments=Moments.empty(), kl_coefficient=coefficient, controller=controller)
    folder, device = checkpoint.path, str(roles.policy.device)
    roles.restore_policy(str(folder / "policy"))
    with roles.masters.in_place():
        load_learnt(roles.policy.critic, load_tensors(folder / "critic.safetensors", device=device))
    optimiser.load_state(load_tensors(folder / "optimiser.safetensors", device=device))
    kept = load_tensors(folder / "state.safetensors")
    coefficient = float(kept.pop("kl_coefficient"))
    if controller is not None:
        controller = replace(controller, coefficient=coefficient)
    return State(moments=Moments(**kept), kl_coefficient=coefficient, controller=controller)
