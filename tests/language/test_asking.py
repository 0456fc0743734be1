"""Judges that raise, hang or talk nonsense are asked again, left behind, dropped or end the run; never a silent zero."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from bridle.errors import ConfigError, ScorerError
from bridle.language.collect import PromptTokens, collect
from bridle.language.sampler import Sampled, SamplingSettings, Stop
from bridle.language.scorers import FunctionScorer, GroupScorer, JudgingSettings, Mishap, WeightedSum
from bridle.language.scorers.answers import Answers

JUDGES = """
import asyncio, threading
calls = []
gate = threading.Event()

def fails_twice(prompts, completions):
    calls.append(len(completions))
    if len(calls) < 3:
        raise ConnectionError("busy")
    return [1.0] * len(completions)

def hangs(prompts, completions):
    calls.append(len(completions))
    gate.wait()
    return [1.0] * len(completions)

def hangs_once(prompts, completions):
    calls.append(threading.current_thread().name)
    if len(calls) == 1:
        gate.wait()
    return [2.0] * len(completions)

async def sleeps(prompts, completions):
    await asyncio.Event().wait()

async def stubborn(prompts, completions):
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if gate.is_set():
                raise

async def works(prompts, completions):
    calls.append(id(asyncio.get_running_loop()))
    return [3.0] * len(completions)

def cancelled(prompts, completions):
    raise asyncio.CancelledError

def rubbish(prompts, completions):
    return [1.0, None, float("nan"), "good", 10**400, 1e39, [1.0], 2.0][: len(completions)]

def short(prompts, completions):
    return [1.0]

def groups(prompt, completions):
    if prompt == "p1":
        raise ValueError("not that one")
    return [float(i) for i in range(len(completions))]

def half_group(prompt, completions):
    return [1.0] + [None if prompt == "p1" else 0.0] * (len(completions) - 1)

async def groups_hang(prompt, completions):
    if prompt == "p1":
        await asyncio.Event().wait()
    return [float(i) for i in range(len(completions))]

def groups_hang_in_the_middle(prompt, completions):
    if prompt == "p1":
        gate.wait()
    return [float(i) for i in range(len(completions))]
"""

QUICK = {"timeout": 0.2, "wait": 0.0}
_numbers = itertools.count()


@pytest.fixture
def judges(tmp_path: Path) -> Any:
    """A file of judges of its own; what hangs is let go at the end."""
    path = tmp_path / f"judges_{next(_numbers)}.py"
    path.write_text(JUDGES)
    yield path
    sys.modules[f"_scorer_{path.stem}"].gate.set()


def answers(prompts: int = 2, each: int = 4) -> Answers:
    n = prompts * each
    return Answers(
        prompts=[f"p{i // each}" for i in range(n)],
        completions=[f"c{i}" for i in range(n)],
        prompt_ids=[torch.tensor([1])] * n,
        completion_ids=[torch.tensor([2])] * n,
        stops=[Stop.EOS] * n,
        groups=[i // each for i in range(n)],
        columns={},
    )


def scorer(path: Path, name: str, mishaps: list[Mishap], **judging: Any) -> FunctionScorer:
    settings = JudgingSettings(**{**QUICK, **judging})
    return FunctionScorer(f"{path}:{name}", judging=settings, mishaps=mishaps)


def calls(path: Path) -> list[Any]:
    found: list[Any] = sys.modules[f"_scorer_{path.stem}"].calls
    return found


def test_a_judge_that_comes_round_is_asked_again(judges: Path) -> None:
    mishaps: list[Mishap] = []
    assert scorer(judges, "fails_twice", mishaps, retries=2)(answers()).total == [1.0] * 8
    assert [(m.judge, m.outcome, m.answers) for m in mishaps] == [("fails_twice", "retried", 8)] * 2
    assert "raised ConnectionError: busy" in mishaps[0].text


def test_a_judge_that_does_not_ends_the_run(judges: Path) -> None:
    mishaps: list[Mishap] = []
    with pytest.raises(ScorerError, match="raised ConnectionError: busy"):
        scorer(judges, "fails_twice", mishaps, retries=1)(answers())
    assert [m.outcome for m in mishaps] == ["retried", "failed"]


def test_a_plain_function_that_raises_a_cancellation_is_not_waited_for(judges: Path) -> None:
    with pytest.raises(ScorerError, match="raised CancelledError"):
        scorer(judges, "cancelled", [], retries=0)(answers())


@pytest.mark.parametrize("name", ["hangs", "sleeps", "stubborn"])
@pytest.mark.parametrize("on_failure", ["fail", "drop"])
def test_a_judge_that_hangs_is_left_behind(judges: Path, name: str, on_failure: Any) -> None:
    """Also with "drop": where no answer has a score there is nothing to go on with."""
    mishaps: list[Mishap] = []
    with pytest.raises(ScorerError, match=r"was not done after 0\.2 seconds"):
        scorer(judges, name, mishaps, retries=1, on_failure=on_failure)(answers())
    assert [m.outcome for m in mishaps] == ["retried", "failed"]


def test_after_a_hang_it_is_asked_in_another_thread(judges: Path) -> None:
    mishaps: list[Mishap] = []
    judge = scorer(judges, "hangs_once", mishaps, retries=1)
    assert judge(answers()).total == [2.0] * 8
    assert judge(answers()).total == [2.0] * 8
    assert len(calls(judges)) == 3
    assert threading.current_thread().name not in calls(judges)


def test_without_a_timeout_it_is_asked_in_the_callers_thread(judges: Path) -> None:
    judge = scorer(judges, "hangs_once", [], timeout=None)
    sys.modules[f"_scorer_{judges.stem}"].gate.set()
    judge(answers())
    assert calls(judges) == [threading.current_thread().name]


def test_an_async_judge_keeps_its_event_loop(judges: Path) -> None:
    judge = scorer(judges, "works", [], timeout=30.0)
    assert judge(answers()).total == [3.0] * 8
    judge(answers())
    assert len(set(calls(judges))) == 1


def test_rubbish_ends_the_run_or_is_dropped_and_is_never_a_zero(judges: Path) -> None:
    mishaps: list[Mishap] = []
    with pytest.raises(ScorerError, match=r"returned None \(NoneType\) for answer 1"):
        scorer(judges, "rubbish", mishaps, retries=0)(answers())
    found = scorer(judges, "rubbish", mishaps, retries=0, on_failure="drop")(answers())
    assert found.dropped == {1, 2, 3, 4, 5, 6}
    assert [found.total[0], found.total[7]] == [1.0, 2.0]
    assert all(math.isnan(found.total[i]) for i in found.dropped)
    assert [(m.outcome, m.answers) for m in mishaps] == [("failed", 8), ("dropped", 6)]


def test_a_wrong_number_of_scores_cannot_be_dropped_in_part(judges: Path) -> None:
    with pytest.raises(ScorerError, match="returned 1 scores for 8 answers"):
        scorer(judges, "short", [], retries=0, on_failure="drop")(answers())


@pytest.mark.parametrize("name", ["groups", "half_group", "groups_hang", "groups_hang_in_the_middle"])
def test_of_groups_only_those_that_fail_are_dropped_and_whole(judges: Path, name: str) -> None:
    mishaps: list[Mishap] = []
    judging = JudgingSettings(**QUICK, retries=1, on_failure="drop")
    found = GroupScorer(f"{judges}:{name}", judging=judging, mishaps=mishaps)(answers())
    assert found.dropped == {4, 5, 6, 7}
    assert [m.outcome for m in mishaps] == ["retried", "dropped"]
    together = WeightedSum([GroupScorer(f"{judges}:{name}", judging=judging)], [2.0])(answers())
    assert together.dropped == found.dropped
    assert together.total[:4] == [2 * score for score in found.total[:4]]


def test_a_process_whose_judge_hangs_still_ends(judges: Path) -> None:
    code = (
        "import sys; from tests.language.test_asking import *\n"
        f"path = Path({str(judges)!r})\n"
        "try: scorer(path, 'hangs', [], retries=0)(answers())\n"
        "except ScorerError as error: print(error)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "was not done after 0.2 seconds" in done.stdout
    FunctionScorer(f"{judges}:short")  # so that there is something to let go


@pytest.mark.parametrize("bad", [{"timeout": 0.0}, {"timeout": math.nan}, {"retries": -1}, {"wait": -1.0}])
def test_settings_that_cannot_work_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="judging"):
        JudgingSettings(**bad)  # type: ignore[arg-type]


def test_judges_that_drop_every_answer_between_them_end_the_run(tmp_path: Path) -> None:
    path = tmp_path / "halves.py"
    path.write_text(
        "def left(prompts, completions):\n    return [1.0, None]\ndef right(prompts, completions):\n    return [None, 1.0]\n"
    )
    judging = JudgingSettings(timeout=None, retries=0, on_failure="drop")
    both = WeightedSum([FunctionScorer(f"{path}:{name}", judging=judging) for name in ("left", "right")], [1.0, 1.0])

    def sampler(prompts: Any, draws: Any, settings: Any) -> list[Sampled]:
        return [
            Sampled(ids=torch.tensor([2]), logp=torch.zeros(1), plain_logp=torch.zeros(1), stop=Stop.EOS)
            for _ in prompts
        ]

    prompts = [PromptTokens(ids=torch.tensor([1]), text=text, columns={}) for text in ("a", "b")]
    settings = SamplingSettings(max_new_tokens=1)
    with pytest.raises(ScorerError, match="left no answer that has a score of every judge"):
        collect(sampler, both, lambda _: "", prompts, settings, answers_per_prompt=1, seed=0, stream="rollout", step=1)
