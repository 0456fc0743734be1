from __future__ import annotations

import asyncio
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bridle.errors import ConfigError, ModelError, ScorerError
from bridle.language.models import ModelSettings, load_causal_lm, load_reward_model, save_model
from bridle.language.sampler import Stop
from bridle.language.scorers import (
    Answers,
    FunctionScorer,
    GroupScorer,
    RewardModelScorer,
    RewardSettings,
    WeightedSum,
    build_scorer,
)
from bridle.language.scorers.functions import centred_ranks
from tests.language.tiny import CHATML, byte_tokenizer, tiny_model


def answers(completions: list[str], *, groups: list[int] | None = None, **columns: list[object]) -> Answers:
    groups = groups if groups is not None else list(range(len(completions)))
    return Answers(
        prompts=[f"prompt {group}" for group in groups],
        completions=completions,
        prompt_ids=[torch.tensor([1, 5 + group]) for group in groups],
        completion_ids=[torch.tensor([4 + len(text)]) for text in completions],
        stops=[Stop.EOS] * len(completions),
        groups=groups,
        columns=columns,
    )


def judge_file(folder: Path, body: str) -> str:
    path = folder / "judge.py"
    path.write_text(body)
    return str(path)


# What a function is given


def test_function_is_given_texts_and_gives_scores(tmp_path: Path) -> None:
    spec = judge_file(
        tmp_path,
        "def score(prompts, completions):\n    return [len(p) + 10 * len(c) for p, c in zip(prompts, completions)]\n",
    )
    scores = FunctionScorer(f"{spec}:score")(answers(["a", "bbb"]))
    assert scores.total == [8 + 10.0, 8 + 30.0]
    assert scores.components == {"score": scores.total}


@pytest.mark.parametrize(
    ("signature", "seen"),
    [
        ("prompts, completions", []),
        ("prompts, completions, gold", ["gold"]),
        ("prompts, completions, *, gold", ["gold"]),
        ("prompts, completions, other=None", []),
        ("prompts, completions, **columns", ["gold", "level"]),
        ("prompts, completions, gold, **columns", ["gold", "level"]),
        ("*texts, **columns", ["gold", "level"]),
    ],
)
def test_only_columns_that_the_function_accepts_are_passed(tmp_path: Path, signature: str, seen: list[str]) -> None:
    body = f"seen = []\ndef score({signature}):\n    seen.append(dict(locals()))\n    return [1.0, 2.0]\n"
    scorer = FunctionScorer(judge_file(tmp_path, body) + ":score")
    scorer(answers(["a", "b"], gold=["x", "y"], level=[1, 2]))
    (given,) = scorer._call._function.__globals__["seen"]
    given |= given.pop("columns", {})
    got = {name: value for name, value in given.items() if name in ("gold", "level")}
    assert got == {name: {"gold": ["x", "y"], "level": [1, 2]}[name] for name in seen}


def test_a_column_named_like_the_first_arguments_does_not_collide(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, "def score(prompts, completions, **columns):\n    return [float(len(columns))]\n")
    assert FunctionScorer(f"{spec}:score")(answers(["a"], prompts=["x"], gold=[1])).total == [1.0]


def test_a_function_cannot_change_what_the_others_see(tmp_path: Path) -> None:
    spec = judge_file(
        tmp_path, "def score(prompts, completions, gold):\n    completions.clear(); gold.clear()\n    return [1.0]\n"
    )
    shown = answers(["a"], gold=[1])
    FunctionScorer(f"{spec}:score")(shown)
    assert shown.completions == ["a"]
    assert shown.columns == {"gold": [1]}


def test_a_missing_column_is_told_with_those_that_exist(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, "def score(prompts, completions, gold):\n    return [0.0]\n") + ":score"
    with pytest.raises(ScorerError, match=r"needs the column 'gold', the data's columns are: level;"):
        FunctionScorer(spec)(answers(["a"], level=[3]))


def test_async_functions_share_one_event_loop_over_calls(tmp_path: Path) -> None:
    body = (
        "import asyncio\nloops = []\n"
        "async def score(prompts, completions):\n"
        "    await asyncio.sleep(0)\n    loops.append(asyncio.get_running_loop())\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    scorer = FunctionScorer(judge_file(tmp_path, body) + ":score")
    assert scorer(answers(["a", "bb"])).total == [1.0, 2.0]
    assert scorer(answers(["ccc"])).total == [3.0]
    first, second = scorer._call._function.__globals__["loops"]
    assert first is second


# What a function may return


@pytest.mark.parametrize(
    "result",
    [
        [1, 0.5],
        (1.0, 0.5),
        np.array([1.0, 0.5], dtype=np.float32),
        torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        [np.float64(1.0), torch.tensor(0.5)],
        [np.int64(1), torch.tensor([0.5])],
    ],
)
def test_lists_arrays_and_tensors_are_read(monkeypatch: pytest.MonkeyPatch, result: object) -> None:
    scorer = returning(monkeypatch, result)
    scores = scorer(answers(["a", "b"]))
    assert scores.total == [1.0, 0.5]
    assert all(type(value) is float for value in scores.total)


def test_verdicts_count_as_one_and_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    assert returning(monkeypatch, [True, np.False_])(answers(["a", "b"])).total == [1.0, 0.0]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        ([1.0], r"returned 1 scores for 2 answers"),
        ([1.0, 2.0, 3.0], r"returned 3 scores for 2 answers"),
        ([1.0, math.nan], r"returned nan \(float\) for answer 1; expected a finite number"),
        ([math.inf, 1.0], r"returned inf \(float\) for answer 0; expected a finite number"),
        ([10**400, 1.0], r"for answer 0; expected a finite number"),
        (np.array([1.0, np.nan]), r"returned nan \(float\) for answer 1; expected a finite number"),
        (["0.5", 1.0], r"returned '0.5' \(str\) for answer 0; expected a number"),
        ([None, 1.0], r"returned None \(NoneType\) for answer 0; expected a number"),
        ([1j, 1.0], r"for answer 0; expected a number"),
        ([[1.0], [2.0]], r"returned \[1.0\] \(list\) for answer 0; expected a number"),
        (np.ones((2, 1)), r"returned an array of shape \(2, 1\); expected \[2\]"),
        (torch.tensor(1.0), r"returned an array of shape \(\); expected \[2\]"),
        (None, r"returned None \(NoneType\); expected a list of 2 numbers"),
        (1.0, r"returned 1.0 \(float\); expected a list of 2 numbers"),
        ("ab", r"returned 'ab' \(str\); expected a list of 2 numbers"),
        ({"a": 1.0, "b": 2.0}, r"\(dict\); expected a list of 2 numbers"),
    ],
)
def test_anything_else_is_one_line_that_names_the_function(
    monkeypatch: pytest.MonkeyPatch, result: object, told: str
) -> None:
    scorer = returning(monkeypatch, result)
    with pytest.raises(ScorerError, match=told) as caught:
        scorer(answers(["a", "b"]))
    assert str(caught.value).startswith("tests_judge:score ")
    assert "\n" not in str(caught.value)


def returning(monkeypatch: pytest.MonkeyPatch, result: object) -> FunctionScorer:
    import sys
    from types import ModuleType

    module = ModuleType("tests_judge")
    module.score = lambda prompts, completions: result  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tests_judge", module)
    return FunctionScorer("tests_judge:score")


@pytest.mark.parametrize("prefix", ["", "async "])
def test_a_function_that_raises_is_named_with_type_text_and_line(tmp_path: Path, prefix: str) -> None:
    body = f"{prefix}def score(prompts, completions):\n    raise KeyError('first\\nsecond')\n"
    scorer = FunctionScorer(judge_file(tmp_path, body) + ":score")
    with pytest.raises(
        ScorerError, match=r"judge.py:score raised KeyError: .*first.*second.* \(judge.py, line 2\)"
    ) as caught:
        scorer(answers(["a"]))
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_the_line_told_is_the_functions_own_not_that_of_what_it_called(tmp_path: Path) -> None:
    body = "import json\ndef score(prompts, completions):\n    return json.loads(completions[0])\n"
    scorer = FunctionScorer(judge_file(tmp_path, body) + ":score")
    with pytest.raises(ScorerError, match=r"raised JSONDecodeError: .* \(judge.py, line 3\)"):
        scorer(answers(["no json"]))


# Finding the function


def test_a_module_of_the_working_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_judge_module.py").write_text(
        "import own_helper_module\ndef score(p, c):\n    return own_helper_module.VALUES\n"
    )
    (tmp_path / "own_helper_module.py").write_text("VALUES = [2.0]\n")
    assert FunctionScorer("own_judge_module:score")(answers(["a"])).total == [2.0]


def test_a_missing_module_is_told_with_the_files_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    judge_file(tmp_path, "")
    with pytest.raises(ScorerError, match=r"no module 'jugde' for 'jugde:score'; .*: judge.py"):
        FunctionScorer("jugde:score")


def test_a_missing_file_is_told_with_the_files_that_exist(tmp_path: Path) -> None:
    judge_file(tmp_path, "")
    with pytest.raises(ScorerError, match=r"no file '.*jugde.py' .*: judge.py"):
        FunctionScorer(f"{tmp_path}/jugde.py:score")


def test_a_missing_function_is_told_with_those_that_exist(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, "from math import sqrt\ndef scores(p, c): ...\ndef _hidden(p, c): ...\n")
    with pytest.raises(ScorerError, match=r"has no function 'score'; it has: scores$"):
        FunctionScorer(f"{spec}:score")


@pytest.mark.parametrize("spec", ["judge", ":score", "judge:", "judge:not a name"])
def test_a_spec_that_names_no_function_is_refused(spec: str) -> None:
    with pytest.raises(ScorerError, match=r"write module:function or file.py:function"):
        FunctionScorer(spec)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise RuntimeError('at import')\n", r"raised RuntimeError: at import \(judge.py, line 1\)"),
        ("import no_such_dependency\n", r"raised ModuleNotFoundError: No module named 'no_such_dependency'"),
        ("def score(prompts): ...\n", r"takes 1 positional arguments; write it as score\(prompts, completions"),
        ("score = 3\n", r"is 3 \(int\), which cannot be called"),
    ],
)
def test_a_function_that_cannot_serve_is_refused_on_loading(tmp_path: Path, body: str, told: str) -> None:
    with pytest.raises(ScorerError, match=told):
        FunctionScorer(judge_file(tmp_path, body) + ":score")


# Groups


def test_a_group_function_sees_each_prompts_answers_together(tmp_path: Path) -> None:
    body = (
        "seen = []\n"
        "def rank(prompt, completions, gold):\n"
        "    seen.append((prompt, completions, gold))\n    return [float(len(c)) for c in completions]\n"
    )
    scorer = GroupScorer(judge_file(tmp_path, body) + ":rank")
    scores = scorer(answers(["a", "bb", "ccc", "dddd"], groups=[3, 1, 3, 1], gold=["x", "y", "x", "y"]))
    assert scores.total == [1.0, 2.0, 3.0, 4.0]
    assert scorer._call._function.__globals__["seen"] == [
        ("prompt 3", ["a", "ccc"], "x"),
        ("prompt 1", ["bb", "dddd"], "y"),
    ]


def test_ranks_become_centred_scores(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, "def rank(prompt, completions):\n    return [len(c) for c in completions]\n") + ":rank"
    scorer = GroupScorer(spec, kind="ranks")
    assert scorer(answers(["aaa", "b", "cc", "d"], groups=[0, 0, 0, 7])).total == [-1.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([1, 2, 3, 4], [1, 1 / 3, -1 / 3, -1]),
        ([40, 10, 30, 20], [-1, 1, -1 / 3, 1 / 3]),
        ([1, 1, 2], [0.5, 0.5, -1]),
        ([5, 5, 5], [0, 0, 0]),
        ([9], [0]),
    ],
)
def test_centred_ranks_by_hand(ranks: list[float], expected: list[float]) -> None:
    assert centred_ranks(ranks) == pytest.approx(expected)
    assert sum(centred_ranks(ranks)) == pytest.approx(0)


def test_async_group_functions_run_concurrently(tmp_path: Path) -> None:
    body = (
        "import asyncio\nwaiting = []\n"
        "async def rank(prompt, completions):\n"
        "    waiting.append(asyncio.get_running_loop().create_future())\n"
        "    if len(waiting) == 2:\n        [f.set_result(None) for f in waiting]\n"
        "    await waiting[len(waiting) - 1]\n    return [float(len(completions))]*len(completions)\n"
    )
    assert GroupScorer(judge_file(tmp_path, body) + ":rank")(answers(["a", "b", "c"], groups=[0, 0, 1])).total == [
        2.0,
        2.0,
        1.0,
    ]


def test_a_failing_async_group_leaves_nothing_pending(tmp_path: Path) -> None:
    body = (
        "import asyncio\ndone = []\n"
        "async def rank(prompt, completions):\n"
        "    if prompt == 'prompt 0':\n        raise ValueError('no')\n"
        "    await asyncio.sleep(0)\n    await asyncio.sleep(0)\n    done.append(prompt)\n    return [0.0]\n"
    )
    scorer = GroupScorer(judge_file(tmp_path, body) + ":rank")
    with pytest.raises(ScorerError, match="raised ValueError: no"):
        scorer(answers(["a", "b"]))
    assert scorer._call._function.__globals__["done"] == ["prompt 1"]
    assert scorer._call._worker._loop is not None
    assert not asyncio.all_tasks(scorer._call._worker._loop)


def test_a_wrong_length_is_counted_within_the_group(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, "def rank(prompt, completions):\n    return [0.0]\n") + ":rank"
    with pytest.raises(ScorerError, match="returned 1 scores for 2 answers"):
        GroupScorer(spec)(answers(["a", "b"], groups=[0, 0]))


# Sums


def test_a_weighted_sum_keeps_each_judges_own_score(tmp_path: Path) -> None:
    spec = judge_file(tmp_path, "def one(p, c):\n    return [1.0, 2.0]\ndef two(p, c):\n    return [10.0, 30.0]\n")
    scorer = WeightedSum([FunctionScorer(f"{spec}:one"), FunctionScorer(f"{spec}:two")], [2.0, -0.5])
    scores = scorer(answers(["a", "b"]))
    assert scores.total == [-3.0, -11.0]
    assert scores.components == {"one": [1.0, 2.0], "two": [10.0, 30.0]}


def test_a_sum_refuses_judges_of_one_name_and_missing_weights(tmp_path: Path) -> None:
    one = FunctionScorer(judge_file(tmp_path, "def one(p, c): ...\n") + ":one")
    with pytest.raises(ConfigError, match="a different name for each judge"):
        WeightedSum([one, one], [1.0, 1.0])
    with pytest.raises(ConfigError, match="one weight for each of 1 judges"):
        WeightedSum([one], [1.0, 1.0])


def test_answers_refuse_fields_that_do_not_agree() -> None:
    with pytest.raises(ValueError, match="column 'gold' has length 1, prompts 2"):
        answers(["a", "b"], gold=[1])
    with pytest.raises(ValueError, match="group 0 holds answers to different prompts"):
        Answers(
            prompts=["p", "q"],
            completions=["a", "b"],
            prompt_ids=[torch.tensor([1])] * 2,
            completion_ids=[torch.tensor([2])] * 2,
            stops=[Stop.EOS] * 2,
            groups=[0, 0],
            columns={},
        )


# Reward models and settings


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> Path:
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def reward_folder(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward") / "model"
    model, tokenizer = load_reward_model(ModelSettings(path=str(stories)), seed=1)
    save_model(folder, model, tokenizer)
    return folder


def sampled(stories: Path) -> Answers:
    _, tokenizer = load_causal_lm(ModelSettings(path=str(stories)))
    prompts = ["Once upon a time", "Lily was sad"]
    completions = [" there was a big dog", " and she cried.", " the end"]
    groups = [0, 0, 1]
    return Answers(
        prompts=[prompts[g] for g in groups],
        completions=completions,
        prompt_ids=[torch.tensor(tokenizer(prompts[g]).input_ids) for g in groups],
        # as a policy may sample them: not the ids that the tokenizer would give this text
        completion_ids=[torch.tensor([*tokenizer(c, add_special_tokens=False).input_ids, 400, 1]) for c in completions],
        stops=[Stop.EOS, Stop.LENGTH, Stop.EOS],
        groups=groups,
        columns={"gold": ["a", "a", "b"]},
    )


def test_a_reward_model_of_the_same_tokenizer_scores_the_ids_as_sampled(stories: Path, reward_folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    answers = sampled(stories)
    _, tokenizer = load_causal_lm(ModelSettings(path=str(stories)))
    scores = build_scorer(RewardSettings(model=str(reward_folder)), tokenizer)(answers)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folder)
    with torch.no_grad():
        for prompt, completion, score in zip(answers.prompt_ids, answers.completion_ids, scores.total, strict=True):
            own = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, 0]
            assert score == pytest.approx(float(own), abs=1e-5)
    assert scores.components == {"reward_model": scores.total}


def test_a_judge_in_bfloat16_agrees_to_its_precision(stories: Path, reward_folder: Path) -> None:
    _, tokenizer = load_causal_lm(ModelSettings(path=str(stories)))
    settings, shown = RewardSettings(model=str(reward_folder)), sampled(stories)
    full = build_scorer(settings, tokenizer)(shown).total
    half = build_scorer(settings, tokenizer, dtype=torch.bfloat16)(shown).total
    assert half == pytest.approx(full, abs=3e-2)
    assert half != full


def test_a_causal_model_is_refused_as_a_judge(stories: Path) -> None:
    _, tokenizer = load_causal_lm(ModelSettings(path=str(stories)))
    with pytest.raises(ModelError, match="is not a reward model, its head is missing; train one: bridle reward"):
        build_scorer(RewardSettings(model=str(stories)), tokenizer)


def test_an_answer_beyond_the_reward_models_context_is_refused(reward_folder: Path) -> None:
    model, _ = load_reward_model(ModelSettings(path=str(reward_folder)))
    shown = Answers(
        prompts=["p"],
        completions=["c"],
        prompt_ids=[torch.full((300,), 5)],
        completion_ids=[torch.full((213,), 5)],
        stops=[Stop.LENGTH],
        groups=[0],
        columns={},
    )
    with pytest.raises(ModelError, match="a text of 513 tokens exceeds the reward model's context of 512; ask for"):
        RewardModelScorer(model)(shown)


def test_a_score_that_is_not_finite_is_refused(reward_folder: Path, stories: Path) -> None:
    model, _ = load_reward_model(ModelSettings(path=str(reward_folder)))
    scorer = RewardModelScorer(model)
    with torch.no_grad():
        model.score.weight.fill_(math.inf)
    with pytest.raises(ScorerError, match=r"reward_model gave (nan|-?inf) for answer 0"):
        scorer(sampled(stories))


def test_settings_build_a_jury_in_the_order_of_its_weights(tmp_path: Path, stories: Path, reward_folder: Path) -> None:
    body = (
        "def one(prompts, completions, gold):\n    return [1.0] * len(completions)\n"
        "def rank(prompt, completions):\n    return list(range(len(completions)))\n"
    )
    spec = judge_file(tmp_path, body)
    _, tokenizer = load_causal_lm(ModelSettings(path=str(stories)))
    with pytest.raises(ConfigError, match="each judge once"):
        RewardSettings(
            model=str(reward_folder),
            functions=(f"{spec}:one",),
            groups=(f"{spec}:rank",),
            rankings=(f"{spec}:rank",),
            weights=(0.0, 100.0, 10.0, 1.0),
        )
    (tmp_path / "other.py").write_text(body)
    settings = RewardSettings(
        model=str(reward_folder),
        functions=(f"{spec}:one",),
        groups=(f"{tmp_path}/other.py:rank",),
        rankings=(f"{spec}:rank",),
        weights=(0.0, 100.0, 10.0, 1.0),
    )
    scores = build_scorer(settings, tokenizer)(sampled(stories))
    assert scores.total == [100 + 0 + 1, 100 + 10 - 1, 100 + 0 + 0]
    assert list(scores.components) == ["reward_model", f"{spec}:one", f"{tmp_path}/other.py:rank", f"{spec}:rank"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "nobody judges the answers"),
        ({"functions": ("a:b",), "weights": (1.0, 2.0)}, "one weight for each of 1 judges"),
        ({"functions": ("a:b",), "weights": (math.nan,)}, "expected numbers from −1000 to 1000"),
        ({"functions": ("a:b",), "pad_token": "<pad>"}, "a reward model to use it"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        RewardSettings(**settings)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_reward_model_with_its_own_tokenizer_reads_the_text(
    stories: Path, tmp_path: Path, template: str | None
) -> None:
    own = byte_tokenizer(chat_template=template, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<pad>")
    source = tmp_path / "causal"
    save_model(source, tiny_model(vocab_size=len(own), max_position_embeddings=128), own)
    model, _ = load_reward_model(ModelSettings(path=str(source)), seed=1)
    save_model(tmp_path / "reward", model, own)
    _, tokenizer = load_causal_lm(ModelSettings(path=str(stories)))
    shown = sampled(stories)
    scores = build_scorer(RewardSettings(model=str(tmp_path / "reward")), tokenizer)(shown)
    for prompt, completion, stop, score in zip(
        shown.prompts, shown.completions, shown.stops, scores.total, strict=True
    ):
        end = "<|im_end|>" if stop is Stop.EOS else ""
        opening = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n" if template else prompt
        ids = own(opening + completion + end, add_special_tokens=False).input_ids
        with torch.no_grad():
            assert score == pytest.approx(float(model(input_ids=torch.tensor([ids])).logits[0, 0]), abs=1e-5)
