"""The compiled pass of the 15M model's six layers and of its vocabulary's head, alone: GFLOP/s beside large matrix products.

    python bench/layers_pass.py [--dtype bfloat16] [--rounds 12]      → bench/results/layers_pass.json

16 texts of 96 tokens, of which 64 each are answers, on one thread: the layers there and back, of all tokens; the head there
and back, of the answers. Nothing else of a training step is in it: no rollout, loss, optimiser or embedding. Useful
operations are counted, two a multiplication, the backward pass twice the forward pass; attention is not counted. Rounds
alternate with products; the least processor time of each is what counts.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from bridle.core.head import HeadSlopes, VocabularyHead
from bridle.language import layers, rooms, vocabulary
from bridle.random import torch_rng

RESULTS = Path(__file__).parent / "results" / "layers_pass.json"
WIDTH, HEADS, HIDDEN, LAYERS, VOCABULARY = 288, 6, 768, 6, 32_000
TEXTS, TOKENS, PROMPT = 16, 96, 32
ANSWERS = TEXTS * (TOKENS - PROMPT)


def layer() -> list[Tensor | None]:
    """The weights of one layer, no biases: two norms, queries, keys, values, outputs, the gate and both of the rest."""
    sizes = [(WIDTH, WIDTH)] * 4 + [(HIDDEN, WIDTH)] * 2 + [(WIDTH, HIDDEN)]
    weights: list[Tensor | None] = [nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(WIDTH))]
    for size in sizes:
        weights += [nn.Parameter(torch.randn(size) * 0.05), None]
    return weights


def works(dtype: torch.dtype) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, in the order in which it runs, and its operations."""
    stack = [layer() for _ in range(LAYERS)]
    shape = layers.Shape(heads=HEADS, key_heads=HEADS, first_eps=1e-5, second_eps=1e-5, scale=(WIDTH // HEADS) ** -0.5)
    x = torch.randn(TEXTS, TOKENS, WIDTH, requires_grad=True)
    angles = torch.randn(1, TOKENS, WIDTH // HEADS // 2).repeat(1, 1, 2)
    asked = torch.stack([torch.zeros(TEXTS, dtype=torch.int64), torch.full((TEXTS,), TOKENS)])
    head = VocabularyHead(
        weight=nn.Parameter(torch.randn(VOCABULARY, WIDTH) * 0.05), bias=None, scale=1.0, softcap=None
    )
    targets, features = torch.randint(0, VOCABULARY, (ANSWERS,)), torch.randn(ANSWERS, WIDTH)
    gradient, found = torch.zeros(VOCABULARY, WIDTH), list[Tensor]()
    large = torch.ones(1536, 1536, dtype=dtype)

    def there() -> None:
        found[:] = [layers.decoder_stack([shape] * LAYERS, x, angles.cos(), angles.sin(), stack, asked)]

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

    forward = 2.0 * TEXTS * TOKENS * LAYERS * (4 * WIDTH**2 + 3 * WIDTH * HIDDEN)
    return {
        "layers there": (there, forward),
        "layers back": (back, 2 * forward),
        "head": (answers, 3 * 2.0 * ANSWERS * VOCABULARY * WIDTH),
        "products": (lambda: torch.mm(large, large), 2.0 * 1536**3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--rounds", type=int, default=12)
    given = parser.parse_args()
    dtype = getattr(torch, given.dtype)
    torch.set_num_threads(1)
    with torch_rng(0, "layers-pass"):
        parts = works(dtype)
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
    told = {"gflops": rates, "products": product, "share": rates["all"] / product, "rounds": given.rounds}
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    kept[given.dtype] = {
        "command": shlex.join(["python", *sys.argv[:1], "--dtype", given.dtype, "--rounds", str(given.rounds)]),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        **told,
    }
    RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
    shown = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    print(f"{given.dtype}: {shown}; products {product:.0f} GFLOP/s, {rates['all'] / product:.2f} of them")


if __name__ == "__main__":
    main()
