"""The commands that README and docs print are understood, with every option and key that they name."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from slingshot.cli import main
from slingshot.stages.kinds import STAGES, StageKind

ROOT = Path(__file__).parents[2]
VARIABLES = {"seed": "0", "budget": "64", "form": ""}  # of the shell, in loops
GIVEN = {"RECIPE": "tiny", "my.toml": "tiny"}  # what the reader has


def printed(text):
    """What stands in blocks of code behind `slingshot`, as the shell would part it."""
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r";\s|\s&&\s|\s\|\s", line):
                if found := re.match(r"(?:for .*; do |.*/)?slingshot (.*)", part.strip()):
                    filled = re.sub(r"\$(\w+)", lambda name: VARIABLES[name[1]], found[1])
                    yield [GIVEN.get(word, word) for word in shlex.split(filled.split(" [--")[0], comments=True)]


COMMANDS = [
    pytest.param(words, id=f"{file.name} {' '.join(words)[:60]}")
    for file in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    for words in printed(file.read_text(encoding="utf-8"))
]


class Understood(Exception):
    """In the place of the work."""


@pytest.mark.parametrize("words", COMMANDS)
def test_a_printed_command_is_understood(words, monkeypatch):
    def work(*_):
        raise Understood

    monkeypatch.setattr(StageKind, "run", work)
    monkeypatch.setattr(main, "run_recipe", work)
    if words[0] in {"run", *STAGES} - {"convert"}:
        with pytest.raises(Understood):
            main.app(words, standalone_mode=False)
        return
    group = get_command(main.app)
    with group.make_context("slingshot", list(words)) as context:
        name, command, rest = group.resolve_command(context, list(words))
        while hasattr(command, "commands"):
            context = command.make_context(name, list(rest), parent=context)
            name, command, rest = command.resolve_command(context, list(rest))
        command.make_context(name, list(rest), parent=context)
