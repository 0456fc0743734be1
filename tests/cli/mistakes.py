"""The mistakes of ``docs/BAD_INPUT.md``: what is done wrong, and how; what the program says of it is for the program."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.cli.world import EVALUATE, GOOD, PPO, REWARD, RUN, SFT, UNJUDGED, judged, train

QUICKSTART = ("quickstart", *RUN)


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


def config_mistakes() -> Iterator[Mistake]:
    """Settings that cannot work, alone or together."""
    for what, arguments in {
        "an option that is no number": (*PPO, "--steps", "many"),
        "NaN": (*PPO, "--ppo.clip", "nan"),
        "batch of 0": (*SFT, "--batch-size", "0"),
        "context of 1": (*SFT, "--max-tokens", "1"),
        "more tokens than the context": (*SFT, "--max-tokens", "999"),
        "holding everything out": (*SFT, "--evaluation.share", "1"),
        "evaluating every 0 steps": (*SFT, "--evaluation.every", "0"),
        "fewer than no samples": (*SFT, "--evaluation.samples", "-1"),
        "checkpoints every 0 steps": (*SFT, "--run.checkpoint-every", "0"),
        "checkpoints every 0 minutes": (*SFT, "--run.checkpoint-minutes", "0"),
        "the best of an unnamed metric": (*SFT, "--run.keep-best", "-"),
        "fewer than no faults": (*SFT, "--run.fault-limit", "-1"),
        "a fault that is to be passed over": (*SFT, "--run.on-fault", "ignore"),
        "keeping no checkpoint": (*SFT, "--run.keep-checkpoints", "0"),
        "keeping every 0th checkpoint": (*SFT, "--run.keep-every", "0"),
        "too many threads": (*SFT, "--run.threads", "100000"),
        "a negative seed": (*SFT, "--run.seed", "-1"),
        "no path of data": (*SFT, "--data.path", ""),
        "reading no rows": (*SFT, "--data.limit", "0"),
        "a negative learning rate": (*SFT, "--optim.lr", "-1"),
        "a warm-up of −1 steps": (*SFT, "--optim.warmup-steps", "-1"),
        "a last learning rate above the first": (*SFT, "--optim.min-lr-share", "2"),
        "negative weight decay": (*SFT, "--optim.weight-decay", "-1"),
        "a decay of 1": (*SFT, "--optim.beta1", "1"),
        "no eps": (*SFT, "--optim.eps", "0"),
        "a gradient norm of 0": (*SFT, "--optim.max-grad-norm", "0"),
        "an answer of no tokens": (*SFT, "--evaluation.sampling.max-new-tokens", "0"),
        "a temperature of 0": (*SFT, "--evaluation.sampling.temperature", "0"),
        "no rows at once": (*SFT, "--evaluation.sampling.rows", "0"),
        "the likeliest 0 tokens": (*SFT, "--evaluation.sampling.top-k", "0"),
        "all but nothing of the probability": (*SFT, "--evaluation.sampling.top-p", "0"),
        "an empty stop string": (*SFT, "--evaluation.sampling.stop-strings", ""),
        "adapters of rank 0": (*SFT, "--lora.rank", "0"),
        "adapters of α = 0": (*SFT, "--lora.rank", "2", "--lora.alpha", "0"),
        "α without adapters": (*SFT, "--lora.alpha", "8"),
        "layers without adapters": (*SFT, "--lora.targets", "q_proj"),
        "adapters on layers without a name": (*SFT, "--lora.rank", "2", "--lora.targets", ""),
        "an empty model name": (*SFT, "--model.path", ""),
        "half a character as the end token": (*SFT, "--model.eos-token", "\udcff"),
        "everything held out (reward)": (*REWARD, "--evaluation.share", "1"),
        "one fold": (*REWARD, "--evaluation.folds", "1"),
        "folds and a file": (*REWARD, "--evaluation.folds", "2", "--evaluation.path", "good.jsonl"),
        "evaluating every 0 steps (reward)": (*REWARD, "--evaluation.every", "0"),
        "no passes": (*REWARD, "--epochs", "0"),
        "centering of rankings": (*REWARD, "--kind", "rankings", "--loss.centering", "1"),
        "negative centering": (*REWARD, "--loss.centering", "-1"),
        "forward passes of 0 tokens": (*REWARD, "--loss.micro-tokens", "0"),
        "more tokens than the context (reward)": (*REWARD, "--max-tokens", "999"),
        "0 steps": (*PPO, "--steps", "0"),
        "0 held out": (*PPO, "--evaluation.held-out", "0"),
        "more minibatches than answers": (*PPO, "--ppo.minibatches", "3"),
        "a second leash": (*PPO, "--ppo.kl-loss", "k2"),
        "one answer to compare": (*UNJUDGED, "--reward.groups", "judges.py:good"),
        "a horizon within a step": (*PPO, "--kl.target", "1", "--kl.horizon", "1", "--prompts-per-step", "5"),
        "warm-up without end": (*PPO, "--critic.warmup-steps", "2"),
        "cutting the tail in training": (*PPO, "--sampling.top-k", "3"),
        "stop strings in training": (*PPO, "--sampling.stop-strings", "x"),
        "0 passes over a rollout": (*PPO, "--ppo.epochs", "0"),
        "0 tokens at once": (*PPO, "--ppo.micro-batch-tokens", "0"),
        "a clip of 0": (*PPO, "--ppo.clip", "0"),
        "a clip of 1": (*PPO, "--ppo.clip", "1"),
        "an upper clip alone": (*PPO, "--ppo.clip", "None", "--ppo.clip-high", "0.3"),
        "a dual clip of 1": (*PPO, "--ppo.dual-clip", "1"),
        "a negative entropy bonus": (*PPO, "--ppo.entropy-coefficient", "-1"),
        "γ above 1": (*PPO, "--advantage.gamma", "1.5"),
        "returns of 0 steps": (*PPO, "--advantage.n", "0"),
        "a critic's λ above 1": (*PPO, "--advantage.critic-lam", "2"),
        "a critic's λ without GAE": (*PPO, "--advantage.critic-lam", "0.5", "--advantage.estimator", "td"),
        "k3 in the reward": (*PPO, "--kl.estimator", "k3"),
        "k1 in the loss": (*PPO, "--kl.where", "loss"),
        "a negative leash": (*PPO, "--kl.coefficient", "-1"),
        "a target without a leash": (*PPO, "--kl.where", "none", "--kl.target", "1"),
        "an exact KL of no answer": (*PPO, "--kl.exact-share", "0"),
        "an exact KL of more than all": (*PPO, "--kl.exact-share", "1.5"),
        "recomputing a number": (*PPO, "--recompute", "3"),
        "a horizon of 0": (*PPO, "--kl.horizon", "0"),
        "a negative penalty": (*PPO, "--shaping.missing-eos-penalty", "-1"),
        "a penalty for what is bootstrapped": (
            *(*PPO, "--shaping.missing-eos-penalty", "1"),
            *("--shaping.on-length", "bootstrap"),
        ),
        "scores clipped to 0": (*PPO, "--shaping.clip", "0"),
        "negative critic warm-up": (*PPO, "--critic.warmup-steps", "-1"),
        "a reward model that the critic does not use": (*PPO, "--critic.reward-model", "scores"),
        "a critic from no reward model": (*PPO, "--critic.source", "reward"),
        "a mix without a file": (*PPO, "--mix.coefficient", "1"),
        "an empty mix": (*PPO, "--mix.batch", "0"),
        "nobody judges": UNJUDGED,
        "a weight too many": (*PPO, "--reward.weights", "1", "2"),
        "a weight beyond all scores": (*PPO, "--reward.weights", "1e308"),
        "a judge that is given no time": (*PPO, "--reward.judging.timeout", "0"),
        "a judge that is asked fewer than no times": (*PPO, "--reward.judging.retries", "-1"),
        "a judge that is waited for backwards": (*PPO, "--reward.judging.wait", "-1"),
        "a pad token for no reward model": (*PPO, "--reward.pad-token", "x"),
        "the same judge twice": (*UNJUDGED, "--reward.functions", "judges.py:good", "judges.py:good"),
        "0 demonstrations": (*QUICKSTART, "--scale.demonstrations", "0"),
        "more held out than there are": (*QUICKSTART, "--scale.held-out", "1000000"),
        "0 episodes": (*EVALUATE, "--episodes", "0"),
        "a film of 0 episodes": (*EVALUATE, "--video-episodes", "0"),
        "figures onto a file": (*EVALUATE, "--output", "good.jsonl"),
        "figures into no folder": (*EVALUATE, "--output", "nowhere/figures.json"),
        "a judge is missing": ("evaluate", "model", "--prompts", "good.jsonl"),
        "prompts are missing": ("evaluate", "model", "--functions", "judges.py:good"),
        "nothing to evaluate": ("evaluate", "runs/nowhere"),
        "0 actions": train("CartPole-v1", "--total-steps", "0"),
        "restarts every −1 updates": train("CartPole-v1", "--restart-every", "-1"),
        "half precision for a small agent": train("CartPole-v1", "--run.dtype", "bfloat16"),
        "more minibatches than actions": train("CartPole-v1", "--ppo.minibatches", "99"),
        "more minibatches than memories": train("CartPole-v1", "--ppo.minibatches", "4", "--network.recurrent", "gru"),
        "TRPO with one trunk": train("CartPole-v1", "--algorithm", "trpo", "--network.shared-trunk", "True"),
        "TRPO with a memory": train(
            *("CartPole-v1", "--algorithm", "trpo", "--network.recurrent", "gru"), "--trpo.critic-minibatches", "1"
        ),
        "rewards clipped to less than nothing": train("CartPole-v1", "--clip-rewards", "-1"),
        "fresh advantages for A2C": train("CartPole-v1", "--algorithm", "a2c", "--recompute-advantages"),
        "a falling clip for TRPO": train("CartPole-v1", "--algorithm", "trpo", "--clip-schedule", "linear"),
        "a leash without a reference": train("CartPole-v1", "--ppo.kl-loss", "k2"),
        "a preset that is not there": train("CartPole-v1", "--preset", "CartPol-v1"),
        "an environment is missing": ("train", *RUN),
        "evaluating every −1 updates": train("CartPole-v1", "--evaluation.every", "-1"),
        "two episodes": train("CartPole-v1", "--evaluation.episodes", "2"),
        "episodes of no actions": train("CartPole-v1", "--evaluation.max-steps", "0"),
        "no environments": train("CartPole-v1", "--world.num-envs", "0"),
        "episodes cut at once": train("CartPole-v1", "--world.max-episode-steps", "0"),
        "making anew what shares one process": train("CartPole-v1", "--world.on-death", "restart"),
        "a limit of no deaths": train("CartPole-v1", "--world.death-limit", "0"),
        "an autoreset mode for envpool": train(
            "CartPole-v1", "--world.vectorization", "envpool", "--world.autoreset", "disabled"
        ),
        "a wrapper for envpool": train("CartPole-v1", "--world.vectorization", "envpool", "--world.wrappers", "a:B"),
        "an argument without a value": train("CartPole-v1", "--world.kwargs", "gravity"),
        "a wrapper without a module": train("CartPole-v1", "--world.wrappers", "Nothing"),
        "a screen of 0 pixels": train("CartPole-v1", "--world.atari.size", "0"),
        "a layer of no width": train("CartPole-v1", "--network.hidden", "0"),
        "a memory of no width": train("CartPole-v1", "--network.recurrent-width", "0"),
        "two memories": train("CartPole-v1", "--network.recurrent", "gru", "--network.shared-trunk", "False"),
        "a factory without a module": train("CartPole-v1", "--network.factory", "build"),
        "squashing what has no bounds": train(
            "bad_input_worlds:Unbounded-v0", "--network.squash", "--ppo.minibatches", "1"
        ),
        "a negative weight of values": train("CartPole-v1", "--a2c.value-coefficient", "-1"),
        "A2C with 0 tokens at once": train("CartPole-v1", "--a2c.micro-batch-tokens", "0"),
        "0 conjugate gradients": train("CartPole-v1", "--trpo.cg-iterations", "0"),
        "a trust region of nothing": train("CartPole-v1", "--trpo.max-kl", "0"),
        "negative damping": train("CartPole-v1", "--trpo.cg-damping", "-1"),
        "a line search that grows": train("CartPole-v1", "--trpo.line-search-shrink", "2"),
    }.items():
        yield Mistake(group="Settings", what=what, arguments=arguments)
    yield Mistake(group="The command line", what="no command")
    for what, arguments in {
        "a slip in the command": ("pppo",),
        "what it needs is missing": ("ppo",),
        "a path too many": ("resume", "a", "b"),
        "an option that resume has not": ("resume", "--steps"),
        "the runs of a file": ("runs", "good.jsonl"),
    }.items():
        yield Mistake(group="The command line", what=what, arguments=arguments)


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


__all__ = ["Mistake", "config_mistakes", "data_mistakes", "judge_mistakes", "model_mistakes", "write_data"]
