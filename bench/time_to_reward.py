"""Time to reward: what it takes until the stories model tells sad stories, in Bridle and in TRL 1.12.

    python bench/time_to_reward.py bridle bridle-swift --seeds 0 1 2      the recipe, and what was found fastest
    python bench/time_to_reward.py recipe usual --seeds 0 --peers PEERS-TRL/bin/python    settings of the grid for TRL
    python bench/time_to_reward.py table

The task is recipes/stories: a gold score at least 0.8 below the base model's at an exact KL of at most 20 nats, both on the
same held-out prompts. A side trains; after every iteration its policy is put aside; policies are judged afterwards, by one
program for both, from the first whose own answers in training come near. Time is that of the iterations up to the first
policy that is good enough: without imports, opening of models, judging, and putting policies aside. Processor seconds of one
thread are what is compared, wall seconds are kept beside them. A side ends
once its own answers in two iterations in a row are good enough, or after its limit. Raw figures:
bench/results/time_to_reward/.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peers.language_work import Laps, PPOWork

from bridle.jobs import ppo
from bridle.jobs.asked import open_prompts
from bridle.jobs.ppo import PPOConfig
from bridle.jobs.session import Session
from bridle.language.descriptions import describe_causal_lm
from bridle.language.evaluate import assess
from bridle.language.roles import CriticSettings, open_roles
from bridle.language.scorers import RewardSettings, build_scorer
from bridle.runs import Run

HERE = Path(__file__).resolve().parent
STORIES = HERE.parent / "recipes" / "stories"
RESULTS = HERE / "results" / "time_to_reward"
FALL, MOST_KL, NEAR = 0.8, 20.0, 0.2
ITERATIONS = 40

RECIPE = {"prompts": 128, "prompt_tokens": 16, "rollout_rows": 128, "stops": True, "iterations": ITERATIONS}
SETTINGS: dict[str, dict[str, Any]] = {
    "recipe": RECIPE | {"epochs": 2, "minibatches": 2, "lr": 1e-3, "kl": 0.04, "value": 1.0},
    "tight": RECIPE | {"epochs": 2, "minibatches": 2, "lr": 1e-3, "kl": 0.08, "value": 1.0},
    "small-batch": RECIPE
    | {"prompts": 64, "rollout_rows": 64, "epochs": 2, "minibatches": 2, "lr": 1e-3, "kl": 0.08, "value": 1.0},
    "few-epochs": RECIPE | {"epochs": 1, "minibatches": 4, "lr": 1e-3, "kl": 0.08, "value": 1.0},
    "usual": RECIPE | {"epochs": 4, "minibatches": 4, "lr": 3e-4, "kl": 0.05, "value": 0.1},
    "swift": RECIPE
    | {
        "prompts": 64,
        "rollout_rows": 64,
        "epochs": 2,
        "minibatches": 2,
        "lr": 7e-4,
        "kl": 0.1,
        "value": 1.0,
        "lam": 1.0,
    },
    "brief": RECIPE
    | {
        "prompts": 64,
        "rollout_rows": 64,
        "epochs": 1,
        "minibatches": 4,
        "lr": 7e-4,
        "kl": 0.1,
        "value": 1.0,
        "lam": 1.0,
    },
    "many-steps": RECIPE | {"epochs": 4, "minibatches": 4, "lr": 1e-3, "kl": 0.1, "value": 0.1},
}
"""The grid for TRL; brief is what Bridle does best with, but for a minibatch more, since TRL wants equal ones; swift what it
did best with before. Everything else stands at the recipe's (temperature 1, answers of 64 tokens, one step per minibatch)
or at TRL's own (λ = 0.95, γ = 1, clip 0.2, value clip 0.2, AdamW, a linear fall of the learning rate, no warm-up)."""


def recipe(folder: Path, prompts: Path, seed: int) -> PPOConfig:
    """The stories recipe's own configuration, one checkpoint an iteration, and hardly any evaluation of its own."""
    sys.path.insert(0, str(STORIES))
    from run import make_prompts, ppo_config

    make_prompts(prompts)
    judge = RewardSettings(functions=(f"{STORIES}/judge.py:dark",))
    config: PPOConfig = ppo_config(folder, prompts, judge, 0.04, ITERATIONS, seed)
    return replace(
        config,
        run=replace(config.run, checkpoint_every=1, keep_checkpoints=ITERATIONS + 1, quiet=True, threads=1),
        evaluation=replace(config.evaluation, held_out=2, gold=()),
    )


def swift(config: PPOConfig) -> PPOConfig:
    """What was found to get there soonest, on seeds 100 to 105: one pass, undiscounted credit, a value head on the trunk."""
    optim = {"lr": 7e-4, "warmup_steps": 0}
    return replace(
        config,
        prompts_per_step=64,
        kl=replace(config.kl, coefficient=0.07),
        advantage=replace(config.advantage, lam=1.0),
        ppo=replace(config.ppo, epochs=1, minibatches=3, micro_batch_tokens=4_096),
        actor=replace(config.actor, **optim),
        critic=CriticSettings(source="trunk"),
        critic_optim=replace(config.critic_optim, lr=1e-3, warmup_steps=0),
    )


class Judged:
    """What policies are worth on the held-out prompts, all with the same draws."""

    def __init__(self, config: PPOConfig, *, held_out: int) -> None:
        evaluation = replace(config.evaluation, held_out=held_out)
        self._config = replace(config, evaluation=evaluation)
        device = torch.device("cpu")
        self._roles = open_roles(
            config.model,
            CriticSettings(source="trunk"),
            None,
            temperature=1.0,
            device=device,
            compute_dtype=torch.float32,
        )
        self._scorer = build_scorer(config.reward, self._roles.tokenizer, device=device)
        _, self._prompts, _ = open_prompts(self._config, describe_causal_lm(config.model))

    def __call__(self, folder: Path | None) -> dict[str, float]:
        """Gold score and exact KL of the policy in ``folder``, of the base model without one."""
        roles = self._roles
        if folder is not None:
            roles.restore_policy(str(folder))
        found = assess(
            roles.policy,
            roles.reference,
            roles.sampler,
            self._scorer,
            lambda ids: str(roles.tokenizer.decode(ids, skip_special_tokens=True)),
            self._prompts,
            self._config.sampling,
            seed=0,
            budget=16_384,
        ).metrics()
        return {"gold": -found["score"], "gold_ci95": found["score_ci95"], "exact_kl": found["exact_kl"]}


def train_bridle(config: PPOConfig, until: float) -> dict[str, Any]:
    """Run the job; checkpoints are written off the clock, as the other side's policies are."""
    laps, whole, end_step = Laps(), Session.steps, Session.end_step

    def end(session: Session, *given: Any, **named: Any) -> None:
        laps.mark("iteration")
        end_step(session, *given, **named)
        laps.skip()

    def steps(session: Session, last: int) -> Iterator[int]:
        before = False
        for step in whole(session, last):
            laps.skip()
            yield step
            laps.mark("iteration")
            laps.end()
            seen = [row for row in session.run.metrics() if "score" in row][-1]
            now = float(str(seen["score"])) >= until and float(str(seen["exact_kl"])) <= MOST_KL
            if before and now:
                return
            before = now

    with mock.patch.object(Session, "steps", steps), mock.patch.object(Session, "end_step", end):
        run = Run.open(ppo.run(config))
    scores = [float(str(row["score"])) for row in run.metrics() if "score" in row]
    return {
        "iterations": laps.rows,
        "scores": scores,
        "kl": [row.get("exact_kl") for row in run.metrics() if "score" in row],
    }


def train_trl(python: str, work: PPOWork) -> dict[str, Any]:
    """Run TRL's side in its own interpreter."""
    done = subprocess.run(
        [python, str(HERE / "peers" / "trl_ppo.py"), work.text()],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(work.threads)},
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"trl_ppo.py failed:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    logs = found.pop("logs")
    return {
        **found,
        "scores": [log["objective/scores"] for log in logs],
        "kl": [log["objective/kl"] for log in logs],
    }


OWN: dict[str, Callable[[PPOConfig], PPOConfig]] = {"bridle": lambda config: config, "bridle-swift": swift}


def first_good(
    judged: Judged, scores: list[float], policies: list[Path], goal: float
) -> tuple[int | None, dict[str, dict[str, float]]]:
    """The first iteration whose policy is good enough, looking from where the answers of training come near."""
    seen: dict[str, dict[str, float]] = {}
    near = next((i for i, score in enumerate(scores) if -score <= goal + NEAR), len(scores))
    for i in range(max(0, near - 1), len(policies)):
        found = seen[str(i + 1)] = judged(policies[i])
        if found["gold"] <= goal and found["exact_kl"] <= MOST_KL:
            return i + 1, seen
    return None, seen


def measure(name: str, given: argparse.Namespace, seed: int, judged: Judged, base: dict[str, float]) -> dict[str, Any]:
    """One training and its judgement; ``name`` is bridle, bridle-swift or a setting of the grid."""
    goal = base["gold"] - FALL
    with tempfile.TemporaryDirectory() as place:
        config = recipe(Path(place) / "run", Path(place), seed)
        if name in OWN:
            found = train_bridle(OWN[name](config), until=-goal)
            run = Run.open(Path(place) / "run")
            policies = [checkpoint.path / "policy" for checkpoint in sorted(run.checkpoints(), key=lambda c: c.step)]
        else:
            work = PPOWork(
                model=config.model.path,
                data=str(Path(place) / "prompts.jsonl"),
                judge=f"{STORIES}/judge.py",
                seed=seed,
                snapshots=f"{place}/snapshots",
                until=-goal,
                most_kl=MOST_KL,
                limit=given.limit,
                **SETTINGS[name],
            )
            found = train_trl(given.peers, work)
            policies = sorted(Path(place).glob("snapshots/step-*"), key=lambda path: int(path.name[5:]))
            for (
                folder
            ) in policies:  # the trainer saves weights and configuration; the judge wants the tokenizer beside them
                for file in Path(config.model.path).glob("tokenizer*"):
                    (folder / file.name).write_bytes(file.read_bytes())
        reached, seen = first_good(judged, found["scores"], policies, goal)
    rows = found["iterations"]
    totals = {kind: sum(row[kind] for row in rows[:reached]) for kind in ("seconds", "cpu_seconds")}
    return {
        "side": "bridle" if name in OWN else "trl",
        "setting": {"name": name, **SETTINGS.get(name, {})},
        "seed": seed,
        "base": base,
        "goal": {"gold": goal, "exact_kl": MOST_KL},
        "held_out": given.held_out,
        "reached_iteration": reached,
        "reached": {kind: None if reached is None else value for kind, value in totals.items()},
        "spent": {kind: sum(row[kind] for row in rows) for kind in ("seconds", "cpu_seconds")},
        "seconds_per_iteration": statistics.median(row["cpu_seconds"] for row in rows),
        "judged": seen,
        **found,
    }


def table() -> None:
    """What has been measured, and how many times as long each took as the median of Bridle's fastest setting."""
    found = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    own: dict[str, list[float]] = {}
    for one in found:
        if one["side"] == "bridle" and one["reached_iteration"]:
            own.setdefault(one["setting"]["name"], []).append(one["reached"]["cpu_seconds"])
    least = min((statistics.median(seconds) for seconds in own.values()), default=None)
    for one in found:
        name, spent, reached = one["setting"]["name"], one["spent"]["cpu_seconds"], one["reached"]["cpu_seconds"]
        shown = f"after {one['reached_iteration']} iterations, {reached:.0f} s of processor" if reached else "never"
        times = f"{(reached or spent) / least:.1f}×" if least else ""
        print(
            f"{one['side']:6} {name:12} seed {one['seed']}: {shown}; {'' if reached else 'more than '}{times} "
            f"({len(one['iterations'])} iterations, {spent:.0f} s, {one['seconds_per_iteration']:.2f} s each)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="+", choices=(*OWN, *SETTINGS, "table"), metavar="WHAT")
    parser.add_argument("--peers", metavar="PYTHON", help="interpreter with TRL 1.12")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=600.0, help="processor seconds after which TRL's side gives up")
    parser.add_argument("--held-out", type=int, default=512)
    given = parser.parse_args()
    if given.what == ["table"]:
        table()
        return
    if given.peers is None and not set(given.what) <= set(OWN):
        parser.error("--peers PYTHON is needed: the interpreter with TRL 1.12 (bench/peers/README.md)")
    torch.set_num_threads(1)
    RESULTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        judged = Judged(recipe(Path(place) / "run", Path(place), 0), held_out=given.held_out)
        base = judged(None)
    for name, seed in itertools.product(given.what, given.seeds):
        words = ["python", "bench/time_to_reward.py", name, "--seeds", str(seed), "--held-out", str(given.held_out)]
        words += [] if name in OWN else ["--limit", f"{given.limit:g}", "--peers", "PEERS-TRL/bin/python"]
        found = {"command": shlex.join(words), **measure(name, given, seed, judged, base)}
        (RESULTS / f"{name}-{seed}.json").write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name} seed {seed}: reached {found['reached_iteration']}, {found['reached']}", flush=True)


if __name__ == "__main__":
    main()
