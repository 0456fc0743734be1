"""The compiled pass of a model's layers and of its vocabulary's head, alone: GFLOP/s beside large matrix products.

    python bench/layers_pass.py [--model 15M] [--dtype bfloat16] [--rounds 12]      → bench/results/layers_pass.json

16 texts of 96 tokens, of which 64 each are answers, on one thread: the layers there and back, of all tokens; the head there
and back, of the answers. Nothing else of a training step is in it: no rollout, loss, optimiser or embedding. Useful
operations are counted, two a multiplication, the backward pass twice the forward pass; attention is not counted. Rounds
alternate with products; the least processor time of each is what counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bridle.core.head import HeadSlopes, VocabularyHead
from bridle.language import layers, rooms, vocabulary
from bridle.random import torch_rng

RESULTS = Path(__file__).parent / "results" / "layers_pass.json"


@dataclass(frozen=True, kw_only=True)
class Model:
    """The sizes of one; heads are of the width that they share out."""

    width: int
    heads: int
    key_heads: int
    hidden: int
    layers: int
    vocabulary: int


MODELS = {
    "15M": Model(width=288, heads=6, key_heads=6, hidden=768, layers=6, vocabulary=32_000),
    "260K": Model(width=64, heads=8, key_heads=4, hidden=172, layers=5, vocabulary=512),
}
TEXTS, TOKENS, PROMPT = 16, 96, 32
ANSWERS = TEXTS * (TOKENS - PROMPT)


def layer(m: Model) -> list[Tensor | None]:
    """The weights of one layer, no biases: two norms, queries, keys, values, outputs, the gate and both of the rest."""
    keys = m.width // m.heads * m.key_heads
    sizes = [(m.width, m.width), *[(keys, m.width)] * 2, (m.width, m.width)]
    sizes += [*[(m.hidden, m.width)] * 2, (m.width, m.hidden)]
    weights: list[Tensor | None] = [nn.Parameter(torch.ones(m.width)), nn.Parameter(torch.ones(m.width))]
    for size in sizes:
        weights += [nn.Parameter(torch.randn(size) * 0.05), None]
    return weights


def works(m: Model, dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, in the order in which it runs, and its operations."""
    stack, wide = [layer(m) for _ in range(m.layers)], m.width // m.heads
    shape = layers.Shape(heads=m.heads, key_heads=m.key_heads, first_eps=1e-5, second_eps=1e-5, scale=wide**-0.5)
    x = torch.randn(TEXTS, TOKENS, m.width, requires_grad=True)
    angles = torch.randn(1, TOKENS, wide // 2).repeat(1, 1, 2)
    asked = torch.stack([torch.zeros(TEXTS, dtype=torch.int64), torch.full((TEXTS,), TOKENS)])
    head = VocabularyHead(
        weight=nn.Parameter(torch.randn(m.vocabulary, m.width) * 0.05), bias=None, scale=1.0, softcap=None
    )
    targets, features = torch.randint(0, m.vocabulary, (ANSWERS,)), torch.randn(ANSWERS, m.width)
    gradient, found = torch.zeros(m.vocabulary, m.width), list[Tensor]()
    large = torch.ones(1536, 1536, dtype=dtype)

    def there() -> None:
        found[:] = [layers.decoder_stack([shape] * m.layers, x, angles.cos(), angles.sin(), stack, asked)]

    def back() -> None:
        found[0].backward(torch.full_like(found[0], 1e-3))

    def answers() -> None:
        vocabulary.head_answers(
            features,
            head,
            targets,
            weighing=lambda _, seen: HeadSlopes(logp=torch.full_like(seen.logp, 1e-3)),
            weight_grad=gradient,
        )

    weights = sum(own.numel() for one in stack for own in one if own is not None and own.ndim == 2)
    forward = 2.0 * TEXTS * TOKENS * weights
    return {
        "layers there": (there, forward),
        "layers back": (back, 2 * forward),
        "head": (answers, 3 * 2.0 * ANSWERS * m.vocabulary * m.width),
        "products": (lambda: torch.mm(large, large), 2.0 * 1536**3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=tuple(MODELS), default="15M")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    torch.set_num_threads(1)
    with torch_rng(0, "layers-pass"):
        parts = works(MODELS[given.model], dtype)
    least = dict.fromkeys(parts, float("inf"))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16), rooms.training():
        for _ in range(given.rounds):
            for name, (work, _) in parts.items():
                begun = time.process_time()
                work()
                least[name] = min(least[name], time.process_time() - begun)
    flops = {name: operations for name, (_, operations) in parts.items()}
    product = flops.pop("products") / least["products"] / 1e9
    rates = {name: flops[name] / least[name] / 1e9 for name in flops}
    rates["all"] = sum(flops.values()) / sum(least[name] for name in flops) / 1e9
    name, words = f"{given.model}-{given.dtype}", ["--model", given.model, "--dtype", given.dtype]
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    kept[name] = {
        "command": shlex.join(["python", "bench/layers_pass.py", *words, "--rounds", str(given.rounds)]),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "milliseconds": {part: 1e3 * least[part] for part in flops},
        "gflops": rates,
        "products": product,
        "share": rates["all"] / product,
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    shown = ", ".join(f"{part} {rate:.0f}" for part, rate in rates.items())
    print(f"{name}: {shown}; products {product:.0f} GFLOP/s, {rates['all'] / product:.2f} of them")


if __name__ == "__main__":
    main()
