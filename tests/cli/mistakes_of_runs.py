"""More mistakes of ``docs/BAD_INPUT.md``: environments, runs and their files, saved policies, the Python API."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from bridle.cli.main import main
from bridle.runs import Run
from tests.cli.mistakes import Mistake
from tests.cli.world import EVALUATE, PPO, REWARD, SFT, edit, judged, train

RESUME = ("resume", "r")


def world_mistakes() -> Iterator[Mistake]:
    """Environments, what they show, and what is put around them."""
    own = "bad_input_worlds:{}-v0".format
    cases: dict[str, tuple[tuple[str, ...], str]] = {
        "no such environment": (train("Cartpol-v1"), "did you mean"),
        "no such module": (train("no_such_worlds:A-v0"), ""),
        "it cannot be made": (train(own("Unmade")), ""),
        "an argument that it does not take": (train("CartPole-v1", "--world.kwargs", "gravity=1"), "'gravity'"),
        "its step raises": (train(own("Boom")), ""),
        "its reset raises": (train(own("Raises")), ""),
        "it leaves the program": (train(own("Leaves")), ""),
        "a reward of NaN": (train(own("NoReward")), ""),
        "a reward in words": (train(own("WordyReward")), "raised"),
        "an observation of NaN": (train(own("Blind")), ""),
        "an observation of another shape": (train(own("Ragged")), "raised"),
        "an observation outside its space": (train(own("Outside")), ""),
        "observations in words": (train(own("Seen")), ""),
        "nothing to see": (train(own("Nothing")), ""),
        "actions in words": (train(own("Words")), ""),
        "a mask that allows nothing": (train(own("NoneAllowed")), ""),
        "a mask that is not sure": (train(own("Doubtful")), ""),
        "a mask too short": (train(own("Narrow")), ""),
        "a mask that is forgotten": (train(own("Forgotten")), ""),
        "a mask that comes late": (train(own("Late")), ""),
        "a mask for a box": (train(own("BoxMask"), "--ppo.minibatches", "1"), ""),
        "no vector form": (
            train("Pendulum-v1", "--world.vectorization", "vector_entry_point", "--ppo.minibatches", "1"),
            "",
        ),
        "a wrapper that is not there": (train("CartPole-v1", "--world.wrappers", "nowhere:W"), ""),
        "a wrapper that is no wrapper": (train("CartPole-v1", "--world.wrappers", "gymnasium:__version__"), ""),
        "a factory that is not there": (train("CartPole-v1", "--network.factory", "nowhere:build"), ""),
        "a factory of nothing": (train("CartPole-v1", "--network.factory", "bad_input_worlds:none"), ""),
        "a factory that raises": (train("CartPole-v1", "--network.factory", "bad_input_worlds:broken"), ""),
    }
    for what, (arguments, until) in cases.items():
        yield Mistake(group="Environments and own modules", what=what, arguments=arguments, until=until)


def make_runs(world: Path) -> None:
    """Leave ``failed``, whose judge failed at step 2 of PPO behind a checkpoint, and ``agent``, a finished run."""
    assert main((*judged("later"), "--run.dir", "failed", "--evaluation.every", "1")) == 2
    assert main((*train("CartPole-v1"), "--run.dir", "agent", "--run.checkpoint-every", "1")) == 0


def make_faults(world: Path) -> None:
    """Leave ``fault``: the evidence of a step of SFT whose loss was not finite."""
    wild = ("--optim.lr", "1e30", "--optim.warmup-steps", "0", "--optim.schedule", "constant")
    assert main((*SFT, "--run.dir", "wild", *wild)) == 1
    (kept,) = (world / "wild" / "faults").iterdir()
    kept.rename(world / "fault")


def _copied(run: str, change: Callable[[Path], object] = lambda path: None) -> Callable[[Path], object]:
    def before(world: Path) -> None:
        change(Path(shutil.copytree(world / run, world / "r")))

    return before


def _replaced(name: str, old: str, new: str) -> Callable[[Path], object]:
    def change(run: Path) -> None:
        text = (run / name).read_text()
        assert old in text, (name, old)
        (run / name).write_text(text.replace(old, new, 1))

    return change


def _elsewhere(old: str, new: str) -> Callable[[Path], object]:
    """Let a run have been started with a file by another name."""

    def change(run: Path) -> None:
        path = run / "config.json"
        path.write_text(path.read_text().replace(f'"path": "{old}"', f'"path": "{new}"'))

    return change


def _of_checkpoint(change: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda run: change(run / "checkpoints" / "step-1")


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def run_mistakes() -> Iterator[Mistake]:
    """Run directories: taken, missing, edited by hand, damaged."""
    group = "Runs"
    for what, arguments in {
        "a directory that is taken": (*SFT, "--run.dir", "taken"),
        "a directory that is taken (reward)": (*REWARD, "--run.dir", "taken"),
        "a directory that is taken (ppo)": (*PPO, "--run.dir", "taken"),
        "a directory that is taken (train)": (*train("CartPole-v1"), "--run.dir", "taken"),
        "a directory that is taken (quickstart)": ("quickstart", "--run.dir", "taken", "--run.quiet"),
        "the same by a detour": (*SFT, "--run.dir", "nowhere/../taken"),
        "a file for a directory": (*SFT, "--run.dir", "good.jsonl"),
        "a directory below a file": (*SFT, "--run.dir", "good.jsonl/r"),
        "a name too long": (*SFT, "--run.dir", "x" * 300),
        "resuming nothing": ("resume", "nothing"),
        "resuming what is no run": ("resume", "taken"),
        "resuming an option": ("resume", "--steps"),
        "resuming a finished run with a setting": ("resume", "agent", "--run.on-fault", "skip"),
        "resuming with another setting": ("resume", "failed", "--steps", "9"),
        "resuming in another place": ("resume", "failed", "--run.dir", "r"),
        "a file for a run": ("resume", "good.jsonl"),
        "evaluating a run without a checkpoint": ("evaluate", "young"),
        "evaluating a reward model's run": ("evaluate", "of-reward"),
        "evaluating a policy without its run": ("evaluate", "agent/policy"),
        "a checkpoint that was not kept": ("evaluate", "agent", "--checkpoint", "999"),
        "a checkpoint by another name": ("evaluate", "agent", "--checkpoint", "newest"),
        "a film of another kind": ("evaluate", "agent", "--video", "film.avi"),
        "a film onto a file": ("evaluate", "agent", "--video", "folder"),
        "a film into no folder": ("evaluate", "agent", "--video", "nowhere/film.mp4"),
    }.items():
        yield Mistake(group=group, what=what, arguments=arguments)
    yield Mistake(
        group=group,
        what="the best before there is one",
        arguments=("evaluate", "r", "--checkpoint", "best"),
        before=_copied("agent", lambda run: shutil.rmtree(run / "best")),
    )
    yield Mistake(
        group=group,
        what="figures where nothing can be written",
        arguments=(*EVALUATE, "--output", "/proc/figures.json"),
    )
    edits: dict[str, tuple[Callable[[Path], object], str]] = {
        "data that are gone": (_elsewhere("good.jsonl", "gone.jsonl"), ""),
        "other data": (_elsewhere("good.jsonl", "same.jsonl"), ""),
        "a setting changed": (_replaced("config.json", '"clip": 0.2', '"clip": 0.3'), ""),
        "a setting of another type": (_replaced("config.json", '"steps": 2', '"steps": "many"'), ""),
        "a setting out of range": (_replaced("config.json", '"steps": 2', '"steps": 0'), ""),
        "a setting that is not a number": (_replaced("config.json", '"clip": 0.2', '"clip": "NaN"'), ""),
        "a setting by a wrong name": (_replaced("config.json", '"clip": 0.2', '"clipp": 0.2'), ""),
        "a setting outside its choice": (_replaced("config.json", '"whiten": "batch"', '"whiten": "all"'), ""),
        "a setting missing": (lambda run: _without(run, "model", "path"), ""),
        "a list that is a word": (lambda run: _with(run, "reward", "weights", "all"), ""),
        "the run's settings missing": (lambda run: _with(run, "run", None, 3), ""),
        "a job that is unknown": (_replaced("config.json", '"job": "ppo"', '"job": "tea"'), ""),
        "another job": (_replaced("config.json", '"job": "ppo"', '"job": "sft"'), ""),
        "a format of the future": (_replaced("config.json", '"format": ', '"format": 9'), ""),
        "config.json torn": (lambda run: (run / "config.json").write_text("{"), "not valid JSON ("),
        "config.json nested too deeply": (
            lambda run: (run / "config.json").write_text("[" * 100_000),
            "not valid JSON (",
        ),
        "config.json with a number of 5,000 digits": (
            lambda run: (run / "config.json").write_text('{"format": ' + "9" * 5000 + "}"),
            "not valid JSON (",
        ),
        "config.json of nothing": (lambda run: (run / "config.json").write_text('{"format": 2}'), ""),
        "a damaged record": (lambda run: (run / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n'), ""),
        "a record without a step": (lambda run: (run / "metrics.jsonl").write_text('{"score": 1}\n'), ""),
        "a record nested too deeply": (lambda run: (run / "metrics.jsonl").write_text("[" * 100_000 + "\n"), ""),
        "records cut short": (lambda run: (run / "metrics.jsonl").write_text('{"step": 0}\n'), ""),
        "samples taken away": (lambda run: (run / "samples" / "step-1.jsonl").unlink(), ""),
        "timing cut short": (lambda run: (run / "timing.jsonl").write_text(""), ""),
        "the only checkpoint damaged": (
            _of_checkpoint(lambda folder: _flip(folder / "policy" / "model.safetensors")),
            "",
        ),
        "a manifest of nothing": (_of_checkpoint(lambda folder: (folder / "manifest.json").write_text("{}")), ""),
        "a manifest that leads outside": (
            _of_checkpoint(
                lambda folder: (folder / "manifest.json").write_text(
                    json.dumps({"format": 1, "step": 1, "files": {"../../../good.jsonl": {"size": 1, "sha256": ""}}})
                )
            ),
            "",
        ),
    }
    yield Mistake(
        group=group,
        what="a quickstart that was begun elsewhere",
        arguments=RESUME,
        before=lambda world: Run.create(world / "r", "quickstart", {"run": {"dir": "elsewhere"}}).close(),
    )
    for what, (change, until) in edits.items():
        notes = ("r/events.jsonl",) if "checkpoint" in what or "manifest" in what else ()
        before = _copied("failed", change)
        yield Mistake(group=group, what=what, arguments=RESUME, before=before, notes=notes, until=until)


def fault_mistakes() -> Iterator[Mistake]:
    """The evidence of a faulty step, and what happened in a run."""
    group, replay = "Faults and events", ("replay", "r")
    for what, arguments in {
        "replaying nothing": ("replay",),
        "replaying an option": ("replay", "--step"),
        "replaying what is not there": ("replay", "nowhere"),
        "replaying a run": ("replay", "failed"),
        "the events of nothing": ("events",),
        "the events of two": ("events", "failed", "agent"),
        "the events of what is no run": ("events", "taken"),
    }.items():
        yield Mistake(group=group, what=what, arguments=arguments)

    def edited(**changes: object) -> Callable[[Path], object]:
        return _copied("fault", lambda folder: edit(folder / "report.json", **changes))

    elsewhere = _replaced("report.json", '"path": "model"', '"path": "./gone"')
    cases: dict[str, tuple[Callable[[Path], object], str]] = {
        "a report torn": (
            _copied("fault", lambda folder: (folder / "report.json").write_text("{")),
            "not valid JSON (",
        ),
        "a report of another format": (edited(format=99), ""),
        "a report without a step": (edited(step=None), ""),
        "a report of a job that is unknown": (edited(job="tea"), ""),
        "a report of another job": (edited(job="ppo"), ""),
        "a report whose settings are a list": (edited(config=[]), ""),
        "a batch that is gone": (_copied("fault", lambda folder: (folder / "batch.safetensors").unlink()), ""),
        "weights with a flipped bit": (_copied("fault", lambda folder: _flip(folder / "weights.safetensors")), ""),
        "a model that has moved": (_copied("fault", elsewhere), ""),
        "a model of another shape": (
            _copied("fault", _replaced("report.json", '"path": "model"', '"path": "narrow"')),
            "settings name (",
        ),
    }
    for what, (before, until) in cases.items():
        yield Mistake(group=group, what=what, arguments=replay, before=before, until=until)
    damaged = _copied("failed", lambda run: (run / "events.jsonl").write_text("nonsense\n"))
    yield Mistake(group=group, what="events that are damaged", arguments=("events", "r"), before=damaged)


def _with(run: Path, group: str, name: str | None, value: object) -> None:
    head = json.loads((run / "config.json").read_text())
    if name is None:
        head["config"][group] = value
    else:
        head["config"][group][name] = value
    (run / "config.json").write_text(json.dumps(head))


def _without(run: Path, group: str, name: str) -> None:
    head = json.loads((run / "config.json").read_text())
    del head["config"][group][name]
    (run / "config.json").write_text(json.dumps(head))


def make_odd_runs(world: Path) -> None:
    """Leave ``young``, a run without a checkpoint, and ``of-reward``, which says that it is a reward model's."""
    young = Path(shutil.copytree(world / "failed", world / "young"))
    shutil.rmtree(young / "checkpoints")
    (young / "checkpoints").mkdir()
    _replaced("config.json", '"job": "ppo"', '"job": "reward"')(
        Path(shutil.copytree(world / "failed", world / "of-reward"))
    )


def python_mistakes() -> Iterator[Mistake]:
    """The Python API."""
    small = "total_steps=8, n_steps=4, run={'dir': 'r', 'threads': 1, 'quiet': True}"
    for what, python in {
        "a run that is a name": "bridle.train('CartPole-v1', run='x')",
        "a group that is a number": "bridle.train('CartPole-v1', ppo=3, run={'dir': 'r'})",
        "a setting by a wrong name": "bridle.train('CartPole-v1', stepz=3)",
        "a world that is a word": "bridle.train('CartPole-v1', world='fast')",
        "NaN": f"bridle.train('CartPole-v1', clip_rewards=float('nan'), {small})",
        "an algorithm that is unknown": "bridle.train('CartPole-v1', algorithm='sac')",
        "an algorithm that is a list": "bridle.train('CartPole-v1', algorithm=['ppo'])",
        "no preset of this name": "bridle.train('CartPole-v1', preset='best')",
        "what no setting can be": "bridle.train('CartPole-v1', ppo={1: {2}, (3,): 4})",
        "no environment": f"bridle.train(3, {small})",
        "a function that makes none": f"bridle.train(lambda: 3, {small})",
        "a function that raises": f"bridle.train(lambda: 1 / 0, {small})",
        "an id that is empty": "bridle.train('')",
    }.items():
        yield Mistake(group="bridle.train", what=what, python=python)


def saved_mistakes() -> Iterator[Mistake]:
    """Saved agents."""
    group, load = "bridle.load_policy and the agent", "bridle.load_policy('r/policy')"

    def changed(**changes: object) -> Callable[[Path], object]:
        return _copied("agent", lambda run: edit(run / "policy" / "policy.json", **changes))

    def part(name: str, **changes: object) -> Callable[[Path], object]:
        def change(run: Path) -> None:
            head = json.loads((run / "policy" / "policy.json").read_text())
            head[name] |= changes
            (run / "policy" / "policy.json").write_text(json.dumps(head))

        return _copied("agent", change)

    def written(name: str, content: str | bytes) -> Callable[[Path], object]:
        raw = content.encode() if isinstance(content, str) else content
        return _copied("agent", lambda run: (run / "policy" / name).write_bytes(raw))

    own = {"kind": "Mystery"}
    huge = {"kind": "BoxPart", "path": [], "shape": [10**9]}
    cases: dict[str, tuple[Callable[[Path], object], str, str]] = {
        "no folder": (_copied("agent"), "bridle.load_policy('nowhere')", ""),
        "no weights": (_copied("agent", lambda run: (run / "policy" / "policy.safetensors").unlink()), load, ""),
        "weights cut short": (written("policy.safetensors", b"abc"), load, "file ("),
        "policy.json torn": (written("policy.json", "{"), load, "as JSON:"),
        "policy.json nested too deeply": (written("policy.json", "[" * 100_000), load, "as JSON:"),
        "another format": (changed(format=1), load, ""),
        "no network": (changed(network=None), load, ""),
        "a network with a word for a width": (part("network", hidden=["wide"]), load, ""),
        "a network of another width": (part("network", hidden=[3]), load, "describes ("),
        "a network too large for any machine": (part("network", hidden=[10**7, 10**7]), load, ""),
        "an observation of another kind": (part("observations", kind="Smells"), load, ""),
        "a part of another kind": (part("observations", parts=[own]), load, ""),
        "parts that are none": (part("observations", parts=3), load, ""),
        "nothing to see": (part("observations", parts=[]), load, ""),
        "more to see than fits": (part("observations", parts=[huge]), load, ""),
        "actions of another kind": (part("actions", kind="Wishes"), load, ""),
        "no actions": (part("actions", n=0), load, ""),
        "a number type that is none": (
            changed(actions={"kind": "MultiBinaryActions", "shape": [1], "dtype": "no"}),
            load,
            "",
        ),
        "a policy of one's own": (part("network", factory="a:b"), load, ""),
        "another environment": (
            _copied("agent"),
            "bridle.load_policy('r/policy', action_space=gymnasium.spaces.Discrete(3))",
            "",
        ),
        "other observations": (
            _copied("agent"),
            "bridle.load_policy('r/policy', observation_space=gymnasium.spaces.Box(-1, 1, (3,)))",
            "",
        ),
        "an observation of another shape": (_copied("agent"), f"{load}.act(np.zeros(3))", ""),
        "an observation in words": (_copied("agent"), f"{load}.act('left')", ""),
        "an observation of NaN": (_copied("agent"), f"{load}.act(np.full(4, np.nan))", ""),
        "a mask of another shape": (_copied("agent"), f"{load}.act(np.zeros(4), mask=[1])", ""),
        "a mask that allows nothing": (_copied("agent"), f"{load}.act(np.zeros(4), mask=[0, 0])", ""),
        "a mask in words": (_copied("agent"), f"{load}.act(np.zeros(4), mask=['a', 'b'])", ""),
        "a mask that is a number": (_copied("agent"), f"{load}.act(np.zeros(4), mask=1)", ""),
    }
    for what, (before, python, until) in cases.items():
        yield Mistake(group=group, what=what, python=python, before=before, until=until)


__all__ = [
    "fault_mistakes",
    "make_faults",
    "make_odd_runs",
    "make_runs",
    "python_mistakes",
    "run_mistakes",
    "saved_mistakes",
    "world_mistakes",
]
