"""Reward against step: Bridle's defaults beside TRL 1.12, same task, prompts a step, learning rate and leash.

    python bench/learning_per_step.py run bridle bridle-own-critic bridle-drowned --seeds 0 1 2
    python bench/learning_per_step.py run trl trl-swift --seeds 0 1 2 --peers PEERS-TRL/bin/python
    python bench/learning_per_step.py table

The task is recipes/stories. Nothing but the learning rate (7e-4), β and the answers' 64 tokens is told to ``bridle``: where
the leash is, critic, λ, epochs, minibatches and every clip are its defaults. ``bridle-own-critic`` is what these were
before: a critic with a backbone of its own, four epochs, λ = 0.95, k1 in the reward. ``bridle-drowned`` shows what the defaults
keep clear of: k1 in the reward and values at full weight on the trunk. ``trl`` is TRL's own work (four epochs of
four steps, λ = 0.95), ``trl-swift`` what was found to get TRL to the goal soonest (two of two, λ = 1). Rewards are those of
the answers that a step learns from, so the first is the model's as it was; KL is each side's own figure: the exact KL of a
quarter of the answers, and TRL's mean of summed log-ratios. Raw figures: bench/results/learning_per_step/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shlex
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peers.language_work import PPOWork
from time_to_reward import HERE, RECIPE, STORIES, recipe, train_bridle, train_trl

from bridle.jobs.ppo import PPOConfig
from bridle.language.roles import CriticSettings
from bridle.language.shaping import KLSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings

RESULTS = HERE / "results" / "learning_per_step"
STEPS, PROMPTS, LR = 15, 64, 7e-4
IN_REWARD, IN_LOSS = 0.1, 0.07
"""β where the leash is in the reward, and in the loss, where the same β is the tighter: these end at about the same KL."""
SHARED = {**RECIPE, "iterations": STEPS, "prompts": PROMPTS, "rollout_rows": PROMPTS, "lr": LR, "kl": IN_REWARD}
TRL: dict[str, dict[str, Any]] = {
    "trl": {**SHARED, "epochs": 4, "minibatches": 4, "value": 0.1, "lam": 0.95},
    "trl-swift": {**SHARED, "epochs": 2, "minibatches": 2, "value": 1.0, "lam": 1.0},
}
OWN = ("bridle", "bridle-own-critic", "bridle-drowned")


def own(name: str, folder: Path, seed: int) -> PPOConfig:
    """The task with Bridle's defaults, with those that it had before, or with what drowns the policy."""
    task = recipe(folder / "run", folder, seed)
    optim = OptimSettings(lr=LR, schedule="linear")
    config = PPOConfig(
        run=replace(task.run, checkpoint_every=1000),
        model=task.model,
        prompts=task.prompts,
        reward=task.reward,
        evaluation=task.evaluation,
        sampling=task.sampling,
        steps=STEPS,
        kl=KLSettings(coefficient=IN_LOSS),
        actor=optim,
        critic_optim=optim,
    )
    if name == "bridle":
        return config
    if name == "bridle-drowned":
        leash = KLSettings(where="reward", coefficient=IN_REWARD)
        return replace(config, kl=leash, ppo=replace(config.ppo, value_coefficient=1.0))
    return replace(
        config,
        kl=KLSettings(where="reward", coefficient=IN_REWARD),
        critic=CriticSettings(source="actor"),
        advantage=AdvantageSettings(gamma=1.0, lam=0.95),
        ppo=PPOSettings(epochs=4, micro_batch_tokens=4_096),
    )


def measure(name: str, seed: int, peers: str) -> dict[str, Any]:
    """One training: score and KL of every step's answers, and what the step took."""
    with tempfile.TemporaryDirectory() as place:
        config = own("bridle" if name in TRL else name, Path(place), seed)
        if name in OWN:
            return train_bridle(config, until=float("inf"))
        return train_trl(
            peers,
            PPOWork(
                model=config.model.path,
                data=str(Path(place) / "prompts.jsonl"),
                judge=f"{STORIES}/judge.py",
                seed=seed,
                **TRL[name],
            ),
        )


def table() -> None:
    """Means over seeds and over five steps at a time, with the least and the largest seed."""
    print("| | seeds | score of steps 1 to 5 | 6 to 10 | 11 to 15 | KL of 6 to 10 | 11 to 15 | s of processor a step |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for name in (*OWN, *TRL):
        found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob(f"{name}-[0-9].json"))]
        if not found:
            continue
        cells = [f"{name} | {len(found)}"]
        for key, parts in (("scores", (0, 5, 10)), ("kl", (5, 10))):
            for first in parts:
                means = [statistics.mean(one[key][first : first + 5]) for one in found]
                digits = 2 if key == "scores" else 1
                mean, least, most = (f"{v:.{digits}f}" for v in (statistics.mean(means), min(means), max(means)))
                cells.append(f"{mean} ({least} to {most})")
        seconds = [row["cpu_seconds"] for one in found for row in one["iterations"]]
        cells.append(f"{statistics.median(seconds):.2f}")
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    run = commands.add_parser("run")
    run.add_argument("what", nargs="+", choices=(*OWN, *TRL), metavar="WHAT")
    run.add_argument("--peers", metavar="PYTHON", help="interpreter with TRL 1.12")
    run.add_argument("--seeds", type=int, nargs="+", default=[0])
    commands.add_parser("table")
    given = parser.parse_args()
    if given.command == "table":
        table()
        return
    if given.peers is None and not set(given.what) <= set(OWN):
        parser.error("--peers PYTHON is needed: the interpreter with TRL 1.12 (bench/peers/README.md)")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed, name in itertools.product(given.seeds, given.what):
        words = ["python", "bench/learning_per_step.py", "run", name, "--seeds", str(seed)]
        words += [] if name in OWN else ["--peers", "PEERS-TRL/bin/python"]
        found = {"command": shlex.join(words), "side": name, "seed": seed, **measure(name, seed, given.peers)}
        (RESULTS / f"{name}-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
        shown = " ".join(f"{score:+.2f}" for score in found["scores"])
        print(f"{name} seed {seed}: {shown}; KL {found['kl'][-1]:.1f}", flush=True)


if __name__ == "__main__":
    main()
