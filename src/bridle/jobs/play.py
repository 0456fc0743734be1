"""What ``bridle evaluate`` does with a run of ``bridle train``: it plays whole episodes, and films them if asked to."""

from __future__ import annotations

from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from bridle.control import Agent, build_policy, evaluate, load_policy, make_world
from bridle.errors import ConfigError, RunError
from bridle.jobs.config import from_dict
from bridle.jobs.control import ControlConfig
from bridle.jobs.session import resolve_device
from bridle.runs import Run
from bridle.runs.files import Json

if TYPE_CHECKING:
    from bridle.jobs.evaluate import EvaluateConfig

__all__ = ["judge_run", "policy_folder"]


def policy_folder(run: Run, which: str | None) -> Path:
    """Return the folder of a run's policy: "best", "latest" (checkpoint), a step, or None: finished, else the latest.

    Raises:
        RunError: the run has no such policy yet.
        ConfigError: ``which`` is none of these.
    """
    if which == "best" or (which is None and (run.path / "policy").is_dir()):
        folder = run.path / ("best" if which == "best" else "policy")
        if not folder.is_dir():
            raise RunError(f"{run.path} has no best policy yet; its first evaluation makes one")
        return folder
    kept = {checkpoint.step: checkpoint.path / "policy" for checkpoint in run.checkpoints()}
    if not kept:
        raise RunError(f"{run.path} has neither a finished policy nor a checkpoint yet")
    if which in (None, "latest"):
        return kept[max(kept)]
    if not (which or "").isdecimal():
        raise ConfigError.of("checkpoint", which, '"best", "latest", or the step of a checkpoint')
    if int(which or "") not in kept:
        raise RunError(f"{run.path} keeps no checkpoint of step {which}; it keeps {', '.join(map(str, sorted(kept)))}")
    return kept[int(which or "")]


def judge_run(config: EvaluateConfig, found: Run) -> dict[str, Json]:
    """Play ``config.episodes`` episodes, print what they say of the mean return, film some more if asked to."""
    trained = from_dict(ControlConfig, found.config)
    folder = policy_folder(found, config.checkpoint)
    if config.video is not None:
        from bridle.control.film import check_film
        from bridle.jobs.evaluate import require_room_for

        check_film(config.video)
        require_room_for(config.video, "video")
    device = resolve_device(config.device)
    seed = trained.run.seed if config.seed is None else config.seed
    rows: dict[str, Json] = {}
    table = Table(
        "actions", "mean return", "95 % interval", "deviation", "length", "episodes", box=None, pad_edge=False
    )
    with closing(make_world(trained.env, trained.world)) as world:
        own = None if trained.network.factory is None else partial(build_policy, settings=trained.network, seed=0)
        agent = load_policy(folder, build=own)
        agent.policy.to(device)
        for name in ("deterministic", "sampled"):
            if config.actions not in (name, "both"):
                continue
            score = evaluate(
                world,
                agent.policy,
                agent.moments,
                episodes=config.episodes,
                deterministic=name == "deterministic",
                max_steps=trained.evaluation.max_steps,
                seed=seed,
            )
            rows[name] = {**score.metrics("evaluation"), "returns": list(score.returns)}
            interval = f"{score.mean - score.half_width:.4g} … {score.mean + score.half_width:.4g}"
            length = f"{sum(score.lengths) / len(score.lengths):.4g}"
            shown = (f"{score.mean:.4g}", interval, f"{score.deviation:.4g}", length, str(config.episodes))
            table.add_row(name, *shown)
    console = Console()
    console.print(f"{trained.env}, {folder}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    if config.video is not None:
        _film(config, config.video, trained, agent, seed)
    return {"target": str(found.path), "policy": str(folder), "env": trained.env, **rows}


def _film(config: EvaluateConfig, path: Path, trained: ControlConfig, agent: Agent, seed: int) -> None:
    from bridle.control.film import film

    returns = film(
        agent,
        trained.env,
        trained.world,
        path,
        episodes=config.video_episodes,
        deterministic=config.actions != "sampled",
        seed=seed,
        max_steps=trained.evaluation.max_steps,
    )
    said = ", ".join(f"{value:.4g}" for value in returns)
    Console().print(f"{path}: return {said}", markup=False, highlight=False, soft_wrap=True)
