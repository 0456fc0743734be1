from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2TokenizerFast

from bridle.cli.main import main
from bridle.errors import ConfigError, DataError, ModelError, RunError
from bridle.jobs.config import from_dict, to_dict
from bridle.jobs.session import RunSettings
from bridle.jobs.sft import EvaluationSettings, SFTConfig, run
from bridle.language.data import DataSettings
from bridle.language.data.readers import _hub_dataset
from bridle.language.models import ModelSettings, save_model
from bridle.language.sampler import SamplingSettings
from bridle.learn.optim import OptimSettings
from bridle.runs import Run
from tests.language.test_chat import TALK
from tests.language.tiny import CHATML, byte_tokenizer, tiny_model

SUMS = [{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(4) for b in range(4)]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    save_model(path, tiny_model("llama", vocab_size=260, attention_dropout=0.1), byte_tokenizer())
    return path


_QUIET = {"keep_checkpoints": 9, "threads": 1, "quiet": True}


def config(path: Path, model: Path, data: str, **changes: Any) -> SFTConfig:
    run_changes = changes.pop("run", {})
    common: dict[str, Any] = {
        "epochs": 2,
        "batch_size": 5,
        "micro_batch_tokens": 32,
        "optim": OptimSettings(lr=3e-3, schedule="cosine", warmup_steps=2),
        "evaluation": EvaluationSettings(share=0.25, every=2, samples=2, sampling=SamplingSettings(max_new_tokens=4)),
    }
    return SFTConfig(
        run=RunSettings(**{"dir": path, "checkpoint_every": 2, **_QUIET, **run_changes}),
        model=ModelSettings(path=str(model)),
        data=DataSettings(path=data),
        **{**common, **changes},
    )


def test_a_run_leaves_metrics_samples_checkpoints_and_a_policy(tmp_path: Path, base: Path) -> None:
    settings = config(tmp_path / "run", base, write(tmp_path / "a.jsonl", SUMS))
    assert run(settings) == tmp_path / "run"
    found = Run.open(tmp_path / "run")
    rows = found.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]  # 12 to learn, 5 in a batch, 2 epochs
    assert [row["step"] for row in rows if "evaluation/loss" in row] == [0, 2, 4, 6]
    assert [row["epoch"] for row in rows[1:]] == [0, 0, 0, 1, 1, 1]
    assert rows[1]["lr"] == pytest.approx(1.5e-3)
    assert sum(int(str(row["target_tokens"])) for row in rows[1:4]) == sum(
        len(row["answer"]) + 1 for row in SUMS
    ) - int(str(rows[0]["evaluation/target_tokens"]))
    samples = found.read_samples(6, name="evaluation")
    assert len(samples) == 2
    assert all(sample["prompt"] in [row["prompt"] for row in SUMS] for sample in samples)
    assert all({"prompt": s["prompt"], "answer": s["demonstrated"]} in SUMS for s in samples)
    assert [checkpoint.step for checkpoint in found.checkpoints()] == [2, 4, 6]
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy")
    assert policy.config.attention_dropout == 0.1  # switched off while training, kept for whoever wants it
    assert AutoTokenizer.from_pretrained(tmp_path / "run/policy").eos_token == "</s>"
    assert from_dict(SFTConfig, to_dict(settings)) == settings


def test_it_learns_to_answer_and_to_stop(tmp_path: Path, base: Path) -> None:
    settings = config(
        tmp_path / "run",
        base,
        write(tmp_path / "a.jsonl", SUMS),
        epochs=60,
        batch_size=16,
        micro_batch_tokens=4096,
        optim=OptimSettings(lr=3e-3),
        evaluation=EvaluationSettings(share=0),
        run={"checkpoint_every": 99},
    )
    run(settings)
    assert float(str(Run.open(tmp_path / "run").metrics()[-1]["loss"])) < 0.1
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run/policy")
    for row in SUMS:
        ids = tokenizer(row["prompt"], return_tensors="pt")
        out = policy.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids.input_ids.shape[1] :]
        assert out.tolist() == [*tokenizer.encode(row["answer"]), tokenizer.eos_token_id]


def forget_after(path: Path, step: int) -> None:
    """Leave a run as a crash after ``step``'s checkpoint would have."""
    for checkpoint in Run.open(path).checkpoints():
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    shutil.rmtree(path / "policy")
    events = [line for line in (path / "events.jsonl").read_text().splitlines() if '"finish"' not in line]
    (path / "events.jsonl").write_text("".join(f"{line}\n" for line in events))


def test_a_resumed_run_goes_on_exactly_as_the_uninterrupted_one(tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "a.jsonl", SUMS)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(config(whole, base, data))
    shutil.copytree(whole, cut)
    forget_after(cut, 2)
    run(config(cut, base, data), resume=True)
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    for name in ("policy/model.safetensors", "checkpoints/step-6/optimiser.safetensors", "samples/evaluation-6.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    moved = load_file(whole / "policy/model.safetensors")["lm_head.weight"]
    assert not torch.equal(moved, load_file(whole / "checkpoints/step-4/policy/model.safetensors")["lm_head.weight"])


def test_a_hub_dataset_that_has_changed_is_not_gone_on_with(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [dict(row) for row in SUMS]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    _hub_dataset.cache_clear()
    settings = config(tmp_path / "run", base, "owner/name", epochs=1)
    run(settings)
    forget_after(tmp_path / "run", 2)
    _hub_dataset.cache_clear()  # as a new process
    rows[3]["answer"] = "7"
    monkeypatch.setattr("bridle.jobs.sft.load_causal_lm", None)  # it is told before weights are read
    with pytest.raises(RunError, match=r"^data\.path: the content of owner/name train is \w{12}… and was \w{12}… when"):
        run(settings, resume=True)
    _hub_dataset.cache_clear()
    rows[3]["answer"] = SUMS[3]["answer"]
    monkeypatch.undo()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    run(settings, resume=True)


def test_micro_batches_change_nothing_but_rounding(tmp_path: Path, base: Path) -> None:
    data = write(tmp_path / "a.jsonl", SUMS)
    losses = []
    for name, budget in (("small", 1), ("large", 10_000)):
        run(config(tmp_path / name, base, data, micro_batch_tokens=budget))
        losses.append([float(str(row["loss"])) for row in Run.open(tmp_path / name).metrics()[1:]])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_bfloat16_computes_on_float32_masters(tmp_path: Path, base: Path) -> None:
    run(config(tmp_path / "run", base, write(tmp_path / "a.jsonl", SUMS), run={"dtype": "bfloat16"}))
    weights = load_file(tmp_path / "run/policy/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    rows = Run.open(tmp_path / "run").metrics()
    assert float(str(rows[-1]["evaluation/loss"])) < float(str(rows[0]["evaluation/loss"]))


def test_held_out_demonstrations_of_their_own_file(tmp_path: Path, base: Path) -> None:
    data, away = write(tmp_path / "a.jsonl", SUMS), write(tmp_path / "b.jsonl", SUMS[:3])
    run(config(tmp_path / "run", base, data, evaluation=EvaluationSettings(path=away, samples=9)))
    found = Run.open(tmp_path / "run")
    assert [s["prompt"] for s in found.read_samples(0, name="evaluation")] == [row["prompt"] for row in SUMS[:3]]


def test_gpt2_tokens_and_chats(tmp_path: Path, shared_data: Path) -> None:
    files = shared_data / "tokenizers/gpt2"
    tokenizer = GPT2TokenizerFast(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    dropout = {"resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1}
    size = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    model = tiny_model("gpt2", eos_token_id=tokenizer.eos_token_id, **size, **dropout)
    save_model(tmp_path / "base", model, tokenizer)
    (tmp_path / "chatml.jinja").write_text(CHATML)
    row = {"messages": [{"role": m.role, "content": m.content} for m in TALK]}
    settings = config(tmp_path / "run", tmp_path / "base", write(tmp_path / "a.jsonl", [row] * 8))
    with pytest.raises(ModelError, match="no chat template"):
        run(settings)
    chat = ModelSettings(path=str(tmp_path / "base"), chat_template=tmp_path / "chatml.jinja", eos_token="<|im_end|>")
    run(SFTConfig(**{**{f: getattr(settings, f) for f in settings.__slots__}, "model": chat}))
    rows = Run.open(tmp_path / "run").metrics()
    assert float(str(rows[-1]["evaluation/loss"])) < float(str(rows[0]["evaluation/loss"]))
    again = AutoTokenizer.from_pretrained(tmp_path / "run/policy")
    assert again.chat_template == CHATML
    assert again.eos_token == "<|im_end|>"
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy")
    assert policy.get_input_embeddings().weight.shape[0] == 50_258
    assert policy.generation_config.eos_token_id == [50_257, 50_256]


def test_stories_bos_is_eos(tmp_path: Path, shared_data: Path) -> None:
    text = (shared_data / "tinystories/tinystories_sample.txt").read_text(encoding="utf-8")
    stories = [story.strip() for story in text.split("<|endoftext|>")[:-1]]
    rows = [{"prompt": "", "answer": story} for story in sorted(stories, key=len)[:24]]
    model = shared_data / "models/stories260K"
    data = write(tmp_path / "a.jsonl", rows)
    optim = OptimSettings(lr=1e-4)
    evaluation = EvaluationSettings(share=0.25, samples=99, sampling=SamplingSettings(max_new_tokens=8))
    run(config(tmp_path / "run", model, data, epochs=1, optim=optim, evaluation=evaluation, micro_batch_tokens=2048))
    rows_found = Run.open(tmp_path / "run").metrics()
    start, end = (float(str(row["evaluation/loss"])) for row in (rows_found[0], rows_found[-1]))
    assert 1.0 < start < 2.0  # a model of 260,032 parameters that knows these stories' kind, final <s> included
    assert end < start
    network, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    samples = Run.open(tmp_path / "run").read_samples(0, name="evaluation")
    total, count = 0.0, 0
    for sample in samples:
        assert {"prompt": sample["prompt"], "answer": sample["demonstrated"]} in rows
        ids = torch.tensor([[*tokenizer.encode(str(sample["demonstrated"])), 1]])
        with torch.no_grad():
            total += float(network(ids, labels=ids).loss) * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    assert len(samples) == 6
    assert start == pytest.approx(total / count, abs=1e-4)


def test_what_is_wrong_is_said_before_anything_is_written(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, where = write(tmp_path / "a.jsonl", SUMS), tmp_path / "run"
    long = write(tmp_path / "long.jsonl", [{"prompt": "x" * 100, "answer": "y"}])
    for changed, error, match in (
        ({"data": DataSettings(path=long)}, DataError, r"line 1: 102 tokens where 64 fit; .*--data\.long drop"),
        ({"data": DataSettings(path=long, long="drop")}, DataError, "all 1 demonstrations are longer"),
        ({"data": DataSettings(path=data, answer="reply")}, DataError, "no column 'reply'"),
        ({"max_tokens": 65}, ConfigError, "max_tokens=65: expected at most the model's context of 64"),
        ({"evaluation": EvaluationSettings(share=0.99)}, DataError, "nothing is left to learn"),
        ({"model": ModelSettings(path=str(tmp_path))}, ModelError, r"holds no config\.json"),
    ):
        settings = config(where, base, data)
        with pytest.raises(error, match=match) as raised:
            run(SFTConfig(**{**{f: getattr(settings, f) for f in settings.__slots__}, **changed}))
        assert "\n" not in str(raised.value)
        assert not where.exists()
    for name in ("epochs", "batch_size", "micro_batch_tokens", "max_tokens"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            config(where, base, data, **{name: 0})
    code = main(
        ["sft", "--run.dir", str(where), "--model.path", str(base), "--data.path", str(tmp_path / "none.jsonl")]
    )
    assert code == 2
    said = capsys.readouterr().err.strip()
    assert said.endswith("none.jsonl: no such file")
    assert "\n" not in said
    assert not where.exists()


def test_perplexity_is_the_exponential_of_the_loss(tmp_path: Path, base: Path) -> None:
    run(config(tmp_path / "run", base, write(tmp_path / "a.jsonl", SUMS), epochs=1))
    first = Run.open(tmp_path / "run").metrics()[0]
    assert float(str(first["evaluation/perplexity"])) == pytest.approx(math.exp(float(str(first["evaluation/loss"]))))
