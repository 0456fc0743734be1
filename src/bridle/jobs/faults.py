"""What becomes of a step that is not finite: its evidence is kept, and the run stops or skips the step.

``faults/step-N/`` holds ``report.json`` (what was not finite, in which rows and parameters, the settings, checksums),
``batch.safetensors`` and the weights before the step; ``bridle replay`` sees it again from these alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from bridle.errors import NonFiniteStep, NonFiniteWorld, TrainingError, WorldError
from bridle.jobs.config import to_dict
from bridle.jobs.session import Session
from bridle.learn.a2c import A2CObjective
from bridle.learn.ppo import PPOObjective
from bridle.learn.step import Evidence, Minibatch, Objective
from bridle.runs.checkpoints import remove_folder, save_json, save_tensors, whole_folder
from bridle.runs.files import Json, file_digest

__all__ = ["FORMAT", "Kept", "contain", "digests", "evidence_of", "keep", "minibatch_from", "of_evidence", "skipped"]

FORMAT = 1
"""Version of a fault's folder."""

_FOLDERS = 5
"""The newest so many faults stay: each holds the weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What a job keeps of a step that it could not take."""

    tensors: Mapping[str, Tensor]
    """The batch."""
    save_weights: Callable[[Path], object]
    """Writes the weights before the step into a folder."""
    report: Mapping[str, Json]
    """What else a replay must know."""


def contain(session: Session, step: int, fault: NonFiniteStep | NonFiniteWorld, config: object, kept: Kept) -> None:
    """Keep the evidence and note the event; return where the run may skip the step, raise where it stops.

    Raises:
        TrainingError: ``run.on_fault`` is "stop", or as many steps in a row were skipped as it allows.
        WorldError: the same, where a world gave what is not finite.
    """
    where = keep(session, f"step-{step}", step, fault, config, kept)
    skipped = session.skipped_before(step)
    limit = session.settings.fault_limit
    stop = session.settings.on_fault == "stop" or skipped >= limit
    parameters: list[Json] = [*fault.parameters]
    text = f"step {step}: {fault}; {where}"
    session.run.event("fault", text, step=step, what=fault.what, parameters=parameters, skipped=not stop)
    if not stop:
        session.say(f"{text}; skipped")
        return
    more = f"; {limit} steps before it were skipped already" if session.settings.on_fault == "skip" else ""
    kind = WorldError if isinstance(fault, NonFiniteWorld) else TrainingError
    raise kind(text + more) from fault


def keep(
    session: Session, name: str, step: int, fault: NonFiniteStep | NonFiniteWorld, config: object, kept: Kept
) -> str:
    """Keep the evidence in ``faults/name``; return where it is, or why it could not be kept."""
    folder = session.run.path / "faults" / name
    try:
        with whole_folder(folder) as aside:
            kept.save_weights(aside)
            save_tensors(aside / "batch.safetensors", dict(kept.tensors))
            save_json(aside / "report.json", {**_report(session, step, fault, config, kept), "files": digests(aside)})
        _prune(folder.parent)
    except (OSError, SafetensorError) as error:
        return f"its evidence could not be kept ({error})"
    return f"kept in {folder}; look at it with: bridle replay {folder}"


def digests(folder: Path) -> dict[str, Json]:
    """Return the SHA-256 of every tensor file of a fault, by which a replay knows that it is whole."""
    found = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): file_digest(path) for path in found}


def skipped(fault: NonFiniteStep, lrs: Mapping[str, float]) -> dict[str, float]:
    """Return what the run records of a step that was skipped: the optimiser steps taken before the fault, and the rates."""
    taken = fault.evidence.taken if isinstance(fault.evidence, Evidence) else 0
    return {"skipped": 1.0, "optimiser_steps": float(taken), **{f"lr/{name}": lr for name, lr in lrs.items()}}


def evidence_of(fault: NonFiniteStep) -> Evidence:
    """Return what an update or its preparation was at; the fault itself where it was raised by neither."""
    if not isinstance(fault.evidence, Evidence):
        raise fault
    return fault.evidence


def _report(
    session: Session, step: int, fault: NonFiniteStep | NonFiniteWorld, config: object, kept: Kept
) -> dict[str, Json]:
    wrong: dict[str, Json] = {name: found for name, tensor in kept.tensors.items() if (found := _not_finite(tensor))}
    return {
        "format": FORMAT,
        "job": session.run.job,
        "step": step,
        "what": fault.what,
        "rows": [*fault.rows],
        "parameters": [*fault.parameters],
        "tensors": wrong,
        "config": to_dict(config),
        **kept.report,
    }


def _not_finite(tensor: Tensor) -> dict[str, Json] | None:
    """Count what is not finite and say where the first stands; None if there is none."""
    if not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()):
        return None
    first = int((~torch.isfinite(tensor)).flatten().nonzero()[0])
    return {"nan": int(torch.isnan(tensor).sum()), "infinite": int(torch.isinf(tensor).sum()), "first": first}


def _prune(folder: Path) -> None:
    for kind in ("step", "evaluation"):
        numbered = [path for path in folder.glob(f"{kind}-*") if path.name.split("-")[1].isdecimal()]
        for old in sorted(numbered, key=lambda path: int(path.name.split("-")[1]))[:-_FOLDERS]:
            remove_folder(old)


def of_evidence(evidence: Evidence, units: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Json]]:
    """Lay an update's evidence out as tensors and JSON; ``units`` are its units as their world lays them out."""
    tensors = {f"units/{name}": tensor for name, tensor in units.items()}
    part = evidence.minibatch
    if part is not None:
        own = {field.name: getattr(part, field.name) for field in fields(Minibatch)}
        tensors |= {f"minibatch/{name}": tensor for name, tensor in own.items() if tensor is not None}
    return tensors, {"objective": _objective(evidence.objective), "taken": evidence.taken}


def _objective(objective: Objective | None) -> Json:
    if isinstance(objective, PPOObjective):
        return {"kind": "ppo", **to_dict(objective)}
    if isinstance(objective, A2CObjective):
        return {"kind": "a2c", **to_dict(objective)}
    return None


def minibatch_from(tensors: Mapping[str, Tensor], device: torch.device) -> Minibatch | None:
    """Read the minibatch that :func:`of_evidence` laid out; None if there was none."""
    own = {name.removeprefix("minibatch/"): t for name, t in tensors.items() if name.startswith("minibatch/")}
    if not own:
        return None
    moved = {name: tensor if name == "actions" else tensor.to(device) for name, tensor in own.items()}
    return Minibatch(**{"ref_logp": None, **moved})  # type: ignore[arg-type]
