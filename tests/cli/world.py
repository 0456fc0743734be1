"""A working directory for mistakes: a model and spoilt ones, data of every kind, judges, environments, runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from bridle.language.adapter_files import LowRank, write_adapter
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.random import torch_rng
from tests.language.tiny import byte_tokenizer, tiny_config, tiny_model

JUDGES = """
import os, signal, threading
import numpy as np

calls = 0

def good(prompts, completions, **columns):
    return [float(len(text)) for text in completions]

def later(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 4:
        raise RuntimeError("the judge\\nis down")
    return good(prompts, completions)

def stop(prompts, completions, **columns):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return good(prompts, completions)

def raises(prompts, completions): raise ValueError("my\\nown words")
async def raises_late(prompts, completions): raise KeyError("gone")
def leaves(prompts, completions): raise SystemExit(3)
def nan(prompts, completions): return [float("nan")] * len(completions)
def inf(prompts, completions): return [float("inf")] * len(completions)
def short(prompts, completions): return [1.0]
def text(prompts, completions): return ["good"] * len(completions)
def none(prompts, completions): return None
def nones(prompts, completions): return [None] * len(completions)
def single(prompts, completions): return 1.0
def lazy(prompts, completions): return (1.0 for _ in completions)
def matrix(prompts, completions): return np.zeros((len(completions), 2))
def needs(prompts, completions, solution): return [1.0] * len(completions)
def alone(prompts): return [1.0]
def huge(prompts, completions): return [1e308] * len(completions)
def hangs(prompts, completions): threading.Event().wait()
def unsigned(prompts, completions): return [1.0] * len(completions)
unsigned.__signature__ = "none"
async def stream(prompts, completions): yield 1.0
value = 3
"""

WORLDS = """
import gymnasium, numpy as np
from gymnasium import spaces

class Fine(gymnasium.Env):
    observation_space, action_space = spaces.Box(-1, 1, (2,)), spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return np.zeros(2, np.float32), {}
    def step(self, action):
        self.age += 1
        return np.zeros(2, np.float32), self.reward(), self.age == 5, False, {}
    def reward(self): return 0.0

class Boom(Fine):
    def reward(self):
        if self.age == 4: raise RuntimeError("the world\\nended")
        return 0.0
class NoReward(Fine):
    def reward(self): return float("nan")
class Words(Fine): action_space = spaces.Text(3)
class Blind(Fine):
    def step(self, action): return np.full(2, np.nan, np.float32), 0.0, False, False, {}
class Leaves(Fine):
    def step(self, action): raise SystemExit(4)
class Unmade(Fine):
    def __init__(self): raise OSError("no display")

class Unbounded(Fine): action_space = spaces.Box(-np.inf, np.inf, (1,))
class Seen(Fine): observation_space = spaces.Text(3)
class Nothing(Fine):
    observation_space = spaces.Tuple(())
    def reset(self, **_): return (), {}
class Told(Fine):
    # its info holds an action mask: after reset what `mask` says, then what `later` says
    mask, later = [1, 1], [1, 1]
    def reset(self, **arguments):
        shown, info = super().reset(**arguments)
        return shown, info if self.mask is None else {"action_mask": np.array(self.mask)}
    def step(self, action):
        *found, info = super().step(action)
        return (*found, info if self.later is None else {"action_mask": np.array(self.later)})
class NoneAllowed(Told): mask = [0, 0]
class Doubtful(Told): mask = [0.5, 1]
class Narrow(Told): mask = [1]
class Forgotten(Told): later = None
class Late(Told): mask = None
class BoxMask(Told): action_space = spaces.Box(-1, 1, (1,))
class Outside(Fine):
    observation_space = spaces.Discrete(3)
    def reset(self, **arguments):
        super().reset(**arguments)
        return 7, {}
    def step(self, action): return 7, 0.0, False, False, {}
class Raises(Fine):
    def reset(self, **_): raise KeyError("no map")
class Ragged(Fine):
    def reset(self, **arguments): return np.zeros(3, np.float32), {}
class WordyReward(Fine):
    def reward(self): return "good"

def none(observations, actions): return None
def broken(observations, actions): raise ValueError("no such layer")

for kind in (Boom, NoReward, Words, Blind, Leaves, Unmade, Unbounded, Seen, Nothing, NoneAllowed, Doubtful, Narrow, Forgotten,
             Late, BoxMask, Outside, Raises, Ragged, WordyReward):
    gymnasium.register(f"{kind.__name__}-v0", entry_point=kind, disable_env_checker=True)
"""

LONG = "x" * 100
GOOD = {"prompt": "ab", "answer": "cd", "chosen": "e", "rejected": "f", "answers": ["g", "h"]}
TALK = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}
DATA: dict[str, list[Any]] = {
    "long-prompt": [GOOD, {**GOOD, "prompt": LONG}],
    "long-answer": [{**GOOD, "answer": LONG}],
    "no-column": [{"question": "a", "reply": "b"}],
    "number": [GOOD, {"prompt": 3, "answer": "x", "chosen": 1, "rejected": 2}],
    "null": [{"prompt": "a", "answer": None}],
    "chat": [TALK],
    "no-turn": [{"messages": [{"role": "user"}]}],
    "no-turns": [{"messages": []}],
    "one-answer": [{"prompt": "a", "answers": ["b"]}],
    "answer-text": [{"prompt": "a", "answers": "b"}],
    "margin": [{**GOOD, "margin": "lots"}],
    "one": [GOOD],
    "array": [GOOD, [1, 2]],
    "assistant-first": [{"messages": TALK["messages"][1:]}],
}
TEMPLATES = {
    "torn": "{% for m in messages %}{{ m.content ",
    "refusing": "{{ raise_exception('no chat\nplease') }}",
    "failing": "{{ 1 + 'a' }}",
    "endless": "{% for m in messages %}{{ m.role + m.content }}{% endfor %}",
    "looping": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "growing": "{{ 'x' * 10 ** 9 }}",
}


def edit(path: Path, **changes: Any) -> None:
    """Change the keys of a JSON file; None removes one."""
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def spoilt_models(world: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(world / "model", world / name))

    (copy("no-tokenizer") / "tokenizer.json").unlink()
    (copy("no-config") / "config.json").unlink()
    (copy("no-weights") / "model.safetensors").unlink()
    pickled = copy("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    weights = copy("cut") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (copy("bad-config") / "config.json").write_text("{nope")
    (copy("bad-tokenizer") / "tokenizer.json").write_text("{}")
    edit(copy("heads") / "config.json", num_attention_heads=7)
    edit(copy("shape") / "config.json", intermediate_size=40)
    edit(copy("kind") / "config.json", model_type="nosuch")
    edit(copy("layers") / "config.json", num_hidden_layers=3)
    code = copy("code")
    edit(code / "config.json", model_type="own", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    (code / "own.py").write_text("raise SystemExit('foreign code was run')")
    endless = copy("no-eos")
    edit(endless / "tokenizer_config.json", eos_token=None)
    edit(endless / "config.json", eos_token_id=None)
    (endless / "generation_config.json").unlink()
    edit(copy("pad-eos") / "tokenizer_config.json", pad_token="</s>")
    edit(copy("bos-eos") / "tokenizer_config.json", bos_token="</s>")
    edit(copy("no-pad") / "tokenizer_config.json", pad_token=None)
    (copy("list-config") / "config.json").write_text("[]")
    edit(copy("million") / "config.json", num_hidden_layers=10**6)
    edit(copy("speechless") / "config.json", vocab_size=0)
    edit(copy("worded-eos") / "generation_config.json", eos_token_id="</s>")
    spoilt_weights(world)


def spoilt_weights(world: Path) -> None:
    def copy(name: str) -> Path:
        return Path(shutil.copytree(world / "model", world / name))

    def index(name: str, listing: object) -> None:
        folder = copy(name)
        (folder / "model.safetensors").unlink()
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listing}))

    index("shardless", {"a": "model-1.safetensors"})
    index("escaping", {"a": "../model/model.safetensors"})
    index("no-index", [])
    folder = copy("not-a-number")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def other_models(world: Path) -> None:
    """Models that are sound, and serve for something else."""
    model, tokenizer = tiny_model(vocab_size=260), byte_tokenizer()
    more = byte_tokenizer()
    more.add_tokens([f"token{number}" for number in range(80)])
    more.save_pretrained(world / "more-tokens")
    silent = byte_tokenizer()
    silent.bos_token = None
    silent.save_pretrained(world / "no-bos")
    model.config.num_labels = 2
    config = model.config
    with torch_rng(0, "two-labels"):
        save_model(world / "two-labels", AutoModelForSequenceClassification.from_config(config), tokenizer)
    config.num_labels, config.pad_token_id = 1, 0
    for name, words, changes in (
        ("other-scores", byte_tokenizer(pad_token="<none>"), {}),
        ("short-scores", tokenizer, {"max_position_embeddings": 4}),
    ):
        for key, value in changes.items():
            setattr(config, key, value)
        with torch_rng(0, "scores"):
            save_model(world / name, AutoModelForSequenceClassification.from_config(config), words)
    save_model(world / "narrow", tiny_model(vocab_size=260, num_hidden_layers=1), tokenizer)
    with torch_rng(0, "encoder"):
        looking = AutoModelForCausalLM.from_config(tiny_config("bert", vocab_size=260))
    save_model(world / "encoder", looking, tokenizer)


def adapters(world: Path) -> None:
    """An adapter on the model, and spoilt ones."""
    ones = LowRank(a=torch.ones(2, 32), b=torch.zeros(32, 2))

    def adapter(name: str, *, layer: str = "q_proj", pair: LowRank = ones, base: str = "model", **changes: Any) -> Path:
        own = LowRank(a=pair.a.clone(), b=pair.b.clone())
        layers = {f"model.layers.{i}.self_attn.{layer}": (pair, own)[i] for i in range(2)}
        write_adapter(world / name, layers, base=base, revision=None, alpha=4.0, transposed=False, task="CAUSAL_LM")
        edit(world / name / "adapter_config.json", **changes)
        return world / name

    adapter("adapter")
    adapter("dora", use_dora=True)
    adapter("rankless", r=None)
    adapter("other-rank", r=8)
    adapter("baseless", base_model_name_or_path=None)
    adapter("on-nothing", base="./nothing")
    adapter("on-adapter", base="adapter")
    adapter("foreign", layer="c_attn")
    adapter("narrow-adapter", pair=LowRank(a=torch.ones(2, 16), b=torch.zeros(32, 2)))
    adapter("infinite", pair=LowRank(a=torch.full((2, 32), torch.inf), b=torch.zeros(32, 2)))
    adapter("whole-numbers", pair=LowRank(a=torch.ones(2, 32, dtype=torch.int32), b=torch.zeros(32, 2)))
    adapter("both").joinpath("config.json").write_text("{}")
    (adapter("pickled-adapter") / "adapter_model.safetensors").rename(world / "pickled-adapter/adapter_model.bin")
    (adapter("torn-adapter") / "adapter_config.json").write_text("{")
    write_adapter(
        world / "scoring",
        {"model.layers.0.self_attn.q_proj": ones},
        base="model",
        revision=None,
        alpha=4.0,
        transposed=False,
        task="SEQ_CLS",
        head=torch.ones(1, 32),
    )


def make_world(path: Path) -> None:
    """Fill an empty folder."""
    model = tiny_model(vocab_size=260)
    save_model(path / "model", model, byte_tokenizer())
    reward, tokenizer = load_reward_model(ModelSettings(path=str(path / "model")))
    save_model(path / "scores", reward, tokenizer)
    spoilt_models(path)
    other_models(path)
    adapters(path)
    for name, rows in DATA.items():
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, template in TEMPLATES.items():
        (path / f"{name}.jinja").write_text(template)
    (path / "good.jsonl").write_text("".join(json.dumps({**GOOD, "prompt": f"a{i}"}) + "\n" for i in range(12)))
    (path / "torn.jsonl").write_text(json.dumps(GOOD) + '\n{"prompt": "x", "ans\n')
    (path / "latin.jsonl").write_bytes(json.dumps(GOOD).encode() + b'\n{"prompt": "\xe9"}\n')
    (path / "empty.jsonl").write_text("")
    (path / "ragged.csv").write_text("prompt,answer\na,b,c\n")
    (path / "object.json").write_text("{}")
    (path / "fake.parquet").write_text("no parquet")
    (path / "data.txt").write_text("a\n")
    (path / "folder").mkdir()
    (path / "folder" / "inside.jsonl").write_text("{}\n")
    (path / "taken").mkdir()
    (path / "taken" / "mine.txt").write_text("precious")
    (path / "judges.py").write_text(JUDGES)
    (path / "torn_module.py").write_text("def good(:\n")
    (path / "needs_more.py").write_text("import no_such_module_at_all\n")
    (path / "leaves.py").write_text("raise SystemExit(3)\n")
    (path / "bad_input_worlds.py").write_text(WORLDS)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, but compiled Python."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


RUN = ("--run.dir", "r", "--run.threads", "1", "--run.quiet")
SFT = ("sft", *RUN, "--model.path", "model", "--data.path", "good.jsonl", "--batch-size", "4")
REWARD = ("reward", *RUN, "--model.path", "model", "--data.path", "good.jsonl")
SMALL = ("--steps", "2", "--prompts-per-step", "2", "--sampling.max-new-tokens", "3", "--evaluation.held-out", "2")
ONCE = ("--ppo.minibatches", "1", "--ppo.epochs", "1", "--run.checkpoint-every", "1")
UNJUDGED = (
    "ppo",
    *RUN,
    *SMALL,
    *ONCE,
    "--reward.judging.retries",
    "0",
    "--model.path",
    "model",
    "--prompts.path",
    "good.jsonl",
)
PPO = (*UNJUDGED, "--reward.functions", "judges.py:good")
EVALUATE = ("evaluate", "model", "--prompts", "good.jsonl", "--functions", "judges.py:good", "--max-new-tokens", "3")
LITTLE = ("--total-steps", "32", "--n-steps", "8", "--world.num-envs", "2", "--evaluation.final-episodes", "5")


def judged(name: str) -> tuple[str, ...]:
    return (*UNJUDGED, "--reward.functions", name if ":" in name else f"judges.py:{name}")


def train(env: str, *options: str) -> tuple[str, ...]:
    return ("train", env, *RUN, *LITTLE, *options)
