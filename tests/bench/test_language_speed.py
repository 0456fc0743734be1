"""The language measurements' own side works, and counts what it says it counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

BENCH = Path(__file__).resolve().parents[2] / "bench"
SHAPE = {"vocabulary": 600, "width": 48, "layers": 1}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The measurement's modules, and tiny models and texts that its short form makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        import language_inputs
        import language_speed
        import language_speed_bridle

        place = tmp_path_factory.mktemp("inputs")
        models = language_inputs.save_models(place, "short", language_inputs.random_llama(**SHAPE))
        texts = language_inputs.save_texts(place, "short", models["model"])
        yield language_speed, language_speed_bridle, models, texts


def test_prompts_have_exactly_the_tokens_that_are_counted(bench: Any) -> None:
    from transformers import AutoTokenizer

    _, _, models, texts = bench
    tokenizer = AutoTokenizer.from_pretrained(models["model"])
    rows = [json.loads(line) for line in Path(texts["prompts"]).read_text().splitlines()]
    assert len(rows) >= 64
    assert {len(tokenizer(row["prompt"]).input_ids) for row in rows} == {32}


def test_an_iteration_answers_and_times_what_was_asked_for(bench: Any, tmp_path: Path) -> None:
    speed, own, models, texts = bench
    work = speed.PPOWork(
        data=texts["prompts"], prompts=4, new_tokens=5, epochs=2, minibatches=2, iterations=2, **models
    )
    found = own.run_ppo(work, tmp_path / "run", "same")
    assert len(found["iterations"]) == 2
    assert found["answer_tokens"] == [5.0, 5.0]  # with 600 tokens hardly any answer of these keys ends by itself
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (config["ppo"]["epochs"], config["ppo"]["minibatches"]) == (2, 2)
    assert (config["critic"]["source"], config["reward"]["model"]) == ("reward", models["reward_model"])
    parts = [name for name in found["iterations"][0] if speed.is_part(name) and not name.endswith("_cpu")]
    for row in found["iterations"]:
        assert 0 < sum(row[name] for name in parts) <= 1.05 * row["seconds"]


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_tuning_counts_its_items(bench: Any, tmp_path: Path, kind: str) -> None:
    speed, own, models, texts = bench
    work = speed.TuningWork(model=models["model"], data=texts[kind], kind=kind, steps=2, batch=2)
    found = own.run_tuning(work, tmp_path / "run")
    assert [row["items"] for row in found["iterations"]] == [2, 2]
    assert all(row["tokens"] > 2 * 32 and row["seconds"] > 0 for row in found["iterations"])


def test_useful_operations_are_those_that_pytorch_counts(bench: Any) -> None:
    speed, _, models, _ = bench
    model = LlamaForCausalLM.from_pretrained(models["model"], attn_implementation="eager")
    rows, prompt, new = 3, 4, 12
    ids = torch.zeros(rows, prompt + new, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hidden = model.model(ids).last_hidden_state
        trunk = counter.get_total_flops()
        model.lm_head(hidden[:, prompt:])
        head = counter.get_total_flops() - trunk
    half_attention = 2 * rows * (prompt + new) ** 2 * SHAPE["width"] * SHAPE["layers"]  # the mask leaves half of 4·L²·D
    work = speed.PPOWork(model="", data="", prompts=rows, prompt_tokens=prompt, new_tokens=new, epochs=2)
    expected = 3 * 2 * (2 * (trunk - half_attention) + head)
    assert speed.training_flops(work, **SHAPE) == pytest.approx(expected, rel=0.01)
