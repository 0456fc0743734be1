"""The embedded engine against transformers' ``generate``: tokens per second, the sides alternating in one process.

    python bench/generation_speed.py part --model 15M --kind uniform --dtype float32 --threads 1
    python bench/generation_speed.py growth --axis vocabulary --value 32000

Each call adds its part to bench/results/generation_speed.json. Two models: the 260K-parameter one of ../shared/data, and
a random Llama of 15M parameters (width 288, 6 layers, 6 heads, vocabulary 32,000). Two kinds of work. *Uniform*: 64 prompts of
32 tokens, a fixed number of new ones. *Varying*: K = 4 samples of each prompt, prompts of 8 to 256 tokens, answers that end:
real beginnings of stories, the real end token and what is left of the model's 512 positions at 260K, and at 15M so many end
tokens that an answer has 24 tokens on average. `generate` then does what its users do: batches of 64 rows, padded on the
left, each until its last row ends. Both sides sample from the whole distribution at temperature 1; the engine also
reports log-probs, and has the model as Bridle opens it, with compiled layers. In bfloat16 `generate` holds its weights in it,
and the engine computes in it. With one thread processor seconds are compared,
with two wall seconds (both are kept), and the median of the rounds' ratios is what counts. The floors are measured in the same
process: a step's arithmetic at the rate of a large float32 product, and the time to read its weights and its keys and values
at the rate of a long sum.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bridle.language.attention import attend_narrowly
from bridle.language.backbones import join_layers
from bridle.language.causal import CausalModel
from bridle.language.quickening import quicken
from bridle.language.sampler import ReferenceSampler, Sampled, SamplingSettings, tape
from bridle.language.sampler.engine import EmbeddedSampler
from bridle.language.sampler.serving import embedded_sampler
from bridle.random import generator, torch_rng, uniforms

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "generation_speed.json"
ROWS = 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WANTED = {("260K", "uniform"): 1.5, ("15M", "uniform"): 2.0, ("260K", "varying"): 3.0, ("15M", "varying"): 4.0}
"""Times `generate`, in float32; at 15M half as much again in bfloat16."""
NEW = {("260K", "uniform"): 128, ("15M", "uniform"): 48, ("260K", "varying"): 256, ("15M", "varying"): 104}


Computing = Callable[[], AbstractContextManager[Any]]


def model_of(name: str, **changes: int) -> PreTrainedModel:
    if name == "260K":
        return AutoModelForCausalLM.from_pretrained(DATA / "models" / "stories260K").eval()
    config = LlamaConfig(
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=2048,
        **{"vocab_size": 32_000, **changes},
    )
    with torch_rng(0, "bench-model"):
        return LlamaForCausalLM(config).eval()


def stops_of(name: str, kind: str, vocabulary: int) -> tuple[int, ...]:
    """No stop where lengths are uniform; the real end token at 260K; as many ids as end one answer in 24 tokens at 15M."""
    if kind == "uniform":
        return ()
    return (1,) if name == "260K" else tuple(range(3, 3 + vocabulary // 24))


def stories(groups: int) -> list[Tensor]:
    """Beginnings of real stories, 8 to 256 tokens long, each with at least 8 tokens to go before its end."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "models" / "stories260K")
    text = (DATA / "tinystories" / "tinystories_sample.txt").read_text(encoding="utf-8")
    draws, found = generator(0, "bench.stories", groups), []
    for story in text.split("<|endoftext|>"):
        ids = [1, *tokenizer(story.strip(), add_special_tokens=False).input_ids]
        if 40 <= len(ids) <= 400:
            found.append(torch.tensor(ids[: int(draws.integers(8, min(257, len(ids) - 8)))]))
        if len(found) == groups:
            break
    return found


def prompts_of(name: str, kind: str, vocabulary: int, groups: int) -> list[Tensor]:
    if (name, kind) == ("260K", "varying"):
        return [prompt for prompt in stories(groups) for _ in range(4)]
    draws = generator(0, "bench.generation", groups)
    if kind == "uniform":
        return [torch.from_numpy(draws.integers(3, vocabulary, size=32)) for _ in range(ROWS)]
    lengths = draws.integers(8, 257, size=groups)
    return [p for n in lengths for p in [torch.from_numpy(draws.integers(3, vocabulary, size=n))] * 4]


def generate(model: PreTrainedModel, prompts: list[Tensor], stops: tuple[int, ...], new: int) -> int:
    """Answer in batches of 64 rows, as they come; return the number of tokens before and with each row's end."""
    tokens = 0
    for start in range(0, len(prompts), ROWS):
        rows = prompts[start : start + ROWS]
        longest = max(len(p) for p in rows)
        ids = torch.stack([torch.cat([torch.zeros(longest - len(p), dtype=torch.int64), p]) for p in rows])
        mask = torch.stack([(torch.arange(longest) >= longest - len(p)).long() for p in rows])
        with torch_rng(start, "bench.generate"), torch.no_grad():
            out = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new,
                do_sample=True,
                top_k=0,
                temperature=1.0,
                eos_token_id=list(stops) or None,
                pad_token_id=0,
            )
        for row in out[:, longest:].tolist():
            tokens += next((t + 1 for t, token in enumerate(row) if token in stops), len(row))
    return tokens


def clocked(work: Callable[[], int]) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    return {"tokens": tokens, "cpu_seconds": time.process_time() - cpu, "wall_seconds": time.perf_counter() - wall}


def best_of(work: Callable[[], object], repeats: int = 7) -> float:
    """Seconds of the fastest of a few repetitions: what a floor is measured by."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def floors(model: PreTrainedModel, rows: int, length: float) -> dict[str, float]:
    """The least a step of ``rows`` answers of ``length`` tokens could take, seconds: its products alone, its reading alone."""
    config = model.config
    a, b, long = torch.randn(1024, 1024), torch.randn(1024, 1024), torch.randn(2**26)
    rate = 2 * 1024**3 / best_of(lambda: a @ b)
    narrow, other = a.bfloat16(), b.bfloat16()
    bandwidth = 4 * 2**26 / best_of(lambda: long.sum())
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.numel() for p in model.parameters()) - (0 if tied else embedding.numel())
    width = config.hidden_size // config.num_attention_heads
    cached = 2 * length * config.num_hidden_layers * config.num_key_value_heads * width
    scores = 2 * 2 * length * config.num_hidden_layers * config.hidden_size
    return {
        "float32_flops": rate,
        "bfloat16_flops": 2 * 1024**3 / best_of(lambda: narrow @ other, 2),
        "bytes_per_second": bandwidth,
        "arithmetic_seconds_per_step": rows * (2 * weights + scores) / rate,
        "reading_seconds_per_step": 4 * (weights + rows * cached) / bandwidth,
    }


def gap(actor: CausalModel, computing: Computing, prompts: list[Tensor], answers: list[Sampled]) -> dict[str, float]:
    """|sampler's log-prob − the trainer's|, nats."""
    found = []
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.cat([prompt, answer.ids])
        columns = torch.arange(len(prompt) - 1, len(ids) - 1)
        with torch.no_grad(), computing():
            states = actor.states(ids[None], torch.zeros_like(columns), columns)
            logp, _ = actor.logprobs(states.features, answer.ids, with_entropy=False)
        found.append((logp - answer.logp).abs())
    whole = torch.cat(found)
    return {"mean": float(whole.mean()), "max": float(whole.max())}


def opened(
    model: PreTrainedModel, stops: tuple[int, ...], computing: Computing = nullcontext
) -> tuple[EmbeddedSampler, CausalModel, dict[str, float]]:
    """The engine over the model as Bridle opens it, in float32 whatever it computes in; warm; the model as the trainer has it;
    and what opening it and a first step cost in processor seconds."""
    model = copy.deepcopy(model).float()
    start = time.process_time()
    actor = CausalModel(join_layers(quicken(attend_narrowly(model))))
    engine = embedded_sampler(actor, stops, computing=computing)
    opening = time.process_time() - start
    start = time.process_time()
    with recording_at_once():
        engine([torch.tensor([5, 6])], uniforms(0, "bench.warm", 0, [0], 2), SamplingSettings(max_new_tokens=2))
    return engine, actor, {"opening_cpu_seconds": opening, "recording_cpu_seconds": time.process_time() - start}


@contextmanager
def recording_at_once() -> Iterator[None]:
    """Record at the first step: a long run's state without a long run."""
    before, tape.PAYS_FROM = tape.PAYS_FROM, 1
    try:
        yield
    finally:
        tape.PAYS_FROM = before


def part(options: argparse.Namespace) -> dict[str, Any]:
    name, kind = options.model, options.kind
    model = model_of(name).to(DTYPES[options.dtype])
    model.generation_config.eos_token_id = None
    vocabulary, new = model.config.vocab_size, options.new or NEW[name, kind]
    stops, prompts = stops_of(name, kind, vocabulary), prompts_of(name, kind, vocabulary, options.groups)
    dtype = DTYPES[options.dtype]
    computing = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    engine, actor, opening = opened(model, stops, computing)
    draws, settings = (
        uniforms(0, "bench.draws", 0, range(len(prompts)), new),
        SamplingSettings(max_new_tokens=new, rows=ROWS),
    )
    plain = ReferenceSampler(model, stops)
    sides: dict[str, Callable[[list[Tensor]], int]] = {
        "generate": lambda asked: generate(model, asked, stops, new),
        "engine": lambda asked: sum(len(a.ids) for a in engine(asked, draws, settings)),
    }
    if options.reference:
        sides["reference"] = lambda asked: sum(len(a.ids) for a in plain(asked, draws, settings))
    for side in sides.values():
        side(prompts[:2])
    laps: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(options.rounds):
        for side, work in sides.items():
            laps[side].append(clocked(partial(work, prompts)))
    clock = "cpu_seconds" if options.threads == 1 else "wall_seconds"
    speed = {side: [lap["tokens"] / lap[clock] for lap in found] for side, found in laps.items()}
    ratios = {s: [a / b for a, b in zip(speed[s], speed["generate"], strict=True)] for s in sides if s != "generate"}
    answers = engine(prompts[:8], draws, settings)
    length = statistics.mean(len(p) for p in prompts) + new / 2
    return {
        "model": name,
        "kind": kind,
        "dtype": options.dtype,
        "threads": options.threads,
        "new_tokens": new,
        "answers": len(prompts),
        "mean_answer": laps["engine"][0]["tokens"] / len(prompts),
        **opening,
        "clock": clock,
        "median_tokens_per_second": {side: statistics.median(found) for side, found in speed.items()},
        "median_ratio_to_generate": {side: statistics.median(found) for side, found in ratios.items()},
        "ratio_range": {side: [min(found), max(found)] for side, found in ratios.items()},
        "wanted": WANTED[name, kind] * (1.5 if (name, options.dtype) == ("15M", "bfloat16") else 1.0),
        "gap_to_trainer": gap(actor, computing, prompts[:8], answers),
        "floors": floors(model, ROWS, length),
        "laps": laps,
    }


def growth(options: argparse.Namespace) -> dict[str, Any]:
    """One point of an axis: generation's time and the memory that it adds to what the model takes, in a process of its own."""
    size = {"length": 64, "batch": 16, "vocabulary": 32_000, options.axis: options.value}
    model = model_of("15M", vocab_size=size["vocabulary"])
    engine, _, _ = opened(model, ())
    rows, new = size["batch"], size["length"] if options.axis == "length" else 32
    draws = generator(0, "bench.generation", rows)
    prompts = [torch.from_numpy(draws.integers(3, 512, size=32)) for _ in range(rows)]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    settings = SamplingSettings(max_new_tokens=new, rows=rows)
    lap = clocked(lambda: sum(len(a.ids) for a in engine(prompts, uniforms(0, "b", 0, range(rows), new), settings)))
    added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return {"axis": options.axis, "value": options.value, "batch": rows, "new_tokens": new, "added_mib": added, **lap}


def save(found: dict[str, Any], note: str) -> None:
    record = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    record = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "results": record.get("results", []),
    }
    keys = ("axis", "value") if "axis" in found else ("model", "kind", "dtype", "threads")
    name = [found[key] for key in keys]
    record["results"] = [r for r in record["results"] if [r.get(key) for key in keys] != name]
    record["results"].append(
        {"command": "python bench/generation_speed.py " + " ".join(sys.argv[1:]), "note": note, **found}
    )
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("part", "growth"))
    parser.add_argument("--model", choices=("260K", "15M"), default="260K")
    parser.add_argument("--kind", choices=("uniform", "varying"), default="uniform")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=32, help="prompts of varying work, each with four samples")
    parser.add_argument("--new", type=int, help="new tokens at most, if not the usual number")
    parser.add_argument("--reference", action="store_true", help="the plain sampler as a third side")
    parser.add_argument("--axis", choices=("length", "batch", "vocabulary"), default="length")
    parser.add_argument("--value", type=int, default=64)
    parser.add_argument("--note", default="", help="kept in the record: what else the machine was doing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = part(options) if options.what == "part" else growth(options)
    save(found, options.note)
    print({key: value for key, value in found.items() if key != "laps"})


if __name__ == "__main__":
    main()
