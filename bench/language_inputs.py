"""Models, tokenizers and texts for the language measurements: local folders that every side reads alike."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from bridle.random import torch_rng

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
STORIES260K = DATA / "models" / "stories260K"
PROMPT_TOKENS = 32


def words_of(text: str) -> list[str]:
    """Words and single marks, as the tokenizer of the random models cuts them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def stories() -> list[str]:
    """The real stories; where the data are not there, made-up ones, which serve to see that everything works."""
    file = DATA / "tinystories" / "tinystories_sample.txt"
    if not file.is_file():
        return [" ".join(f"word{(7 * i + j) % 499}" for j in range(120)) for i in range(200)]
    return [story.strip() for story in file.read_text(encoding="utf-8").split("<|endoftext|>")[:-1]]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One id a word: the stories' own words, the most frequent first, and as many fillers as are needed."""
    counts = Counter(itertools.chain.from_iterable(words_of(story) for story in stories()))
    known = [word for word, _ in counts.most_common(max(0, vocabulary - 4))]
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    names = [*special, *known, *(f"filler{i}" for i in range(vocabulary - 4 - len(known)))]
    plain = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    plain.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def random_llama(vocabulary: int = 32_000, width: int = 288, layers: int = 6) -> LlamaConfig:
    """A Llama in the shape of 15M parameters, or of others; input and output embeddings are one matrix."""
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 48,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )


def save_models(place: Path, name: str, config: LlamaConfig | None = None) -> dict[str, str]:
    """Write actor and reward model; ``name`` is 260K for the real model, anything else for a random one."""
    if name == "260K":
        tokenizer = AutoTokenizer.from_pretrained(STORIES260K)
        actor: Any = AutoModelForCausalLM.from_pretrained(STORIES260K)
    else:
        config = config or random_llama()
        tokenizer = word_tokenizer(config.vocab_size)
        with torch_rng(0, "bench-model"):
            actor = LlamaForCausalLM(config)
    config = LlamaConfig.from_dict(actor.config.to_dict())
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id
    with torch_rng(0, "bench-reward"):
        reward = LlamaForSequenceClassification(config)
    reward.model.load_state_dict(actor.model.state_dict())
    folders = {"model": place / name / "actor", "reward_model": place / name / "reward"}
    for part, model in (("model", actor), ("reward_model", reward)):
        model.save_pretrained(folders[part])
        tokenizer.save_pretrained(folders[part])
    return {part: str(folder) for part, folder in folders.items()}


def as_words(tokenizer: Any, name: str, text: str) -> str:
    """The text as the model's tokenizer takes it: as it is, or word by word."""
    return text if name == "260K" else " ".join(words_of(text))


def save_texts(place: Path, name: str, model: str, *, longest: int = 256) -> dict[str, str]:
    """Write prompts of exactly 32 tokens, demonstrations, and preference pairs of at most ``longest`` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [as_words(tokenizer, name, story) for story in stories()]
    prompts: set[str] = set()
    demonstrations = []
    for text in texts:
        start, rest = halves(tokenizer, name, text, longest - 1)
        if rest and len(tokenizer(start).input_ids) == PROMPT_TOKENS:
            prompts.add(start)
            demonstrations.append({"prompt": start, "answer": rest, "completion": rest})
    rows = {
        "prompts": [{"prompt": prompt} for prompt in sorted(prompts)],
        "sft": demonstrations,
        "reward": pairs(tokenizer, name, longest),
    }
    files = {}
    for kind, found in rows.items():
        files[kind] = str(place / name / f"{kind}.jsonl")
        Path(files[kind]).write_text("".join(json.dumps(row) + "\n" for row in found))
    return files


def halves(tokenizer: Any, name: str, text: str, longest: int) -> tuple[str, str]:
    """The first 32 tokens of a text, and what follows them, up to ``longest`` tokens in all."""
    if name != "260K":
        words = text.split()[:longest]
        return " ".join(words[:PROMPT_TOKENS]), " ".join(words[PROMPT_TOKENS:])
    ids = tokenizer(text[:1500]).input_ids[:longest]
    start, rest = (
        tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:])
    )
    return start, rest


def pairs(tokenizer: Any, name: str, longest: int) -> list[dict[str, str]]:
    """Real human preferences that fit, or the stories' halves where the data are not there."""
    file = DATA / "hh-rlhf" / "harmless-base" / "test.jsonl.gz"
    if not file.is_file():
        return [{"prompt": s[:80], "chosen": s[80:200], "rejected": s[200:300]} for s in stories()]
    found = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            cut = len("\n\nAssistant:")
            start = min(row[side].rfind("\n\nAssistant:") + cut for side in ("chosen", "rejected"))
            if row["chosen"][:start] != row["rejected"][:start]:
                continue
            texts = {"prompt": row["chosen"][:start]} | {side: row[side][start:] for side in ("chosen", "rejected")}
            texts = {column: as_words(tokenizer, name, text) for column, text in texts.items()}
            ids = [len(tokenizer(texts["prompt"] + " " + texts[side]).input_ids) for side in ("chosen", "rejected")]
            if (
                max(ids) < longest
                and texts["chosen"].strip() != texts["rejected"].strip()
                and texts["rejected"].strip()
            ):
                found.append(texts)
    return found
