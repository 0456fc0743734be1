from __future__ import annotations

import dataclasses
import datetime
import gzip
import json
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2TokenizerFast

from bridle.errors import ConfigError, DataError
from bridle.language.chat import Message
from bridle.language.data import (
    DataSettings,
    Demonstration,
    Dialogue,
    Encoded,
    Encoder,
    Prompt,
    Ranking,
    collate,
    encode_demonstrations,
    encode_prompts,
    read_demonstrations,
    read_preferences,
    read_prompts,
    read_rankings,
    read_rows,
)
from bridle.language.data.readers import _hub_dataset, _hub_rows, hub_digest

from .test_chat import ASKED, TALK, chat_tokenizer, stop
from .tiny import byte_tokenizer

ROWS: list[dict[str, object]] = [
    {"prompt": "Two and two?", "answer": "Four, “of course”.", "level": 1},
    {"prompt": "", "answer": "line\nbreak, and a comma", "level": 2},
]


def write(path: Path, rows: list[dict[str, object]]) -> str:
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return str(path)
    if kind == "jsonl":
        text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    elif kind == "json":
        text = json.dumps(rows, indent=1)
    else:
        quoted = [[f'"{value}"' for value in row.values()] for row in rows]
        text = "\n".join([",".join(rows[0]), *(",".join(line) for line in quoted)]) + "\n"
    data = text.encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


def settings(path: Path | str, **changes: object) -> DataSettings:
    return DataSettings(path=str(path), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv", "a.jsonl.gz", "a.json.gz", "a.csv.gz"])
def test_every_kind_of_file_gives_the_same_records(tmp_path: Path, name: str) -> None:
    source = settings(write(tmp_path / name, ROWS))
    records = read_demonstrations(source).items
    assert [(r.prompt, r.answer) for r in records if isinstance(r, Demonstration)] == [
        (row["prompt"], row["answer"]) for row in ROWS
    ]
    prompts = read_prompts(source).items
    assert [str(prompt.columns["level"]) for prompt in prompts] == ["1", "2"]
    assert len(read_rows(settings(tmp_path / name, limit=1))) == 1


def test_a_hub_dataset_goes_through_the_datasets_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    write(tmp_path / "set/train.jsonl", ROWS)
    write(tmp_path / "set/test.jsonl", ROWS[:1])
    rows = list(_hub_rows(str(tmp_path / "set"), None, "train"))
    assert [dict(row.values) for row in rows] == ROWS
    assert len(list(_hub_rows(str(tmp_path / "set"), None, "test"))) == 1
    with pytest.raises(DataError, match="neither a file nor a dataset") as error:
        list(_hub_rows(str(tmp_path / "set"), None, "nonsense"))
    assert "\n" not in str(error.value)


GOOD = b'{"prompt": "a", "answer": "b"}\n'


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", GOOD + b'\n{"prompt": "a", \n', r"a\.jsonl line 3 is not JSON: .* at column"),
        ("a.jsonl", GOOD + b'["a"]\n', r"a\.jsonl line 2 is a list, expected an object"),
        ("a.jsonl", GOOD + b'{"prompt": "\xff"}\n', r"a\.jsonl line 2 is not UTF-8 \(byte 13\)"),
        ("a.jsonl", b"", "holds no records"),
        ("a.jsonl", b"\n \n", "holds no records"),
        ("a.jsonl", b"[" * 100_000, "line 1 is nested too deeply"),
        ("a.jsonl", GOOD[:-2] + b', "b": ' + b"[" * 100 + b"]" * 100 + b"}", "at most 100 lists and objects"),
        ("a.json", b"[]", "holds no records"),
        ("a.json", b'[{"prompt": "a"},\n {"prompt" 3}]', "line 2 is not JSON: Expecting ':' delimiter at column 12"),
        ("a.json", GOOD, r"is an object, expected a list of objects; is it \.jsonl\?"),
        ("a.json", b'[{"prompt": "a", "answer": "b"}, 3]', "item 2 is a number, expected an object"),
        ("a.csv", b"prompt,answer\na,b\nc\n", "line 3 has 1 fields, the header 2"),
        ("a.csv", b'prompt,answer\n"a,b\n', r"a\.csv line 2 is not CSV"),
        ("a.csv", b"prompt,answer\na,\xe9\n", "line 2 is not UTF-8"),
        ("a.csv", b"", "holds no records"),
        ("a.csv", b"prompt,answer\n", "holds no records"),
        ("a.parquet", b"PAR1 not really", "is not Parquet"),
        ("a.parquet", b"", "is not Parquet"),
        ("a.jsonl.gz", GOOD, "cannot be read: Not a gzipped file"),
        ("a.jsonl.gz", gzip.compress(GOOD * 99, mtime=0)[:-12], "cannot be read: "),
        ("a.txt", b"once", r"unknown kind of file; known are \.jsonl"),
        ("a.jsonl", b'{"prompt": "a"}\n', r"line 1 has no column 'answer' \(it has: prompt\); .*--data"),
        ("a.jsonl", GOOD + b'{"prompt": "a", "answer": 3}\n', "line 2: 'answer' is a number, expected text"),
        ("a.jsonl", GOOD + b'{"prompt": "a", "answer": null}\n', "line 2: 'answer' is missing, expected text"),
        ("a.jsonl", b'{"prompt": 3, "answer": "b"}\n', "line 1: 'prompt' is a number, expected .*messages"),
        ("a.jsonl", b'{"prompt": [], "answer": "b"}\n', "line 1: 'prompt' is an empty list, expected .*messages"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', "line 1: turn 1 of 'messages' is no message"),
        ("a.jsonl", b'{"messages": "hello"}\n', "line 1: 'messages' is text, expected a list of messages"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_line(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match) as error:
        read_demonstrations(settings(tmp_path / name))
    assert "\n" not in str(error.value)


def test_lists_within_lists_are_read_as_far_as_anybody_could_go_through_them(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(GOOD[:-2] + b', "b": ' + b"[" * 99 + b"]" * 99 + b"}")
    assert len(read_demonstrations(settings(tmp_path / "a.jsonl")).items) == 1


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.jsonl: no such file"):
        read_rows(settings(tmp_path / "b.jsonl"))
    with pytest.raises(DataError, match="no such file"):
        read_rows(settings(tmp_path / "train"))
    with pytest.raises(DataError, match="is a folder; name a file"):
        read_rows(settings(tmp_path))
    write(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError, match=r"is a folder; name one of its files \(train\.jsonl\)"):
        read_rows(settings(tmp_path))
    with pytest.raises(ConfigError, match="limit=0"):
        settings("a.jsonl", limit=0)


def chat(*turns: Message) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.content} for turn in turns]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chats_as_demonstrations_and_as_prompts(tmp_path: Path, name: str) -> None:
    path = settings(write(tmp_path / name, [{"messages": chat(*TALK), "topic": "greeting"}]))
    (dialogue,) = read_demonstrations(path).items
    assert isinstance(dialogue, Dialogue)
    assert dialogue.messages == TALK
    (prompt,) = read_prompts(path).items
    assert prompt.prompt == TALK[:-1]
    assert prompt.columns == {"topic": "greeting"}
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": chat(TALK[2])}))
    with pytest.raises(DataError, match="nothing is said before"):
        read_prompts(settings(tmp_path / "b.jsonl"))


def test_preferences_in_their_three_forms(tmp_path: Path) -> None:
    good, bad = Message(role="assistant", content="Hello!"), Message(role="assistant", content="Go away.")
    text = "\n\nHuman: Hello?\n\nAssistant: Yes?\n\nHuman: Well?\n\nAssistant:"
    rows: list[dict[str, object]]
    for rows, expected in (
        ([{"prompt": "Hello?", "chosen": "Hi!", "rejected": "Go."}], ("Hello?", "Hi!", "Go.")),
        ([{"prompt": chat(*ASKED), "chosen": chat(good), "rejected": "Go."}], (ASKED, "Hello!", "Go.")),
        ([{"chosen": chat(*ASKED, good), "rejected": chat(*ASKED, bad)}], (ASKED, "Hello!", "Go away.")),
        ([{"chosen": text + " Fine.", "rejected": text + " What?"}], (text, " Fine.", " What?")),
    ):
        (found,) = read_preferences(settings(write(tmp_path / "a.jsonl", rows))).items
        assert (found.prompt, found.chosen, found.rejected) == expected
        assert found.place.endswith("a.jsonl line 1")


def test_pairs_with_different_prompts_are_left_out_and_counted(tmp_path: Path) -> None:
    def pair(first: str, second: str) -> dict[str, object]:
        return {
            key: f"\n\nHuman: {asked}\n\nAssistant: Yes." for key, asked in (("chosen", first), ("rejected", second))
        }

    path = write(tmp_path / "a.jsonl", [pair("a", "a"), pair("a", "b"), pair("c", "c")])
    records = read_preferences(settings(path))
    assert len(records.items) == 2
    assert records.notes == (f"{path}: 1 of 3 pairs left out because their prompts differ",)
    with pytest.raises(DataError, match="no usable records: 1 pairs left out"):
        read_preferences(settings(write(tmp_path / "a.jsonl", [pair("a", "b")])))
    with pytest.raises(DataError, match=r"line 1: 'chosen' is no dialogue .*--data\.prompt"):
        read_preferences(settings(write(tmp_path / "a.jsonl", [{"chosen": "good", "rejected": "bad"}])))
    with pytest.raises(DataError, match="does not end with an answer of the assistant"):
        read_preferences(settings(write(tmp_path / "a.jsonl", [{"chosen": chat(*ASKED), "rejected": chat(*ASKED)}])))


def test_human_preferences(shared_data: Path) -> None:
    records = read_preferences(settings(shared_data / "hh-rlhf/harmless-base/test.jsonl.gz"))
    assert len(records.items) == 2307
    assert "5 of 2312 pairs" in records.notes[0]
    longer = sum(len(pair.chosen) > len(pair.rejected) for pair in records.items)
    shorter = sum(len(pair.chosen) < len(pair.rejected) for pair in records.items)
    assert shorter / (shorter + longer) == pytest.approx(0.553, abs=0.005)
    assert all(pair.prompt.endswith("\n\nAssistant:") for pair in records.items if isinstance(pair.prompt, str))


def test_rankings(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "x", "answers": ["a", "b", "c"]}])
    assert read_rankings(settings(path)).items == (
        Ranking(prompt="x", answers=("a", "b", "c"), place=f"{path} line 1"),
    )
    for answers, match in (
        (["a"], "holds 1 answers"),
        (["a", 3], "expected a list of texts"),
        ("ab", "is text, expected"),
    ):
        with pytest.raises(DataError, match=match):
            read_rankings(settings(write(tmp_path / "a.jsonl", [{"prompt": "x", "answers": answers}])))


def test_pairs_and_rankings_taken_for_each_other_say_which_kind_to_ask_for(tmp_path: Path) -> None:
    ranked = write(tmp_path / "ranked.jsonl", [{"prompt": "x", "answers": ["a", "b"]}])
    with pytest.raises(DataError, match=r"ranked.jsonl line 1 holds ranked answers, .*--kind rankings$"):
        read_preferences(settings(ranked))
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    with pytest.raises(DataError, match=r"pairs.jsonl line 1 holds a pair, .*--kind pairs$"):
        read_rankings(settings(pairs))


def learnt(encoded: Encoded) -> list[int]:
    return encoded.ids[encoded.learnt].tolist()


def test_the_answer_is_learnt_with_its_stop_token_and_the_prompt_is_not() -> None:
    tokenizer = byte_tokenizer()
    encoder = Encoder.of(tokenizer, (2,))
    assert encoder.opening == ()
    encoded = encoder.answer("Hi.", " Ho")
    assert encoded.ids.tolist() == [*tokenizer.encode("Hi. Ho"), 2]
    assert learnt(encoded) == [*tokenizer.encode(" Ho"), 2]
    assert encoded.prompt_length == 3
    empty = encoder.answer("", "Ho")
    assert empty.ids.tolist() == [1, *tokenizer.encode("Ho"), 2]
    assert not empty.learnt[0]
    tokenizer.bos_token = None
    with pytest.raises(DataError, match="prompt is empty and the tokenizer has no bos"):
        Encoder.of(tokenizer, (2,)).prompt("")


def test_dialogues_and_answers_to_dialogues() -> None:
    tokenizer = chat_tokenizer()
    encoder = Encoder.of(tokenizer, stop(tokenizer))
    whole = encoder.demonstration(Dialogue(messages=TALK))
    assert tokenizer.decode(learnt(whole)) == "Hello!<|im_end|>\nVery well.<|im_end|>"
    assert whole.ids[-1] == tokenizer.eos_token_id
    last = encoder.answer(TALK[:4], "\nVery well.")
    assert torch.equal(last.ids, whole.ids)
    assert tokenizer.decode(learnt(last)) == "\nVery well.<|im_end|>"
    assert encoder.prompt(TALK[:4]) == last.ids[: last.prompt_length].tolist()


@pytest.fixture(scope="module")
def real_encoders(request: pytest.FixtureRequest) -> list[Encoder]:
    data: Path = request.getfixturevalue("shared_data")
    stories = AutoTokenizer.from_pretrained(data / "models/stories260K")
    files = data / "tokenizers/gpt2"
    gpt2 = GPT2TokenizerFast(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    return [Encoder.of(stories, (1,)), Encoder.of(gpt2, (50256,))]


@given(
    prompt=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.just("\n"), min_size=1, max_size=12),
    answer=st.text(st.characters(codec="ascii", exclude_categories=["Cc"]) | st.just("\n"), min_size=1, max_size=12),
)
def test_real_tokenizers_keep_the_samplers_prompt_and_lose_no_character(
    real_encoders: list[Encoder], prompt: str, answer: str
) -> None:
    for encoder in real_encoders:
        encoded = encoder.answer(prompt, answer)
        start = encoder.prompt(prompt)
        assert encoded.ids[: len(start)].tolist() == start
        assert encoded.prompt_length == len(start)
        assert encoded.ids[-1] == encoder.stops[0]
        text = encoder.tokenizer.decode(encoded.ids, skip_special_tokens=True)
        assert text.removeprefix(" ") == (prompt + answer).removeprefix(" ")


def test_stories_begin_with_bos_and_end_with_it(real_encoders: list[Encoder]) -> None:
    stories = real_encoders[0]
    assert stories.opening == (1,)
    encoded = stories.answer("Once upon a time", " there was a dog.")
    assert encoded.ids[0] == encoded.ids[-1] == 1
    assert encoded.learnt.tolist() == [False] * 5 + [True] * 7
    assert stories.answer("", "Once upon").ids.tolist()[:2] == [1, 403]


def test_long_records_are_refused_left_out_or_cut_and_counted(real_encoders: list[Encoder]) -> None:
    stories = real_encoders[0]
    records = [
        Demonstration(prompt="a b c d e f g h", answer=" i", place="F line 1"),
        Demonstration(prompt="a", answer=" b", place="F line 2"),
    ]
    length = len(stories.demonstration(records[0]))
    context = length - 3
    with pytest.raises(DataError, match=rf"^F line 1: {length} tokens where {context} fit; .*--data\.long drop"):
        encode_demonstrations(records, stories, context=context, long="refuse")
    kept, notes = encode_demonstrations(records, stories, context=context, long="drop")
    assert [item.place for item in kept] == ["F line 2"]
    assert notes == (f"1 of 2 demonstrations left out: longer than {context} tokens",)
    kept, notes = encode_demonstrations(records, stories, context=context, long="truncate_left")
    whole = stories.demonstration(records[0]).ids.tolist()
    assert kept[0].ids.tolist() == [1, *whole[4:]]
    assert learnt(kept[0]) == learnt(stories.demonstration(records[0]))
    assert notes == (f"1 of 2 demonstrations cut from the left: longer than {context} tokens",)
    with pytest.raises(DataError, match="all 2 demonstrations are longer than the 2 tokens"):
        encode_demonstrations(records, stories, context=2, long="drop")
    with pytest.raises(DataError, match="the answer alone leaves no room"):
        encode_demonstrations(records[:1], stories, context=4, long="truncate_left")
    assert encode_demonstrations(records, stories, context=None, long="refuse")[1] == ()


def test_prompts_leave_room_for_the_answer(real_encoders: list[Encoder]) -> None:
    stories = real_encoders[0]
    prompts = [Prompt(prompt="a b c d e f g h", place="F line 1"), Prompt(prompt="a", place="F line 2")]
    length = len(stories.prompt("a b c d e f g h"))
    assert encode_prompts(prompts, stories, context=length + 8, answer_tokens=8, long="refuse")[1] == ()
    with pytest.raises(DataError, match=f"F line 1: {length} tokens where {length - 1} fit"):
        encode_prompts(prompts, stories, context=length + 8, answer_tokens=9, long="refuse")
    kept, notes = encode_prompts(prompts, stories, context=length + 8, answer_tokens=9, long="truncate_left")
    assert kept[0].ids.tolist() == [1, *stories.prompt("a b c d e f g h")[2:]]
    assert kept[1].prompt is prompts[1]
    assert notes == (f"1 of 2 prompts cut from the left: longer than {length - 1} tokens",)
    kept, _ = encode_prompts(prompts, stories, context=length + 8, answer_tokens=9, long="drop")
    assert [item.prompt.place for item in kept] == ["F line 2"]
    with pytest.raises(DataError, match="leave no room for a prompt in the context of 64"):
        encode_prompts(prompts, stories, context=64, answer_tokens=64, long="drop")


def test_a_chat_is_never_cut() -> None:
    tokenizer = chat_tokenizer()
    with pytest.raises(DataError, match="a chat cannot be cut"):
        encode_demonstrations(
            [Dialogue(messages=TALK)], Encoder.of(tokenizer, stop(tokenizer)), context=20, long="truncate_left"
        )
    encoder = Encoder.of(tokenizer, stop(tokenizer))
    with pytest.raises(DataError, match=r"use --mix\.long drop$"):
        encode_demonstrations([Dialogue(messages=TALK)], encoder, context=20, long="refuse", option="--mix.long")
    with pytest.raises(DataError, match=r"use --prompts\.long drop$"):
        encode_prompts([Prompt(prompt=TALK[:1])], encoder, context=20, answer_tokens=10, long="refuse")


def test_errors_about_a_text_name_its_record() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = None
    encoder = Encoder.of(tokenizer, (2,))
    with pytest.raises(DataError, match=r"^F line 7: the prompt is empty"):
        encode_prompts([Prompt(prompt="", place="F line 7")], encoder, context=None, answer_tokens=1, long="refuse")


def test_collate_pairs_each_target_with_the_position_before_it() -> None:
    encoder = Encoder.of(byte_tokenizer(), (2,))
    items = [encoder.answer("abc", "de"), encoder.answer("f", "ghijk")]
    batch = collate(items, padding=0)
    assert batch.input_ids.shape == (2, 7)
    expected = [
        (row, column, int(item.ids[column + 1]))
        for row, item in enumerate(items)
        for column in range(len(item) - 1)
        if item.learnt[column + 1]
    ]
    assert list(zip(batch.rows.tolist(), batch.columns.tolist(), batch.targets.tolist(), strict=True)) == expected
    assert batch.input_ids[0].tolist() == [*items[0].ids.tolist(), 0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("half.jsonl", '{"prompt": "\\ud800", "answer": "b"}', "line 1: 'prompt' holds half of a surrogate pair"),
        ("half.jsonl", '{"prompt": "a", "answer": "x\\udfff"}', "line 1: 'answer' holds half of a surrogate pair"),
        ("twice.jsonl", '{"prompt": "a", "prompt": "b", "answer": "c"}', "line 1 has the key 'prompt' twice"),
        ("digits.jsonl", '{"prompt": "a", "answer": ' + "9" * 5000 + "}", "line 1 holds a number that is too long"),
        ("twice.csv", "prompt,answer,prompt\na,b,c\n", "the header names 'prompt' twice"),
    ],
)
def test_what_json_lets_pass_and_no_text_can_be(tmp_path: Path, name: str, content: str, words: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError) as refused:
        read_demonstrations(DataSettings(path=str(tmp_path / name)))
    assert words in str(refused.value)


def test_a_whole_character_beyond_the_first_plane_is_read(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"prompt": "\\ud83d\\ude00", "answer": "é"}')
    (record,) = read_demonstrations(DataSettings(path=str(tmp_path / "d.jsonl"))).items
    assert record == Demonstration(prompt="😀", answer="é", place=f"{tmp_path / 'd.jsonl'} line 1")


def test_a_pipe_is_no_file_of_records(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="is no regular file"):
        read_demonstrations(DataSettings(path=str(tmp_path / "pipe.jsonl")))
    with pytest.raises(DataError, match=r"\.\.\. cannot be reached: File name too long"):
        read_demonstrations(DataSettings(path="x" * 300 + ".jsonl"))


def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]]) -> DataSettings:
    """A dataset of the hub, as the library gives it: here made of rows in memory."""
    import datasets

    asked: list[object] = []

    def load(name: str, subset: str | None, *, split: str) -> datasets.Dataset:
        asked.append((name, subset, split))
        if name != "owner/name":
            raise ValueError("no such dataset")
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    _hub_dataset.cache_clear()
    return DataSettings(path="owner/name", subset="small", split="test")


def test_a_hub_dataset_is_known_by_the_rows_that_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, object]] = [
        {"prompt": "é", "image": b"\x00\xff", "day": datetime.date(2026, 1, 2), "turns": [{"role": "user"}], "n": None},
        {"prompt": "b", "image": b"", "day": None, "turns": [], "n": 0.1},
    ]
    was = hub_digest(hub(tmp_path, monkeypatch, rows))
    assert was is not None
    assert hub_digest(hub(tmp_path, monkeypatch, [dict(reversed(row.items())) for row in rows])) == was
    for changed in (
        [rows[0]],
        [rows[1], rows[0]],
        [rows[0] | {"image": b"\x00\xfe"}, rows[1]],
        [rows[0], rows[1] | {"n": 0.2}],
        [{**row, "more": 1} for row in rows],
    ):
        assert hub_digest(hub(tmp_path, monkeypatch, changed)) != was
    first = hub(tmp_path, monkeypatch, rows)
    one = hub_digest(dataclasses.replace(first, limit=1))
    assert one == hub_digest(dataclasses.replace(hub(tmp_path, monkeypatch, rows[:1]), limit=7))


def test_what_is_read_of_a_hub_dataset_is_what_was_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = hub(tmp_path, monkeypatch, [{"prompt": "a"}])
    hub_digest(settings)
    monkeypatch.setattr("datasets.load_dataset", None)  # the hub has moved on, or is gone
    assert [row.values["prompt"] for row in read_rows(settings)] == ["a"]


def test_a_file_is_no_hub_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    assert hub_digest(settings(tmp_path / "a.jsonl")) is None
    assert hub_digest(settings(tmp_path / "gone.jsonl")) is None
    with pytest.raises(DataError, match="nobody/nothing is neither a file nor a dataset that can be had"):
        hub_digest(dataclasses.replace(hub(tmp_path, monkeypatch, []), path="nobody/nothing"))
