"""``bridle quickstart``: the whole line on a small text world, with nothing but the package.

A kitchen is asked for dishes. A tiny transformer learns from imperfect demonstrations to answer, a reward model learns
from ranked answers what is good, and PPO learns from the reward model. The world's gold score judges the outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, cast

from rich.console import Console

from bridle.errors import ConfigError, DataError, RunError
from bridle.jobs import ppo, reward, sft
from bridle.jobs.commands import command
from bridle.jobs.session import RunSettings, Session, Stopped, open_session
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings, save_model
from bridle.language.roles import CriticSettings
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardSettings
from bridle.language.shaping import KLSettings, ShapingSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.quickstart import rows
from bridle.quickstart.gold import gold_score
from bridle.quickstart.kitchen import Order, orders
from bridle.quickstart.model import new_model, new_tokenizer
from bridle.quickstart.outcome import Answered, Outcome, show
from bridle.runs import Run, RunState
from bridle.runs.files import JsonObject, save_json, write_lines

__all__ = ["QuickstartConfig", "ScaleSettings", "ppo_config", "reward_config", "run", "sft_config"]

_C = TypeVar("_C", sft.SFTConfig, reward.RewardConfig, ppo.PPOConfig)

STAGES = ("data", "sft", "rankings", "reward", "ppo")


def _free() -> RunSettings:
    """The first of runs/quickstart, runs/quickstart-2, … that is not there yet.

    One thread: the tensors are so small that a second one gains little on an idle machine and loses much on a busy one.
    """
    number, path = 1, Path("runs/quickstart")
    while path.exists():
        number += 1
        path = Path(f"runs/quickstart-{number}")
    return RunSettings(dir=path, threads=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSettings:
    """How much is generated and how long each stage learns."""

    demonstrations: int = 4000
    """Demonstrations to learn from."""
    ranked_prompts: int = 1500
    """Prompts of which the SFT model's answers are ranked."""
    prompts: int = 2000
    """Prompts that PPO answers."""
    held_out: int = 240
    """Orders never seen in training, on which SFT and PPO are compared."""
    sft_epochs: int = 5
    """Passes over the demonstrations."""
    reward_epochs: int = 3
    """Passes over the ranked answers."""
    ppo_steps: int = 40
    """Rollouts of PPO."""

    def __post_init__(self) -> None:
        """Refuse what is too little to work with."""
        for name in self.__slots__:
            least = 2 if name == "held_out" else 1
            if getattr(self, name) < least:
                raise ConfigError.of(f"scale.{name}", getattr(self, name), f"a whole number >= {least}")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuickstartConfig:
    """Train a tiny model from nothing: SFT, a reward model from ranked answers, PPO."""

    run: RunSettings = field(default_factory=_free)
    """Where the runs lie and what they run on."""
    scale: ScaleSettings = field(default_factory=ScaleSettings)
    """How much of everything."""


def sft_config(config: QuickstartConfig) -> sft.SFTConfig:
    """Settings of the first stage: the fresh model learns the demonstrations."""
    root = config.run.dir
    return sft.SFTConfig(
        run=replace(config.run, dir=root / "sft"),
        model=ModelSettings(path=str(root / "fresh")),
        data=DataSettings(path=str(root / "demonstrations.jsonl")),
        epochs=config.scale.sft_epochs,
        optim=OptimSettings(lr=6e-3, schedule="cosine", warmup_steps=30, min_lr_share=0.05, beta2=0.98),
        evaluation=sft.EvaluationSettings(every=250, sampling=SamplingSettings(max_new_tokens=rows.MAX_ANSWER)),
    )


def reward_config(config: QuickstartConfig) -> reward.RewardConfig:
    """Settings of the second stage: the SFT model learns to score, from K ranked answers."""
    root = config.run.dir
    return reward.RewardConfig(
        run=replace(config.run, dir=root / "reward"),
        model=ModelSettings(path=str(root / "sft" / "policy")),
        data=DataSettings(path=str(root / "rankings.jsonl")),
        kind="rankings",
        epochs=config.scale.reward_epochs,
        batch_size=16,
        optim=OptimSettings(lr=2e-3, schedule="cosine", warmup_steps=20, min_lr_share=0.05, weight_decay=0.01),
    )


def ppo_config(config: QuickstartConfig) -> ppo.PPOConfig:
    """Settings of the third stage: the SFT model learns from the reward model, on a leash, with a critic and GAE."""
    root = config.run.dir
    return ppo.PPOConfig(
        run=replace(config.run, dir=root / "ppo"),
        model=ModelSettings(path=str(root / "sft" / "policy")),
        prompts=DataSettings(path=str(root / "prompts.jsonl")),
        reward=RewardSettings(model=str(root / "reward" / "reward")),
        steps=config.scale.ppo_steps,
        prompts_per_step=64,
        sampling=SamplingSettings(max_new_tokens=rows.MAX_ANSWER),
        shaping=ShapingSettings(missing_eos_penalty=1.0),
        kl=KLSettings(where="reward", coefficient=0.15),
        advantage=AdvantageSettings(gamma=1.0, lam=0.95),
        ppo=PPOSettings(epochs=2, minibatches=2),
        actor=OptimSettings(lr=5e-4, schedule="linear", min_lr_share=0.1),
        critic=CriticSettings(source="reward", warmup_steps=min(2, config.scale.ppo_steps - 1)),
        critic_optim=OptimSettings(lr=1e-3, schedule="linear", min_lr_share=0.1),
        evaluation=ppo.EvaluationSettings(
            path=str(root / "held_out.jsonl"),
            held_out=config.scale.held_out,
            every=config.scale.ppo_steps,
            gold=(rows.GOLD,),
        ),
    )


def run(config: QuickstartConfig, *, resume: bool = False, force: bool = False) -> Path:
    """Generate the data, run the three jobs, compare SFT with PPO; return the directory that holds it all.

    ``resume`` goes on where it stopped: what is finished stays as it is.

    Raises:
        RunError: it is to be resumed under another path than it was begun under.
    """
    config = _as_begun(config) if resume else config
    root, scale = config.run.dir, config.scale
    began = time.perf_counter()
    known, unknown = orders(config.run.seed, scale.held_out)
    stages = sft_config(config), reward_config(config), ppo_config(config)  # what cannot work is told before the first
    with open_session("quickstart", config, config.run, resume=resume, force=force) as session:
        session.say(f"1/4 a kitchen: {scale.demonstrations} demonstrations, {scale.prompts} prompts, a fresh model")
        _timed(session, 1, lambda: _write_world(config, session, known, unknown))
        session.say("2/4 supervised fine-tuning on the demonstrations, mistakes and all")
        _timed(session, 2, lambda: _stage(sft.run, stages[0], root, force=force))
        session.say(f"3/4 a reward model from {rows.RANKED} ranked answers to each of {scale.ranked_prompts} prompts")
        _timed(session, 3, lambda: _write_rankings(config, session, known))
        _timed(session, 4, lambda: _stage(reward.run, stages[1], root, force=force))
        session.say("4/4 PPO against the reward model, with a critic, GAE and a KL leash")
        _timed(session, 5, lambda: _stage(ppo.run, stages[2], root, force=force))
        outcome = Outcome(
            sft=_answered(root / "ppo", 0), ppo=_answered(root / "ppo", scale.ppo_steps), seed=session.seed
        )
        save_json(root / "results.json", outcome.summary())
        found = outcome.difference("gold")
        session.record(5, {"gold/difference": found.mean, "gold/low": found.low, "gold/high": found.high})
        console = Console(stderr=True, quiet=config.run.quiet, highlight=False)
        show(console, outcome)
        _say_where(session, config, time.perf_counter() - began)
    return root


def _as_begun(config: QuickstartConfig) -> QuickstartConfig:
    """Name the directory as it was begun: by that path its stages know one another's models and data."""
    root = config.run.dir
    settings = cast("JsonObject", Run.open(root).config["run"])
    began = Path(str(settings.get("dir", root)))
    if began.resolve() != root.resolve():
        raise RunError(
            f"{root} was begun as {began}, a path by which its stages know one another; "
            "put it there, or resume it in the folder where it was begun"
        )
    return replace(config, run=replace(config.run, dir=began))


def _timed(session: Session, step: int, stage: Callable[[], None]) -> None:
    _leave_if_asked(session)
    began = time.perf_counter()
    stage()
    session.run.timing(step, stage=STAGES[step - 1], seconds=round(time.perf_counter() - began, 2))


def _leave_if_asked(session: Session) -> None:
    """Stop where a signal asked for it while no job of the three was at work, each of which listens for itself."""
    if session.stopping:
        raise Stopped(f"stopped; go on with: bridle resume {session.run.path}")


def _stage(job: Callable[..., Path], config: _C, root: Path, *, force: bool) -> None:
    """Run one job unless it has finished; take it up where it stopped if it has begun."""
    begun = (config.run.dir / "config.json").is_file()
    if begun and Run.open(config.run.dir).state() is RunState.FINISHED:
        return
    try:
        job(config, resume=begun, force=force)
    except Stopped:
        raise Stopped(f"stopped; go on with: bridle resume {root}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped at once; go on with: bridle resume {root}") from None


def _write_world(config: QuickstartConfig, session: Session, known: list[Order], unknown: list[Order]) -> None:
    """Write the files that a user of the three jobs would bring, and the model to start from."""
    root, scale, seed = config.run.dir, config.scale, session.seed
    files = {
        "demonstrations": rows.demonstrations(known, scale.demonstrations, seed=seed),
        "prompts": rows.prompts(known, scale.prompts, seed=seed, stream="prompts"),
        "held_out": rows.prompts(unknown, scale.held_out, seed=seed, stream="held_out"),
    }
    for name, values in files.items():
        write_lines(root / f"{name}.jsonl", values, texts=True)
    gold = [gold_score(row["prompt"], row["answer"]) for row in files["demonstrations"]]
    session.say(f"demonstrations: mean gold score {sum(gold) / len(gold):.2f}")
    if not (root / "fresh").is_dir():
        with session.run.export("fresh") as folder:
            tokenizer = new_tokenizer()
            save_model(folder, new_model(tokenizer, seed), tokenizer)


def _write_rankings(config: QuickstartConfig, session: Session, known: list[Order]) -> None:
    """Rank answers of the SFT model by the gold score, as people would rank them."""
    path, scale = config.run.dir / "rankings.jsonl", config.scale
    if path.exists():
        return
    asked = [row["prompt"] for row in rows.prompts(known, scale.ranked_prompts, seed=session.seed, stream="ranked")]
    ranked: list[rows.Ranked] = []
    with session.progress(scale.ranked_prompts, "rank") as progress:
        for answered, done in rows.rankings(config.run.dir / "sft" / "policy", asked, seed=session.seed):
            ranked += done
            progress.advance(answered, ranked=len(ranked))
            _leave_if_asked(session)
    if len(ranked) < 2:
        raise DataError(
            f"too few of {scale.ranked_prompts} prompts got {rows.RANKED} answers of different quality; "
            "raise scale.ranked_prompts, or scale.sft_epochs for a better SFT model"
        )
    write_lines(path, ranked, texts=True)


def _answered(folder: Path, step: int) -> Answered:
    """Read what a PPO run said on the held-out prompts after ``step`` steps."""
    run = Run.open(folder)
    said = run.read_samples(step, name="evaluation")
    metrics = [row for row in run.metrics() if row["step"] == step and "evaluation/score" in row][-1]
    return Answered(
        prompts=tuple(str(row["prompt"]) for row in said),
        answers=tuple(str(row["answer"]) for row in said),
        rewards=tuple(_number(row, "score") for row in said),
        gold=tuple(_number(cast("JsonObject", row["components"]), "gold/score") for row in said),
        kl=tuple(_number(row, "exact_kl") for row in said),
        lengths=tuple(int(_number(row, "length")) for row in said),
        entropy=_number(metrics, "evaluation/entropy"),
        eos_share=_number(metrics, "evaluation/eos_share"),
    )


def _number(row: JsonObject, name: str) -> float:
    return float(cast("float", row[name]))


def _say_where(session: Session, config: QuickstartConfig, seconds: float) -> None:
    """Say how long it took, where everything lies, and how to run each stage by hand."""
    root = config.run.dir
    session.say(f"{seconds:.0f} s. Everything lies in {root}: sft/policy, reward/reward and ppo/policy are the models,")
    session.say("*.jsonl the data, results.json the table. The same stages by hand:")
    again = Path(f"{root}-again")
    for job, stage in (("sft", sft_config(config)), ("reward", reward_config(config)), ("ppo", ppo_config(config))):
        session.say("  " + command(job, replace(stage, run=replace(stage.run, dir=again / job))))
