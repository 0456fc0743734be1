"""The sides of ``bench/vllm_generation.py`` in Bridle's own environment: its embedded sampler, and transformers' ``generate``.

``python vllm_generation_bridle.py WORK engine|generate``, each as in ``bench/generation_speed.py``.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial

import torch
from generation_speed import DTYPES, ROWS, generate, opened
from peers.language_work import GenerationWork, serve
from torch import Tensor
from transformers import AutoModelForCausalLM

from bridle.language.sampler import SamplingSettings
from bridle.random import uniforms


def serve_engine(work: GenerationWork, prompts: list[Tensor]) -> None:
    """The embedded sampler; other answers each round."""
    dtype, rounds = DTYPES[work.dtype], itertools.count()
    computing = partial(torch.autocast, "cpu", dtype=dtype, enabled=dtype != torch.float32)
    sampler, _, _ = opened(AutoModelForCausalLM.from_pretrained(work.model).eval(), tuple(work.stops), computing)
    settings = SamplingSettings(max_new_tokens=work.new_tokens, rows=ROWS)

    def sample() -> int:
        draws = uniforms(work.seed, "bench.draws", next(rounds), range(len(prompts)), work.new_tokens)
        return sum(len(answer.ids) for answer in sampler(prompts, draws, settings))

    serve(sample)


def serve_generate(work: GenerationWork, prompts: list[Tensor]) -> None:
    """``generate``, with its weights in the dtype that it computes in; warm after two answers, as it keeps nothing."""
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=DTYPES[work.dtype]).eval()
    model.generation_config.eos_token_id = None
    generate(model, prompts[:2], tuple(work.stops), work.new_tokens)
    serve(lambda: generate(model, prompts, tuple(work.stops), work.new_tokens), warm=0)


def main() -> None:
    work = GenerationWork.told()
    torch.set_num_threads(work.threads)
    prompts = [torch.tensor(row["ids"]) for row in work.rows()]
    {"engine": serve_engine, "generate": serve_generate}[sys.argv[2]](work, prompts)


if __name__ == "__main__":
    main()
