"""vLLM's side of ``bench/vllm_generation.py``: its offline engine, all in one process, a round at a time.

``python vllm_generate.py WORK compiled|eager``. As the rounds' prompts are the same, each begins with an empty prefix cache.
"""

from __future__ import annotations

import sys

from language_work import GenerationWork, serve
from vllm import LLM, SamplingParams


def main() -> None:
    work = GenerationWork.told()
    engine = LLM(
        model=work.model,
        dtype=work.dtype,
        seed=work.seed,
        skip_tokenizer_init=True,
        generation_config="vllm",
        enforce_eager=sys.argv[2] == "eager",
    )
    prompts = [{"prompt_token_ids": row["ids"]} for row in work.rows()]
    settings = [
        SamplingParams(
            max_tokens=work.new_tokens,
            stop_token_ids=work.stops,
            ignore_eos=True,
            temperature=1.0,
            detokenize=False,
            skip_clone=True,  # no deep copy of the many stops for each request, each round
        )
        for _ in prompts
    ]

    def sample() -> int:
        answers = engine.generate(prompts, settings, use_tqdm=False)
        return sum(len(answer.outputs[0].token_ids) for answer in answers)

    serve(sample, "vllm", before=engine.reset_prefix_cache)


if __name__ == "__main__":
    main()
