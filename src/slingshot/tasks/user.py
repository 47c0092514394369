"""A user's own task: one Python file, run in a worker process that may fail without taking slingshot along.

    def problems(split, seed):      # yields dicts: "prompt", and if you like "answer", "key", "language", "data"
        yield {"prompt": "The capital of Japan?", "answer": "Tokyo"}

    def verify(problem, text):      # True, False, or a number from 0 to 1
        return text.strip() == problem["answer"]

    def solution(problem, style):   # optional: {"reasoning": ..., "answer": ...}
    def step(problem, messages):    # optional: what is said to the model's last message; None when all is said

docs/task.md tells what such a file may do and return.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import Target
from slingshot.tasks.task import Problem, Reward, Solution, Split, Style, in_split
from slingshot.tasks.user_file import FUNCTIONS
from slingshot.tasks.verification import IsolatedTask

_WINDOW = 1 << 14  # problems held to be shuffled, of a file whose order does not go by the seed
_COMPARED = 8  # first problems of two seeds that tell whether the order does
_MAX_SEED = 1 << 32  # what numpy.random.seed takes
_CHUNK = 64  # problems fetched from the worker at a time


class UserTask(IsolatedTask):
    """The task in the Python file `path`."""

    path: str
    timeout: float = Field(10.0, gt=0, description="seconds that one call of the file may take")
    memory_mb: int = Field(2048, ge=64, description="MiB of address space that its process may have")
    _functions: list[str] = PrivateAttr()
    _by_seed: dict[str, bool] = PrivateAttr(default_factory=dict)

    @classmethod
    def load(cls, path: str, params: dict[str, Any]) -> UserTask:
        """The task, its file imported. Raises SlingshotError where that fails or a function is missing."""
        task = cls.parse({"path": path, **params}, path)
        if not Path(path).is_file():
            forms = " and ".join(FUNCTIONS.values())
            raise SlingshotError(f"{path}: no such file; a task is one Python file with {forms}")
        task._functions = task.call("functions", doing="importing it")
        for name, form in FUNCTIONS.items():
            if name not in task._functions:
                raise SlingshotError(f"{path}: function {form} is missing; add it")
        return task

    @property
    def target(self) -> Target:
        file = str(Path(self.path).resolve())
        return Target("slingshot.tasks.user_file:File", (file,), timeout=self.timeout, memory=self.memory_mb << 20)

    @property
    def name(self) -> str:
        return self.path

    @property
    def is_given(self) -> bool:
        return True

    @property
    def has_solutions(self) -> bool:
        return "solution" in self._functions

    @property
    def has_turns(self) -> bool:
        return "step" in self._functions

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return in_split(self._in_order(split, seed % _MAX_SEED), split, self.name)

    def _in_order(self, split: Split, seed: int) -> Iterator[Problem]:
        """In the file's own order where that goes by the seed; else shuffled in a window that holds most files."""
        if split not in self._by_seed:
            first, second = (list(itertools.islice(self._all(split, number), _COMPARED)) for number in (0, 1))
            self._by_seed[split] = first != second
        problems = self._all(split, seed)
        if self._by_seed[split]:
            yield from problems
            return
        rng, window = random.Random(seed), list(itertools.islice(problems, _WINDOW))
        for problem in problems:
            at = rng.randrange(len(window))
            yield window[at]
            window[at] = problem
        rng.shuffle(window)
        yield from window

    def _all(self, split: Split, seed: int) -> Iterator[Problem]:
        start = 0
        while items := self.call("problems", split, seed, start, _CHUNK):
            yield from (Problem(**item) for item in items)
            start += len(items)

    def solution(self, problem: Problem, style: Style, rng: random.Random) -> Solution:
        """The file's solution; in style "answer" its answer alone."""
        if not self.has_solutions:
            return super().solution(problem, style, rng)
        given = Solution(**self.call("solution", asdict(problem), style))
        return Solution("", given.answer) if style == "answer" else given

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """What the file's verify says of `text`; with `lenient`, of its last line."""
        answer = self.extract(text) if lenient else self.read(text)
        return Reward(0.0, None) if answer is None else self.scored(answer, "verify", asdict(problem), answer)

    def step(self, problem: Problem, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        return self.call("step", asdict(problem), list(map(dict, messages))) if self.has_turns else None
