"""The embedded engine against transformers' ``generate``: tokens per second on one thread, the sides alternating.

    python bench/generation_speed.py [--rounds 3] [--quick]     writes bench/results/generation_speed.json

Two models: the 260K-parameter one of ../shared/data, and a random Llama of 15M parameters (width 288, 6 layers, 6 heads,
vocabulary 32,000). Two kinds of work. *Uniform*: 64 prompts of 32 tokens, a fixed number of new ones. *Varying*: K = 4 samples
of each prompt, prompts of 8 to 256 tokens, answers that end: real beginnings of stories and the real end token at 260K, and
at 15M so many end tokens that an answer has 24 tokens on average. `generate` then does what its users do: batches of 64
rows, padded on the left, each until its last row ends. Both sides sample from the whole distribution at
temperature 1; the engine also reports log-probs. Processor seconds are counted (wall seconds are kept beside them), so
that a shared machine disturbs less, and the median of the rounds' ratios is what counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from bridle.language.causal import CausalModel
from bridle.language.sampler import ReferenceSampler, SamplingSettings
from bridle.language.sampler.serving import embedded_sampler
from bridle.random import generator, torch_rng, uniforms

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
RESULTS = Path(__file__).parent / "results" / "generation_speed.json"
ROWS = 64
WANTED = {("260K", "uniform"): 1.5, ("15M", "uniform"): 2.0, ("260K", "varying"): 3.0, ("15M", "varying"): 4.0}


def model_of(name: str) -> PreTrainedModel:
    if name == "260K":
        return AutoModelForCausalLM.from_pretrained(DATA / "models" / "stories260K").eval()
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=288,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=6,
        max_position_embeddings=1024,
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
    return [torch.from_numpy(draws.integers(3, vocabulary, size=n)) for n in lengths for _ in range(4)]


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


def measure(name: str, kind: str, rounds: int, new: int, groups: int) -> dict[str, Any]:
    model = model_of(name)
    model.generation_config.eos_token_id = None
    vocabulary = model.config.vocab_size
    stops, prompts = stops_of(name, kind, vocabulary), prompts_of(name, kind, vocabulary, groups)
    settings = SamplingSettings(max_new_tokens=new, rows=ROWS)
    start = time.process_time()
    engine = embedded_sampler(CausalModel(model), stops)
    opening = time.process_time() - start
    draws = uniforms(0, "bench.draws", 0, range(len(prompts)), new)
    plain = ReferenceSampler(model, stops)
    sides: dict[str, Callable[[list[Tensor]], int]] = {
        "generate": lambda asked: generate(model, asked, stops, new),
        "engine": lambda asked: sum(len(a.ids) for a in engine(asked, draws, settings)),
        "reference": lambda asked: sum(len(a.ids) for a in plain(asked, draws, settings)),
    }
    for side in sides.values():
        side(prompts[:8])
    laps: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, work in sides.items():
            laps[side].append(clocked(partial(work, prompts)))
    speed = {side: [lap["tokens"] / lap["cpu_seconds"] for lap in found] for side, found in laps.items()}
    ratios = {
        side: statistics.median(a / b for a, b in zip(speed[side], speed["generate"], strict=True)) for side in sides
    }
    return {
        "model": name,
        "kind": kind,
        "new_tokens": new,
        "answers": len(prompts),
        "opening_cpu_seconds": opening,
        "median_tokens_per_cpu_second": {side: statistics.median(found) for side, found in speed.items()},
        "median_ratio_to_generate": ratios,
        "wanted": WANTED[name, kind],
        "laps": laps,
    }


def save(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    record = {
        "command": f"python bench/generation_speed.py --rounds {options.rounds}" + " --quick" * options.quick,
        "note": options.note,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": 1,
        "results": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a fifth of the work: rough figures")
    parser.add_argument("--only", choices=("260K", "15M"), help="one of the models")
    parser.add_argument("--note", default="", help="kept in the record: what else the machine was doing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, kind in WANTED:
        if options.only in (None, name):
            small = name == "15M"
            new = (24 if small else 64) if options.quick else (64 if small else 128)
            new += (40 if small else 96) * (kind == "varying")
            groups = (16 if small else 48) if options.quick else 64
            rows.append(measure(name, kind, options.rounds, new, groups))
            speed, ratio = rows[-1]["median_tokens_per_cpu_second"], rows[-1]["median_ratio_to_generate"]
            print(
                f"{name:>5} {kind:>8}: generate {speed['generate']:7.0f}/s, engine {speed['engine']:7.0f}/s = "
                f"{ratio['engine']:.2f}x (wanted {WANTED[name, kind]:g}x), reference {ratio['reference']:.2f}x"
            )
            save(options, rows)


if __name__ == "__main__":
    main()
