from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from bridle.errors import ConfigError, DataError, ModelError
from bridle.jobs import reward
from bridle.jobs.reward import EvaluationSettings, RewardConfig, run
from bridle.jobs.session import RunSettings
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.language.reward_model import LossSettings, score_sequences
from bridle.learn.optim import OptimSettings
from bridle.random import generator
from tests.language.tiny import byte_tokenizer, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tiny"
    save_model(path, tiny_model(vocab_size=260), byte_tokenizer())
    return path


def answers(index: int, count: int) -> list[str]:
    """Texts of 4 to 8 letters, best first: the judge counts the letter a, whatever the length."""
    draw = generator(0, "test-answers", index)
    texts = []
    for wanted in sorted(draw.choice(5, size=count, replace=False), reverse=True):
        others = draw.choice(list("bcdefgh"), size=draw.integers(4, 9) - wanted)
        texts.append("".join(draw.permutation(["a"] * int(wanted) + list(others))))
    return texts


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs_file(path: Path, count: int = 64) -> str:
    rows = []
    for i in range(count):
        better, worse = answers(i, 2)
        rows.append({"prompt": f"{i // 2}?", "chosen": better, "rejected": worse})
    return write(path, rows)


def rankings_file(path: Path, count: int = 48) -> str:
    return write(path, [{"prompt": f"{i // 2}?", "answers": answers(i, 3)} for i in range(count)])


def config(folder: Path, tmp_path: Path, **changes: Any) -> RewardConfig:
    settings: dict[str, Any] = {
        "run": RunSettings(dir=tmp_path / "run", quiet=True, threads=1),
        "model": ModelSettings(path=str(folder)),
        "data": DataSettings(path=pairs_file(tmp_path / "pairs.jsonl")),
        "batch_size": 8,
        "epochs": 3,
        "optim": OptimSettings(lr=3e-3, schedule="linear"),
        "evaluation": EvaluationSettings(share=0.25),
    }
    return RewardConfig(**{**settings, **changes})


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


FRESH = """
import sys, json, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
assert not any(name.startswith("bridle") for name in sys.modules)
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
width = max(map(len, texts))
padded = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids in texts])
mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
with torch.no_grad():
    print(json.dumps(model(input_ids=padded, attention_mask=mask).logits[:, 0].tolist()))
"""


def test_pairs_are_learnt_and_the_model_opens_elsewhere_with_the_same_scores(folder: Path, tmp_path: Path) -> None:
    path = run(config(folder, tmp_path, epochs=6, data=DataSettings(path=pairs_file(tmp_path / "many.jsonl", 160))))
    assert path == tmp_path / "run"
    rows = lines(path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 6 * 15 + 1))
    assert rows[-1]["loss"] < 0.4 < rows[0]["loss"]
    assert {"phase", "epoch", "lr", "loss", "accuracy", "margin", "reward_mean", "grad_norm"} <= rows[0].keys()
    summary = json.loads((path / "evaluation.json").read_text())
    assert summary["quality"]["accuracy"] >= 0.9
    assert summary["quality"]["accuracy_interval"]["low"] > summary["quality"]["length_accuracy"]

    model, tokenizer = load_reward_model(ModelSettings(path=str(path / "reward")))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    texts = [[1, *range(4 + i, 12 + 2 * i), 2] for i in range(5)]
    ours = score_sequences(model, [torch.tensor(ids) for ids in texts])
    command = [sys.executable, "-c", FRESH, str(path / "reward"), json.dumps(texts)]
    theirs = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    torch.testing.assert_close(ours, torch.tensor(json.loads(theirs.splitlines()[-1])), rtol=1e-5, atol=1e-5)


def test_the_finished_model_has_mean_0_and_deviation_1_on_its_training_answers(folder: Path, tmp_path: Path) -> None:
    settings = config(folder, tmp_path, epochs=1)
    run(settings)
    world = reward._open(settings)
    texts = [answer for p in world.phases[-1].training for answer in world.comparisons[p].answers]
    model, _ = load_reward_model(ModelSettings(path=str(tmp_path / "run" / "reward")))
    scores = score_sequences(model, texts)
    assert float(scores.mean()) == pytest.approx(0, abs=1e-3)
    assert float(scores.std(correction=0)) == pytest.approx(1, abs=1e-3)


def test_rankings_are_learnt(folder: Path, tmp_path: Path) -> None:
    data = DataSettings(path=rankings_file(tmp_path / "rankings.jsonl", 120))
    run(config(folder, tmp_path, kind="rankings", data=data, epochs=4, normalise=False))
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["quality"]["accuracy"] >= 0.85
    assert "normalisation" not in summary


def test_folds_judge_every_comparison_once_by_a_model_that_has_not_seen_its_prompt(
    folder: Path, tmp_path: Path
) -> None:
    settings = config(folder, tmp_path, epochs=1, evaluation=EvaluationSettings(folds=4))
    world = reward._open(settings)
    *cut, final = world.phases
    assert sorted(p for phase in cut for p in phase.held_out) == list(range(64))
    for phase in cut:
        seen = {world.comparisons[p].group for p in phase.training}
        assert not seen & {world.comparisons[p].group for p in phase.held_out}
    assert sorted(final.training) == list(range(64))
    run(settings)
    summary = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert summary["quality"]["comparisons"] == 64
    judged = lines(tmp_path / "run" / "samples" / f"held-out-{final.last}.jsonl")
    assert sorted(row["comparison"] for row in judged) == list(range(64))
    right = [(row["scores"][0] > row["scores"][1]) + 0.5 * (row["scores"][0] == row["scores"][1]) for row in judged]
    assert summary["quality"]["accuracy"] == pytest.approx(sum(right) / 64)
    assert all(tuple(row["lengths"]) == world.comparisons[row["comparison"]].lengths for row in judged)
    assert [fold["comparisons"] for fold in summary["folds"]] == [len(phase.held_out) for phase in cut]
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["phase"] for row in rows if "evaluation/accuracy" in row] == [f"fold-{k}" for k in range(4)]


def test_evaluation_may_have_its_own_file_and_pace(folder: Path, tmp_path: Path) -> None:
    own = pairs_file(tmp_path / "held-out.jsonl", 10)
    run(config(folder, tmp_path, epochs=1, evaluation=EvaluationSettings(path=own, every=3)))
    rows = lines(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if "evaluation/accuracy" in row] == [3, 6, 8]
    assert rows[-1]["evaluation/comparisons"] == 10


class Halted(Exception):
    pass


@pytest.mark.parametrize("halt", [3, 10, 14])
def test_a_resumed_run_is_the_uninterrupted_one(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, halt: int
) -> None:
    whole = config(folder, tmp_path, epochs=1, evaluation=EvaluationSettings(folds=2))
    run(whole)
    where = replace(whole.run, dir=tmp_path / "resumed", checkpoint_every=2)
    real = reward._train

    def halting(*arguments: Any) -> Any:
        if arguments[3] == halt:
            raise Halted
        return real(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(reward, "_train", halting)
        with pytest.raises(Halted):
            run(replace(whole, run=where))
    run(replace(whole, run=where), resume=True)
    for name in ("metrics.jsonl", "evaluation.json"):
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "run" / name).read_bytes()
    one, other = (load_file(tmp_path / name / "reward" / "model.safetensors") for name in ("run", "resumed"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_margins_and_long_prompts_reach_the_model(folder: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "x" * 100, "chosen": "aa", "rejected": "bbbb", "margin": 1.5},
        {"prompt": "q", "chosen": "c" * 100, "rejected": "d"},
        {"prompt": "short", "chosen": "aa", "rejected": "b", "margin": 0},
        {"prompt": "other", "chosen": "aa", "rejected": "b"},
        {"prompt": "last", "chosen": "aa", "rejected": "b"},
        {"prompt": "least", "chosen": "aa", "rejected": "b"},
    ]
    data = DataSettings(path=write(tmp_path / "long.jsonl", rows), long="truncate_left")
    world = reward._open(config(folder, tmp_path, data=data, evaluation=EvaluationSettings(share=0.5)))
    first, second, third, *_ = world.comparisons
    tokenizer = byte_tokenizer()
    assert [tokenizer.decode(ids) for ids in first.answers] == ["x" * 59 + "aa</s>", "x" * 59 + "bbbb</s>"]
    assert [tokenizer.decode(ids) for ids in second.answers] == ["c" * 63 + "</s>", "d</s>"]
    assert (first.margin, second.margin, third.margin) == (1.5, 0, 0)
    assert first.lengths == (2, 4)
    assert "2 of 6 comparisons cut from the left: longer than 64 tokens" in world.notes
    with pytest.raises(DataError, match=r"long.jsonl line 1: 105 tokens where 64 fit"):
        reward._open(config(folder, tmp_path, data=replace(data, long="refuse")))
    dropped = reward._open(
        config(folder, tmp_path, data=replace(data, long="drop"), evaluation=EvaluationSettings(share=0.5))
    )
    assert len(dropped.comparisons) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"epochs": 0}, "epochs=0: expected a whole number >= 1"),
        ({"kind": "rankings", "loss": LossSettings(centering=0.1)}, "defined for pairs"),
        ({"max_tokens": 65}, "at most the model's context of 64 tokens"),
    ],
)
def test_settings_that_cannot_work_are_refused(
    folder: Path, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        run(config(folder, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"share": 1.0}, "a share in"),
        ({"folds": 1}, "at least 2 folds"),
        ({"folds": 3, "path": "x.jsonl"}, "no file of held-out comparisons beside it"),
        ({"every": 0}, "a whole number >= 1"),
    ],
)
def test_evaluations_that_cannot_work_are_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        EvaluationSettings(**settings)


def test_data_that_cannot_serve_are_one_line(folder: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"too few prompts \(1\) to train on some and hold others out"):
        run(config(folder, tmp_path, data=DataSettings(path=few)))
    wrong = write(tmp_path / "wrong.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1}])
    with pytest.raises(
        DataError, match=r"wrong.jsonl line 1: 'margin' is a number, expected a number from 0 to 1e\+06"
    ):
        run(config(folder, tmp_path, data=DataSettings(path=wrong)))
    missing = write(tmp_path / "missing.jsonl", [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(DataError, match="has no column 'rejected'"):
        run(config(folder, tmp_path, data=DataSettings(path=missing)))
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_pads_with_eos_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save_model(tmp_path / "model", tiny_model(vocab_size=260), byte_tokenizer(pad_token="</s>"))
    with pytest.raises(ModelError, match="pad = eos"):
        run(config(tmp_path / "model", tmp_path))
    assert not (tmp_path / "run").exists()
