"""TRL's side of supervised fine-tuning and of reward-model training: its trainers as they are, timed step by step."""

from __future__ import annotations

import time

BEFORE = time.perf_counter()

import tempfile  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from language_work import Laps, TuningWork, forget_peak, memory, tell  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE


class Watch(TrainerCallback):  # type: ignore[misc]
    """Closes a lap at the end of each step, and keeps what the trainer counts."""

    def __init__(self) -> None:
        self.laps = Laps()
        self.tokens: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if not self.laps.rows:
            self.laps.skip()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.laps.mark("step")
        self.laps.end()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "num_tokens" in logs and "loss" in logs:
            self.tokens.append(float(logs["num_tokens"]))


def trainer_of(work: TuningWork, watch: Watch, place: str) -> Any:
    """One optimiser step takes ``batch`` rows, in passes of ``micro_batch``."""
    dtype = getattr(torch, work.dtype)
    tokenizer = AutoTokenizer.from_pretrained(work.model)
    rows = work.rows()[: work.steps * work.batch]
    common = {
        "output_dir": place,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "seed": work.seed,
        "per_device_train_batch_size": work.micro_batch,
        "gradient_accumulation_steps": work.batch // work.micro_batch,
        "max_steps": work.steps,
        "learning_rate": work.lr,
        "max_length": work.longest,
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": [],
        "disable_tqdm": True,
    }
    if work.kind == "sft":
        return SFTTrainer(
            model=AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype),
            args=SFTConfig(**common),
            processing_class=tokenizer,
            train_dataset=Dataset.from_list([{name: row[name] for name in ("prompt", "completion")} for row in rows]),
            callbacks=[watch],
        )
    return RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(work.model, num_labels=1, dtype=dtype),
        args=RewardConfig(**common),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        callbacks=[watch],
    )


def main() -> None:
    work = TuningWork.told()
    torch.set_num_threads(work.threads)
    held = forget_peak()
    watch = Watch()
    with tempfile.TemporaryDirectory() as place:
        trainer_of(work, watch, place).train()
    counted = [0.0, *watch.tokens]
    for row, before, after in zip(watch.laps.rows, counted, counted[1:], strict=False):
        row |= {"tokens": after - before, "items": work.batch}
    answer = {
        "iterations": watch.laps.rows,
        "import_seconds": IMPORTS,
        "memory_after_imports": held,
        "peak_memory": memory()["peak"],
    }
    tell(answer, "trl")


if __name__ == "__main__":
    main()
