"""The same run with other threads, another order of its data, another micro-batch: what stays equal to the bit, what how near.

    python bench/exactness.py            # measure, write bench/results/exactness.json and the table in docs/EXACT.md
    python bench/exactness.py --table    # only write the page's tables anew, also those of scripts/torture and survival_cost.py

Each job runs once as it is, once more just so, and once with each change. Compared are the first step's loss and gradient
norm (relative difference) and the finished weights (largest absolute difference, beside the largest move from the start).
The models are small, but large enough that PyTorch splits their products between two threads.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bridle.control.evaluate import EvaluationSettings
from bridle.control.making import WorldSettings
from bridle.control.networks import NetworkSettings
from bridle.jobs import control, ppo, reward, sft
from bridle.jobs.session import RunSettings
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.language.roles import CriticSettings
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.quickstart.model import new_tokenizer
from bridle.quickstart.words import vocabulary
from bridle.random import generator, torch_rng
from bridle.runs import Run
from bridle.runs.files import load_tensors, save_json

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "EXACT.md"
CHANGES = {
    "again": "just so once more",
    "threads": "2 threads instead of 1",
    "order": "the batch in another order",
    "micro": "a third of the micro-batch",
}
JUDGE = "def score(prompts, completions):\n    return [len(set(c.split())) / 8 for c in completions]\n"


def write_world(folder: Path) -> None:
    """Write a model, a reward model, demonstrations in two orders, pairs, prompts and a judge."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, words = new_tokenizer(), [word for word in vocabulary() if word.isalpha()]
    shape = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch_rng(0, "exactness-model"):
        save_model(folder / "model", LlamaForCausalLM(shape), tokenizer)
    save_model(folder / "reward", *load_reward_model(ModelSettings(path=str(folder / "model"))))
    draws = generator(0, "exactness-data")

    def text(low: int, high: int) -> str:
        return " ".join(draws.choice(words, int(draws.integers(low, high))))

    rows = [{"prompt": text(3, 12), "answer": text(8, 40)} for _ in range(48)]
    pairs = [{"prompt": text(3, 12), "chosen": text(8, 24), "rejected": text(4, 24)} for _ in range(48)]
    files = {"demos": rows, "permuted": rows[::-1], "pairs": pairs, "prompts": [{"prompt": r["prompt"]} for r in rows]}
    for name, values in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in values))
    (folder / "judge.py").write_text(JUDGE)


def _run(path: Path, change: str) -> RunSettings:
    return RunSettings(dir=path, threads=2 if change == "threads" else 1, quiet=True)


def run_sft(world: Path, path: Path, change: str) -> Path:
    """Six steps over all demonstrations: the order of the file is the order in the batch."""
    return sft.run(
        sft.SFTConfig(
            run=_run(path, change),
            model=ModelSettings(path=str(world / "model")),
            data=DataSettings(path=str(world / ("permuted" if change == "order" else "demos")) + ".jsonl"),
            epochs=6,
            batch_size=48,
            micro_batch_tokens=800 if change == "micro" else 2400,
            optim=OptimSettings(lr=1e-3),
            evaluation=sft.EvaluationSettings(share=0.0),
        )
    )


def run_reward(world: Path, path: Path, change: str) -> Path:
    """Six steps over pairs."""
    return reward.run(
        reward.RewardConfig(
            run=_run(path, change),
            model=ModelSettings(path=str(world / "model")),
            data=DataSettings(path=str(world / "pairs.jsonl")),
            epochs=3,
            batch_size=22,
            optim=OptimSettings(lr=1e-3),
        )
    )


def run_ppo(world: Path, path: Path, change: str) -> Path:
    """Four rollouts, two epochs each."""
    return ppo.run(
        ppo.PPOConfig(
            run=_run(path, change),
            model=ModelSettings(path=str(world / "model")),
            prompts=DataSettings(path=str(world / "prompts.jsonl")),
            reward=RewardSettings(functions=(f"{world}/judge.py:score",)),
            steps=4,
            prompts_per_step=32,
            sampling=SamplingSettings(max_new_tokens=24),
            ppo=PPOSettings(epochs=2, minibatches=2, micro_batch_tokens=400 if change == "micro" else 1200),
            actor=OptimSettings(lr=1e-3),
            critic=CriticSettings(source="actor"),
            critic_optim=OptimSettings(lr=1e-3),
            evaluation=ppo.EvaluationSettings(held_out=8, every=100),
        )
    )


def run_control(_: Path, path: Path, change: str) -> Path:
    """Eight rollouts in Pendulum with a network wide enough to be split."""
    return control.run(
        control.ControlConfig(
            env="Pendulum-v1",
            run=_run(path, change),
            total_steps=8 * 1024,
            n_steps=128,
            world=WorldSettings(num_envs=8),
            network=NetworkSettings(hidden=(256, 256)),
            ppo=PPOSettings(epochs=4, minibatches=4, micro_batch_tokens=86 if change == "micro" else None),
            normalise_observations=True,
            evaluation=EvaluationSettings(every=0, episodes=5, final_episodes=5),
        )
    )


JOBS: dict[str, tuple[Callable[[Path, Path, str], Path], str, tuple[str, ...]]] = {
    "sft": (run_sft, "policy/model.safetensors", ("again", "threads", "order", "micro")),
    "reward": (run_reward, "reward/model.safetensors", ("again", "threads")),
    "ppo": (run_ppo, "policy/model.safetensors", ("again", "threads", "micro")),
    "control ppo": (run_control, "policy/policy.safetensors", ("again", "threads", "micro")),
}
"""Job → how it is run, where its weights lie, and which changes there are."""


def _first(path: Path) -> dict[str, float]:
    """Loss and gradient norm of the first step."""
    row = next(row for row in Run.open(path).metrics() if row["step"] == 1)
    named = {"loss": ("loss", "policy_loss"), "grad_norm": ("grad_norm", "grad_norm/policy", "grad_norm/actor")}
    return {name: float(next(row[key] for key in keys if key in row)) for name, keys in named.items()}  # type: ignore[arg-type]


def compare(job: str, path: Path, other: Path) -> dict[str, Any]:
    """Hold one run against another."""
    where = JOBS[job][1]
    left, right = load_tensors(path / where), load_tensors(other / where)
    left = {name: value for name, value in left.items() if not name.startswith("moments/")}  # of what was seen
    one, two = _first(path), _first(other)
    return {
        "metrics_equal": (path / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes(),
        "weights_equal": all(torch.equal(left[name], right[name]) for name in left),
        "weights": max(float((left[name].double() - right[name].double()).abs().max()) for name in left),
        **{name: abs(one[name] - two[name]) / max(abs(one[name]), 1e-12) for name in one},
    }


def measure(jobs: tuple[str, ...] = tuple(JOBS)) -> dict[str, Any]:
    """Run every job as it is and with each change; return job → change → differences."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_world(Path(folder))
        for job in jobs:
            run, _, changes = JOBS[job]
            plain = run(Path(folder), Path(folder) / f"{job}-plain", "none")
            found[job] = {
                change: compare(job, plain, run(Path(folder), Path(folder) / f"{job}-{change}", change))
                for change in changes
            }
    return found


def table(found: dict[str, Any]) -> str:
    """Lay the differences out as a Markdown table."""
    head = "| job | the same run … | metrics and weights | loss of step 1 | gradient of step 1 | finished weights |\n"
    lines = [head, "| --- | --- | --- | --- | --- | --- |\n"]
    for job, changes in found["jobs"].items():
        for change, seen in changes.items():
            equal = seen["metrics_equal"] and seen["weights_equal"]
            numbers = [f"{seen[name]:.0e}" if seen[name] else "equal" for name in ("loss", "grad_norm", "weights")]
            said = "**equal to the bit**" if equal else "differ"
            lines.append(f"| {job} | {CHANGES[change]} | {said} | {' | '.join(numbers)} |\n")
    return "".join(lines)


def torture_table(found: dict[str, Any]) -> str:
    """Lay out what scripts/torture found: kills by what the run was at, over all jobs."""
    lines = ["| job | kills | of them losses of power | runs resumed to the end | files that differ |\n"]
    lines.append("| --- | --- | --- | --- | --- |\n")
    at: Counter[str] = Counter()
    for job, seen in found["jobs"].items():
        lost = seen["kills_by"].get("a loss of power", 0)
        wrong = len(seen["files_that_differ"])
        lines.append(f"| {job} | {seen['kills']} | {lost} | {seen['runs_resumed_to_the_end']} | {wrong} |\n")
        for phase, kills in seen["phases"].items():
            at[phase.partition(":")[0]] += kills
    lines += ["\n| the run was | kills |\n", "| --- | --- |\n"]
    return "".join([*lines, *(f"| {phase} | {kills} |\n" for phase, kills in at.most_common())])


def cost_table(found: dict[str, Any]) -> str:
    """Lay out what bench/survival_cost.py found."""
    head = "| job | one checkpoint | one in eight minutes | watching | in all | CPU time with and without, ratio |\n"
    lines = [head, "| --- | --- | --- | --- | --- | --- |\n"]
    for job, seen in found.items():
        shares = ("share_of_saving_every_eight_minutes", "share_of_watching", "share_in_all")
        percent = " | ".join(f"{100 * seen[name]:.2g} %" for name in shares)
        size = f"{seen['seconds_of_a_checkpoint']:.2g} s, {seen['checkpoint_bytes'] / 1e6:.2g} MB"
        lines.append(f"| {job} | {size} | {percent} | {seen['median_cpu_ratio']:.3f} |\n")
    return "".join(lines)


def page(text: str) -> str:
    """Return the page with every table of which there are figures as these have it."""
    tables = {"exactness": table, "torture": torture_table, "survival_cost": cost_table}
    for name, laid_out in tables.items():
        if not (RESULTS / f"{name}.json").is_file():
            continue
        content = laid_out(json.loads((RESULTS / f"{name}.json").read_text()))
        before, begin, rest = text.partition(f"<!-- {name}: begin -->\n")
        _, end, after = rest.partition(f"<!-- {name}: end -->\n")
        text = before + begin + content + end + after
    return text


def main() -> None:
    """Measure, and write figures and table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="measure nothing")
    if not parser.parse_args().table:
        save_json(RESULTS / "exactness.json", {"torch": torch.__version__, "jobs": measure()})
    PAGE.write_text(page(PAGE.read_text()))


if __name__ == "__main__":
    main()
