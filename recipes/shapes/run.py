"""The whole line on two models that are no toys in shape: a 15M Llama, and a chat model with GPT-2's vocabulary.

    python recipes/shapes/run.py [--only 15m|chatml] [--root DIR] [--threads N] [--results FILE]

Random models and real text, a handful of steps each: it shows that the jobs fit together and what they cost, not what
they teach. README.md beside this file says what it found.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import make
import torch
import transformers

from bridle.errors import BridleError, UserError
from bridle.runs import Run

HERE = Path(__file__).parent
BRIDLE = Path(sys.executable).parent / "bridle"
Figures = dict[str, object]

GAP_MEAN, GAP_MAX = 1e-5, 1e-4
"""What sampler and trainer may differ by in float32, nats per token; the same bounds hold for a reopened model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one command took."""

    seconds: float
    """wall clock, start of Python included."""
    cpu_seconds: float
    """processor time of its process, user and system."""
    peak_mib: float
    """largest resident memory of its process, MiB."""


def command(*arguments: object, threads: int | None) -> tuple[Cost, str]:
    """Run a command as a user would; return what it cost and what it printed, or leave with what it complained of."""
    words = [str(argument) for argument in arguments]
    print("$", " ".join(["bridle" if word == str(BRIDLE) else word for word in words]), flush=True)
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    began = time.perf_counter()
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    if process.stdout is None:
        raise AssertionError("stdout was asked for")
    printed = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{words[1]} left with exit code {process.returncode}; its own words are above")
    scale = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes there, in KiB elsewhere
    cost = Cost(
        seconds=round(time.perf_counter() - began, 2),
        cpu_seconds=round(used.ru_utime + used.ru_stime, 2),
        peak_mib=round(used.ru_maxrss / scale, 1),
    )
    return cost, printed


def job(name: str, folder: Path, options: Sequence[object], threads: int | None) -> Figures:
    """Run one of the three jobs and read what it left behind."""
    own = () if threads is None else ("--run.threads", threads)
    cost, _ = command(BRIDLE, name, "--run.dir", folder, *own, *options, threads=threads)
    run = Run.open(folder)
    read = {"sft": sft_figures, "reward": reward_figures, "ppo": ppo_figures}[name]
    found = {**asdict(cost), **read(run)}
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in found.items()}
    print("  " + "  ".join(f"{key} {value}" for key, value in shown.items()), flush=True)
    return found


def _column(run: Run, name: str) -> list[float]:
    return [float(str(row[name])) for row in run.metrics() if name in row]


def _rate(run: Run, *clocks: str) -> float:
    rows = [row for row in run.timings() if "tokens" in row]
    return sum(float(str(row["tokens"])) for row in rows) / sum(float(str(row[c])) for row in rows for c in clocks)


def sft_figures(run: Run) -> Figures:
    """Loss on held-out demonstrations, nats per target token, and speed."""
    held_out = _column(run, "evaluation/loss")
    return {
        "steps": len(_column(run, "loss")),
        "held_out_loss_before": held_out[0],
        "held_out_loss_after": held_out[-1],
        "tokens_per_second": _rate(run, "seconds"),
    }


def reward_figures(run: Run) -> Figures:
    """Training loss, accuracy on held-out comparisons with its 95 % interval, and speed."""
    losses = _column(run, "loss")
    quality = json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))["quality"]
    return {
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
        "held_out_accuracy": quality["accuracy"],
        "held_out_accuracy_low": quality["accuracy_interval"]["low"],
        "held_out_accuracy_high": quality["accuracy_interval"]["high"],
        "held_out_comparisons": quality["comparisons"],
        "tokens_per_second": _rate(run, "seconds"),
    }


def ppo_figures(run: Run) -> Figures:
    """The gap between sampler and trainer, scores and KL on held-out prompts, and speed."""
    scores, kls = _column(run, "evaluation/score"), _column(run, "evaluation/exact_kl")
    return {
        "steps": len(_column(run, "clip_fraction")),
        "sampler_gap_mean": max(_column(run, "sampler_gap_mean")),
        "sampler_gap_max": max(_column(run, "sampler_gap_max")),
        "old_logp_recomputed": max(_column(run, "old_logp_recomputed")),
        "first_ratio_gap_max": max(_column(run, "first_ratio_gap_max")),
        "held_out_score_before": scores[0],
        "held_out_score_after": scores[-1],
        "held_out_exact_kl": kls[-1],
        "explained_variance_last": _column(run, "explained_variance")[-1],
        "answer_tokens_per_second_collecting": _rate(run, "generation_seconds", "scoring_seconds"),
        "answer_tokens_per_second": _rate(
            run,
            *(f"{part}_seconds" for part in ("generation", "scoring", "look", "values", "reference", "training")),
        ),
    }


def reopened(folder: Path, steps: int, threads: int | None) -> dict[str, Figures]:
    """Open each finished model in a process that never imports Bridle, and compare with the run's own records."""
    run = Run.open(folder / "ppo")
    samples, tau = run.path / "samples", run.config["sampling"]["temperature"]  # type: ignore[call-overload,index]
    last = samples / f"evaluation-{steps}.jsonl"
    found: dict[str, Figures] = {}
    for name, *arguments in (
        ("sft policy", "policy", folder / "sft" / "policy", samples / "evaluation-0.jsonl", tau),  # SFT knows no τ
        ("ppo policy", "policy", folder / "ppo" / "policy", last),
        ("reward model", "reward", folder / "reward" / "reward", last),
    ):
        _, printed = command(sys.executable, HERE / "reopen.py", *arguments, threads=threads)
        found[name] = json.loads(printed)
        print(f"  {name}: mean {found[name]['mean']:.2g}, largest {found[name]['max']:.2g}", flush=True)
    return found


def line(folder: Path, options: dict[str, Sequence[object]], threads: int | None) -> Figures:
    """All three jobs, the evaluation of the last, and the models opened elsewhere."""
    found: Figures = {name: job(name, folder / name, options[name], threads) for name in ("sft", "reward", "ppo")}
    cost, printed = command(BRIDLE, "evaluate", folder / "ppo", "--output", folder / "evaluate.json", threads=threads)
    print("  " + "\n  ".join(printed.splitlines()[:9]), flush=True)
    found["evaluate"] = {**asdict(cost), **json.loads((folder / "evaluate.json").read_text(encoding="utf-8"))}
    steps = max(int(str(row["step"])) for row in Run.open(folder / "ppo").metrics())
    found["reopened"] = reopened(folder, steps, threads)
    return found


def run_15m(folder: Path, threads: int | None) -> Figures:
    """The 15M Llama: pairs, a value head on the trunk, k1 in the reward; then every job once more in bfloat16."""
    texts = make.stories()
    size = make.make_15m(folder / "model", texts)
    make.write_stories(folder, texts, 96)
    sft = ["--model.path", folder / "model", "--data.path", folder / "demonstrations.csv", "--batch-size", 8]
    sft += ["--evaluation.share", 0.125, "--evaluation.samples", 4, "--evaluation.sampling.max-new-tokens", 24]
    sft += ["--optim.lr", 1e-3, "--optim.warmup-steps", 2]
    reward = ["--model.path", folder / "sft/policy", "--data.path", folder / "pairs.parquet", "--batch-size", 12]
    reward += ["--optim.lr", 3e-4, "--evaluation.share", 0.25]
    ppo = ["--model.path", folder / "sft/policy", "--prompts.path", folder / "prompts.jsonl"]
    ppo += ["--reward.model", folder / "reward/reward", "--critic.source", "trunk", "--actor.lr", 1e-4]
    ppo += ["--kl.where", "reward", "--ppo.minibatches", 2, "--shaping.missing-eos-penalty", 1.0]
    many = ["--prompts-per-step", 16, "--sampling.max-new-tokens", 32, "--ppo.epochs", 2, "--evaluation.held-out", 16]
    found: Figures = {"parameters": size, "vocabulary": make.VOCABULARY}
    found |= line(folder, {"sft": sft, "reward": reward, "ppo": [*ppo, *many, "--steps", 3]}, threads)
    half = ["--run.dtype", "bfloat16"]  # emulated, and ten times slower, on a CPU without bfloat16 of its own
    few = ["--prompts-per-step", 4, "--sampling.max-new-tokens", 16, "--ppo.epochs", 1, "--evaluation.held-out", 4]
    short = {
        "sft": [*sft, *half, "--data.limit", 16],
        "reward": [*reward, *half, "--data.limit", 16],
        "ppo": [*ppo, *half, *few, "--steps", 1],
    }
    found["bfloat16"] = {name: job(name, folder / "bfloat16" / name, short[name], threads) for name in short}
    return found


def run_chatml(folder: Path, threads: int | None) -> Figures:
    """The chat model: rankings of four, the critic from the reward model, exact KL in the loss, K = 4 with a group judge."""
    size, vocabulary = make.make_chatml(folder / "model")
    make.write_chats(folder)
    fits = ["--max-tokens", 160, "--data.long", "drop"]
    sft = ["--model.path", folder / "model", "--data.path", folder / "chats.jsonl", *fits, "--batch-size", 12]
    sft += ["--evaluation.share", 0.1, "--evaluation.samples", 4, "--evaluation.sampling.max-new-tokens", 24]
    sft += ["--optim.lr", 2e-3, "--optim.warmup-steps", 2]
    reward = ["--kind", "rankings", "--model.path", folder / "sft/policy", "--data.path", folder / "rankings.parquet"]
    reward += [*fits, "--batch-size", 12, "--optim.lr", 3e-4, "--evaluation.share", 0.25]
    ppo = ["--model.path", folder / "sft/policy", "--prompts.path", folder / "prompts.json", "--prompts.limit", 64]
    ppo += ["--reward.model", folder / "reward/reward", "--reward.rankings", f"{HERE / 'judges.py'}:near"]
    ppo += ["--reward.weights", 1.0, 0.5, "--answers-per-prompt", 4, "--critic.source", "reward", "--steps", 3]
    ppo += ["--prompts-per-step", 4, "--sampling.max-new-tokens", 24, "--sampling.temperature", 0.9]
    ppo += ["--ppo.epochs", 2, "--ppo.minibatches", 2, "--kl.where", "loss", "--kl.estimator", "exact"]
    ppo += ["--mix.path", folder / "chats.jsonl", "--mix.long", "drop", "--mix.coefficient", 0.1, "--mix.batch", 2]
    ppo += ["--actor.lr", 1e-4, "--evaluation.held-out", 12]
    found: Figures = {"parameters": size, "vocabulary": vocabulary}
    return found | line(folder, {"sft": sft, "reward": reward, "ppo": ppo}, threads)


def verdicts(found: Figures) -> dict[str, bool]:
    """What must be so whatever the machine: in float32 all paths to a log-probability or a score agree."""
    ppo, sft, opened = found["ppo"], found["sft"], found["reopened"]
    return {
        "sampler and trainer agree": ppo["sampler_gap_mean"] <= GAP_MEAN and ppo["sampler_gap_max"] <= GAP_MAX,  # type: ignore[index]
        "the first ratio is 1": ppo["first_ratio_gap_max"] <= GAP_MAX,  # type: ignore[index]
        "SFT lowers the held-out loss": sft["held_out_loss_after"] < sft["held_out_loss_before"],  # type: ignore[index]
        "the models open elsewhere with the same outputs": all(
            one["mean"] <= GAP_MEAN and one["max"] <= GAP_MAX
            for one in opened.values()  # type: ignore[attr-defined]
        ),
    }


def main() -> int:
    """Run what was asked for, print it, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("15m", "chatml"), help="one of the two models")
    parser.add_argument("--root", type=Path, default=Path("runs/shapes"), help="where models, data and runs lie")
    parser.add_argument("--threads", type=int, help="threads of one tensor operation; PyTorch's choice if left out")
    parser.add_argument("--results", type=Path, help="where to write the figures as JSON")
    chosen = parser.parse_args()
    shapes: dict[str, Callable[[Path, int | None], Figures]] = {"15m": run_15m, "chatml": run_chatml}
    results: Figures = {
        "threads": chosen.threads,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    failed = []
    try:
        for name in [chosen.only] if chosen.only else shapes:
            folder = chosen.root / name
            if folder.exists():
                raise UserError(f"{folder} exists; remove it, or name another place with --root")
            began, load = time.perf_counter(), os.getloadavg()[0]
            found = shapes[name](folder, chosen.threads)
            judged = verdicts(found)
            print("\n".join(f"{name}: {what}: {'yes' if so else 'NO'}" for what, so in judged.items()), flush=True)
            failed += [what for what, so in judged.items() if not so]
            results[name] = {**found, "load_at_start": load, "seconds": time.perf_counter() - began, "holds": judged}
            print(f"{name}: {time.perf_counter() - began:.0f} s\n", flush=True)
    except BridleError as error:
        print(error, file=sys.stderr)
        return 2
    if chosen.results is not None:
        chosen.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
