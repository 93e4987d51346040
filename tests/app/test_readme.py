"""Layer: the README. Its Python runs, and its commands are ones that the command line takes."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from fusemesh import cli

README = (Path(__file__).resolve().parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
PYTHON = [text for language, text in BLOCKS if language == "python"]
LINES = [line.split("#")[0].strip() for language, text in BLOCKS if not language for line in text.splitlines()]


def commands(start: str) -> list[str]:
    return [line for line in LINES if line.startswith(start)]


def test_there_are_some_of_each() -> None:
    assert len(PYTHON) >= 2 and len(commands("fusemesh ")) >= 6


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("command", commands("fusemesh "))
def test_command_lines(command: str) -> None:
    options = cli._parser().parse_args(shlex.split(command)[1:])
    assert options.name in command


@pytest.mark.parametrize("target", commands("make "))
def test_make_targets(target: str) -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    assert re.search(rf"^{target.split()[1]}:", makefile, re.MULTILINE)


def test_the_table_of_environment_variables_is_whole() -> None:
    from fusemesh.kernels import env

    assert set(re.findall(r"FUSEMESH_[A-Z]+", README)) >= set(re.findall(r"FUSEMESH_[A-Z]+", env.__doc__ or ""))
