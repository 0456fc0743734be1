"""Language training beside TRL's: PPO iterations, fine-tuning, reward models, and how Bridle's time and memory grow.

    python bench/language_speed.py --peers trl=PEERS-TRL/bin/python trl16=PEERS-TRL16/bin/python
    python bench/language_speed.py --part ppo-15M-float32 --sides trl --add      one side more, kept beside those there
    python bench/language_speed.py --short                                       seconds; Bridle alone; writes nothing

Every measurement is a process of its own on as many cores as it has threads, the sides of a part taking turns; all read the
same model files and texts, made by ``language_inputs.py``. PPO is exactly TRL's work: 64 prompts of 32 tokens, answers of
64, four epochs of four minibatches, a step for each, and a backbone each for actor, critic, reference and judge. The first
iteration of a process is not counted where there are others. On one thread processor seconds are counted, which others on the
machine disturb less; wall seconds are kept beside them. Peak memory is the process's highest resident set above what it
held after its imports. bfloat16 is each library's own way: TRL holds weights and optimiser in it, Bridle computes in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from language_inputs import random_llama, save_models, save_texts
from peers.language_work import Dtype, PPOWork, TuningWork

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "language_speed.json"
OWN = str(HERE / "language_speed_bridle.py")


@dataclass(frozen=True, kw_only=True)
class Part:
    """One piece of work on one model, and who does it."""

    work: PPOWork | TuningWork
    model: str
    sides: tuple[str, ...]


def ppo_part(model: str, dtype: Dtype, *sides: str, threads: int = 1) -> Part:
    work = PPOWork(model="", data="", dtype=dtype, threads=threads, iterations=3 if model == "260K" else 2)
    return Part(work=work, model=model, sides=sides)


def tuning_part(kind: Any, model: str, dtype: Dtype) -> Part:
    steps = 6 if model == "260K" else 3
    return Part(
        work=TuningWork(model="", data="", dtype=dtype, kind=kind, steps=steps),
        model=model,
        sides=("bridle", "trl16"),
    )


ALL = ("bridle", "trl", "bridle-defaults", "bridle-trunk")
PARTS = {
    "ppo-260K-float32": ppo_part("260K", "float32", *ALL),
    "ppo-15M-float32": ppo_part("15M", "float32", *ALL),
    "ppo-260K-bfloat16": ppo_part("260K", "bfloat16", *ALL),
    "ppo-15M-bfloat16": ppo_part("15M", "bfloat16", *ALL),
    "ppo-260K-two-threads": ppo_part("260K", "float32", "bridle", "trl", threads=2),
    "ppo-15M-two-threads": ppo_part("15M", "float32", "bridle", "trl", threads=2),
    **{
        f"{kind}-{model}-{dtype}": tuning_part(kind, model, dtype)
        for kind in ("sft", "reward")
        for model in ("260K", "15M")
        for dtype in ("float32", "bfloat16")
    },
}


@dataclass(frozen=True, kw_only=True)
class Growth:
    """One measurement of how Bridle's iteration grows: 1,024 answer tokens of a small model unless something is varied."""

    vocabulary: int = 8_192
    width: int = 96
    layers: int = 2
    prompts: int = 16
    new_tokens: int = 64

    def name(self) -> str:
        return f"{self.vocabulary}-{self.width}x{self.layers}"


GROWTH = {
    "answer length": [Growth(new_tokens=n) for n in (64, 128, 256, 512, 1024)],
    "batch": [Growth(prompts=n) for n in (16, 64, 256)],
    "vocabulary": [Growth(vocabulary=n) for n in (512, 8_192, 32_000, 151_936)],
    "batch at 151,936 tokens": [Growth(vocabulary=151_936, prompts=n) for n in (4, 16, 64)],
    "parameters": [Growth(width=w, layers=n) for w, n in ((96, 2), (288, 6), (576, 8))],
}


@dataclass
class Bench:
    """Where models and interpreters are, and how a measurement is started."""

    place: Path
    pythons: dict[str, str]
    cores: list[int]
    before: list[str]

    def inputs(self, name: str, **shape: int) -> tuple[dict[str, str], dict[str, str]]:
        noted = self.place / name / "inputs.json"
        if not noted.is_file():
            models = save_models(self.place, name, random_llama(**shape))
            noted.write_text(json.dumps([models, save_texts(self.place, name, models["model"])]))
        models, texts = json.loads(noted.read_text())
        return models, texts

    def told(self, part: Part, **shape: int) -> PPOWork | TuningWork:
        models, texts = self.inputs(part.model, **shape)
        if isinstance(part.work, TuningWork):
            return replace(part.work, model=models["model"], data=texts[part.work.kind])
        return replace(part.work, data=texts["prompts"], **models)

    def answer(self, side: str, work: PPOWork | TuningWork) -> dict[str, Any]:
        """Run one measurement in a process of its own."""
        library, _, form = side.partition("-")
        theirs = "trl_tuning.py" if isinstance(work, TuningWork) else "trl_ppo.py"
        program = (
            [OWN, work.text(), form or "same"] if library == "bridle" else [str(HERE / "peers" / theirs), work.text()]
        )
        cores = set(self.cores[: work.threads])
        done = subprocess.run(
            [*self.before, self.pythons[library], *program],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(work.threads)},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"{side} failed with {done.returncode}:\n{done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        return found

    def products(self, work: PPOWork | TuningWork) -> float:
        """GFLOP/s of large products where and in what :meth:`answer` computes."""
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, set(self.cores[: work.threads]))
        try:
            return product_rates(work.threads)[work.dtype]
        finally:
            os.sched_setaffinity(0, before)


def iteration_seconds(found: dict[str, Any], threads: int) -> float:
    """Seconds of an iteration: processor's on one thread, wall's on more; the first is left out where there are others."""
    rows = found["iterations"][1:] or found["iterations"]
    name = "cpu_seconds" if threads == 1 and "cpu_seconds" in rows[0] else "seconds"
    return statistics.median(row[name] for row in rows)


def per_second(found: dict[str, Any], threads: int, unit: str) -> float:
    """Tokens or pairs a second, over all steps that count."""
    rows = found["iterations"][1:] or found["iterations"]
    name = "cpu_seconds" if threads == 1 and "cpu_seconds" in rows[0] else "seconds"
    return float(sum(row[unit] for row in rows) / sum(row[name] for row in rows))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def summary(part: Part, answers: list[dict[str, Any]]) -> dict[str, Any]:
    threads = part.work.threads
    found: dict[str, Any] = {"peak_memory_above_imports": spread([memory_of(one) for one in answers])}
    if isinstance(part.work, PPOWork):
        found["seconds_per_iteration"] = spread([iteration_seconds(one, threads) for one in answers])
        rows = [row for one in answers for row in (one["iterations"][1:] or one["iterations"])]
        found["parts"] = {name: statistics.median(row[name] for row in rows) for name in rows[0] if is_part(name)}
    else:
        unit = "tokens" if part.work.kind == "sft" else "items"
        found["per_second"] = spread([per_second(one, threads, unit) for one in answers])
    return found | {"measurements": answers}


def is_part(name: str) -> bool:
    """Whether a column of an iteration is the time of one of its parts: processor's on TRL's side, both on Bridle's."""
    return name.endswith(("_seconds", "_cpu")) and name != "cpu_seconds"


def memory_of(found: dict[str, Any]) -> float:
    """MB above what was held after the imports."""
    return float(found["peak_memory"] - found["memory_after_imports"])


def product_rates(threads: int) -> dict[str, float]:
    """GFLOP/s of large matrix products, the best of several: what the machine can do."""
    torch.set_num_threads(threads)
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(1536, 1536, dtype=dtype), torch.ones(1536, 1536, dtype=dtype)
        laps = []
        for _ in range(8):
            start = time.process_time()
            torch.mm(a, b)
            laps.append((time.process_time() - start) * (1 if threads == 1 else 1 / threads))
        rates[str(dtype).removeprefix("torch.")] = 2 * 1536**3 / min(laps) / 1e9
    return rates


def training_flops(work: PPOWork, *, vocabulary: int, width: int, layers: int) -> float:
    """Useful operations of one update: forward and backward of both trunks over all tokens, of the vocabulary projection
    over the answers' tokens alone; two operations a multiplication, the backward pass twice the forward pass."""
    tokens, actions = work.prompts * (work.prompt_tokens + work.new_tokens), work.prompts * work.new_tokens
    length = work.prompt_tokens + work.new_tokens
    trunk = layers * (4 * width**2 + 3 * width * (8 * width // 3) + length * width)  # causal attention: half of 2·L·D
    forward = 2 * (2 * tokens * trunk + actions * vocabulary * width)
    return 3.0 * work.epochs * forward


def against_products(work: PPOWork, answers: list[dict[str, Any]], products: list[float]) -> dict[str, Any]:
    """What training came to in each round beside the large products measured right after it."""
    flops, rates = training_flops(work, vocabulary=32_000, width=288, layers=6), []
    for found in answers:
        rows = found["iterations"][1:] or found["iterations"]
        key = next(
            name for name in ("training_seconds", "train_cpu" if work.threads == 1 else "train") if name in rows[0]
        )
        rates.append(flops / statistics.median(row[key] for row in rows) / 1e9)
    return {
        "training_gflops": spread(rates),
        "product_gflops": spread(products),
        "training_share": spread([rate / product for rate, product in zip(rates, products, strict=True)]),
    }


def measure(name: str, part: Part, bench: Bench, rounds: int) -> dict[str, Any]:
    """All sides of one part, taking turns."""
    sides = [side for side in part.sides if side.partition("-")[0] in bench.pythons]
    work = bench.told(part)
    answers: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    trains = part.model == "15M" and isinstance(work, PPOWork)
    # the other sides train one trunk
    large: dict[str, list[float]] = {side: [] for side in sides if trains and side in ("bridle", "trl")}
    for turn in range(rounds):
        for side in sides if turn % 2 == 0 else sides[::-1]:
            found = bench.answer(side, work)
            answers[side].append(found)
            show(name, side, summary(part, [found]))
            if side in large:
                large[side].append(bench.products(work))
    found_sides = {side: summary(part, found) for side, found in answers.items() if found}
    for side, rates in large.items():
        if rates and isinstance(work, PPOWork):
            found_sides[side] |= against_products(work, answers[side], rates)
            low, mid, high = (found_sides[side]["training_share"][key] for key in ("lowest", "median", "highest"))
            print(f"{name:24} {side:16} training at {mid:.2f} of large products ({low:.2f} to {high:.2f})", flush=True)
    told = {
        key: value for key, value in json.loads(work.text()).items() if key not in ("model", "data", "reward_model")
    }
    return {"work": told, "sides": found_sides}


def show(name: str, side: str, found: dict[str, Any]) -> None:
    memory = found["peak_memory_above_imports"]["median"]
    if "per_second" in found:
        print(f"{name:24} {side:16} {found['per_second']['median']:10,.1f} /s   {memory:6,.0f} MB", flush=True)
        return
    parts = ", ".join(
        f"{key.removesuffix('_cpu').removesuffix('_seconds')} {s:.2f}" for key, s in found["parts"].items()
    )
    seconds = found["seconds_per_iteration"]["median"]
    print(f"{name:24} {side:16} {seconds:8.2f} s   {memory:6,.0f} MB   ({parts})", flush=True)


def grow(bench: Bench) -> list[dict[str, Any]]:
    """One iteration for each size; Bridle's own defaults."""
    rows, seen = [], {}
    for axis, sizes in GROWTH.items():
        for size in sizes:
            work = PPOWork(model="", data="", prompts=size.prompts, new_tokens=size.new_tokens, iterations=1)
            part = Part(work=work, model=size.name(), sides=("bridle",))
            told = bench.told(part, vocabulary=size.vocabulary, width=size.width, layers=size.layers)
            if size not in seen:
                seen[size] = bench.answer("bridle-defaults", told)
            found = seen[size]
            row = {
                "axis": axis,
                **{key: getattr(size, key) for key in ("vocabulary", "width", "layers", "prompts", "new_tokens")},
                "actions": size.prompts * size.new_tokens,
                "model_megabytes": sum(f.stat().st_size for f in Path(told.model).glob("*.safetensors")) / 2**20,
                "logits_megabytes": size.prompts * size.new_tokens * size.vocabulary * 4 / 2**20,
                "cpu_seconds": iteration_seconds(found, 1),
                "peak_memory_above_imports": memory_of(found),
            }
            rows.append(row)
            models, logits, memory = 4 * row["model_megabytes"], row["logits_megabytes"], memory_of(found)
            print(
                f"{axis:24} V {size.vocabulary:>7,} D {size.width:>4}×{size.layers} {size.prompts:>4} × {size.new_tokens:>4}: "
                f"{row['cpu_seconds']:7.2f} s, {memory:6.0f} MB (four models {models:.0f}, N × V {logits:,.0f})",
                flush=True,
            )
    return rows


def short(bench: Bench) -> None:
    """Every kind of work once, as small as can be."""
    shape = {"vocabulary": 600, "width": 48, "layers": 1}
    works = (
        PPOWork(model="", data="", prompts=4, new_tokens=4, epochs=1, minibatches=2, iterations=1),
        TuningWork(model="", data="", kind="sft", steps=2, batch=2),
        TuningWork(model="", data="", kind="reward", steps=2, batch=2),
    )
    for work in works:
        part = Part(work=work, model="short", sides=("bridle",))
        show("short", "bridle", summary(part, [bench.answer("bridle", bench.told(part, **shape))]))


def keep(name: str, found: dict[str, Any], shown: list[str], *, add: bool) -> None:
    """Write one part beside the others; with ``add`` its sides beside the part's own."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found = {
        "command": shlex.join(shown),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": platform.processor() or platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **found,
    }
    if add and name in results:
        found["sides"] = results[name]["sides"] | found["sides"]
    results[name] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--peers", nargs="*", default=[], metavar="SIDE=PYTHON", help="trl (1.12) and trl16")
    parser.add_argument("--part", nargs="+", choices=(*PARTS, "limits", "growth"))
    parser.add_argument("--sides", nargs="+", help="only these sides")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, help="another number of iterations of PPO than the part's own")
    parser.add_argument("--cores", type=lambda text: [int(c) for c in text.split(",")], default=[1, 0])
    parser.add_argument(
        "--before", type=shlex.split, default=[], help="command that starts each measurement, e.g. nice"
    )
    parser.add_argument("--inputs", type=Path, help="folder that keeps models and texts between runs")
    parser.add_argument("--add", action="store_true", help="keep the sides measured before")
    parser.add_argument("--short", action="store_true", help="every kind of work once, tiny: writes nothing")
    given = parser.parse_args()
    pythons = {"bridle": sys.executable, **dict(item.split("=", 1) for item in given.peers)}
    with tempfile.TemporaryDirectory() as place:
        bench = Bench(place=given.inputs or Path(place), pythons=pythons, cores=given.cores, before=given.before)
        if given.short:
            short(bench)
            return
        for name in given.part or (*PARTS, "limits", "growth"):
            shown = ["python", "bench/language_speed.py", "--part", name]
            if name == "limits":
                keep(name, {"gflops": {str(n): product_rates(n) for n in (1, 2)}}, shown, add=False)
            elif name == "growth":
                keep(name, {"rows": grow(bench)}, shown, add=False)
            else:
                part = PARTS[name]
                if given.sides:
                    part = replace(part, sides=tuple(side for side in part.sides if side in given.sides))
                if given.iterations and isinstance(part.work, PPOWork):
                    part = replace(part, work=replace(part.work, iterations=given.iterations))
                used = sorted({side.partition("-")[0] for side in part.sides} & set(pythons) - {"bridle"})
                shown += [
                    "--rounds",
                    str(given.rounds),
                    "--sides",
                    *part.sides,
                    "--peers",
                    *(f"{s}=PYTHON" for s in used),
                ]
                shown += ["--iterations", str(given.iterations)] if given.iterations else []
                keep(name, measure(name, part, bench, given.rounds), shown, add=given.add)


if __name__ == "__main__":
    main()
