"""TRL 1.12's side of PPO on language: its trainer as it is, timed from outside."""

from __future__ import annotations

import contextlib
import importlib.util
import time

BEFORE = time.perf_counter()

import tempfile  # noqa: E402
from pathlib import Path  # noqa: E402
from types import SimpleNamespace  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from datasets import Dataset  # noqa: E402
from language_work import Laps, PPOWork, forget_peak, memory, tell  # noqa: E402
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer  # noqa: E402

IMPORTS = time.perf_counter() - BEFORE


class JudgeModel(torch.nn.Module):
    """A Python function in the clothes of a classifier, since the trainer takes nothing else: backbone, then ``score``."""

    base_model_prefix = "backbone"

    def __init__(self, file: str, tokenizer: Any, prompt_tokens: int) -> None:
        super().__init__()
        found = importlib.util.spec_from_file_location("judge", file)
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
        self.judge, self.tokenizer, self.start = module.dark, tokenizer, prompt_tokens
        self.backbone = lambda input_ids, attention_mask, **_: SimpleNamespace(
            hidden_states=[torch.where(attention_mask.bool(), input_ids, tokenizer.pad_token_id)]
        )

    def score(self, ids: torch.Tensor) -> torch.Tensor:
        texts = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True)
        scores = torch.tensor(self.judge([""] * len(texts), texts))
        return scores[:, None, None].expand(*ids.shape, 1)


class Enough(Exception):
    """What was asked for is reached, or the time is over."""


class Watch(TrainerCallback):  # type: ignore[misc]
    """Times the parts of an iteration, keeps the policy, and ends when what was asked for is reached.

    Generation is one function of the trainer's; the passes over the finished answers (reference, critic, reward) end with the
    first forward pass that has gradients.
    """

    def __init__(self, work: PPOWork) -> None:
        self.work, self.laps = work, Laps()
        self.logs: list[dict[str, float]] = []
        self.training = False
        self._generation, self._forward = ppo_trainer.batch_generation, ppo_trainer.forward
        ppo_trainer.batch_generation, ppo_trainer.forward = self.generation, self.forward

    def generation(self, *args: Any, **kwargs: Any) -> Any:
        found = self._generation(*args, **kwargs)
        self.laps.mark("generate")
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not self.training:
            self.laps.mark("score")
            self.training = True
        return self._forward(*args, **kwargs)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.laps.skip()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        self.logs.append({name: value for name, value in logs.items() if isinstance(value, int | float)})

    def good(self, log: dict[str, float]) -> bool:
        """Whether the answers of an iteration are what was asked for."""
        enough = self.work.until is not None and log["objective/scores"] >= self.work.until
        return enough and log["objective/kl"] <= self.work.most_kl

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: Any, **_: Any) -> None:
        self.laps.mark("train")
        self.laps.end()
        self.training = False
        if self.work.snapshots is not None:
            model.policy.save_pretrained(Path(self.work.snapshots) / f"step-{state.global_step}")
        good = [self.good(log) for log in self.logs[-2:]]
        reached = len(good) == 2 and all(good)
        spent = sum(row["cpu_seconds"] for row in self.laps.rows)
        if reached or (self.work.limit is not None and spent > self.work.limit):
            raise Enough
        self.laps.skip()


def trainer_of(work: PPOWork, watch: Watch, place: str) -> PPOTrainer:
    """The trainer with a step per minibatch: gradient accumulation would make it one per epoch."""
    dtype = getattr(torch, work.dtype)
    tokenizer = AutoTokenizer.from_pretrained(work.model, padding_side="left")
    prompts = [tokenizer(row["prompt"]).input_ids for row in work.rows()]
    assert {len(ids) for ids in prompts} == {work.prompt_tokens}
    if work.judge is not None:
        judge: Any = JudgeModel(work.judge, tokenizer, work.prompt_tokens)
    else:
        judge = AutoModelForSequenceClassification.from_pretrained(work.reward_model, num_labels=1, dtype=dtype)
    torch.manual_seed(work.seed)
    critic = AutoModelForSequenceClassification.from_pretrained(
        work.reward_model or work.model, num_labels=1, dtype=dtype
    )
    settings = PPOConfig(
        output_dir=place,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        seed=work.seed,
        per_device_train_batch_size=work.prompts,
        gradient_accumulation_steps=1,
        num_mini_batches=work.minibatches,
        num_ppo_epochs=work.epochs,
        local_rollout_forward_batch_size=work.rollout_rows,
        total_episodes=work.iterations * work.prompts,
        response_length=work.new_tokens,
        temperature=work.temperature,
        stop_token="eos" if work.stops else None,
        learning_rate=work.lr,
        kl_coef=work.kl,
        lam=work.lam,
        vf_coef=work.value,
        cliprange_value=work.value_clip,
        num_sample_generations=0,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    return PPOTrainer(
        settings,
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype),
        ref_model=AutoModelForCausalLM.from_pretrained(work.model, dtype=dtype),
        reward_model=judge,
        value_model=critic,
        train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[: work.prompts]}),
        callbacks=[watch],
    )


def main() -> None:
    work = PPOWork.told()
    torch.set_num_threads(work.threads)
    held = forget_peak()
    watch = Watch(work)
    with tempfile.TemporaryDirectory() as place:
        trainer = trainer_of(work, watch, place)
        with contextlib.suppress(Enough):
            trainer.train()
    answer = {
        "iterations": watch.laps.rows,
        "logs": watch.logs,
        "import_seconds": IMPORTS,
        "memory_after_imports": held,
        "peak_memory": memory()["peak"],
    }
    tell(answer, "trl")


if __name__ == "__main__":
    main()
