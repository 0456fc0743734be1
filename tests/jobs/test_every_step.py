"""A run that is stopped after every step and taken up again ends as the one that was never stopped, file for file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
from torch import nn

from bridle.control import ActorCritic, CategoricalHead
from bridle.control.making import WorldSettings
from bridle.control.networks import NetworkSettings
from bridle.jobs.session import Session, Stopped
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from tests.control import worlds
from tests.jobs.small import small_world
from tests.torture import APART, JOBS, Job

pytest.importorskip("transformers")
pytest.importorskip("gymnasium")
worlds.register()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_world(tmp_path_factory.mktemp("world"))


def contents(path: Path) -> dict[str, bytes]:
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    return {name: file.read_bytes() for name, file in files.items() if name not in APART}


def of_job(name: str, world: Path, path: Path, changes: Mapping[str, Any]) -> tuple[Job, Any]:
    config = JOBS[name].config(world, path)
    own = replace(config.run, checkpoint_every=1, keep_checkpoints=99)
    return JOBS[name], replace(config, run=own, **changes)


def lives(job: Job, config: Any) -> int:
    """Take the run up until it comes to its end; return how often it was begun or taken up."""
    for life in range(1, 99):
        try:
            job.run(config, resume=life > 1)
        except Stopped:
            continue
        return life
    raise AssertionError("it never comes to its end")


def remembering(kind: Literal["lstm", "gru"]) -> dict[str, Any]:
    return {"network": NetworkSettings(hidden=(8,), recurrent=kind, recurrent_width=8)}


def dropping_a_little(observations: Any, actions: Any) -> Any:
    """Less than what tells that a policy answers otherwise when it learns than when it acts."""
    actor = nn.Sequential(nn.Linear(observations.width, 16), nn.Tanh(), nn.Dropout(0.001), nn.Linear(16, actions.width))
    return ActorCritic(actor=actor, critic=nn.Linear(observations.width, 1), head=CategoricalHead())


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("control a2c", {}),
        ("control a2c", {"env": "Pendulum-v1", **remembering("gru")}),
        ("control a2c", remembering("lstm")),
        ("control ppo", remembering("gru")),
        ("control ppo", {"world": WorldSettings(num_envs=3), "ppo": PPOSettings(epochs=2, minibatches=3)}),
        (
            "control ppo",
            {"world": WorldSettings(num_envs=2, vectorization="async", autoreset="disabled"), "total_steps": 6 * 32},
        ),
        (
            "control ppo",
            {"env": "CartPole-v1", "world": WorldSettings(num_envs=3), "ppo": PPOSettings(epochs=2, minibatches=3)},
        ),
        ("control a2c", {"env": "BridleTest/Worn-v0"}),
        ("control ppo", {"env": "CartPole-v1", "network": NetworkSettings(factory=f"{__name__}:dropping_a_little")}),
        ("sft", {}),
        ("reward", {}),
        ("ppo", {}),
    ],
)
def test_stopped_after_every_step_it_ends_the_same(
    name: str, changes: dict[str, Any], world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "run", tmp_path / "kept"
    job, config = of_job(name, world, path, changes)
    assert lives(job, config) == 1
    path.rename(kept)
    record = Session.record

    def and_ask_to_stop(self: Session, step: int, metrics: Mapping[str, Any]) -> None:
        record(self, step, metrics)
        self.stopping = True

    monkeypatch.setattr(Session, "record", and_ask_to_stop)
    steps = max(int(str(row["step"])) for row in Run.open(kept).metrics())
    assert lives(job, config) == steps >= 5
    whole, cut = contents(kept), contents(path)
    assert [name for name in sorted({*whole, *cut}) if whole.get(name) != cut.get(name)] == []
