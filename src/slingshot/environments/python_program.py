"""The tool `python`: what a program prints, run in the sandbox for programs that nobody has read (sandbox/program.py).

PythonProgram().call({"code": "print(6 * 7)"})      # "42"
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slingshot.environments.tool import SECONDS, ToolError, failure, text_argument
from slingshot.sandbox.program import ProgramLimits, require_isolation, run_program

_LIMITS = ProgramLimits(seconds=SECONDS - 2, memory=512 << 20, output=1 << 16)


class PythonProgram:
    """Every call is a new process that reaches no file, no network and no earlier call. Refused where none can be
    contained, as `slingshot doctor` says."""

    name = "python"
    description = "Runs a Python program and returns what it prints. Each call starts anew."
    parameters: Mapping[str, Any] = text_argument("code")

    def __init__(self) -> None:
        require_isolation()

    def call(self, arguments: dict[str, Any]) -> str:
        ended = run_program(arguments["code"], limits=_LIMITS)
        said = ended.stdout.rstrip()
        if ended.reason == "ok":
            if not said:
                raise ToolError("the program printed nothing; print what you want to know")
            return said
        reasons = {
            "timeout": f"it ran longer than {_LIMITS.seconds:g} s", "output": "it printed too much",
            "memory": f"it took more than {_LIMITS.memory >> 20} MiB", "killed": "it did what no program may do here",
        }  # fmt: skip
        last = ended.stderr.rstrip().rpartition("\n")[2] or f"exit status {ended.status}"
        return "\n".join(filter(None, (said, failure(reasons.get(ended.reason, last)))))
