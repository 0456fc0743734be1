"""The command line: one line and an exit code for every mistake, tracebacks only for our own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Literal

import pytest

from bridle import __version__
from bridle.cli.main import COMMANDS, JobCommand, main
from bridle.errors import ConfigError, DataError, NonFiniteStep
from bridle.jobs.session import RunSettings, Stopped, open_session
from bridle.runs import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSettings:
    """How far a step may go."""

    clip: float = 0.2
    """> 0, clipping range."""
    per: Literal["token", "episode"] = "token"
    """what is averaged over."""
    whiten: bool = True
    """whiten the advantages."""

    def __post_init__(self) -> None:
        if self.clip <= 0:
            raise ConfigError.of("clip", self.clip, "a number above 0", "0.2 is usual")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyConfig:
    """A toy job."""

    env: str
    """what to learn."""
    run: RunSettings
    ppo: ClipSettings = field(default_factory=ClipSettings)
    steps: int = 3
    """≥ 1 steps."""
    betas: tuple[float, float] = (0.9, 0.999)
    """decay of both moments."""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A job ``toy`` that records its steps; ``failure``, if set, is raised at step 2."""
    module = ModuleType("bridle.jobs.toy")

    def run(config: ToyConfig, *, resume: bool = False, force: bool = False) -> Path:
        with open_session("toy", config, config.run, resume=resume, force=force) as session:
            for step in session.steps(config.steps):
                session.record(step, {"reward": step / 2})
                if step == 2 and module.failure is not None:
                    raise module.failure
                session.end_step(step, last=config.steps, save=lambda folder: (folder / "state").write_text("s"))
            return session.run.path

    module.__dict__.update(ToyConfig=ToyConfig, run=run, failure=None)
    monkeypatch.setitem(sys.modules, "bridle.jobs.toy", module)
    command = JobCommand(job="toy", config="ToyConfig", help="a toy", extra="language", positional="env")
    monkeypatch.setitem(COMMANDS, "toy", command)
    return module


Bridle = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bridle(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bridle:
    """Run the command line in an empty directory; exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        code = main(arguments)
        out, err = capsys.readouterr()
        return code, out, err

    return call


GOOD = ("toy", "Cart", "--run.dir", "r", "--run.quiet")


def test_elsewhere_than_on_posix_it_is_one_line(bridle: Bridle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridle.cli.main._POSIX", False)
    line = "bridle: bridle needs a POSIX system, such as Linux or macOS; on Windows run it in WSL\n"
    assert bridle("runs") == bridle("--help") == (2, "", line)


def test_a_job_runs_and_says_where(toy: ModuleType, bridle: Bridle) -> None:
    assert bridle(*GOOD, "--ppo.clip", "0.1", "--betas", "0.5", "0.75") == (0, "r\n", "")
    run = Run.open("r")
    assert (run.job, len(run.metrics())) == ("toy", 3)
    assert run.config["ppo"] == {"clip": 0.1, "per": "token", "whiten": True}
    assert run.config["env"] == "Cart"
    assert run.config["betas"] == [0.5, 0.75]


def test_the_positional_may_also_be_named(toy: ModuleType, bridle: Bridle) -> None:
    assert bridle("toy", "--run.dir=r", "--run.quiet", "--env", "Cart")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "a command is missing: one of quickstart, sft"),
        (("pppo",), "pppo is not a command of bridle; did you mean ppo?"),
        (("zzz",), "zzz is not a command of bridle; known: quickstart"),
        (("--zzz",), "--zzz is not a command"),
        (("toy",), "bridle toy needs --env and --run.dir; see `bridle toy --help`"),
        (("toy", "Cart"), "bridle toy needs --run.dir; see"),
        ((*GOOD, "--ppo.clpi", "1"), "--ppo.clpi is not an option of bridle toy; did you mean --ppo.clip?"),
        ((*GOOD, "--clip", "1"), "--clip is not an option of bridle toy; did you mean --ppo.clip?"),
        ((*GOOD, "--checkpoint_every=1"), "did you mean --run.checkpoint-every?"),
        (("toy", "Cart", "--rnu.dir", "r"), "--rnu.dir is not an option of bridle toy; did you mean --run.dir?"),
        ((*GOOD, "--zzzzz"), "--zzzzz is not an option of bridle toy; see `bridle toy --help`"),
        ((*GOOD, "--steps", "many"), "--steps: 'many' is not a whole number; see"),
        ((*GOOD, "--ppo.clip", "much"), "--ppo.clip: 'much' is not a number; see"),
        ((*GOOD, "--steps"), "--steps needs a value; see"),
        ((*GOOD, "--betas", "1"), "--betas"),
        ((*GOOD, "--ppo.per", "word"), "invalid choice 'word' for argument '--ppo.per'. Expected one of ('token',"),
        ((*GOOD, "--ppo.clip", "-1"), "ppo.clip=-1.0: expected a number above 0; 0.2 is usual"),
        ((*GOOD, "--run.threads", "0"), "run.threads=0: expected a whole number from 1 to 1024"),
        ((*GOOD, "stray"), "stray"),
        (("resume",), "bridle resume takes one path, not 0; for instance: bridle resume runs/first"),
        (("resume", "a", "b"), "takes one path, not 2"),
        (("resume", "nothing"), "nothing does not exist"),
        (("resume", "--steps"), "bridle resume takes the run first, then options"),
        (("runs", "nothing"), "nothing is not a directory"),
    ],
)
def test_every_mistake_is_one_line_and_writes_nothing(
    toy: ModuleType, bridle: Bridle, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = bridle(*arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("bridle: ")
    assert message in err
    assert not any(mark in err for mark in "│╭─")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_of_any_encoding_gets_the_same_line(
    toy: ModuleType, bridle: Bridle, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    _, _, err = bridle(*GOOD, "--steps", "many")
    assert err == "bridle: --steps: 'many' is not a whole number; see `bridle toy --help`\n"


def test_a_taken_directory_is_one_line(toy: ModuleType, bridle: Bridle) -> None:
    bridle(*GOOD)
    assert bridle(*GOOD) == (
        2,
        "",
        "bridle: r is not empty; pass --run.dir another path or `bridle resume r`\n",
    )


@pytest.mark.parametrize(
    ("failure", "code", "message"),
    [
        (DataError("data.jsonl line 3: no field prompt"), 2, "data.jsonl line 3: no field prompt"),
        (ConfigError("two\nlines"), 2, "two lines"),
        (DataError("\x1b[31mred\x1b[0m\x07 alert"), 2, "bridle: red alert\n"),
        (NonFiniteStep("loss", (1, 2)), 1, "loss is not finite; the optimiser step was not applied"),
        (Stopped("stopped after step 2; go on with: bridle resume r"), 130, "go on with: bridle resume r"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_exit_codes(
    toy: ModuleType, bridle: Bridle, failure: BaseException, code: int, message: str
) -> None:
    toy.failure = failure
    returned, out, err = bridle(*GOOD)
    assert (returned, out, err.count("\n")) == (code, "", 1)
    assert message in err


def test_our_own_mistakes_keep_their_traceback(toy: ModuleType, bridle: Bridle) -> None:
    toy.failure = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        bridle(*GOOD)


def interrupted(toy: ModuleType, bridle: Bridle) -> None:
    toy.failure = Stopped("stopped")
    assert bridle(*GOOD, "--run.checkpoint-every", "1")[0] == 130
    toy.failure = None


def test_resume_takes_the_settings_that_may_change_and_keeps_them(toy: ModuleType, bridle: Bridle) -> None:
    interrupted(toy, bridle)
    toy.failure = Stopped("stopped")
    options = ("--run.on-fault", "skip", "--run.fault-limit=7", "--run.keep-checkpoints", "1")
    assert bridle("resume", "r", *options)[0] == 130
    toy.failure = None
    assert bridle("resume", "r") == (0, "r\n", "")
    run = Run.open("r")
    for kept in (run.config, run.resolved):
        settings = kept["run"]
        assert isinstance(settings, dict)
        assert (settings["on_fault"], settings["fault_limit"], settings["keep_checkpoints"]) == ("skip", 7, 1)
    (event,) = [event for event in run.events() if event["kind"] == "settings"]
    assert event["text"] == (
        "goes on with run.keep_checkpoints=1 (was 2), run.on_fault=skip (was stop), run.fault_limit=7 (was 3)"
    )
    assert [row["step"] for row in run.metrics()] == [1, 2, 3]
    assert [checkpoint.step for checkpoint in run.checkpoints()] == [3]
    assert "forced" not in [event["kind"] for event in run.events()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--steps", "9"),
            "steps=9 is not what r was started with, so it would not go on as the same run to the bit; ",
        ),
        (("--ppo.clip", "0.3", "--run.on-fault", "skip"), "ppo.clip=0.3 is not what r was started with"),
        (("--run.seed", "1"), "run.seed=1 is not what r was started with"),
        (("--run.dir", "s"), "a run is taken up where it lies; to give r another place, move the folder"),
        (("--on-fault", "skip"), "--on-fault is not an option of bridle resume; did you mean --run.on-fault?"),
        (("--run.on-fault", "fly"), "invalid choice 'fly' for argument '--run.on-fault'"),
        (("--run.fault-limit", "-1"), "run.fault_limit=-1: expected a number of steps >= 0"),
        (("--run.quiet", "s"), "s"),
    ],
)
def test_resume_refuses_other_settings_by_name(
    toy: ModuleType, bridle: Bridle, options: tuple[str, ...], message: str
) -> None:
    interrupted(toy, bridle)
    before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
    code, out, err = bridle("resume", "r", *options)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err
    assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before


def test_a_run_is_made_longer_only_by_force_and_never_once_it_has_finished(toy: ModuleType, bridle: Bridle) -> None:
    interrupted(toy, bridle)
    assert bridle("resume", "r", "--force", "--steps", "5")[:2] == (0, "r\n")
    run = Run.open("r")
    assert [row["step"] for row in run.metrics()] == [1, 2, 3, 4, 5]
    (event,) = [event for event in run.events() if event["kind"] == "forced"]
    assert event["changes"] == ["steps=5 is another setting"]
    for force in ((), ("--force",)):
        code, _, err = bridle("resume", "r", "--steps", "9", *force)
        assert (code, err) == (
            2,
            "bridle: r has finished, so no setting changes it; what goes on from it is another run of its own\n",
        )


def test_resume_says_which_settings_may_change(toy: ModuleType, bridle: Bridle) -> None:
    code, out, _ = bridle("resume", "--help")
    assert code == 0
    for option in ("--force", "--run.on-fault", "--run.fault-limit", "--world.on-death", "--world.step-timeout"):
        assert option in out
    assert "--run.dir" not in out
    assert "--run.threads" not in out


def test_resume_goes_on_also_after_the_run_was_moved(toy: ModuleType, bridle: Bridle, tmp_path: Path) -> None:
    toy.failure = NonFiniteStep("loss", (1,))
    bridle(*GOOD, "--run.checkpoint-every", "1", "--ppo.clip", "0.1")
    toy.failure = None
    (tmp_path / "r").rename(tmp_path / "s")
    assert bridle("resume", "s") == (0, "s\n", "")
    assert [row["step"] for row in Run.open("s").metrics()] == [1, 2, 3]
    assert bridle("resume", "s") == (0, "s has finished; there is nothing to resume\n", "")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"job": "toy"', '"job": "tea"', "is a run of 'tea', unknown to this bridle"),
        ('"steps": 3', '"stteps": 3', "stteps is not a setting of ToyConfig; did you mean steps?"),
        ('"format": 1', '"format": 2', "of format 2, and this bridle reads 1; use a newer bridle"),
        ('"run": {', '"run": 3, "x": {', "lacks the run's settings"),
    ],
)
def test_resume_of_an_altered_config_is_one_line(
    toy: ModuleType, bridle: Bridle, tmp_path: Path, old: str, new: str, message: str
) -> None:
    toy.failure = NonFiniteStep("loss", (1,))
    bridle(*GOOD)
    path = tmp_path / "r" / "config.json"
    path.write_text(path.read_text().replace(old, new))
    code, out, err = bridle("resume", "r")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_runs_lists_every_run_with_its_state(toy: ModuleType, bridle: Bridle, tmp_path: Path) -> None:
    assert bridle("runs") == (0, "no runs under runs\n", "")
    bridle("toy", "Cart", "--run.dir", "runs/b/deep", "--run.quiet")
    toy.failure = NonFiniteStep("loss", (1,))
    bridle("toy", "Cart", "--run.dir", "runs/a [bold]", "--run.quiet")
    bridle("toy", "Cart", "--run.dir", "runs/c", "--run.quiet")
    (tmp_path / "runs" / "c" / "metrics.jsonl").write_text("{\n")
    code, out, err = bridle("runs")
    assert (code, err) == (0, "")
    header, first, second, third = (line.split() for line in out.splitlines())
    assert header[:4] == ["run", "job", "state", "step"]
    assert first == ["runs/a", "[bold]", "toy", "failed", "2", "reward", "1"]
    assert second == ["runs/b/deep", "toy", "finished", "3", "reward", "1.5"]
    assert third[:3] == ["runs/c", "?", "damaged"]
    assert bridle("runs", "runs/b")[1].count("\n") == 2


def test_garbage_is_looked_for_again_after_an_import() -> None:
    shown = "print(gc.isenabled(), gc.get_freeze_count() > 0)"
    program = f"import gc; from bridle.cli.main import main; main(['train', '--help']); {shown}"
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "True True"
    kept = program.replace("import gc;", "import gc; gc.disable();")
    told = subprocess.run([sys.executable, "-c", kept], capture_output=True, text=True, check=True).stdout
    assert told.splitlines()[-1] == "False False"  # who has switched it off has his way


def test_help_and_version(toy: ModuleType, bridle: Bridle) -> None:
    assert bridle("--version") == (0, f"bridle {__version__}\n", "")
    code, out, _ = bridle("--help")
    assert code == 0
    assert all(name in out for name in (*COMMANDS, "resume", "runs"))
    code, out, _ = bridle("toy", "--help")
    assert code == 0
    assert "clipping range" in out
    assert "usage: bridle toy ENV " in out
    assert bridle("resume", "--help")[0] == 0
    assert "runs [DIR]" in bridle("runs", "-h")[1]


def test_python_m_bridle_is_the_same_command_line() -> None:
    for words, code in ((["--version"], 0), (["nope"], 2)):
        done = subprocess.run([sys.executable, "-m", "bridle", *words], check=False, capture_output=True, text=True)
        assert done.returncode == code
    assert done.stderr.startswith("bridle: nope is not a command")


def test_a_missing_extra_is_one_line(bridle: Bridle, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> ModuleType:
        raise ModuleNotFoundError(f"No module named {name!r}", name="transformers.models")

    monkeypatch.setattr("bridle.cli.main.import_module", absent)
    code, _, err = bridle("ppo")
    assert (code, err) == (2, "bridle: transformers.models is not installed; pip install 'bridle[language]'\n")


def test_a_missing_module_of_our_own_is_a_bug(bridle: Bridle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMMANDS, "toy", JobCommand(job="no_such_job", config="X", help="", extra="language"))
    with pytest.raises(ModuleNotFoundError, match="no_such_job"):
        bridle("toy")


def test_help_does_not_import_torch_and_a_closed_pipe_is_quiet() -> None:
    script = (
        "import sys; from bridle.cli.main import main; code = main(['--help']); "
        "assert not {'torch', 'transformers', 'tyro', 'gymnasium'} & set(sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        done = subprocess.run([sys.executable, "-c", script], check=False, stdout=closed, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (141, b"")
