"""The tasks `gym:NAME`: every dataset of reasoning-gym, as `gym:chain_sum` with its own parameters (`max_terms`, `max_digits` ...).

reasoning-gym is imported in a worker process only, which also scores: its scorers parse model text with whatever suits the dataset, and some can be
made to hang. It gives partial credit for near misses; here an answer is right, 1.0, or it is not. `gym:chain_sum` has worked solutions:

    What is 45 + 38 - 7?   ->   Start with 45. Add 38: 45 + 30 = 75, 75 + 8 = 83. Subtract 7: 83 - 7 = 76.   ->   76
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import random
import re
from collections.abc import Callable, Iterator
from typing import Any, Self

from pydantic import Field, JsonValue, PrivateAttr, model_validator

from slingshot.base.errors import SlingshotError
from slingshot.base.names import unknown_name
from slingshot.sandbox.worker import Sandbox, SandboxError, take
from slingshot.tasks.arithmetic import chain_key, chain_steps, near_miss
from slingshot.tasks.task import Problem, Reward, Solution, Split, Style, Task, in_split
from slingshot.tasks.verifiers import last_number, read_number

_SIZE = 1000  # items drawn from one dataset before the next seed
_CHUNK = 64  # items fetched from the worker at a time
_WORD = re.compile(r"\w+")
_MAX_ANSWER = 10_000  # characters; longer ones are wrong without asking


class Gym(Task):
    """The reasoning-gym dataset called `dataset`, with `params` of its configuration."""

    dataset: str
    params: dict[str, JsonValue] = Field(default_factory=dict)
    _sandbox: Sandbox = PrivateAttr()

    @model_validator(mode="after")
    def _open(self) -> Self:
        self._sandbox = Sandbox("slingshot.tasks.reasoning_gym:Dataset", self.dataset, self.params)
        self._start()
        return self

    def _start(self) -> None:
        try:
            self._sandbox.start()
        except SandboxError as error:
            raise SlingshotError(f"{self.name}: {error}") from error

    @classmethod
    def load(cls, dataset: str, params: dict[str, Any]) -> Gym:
        return cls.parse({"dataset": dataset, "params": params}, f"gym:{dataset}")

    @property
    def name(self) -> str:
        return f"gym:{self.dataset}"

    @property
    def has_solutions(self) -> bool:
        return self.dataset == "chain_sum"

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return in_split(self._all(seed), split, self.name)

    def _all(self, seed: int) -> Iterator[Problem]:
        for number in itertools.count():
            # Datasets seed item i with seed + i, so seeds must lie far apart or the next seed brings the same items again.
            drawn = int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
            index = 0
            while index < _SIZE:
                try:
                    items = self._sandbox.call("take", drawn, index, min(_CHUNK, _SIZE - index))
                except SandboxError as error:
                    raise SlingshotError(f"{self.name}: making item {index} of seed {drawn} {error}") from error
                for item in items:
                    yield self._problem(item, {"seed": drawn, "index": index})
                    index += 1

    def _problem(self, item: dict[str, Any], data: dict[str, Any]) -> Problem:
        key = item["question"]
        if self.dataset == "chain_sum":
            data["expression"] = item["metadata"]["expression"]
            key = chain_key(*_chain(data["expression"]))
        return Problem(item["question"], key, "" if item["answer"] is None else str(item["answer"]), "en", data)

    def solution(self, problem: Problem, style: Style, rng: random.Random) -> Solution:
        """For chain_sum: left to right, and within one operation from the highest place to the lowest, so that no step needs two carries."""
        if not self.has_solutions:
            return super().solution(problem, style, rng)
        if style == "answer":
            return Solution("", problem.answer)
        numbers, operators = _chain(problem.data["expression"])
        said = [f"Start with {numbers[0]}."]
        slipped = int(rng.random() * len(operators)) if style == "slips" else -1
        for index, (left, operator, right, _) in enumerate(chain_steps(numbers, operators)):
            places = _places(right)
            steps = chain_steps([left, *places], [operator] * len(places))
            wrong = int(rng.random() * len(steps)) if index == slipped else -1
            worked = ", ".join(
                f"{a} {sign} {b} = {f'{near_miss(c, rng)}, wait, {c}' if place == wrong else c}"
                for place, (a, sign, b, c) in enumerate(steps)
            )
            said.append(f"{'Add' if operator == '+' else 'Subtract'} {right}: {worked}.")
        return Solution(" ".join(said), problem.answer)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """Where the known answer is a number or a single word, so must be the one read; else it is the whole text (lenient: the last line)."""
        known = read_number(problem.answer)
        if known is not None:
            answer = last_number(text) if lenient else read_number(text)
            # Some scorers pay in full for a prefix of the digits, so a number that is not near is wrong without asking.
            if answer is None or not math.isclose(float(answer), float(known), rel_tol=0.01, abs_tol=0.001):
                return Reward(0.0, answer)
        elif _WORD.fullmatch(problem.answer):
            known = problem.answer
            words = _WORD.findall(text)
            answer = words[-1] if words and (lenient or text.strip().removesuffix(".") == words[0]) else None
            if answer is None:
                return Reward(0.0, None)
        else:
            return super().verify(problem, text, lenient)
        return Reward(1.0 if answer == known else self.score(problem, answer), answer)

    def score(self, problem: Problem, answer: str) -> float:
        """1.0 where reasoning-gym says 1.0. An answer on which its scorer fails or hangs is wrong."""
        if len(answer) > _MAX_ANSWER:
            return 0.0
        self._start()
        try:
            return float(self._sandbox.call("score", problem.data["seed"], problem.data["index"], answer) == 1.0)
        except SandboxError:
            return 0.0


def _chain(expression: str) -> tuple[list[int], list[str]]:
    """Numbers and operators of "45 + 38 - -7"."""
    words = expression.split()
    return [int(word) for word in words[::2]], words[1::2]


def _places(number: int) -> list[int]:
    """A number by its places: 305 is 300, 5. Negative numbers stay whole."""
    if number < 10:
        return [number]
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - 1 - place) for place, digit in enumerate(digits) if digit != "0"]


class Dataset:
    """The worker's side: the dataset by seed. An item is named by (seed, index) and made again for scoring, as not all survive JSON unchanged."""

    def __init__(self, name: str, params: dict[str, Any]) -> None:
        try:
            from reasoning_gym.factory import DATASETS, create_dataset
        except ImportError as error:
            raise SlingshotError("reasoning-gym is not installed; pip install reasoning-gym") from error
        if name not in DATASETS:
            raise unknown_name("dataset", name, DATASETS)
        known = [field.name for field in dataclasses.fields(DATASETS[name][1]) if field.name not in ("seed", "size")]
        for given in params:
            if given not in known:
                raise unknown_name("parameter", given, known)
        self._create: Callable[[int], Any] = lambda seed: create_dataset(name, seed=seed, size=_SIZE, **params)
        self._seed = 0
        try:
            self._dataset = self._create(self._seed)
        except (AssertionError, TypeError, ValueError) as error:
            raise SlingshotError(f"reasoning-gym refuses these parameters: {error or 'no reason given'}") from error

    def _item(self, seed: int, index: int) -> dict[str, Any]:
        if seed != self._seed:
            self._dataset, self._seed = self._create(seed), seed
        item: dict[str, Any] = self._dataset[index]
        return item

    def take(self, seed: int, start: int, count: int) -> list[dict[str, Any]]:
        return take((self._item(seed, index) for index in range(start, start + count)), count)

    def score(self, seed: int, index: int, answer: str) -> float:
        item = self._item(seed, index)
        score = float(self._dataset.score_answer(answer, item))
        if score == 1.0 and answer != item["answer"] and self._accepts("?", item):
            return 0.0  # this scorer takes anything for right; only the known answer is
        return score

    def _accepts(self, answer: str, item: dict[str, Any]) -> bool:
        try:
            return float(self._dataset.score_answer(answer, item)) == 1.0
        except Exception:  # whatever a scorer raises on nonsense, it does not accept it
            return False
