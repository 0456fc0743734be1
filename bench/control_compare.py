"""A2C, PPO without a clip, PPO-Clip and TRPO in the same worlds, on the same seeds; `docs/learn/comparison.md` reads it.

    python bench/control_compare.py sweep        4 settings of each method in each world, 2 seeds of their own, shorter
    python bench/control_compare.py run          the best of each, 5 seeds
    python bench/control_compare.py page         the tables into docs/learn/comparison.md, and its picture

A run that ``bench/results/control_compare.json`` holds is not run again, so an interrupted one is taken up by the same command;
``--methods``, ``--envs`` and ``--seconds`` (stop after so many) take a part of it.

All methods have the same networks, γ, λ, statistics of observations and rewards, and number of environments. KL per
update is exact: the mean over the rollout's states of KL(before ‖ after), measured around the whole update; the time
of measuring is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from bridle.batch import Batch
from bridle.control import EvaluationSettings, WorldSettings
from bridle.jobs import control
from bridle.jobs.control import ControlConfig, Learner
from bridle.jobs.session import RunSettings
from bridle.learn.a2c import A2CSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.learn.record import UpdateStep
from bridle.learn.trpo import TRPOSettings
from bridle.runs import Run

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "control_compare.json"
PAGE = ROOT / "docs" / "learn" / "comparison.md"
PICTURE = ROOT / "docs" / "learn" / "figures" / "comparison.png"

SEEDS = (0, 1, 2, 3, 4)
SWEEP_SEEDS = (100, 101)
SWEEP_SHARE = 0.3
"""Of the steps; a short run is enough to tell a good setting from a bad one."""

ENVIRONMENTS = 32
"""Copies that run side by side."""

ENVS: dict[str, tuple[int, dict[str, Any]]] = {
    "CartPole-v1": (100_000, {"n_steps": 32}),
    "Pendulum-v1": (
        100_000,
        {"n_steps": 64, "advantage": AdvantageSettings(gamma=0.9, lam=0.95), "normalise_observations": True},
    ),
    "Acrobot-v1": (100_000, {"n_steps": 64, "normalise_observations": True}),
}
"""Budget and what all methods share; rollouts of 1024 and 2048 transitions, A2C's but a few steps long."""

METHODS = {"a2c": "A2C", "ppo": "PPO, no clip", "ppo-clip": "PPO-Clip", "trpo": "TRPO"}

SWEEP: dict[str, list[dict[str, float]]] = {
    "a2c": [{"lr": lr, "n_steps": n} for n in (2, 8) for lr in (1e-3, 3e-3)],
    "ppo": [{"lr": lr, "epochs": epochs} for epochs in (4, 10) for lr in (3e-4, 1e-3)],
    "ppo-clip": [{"lr": lr, "epochs": epochs} for epochs in (4, 10) for lr in (3e-4, 1e-3)],
    "trpo": [{"lr": lr, "max_kl": max_kl} for max_kl in (0.01, 0.04) for lr in (1e-3, 3e-3)],
}
"""What each method is offered: two settings of the two numbers that matter most to it; ``lr`` is TRPO's critic's."""


def config_of(env: str, method: str, choice: dict[str, float], seed: int, share: float, place: Path) -> ControlConfig:
    """One run, but for what all runs of an environment have in common."""
    steps, settings = ENVS[env]
    minibatches = settings["n_steps"] * ENVIRONMENTS // 128
    config = ControlConfig(
        env=env,
        total_steps=int(steps * share),
        world=WorldSettings(num_envs=ENVIRONMENTS),
        optim=OptimSettings(lr=choice["lr"], schedule="linear", eps=1e-5, max_grad_norm=0.5),
        restart_every=0,
        evaluation=EvaluationSettings(every=0, final_episodes=30 if share == 1.0 else 5),
        run=RunSettings(dir=place, seed=seed, threads=1, quiet=True, checkpoint_minutes=1e6),
        **settings,
    )
    match method:
        case "a2c":
            return replace(
                config,
                algorithm="a2c",
                n_steps=int(choice["n_steps"]),
                a2c=A2CSettings(value_coefficient=0.5),
                record_every=8,
            )
        case "ppo" | "ppo-clip":
            clip = 0.2 if method == "ppo-clip" else None
            ppo = PPOSettings(epochs=int(choice["epochs"]), minibatches=minibatches, value_coefficient=0.5, clip=clip)
            return replace(config, ppo=ppo)
        case "trpo":
            trpo = TRPOSettings(max_kl=choice["max_kl"], critic_epochs=10, critic_minibatches=minibatches)
            return replace(config, algorithm="trpo", trpo=trpo)
    raise ValueError(f"method={method!r}: expected one of {', '.join(METHODS)}")


class Watched(Learner):
    """Measures how far each update moves the policy, and what that and the update cost."""

    kls: list[float]
    update_seconds: float
    measuring_seconds: float

    def update(self, batch: Batch, *, seed: int, step: int) -> Iterator[UpdateStep]:
        started = time.process_time()
        frozen = self.policy.freeze(batch.units)
        between = time.process_time()
        yield from super().update(batch, seed=seed, step=step)
        done = time.process_time()
        with torch.no_grad():
            self.kls.append(float(self.policy.kl(batch.units, frozen).mean()))
        self.update_seconds += done - between
        self.measuring_seconds += between - started + time.process_time() - done


def measure(env: str, method: str, choice: dict[str, float], seed: int, share: float) -> dict[str, Any]:
    """Train once and tell how it went."""
    watched: list[Watched] = []

    class Here(Watched):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self.kls, self.update_seconds, self.measuring_seconds = [], 0.0, 0.0
            watched.append(self)

    with tempfile.TemporaryDirectory() as folder, patch.object(control, "Learner", Here):
        config = config_of(env, method, choice, seed, share, Path(folder) / "run")
        started = time.process_time()
        run = Run.open(control.run(config))
        seconds = time.process_time() - started
        rows = run.metrics()
    (learner,) = watched
    curve = [(row["actions"], row["return_of_last_100"]) for row in rows if row["episodes"] >= 20]
    kls = sorted(learner.kls)
    return {
        "method": method,
        "env": env,
        "seed": seed,
        "choice": choice,
        "share": share,
        "actions": rows[-1]["actions"],
        "final": {name: value for name, value in rows[-1].items() if name.startswith("final/")},
        "last_100": rows[-1]["return_of_last_100"],
        "best_of_last_100": max(mean for _, mean in curve),
        "largest_fall": largest_fall([mean for _, mean in curve]),
        "curve": [[int(actions), round(mean, 2)] for actions, mean in thinned(curve)],
        "updates": len(kls),
        "kl_median": statistics.median(kls),
        "kl_p95": kls[int(0.95 * (len(kls) - 1))],
        "kl_max": kls[-1],
        "kl_curve": [[i, round(kl, 6)] for i, kl in thinned(list(enumerate(learner.kls)))],
        "trust_region": refusals(rows) if method == "trpo" else None,
        "update_cpu_seconds": round(learner.update_seconds, 2),
        "cpu_seconds": round(seconds - learner.measuring_seconds, 2),
    }


def refusals(rows: list[dict[str, float]]) -> dict[str, float]:
    """How TRPO's line searches ended."""
    shares = [row["trust_region/share"] for row in rows]
    return {
        "refused": sum(share == 0 for share in shares),
        "taken_whole": sum(share == 1 for share in shares),
        "updates": len(shares),
        "residual_median": statistics.median(row["trust_region/residual"] for row in rows),
    }


def largest_fall(means: list[float]) -> float:
    """The deepest fall of the moving return below its best so far, as a share of the most that the run had gained."""
    best, deepest, most = means[0], 0.0, max(means) - means[0]
    for mean in means:
        best = max(best, mean)
        deepest = max(deepest, best - mean)
    return round(deepest / most, 3) if most > 0 else 0.0


def thinned(points: list[tuple[float, float]], count: int = 60) -> list[tuple[float, float]]:
    """At most about ``count`` of the points, the last one included."""
    every = max(1, len(points) // count)
    return points[::-1][::every][::-1]


def key_of(result: dict[str, Any]) -> tuple[Any, ...]:
    return (result["env"], result["method"], tuple(sorted(result["choice"].items())), result["seed"], result["share"])


def load() -> list[dict[str, Any]]:
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def keep(results: list[dict[str, Any]]) -> None:
    """Write all results, whole or not at all."""
    lines = ",\n".join(json.dumps(result) for result in results)
    commands = [f"python bench/control_compare.py {what}" for what in ("sweep", "run")]
    aside = RESULTS.with_suffix(".part")
    aside.write_text(f'{{"commands": {json.dumps(commands)},\n"runs": [\n{lines}\n]}}\n')
    os.replace(aside, RESULTS)


def own_of(
    results: list[dict[str, Any]], env: str, method: str, share: float, choice: dict[str, float] | None = None
) -> list[dict[str, Any]]:
    """The results of one method in one environment, of all settings or of one."""
    same = [r for r in results if (r["env"], r["method"], r["share"]) == (env, method, share)]
    return [r for r in same if choice is None or r["choice"] == choice]


def best_choice(results: list[dict[str, Any]], env: str, method: str) -> dict[str, float]:
    """The setting whose sweep seeds earned most over their last 100 episodes, on average."""

    def score(choice: dict[str, float]) -> float:
        own = own_of(results, env, method, SWEEP_SHARE, choice)
        if len(own) < len(SWEEP_SEEDS):
            raise SystemExit(f"the sweep of {method} in {env} is not finished: python bench/control_compare.py sweep")
        return statistics.mean(r["last_100"] for r in own)

    return max(SWEEP[method], key=score)


def work(given: argparse.Namespace) -> None:
    """Do what is not done yet, seed by seed, so that every prefix of the work is a fair one."""
    torch.set_num_threads(1)
    results = load()
    done = {key_of(result) for result in results}
    share, seeds = (SWEEP_SHARE, SWEEP_SEEDS) if given.what == "sweep" else (1.0, SEEDS)
    started = time.monotonic()
    for env in given.envs:
        for seed in seeds:
            for method in given.methods:
                choices = SWEEP[method] if given.what == "sweep" else [best_choice(results, env, method)]
                for choice in choices:
                    if key_of({"env": env, "method": method, "choice": choice, "seed": seed, "share": share}) in done:
                        continue
                    if time.monotonic() - started > given.seconds:
                        return
                    result = measure(env, method, choice, seed, share)
                    results = [*load(), result]
                    keep(results)
                    line = (
                        f"last 100 {result['last_100']:8.1f}, KL {result['kl_median']:.4f} (max {result['kl_max']:.3g})"
                    )
                    print(f"{env} {method} {choice} seed {seed}: {line}, {result['cpu_seconds']} s", flush=True)


COLUMNS = (
    "method",
    "final return, most likely actions: mean ± deviation over seeds",
    "worst seed",
    "final return, drawn actions",
    "largest fall: median, worst",
    "KL of an update: median, 95 %, largest",
    "updates, CPU s",
)


def tables(results: list[dict[str, Any]]) -> str:
    """What was found in each environment, and what the sweep had said before."""
    blocks = []
    for env, (steps, _) in ENVS.items():
        rows = {method: own_of(results, env, method, 1.0) for method in METHODS}
        # seeds that some method has not run yet would compare unlike with unlike
        seeds = sorted(set.intersection(*({r["seed"] for r in own} for own in rows.values())))
        rows = {method: [r for r in own if r["seed"] in seeds] for method, own in rows.items()}
        if seeds:
            lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
            lines += [row_of(METHODS[method], own) for method, own in rows.items() if own]
            blocks += [
                f"### {env}, {steps:,} steps, {len(seeds)} of {len(SEEDS)} seeds",
                "\n".join(f"| {line} |" for line in lines),
            ]
            chosen = [f"{METHODS[method]} {named(own[0]['choice'])}" for method, own in rows.items() if own]
            blocks += [f"Chosen: {'; '.join(chosen)}.{searches(rows['trpo'])}"]
    blocks += [
        "### The sweep: return of the last 100 episodes, mean of two other seeds; median KL of an update in nats"
    ]
    for env, (steps, _) in ENVS.items():
        lines = [sweep_line(results, env, method) for method in METHODS]
        if all(lines):
            blocks += [f"{env}, {int(steps * SWEEP_SHARE):,} steps:", "\n".join(lines)]
    return "\n\n".join(blocks)


def searches(own: list[dict[str, Any]]) -> str:
    """How TRPO's line searches ended."""
    if not own:
        return ""
    whole, refused, updates = (
        sum(r["trust_region"][name] for r in own) for name in ("taken_whole", "refused", "updates")
    )
    return f" TRPO took {whole / updates:.0%} of its steps whole and refused {refused / updates:.1%}."


def named(choice: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in choice.items())


def sweep_line(results: list[dict[str, Any]], env: str, method: str) -> str:
    cells = []
    for choice in SWEEP[method]:
        own = own_of(results, env, method, SWEEP_SHARE, choice)
        if own:
            mean, kl = (statistics.mean(r[name] for r in own) for name in ("last_100", "kl_median"))
            cells.append(f"{named(choice)}: {mean:.0f} ({kl:.2g})")
    return f"- {METHODS[method]}: {'; '.join(cells)}" if cells else ""


def page(_: argparse.Namespace) -> None:
    """Put the tables between the page's marks, and draw the picture."""
    results = load()
    before, _, rest = PAGE.read_text().partition("<!-- tables -->")
    _, _, after = rest.partition("<!-- /tables -->")
    PAGE.write_text(f"{before}<!-- tables -->\n\n{tables(results)}\n\n<!-- /tables -->{after}")
    draw([r for r in results if r["share"] == 1.0])


def row_of(name: str, own: list[dict[str, Any]]) -> str:
    final = [r["final"]["final/deterministic/return_mean"] for r in own]
    sampled = [r["final"]["final/sampled/return_mean"] for r in own]
    spread = f" ± {statistics.stdev(final):.1f}" if len(final) > 1 else ""
    kl = [statistics.median(r[k] for r in own) for k in ("kl_median", "kl_p95")] + [max(r["kl_max"] for r in own)]
    falls = [r["largest_fall"] for r in own]
    updates = statistics.mean(r["update_cpu_seconds"] for r in own)
    cells = [
        name,
        f"{statistics.mean(final):.1f}{spread}",
        f"{min(final):.1f}",
        f"{statistics.mean(sampled):.1f}",
        f"{statistics.median(falls):.2f}, {max(falls):.2f}",
        ", ".join(f"{value:.2g}" for value in kl),
        f"{updates:.1f}",
    ]
    return " | ".join(cells)


def draw(results: list[dict[str, Any]]) -> None:
    """Returns above, KL of each update below; one line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from PIL import Image

    envs = [env for env in ENVS if any(r["env"] == env for r in results)]
    if not envs:
        return
    colours = dict(zip(METHODS, ("#7f7f7f", "#d95f02", "#1b6ca8", "#2a9d5c"), strict=True))
    figure, axes = pyplot.subplots(2, len(envs), figsize=(4.2 * len(envs), 6.2), squeeze=False, layout="constrained")
    for column, env in enumerate(envs):
        above, below = axes[0][column], axes[1][column]
        for result in (r for r in results if r["env"] == env):
            method, colour = result["method"], colours[result["method"]]
            label = METHODS[method] if result["seed"] == SEEDS[0] else None
            above.plot(*zip(*result["curve"], strict=True), color=colour, alpha=0.7, linewidth=1.1, label=label)
            steps = [update * result["actions"] / result["updates"] for update, _ in result["kl_curve"]]
            below.semilogy(
                steps, [max(kl, 1e-7) for _, kl in result["kl_curve"]], color=colour, alpha=0.6, linewidth=0.9
            )
        above.set_title(env)
        below.set_xlabel("environment steps")
    axes[0][0].set_ylabel("return, mean of the last 100 episodes")
    axes[1][0].set_ylabel("KL(before ‖ after) of an update, nats")
    axes[0][0].legend(fontsize=8)
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})
    with Image.open(PICTURE) as drawn:
        drawn.convert("RGB").quantize(64).save(PICTURE, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("sweep", "run", "page"))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--envs", nargs="+", choices=list(ENVS), default=list(ENVS))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    given = parser.parse_args()
    {"sweep": work, "run": work, "page": page}[given.what](given)


if __name__ == "__main__":
    main()
