"""Bridle's embedded sampler and transformers' ``generate`` beside vLLM: tokens a second on one core, the sides taking turns.

    python bench/vllm_generation.py --peers vllm=PEERS-VLLM/bin/python --model 15M --kind uniform --dtype float32

Each call is one case, kept in bench/results/vllm_generation.json. A side is a process of its own, in an environment of its
own, pinned to the core; all read the same model folder and the same prompts, warm up with two rounds of the work
(``generate``, which keeps nothing, with two prompts), and then wait for their turns. The models are
those of ``bench/language_inputs.py``, the work is that of
``bench/generation_speed.py``: *uniform*, 64 prompts of 32 tokens, 64 new ones, no end; *varying*, four samples of each of
32 prompts of 8 to 256 tokens, answers of 24 tokens on average. All sample from the whole distribution at temperature 1;
Bridle also reports log-probs. Processor seconds are compared, wall seconds kept beside them. ``generate`` and Bridle answer
64 rows at a time; vLLM schedules as it does by default, compiled and without (``vllm-eager``). In place of an interpreter a
command may stand that preloads what vLLM's documentation recommends.
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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from generation_speed import NEW, prompts_of, stops_of
from language_inputs import save_models
from peers.language_work import GenerationWork

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "vllm_generation.json"
VOCABULARY = {"15M": 32_000, "260K": 512}
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""What vLLM is told by its environment: 1 GiB for keys and values, and all in one process."""


def work_of(options: argparse.Namespace, place: Path) -> GenerationWork:
    """Write the model's folder and the prompts; return what every side is told."""
    vocabulary, kind = VOCABULARY[options.model], options.kind
    prompts = prompts_of(options.model, kind, vocabulary, 32)
    data = place / "prompts.jsonl"
    data.write_text("".join(json.dumps({"ids": prompt.tolist()}) + "\n" for prompt in prompts))
    return GenerationWork(
        model=save_models(place, options.model)["model"],
        data=str(data),
        dtype=options.dtype,
        new_tokens=64 if kind == "uniform" else NEW[options.model, kind],
        stops=list(stops_of(options.model, kind, vocabulary)),
    )


class Side:
    """A process that samples when it is told to."""

    def __init__(self, name: str, process: subprocess.Popen[str]) -> None:
        self.name, self.process = name, process
        self.start = time.perf_counter()
        self.used = self.hear()
        self.laps: list[dict[str, float]] = []
        print(f"{name:14} ready after {time.perf_counter() - self.start:.0f} s", flush=True)

    def hear(self) -> dict[str, Any]:
        """The next line of JSON; what a library prints besides is passed over."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        raise SystemExit(f"{self.name} ended with {self.process.wait()}")

    def sample(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("again\n")
        self.process.stdin.flush()
        lap = self.hear()
        self.laps.append(lap | {"tokens_per_second": lap["tokens"] / lap["cpu_seconds"]})

    def speeds(self) -> list[float]:
        return [lap["tokens_per_second"] for lap in self.laps]


@contextmanager
def side_of(name: str, work: GenerationWork, options: argparse.Namespace) -> Iterator[Side]:
    """Start a side on its core; end it when it is no longer needed."""
    library, _, form = name.partition("-")
    if library in ("engine", "generate"):
        program = [sys.executable, str(HERE / "vllm_generation_bridle.py"), work.text(), library]
    else:
        program = [*options.peers[library], str(HERE / "peers" / "vllm_generate.py"), work.text(), form or "compiled"]
    core = options.core
    told = SETTINGS | {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": str(core)}
    with subprocess.Popen(
        program,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if options.loud else subprocess.DEVNULL,
        text=True,
        env={**os.environ, **told},
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    ) as process:
        yield Side(name, process)
        assert process.stdin is not None
        process.stdin.close()


def case(options: argparse.Namespace) -> dict[str, Any]:
    """All sides of one case, taking turns; the ratios are those of rounds that lie beside each other."""
    with tempfile.TemporaryDirectory() as place, ExitStack() as stack:
        work = work_of(options, Path(place))
        sides = [stack.enter_context(side_of(name, work, options)) for name in options.sides]
        for turn in range(options.rounds):
            for side in sides if turn % 2 == 0 else sides[::-1]:
                side.sample()
        prompts = work.rows()
    speeds = {side.name: side.speeds() for side in sides}
    found: dict[str, Any] = {
        "answers": len(prompts),
        "new_tokens": work.new_tokens,
        "median_tokens_per_second": {name: statistics.median(laps) for name, laps in speeds.items()},
        "ratios": {},
        "used": {side.name: side.used for side in sides},
        "laps": {side.name: side.laps for side in sides},
    }
    for name, laps in speeds.items():
        if name != "engine":
            ratios = [a / b for a, b in zip(speeds["engine"], laps, strict=True)]
            found["ratios"][f"engine to {name}"] = {
                "median": statistics.median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
            }
    return found


def keep(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Write one case beside the others."""
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    command = ["python", "bench/vllm_generation.py", "--peers", *(f"{name}=PYTHON" for name in options.peers)]
    for name in ("model", "kind", "dtype", "rounds"):
        command += [f"--{name}", str(getattr(options, name))]
    results[f"{options.model}-{options.kind}-{options.dtype}"] = {
        "command": shlex.join([*command, "--sides", *options.sides]),
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **found,
    }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


def peer(text: str) -> tuple[str, list[str]]:
    name, _, command = text.partition("=")
    return name, shlex.split(command)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--peers", nargs="*", type=peer, default=[], metavar="NAME=PYTHON", help="vllm, and others of it"
    )
    parser.add_argument("--model", choices=tuple(VOCABULARY), default="15M")
    parser.add_argument("--kind", choices=("uniform", "varying"), default="uniform")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--sides", nargs="+", help="engine, generate, and each peer, also as PEER-eager")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0)
    parser.add_argument("--loud", action="store_true", help="show what the sides write besides")
    options = parser.parse_args()
    options.peers = dict(options.peers)
    options.sides = options.sides or [
        "generate",
        "engine",
        *(f"{name}{form}" for name in options.peers for form in ("", "-eager")),
    ]
    found = case(options)
    keep(options, found)
    print(json.dumps({key: found[key] for key in ("median_tokens_per_second", "ratios")}, indent=1))


if __name__ == "__main__":
    main()
