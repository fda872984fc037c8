"""The commands in the READMEs are commands: every flag is there and takes its value, every file named is there."""

import re
import shlex
from pathlib import Path

import pytest
from conftest import ROOT, load_program

import cli

FOLDERS = (".", "benchmarks", "checkpoints", "sweeps", "sweepserver")
PAGES = [path for folder in FOLDERS for path in (ROOT / folder).glob("*.md")]
COMMAND = re.compile(r"^\s*(python (?:train|test|sweep|export|benchmarks/\w+)\.py .*)$", re.MULTILINE)


def commands() -> list[str]:
    """Those that stand on a line of their own, without the comment behind them; a `\\` at its end goes on."""
    found = [c for page in PAGES for c in COMMAND.findall(page.read_text().replace("\\\n", " "))]
    return list(dict.fromkeys(shlex.join(shlex.split(command, comments=True)) for command in found))


@pytest.mark.parametrize("command", commands())
def test_a_command_can_be_given(command, monkeypatch):
    _, program, *argv = shlex.split(command)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = load_program(program, f"readme_{Path(program).stem}")
    cli.parse(module.Settings, "", argv[: argv.index("--")] if "--" in argv else argv)


def test_there_are_commands_and_the_files_they_link_to():
    assert len(commands()) > 20
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"
