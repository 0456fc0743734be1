"""Every `bridle train` command that the pages show is one whose settings work together."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from bridle.cli.arguments import first_look, parse
from bridle.jobs.control import ControlConfig, Start

HERE = Path(__file__).parents[2]


def commands() -> list[str]:
    lines = [
        line.strip()
        for page in ("README.md", "docs/CONTROL.md")
        for line in (HERE / page).read_text("utf-8").splitlines()
    ]
    return sorted({" ".join(shlex.split(line, comments=True)) for line in lines if line.startswith("bridle train ")})


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_pages_can_be_given(command: str) -> None:
    arguments = command.split()[2:]
    if "LunarLander" in command:
        pytest.importorskip("Box2D")
    start = first_look(Start, arguments, positional="env")
    assert start is not None
    config = parse(ControlConfig, arguments, program="bridle train", positional="env", default=start.settings())
    assert config.env == arguments[0]
    assert config.preset in (config.env, "atari")


def test_there_are_such_commands() -> None:
    assert len(commands()) >= 4
