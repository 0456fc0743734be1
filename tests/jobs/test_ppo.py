from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from bridle.cli.main import main
from bridle.errors import ConfigError, DataError, ModelError, RunError, ScorerError
from bridle.jobs.config import from_dict, to_dict
from bridle.jobs.evaluate import EvaluateConfig
from bridle.jobs.evaluate import run as evaluate
from bridle.jobs.ppo import EvaluationSettings, PPOConfig, run
from bridle.jobs.session import RunSettings
from bridle.language.data import DataSettings
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.language.prompts import MixSettings
from bridle.language.roles import CriticSettings
from bridle.language.sampler import SamplingSettings
from bridle.language.scorers import RewardSettings
from bridle.language.shaping import KLSettings, ShapingSettings
from bridle.learn.advantages import AdvantageSettings
from bridle.learn.optim import OptimSettings
from bridle.learn.ppo import PPOSettings
from bridle.runs import Run
from tests.language.tiny import byte_tokenizer, tiny_model

JUDGES = """
def letters(prompts, completions, wish):
    return [sum(ch.isascii() and ch.isalpha() for ch in c) / 4 for c in completions]

def short(prompt, completions):
    return [float(len(c)) for c in completions]

def raises(prompts, completions):
    raise KeyError("no such thing")

def nan(prompts, completions):
    return [float("nan")] * len(completions)

def one(prompts, completions):
    return [1.0]

def text(prompts, completions):
    return ["good"] * len(completions)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a reward model, prompts, demonstrations and judges."""
    path = tmp_path_factory.mktemp("world")
    model = tiny_model(vocab_size=260)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
    save_model(path / "model", model, byte_tokenizer())
    reward, tokenizer = load_reward_model(ModelSettings(path=str(path / "model")))
    save_model(path / "reward", reward, tokenizer)
    rows = [{"prompt": f"{'abcdefgh'[i % 8]}{i}", "wish": "as"} for i in range(24)]
    (path / "prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (path / "demos.jsonl").write_text("".join(json.dumps({"prompt": "x", "answer": "zzz"}) + "\n" for _ in range(4)))
    (path / "judges.py").write_text(JUDGES)
    return path


def config(world: Path, path: Path, **changes: Any) -> PPOConfig:
    run_changes = changes.pop("run", {})
    quiet: dict[str, Any] = {"checkpoint_every": 2, "keep_checkpoints": 9, "threads": 1, "quiet": True}
    common: dict[str, Any] = {
        "reward": RewardSettings(functions=(f"{world}/judges.py:letters",)),
        "steps": 4,
        "prompts_per_step": 8,
        "sampling": SamplingSettings(max_new_tokens=6),
        "ppo": PPOSettings(epochs=2, minibatches=2, micro_batch_tokens=40),
        "actor": OptimSettings(lr=3e-3),
        "advantage": AdvantageSettings(gamma=1.0, lam=0.95),
        "critic": CriticSettings(source="actor"),
        "kl": KLSettings(where="reward"),
        "critic_optim": OptimSettings(lr=3e-3),
        "evaluation": EvaluationSettings(held_out=6, every=2),
    }
    return PPOConfig(
        run=RunSettings(**{"dir": path, **quiet, **run_changes}),
        model=ModelSettings(path=str(world / "model")),
        prompts=DataSettings(path=str(world / "prompts.jsonl")),
        **{**common, **changes},
    )


DEFAULTS: dict[str, Any] = {
    f.name: f.default_factory()  # type: ignore[misc]
    for f in fields(PPOConfig)
    if f.name in ("advantage", "critic", "kl", "ppo")
}


def files(folder: Path) -> dict[str, bytes]:
    """Everything that must be equal between a run and its resumed twin."""
    kept = [folder / "metrics.jsonl", *sorted((folder / "samples").iterdir())]
    kept += [p for p in sorted(folder.rglob("*.safetensors")) if "checkpoints" not in p.parts or "step-4" in p.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in kept}


def test_a_run_leaves_metrics_samples_checkpoints_and_a_policy(world: Path, tmp_path: Path) -> None:
    settings = config(world, tmp_path / "run")
    run(settings)
    found = Run.open(tmp_path / "run")
    steps = [row for row in found.metrics() if "clip_fraction" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert [row["step"] for row in found.metrics() if "evaluation/score" in row] == [0, 2, 4]
    assert all(float(str(row["first_ratio_gap_max"])) < 1e-4 for row in steps)
    assert all(float(str(row["sampler_gap_mean"])) < 1e-5 for row in steps)
    assert all(row["optimiser_steps"] == 4 for row in steps)
    assert steps[0]["exact_kl"] == pytest.approx(0.0, abs=1e-5)
    assert float(str(steps[3]["exact_kl"])) > 0
    assert found.read_samples(0, name="evaluation")[0]["exact_kl"] == pytest.approx(0.0, abs=1e-5)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy")
    AutoModelForCausalLM.from_pretrained(tmp_path / "run/checkpoints/step-2/policy")
    assert from_dict(PPOConfig, to_dict(settings)) == settings


def test_samples_keep_every_quantity_of_every_token(world: Path, tmp_path: Path) -> None:
    """The sum of an answer's rewards is its score less β times its sampled KL; λ = 1 advantages sum back to returns."""
    run(config(world, tmp_path / "run", kl=KLSettings(where="reward", coefficient=0.3)))
    for row in Run.open(tmp_path / "run").read_samples(4):
        lists = {name: value for name, value in row.items() if isinstance(value, list) and name != "prompt_ids"}
        assert {len(v) for v in lists.values()} == {len(row["ids"])}
        sampled = sum(o - r for o, r in zip(row["old_logp"], row["ref_logp"], strict=True))
        assert sum(row["reward"]) == pytest.approx(row["score"] - 0.3 * sampled, abs=1e-5)
        assert row["components"] == {"letters": row["score"]}
        for a, v, g in zip(row["advantage"], row["value"], row["return"], strict=True):
            assert a + v == pytest.approx(g, abs=1e-6)
        for new, old, ratio in zip(row["new_logp"], row["old_logp"], row["ratio"], strict=True):
            assert math.exp(new - old) == pytest.approx(ratio, rel=2e-6)
        assert row["stop"] in ("eos", "length")


@pytest.mark.parametrize(
    "changes",
    [
        {"critic": CriticSettings(source="trunk")},
        {"kl": KLSettings(where="loss", estimator="exact", coefficient=0.01)},
        {"critic": CriticSettings(source="actor"), "shaping": ShapingSettings(whiten=True), "answers_per_prompt": 2},
        {**DEFAULTS, "kl": KLSettings(coefficient=0.01)},
    ],
    ids=["value head on the trunk", "exact KL in the loss", "own critic, whitened", "defaults"],
)
def test_it_learns(world: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    common = {"kl": KLSettings(where="reward", coefficient=0.01), "actor": OptimSettings(lr=1e-2)}
    run(config(world, tmp_path / "run", steps=16, prompts_per_step=16, **{**common, **changes}))
    scores = [float(str(row["score"])) for row in Run.open(tmp_path / "run").metrics() if "clip_fraction" in row]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 0.3


@pytest.mark.parametrize("some", [{}, DEFAULTS], ids=["own critic, k1 in the reward", "defaults"])
def test_resumed_is_bit_for_bit_the_run_that_never_stopped(world: Path, tmp_path: Path, some: dict[str, Any]) -> None:
    changes: dict[str, Any] = {
        "kl": KLSettings(where="reward", target=0.5, horizon=100),
        "shaping": ShapingSettings(scale=True),
        "mix": MixSettings(path=str(world / "demos.jsonl"), coefficient=0.1, batch=3),
        "actor": OptimSettings(lr=3e-3, schedule="linear", warmup_steps=1),
        **some,
    }
    run(config(world, tmp_path / "whole", **changes))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-4")
    shutil.rmtree(tmp_path / "cut/policy")
    run(config(world, tmp_path / "cut", **changes), resume=True)
    assert files(tmp_path / "cut") == files(tmp_path / "whole")


def test_demonstrations_to_mix_in_that_are_too_long_are_left_out_if_asked(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": "x", "answer": "z" * n}) + "\n" for n in (3, 99)))
    mix = MixSettings(path=str(path), coefficient=0.1, batch=2)
    with pytest.raises(DataError, match=r"line 2: \d+ tokens where 64 fit; .*--mix\.long drop"):
        run(config(world, tmp_path / "run", mix=mix))
    assert not (tmp_path / "run").exists()
    run(config(world, tmp_path / "run", steps=1, mix=replace(mix, long="drop")))


def test_the_saved_policy_says_what_its_last_evaluation_recorded(world: Path, tmp_path: Path) -> None:
    run(
        config(
            world,
            tmp_path / "run",
            actor=OptimSettings(lr=1e-2),
            sampling=SamplingSettings(max_new_tokens=6, temperature=0.7),
        )
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run/policy")
    rows = Run.open(tmp_path / "run").read_samples(4, name="evaluation")
    assert len(rows) > 1
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["prompt_ids"] + row["ids"]])).logits[0]
        said = torch.log_softmax(logits / 0.7, dim=-1)[len(row["prompt_ids"]) - 1 : -1]
        logp = said.gather(1, torch.tensor(row["ids"])[:, None])[:, 0]
        torch.testing.assert_close(logp, torch.tensor(row["sampler_logp"]), atol=1e-5, rtol=0)


def test_a_resume_with_another_model_or_other_prompts_is_refused(world: Path, tmp_path: Path) -> None:
    """The reference is read again on a resume: were it another one, the leash would quietly pull elsewhere."""
    for name in ("model", "prompts.jsonl"):
        own = tmp_path / name.partition(".")[0]
        shutil.copytree(world, own)
        run(config(own, own / "run"))
        shutil.rmtree(own / "run/checkpoints/step-4")
        if name == "model":
            save_model(own / "model", tiny_model(vocab_size=260, seed=1), byte_tokenizer())
        else:
            rows = (own / name).read_text().splitlines(keepends=True)
            (own / name).write_text("".join(rows[::-1]))
        what = "model: the content of model.safetensors" if name == "model" else "prompts.path: the content of prompts"
        with pytest.raises(RunError, match=f"^{what}.* and was .* put it back as it was, or `bridle resume"):
            run(config(own, own / "run"), resume=True)


def test_prompts_that_are_held_out_are_not_learnt_from(world: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 10}", "wish": "as"} for i in range(26)]
    (tmp_path / "twice.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = replace(config(world, tmp_path / "run"), prompts=DataSettings(path=str(tmp_path / "twice.jsonl")))
    run(settings)
    found = Run.open(tmp_path / "run")
    asked = {row["prompt"] for step in (1, 2, 3, 4) for row in found.read_samples(step)}
    assert asked == {"p6", "p7", "p8", "p9"}
    assert {row["prompt"] for row in found.read_samples(0, name="evaluation")} == {f"p{i}" for i in range(6)}


def test_a_target_of_another_vocabulary_is_refused(world: Path, tmp_path: Path) -> None:
    save_model(tmp_path / "other", tiny_model(vocab_size=300), byte_tokenizer())
    with pytest.raises(ModelError, match="another shape or vocabulary"):
        evaluate(
            EvaluateConfig(
                target=str(tmp_path / "other"),
                reference=str(world / "model"),
                prompts=str(world / "prompts.jsonl"),
                functions=(f"{world}/judges.py:letters",),
                max_new_tokens=4,
            )
        )


def test_warm_up_leaves_the_actor_alone_also_on_a_shared_trunk(world: Path, tmp_path: Path) -> None:
    for source in ("trunk", "actor"):
        critic = CriticSettings(source=source, warmup_steps=2)  # type: ignore[arg-type]
        run(config(world, tmp_path / source, critic=critic))
        start = load_file(world / "model/model.safetensors")
        warm = load_file(tmp_path / source / "checkpoints/step-2/policy/model.safetensors")
        done = load_file(tmp_path / source / "checkpoints/step-4/policy/model.safetensors")
        assert all(torch.equal(start[name], warm[name]) for name in start)
        assert not all(torch.equal(start[name], done[name]) for name in start)


def test_a_reward_model_judges_and_starts_the_critic(world: Path, tmp_path: Path) -> None:
    reward = RewardSettings(model=str(world / "reward"))
    run(config(world, tmp_path / "run", steps=2, reward=reward, critic=CriticSettings(source="reward")))
    first, *_ = Run.open(tmp_path / "run").read_samples(1)
    model, _ = load_reward_model(ModelSettings(path=str(world / "reward")))
    ids = torch.tensor([first["prompt_ids"] + first["ids"]])
    with torch.no_grad():
        assert float(model(ids).logits) == pytest.approx(first["score"], abs=1e-4)
        # the critic starts as the reward model: its first value is the score of the prompt alone
        assert float(model(torch.tensor([first["prompt_ids"]])).logits) == pytest.approx(first["value"][0], abs=1e-4)


def test_group_judges_see_the_answers_to_one_prompt_together(world: Path, tmp_path: Path) -> None:
    reward = RewardSettings(rankings=(f"{world}/judges.py:short",))
    run(config(world, tmp_path / "run", steps=1, reward=reward, answers_per_prompt=4))
    rows = Run.open(tmp_path / "run").read_samples(1)
    for group in range(8):
        own = [row for row in rows if row["group"] == group]
        assert len({row["prompt"] for row in own}) == 1
        assert sum(row["score"] for row in own) == pytest.approx(0.0)
        longest, shortest = max(own, key=lambda r: len(r["answer"])), min(own, key=lambda r: len(r["answer"]))
        assert shortest["score"] >= longest["score"]
    held_out = Run.open(tmp_path / "run").read_samples(1, name="evaluation")
    assert len(held_out) == 6 * 4  # judges of groups need groups there too
    assert any(row["score"] for row in held_out)


@pytest.mark.parametrize("halved", [False, True], ids=["shadow", "compiled"])
def test_bfloat16_recomputes_the_old_log_probs(
    halved: bool, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless sampler and trainer say the same to the bit, as compiled layers of a tiny model may."""
    if not halved:
        monkeypatch.setattr("bridle.language.layers.halved", None)
    run(config(world, tmp_path / "run", steps=2, run={"dtype": "bfloat16"}))
    for row in Run.open(tmp_path / "run").metrics():
        if "clip_fraction" in row:
            assert row["old_logp_recomputed"] == (float(str(row["sampler_gap_max"])) > 0)
            assert float(str(row["first_ratio_gap_mean"])) < 0.02
    assert load_file(tmp_path / "run/policy/model.safetensors")["lm_head.weight"].dtype == torch.float32


def test_evaluation_answers_the_same_prompts_with_the_same_draws(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config(world, tmp_path / "run"))
    last = [row for row in Run.open(tmp_path / "run").metrics() if "evaluation/score" in row][-1]
    evaluate(EvaluateConfig(target=str(tmp_path / "run"), output=tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["after"]["score"] == pytest.approx(last["evaluation/score"])
    assert figures["after"]["exact_kl"] == pytest.approx(last["evaluation/exact_kl"], rel=1e-4)
    assert figures["before"]["exact_kl"] == pytest.approx(0.0, abs=1e-5)
    assert "difference, paired" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("judge", "said"),
    [
        ("raises", "KeyError"),
        ("nan", "nan"),
        ("one", "1 scores for 6 answers"),
        ("text", "'good'"),
        ("missing", "missing"),
    ],
)
def test_a_judge_that_fails_is_told_in_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], judge: str, said: str
) -> None:
    arguments = ["ppo", "--run.dir", str(tmp_path / "run"), "--run.quiet", "--model.path", str(world / "model")]
    arguments += ["--prompts.path", str(world / "prompts.jsonl"), "--reward.functions", f"{world}/judges.py:{judge}"]
    arguments += ["--sampling.max-new-tokens", "4", "--evaluation.held-out", "6"]
    assert main(arguments) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert judge in error
    assert said in error
    assert not (tmp_path / "run").exists()


def test_what_cannot_work_is_refused_before_anything_is_written(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    with pytest.raises(ConfigError, match="minibatches"):
        config(world, path, ppo=PPOSettings(minibatches=9))
    with pytest.raises(ConfigError, match="answers_per_prompt"):
        config(world, path, reward=RewardSettings(groups=("m:f",)))
    with pytest.raises(ConfigError, match="warmup_steps"):
        config(world, path, critic=CriticSettings(warmup_steps=4))
    with pytest.raises(ConfigError, match="horizon"):
        config(world, path, kl=KLSettings(where="reward", target=1.0, horizon=1))
    with pytest.raises(ConfigError, match="kl_loss"):
        config(world, path, ppo=PPOSettings(kl_loss="k3"))
    with pytest.raises(ConfigError, match="held_out"):
        run(config(world, path, evaluation=EvaluationSettings(held_out=24)))
    with pytest.raises(ConfigError, match="reward model to start from"):
        run(config(world, path, critic=CriticSettings(source="reward")))
    with pytest.raises(DataError, match="leave"):
        run(config(world, path, sampling=SamplingSettings(max_new_tokens=64)))
    with pytest.raises(ModelError):
        run(config(world, path, reward=RewardSettings(model=str(world / "model"))))
    (world / "bare.jsonl").write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(8)))
    with pytest.raises(ScorerError, match="wish"):
        run(replace(config(world, path), prompts=DataSettings(path=str(world / "bare.jsonl"))))
    assert not path.exists()
