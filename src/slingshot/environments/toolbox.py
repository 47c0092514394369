"""Tools by name, held in a worker process that may die or hang without taking anybody along.

box = toolbox(["calculator", "search:notes", "mcp:npx -y server", "mine.py:lookup"])      # the worker's target
worker = Worker()
tools = worker.call(box, "schemas")
ask(worker, box, "calculator", '{"expression": "6*7"}')     # "42"; whatever fails is text too
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean, unknown_name
from slingshot.environments.calculator import Calculator
from slingshot.environments.mcp_server import McpServer
from slingshot.environments.own_functions import own_functions
from slingshot.environments.python_program import PythonProgram
from slingshot.environments.search import FolderSearch
from slingshot.environments.tool import SECONDS, Tool, answer, failure, schema
from slingshot.sandbox.worker import SandboxError, Target, Worker

TOOLS = {
    "calculator": "exact arithmetic on whole numbers, decimals and fractions",
    "python": "runs a program in the sandbox and returns what it prints",
    "search:FOLDER": "finds passages in a folder of text files",
    "mcp:COMMAND": "the tools of an MCP server that COMMAND starts, or mcp:URL of one that runs",
    "file.py:NAME": "your own: a function of a Python file, or file.py of one with TOOLS = [...]",
}
_MARGIN = 20.0  # seconds beside a call's own, for an MCP server to be started again


def toolbox(specs: Sequence[str]) -> Target:
    """What a worker builds and calls; paths are made whole, for a worker is elsewhere."""
    where = "slingshot.environments.toolbox:Toolbox"
    return Target(where, (list(map(_whole, specs)),), timeout=SECONDS + _MARGIN, memory=4 << 30)


def ask(worker: Worker, box: Target, name: str, arguments: str) -> str:
    """What a tool says; where it takes the worker along, what became of it. What has no name is no call."""
    if not name:
        return failure(f"this is no call of a tool: {arguments}")
    try:
        return str(worker.call(box, "call", name, arguments))
    except SandboxError as error:
        return failure(f"{name} {error}")


class Toolbox:
    """The worker's side: the tools by their names. Raises SlingshotError for one that is unknown or does not start."""

    def __init__(self, specs: Sequence[str]) -> None:
        tools = [tool for spec in specs for tool in _open(spec)]
        names = Counter(tool.name for tool in tools)
        if several := [name for name, count in names.items() if count > 1]:
            raise SlingshotError(f"tools: {names[several[0]]} of them are called {several[0]}; leave out all but one")
        self._tools: dict[str, Tool] = {tool.name: tool for tool in tools}

    def schemas(self) -> list[dict[str, Any]]:
        return [schema(tool) for tool in self._tools.values()]

    def call(self, name: str, arguments: str) -> str:
        if tool := self._tools.get(name):
            return answer(tool, arguments)
        return failure(f"there is no tool {name!r:.80}; {did_you_mean(name, self._tools)}")


def _open(spec: str) -> Sequence[Tool]:
    kind, _, rest = spec.partition(":")
    if re.search(r"\.py(:\w+)?$", spec) and kind != "mcp":
        return own_functions(spec)
    if spec == "calculator":
        return [Calculator()]
    if spec == "python":
        return [PythonProgram()]
    if kind == "search" and rest:
        return [FolderSearch(Path(rest))]
    if kind == "mcp" and rest:
        return McpServer(rest).tools()
    raise unknown_name("tool", spec, TOOLS)


def _whole(spec: str) -> str:
    kind, colon, rest = spec.partition(":")
    if kind == "search" and rest:
        return f"search:{Path(rest).resolve()}"
    return f"{Path(kind).resolve()}{colon}{rest}" if kind.endswith(".py") else spec
