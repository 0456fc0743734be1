"""Judges that are a user's Python function: one score per answer, or the K answers to one prompt together."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
import weakref
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn, cast

import numpy as np
from torch import Tensor

from bridle.errors import ConfigError, ScorerError
from bridle.language.scorers.answers import JSON, LARGEST_SCORE, Answers, Scores
from bridle.language.scorers.asking import JudgingSettings, Mishap, Worker, ask

__all__ = ["FunctionScorer", "GroupScorer", "centred_ranks", "load_function"]

Judge = Callable[..., object]

ONCE = JudgingSettings(timeout=None, retries=0)
"""Ask in the caller's thread, once."""


class FunctionScorer:
    """A Python function as a judge: ``score(prompts, completions, **columns) -> one number per answer``, sync or async.

    ``spec`` is ``module:function`` (the working directory is searched too) or ``file.py:function``. Columns of the data
    are passed by name, and only those that the function accepts. It may return a list, a tuple, a NumPy array or a
    tensor of shape [B]; True and False count as 1 and 0, so a verifier may return its verdicts.

    Raises :class:`ScorerError` where the function cannot be found, raises, or returns anything but B finite numbers.
    """

    def __init__(
        self,
        spec: str,
        *,
        name: str | None = None,
        judging: JudgingSettings = ONCE,
        mishaps: list[Mishap] | None = None,
    ) -> None:
        """``judging`` says what follows a failure, ``mishaps`` is where each is noted; by default it is asked once."""
        self.name = name or spec.rpartition(":")[2]
        self._judging = judging
        self._mishaps = [] if mishaps is None else mishaps
        self._call = _Caller(spec, "score(prompts, completions, **columns)", judging)

    def require(self, columns: Collection[str]) -> None:
        """Refuse data that lack a column which the function cannot do without; raises :class:`ScorerError`."""
        self._call.require(columns)

    def __call__(self, answers: Answers) -> Scores:
        """Judge every answer in one call of the function."""
        columns = self._call.accepted(answers.columns)
        sizes = [len(answers)]

        def call(_: Sequence[int]) -> dict[int, list[float | None] | ScorerError]:
            outcomes = self._call.many([([*answers.prompts], [*answers.completions], columns)])
            return {0: _read(self._call.spec, outcomes[0], len(answers), lenient=self._judging.on_failure == "drop")}

        (values,) = ask(self.name, self._judging, sizes, call, self._mishaps.append)
        return _scores(self.name, values)


class GroupScorer:
    """A Python function that sees the K answers to one prompt together: ``rank(prompt, completions, **columns)``.

    A column is passed as the prompt's one value. With ``kind="scores"`` the function returns K numbers, higher is
    better; with ``kind="ranks"`` the place of each answer, lower is better, of which only the order counts (see
    :func:`centred_ranks`). An async function is called for all prompts concurrently.

    Raises :class:`ScorerError` as :class:`FunctionScorer` does.
    """

    def __init__(
        self,
        spec: str,
        *,
        kind: Literal["scores", "ranks"] = "scores",
        name: str | None = None,
        judging: JudgingSettings = ONCE,
        mishaps: list[Mishap] | None = None,
    ) -> None:
        """See :class:`FunctionScorer`; where one answer of a group has no score, the group is asked about again, or dropped."""
        if kind not in ("scores", "ranks"):
            raise ConfigError.of("kind", kind, "'scores' or 'ranks'")
        self.name = name or spec.rpartition(":")[2]
        self.kind = kind
        self._judging = judging
        self._mishaps = [] if mishaps is None else mishaps
        self._call = _Caller(spec, "rank(prompt, completions, **columns)", judging)

    def require(self, columns: Collection[str]) -> None:
        """Refuse data that lack a column which the function cannot do without; raises :class:`ScorerError`."""
        self._call.require(columns)

    def __call__(self, answers: Answers) -> Scores:
        """Judge group after group, in the order in which the groups appear."""
        members: dict[int, list[int]] = {}
        for position, group in enumerate(answers.groups):
            members.setdefault(group, []).append(position)
        accepted = self._call.accepted(answers.columns)
        calls = []
        for positions in members.values():
            columns = {name: values[positions[0]] for name, values in accepted.items()}
            calls.append((answers.prompts[positions[0]], [answers.completions[i] for i in positions], columns))
        sizes = [len(positions) for positions in members.values()]

        def call(which: Sequence[int]) -> dict[int, list[float | None] | ScorerError]:
            outcomes = self._call.many([calls[i] for i in which])
            pairs = zip(which, outcomes, strict=True)
            return {i: _read(self._call.spec, outcome, sizes[i], lenient=False) for i, outcome in pairs}

        total: list[float | None] = [None] * len(answers)
        rows = ask(self.name, self._judging, sizes, call, self._mishaps.append)
        for positions, row in zip(members.values(), rows, strict=True):
            values = [value for value in row if value is not None]
            if len(values) < len(row):
                continue
            scores = centred_ranks(values) if self.kind == "ranks" else values
            for position, score in zip(positions, scores, strict=True):
                total[position] = score
        return _scores(self.name, total)


def centred_ranks(ranks: Sequence[float]) -> list[float]:
    """Turn places (lower is better) into evenly spaced scores around 0: s_i = 1 − 2·place_i/(K − 1), best 1, worst −1.

    place_i counts the answers strictly before i plus half of those tied with it, so ties share their mean score; a
    single answer gets 0.
    """
    k = len(ranks)
    if k == 1:
        return [0.0]
    places = [sum(other < rank for other in ranks) + (sum(other == rank for other in ranks) - 1) / 2 for rank in ranks]
    return [1.0 - 2.0 * place / (k - 1) for place in places]


class _Caller:
    """A user's function with its signature: which columns it takes, and how it is called and its failures told."""

    def __init__(self, spec: str, form: str, judging: JudgingSettings) -> None:
        self.spec = spec
        self._function = load_function(spec)
        self._worker = Worker(judging.timeout)
        self._timeout = judging.timeout
        weakref.finalize(self, self._worker.close).atexit = False  # then a call may be under way
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except (TypeError, ValueError) as error:
            raise ScorerError(f"{spec}: its signature cannot be read; write it as {form}") from error
        positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(positional) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
            raise ScorerError(f"{spec} takes {len(positional)} positional arguments; write it as {form}")
        self._any_column = any(p.kind is p.VAR_KEYWORD for p in parameters)
        self._taken = {p.name for p in positional[:2]}
        rest = positional[2:] + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        self._named = {p.name for p in rest}
        self._required = [p.name for p in rest if p.default is p.empty]

    def require(self, columns: Collection[str]) -> None:
        missing = [name for name in self._required if name not in columns]
        if missing:
            have = ", ".join(sorted(columns)) or "none"
            raise ScorerError(
                f"{self.spec} needs the column {missing[0]!r}, the data's columns are: {have};"
                " add the column or give the argument a default"
            )

    def accepted(self, columns: Mapping[str, list[JSON]]) -> dict[str, list[JSON]]:
        self.require(columns)
        return {
            name: [*values]
            for name, values in columns.items()
            if name in self._named or (self._any_column and name not in self._taken)
        }

    def many(self, calls: Sequence[tuple[object, list[str], Mapping[str, object]]]) -> list[object]:
        """Call the function for each (first, second, columns); return its results, and a ScorerError where it failed.

        Awaitable results are awaited together. What was not done in time counts as failed; what was, stays.
        """
        found: list[object] = [_LATE] * len(calls)

        def work() -> None:
            waiting: dict[int, Awaitable[object]] = {}
            for number, (first, second, columns) in enumerate(calls):
                try:
                    result = self._function(first, second, **columns)
                except (
                    Exception,
                    SystemExit,
                    asyncio.CancelledError,
                ) as error:  # the user's to mend
                    found[number] = self._failure(error)
                    continue
                if inspect.isawaitable(result):
                    waiting[number] = result
                else:
                    found[number] = result
            settled = self._worker.gather(list(waiting.values())) if waiting else []
            for number, result in zip(waiting, settled, strict=True):
                found[number] = self._failure(result) if isinstance(result, BaseException) else result

        self._worker.run(work, takes_leave=inspect.iscoroutinefunction(inspect.unwrap(self._function)))
        late = ScorerError(f"{self.spec} was not done after {self._timeout} seconds; see --reward.judging.timeout")
        return [late if result is _LATE else result for result in list(found)]

    def _failure(self, error: BaseException) -> ScorerError:
        if isinstance(error, TimeoutError) and not error.args:
            return ScorerError(f"{self.spec} was not done after {self._timeout} seconds; see --reward.judging.timeout")
        return _told(self.spec, error, inspect.getsourcefile(inspect.unwrap(self._function)))


_LATE = object()
"""Stands where a result is not there yet."""


def _told(what: str, error: BaseException, home: str | None = None) -> ScorerError:
    """Tell what the user's code raised, and where: the innermost line of the file ``home``, or of any file."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    frames = [frame for frame in frames if frame.filename not in (__file__, importlib.__file__)]
    frames = [frame for frame in frames if frame.filename == home] or frames
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    text = " ".join(str(error).split())[:400]
    told = ScorerError(f"{what} raised {type(error).__name__}: {text}{place}")
    told.__cause__ = error
    return told


def _raised(what: str, error: BaseException) -> NoReturn:
    raise _told(what, error) from error


def _scores(name: str, values: Sequence[float | None]) -> Scores:
    """Put NaN where no judge gave a score; those answers are named, so that nobody takes them for scored."""
    dropped = frozenset(position for position, value in enumerate(values) if value is None)
    total = [math.nan if value is None else value for value in values]
    return Scores(total=total, components={name: total}, dropped=dropped)


def _read(spec: str, result: object, count: int, *, lenient: bool) -> list[float | None] | ScorerError:
    """Read one call's result; with ``lenient``, what is no finite number is None where the others are."""
    if isinstance(result, ScorerError):
        return result
    try:
        items = _items(spec, result, count)
        if not lenient:
            return [_number(spec, item, position) for position, item in enumerate(items)]
    except ScorerError as error:
        return error
    values: list[float | None] = []
    for position, item in enumerate(items):
        try:
            values.append(_number(spec, item, position))
        except ScorerError:
            values.append(None)
    return values


def _items(spec: str, result: object, count: int) -> list[object]:
    """Read what a user's function returned as ``count`` things."""
    if isinstance(result, (Tensor, np.ndarray)):
        if len(result.shape) != 1:
            raise ScorerError(f"{spec} returned an array of shape {tuple(result.shape)}; expected [{count}]")
        items = cast("list[object]", result.tolist())
    elif isinstance(result, (list, tuple)):
        items = [*result]
    else:
        raise ScorerError(f"{spec} returned {_shown(result)}; expected a list of {count} numbers, one per answer")
    if len(items) != count:
        raise ScorerError(f"{spec} returned {len(items)} scores for {count} answers; return one number per answer")
    return items


def _number(spec: str, item: object, position: int) -> float:
    value = item.item() if isinstance(item, np.generic) or (isinstance(item, Tensor) and item.numel() == 1) else item
    if not isinstance(value, numbers.Real):
        raise ScorerError(f"{spec} returned {_shown(item)} for answer {position}; expected a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ScorerError(f"{spec} returned {_shown(item)} for answer {position}; expected a finite number")
    if abs(number) > LARGEST_SCORE:
        raise ScorerError(
            f"{spec} returned {_shown(item)} for answer {position}; expected a number from −{LARGEST_SCORE:g} to "
            f"{LARGEST_SCORE:g}, beyond which float32 does not learn"
        )
    return number


def _shown(value: object) -> str:
    try:
        text = " ".join(repr(value).split())
    except Exception as error:  # a user's class may fail to show itself
        text = f"something whose repr raises {type(error).__name__}"
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def load_function(spec: str) -> Judge:
    """Import the function named by ``module:function`` or ``file.py:function``.

    Modules are looked for where Python looks, and then in the working directory. Raises :class:`ScorerError` with what
    exists instead where the module or the function does not.
    """
    where, colon, attribute = spec.rpartition(":")
    if not colon or not where or not attribute.isidentifier():
        raise ScorerError(f"{spec!r} does not name a function; write module:function or file.py:function")
    module = _load_file(spec, Path(where)) if where.endswith(".py") else _load_module(spec, where)
    found = module.__dict__.get(attribute)
    if found is None:
        names = [name for name, value in vars(module).items() if inspect.isroutine(value) and not name.startswith("_")]
        own = [name for name in names if getattr(module.__dict__[name], "__module__", None) == module.__name__]
        raise ScorerError(f"{where} has no function {attribute!r}; it has: {', '.join(sorted(own)) or 'none'}")
    if not callable(found):
        raise ScorerError(f"{spec} is {_shown(found)}, which cannot be called; name a function")
    return cast("Judge", found)


def _load_module(spec: str, where: str) -> ModuleType:
    with _searching(Path.cwd()):
        try:
            return importlib.import_module(where)
        except ModuleNotFoundError as error:
            if error.name is None or (where != error.name and not where.startswith(error.name + ".")):
                _raised(f"importing {where!r}", error)
            here = ", ".join(sorted(path.name for path in Path.cwd().glob("*.py"))[:8]) or "none"
            raise ScorerError(
                f"no module {where!r} for {spec!r}; Python files in the working directory: {here}"
            ) from error
        except (
            Exception,
            SystemExit,
            asyncio.CancelledError,
        ) as error:  # a module runs the user's code when it is imported
            _raised(f"importing {where!r}", error)


def _load_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        here = ", ".join(sorted(other.name for other in path.parent.glob("*.py"))[:8]) or "none"
        raise ScorerError(f"no file {str(path)!r} for {spec!r}; Python files in that folder: {here}")
    name = f"_scorer_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ScorerError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and type hints look their module up here
    with _searching(path.parent.resolve()):
        try:
            found.loader.exec_module(module)
        except (Exception, SystemExit, asyncio.CancelledError) as error:  # as above
            _raised(f"importing {str(path)!r}", error)
    return module


@contextmanager
def _searching(folder: Path) -> Iterator[None]:
    """Let imports look into ``folder`` last."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
