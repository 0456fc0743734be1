"""What becomes of a run of ``bridle train`` whose environments die, give what is not finite, or are to be brought back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bridle.control.collect import Collector, Rollout
from bridle.control.environments import World
from bridle.control.evaluate import STREAM
from bridle.errors import NonFiniteWorld, RunError, WorldError
from bridle.jobs.faults import Kept, contain, keep
from bridle.jobs.learner import Learner
from bridle.jobs.session import Session
from bridle.runs.files import load_tensors

if TYPE_CHECKING:
    from bridle.jobs.control import ControlConfig

__all__ = ["contain_world", "enough", "leave_evaluation_out", "take_up_episodes", "tell_deaths"]


def tell_deaths(session: Session, step: int, *worlds: World) -> dict[str, float]:
    """Keep as events, and say, which environments died and were made anew; count them, if there were any."""
    lines = [line for world in worlds for line in world.told()]
    for line in lines:
        session.run.event("environment", f"step {step}: {line}", step=step)
        session.say(f"step {step}: {line}")
    return {"environments_made_anew": float(len(lines))} if lines else {}


def enough(config: ControlConfig, rollout: Rollout) -> bool:
    """Whether a rollout can be divided into minibatches, also if environments died in it."""
    if not rollout.lost.any():
        return True
    if rollout.memory is not None:
        return bool(rollout.mask.any(dim=1).all())  # a unit is all that an environment did
    minibatches = {"ppo": config.ppo.minibatches, "trpo": config.trpo.critic_minibatches, "a2c": 1}
    return rollout.steps >= minibatches[config.algorithm]


def contain_world(
    config: ControlConfig, collector: Collector, session: Session, step: int, fault: NonFiniteWorld
) -> None:
    """Keep what led to it; return where the rollout may be left out, after which the environments start anew.

    Raises:
        WorldError: the run stops; as it was raised where nothing has been recorded yet and so nothing is to be lost.
    """
    if config.run.on_fault == "stop" and not session.run.metrics():
        raise fault
    contain(session, step, fault, config, _kept(fault, collector.led_here(), "environments"))
    collector.forget()


def leave_evaluation_out(
    config: ControlConfig, session: Session, step: int, fault: NonFiniteWorld, *, which: str, how: str
) -> None:
    """Keep what led to it and say that there is no such evaluation; raises the fault where the run stops at one."""
    assert isinstance(fault.led_here, Mapping | None)
    if config.run.on_fault == "stop" and not session.run.metrics():
        raise fault
    kept = _kept(fault, fault.led_here or {"restarted": torch.tensor(step)}, STREAM)
    where = keep(session, f"evaluation-{step}-{how}", step, fault, config, kept)
    skip = config.run.on_fault == "skip"
    text = f"step {step}: {fault}; {where}" + (f"; no {which} of {how} actions" if skip else "")
    session.run.event("fault", text, step=step, what=fault.what, skipped=skip)
    if not skip:
        raise WorldError(text) from fault
    session.say(text)


def _kept(fault: NonFiniteWorld, led_here: Mapping[str, Tensor], stream: str) -> Kept:
    assert isinstance(fault.given, Tensor)
    tensors = {"given": fault.given, **{f"episodes/{name}": value for name, value in led_here.items()}}
    return Kept(tensors=tensors, save_weights=lambda _: None, report={"world": True, "stream": stream})


def take_up_episodes(collector: Collector, learner: Learner, session: Session) -> None:
    """Bring the environments to where the checkpoint left them, by taking the same steps again.

    Raises:
        RunError: they led elsewhere: the environment is not determined by its seed and the actions.
    """
    if session.checkpoint is None:
        return
    kept = load_tensors(session.checkpoint.path / "episodes.safetensors")
    while kept and not collector.replay(kept, learner.policy, seed=session.seed):
        if not tell_deaths(session, session.start, collector.world):
            break  # else one died of the steps themselves, which says nothing of where they lead
    else:
        tell_deaths(session, session.start, collector.world)  # now: they are no part of the next step
        return
    text = f"{collector.world.name}: the same seed and actions lead elsewhere than before the checkpoint"
    if not session.force:
        raise RunError(
            f"{text}, so it cannot go on as the same run to the bit; let its episodes start anew with: "
            f"bridle resume {session.run.path} --force"
        )
    session.run.event("forced", f"{text}; its episodes start anew", step=session.start)
    session.say(f"{text}; its episodes start anew")
    collector.forget()
