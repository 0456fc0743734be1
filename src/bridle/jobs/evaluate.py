"""``bridle evaluate``: a finished policy, or any model, answers held-out prompts or plays episodes, and is judged."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from bridle.errors import ConfigError, RunError
from bridle.jobs.config import from_dict
from bridle.jobs.session import resolve_device
from bridle.runs import Run
from bridle.runs.files import Json, save_json

if TYPE_CHECKING:
    from bridle.jobs.ppo import PPOConfig
    from bridle.language.evaluate import Assessment
    from bridle.language.sampler import SamplingSettings

__all__ = ["EvaluateConfig", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateConfig:
    """Judge a run of bridle ppo, sft or train, or any model folder."""

    target: str
    """Run directory, or folder or hub name of a model."""
    reference: str | None = None
    """Model to compare with; for a PPO run the model that it started from, else the target itself."""
    prompts: str | None = None
    """File of prompts; for a PPO run its held-out prompts."""
    count: int = 256
    """Prompts to answer at most."""
    reward_model: str | None = None
    """Reward model that judges; for a PPO run its own judges."""
    functions: tuple[str, ...] = ()
    """Functions that judge, as module:function."""
    max_new_tokens: int | None = None
    """Longest answer, tokens; for a PPO run its own, else 64."""
    temperature: float | None = None
    """τ; for a PPO run its own, else 1."""
    top_k: int | None = None
    """Draw from the k likeliest tokens (1: greedy text); None: from all."""
    top_p: float | None = None
    """Draw from the fewest likeliest tokens that hold this share of the probability, in (0, 1]."""
    min_p: float | None = None
    """Draw from tokens at least this many times as probable as the likeliest, in (0, 1]."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end an answer."""
    episodes: int = 100
    """Episodes to play, if the target is a run of bridle train."""
    checkpoint: str | None = None
    """Which policy of a run of bridle train: best, latest, or the step of a checkpoint; None: the finished one, if it has
    finished, else the latest."""
    actions: Literal["both", "deterministic", "sampled"] = "both"
    """How an agent acts: with the likeliest actions, with drawn ones, or first one and then the other."""
    video: Path | None = None
    """Film an agent: a file ending in .mp4, or a folder to make, with one film an episode."""
    video_episodes: int = 1
    """Episodes to film."""
    seed: int | None = None
    """Key of the draws; for a run its own, else 0."""
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    """Where to compute."""
    output: Path | None = None
    """File to write the figures to, as JSON; must not exist."""

    def cut(self, sampling: SamplingSettings) -> SamplingSettings:
        """Let the tail be cut off and texts end answers, which training may not."""
        names = ("top_k", "top_p", "min_p", "stop_strings")
        return replace(sampling, **{name: getattr(self, name) for name in names})

    def __post_init__(self) -> None:
        """Refuse values that cannot work."""
        if self.video_episodes < 1:
            raise ConfigError.of("video_episodes", self.video_episodes, "a whole number >= 1")
        for name, least in (("count", 2), ("episodes", 5)):
            if getattr(self, name) < least:
                raise ConfigError.of(
                    name,
                    getattr(self, name),
                    f"at least {least}, or the mean has no interval",
                )
        if self.output is not None and self.output.exists():
            raise ConfigError.of("output", str(self.output), "a file that does not exist yet")
        if self.output is not None and not self.output.absolute().parent.is_dir():
            raise ConfigError.of("output", str(self.output), "a file in a folder that exists")


def run(config: EvaluateConfig, *, resume: bool = False) -> Path:
    """Judge the target, print a table, and return the path of what was judged."""
    if resume:
        raise RunError("an evaluation is not resumed; run it again")
    if config.output is not None:
        require_room_for(config.output, "output")
    folder = Path(config.target)
    if os.path.isfile(folder / "config.json") and (folder / "checkpoints").is_dir():  # no error for a name too long
        found = Run.open(folder)
        if found.job == "control":
            from bridle.jobs.play import judge_run

            return _finish(config, judge_run(config, found))
        if found.job == "ppo":
            from bridle.jobs.ppo import PPOConfig

            return _language(config, str(newest_policy(found)), from_dict(PPOConfig, found.config))
        if found.job != "sft":
            raise RunError(f"{folder} is a run of {found.job}; evaluate a run of ppo, sft or train, or a model folder")
        return _language(config, str(newest_policy(found)), None)
    if os.path.isfile(folder / "policy.json"):
        raise RunError(f"{folder} is an agent's policy without its run; evaluate the run: bridle evaluate RUN")
    if not os.path.isfile(folder / "config.json") and config.reward_model is None and not config.functions:
        raise RunError(
            f"{config.target} is not a run, and judging a model needs --functions or --reward-model; "
            "`bridle runs` lists the runs there are"
        )
    return _language(config, config.target, None)


def require_room_for(path: Path, setting: str) -> None:
    """Refuse a file that could not be written when all is done; nothing is left behind."""
    try:
        with TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        expected = f"a file that can be written ({error.strerror})"
        raise ConfigError.of(setting, str(path), expected) from None


def newest_policy(run: Run) -> Path:
    """Return the finished policy of a run, or that of its newest checkpoint."""
    if (run.path / "policy").is_dir():
        return run.path / "policy"
    checkpoint = run.latest_checkpoint()
    if checkpoint is None:
        raise RunError(f"{run.path} has neither a finished policy nor a checkpoint yet")
    return checkpoint.path / "policy"


def _language(config: EvaluateConfig, policy: str, trained: PPOConfig | None) -> Path:
    for name in ("checkpoint", "video"):
        if getattr(config, name) is not None:
            raise ConfigError.of(name, str(getattr(config, name)), "nothing: it is for agents, runs of bridle train")
    settings = _settings(config, policy, trained)
    before, after = _assess_both(config, policy, settings)
    results: dict[str, Json] = {"target": policy, "reference": settings.model.path}
    results |= {"before": {**before.metrics()}, "after": {**after.metrics()}}
    _print_language(before, after, same=policy == settings.model.path)
    return _finish(config, results)


def _settings(config: EvaluateConfig, policy: str, trained: PPOConfig | None) -> PPOConfig:
    """Compose what to evaluate with: the run's own settings, and what the command line says otherwise."""
    from bridle.jobs.ppo import EvaluationSettings, PPOConfig
    from bridle.jobs.session import RunSettings
    from bridle.language.data import DataSettings
    from bridle.language.models import ModelSettings
    from bridle.language.prompts import MixSettings
    from bridle.language.roles import CriticSettings
    from bridle.language.scorers import RewardSettings

    judges = trained.reward if trained is not None else None
    if config.reward_model is not None or config.functions:
        judges = RewardSettings(model=config.reward_model, functions=config.functions)
    if judges is None:
        raise ConfigError.of("functions", (), "a judge", "pass --functions module:function or --reward-model FOLDER")
    if trained is None:
        if config.prompts is None:
            raise ConfigError.of("prompts", None, "a file of prompts", "pass --prompts FILE")
        trained = PPOConfig(
            run=RunSettings(dir=Path()),
            model=ModelSettings(path=policy, tokenizer=policy),
            prompts=DataSettings(path=config.prompts),
            reward=judges,
        )
    sampling = trained.sampling
    return replace(
        trained,
        run=replace(trained.run, seed=trained.run.seed if config.seed is None else config.seed),
        model=trained.model if config.reference is None else replace(trained.model, path=config.reference),
        reward=judges,
        critic=CriticSettings(source="trunk"),  # nothing is learnt: the smallest, and no demonstrations
        mix=MixSettings(),
        sampling=replace(
            sampling,
            max_new_tokens=sampling.max_new_tokens if config.max_new_tokens is None else config.max_new_tokens,
            temperature=sampling.temperature if config.temperature is None else config.temperature,
        ),
        evaluation=EvaluationSettings(
            path=config.prompts or trained.evaluation.path,
            held_out=config.count if config.prompts else min(config.count, trained.evaluation.held_out),
            gold=trained.evaluation.gold,
        ),
    )


def _assess_both(config: EvaluateConfig, policy: str, settings: PPOConfig) -> tuple[Assessment, Assessment]:
    """Let the reference and the target answer the same prompts with the same draws."""
    import torch

    from bridle.jobs.asked import read_asked
    from bridle.language.descriptions import describe_causal_lm
    from bridle.language.evaluate import WithGold, assess
    from bridle.language.models import ModelSettings
    from bridle.language.roles import open_roles
    from bridle.language.scorers import build_scorer
    from bridle.learn.memory import MicroBudget, RowBudget

    device = resolve_device(config.device)
    asked = read_asked(settings)
    describe_causal_lm(ModelSettings(path=policy))
    roles = open_roles(
        settings.model,
        settings.critic,
        None,
        temperature=settings.sampling.temperature,
        device=device,
        compute_dtype=torch.float32,
        sampler=settings.sampler,
    )
    asked.described.require_like(roles.policy.actor.model, roles.tokenizer)
    scorer = build_scorer(settings.reward, roles.tokenizer, functions=asked.functions, device=device)
    judges = WithGold(scorer, asked.functions.gold)
    sampling = config.cut(settings.sampling)
    found = []
    for weights in (None, policy):
        if weights is not None:
            roles.restore_policy(weights)
        found.append(
            assess(
                roles.policy,
                roles.reference,
                roles.sampler,
                judges,
                lambda ids: str(roles.tokenizer.decode(ids, skip_special_tokens=True)),
                asked.held_out,
                sampling,
                seed=settings.run.seed,
                budget=MicroBudget(settings.ppo.micro_batch_tokens),
                rows=RowBudget(sampling.rows),
                answers_per_prompt=settings.answers_per_prompt if settings.reward.sees_groups else 1,
            )
        )
    return found[0], found[1]


def _print_language(before: Assessment, after: Assessment, *, same: bool) -> None:
    from bridle.language.evaluate import mean_and_half_width

    console, first, second = Console(), before.metrics(), after.metrics()
    table = Table("", "reference", "target", "difference, paired", box=None, pad_edge=False)
    for name in (n for n in second if not n.endswith("_ci95")):
        half = second.get(f"{name}_ci95")
        shown = [f"{m[name]:.4g}" + ("" if half is None else f" ± {m[f'{name}_ci95']:.2g}") for m in (first, second)]
        difference = ""
        if name == "score":
            gains = [b.score - a.score for a, b in zip(before.episodes, after.episodes, strict=True)]
            mean, width = mean_and_half_width(after.per_prompt(gains))
            difference = f"{mean:+.4g} ± {width:.2g}"
        table.add_row(name, *(shown[1:] * 2 if same else shown), "" if same else difference)
    console.print(table)
    for a, b in list(zip(before.episodes, after.episodes, strict=True))[:3]:
        console.print(f"\nprompt: {a.prompt.text}", markup=False, highlight=False)
        console.print(f"  reference ({a.score:+.2f}): {a.text}", markup=False, highlight=False)
        console.print(f"  target    ({b.score:+.2f}): {b.text}", markup=False, highlight=False)


def _finish(config: EvaluateConfig, results: dict[str, Json]) -> Path:
    if config.output is not None:
        try:
            save_json(config.output, results)
        except OSError as error:
            raise RunError(f"{config.output} cannot be written ({error.strerror}); free some space") from error
        return config.output
    return Path(config.target)
