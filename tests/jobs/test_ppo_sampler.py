"""Which sampler a run uses, and what only an evaluation may ask of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bridle.errors import ConfigError, ModelError
from bridle.jobs.evaluate import EvaluateConfig
from bridle.jobs.evaluate import run as evaluate
from bridle.jobs.ppo import run
from bridle.language.models import save_model
from bridle.language.sampler import SamplingSettings
from bridle.runs import Run
from tests.jobs.test_ppo import config, world
from tests.language.tiny import byte_tokenizer, tiny_model

__all__ = ["world"]


def test_engine_and_plain_sampler_write_the_same_first_rollout(world: Path, tmp_path: Path) -> None:
    rows = {}
    for kind in ("auto", "reference"):
        run(config(world, tmp_path / kind, steps=1, answers_per_prompt=2, sampler=kind))
        rows[kind] = Run.open(tmp_path / kind).read_samples(1)
    assert [r["ids"] for r in rows["auto"]] == [r["ids"] for r in rows["reference"]]
    said = {kind: torch.tensor([x for row in found for x in row["sampler_logp"]]) for kind, found in rows.items()}
    gap = (said["auto"] - said["reference"]).abs()
    assert gap.mean() < 1e-5
    assert gap.max() < 1e-4


def test_a_model_that_the_engine_cannot_serve_is_named(
    world: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(tmp_path / "model", tiny_model("bloom", vocab_size=260), byte_tokenizer())
    (tmp_path / "prompts.jsonl").write_bytes((world / "prompts.jsonl").read_bytes())
    (tmp_path / "judges.py").write_bytes((world / "judges.py").read_bytes())
    with pytest.raises(ModelError, match="cannot serve BloomForCausalLM"):
        run(config(tmp_path, tmp_path / "engine", sampler="engine"))
    assert not (tmp_path / "engine").exists()
    run(config(tmp_path, tmp_path / "auto", steps=1, run={"quiet": False}))
    assert "cannot serve BloomForCausalLM" in " ".join("".join(capsys.readouterr()).split())


@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"stop_strings": ("a",)}])
def test_training_draws_from_the_whole_policy(cut: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(cut))):
        config(tmp_path, tmp_path / "run", sampling=SamplingSettings(**cut))  # type: ignore[arg-type]


def test_an_evaluation_may_ask_for_greedy_text(world: Path, tmp_path: Path) -> None:
    """Greedy text does not depend on the seed; text drawn from the whole policy does."""
    scores = []
    for seed in (0, 1):
        for name, top_k in (("greedy", 1), ("drawn", None)):
            output = tmp_path / f"{name}-{seed}.json"
            evaluate(
                EvaluateConfig(
                    target=str(world / "model"),
                    prompts=str(world / "prompts.jsonl"),
                    functions=(f"{world}/judges.py:letters",),
                    count=12,
                    max_new_tokens=8,
                    top_k=top_k,
                    seed=seed,
                    output=output,
                )
            )
            scores.append(json.loads(output.read_text())["after"]["score"])
    assert scores[0] == scores[2]
    assert scores[1] != scores[3]
