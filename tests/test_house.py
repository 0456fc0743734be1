"""The house rules that a machine can check: which way imports point, what is never used, what stays small.

The rooms and their directions are those of docs/ARCHITECTURE.md.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "bridle"
CODE = [path for top in ("src", "recipes", "bench", "scripts", "docs") for path in sorted((ROOT / top).rglob("*.py"))]

LEAVES = {"errors", "random"}
WORLDLESS = LEAVES | {"core", "batch", "learn"}
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "random": set(),
    "native": set(),
    "guards": set(),
    "core": set(),
    "batch": {"core"},
    "learn": WORLDLESS,
    "control": WORLDLESS | {"native", "guards"},
    "language": WORLDLESS | {"native", "guards"},
    "quickstart": WORLDLESS | {"language"},
    "runs": LEAVES,
    "report": {"errors", "runs"},
    "jobs": WORLDLESS | {"control", "language", "quickstart", "runs"},
    "cli": {"errors", "runs", "report", "jobs"},
}
"""Which rooms each room may import, besides itself."""

STANDARD = set(sys.stdlib_module_names)
OUTSIDE: dict[str, set[str]] = {
    "errors": STANDARD,
    "random": STANDARD | {"numpy", "torch"},
    "native": STANDARD | {"torch"},
    "guards": STANDARD | {"torch"},
    "core": STANDARD | {"torch", "jaxtyping"},
    "batch": STANDARD | {"torch", "jaxtyping"},
    "runs": STANDARD | {"torch", "orjson", "safetensors", "wandb"},
    "cli": STANDARD | {"tyro", "rich"},
}
"""What a room may import from outside; rooms not named are free but for FORBIDDEN."""

FORBIDDEN: dict[str, set[str]] = {
    "learn": {"transformers", "tokenizers", "datasets", "gymnasium", "tyro", "rich"},
    "control": {"transformers", "tokenizers", "datasets", "tyro", "rich"},
    "language": {"gymnasium", "tyro", "rich"},
    "quickstart": {"gymnasium", "tyro"},
}

UNPICKLING = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def room_of(path: Path) -> str:
    """The room a file of the package belongs to; its own __init__ is the room ``bridle``, its __main__ the door of ``cli``."""
    first = path.relative_to(PACKAGE).parts[0]
    if first == "__main__.py":
        return "cli"
    return "bridle" if first == "__init__.py" else first.removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, wherever in the file, with its line; ``from a import b`` counts as a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the room they come from"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def import_faults(room: str, tree: ast.AST) -> list[str]:
    """What a file of ``room`` imports and must not, as ``line: module``."""
    faults = []
    for line, module in imports(tree):
        top, *rest = module.split(".")
        if top == "bridle":
            inner = rest[0] if rest else ""
            wrong = inner != room and inner not in ROOMS[room] and not (room == "cli" and inner == "__version__")
        else:
            wrong = top in FORBIDDEN.get(room, set()) or top not in OUTSIDE.get(room, {top})
        if wrong and module != "__future__.annotations":
            faults.append(f"{line}: {module}")
    return faults


def call_faults(tree: ast.AST) -> list[str]:
    """Everything in a file that could run code out of a data file or a model folder, as ``line: what``."""
    faults = [f"{line}: {name}" for line, name in imports(tree) if name.split(".")[0] in UNPICKLING]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Name) and function.id in ("eval", "exec", "__import__"):
            faults.append(f"{node.lineno}: {function.id}(")
        if isinstance(function, ast.Attribute) and ast.unparse(function) in (
            "torch.load",
            "torch.save",
            "torch.hub.load",
        ):
            faults.append(f"{node.lineno}: {ast.unparse(function)}(")
        unsafe = (word for word in node.keywords if word.arg in ("trust_remote_code", "allow_pickle"))
        faults += [f"{node.lineno}: {word.arg}=" for word in unsafe if ast.unparse(word.value) != "False"]
    return faults


def test_every_file_belongs_to_a_known_room() -> None:
    assert {room_of(path) for path in PACKAGE.rglob("*.py")} <= {*ROOMS, "bridle"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_one_way(room: str) -> None:
    faults = [
        f"{path.relative_to(ROOT)}:{fault}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if room_of(path) == room
        for fault in import_faults(room, ast.parse(path.read_text()))
    ]
    assert not faults


@pytest.mark.parametrize(
    ("room", "code"),
    [
        ("core", "import numpy"),
        ("core", "from bridle.errors import ConfigError"),
        ("core", "def f():\n    from bridle import learn"),
        ("learn", "from bridle.language.chat import x"),
        ("control", "import bridle.language"),
        ("control", "import transformers.models"),
        ("language", "if True:\n    from gymnasium import spaces"),
        ("native", "import numpy"),
        ("runs", "from bridle.batch import Batch"),
        ("runs", "import rich"),
        ("report", "from bridle.jobs.session import Session"),
        ("cli", "from bridle.control import World"),
        ("cli", "import torch"),
    ],
)
def test_the_import_check_sees_a_wrong_import(room: str, code: str) -> None:
    assert import_faults(room, ast.parse(code))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_or_evaluated(path: Path) -> None:
    assert not call_faults(ast.parse(path.read_text()))


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "eval('1')",
        "f(trust_remote_code=True)",
        "f(trust_remote_code=flag)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_check_for_unpickling_sees_it(code: str) -> None:
    assert call_faults(ast.parse(code))
    assert not call_faults(ast.parse("model.eval(); f(trust_remote_code=False)"))


@pytest.mark.parametrize("path", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_stay_readable(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500


def project_files() -> Iterator[Path]:
    """Every text file of the project, without what is built or made by runs."""
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            yield path
    for top in ("src", "tests", "docs", "recipes", "bench", "scripts", ".ci"):
        for path in (ROOT / top).rglob("*"):
            if path.is_file() and not {"__pycache__", "runs"} & set(path.relative_to(ROOT / top).parent.parts[:1]):
                yield path


MACHINE_PATH = re.compile(r"(?<![\w./:$}*-])/(?:" + "|".join(("work", "root", "home", "tmp", "mnt", "Users")) + r")\b")
REGISTRY = re.compile("|".join(("pypi" + r"\.org", "download.pytorch" + r"\.org", "--(extra-)?index" + "-url")))


def test_no_file_knows_a_machine_or_a_package_registry() -> None:
    faults = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found = MACHINE_PATH.search(text) or REGISTRY.search(text)
        if found is not None:
            faults.append(f"{path.relative_to(ROOT)}: {found.group()}")
    assert not faults


def test_the_check_for_machine_paths_sees_one_and_leaves_addresses_alone() -> None:
    assert MACHINE_PATH.search("see " + "/ho" + "me/someone/file")
    assert not MACHINE_PATH.search("https://example.org/home/page and either/work/or")


def imported_with(statement: str, blocked: tuple[str, ...]) -> str:
    """Import in a fresh process where ``blocked`` packages are not to be had; its error output."""
    script = f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n{statement}"
    return subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True).stderr


def test_the_package_and_the_control_job_work_without_the_language_extra() -> None:
    blocked = ("transformers", "tokenizers", "datasets", "jinja2")
    assert (
        imported_with("import bridle, bridle.jobs.control; [getattr(bridle, n) for n in bridle.__all__]", blocked) == ""
    )


def test_the_language_jobs_work_without_gymnasium() -> None:
    jobs = ("ppo", "sft", "reward", "evaluate", "quickstart")
    there = [f"bridle.jobs.{job}" for job in jobs if (PACKAGE / "jobs" / f"{job}.py").exists()]
    assert imported_with(f"import {', '.join(there)}", ("gymnasium",)) == ""


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert (
        imported_with("import bridle, bridle.cli.main, bridle.runs", ("torch", "numpy", "transformers", "rich")) == ""
    )
