"""The mistakes of ``docs/BAD_INPUT.md``: what is done wrong, and how; what the program says of it is for the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cli.world import EVALUATE, GOOD, PPO, REWARD, SFT, UNJUDGED, judged


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistake:
    """One row of the table."""

    group: str
    """heading that it stands under."""
    what: str
    """what is wrong, in words."""
    arguments: tuple[str, ...] = ()
    """the command line, without ``bridle``."""
    python: str = ""
    """or a statement, where it is made in Python."""
    before: Callable[[Path], object] | None = None
    """what is done to the working directory first."""
    notes: tuple[str, ...] = ()
    """files that may change: where a run keeps what happened to it."""
    until: str = ""
    """the message is shown up to here: behind it, another library speaks."""


def data_mistakes() -> Iterator[Mistake]:
    """Files of records: unreadable, of another kind, with wrong columns or values, too long or too few."""
    group = "Data"
    sft: dict[str, tuple[str, str | bytes | None, str]] = {
        "no such file": ("missing.jsonl", None, ""),
        "a folder": ("folder", None, ""),
        "another kind of file": ("data.txt", None, ""),
        "a name too long": ("x" * 300 + ".jsonl", None, ""),
        "a torn line": ("torn.jsonl", None, ""),
        "Latin-1": ("latin.jsonl", None, ""),
        "UTF-16": ("w.csv", "prompt,answer\na,b\n".encode("utf-16"), ""),
        "NUL bytes": ("w.jsonl", b"\0" * 64, ""),
        "nothing": ("empty.jsonl", None, ""),
        "no object": ("array.jsonl", None, ""),
        "a key twice": ("w.jsonl", '{"prompt": "a", "prompt": "b", "answer": "c"}', ""),
        "100,000 brackets": ("w.jsonl", "[" * 100_000, ""),
        "a number of 5,000 digits": ("w.jsonl", '{"prompt": "a", "answer": ' + "9" * 5000 + "}", "too long:"),
        "half a surrogate pair": ("w.jsonl", '{"prompt": "\\ud800", "answer": "c"}', ""),
        "an object in a .json": ("object.json", None, ""),
        "a field too many": ("ragged.csv", None, ""),
        "a column twice": ("w.csv", "prompt,prompt,answer\na,b,c\n", ""),
        "an open quote": ("w.csv", 'prompt,answer\n"a,b\n', "not CSV:"),
        "no Parquet": ("fake.parquet", None, "not Parquet:"),
        "no gzip": ("w.jsonl.gz", b"plain", "cannot be read:"),
        "no such column": ("no-column.jsonl", None, ""),
        "a number for a prompt": ("number.jsonl", None, ""),
        "null for an answer": ("null.jsonl", None, ""),
        "a turn without content": ("no-turn.jsonl", None, ""),
        "a chat without turns": ("no-turns.jsonl", None, ""),
        "one record": ("one.jsonl", None, ""),
        "a prompt too long": ("long-prompt.jsonl", None, ""),
        "chats without a template": ("chat.jsonl", None, ""),
        "a chat that nobody answers": (
            "w.jsonl",
            '{"messages": [{"role": "user", "content": "a"}]}',
            "",
        ),
        "a chat that the assistant begins": ("assistant-first.jsonl", None, ""),
    }
    for what, (name, content, until) in sft.items():
        yield Mistake(
            group=group,
            what=what,
            arguments=(*SFT, "--data.path", name),
            before=None if content is None else _writing(name, content),
            until=until,
        )
    yield Mistake(
        group=group,
        what="only records that are too long",
        arguments=(*SFT, "--data.path", "long-answer.jsonl", "--data.long", "drop"),
    )
    yield Mistake(
        group=group,
        what="an answer too long to cut its prompt",
        arguments=(*SFT, "--data.path", "long-answer.jsonl", "--data.long", "truncate_left"),
    )
    yield Mistake(
        group=group, what="no dataset of the hub", arguments=(*SFT, "--data.path", "nobody/nothing"), until="had:"
    )
    for what, name, options in (
        ("too few prompts to hold some out", "one", ()),
        ("a margin in words", "margin", ()),
        ("a dialogue that nobody answers", "asked", ()),
        ("no dialogue and no prompt", "undivided", ()),
        ("an ended too few", "ended", ()),
        ("a pair among rankings", "pair", ("--kind", "rankings")),
        ("a ranking among pairs", "ranked", ()),
        ("a ranking of one", "one-answer", ("--kind", "rankings")),
        ("a ranking in one text", "answer-text", ("--kind", "rankings")),
    ):
        yield Mistake(group=group, what=what, arguments=(*REWARD, "--data.path", f"{name}.jsonl", *options))
    yield Mistake(
        group=group,
        what="pairs that answer different prompts",
        arguments=(*REWARD, "--data.path", "strangers.jsonl"),
    )
    for what, arguments in {
        "fewer prompts than held out": (*PPO, "--prompts.path", "one.jsonl"),
        "the same prompt everywhere": (*PPO, "--prompts.path", "same.jsonl"),
        "answers that fill the context": (*PPO, "--sampling.max-new-tokens", "64"),
        "a chat that only the assistant speaks in": (*PPO, "--prompts.path", "assistant-first.jsonl"),
        "an empty prompt without bos": (*PPO, "--prompts.path", "blank-prompt.jsonl", "--model.tokenizer", "no-bos"),
    }.items():
        yield Mistake(group=group, what=what, arguments=arguments)


def _writing(name: str, content: str | bytes) -> Callable[[Path], object]:
    raw = content.encode() if isinstance(content, str) else content
    return lambda world: (world / name).write_bytes(raw)


def model_mistakes() -> Iterator[Mistake]:
    """Model and tokenizer folders, and chat templates."""
    group = "Models"
    for what, name, until in (
        ("no such folder", "./nothing", ""),
        ("a file", "good.jsonl", ""),
        ("a name too long", "x" * 300, ""),
        ("no model of the hub", "nothing-on-the-hub", "for it:"),
        ("no tokenizer", "no-tokenizer", ""),
        ("no config.json", "no-config", ""),
        ("no weights", "no-weights", ""),
        ("pickled weights", "pickled", ""),
        ("weights cut short", "cut", "file ("),
        ("config.json that is no JSON", "bad-config", "not JSON:"),
        ("config.json that is a list", "list-config", ""),
        ("tokenizer.json of nothing", "bad-tokenizer", "opened:"),
        ("a family that is unknown", "kind", "opened:"),
        ("code to be run", "code", "opened:"),
        ("a shape that does not fit", "shape", ""),
        ("a layer too many", "layers", ""),
        ("a million layers", "million", ""),
        ("a vocabulary of 0", "speechless", ""),
        ("NaN for a weight", "not-a-number", ""),
        ("a shard that is missing", "shardless", ""),
        ("a shard outside the folder", "escaping", ""),
        ("an index of nothing", "no-index", ""),
        ("no token that ends an answer", "no-eos", ""),
        ("an end token in words", "worded-eos", ""),
        ("a reward model for a policy", "scores", ""),
        ("a model that looks ahead", "encoder", ""),
    ):
        yield Mistake(group=group, what=what, arguments=(*SFT, "--model.path", name), until=until)
    for what, name, until in (
        ("an adapter of another kind", "dora", ""),
        ("an adapter of no rank", "rankless", ""),
        ("an adapter of another rank than it says", "other-rank", ""),
        ("an adapter without a base", "baseless", ""),
        ("an adapter on nothing", "on-nothing", ""),
        ("an adapter on an adapter", "on-adapter", ""),
        ("an adapter of layers that are not there", "foreign", ""),
        ("an adapter of narrower layers", "narrow-adapter", ""),
        ("an infinite adapter", "infinite", ""),
        ("an adapter of whole numbers", "whole-numbers", ""),
        ("an adapter that is a model too", "both", ""),
        ("a pickled adapter", "pickled-adapter", ""),
        ("an adapter's torn description", "torn-adapter", "not JSON:"),
        ("a reward model's adapter for a policy", "scoring", ""),
    ):
        yield Mistake(group=group, what=what, arguments=(*SFT, "--model.path", name), until=until)
    for what, arguments in {
        "adapters on layers that are not there": (*SFT, "--lora.rank", "2", "--lora.targets", "q_prj"),
        "adapters of a rank beyond the layers": (*SFT, "--lora.rank", "64"),
        "an adapter that learns on at another rank": (*SFT, "--lora.rank", "3", "--model.path", "adapter"),
        "an adapter that learns on with another α": (
            *(*SFT, "--lora.rank", "2", "--lora.alpha", "3", "--model.path", "adapter"),
        ),
        "an adapter that learns on elsewhere": (
            *(*SFT, "--lora.rank", "2", "--lora.targets", "k_proj", "--model.path", "adapter"),
        ),
        "an adapter with new tokens": (
            *(*SFT, "--lora.rank", "2", "--model.pad-token", "<a>", "--model.eos-token", "<b>"),
        ),
        "a policy's adapter for a judge": (*UNJUDGED, "--reward.model", "adapter"),
        "a tokenizer that knows more than the model": (*SFT, "--model.tokenizer", "more-tokens"),
        "a pad token that also ends": (*REWARD, "--model.path", "pad-eos"),
        "no pad token": (*REWARD, "--model.path", "no-pad"),
        "a classifier of two": (*REWARD, "--model.path", "two-labels"),
        "a reward model that lacks a layer": (*REWARD, "--model.path", "layers", "--evaluation.share", "0.3"),
        "a policy for a judge": (*UNJUDGED, "--reward.model", "model"),
        "a critic with other words": (*PPO, "--critic.source", "reward", "--critic.reward-model", "other-scores"),
        "a judge with a short memory": (*UNJUDGED, "--reward.model", "short-scores"),
        "a reference of another shape": (*EVALUATE, "--reference", "narrow"),
    }.items():
        yield Mistake(group=group, what=what, arguments=arguments)
    for what, name, until in (
        ("no such template", "nowhere", "cannot be read:"),
        ("a torn template", "torn", "line 1:"),
        ("a template that refuses", "refusing", ""),
        ("a template that fails", "failing", "TypeError:"),
        ("a template that counts to 10⁹", "counting", "OverflowError:"),
        ("a template that loops in a loop", "looping", ""),
        ("a template that writes 10⁹ letters", "growing", ""),
        ("a template that reaches for Python", "breaking-out", "messages:"),
        ("a template without an end", "endless", ""),
        ("a template that rewrites", "rewriting", ""),
        ("a template that marks nothing", "marking-nothing", ""),
    ):
        options = ("--data.path", "chat.jsonl", "--model.chat-template", f"{name}.jinja")
        yield Mistake(group="Chat templates", what=what, arguments=(*SFT, *options), until=until)


def judge_mistakes() -> Iterator[Mistake]:
    """Functions that judge."""
    for what, name in {
        "it raises": "raises",
        "its coroutine raises": "raises_late",
        "it leaves the program": "leaves",
        "NaN": "nan",
        "10³⁰⁸": "huge",
        "a score too few": "short",
        "a word": "text",
        "None": "none",
        "a matrix": "matrix",
        "a column that the data lack": "needs",
        "prompts alone": "alone",
        "no signature": "unsigned",
        "no function": "value",
        "no such function": "absent",
        "no such file": "nowhere.py:good",
        "no such module": "nowhere:good",
        "a module that is no Python": "torn_module.py:good",
        "no name of a function": ":",
    }.items():
        yield Mistake(group="Judges", what=what, arguments=judged(name))
    hanging = (*judged("hangs"), "--reward.judging.timeout", "0.2")
    yield Mistake(group="Judges", what="it hangs", arguments=hanging)


def write_data(world: Path) -> None:
    """Add the files that only the table reads."""
    asked = [{"role": "user", "content": "a"}]
    rows: dict[str, list[dict[str, object]]] = {
        "asked": [{"chosen": asked, "rejected": asked}],
        "undivided": [{"chosen": "a", "rejected": "b"}],
        "ended": [{**GOOD, "ended": [True]}],
        "pair": [{"prompt": "a", "chosen": "b", "rejected": "c"}],
        "ranked": [{"prompt": "a", "answers": ["b", "c"]}],
        "strangers": [{"chosen": "x\n\nAssistant: a", "rejected": "y\n\nAssistant: b"}],
        "same": [GOOD] * 12,
        "blank-prompt": [{**GOOD, "prompt": ""}] * 12,
    }
    for name, records in rows.items():
        (world / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (world / "breaking-out.jinja").write_text("{{ ''.__class__.__mro__ }}")
    (world / "counting.jinja").write_text("{% for i in range(10**9) %}x{% endfor %}")
    (world / "rewriting.jinja").write_text(
        "{{ messages | length }}{% for m in messages %}{{ m.content }}</s>{% endfor %}"
    )
    (world / "marking-nothing.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    )


__all__ = ["Mistake", "data_mistakes", "judge_mistakes", "model_mistakes", "write_data"]
