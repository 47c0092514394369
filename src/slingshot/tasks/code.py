"""The task `code`: Python that hidden tests judge, problems without end.

    Write a Python function f(x) for a list x of whole numbers: keep the even ones, then take the sum. Return ...

Problems are generated (tasks/programs.py). `code:humaneval` and `code:mine.jsonl` are data sets (tasks/dataset.py) with
the verifier `code`. An answer is the last ```python block in what was said; tasks/judge.py judges it, in a worker.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

from pydantic import Field

from slingshot.sandbox.worker import Target
from slingshot.tasks.code_verifier import MARGIN, CodeLimits, code_block, require_judging
from slingshot.tasks.programs import explain, generate
from slingshot.tasks.task import GeneratedTask, Problem, Reward, Style
from slingshot.tasks.verification import IsolatedTask
from slingshot.tasks.verifiers import MAX_ANSWER


class Code(CodeLimits, IsolatedTask, GeneratedTask):
    """Generated problems; an answer is right when all tests hold."""

    timeout: float = Field(10.0, gt=0, description="seconds that all tests of an answer may take together")
    level: int = Field(2, ge=1, le=3, description="operations in a row, at most")

    @classmethod
    def load(cls, params: dict[str, Any]) -> Code:
        """The task "code". Raises SlingshotError where no answer can be judged."""
        task = cls.parse(params, "code")
        require_judging(task.trusted)
        return task

    @property
    def target(self) -> Target:
        settings = self.model_dump(include={"timeout", *CodeLimits.model_fields})
        return Target("slingshot.tasks.code_verifier:CodeJudge", (settings,), timeout=self.timeout + MARGIN)

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        return generate(rng, self.level, self.languages)

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        return explain(problem, style, rng)

    def read(self, text: str) -> str | None:
        return code_block(text) if len(text) <= MAX_ANSWER else None

    def extract(self, text: str) -> str | None:
        return self.read(text)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """Whether all tests hold; with `partial` the share of those that do."""
        answer = self.read(text)
        return Reward(0.0, None) if answer is None else self.scored(answer, problem.data["hidden"], answer)
