"""A user's own task: one Python file, run in a worker process that may fail without taking slingshot along.

    # capitals.py
    def problems(split, seed):                       # yields dicts: "prompt", and if you like "answer", "key", "language", "data"
        yield {"prompt": "The capital of Japan?", "answer": "Tokyo"}

    def verify(problem, text):                       # True, False, or a number from 0 to 1
        return text.strip() == problem["answer"]

    def solution(problem, style):                    # optional: {"reasoning": ..., "answer": ...}
        return {"reasoning": "Since 1868 it is Tokyo.", "answer": "Tokyo"}

Problems that come in the same order for every `seed` are shuffled by slingshot; a generator that goes on without end should draw by `seed`.
Yield all problems for either split: slingshot keeps those whose key (default: the prompt) hashes into the split it wants.
"""

from __future__ import annotations

import importlib.util
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, PrivateAttr, model_validator

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.sandbox.worker import Sandbox, SandboxError, take
from slingshot.tasks.task import Language, Problem, Reward, Solution, Split, Style, Task, in_split

_WINDOW = 1 << 14  # problems held to be shuffled, of a file whose order does not go by the seed
_COMPARED = 8  # first problems of two seeds that tell whether the order does
_MAX_SEED = 1 << 32  # what numpy.random.seed takes
_CHUNK = 64  # problems fetched from the worker at a time


class _Problem(Strict):
    """What `problems` may yield."""

    prompt: Annotated[str, Field(min_length=1)]
    answer: str = ""
    key: str = ""
    language: Language = "en"
    data: dict[str, Any] = Field(default_factory=dict)


class _Solution(Strict):
    """What `solution` may return."""

    reasoning: str
    answer: str


class UserTask(Task):
    """The task in the Python file `path`. Each call may take `timeout` seconds, the worker `memory_mb` MiB of address space."""

    path: str
    timeout: float = 10.0
    memory_mb: int = 2048
    _sandbox: Sandbox = PrivateAttr()
    _functions: frozenset[str] = PrivateAttr()
    _by_seed: dict[str, bool] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _open(self) -> Self:
        if self.timeout <= 0 or self.memory_mb < 64:
            raise ValueError(f"timeout {self.timeout:g} must be positive and memory_mb {self.memory_mb} at least 64")
        if not Path(self.path).is_file():
            raise SlingshotError(
                f"{self.path}: no such file; a task is one Python file with problems(split, seed) and verify(problem, text)"
            )
        file = str(Path(self.path).resolve())
        self._sandbox = Sandbox("slingshot.tasks.user:File", file, timeout=self.timeout, memory=self.memory_mb << 20)
        try:
            self._functions = frozenset(self._sandbox.call("functions"))
        except SandboxError as error:
            raise SlingshotError(f"{self.path}: importing it {error}") from error
        for needed in ("problems(split, seed)", "verify(problem, text)"):
            if needed.partition("(")[0] not in self._functions:
                raise SlingshotError(f"{self.path}: function {needed} is missing; add it")
        return self

    @property
    def name(self) -> str:
        return self.path

    @property
    def is_given(self) -> bool:
        return True

    @property
    def has_solutions(self) -> bool:
        return "solution" in self._functions

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return in_split(self._in_order(split, seed % _MAX_SEED), split, self.name)

    def _in_order(self, split: Split, seed: int) -> Iterator[Problem]:
        """In the file's own order where that goes by the seed; else shuffled within a window that holds most files whole."""
        if split not in self._by_seed:
            first, second = (list(itertools.islice(self._all(split, number), _COMPARED)) for number in (0, 1))
            self._by_seed[split] = first != second
        problems = self._all(split, seed)
        if self._by_seed[split]:
            yield from problems
            return
        rng = random.Random(seed)
        window = list(itertools.islice(problems, _WINDOW))
        for problem in problems:
            at = rng.randrange(len(window))
            yield window[at]
            window[at] = problem
        rng.shuffle(window)
        yield from window

    def _all(self, split: Split, seed: int) -> Iterator[Problem]:
        start = 0
        while items := self._call("problems", "take", split, seed, start, _CHUNK):
            for number, item in enumerate(items, start=start):
                where = f"{self.path}: problems() item {number}"
                if not isinstance(item, dict):
                    raise SlingshotError(f"{where} is {item!r:.60}; yield a dict with at least a prompt")
                given = _Problem.parse(item, where)
                yield Problem(given.prompt, given.key or given.prompt, given.answer, given.language, given.data)
            start += len(items)

    def solution(self, problem: Problem, style: Style, rng: random.Random) -> Solution:
        """The file's solution; in style "answer" its answer alone."""
        given = self._call("solution", "solution", _as_dict(problem), style)
        if not isinstance(given, dict):
            raise SlingshotError(
                f"{self.path}: solution() returned {given!r:.60}; return a dict with reasoning and answer"
            )
        written = _Solution.parse(given, f"{self.path}: solution()")
        return Solution("" if style == "answer" else written.reasoning, written.answer)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """What the file's verify says of `text`; with `lenient`, of its last line."""
        answer = self.extract(text) if lenient else self.read(text)
        if answer is None:
            return Reward(0.0, None)
        value = self._call("verify", "verify", _as_dict(problem), answer)
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise SlingshotError(
                f"{self.path}: verify() returned {value!r:.60}; return True, False or a number from 0 to 1"
            )
        return Reward(float(value), answer)

    def _call(self, function: str, method: str, *args: Any) -> Any:
        try:
            return self._sandbox.call(method, *args)
        except SandboxError as error:
            raise SlingshotError(f"{self.path}: {function}() {error}") from error


def _as_dict(problem: Problem) -> dict[str, Any]:
    fields = {"prompt": problem.prompt, "key": problem.key, "answer": problem.answer, "language": problem.language}
    return fields | {"data": dict(problem.data)}


class File:
    """The worker's side: the imported file, and its iterators of problems where the parent left them."""

    def __init__(self, path: str) -> None:
        sys.path.append(str(Path(path).parent))  # modules beside the file can be imported by it
        spec = importlib.util.spec_from_file_location("task", path)
        assert spec is not None and spec.loader is not None, "the path ends in .py"
        self._module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._module)
        self._open: dict[tuple[str, int, int], Iterator[Any]] = {}

    def functions(self) -> list[str]:
        return [name for name in ("problems", "verify", "solution") if callable(getattr(self._module, name, None))]

    def take(self, split: str, seed: int, start: int, count: int) -> list[Any]:
        """Next items from `start` of problems(split, seed); none when it ended. Starts over, and skips, after a restart of the worker."""
        iterator = self._open.pop((split, seed, start), None)
        if iterator is None:
            made = self._module.problems(split, seed)
            try:
                iterator = itertools.islice(made, start, None)
            except TypeError as error:
                raise SandboxError(f"returned {made!r:.60}; it should yield problems") from error
        items = take(iterator, count)
        self._open[split, seed, start + len(items)] = iterator
        return items

    def verify(self, problem: dict[str, Any], text: str) -> Any:
        return self._module.verify(problem, text)

    def solution(self, problem: dict[str, Any], style: str) -> Any:
        return self._module.solution(problem, style)
