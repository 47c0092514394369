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

import importlib
import itertools
import random
import reprlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.sandbox.isolate import number, take
from slingshot.sandbox.worker import SandboxError, Target
from slingshot.tasks.task import Language, Problem, Reward, Solution, Split, Style, in_split
from slingshot.tasks.verification import IsolatedTask

_WINDOW = 1 << 14  # problems held to be shuffled, of a file whose order does not go by the seed
_COMPARED = 8  # first problems of two seeds that tell whether the order does
_MAX_SEED = 1 << 32  # what numpy.random.seed takes
_CHUNK = 64  # problems fetched from the worker at a time
_FUNCTIONS = {"problems": "problems(split, seed)", "verify": "verify(problem, text)"}  # those a file must have


class _Returned(Strict):
    """What a file's function may return: a dict, with numbers for the text they are and None for what is left out."""

    @model_validator(mode="before")
    @classmethod
    def _as_text(cls, given: Any) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise ValueError(f"{reprlib.repr(given)} is no dict with {', '.join(cls.model_fields)}")
        said = {name: value for name, value in given.items() if value is not None}
        return {name: value if number(value) is None else str(value) for name, value in said.items()}


class _Problem(_Returned):
    prompt: str = Field(min_length=1)
    answer: str = ""
    key: str = ""
    language: Language = "en"
    data: dict[Any, Any] = {}


class _Solution(_Returned):
    reasoning: str
    answer: str


class _Message(_Returned):
    role: Literal["user", "system", "tool"] = "user"
    content: str


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
            forms = " and ".join(_FUNCTIONS.values())
            raise SlingshotError(f"{path}: no such file; a task is one Python file with {forms}")
        task._functions = task.call("functions", doing="importing it")
        for name, form in _FUNCTIONS.items():
            if name not in task._functions:
                raise SlingshotError(f"{path}: function {form} is missing; add it")
        return task

    @property
    def target(self) -> Target:
        file = str(Path(self.path).resolve())
        return Target("slingshot.tasks.user:File", (file,), timeout=self.timeout, memory=self.memory_mb << 20)

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
        if answer is None:
            return Reward(0.0, None)
        try:
            return Reward(float(self.call("verify", asdict(problem), answer)), answer)
        except SlingshotError as error:
            return Reward(0.0, None, str(error))

    def step(self, problem: Problem, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        return self.call("step", asdict(problem), list(map(dict, messages))) if self.has_turns else None


class File:
    """The worker's side: the imported file, and its iterators of problems where the parent left them."""

    def __init__(self, path: str) -> None:
        # A module of a package among the worker's temporary files, which looks into the file's folder: so it may be
        # called random.py, `from . import helper` works, and processes of its own import it by its name.
        folder, package = str(Path(path).parent), f"task_{sha256(path.encode()).hexdigest()[:8]}"
        init = Path(tempfile.gettempdir(), package, "__init__.py")
        init.parent.mkdir(exist_ok=True)
        init.write_text(f"__path__ = [{folder!r}]", encoding="utf-8")
        sys.path += [folder, str(init.parents[1])]  # the folder for `import helper`
        self._seed(0)
        self._module = importlib.import_module(f"{package}.{Path(path).stem}")
        self._open: dict[tuple[str, int, int], tuple[Iterator[Any], list[Any]]] = {}

    def _seed(self, seed: int) -> None:
        for put, *_ in _generators():
            put(seed)

    def functions(self) -> list[str]:
        names = (*_FUNCTIONS, "solution", "step")
        return [name for name in names if callable(getattr(self._module, name, None))]

    def problems(self, split: str, seed: int, start: int, count: int) -> list[dict[str, Any]]:
        """Next items from `start` of problems(split, seed), none at its end. A new worker starts it over, and skips."""
        iterator, states = self._open.pop((split, seed, start), (None, []))
        for (*_, put), state in zip(_generators(), states, strict=False):
            put(state)
        if iterator is None:
            self._seed(seed)
            made = self._module.problems(split, seed)
            try:
                iterator = itertools.islice(made, start, None)
            except TypeError as error:
                raise SandboxError(f"returned {reprlib.repr(made)}; it should yield problems") from error
        items = take(iterator, count)
        self._open[split, seed, start + len(items)] = iterator, [get() for _, get, _ in _generators()]
        if len(self._open) > 16:  # left where their readers stopped; who comes back to one starts it over
            del self._open[next(iter(self._open))]
        parsed = [_Problem.parse(item, f"item {place}") for place, item in enumerate(items, start)]
        return [dict(item) | {"key": item.key or item.prompt} for item in parsed]

    def verify(self, problem: dict[str, Any], text: str) -> bool | int | float:
        given = self._module.verify(problem, text)
        value = number(given)
        if value is None or not 0 <= value <= 1:
            raise SandboxError(f"returned {reprlib.repr(given)}; return True, False or a number from 0 to 1")
        return value

    def solution(self, problem: dict[str, Any], style: str) -> dict[str, str]:
        return _Solution.parse(self._module.solution(problem, style), "returned").model_dump()

    def step(self, problem: dict[str, Any], messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
        """The messages that were returned: none, one or a list, each a dict or what a user says."""
        given = self._module.step(problem, messages)
        said = given if isinstance(given, list | tuple) else [given]
        dicts = [each if isinstance(each, Mapping) else {"content": each} for each in said]
        return None if given is None else [_Message.parse(each, "message").model_dump() for each in dicts]


def _generators() -> list[tuple[Callable[[int], Any], Callable[[], Any], Callable[[Any], Any]]]:
    """How the global random generators are seeded, and their states read and set. A file that draws from them draws by
    the seed too, the same in every process, whatever else is drawn meanwhile."""
    found: list[Any] = [(random.seed, random.getstate, random.setstate)]
    if numpy := sys.modules.get("numpy"):
        found.append((numpy.random.seed, numpy.random.get_state, numpy.random.set_state))
    return found
