"""The verifier `code`: an answer is a program, right when the tests of its problem hold.

    code_block("First:\\n```python\\na = 1\\n```\\nDone.")          # "a = 1"
    CodeJudge(CodeOptions().model_dump() | {"timeout": 10.0}).score(hidden, "def f(x): return x * x")      # 1.0

tasks/judge.py runs the tests; this file says what an answer is, and what a data set may choose.
"""

from __future__ import annotations

import json
import re
from hashlib import sha256
from typing import Any

from pydantic import Field

from slingshot.base.config import Strict
from slingshot.sandbox.program import ProgramLimits, isolation, require_isolation
from slingshot.tasks.hidden_tests import HiddenTests
from slingshot.tasks.judge import passed_tests

MARGIN = 10.0  # seconds for processes to start and end, beside those an answer has
_BLOCK = re.compile(r"^[ \t]*```([^\n`]*)\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = ("python", "py", "python3")
_REMEMBERED = 4096  # answers: late in training, most of a group are the same


class CodeLimits(Strict):
    memory_mb: int = Field(512, ge=64, description="MiB of address space that an answer may have")
    tolerance: float = Field(1e-6, ge=0, description="relative or absolute error that a floating-point result may have")
    partial: bool = Field(False, description="whether an answer that passes some tests earns their share")
    trusted: bool = Field(False, description="whether answers may run on a machine that cannot contain them")


class CodeOptions(CodeLimits):
    entry_point: str = Field("entry_point", description="a column with the name of the function that is asked for")
    preamble: str = Field("preamble", description="a column, or a text with {columns}: code before answer and tests")


def require_judging(trusted: bool) -> None:
    """Raise SlingshotError where no answer can be judged, or none that is not `trusted`."""
    require_isolation(trusted)
    isolation()


def code_block(text: str) -> str | None:
    """What stands in the last block of Python, else in the last block that says no language, else all of `text`."""
    blocks = [(language.strip().lower(), code) for language, code in _BLOCK.findall(text)]
    for wanted in (_PYTHON, ("",)):
        if named := [code for language, code in blocks if language in wanted]:
            return named[-1].removesuffix("\n") if named[-1].strip() else None
    return text if text.strip() else None


class CodeJudge:
    """The worker's side: it judges answers in processes of their own, one that it has judged before at once."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._limits = ProgramLimits(settings["timeout"], settings["memory_mb"] << 20)
        self._known: dict[bytes, float] = {}

    def score(self, hidden: dict[str, Any], answer: str) -> float:
        key = sha256(json.dumps([hidden, answer]).encode()).digest()
        if key not in self._known:
            if len(self._known) == _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = self._share(HiddenTests(**hidden | {"tolerance": self._settings["tolerance"]}), answer)
        return self._known[key]

    def _share(self, tests: HiddenTests, answer: str) -> float:
        trusted, partial = self._settings["trusted"], self._settings["partial"]
        share = sum(passed_tests(answer, tests, self._limits, trusted, all_tests=partial)) / tests.count
        return share if partial else float(share == 1.0)
