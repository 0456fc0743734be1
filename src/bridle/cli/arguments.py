"""Options out of a settings class, by tyro; its boxed complaints become one line that says how to mend it."""

from __future__ import annotations

import dataclasses
import io
import re
import typing
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr
from difflib import get_close_matches
from typing import Any, TypeVar

import tyro

from bridle.errors import UserError
from bridle.jobs.config import require_sane

__all__ = ["Option", "first_look", "options_of", "parse"]

T = TypeVar("T")

_ALWAYS = ("-h", "--help")
_BORDER = re.compile(r"^[│|] ?| ?[│|]$")
_RULE = re.compile(r"[─-]*")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One option of a command."""

    name: str
    """as it is written, ``--ppo.clip``."""
    required: bool
    """True if it has no default."""
    negation: str | None
    """``--run.no-quiet`` for a switch."""


def options_of(config_class: type[Any], *, prefix: str = "", defaulted: bool = False) -> Iterator[Option]:
    """List the options that tyro makes of a settings class: one for each field, nested classes with a dot."""
    hints = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        optional = (
            defaulted or field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        )
        hint, name = hints[field.name], field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            yield from options_of(hint, prefix=f"{prefix}{name}.", defaulted=optional)
        else:
            negation = f"--{prefix}no-{name}" if hint is bool else None
            yield Option(name=f"--{prefix}{name}", required=not optional, negation=negation)


def parse(
    config_class: type[T],
    arguments: Sequence[str],
    *,
    program: str,
    positional: str | None = None,
    default: T | None = None,
) -> T:
    """Build ``config_class`` from the command line.

    ``positional`` is the option whose name may be left out if its value comes first; ``default`` holds what options that are
    not given stand at, instead of the class's own defaults. Raises :class:`UserError` in one
    line for whatever is wrong; ``--help`` prints and raises ``SystemExit(0)``.
    """
    if positional is not None and arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    complaint = io.StringIO()
    try:
        with redirect_stderr(complaint):
            usage = program if positional is None else f"{program} {positional.upper()}"
            config: T = tyro.cli(config_class, prog=usage, args=list(arguments), default=default)  # type: ignore[assignment]
    except SystemExit as leave:
        if not leave.code:
            raise
        options = list(options_of(config_class, defaulted=default is not None))
        raise _diagnose(options, config_class.__name__, arguments, program, complaint.getvalue(), leave) from None
    require_sane(config)
    return config


def first_look(config_class: type[T], arguments: Sequence[str], *, positional: str) -> T | None:
    """Read the few options of ``config_class`` among many others; None where they cannot be read, or help is asked for."""
    if any(argument in _ALWAYS for argument in arguments):
        arguments = [argument for argument in arguments if argument not in _ALWAYS]
    if arguments and not arguments[0].startswith("-"):
        arguments = [f"--{positional}", *arguments]
    try:
        with redirect_stderr(io.StringIO()):
            return tyro.cli(config_class, args=list(arguments), return_unknown_args=True)[0]
    except SystemExit:
        return None  # the whole parse says what is wrong


def _diagnose(
    options: Sequence[Option], outermost: str, arguments: Sequence[str], program: str, complaint: str, leave: SystemExit
) -> UserError:
    names = [option.name for option in options] + [option.negation for option in options if option.negation]
    given = [argument.partition("=")[0].replace("_", "-") for argument in arguments if argument.startswith("--")]
    help_line = f"see `{program} --help`"
    for name in given:
        if name not in names and name not in _ALWAYS:
            near = _nearest(name, names)
            return UserError(
                f"{name} is not an option of {program}; " + (f"did you mean {near}?" if near else help_line)
            )
    refusal = _user_error_behind(leave)
    if refusal is not None:
        return _with_group(refusal, complaint, outermost)
    missing = [option.name for option in options if option.required and option.name not in given]
    if missing:
        *others, last = missing
        named = f"{', '.join(others)} and {last}" if others else last
        return UserError(f"{program} needs {named}; {help_line}")
    return UserError(f"{_condense(complaint)}; {help_line}")


def _nearest(name: str, names: Sequence[str]) -> str | None:
    """Find the option meant: a slip of the pen, or the last part of a name without its group."""
    end = _end(name)
    same = [known for known in names if _end(known) == end]
    alike = [known for known in names if get_close_matches(end, [_end(known)], 1)]
    near = same or get_close_matches(name, alike, 1, cutoff=0.75)
    return near[0] if near else None


def _end(name: str) -> str:
    return name.removeprefix("--").rpartition(".")[2]


def _user_error_behind(leave: SystemExit) -> UserError | None:
    """Find the error that a settings class raised about its values, which tyro has put in a box."""
    link: BaseException | None = leave
    while link is not None:
        if isinstance(link, UserError):
            return link
        link = link.__context__
    return None


def _with_group(refusal: UserError, complaint: str, outermost: str) -> UserError:
    """Put the group before a field (``clip=…`` becomes ``ppo.clip=…``) as it is written on the command line.

    ``outermost`` is the name of the settings class itself, which is no group.
    """
    group = re.search(r"Error parsing ([\w.-]+):", complaint)
    field = re.match(r"\w+=", str(refusal))
    if group is None or field is None or group[1] == outermost:
        return refusal
    return type(refusal)(f"{group[1]}.{refusal}")


def _condense(complaint: str) -> str:
    """Take tyro's box apart, drawn or in ASCII: the text between its title and the next rule, in one line."""
    words: list[str] = []
    for line in complaint.splitlines()[1:]:
        text = _BORDER.sub("", line).strip()
        if not _RULE.fullmatch(text):
            words.append(text)
        elif words:
            break
    text = " ".join(words).removeprefix("Error parsing ").rstrip(".")
    text = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number", text)
    text = re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)
    text = re.sub(r"no type matching \{None\}\|(\w+) could be instantiated from \['(.*)'\]", _no_member, text)
    return re.sub(r"Missing value for argument '(.*)'\. Expected (\d+) values", r"\1 needs a value", text)


def _no_member(found: re.Match[str]) -> str:
    return f"{found[2]!r} is not a {'whole number' if found[1] == 'INT' else 'number'}"
