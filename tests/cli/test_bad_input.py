"""What a user can get wrong: one line that says what and how to mend it, exit code 2, and nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bridle.cli.main import main
from bridle.language.models import ModelSettings, load_reward_model, save_model
from bridle.runs import Run
from tests.language.tiny import byte_tokenizer, tiny_model

JUDGES = """
import os, signal
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

for kind in (Boom, NoReward, Words, Blind, Leaves, Unmade):
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


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a model, spoilt ones, data of every kind, judges and environments."""
    path = tmp_path_factory.mktemp("world")
    model = tiny_model(vocab_size=260)
    save_model(path / "model", model, byte_tokenizer())
    reward, tokenizer = load_reward_model(ModelSettings(path=str(path / "model")))
    save_model(path / "scores", reward, tokenizer)
    spoilt_models(path)
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
    return path


Bridle = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bridle(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Bridle]:
    """Run the command line in the world; exit code, stdout, stderr. What a case writes as ``r`` is removed after it."""
    monkeypatch.chdir(world)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    yield call
    shutil.rmtree(world / "r", ignore_errors=True)


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below, but compiled Python."""
    found = (path for path in folder.rglob("*") if "__pycache__" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in found}


RUN = ("--run.dir", "r", "--run.threads", "1", "--run.quiet")
SFT = ("sft", *RUN, "--model.path", "model", "--data.path", "good.jsonl", "--batch-size", "4")
REWARD = ("reward", *RUN, "--model.path", "model", "--data.path", "good.jsonl")
SMALL = ("--steps", "2", "--prompts-per-step", "2", "--sampling.max-new-tokens", "3", "--evaluation.held-out", "2")
ONCE = ("--ppo.minibatches", "1", "--ppo.epochs", "1", "--run.checkpoint-every", "1")
UNJUDGED = ("ppo", *RUN, *SMALL, *ONCE, "--model.path", "model", "--prompts.path", "good.jsonl")
PPO = (*UNJUDGED, "--reward.functions", "judges.py:good")
EVALUATE = ("evaluate", "model", "--prompts", "good.jsonl", "--functions", "judges.py:good", "--max-new-tokens", "3")
LITTLE = ("--total-steps", "32", "--n-steps", "8", "--world.num-envs", "2", "--evaluation.final-episodes", "5")


def judged(name: str) -> tuple[str, ...]:
    return (*UNJUDGED, "--reward.functions", name if ":" in name else f"judges.py:{name}")


def train(env: str, *options: str) -> tuple[str, ...]:
    return ("train", env, *RUN, *LITTLE, *options)


FILES = {
    "missing.jsonl": "missing.jsonl: no such file",
    "folder": "folder is a folder; name one of its files (inside.jsonl)",
    "torn.jsonl": "torn.jsonl line 2 is not JSON",
    "latin.jsonl": "latin.jsonl line 2 is not UTF-8 (byte 13); save the file as UTF-8",
    "empty.jsonl": "empty.jsonl holds no records",
    "array.jsonl": "array.jsonl line 2 is a list, expected an object",
    "ragged.csv": "ragged.csv line 2 has 3 fields, the header 2",
    "object.json": "object.json is an object, expected a list of objects; is it .jsonl?",
    "fake.parquet": "fake.parquet is not Parquet",
    "data.txt": "data.txt: unknown kind of file; known are .jsonl",
    "no-column.jsonl": "no-column.jsonl line 1 has no column 'prompt' (it has: question, reply)",
    "number.jsonl": "number.jsonl line 2: 'prompt' is a number, expected text or a list of messages",
    "long-prompt.jsonl": "long-prompt.jsonl line 2: 10",
    "no-turn.jsonl": "turn 1 of 'messages' is no message; expected a list of messages",
    "no-turns.jsonl": "'messages' is an empty list, expected a list of messages",
    "chat.jsonl": "no chat template; give one: --model.chat-template FILE",
}
MODELS = {
    "./nothing": "model ./nothing: no such folder; check the path",
    "model/nothing": "model model/nothing: no such folder; check the path",
    "nothing-on-the-hub": "nothing-on-the-hub is no folder here, and the hub gives no tokenizer for it",
    "good.jsonl": "model good.jsonl is a file; give the folder that holds it",
    "no-tokenizer": "no-tokenizer holds no tokenizer (no tokenizer.json); name one with --model.tokenizer FOLDER",
    "no-config": "no-config holds no config.json: not a model folder",
    "no-weights": "no-weights holds no weights (no model.safetensors)",
    "pickled": "pickled holds only pickled weights (pytorch_model.bin), which are never opened; convert them",
    "cut": "cut/model.safetensors is not a whole safetensors file (Error while deserializing header",
    "bad-config": "bad-config/config.json is not JSON: ",
    "bad-tokenizer": "tokenizer bad-tokenizer cannot be opened: KeyError 'added_tokens'; name another",
    "heads": "The hidden size (32) is not a multiple of the number of attention heads (7)",
    "shape": "has shape [32, 48] where config.json says [32, 40]; take weights and config.json from the same model",
    "kind": "has model type `nosuch` but Transformers does not recognize this architecture; ",
    "layers": "layers lacks weights of LlamaForCausalLM: model.layers.2.",
    "code": "contains custom code which must be executed to correctly load the model; ",
    "no-eos": "the tokenizer has no eos token, so no answer would ever end; name one with --model.eos-token",
    "": "model.path='': expected a name",
}
JUDGED = {
    "raises": "judges.py:raises raised ValueError: my own words (judges.py, line ",
    "raises_late": "judges.py:raises_late raised KeyError: 'gone' (judges.py, line ",
    "leaves": "judges.py:leaves raised SystemExit: 3 (judges.py, line ",
    "nan": "judges.py:nan returned nan (float) for answer 0; expected a finite number",
    "inf": "judges.py:inf returned inf (float) for answer 0; expected a finite number",
    "short": "judges.py:short returned 1 scores for 2 answers; return one number per answer",
    "text": "judges.py:text returned 'good' (str) for answer 0; expected a number",
    "none": "judges.py:none returned None (NoneType); expected a list of 2 numbers",
    "nones": "judges.py:nones returned None (NoneType) for answer 0; expected a number",
    "single": "judges.py:single returned 1.0 (float); expected a list of 2 numbers",
    "lazy": "(generator); expected a list of 2 numbers",
    "stream": "(async_generator); expected a list of 2 numbers",
    "matrix": "judges.py:matrix returned an array of shape (2, 2); expected [2]",
    "needs": "judges.py:needs needs the column 'solution', the data's columns are: answer",
    "alone": "judges.py:alone takes 1 positional arguments; write it as score(prompts, completions, **columns)",
    "value": "judges.py:value is 3 (int), which cannot be called; name a function",
    "absent": "judges.py has no function 'absent'; it has: alone, good",
    "nowhere.py:good": "no file 'nowhere.py' for 'nowhere.py:good'; Python files in that folder: ",
    "nowhere:good": "no module 'nowhere' for 'nowhere:good'; Python files in the working directory: ",
    "torn_module.py:good": "raised SyntaxError: invalid syntax (torn_module.py, line 1)",
    "needs_more.py:good": "raised ModuleNotFoundError: No module named 'no_such_module_at_all' (needs_more.py, line 1)",
    "leaves.py:good": "raised SystemExit: 3 (leaves.py, line 1)",
    ":": "':' does not name a function; write module:function or file.py:function",
}
WORLDLY = {
    "CartPole": "CartPole: no such environment; did you mean CartPole-v1",
    "Cartpol-v1": "Cartpol-v1: no such environment; did you mean CartPole-v1",
    "no_such_worlds:A-v0": "import of no_such_worlds raised ModuleNotFoundError",
    "bad_input_worlds:None-v0": "bad_input_worlds:None-v0: no such environment",
    "bad_input_worlds:Boom-v0": "bad_input_worlds:Boom-v0: step raised RuntimeError: the world ended",
    "bad_input_worlds:NoReward-v0": "the reward nan is not a finite number",
    "bad_input_worlds:Words-v0": "Text",
    "bad_input_worlds:Blind-v0": "showed an observation that is not finite",
    "bad_input_worlds:Leaves-v0": "step raised SystemExit: 4",
    "bad_input_worlds:Unmade-v0": "making it raised OSError: no display",
}

CASES: list[tuple[tuple[str, ...], str]] = [
    *(((*SFT, "--data.path", name), words) for name, words in FILES.items()),
    *(
        ((*job, option, name), FILES[name])
        for name in ("missing.jsonl", "torn.jsonl", "latin.jsonl", "empty.jsonl", "number.jsonl", "long-prompt.jsonl")
        for job, option in ((REWARD, "--data.path"), (PPO, "--prompts.path"))
    ),
    ((*SFT, "--data.path", "long-answer.jsonl"), "long-answer.jsonl line 1: 103 tokens where 64 fit; leave such"),
    ((*SFT, "--data.path", "null.jsonl"), "null.jsonl line 1: 'answer' is missing, expected text"),
    ((*SFT, "--data.path", "one.jsonl"), "one.jsonl: nothing is left to learn; lower evaluation.share or give more"),
    ((*SFT, "--max-tokens", "999"), "max_tokens=999: expected at most the model's context of 64 tokens"),
    ((*REWARD, "--data.path", "one.jsonl"), "too few prompts (1) to train on some and hold others out; raise"),
    (
        (*REWARD, "--data.path", "margin.jsonl"),
        "margin.jsonl line 1: 'margin' is text, expected a number from 0 to 1e+06",
    ),
    ((*REWARD, "--kind", "rankings", "--data.path", "one-answer.jsonl"), "1 answers; a ranking needs at least 2"),
    ((*REWARD, "--kind", "rankings", "--data.path", "answer-text.jsonl"), "is text, expected a list of texts"),
    ((*REWARD, "--model.path", "pad-eos"), "pad needs a token of its own; add one: --model.pad-token '<|pad|>'"),
    ((*REWARD, "--model.path", "no-pad"), "a reward model needs a pad token and this tokenizer has none; add one"),
    ((*PPO, "--prompts.path", "one.jsonl"), "evaluation.held_out=2: expected fewer than the 1 prompts"),
    ((*PPO, "--sampling.max-new-tokens", "64"), "answers of 64 tokens leave no room for a prompt in the context of 64"),
    ((*PPO, "--prompts.path", "assistant-first.jsonl"), "nothing is said before the assistant speaks"),
    *(((*SFT, "--model.path", name), words) for name, words in MODELS.items()),
    ((*SFT, "--model.tokenizer", "./nothing"), "tokenizer ./nothing: no such folder"),
    *(
        ((*SFT, "--data.path", "chat.jsonl", "--model.chat-template", name), words)
        for name, words in {
            "nowhere.jinja": "chat template nowhere.jinja cannot be read",
            "torn.jinja": "the chat template cannot be read, line 1: ",
            "refusing.jinja": "chat.jsonl line 1: the chat template refuses the messages: no chat please",
            "failing.jinja": "the chat template fails with TypeError: unsupported operand",
            "endless.jinja": "ends the assistant's turn with no stop token ('</s>'); name the token",
        }.items()
    ),
    *((judged(name), words) for name, words in JUDGED.items()),
    (UNJUDGED, "nobody judges the answers; pass --reward.model FOLDER, or --reward.functions module:function"),
    ((*PPO, "--evaluation.gold", "judges.py:nan"), "judges.py:nan returned nan"),
    (
        (*UNJUDGED, "--reward.groups", "judges.py:raises", "--answers-per-prompt", "2"),
        "raised ValueError: my own words",
    ),
    (
        (*UNJUDGED, "--reward.groups", "judges.py:good"),
        "answers_per_prompt=1: expected at least 2 with a judge of groups",
    ),
    (
        (*UNJUDGED, "--reward.model", "model"),
        "model is not a reward model, its head is missing; train one: bridle reward",
    ),
    ((*PPO, "--reward.weights", "1", "2"), "reward.weights=(1.0, 2.0): expected one weight for each of 1 judges"),
    ((*PPO, "--critic.source", "reward"), "name one with --critic.reward-model FOLDER, or set --critic.source actor"),
    ((*PPO, "--ppo.minibatches", "3"), "ppo.minibatches=3: expected at most the 2 answers of a step"),
    ((*PPO, "--critic.warmup-steps", "2"), "critic.warmup_steps=2: expected fewer than steps=2"),
    ((*PPO, "--kl.target", "1", "--kl.horizon", "1", "--prompts-per-step", "5"), "kl.horizon=1: expected more than a"),
    ((*PPO, "--steps", "0"), "bridle: steps=0: expected a whole number >= 1"),
    ((*PPO, "--steps", "1e3"), "--steps: '1e3' is not a whole number; see `bridle ppo --help`"),
    ((*PPO, "--run.threads", "many"), "--run.threads: 'many' is not a whole number"),
    ((*PPO, "--run.threads", "100000"), "run.threads=100000: expected a whole number from 1 to 1024"),
    ((*PPO, "--run.seed", "-1"), "run.seed=-1: expected a whole number of at least 0"),
    ((*PPO, "--ppo.clip", "nan"), "ppo.clip=nan: expected a finite number; leave --ppo.clip out"),
    ((*PPO, "--actor.weight-decay", "nan"), "actor.weight_decay=nan: expected a finite number"),
    ((*PPO, "--actor.lr", "-1"), "actor.lr=-1.0: expected a finite number >= 0"),
    ((*PPO, "--sampling.temperature", "0"), "sampling.temperature=0.0: expected a finite number > 0"),
    ((*PPO, "--kl.estimator", "k3"), 'kl.estimator=\'k3\': expected "k1" with kl.where="reward"; set kl.where loss'),
    ((*PPO, "--kl.where", "nowhere"), "invalid choice 'nowhere' for argument '--kl.where'. Expected one of ('reward',"),
    ((*PPO, "--stepz", "3"), "--stepz is not an option of bridle ppo; did you mean --steps?"),
    ((*PPO, "--lr", "3"), "--lr is not an option of bridle ppo; did you mean --actor.lr?"),
    ((*PPO, "--sampling.top-k", "3"), "sampling.top_k=3: expected no cut of the tail in training"),
    ((*PPO, "--sampling.beams", "3"), "--sampling.beams is not an option of bridle ppo; see `bridle ppo --help`"),
    ((*PPO, "--steps"), "--steps needs a value"),
    (("ppo",), "bridle ppo needs --run.dir, --model.path and --prompts.path; see `bridle ppo --help`"),
    ((*SFT, "--run.dir", "taken"), "taken is not empty; pass --run.dir another path\n"),
    ((*SFT, "--run.dir", "good.jsonl"), "good.jsonl is a file, not a directory; pass --run.dir another path"),
    ((*SFT, "--run.dir", "good.jsonl/r"), "good.jsonl/r cannot be written (Not a directory); pass --run.dir another"),
    (("resume", "nothing"), "nothing does not exist; `bridle runs` lists the runs there are"),
    (("resume", "good.jsonl"), "good.jsonl is a file, not a run; `bridle runs` lists"),
    (("resume", "taken"), "taken is not a run (it has no config.json); `bridle runs` lists"),
    (("runs", "good.jsonl"), "good.jsonl is not a directory; give one that holds runs"),
    (("evaluate",), "bridle evaluate needs --target"),
    (("evaluate", "model", "--prompts", "good.jsonl"), "expected a judge; pass --functions module:function or"),
    (("evaluate", "model", "--functions", "judges.py:good"), "expected a file of prompts; pass --prompts FILE"),
    ((*EVALUATE, "--prompts", "missing.jsonl"), "missing.jsonl: no such file"),
    ((*EVALUATE, "--target", "./nothing"), "./nothing: no such folder"),
    ((*EVALUATE, "--functions", "judges.py:nan"), "judges.py:nan returned nan"),
    ((*EVALUATE, "--count", "1"), "bridle: count=1: expected at least 2, or the mean has no interval"),
    ((*EVALUATE, "--max-new-tokens", "0"), "max_new_tokens=0: expected a number of tokens >= 1"),
    ((*EVALUATE, "--output", "nowhere/figures.json"), "expected a file in a folder that exists"),
    ((*EVALUATE, "--output", "good.jsonl"), "expected a file that does not exist yet"),
    *((train(name), words) for name, words in WORLDLY.items()),
    (("evaluate", "runs/nowhere"), "runs/nowhere is not a run, and judging a model needs --functions or"),
    (("evaluate", "good.jsonl"), "good.jsonl is not a run, and judging a model needs --functions or"),
    (("train", *RUN), "bridle: bridle train needs an environment; for instance: bridle train CartPole-v1"),
    (("train", "--algorithm", "a2c"), "bridle: bridle train needs an environment; for instance:"),
    (
        ("train", "CartPole-v1", *RUN, "--algorithm", "trpo", "--clip-schedule", "linear"),
        "clip_schedule='linear': expected algorithm \"ppo\" with a clip; pass --clip-schedule constant",
    ),
    (train("CartPole-v1", "--ppo.minibatches", "99"), "ppo.minibatches=99: expected at most 8"),
    (train("CartPole-v1", "--n-steps", "0"), "bridle: n_steps=0: expected a whole number >= 1"),
    (train("CartPole-v1", "--optim.eps", "nan"), "optim.eps=nan: expected a finite number"),
    (train("CartPole-v1", "--network.factory", "nowhere:build"), "expected an importable module:function"),
    (train("CartPole-v1", "--algorithm", "sac"), "invalid choice 'sac' for argument '--algorithm'"),
    (train("CartPole-v1", "--preset", "CartPol-v1"), "preset='CartPol-v1': expected one of auto, none, vector"),
    (train("CartPole-v1", "--world.kwargs", "gravity"), "world.kwargs='gravity': expected name=value"),
    (train("CartPole-v1", "--world.kwargs", "gravity=1"), "unexpected keyword argument 'gravity'"),
    (train("CartPole-v1", "--world.wrappers", "Nothing"), "world.wrappers='Nothing': expected \"module:Name\""),
    (train("CartPole-v1", "--world.wrappers", "nowhere:W"), "world.wrappers='nowhere:W': expected an importable"),
    (train("CartPole-v1", "--world.wrappers", "gymnasium:__version__"), "something that can be called with an env"),
    (
        train("Pendulum-v1", "--ppo.minibatches", "1", "--world.vectorization", "vector_entry_point"),
        "Pendulum-v1 has no vector form of its own",
    ),
    (train("CartPole-v1", "--world.max-episode-steps", "0"), "world.max_episode_steps=0: expected a number of actions"),
    (train("CartPole-v1", "--clip-schedule", "cosine"), "invalid choice 'cosine' for argument '--clip-schedule'"),
    (train("CartPole-v1", "--clip-rewards", "-1"), "clip_rewards=-1.0: expected a number > 0"),
    (train("CartPole-v1", "--world.atari.size", "0"), "world.atari.size=0: expected a whole number >= 1"),
    (train("CartPole-v1", "--presett", "none"), "--presett is not an option of bridle train; did you mean --preset?"),
    (("evaluate", "taken"), "bridle: "),
    (("evaluate", "./nothing", "--checkpoint", "best"), "bridle: "),
]


@pytest.mark.parametrize(("arguments", "words"), CASES, ids=lambda value: " ".join(value[-2:])[:60])
def test_a_mistake_is_one_line_and_nothing_is_written(
    bridle: Bridle, world: Path, arguments: tuple[str, ...], words: str
) -> None:
    before = contents(world)
    code, out, err = bridle(*arguments)
    assert words in err
    assert (code, err.count("\n"), out if arguments[0] != "evaluate" else "") == (2, 1, "")
    assert err.startswith("bridle: ")
    assert contents(world) == before


@pytest.mark.parametrize(
    "arguments",
    [
        (*SFT, "--model.path", "pad-eos"),
        (*SFT, "--model.path", "bos-eos"),
        (*SFT, "--model.path", "no-pad"),
        (*PPO, "--model.path", "pad-eos"),
        (*PPO, "--model.path", "bos-eos"),
    ],
    ids=lambda value: f"{value[0]} {value[-1]}",
)
def test_unusual_special_tokens_are_no_mistake(bridle: Bridle, arguments: tuple[str, ...]) -> None:
    assert bridle(*arguments) == (0, "r\n", "")


@pytest.fixture(scope="module")
def failed(world: Path) -> Path:
    """A run of PPO whose judge failed at step 2, behind the evaluations at 0 and 1 and a checkpoint at 1."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(world)
        assert main((*judged("later"), "--run.dir", "failed", "--evaluation.every", "1")) == 2
    return world / "failed"


@pytest.fixture
def r(failed: Path, world: Path) -> Path:
    """A copy of the failed run, as ``r``."""
    return Path(shutil.copytree(failed, world / "r"))


def test_a_judge_that_fails_later_leaves_what_was_recorded(bridle: Bridle, failed: Path, r: Path) -> None:
    run = Run.open(r)
    assert "later raised RuntimeError: the judge is down (judges.py, line " in str(run.events()[-1]["text"])
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [1]
    assert bridle(*PPO)[2] == "bridle: r is not empty; pass --run.dir another path or `bridle resume r`\n"
    assert contents(r) == contents(failed)
    assert bridle("resume", "r") == (0, "r\n", "")
    assert bridle("resume", "r") == (0, "r has finished; there is nothing to resume\n", "")


def test_a_damaged_checkpoint_is_passed_over(bridle: Bridle, r: Path) -> None:
    weights = r / "checkpoints" / "step-1" / "policy" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    code, _, err = bridle("resume", "r")
    assert (code, err.count("\n")) == (2, 1)  # begun again, so the judge fails again at step 2
    assert "the judge is down" in err
    run = Run.open(r)
    assert {"checkpoint_skipped", "resume"} <= {str(event["kind"]) for event in run.events()}
    assert [row["step"] for row in run.metrics()] == [0, 1, 1]
    assert (r / "faults" / "checkpoint-step-1").is_dir()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"clip": 0.2,', '"clip": 0.3,', "ppo.clip=0.3 is not what r was started with; resume with its own settings"),
        ('"steps": 2,', '"steps": "many",', "steps='many': expected int"),
        ('"steps": 2,', '"steps": 0,', "steps=0: expected a whole number >= 1"),
        (
            '"clip": 0.2,',
            '"clip": 0.2, "clipp": 1,',
            "ppo.clipp is not a setting of PPOSettings; did you mean ppo.clip?",
        ),
        ('"path": "model"', '"path": "./gone"', "model ./gone: no such folder"),
        ('"job": "ppo"', '"job": "tea"', "r is a run of 'tea', unknown to this bridle"),
        ("{", "", "r/config.json is not valid JSON"),
    ],
)
def test_a_config_edited_by_hand_is_refused(bridle: Bridle, r: Path, old: str, new: str, words: str) -> None:
    path = r / "config.json"
    path.write_text(path.read_text().replace(old, new, 1))
    before = contents(r)
    code, out, err = bridle("resume", "r")
    assert words in err
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert contents(r) == before


def test_records_edited_by_hand_are_refused(bridle: Bridle, r: Path) -> None:
    (r / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    code, _, err = bridle("resume", "r")
    assert (code, err) == (2, "bridle: r/metrics.jsonl line 1 is damaged; delete that line to go on without it\n")


def test_a_run_in_use_is_left_alone(bridle: Bridle, r: Path) -> None:
    with Run.open(r, write=True):
        before = contents(r)
        code, _, err = bridle("resume", "r")
        assert (code, err) == (2, "bridle: r is in use by another process; wait for it to end\n")
        assert contents(r) == before


def test_a_tracker_that_is_not_installed_leaves_nothing(
    bridle: Bridle, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    code, _, err = bridle(*SFT, "--run.trackers", "wandb")
    assert (code, err.count("\n")) == (2, 1)
    assert "run.trackers='wandb': expected an installed package; pip install 'bridle[wandb]'" in err
    assert not (world / "r").exists()


def test_an_interrupt_finishes_the_step_and_can_be_gone_on_from(bridle: Bridle, world: Path) -> None:
    code, out, err = bridle(*judged("stop"))
    assert (code, out, err) == (130, "", "bridle: stopped after step 1; go on with: bridle resume r\n")
    assert [checkpoint.step for checkpoint in Run.open(world / "r").checkpoints()] == [1]
    assert bridle("resume", "r")[:2] == (0, "r\n")


def test_weights_that_run_away_are_a_failure_of_the_training(bridle: Bridle, world: Path) -> None:
    code, out, err = bridle(*SFT, "--optim.lr", "1e30", "--optim.warmup-steps", "0", "--optim.schedule", "constant")
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is not finite" in err
    assert torch.get_num_threads() == 1
