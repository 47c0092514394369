"""The tasks `gym:NAME`: every dataset of reasoning-gym, as `gym:chain_sum` with its own parameters (`max_terms` ...).

reasoning-gym is imported in workers only, which also score: its scorers parse text with whatever suits the dataset, and
some can be made to hang. It gives partial credit for near misses; here an answer is right, 1.0, or it is not.
`gym:chain_sum` has worked solutions, and so have the word problems of `gym:gsm_symbolic`, which bring their own:

    What is 45 + 38 - 7?   ->   Start with 45. Add 38: 45 + 30 = 75, 75 + 8 = 83. Subtract 7: 83 - 7 = 76.   ->   76
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import random
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from pydantic import JsonValue

from slingshot.base.errors import SlingshotError
from slingshot.base.keys import Key, typed, words
from slingshot.base.names import unknown_name
from slingshot.sandbox.isolate import take
from slingshot.sandbox.worker import SandboxError, Target, Worker
from slingshot.tasks.arithmetic import chain_key, chain_steps, last_number, near_miss, read_number
from slingshot.tasks.task import Problem, Reward, Split, Style, in_split, key_number
from slingshot.tasks.verification import IsolatedTask

_SIZE = 1000  # items drawn from one dataset before the next seed
_CHUNK = 64  # items fetched from the worker at a time
_KEPT = 1024  # items a worker keeps for scoring: some take seconds to make
_MAKING = 60.0  # seconds for one item: some families search long for a puzzle
_WORD = re.compile(r"\w+")
_RESULT = re.compile(r"= [$€£]?([0-9]+)(?![.,]?[0-9])")
_SCIENTIFIC = re.compile(r"-?[0-9]{1,20}(\.[0-9]{1,20})?e[+-]?[0-9]{1,3}")
_MAX_ANSWER = 10_000  # characters; longer ones are wrong without asking
# What worked solutions are made of: a sum's expression, or the reasoning that comes with a word problem.
_WORKED = {"chain_sum": "expression", "gsm_symbolic": "reasoning"}


class Gym(IsolatedTask):
    """The reasoning-gym dataset called `dataset`, with `params` of its configuration."""

    dataset: str
    params: dict[str, JsonValue] = {}

    @classmethod
    def load(cls, dataset: str, params: dict[str, Any]) -> Gym:
        """The task, its dataset made in the worker. Raises SlingshotError for an unknown dataset or parameter."""
        task = cls.parse({"dataset": dataset, "params": params}, f"gym:{dataset}")
        task.call("take", 0, 0, 0, doing="")
        return task

    @property
    def target(self) -> Target:
        return Target("slingshot.tasks.reasoning_gym:Dataset", (self.dataset, self.params))

    @property
    def name(self) -> str:
        return f"gym:{self.dataset}"

    @property
    def has_solutions(self) -> bool:
        return self.dataset in _WORKED

    def problems(self, split: Split, seed: int) -> Iterator[Problem]:
        return in_split(self._all(seed), split, self.name)

    def _all(self, seed: int) -> Iterator[Problem]:
        part = _WORKED.get(self.dataset)
        for number in itertools.count():
            # Datasets seed item i with seed + i: seeds that lie near each other bring the same items again.
            drawn = key_number(f"{seed}/{number}") >> 32
            index = 0
            while index < _SIZE:
                span, doing = (drawn, index, min(_CHUNK, _SIZE - index)), f"making item {index} of seed {drawn}"
                for item in self.call("take", *span, doing=doing, timeout=_MAKING):
                    data = {"seed": drawn, "index": index} | ({part: item[part]} if part else {})
                    key = chain_key(*_chain(item[part])) if part == "expression" else item["question"]
                    yield Problem(item["question"], key, item["answer"], data=data)
                    index += 1

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        """For sums: left to right, and from the highest place to the lowest, so that no step needs two carries."""
        if "expression" not in problem.data:
            return _slipped(problem.data["reasoning"], rng) if style == "slips" else problem.data["reasoning"]
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
        return " ".join(said)

    def verify(self, problem: Problem, text: str, lenient: bool = False) -> Reward:
        """1.0 where reasoning-gym says 1.0; an answer on which its scorer fails or hangs is wrong.

        Where the known answer is a number or a word, so must be the one read; else the whole text, or its last line.
        """
        known = read_number(problem.answer)
        if known is not None:
            answer = last_number(text) if lenient else read_number(text)
            if _SCIENTIFIC.fullmatch(text.strip()):  # as power_function asks for it
                answer = text.strip()
            # Some scorers pay in full for a prefix of the digits: a number that is not near is wrong without asking.
            near = answer is not None and math.isclose(float(answer), float(known), rel_tol=0.01)
        elif _WORD.fullmatch(problem.answer):
            known, found = problem.answer, _WORD.findall(text)
            answer = found[-1] if found and (lenient or text.strip().removesuffix(".") == found[0]) else None
            near = True
        else:
            answer = self.extract(text) if lenient else self.read(text)
            near = answer is not None and len(answer) <= _MAX_ANSWER
        if answer is None or not near or answer == known:
            return Reward(float(answer is not None and answer == known), answer)
        try:
            value = self.call("score", problem.data["seed"], problem.data["index"], answer)
        except SlingshotError:
            value = 0.0
        return Reward(float(value == 1.0), answer)


def _slipped(reasoning: str, rng: random.Random) -> str:
    """The reasoning with one of its results near what it should be, and then put right."""
    results = list(_RESULT.finditer(reasoning))
    if not results:
        return reasoning
    result = results[int(rng.random() * len(results))]
    before, after = reasoning[: result.start(1)], reasoning[result.start(1) :]
    return f"{before}{near_miss(int(result[1]), rng)}, wait, {after}"


def _chain(expression: str) -> tuple[list[int], list[str]]:
    """Numbers and operators of "45 + 38 - -7"."""
    parts = expression.split()
    return [int(part) for part in parts[::2]], parts[1::2]


def _places(number: int) -> list[int]:
    """A number by its places: 305 is 300, 5. Negative numbers stay whole."""
    if number < 10:
        return [number]
    digits = str(number)
    return [int(digit) * 10 ** (len(digits) - place) for place, digit in enumerate(digits, start=1) if digit != "0"]


def gym_keys(dataset: str = "") -> list[Key]:
    """A dataset's parameters as reasoning-gym declares them; of none, the datasets. SlingshotError if unknown."""
    families = Target("slingshot.tasks.reasoning_gym:Families", timeout=60.0)  # its imports take long on a busy machine
    try:
        return [Key(*row) for row in Worker().call(families, "keys", dataset)]
    except SandboxError as error:
        raise SlingshotError(f"gym:{dataset}: {error}") from error


class Families:
    """The worker's side of `gym_keys`."""

    def keys(self, dataset: str) -> list[tuple[str, str, str | None, str]]:
        if not dataset:
            return [(f"gym:{name}", "", None, "") for name in sorted(_datasets())]
        plain = (bool, int, float, str, list, tuple)
        shown = [(field, field.default) for field in _fields(dataset)]
        return [(f.name, words(f.type), typed(value) if isinstance(value, plain) else None, "") for f, value in shown]


def _datasets() -> dict[str, Any]:
    from reasoning_gym.factory import DATASETS  # a second's work, in a worker

    return dict(DATASETS)


def _fields(dataset: str) -> list[dataclasses.Field[Any]]:
    known = _datasets()
    if dataset not in known:
        raise unknown_name("dataset", dataset, known)
    return [field for field in dataclasses.fields(known[dataset][1]) if field.name not in ("seed", "size")]


class Dataset:
    """The worker's side. An item is named by (seed, index) and made again for scoring, as not all survive JSON."""

    def __init__(self, name: str, params: dict[str, Any]) -> None:
        known = [field.name for field in _fields(name)]
        for given in set(params).difference(known):
            raise unknown_name("parameter", given, known)
        from reasoning_gym.composite import DatasetSpec
        from reasoning_gym.factory import create_dataset

        made = lru_cache(2)(lambda seed: create_dataset(name, seed=seed, size=_SIZE, **params))
        self._item = lru_cache(_KEPT)(lambda seed, index: made(seed)[index])
        try:
            if name == "composite":
                named = params.get("datasets") or []
                params["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}} | each) for each in named]
            self._first = made(0)
        except (AssertionError, KeyError, TypeError, ValueError) as error:
            raise SlingshotError(f"reasoning-gym refuses these parameters: {error or 'no reason given'}") from error
        self._tried: list[dict[str, Any]] = []

    def take(self, seed: int, start: int, count: int) -> list[dict[str, str]]:
        """Questions and answers as text, the expression of a sum, the reasoning of a word problem; "" for none."""
        return take((_texts(self._item(seed, index)) for index in range(start, start + count)), count)

    def score(self, seed: int, index: int, answer: str) -> float:
        """The scorer's score; 0 for an answer, not the known one, that it takes for right whatever the problem."""
        item = self._item(seed, index)
        score = float(self._first.score_answer(answer, copy.deepcopy(item)))
        if score < 1.0 or answer == item["answer"]:
            return score
        # A few items on which the answers to others are tried.
        self._tried = self._tried or take((self._first[place] for place in range(8)), 8, seconds=2.0)
        others = [other for other in self._tried if _folded(other["answer"]) != _folded(answer)]
        fooled = sum(self._accepts(answer, other) for other in others) > len(others) / 2
        return 0.0 if fooled or self._accepts("?", item) or not _own(answer, item) else score

    def _accepts(self, answer: str, item: dict[str, Any]) -> bool:
        try:
            return float(self._first.score_answer(answer, copy.deepcopy(item))) == 1.0 and _own(answer, item)
        except Exception:  # whatever a scorer raises on nonsense, it does not accept it
            return False


def _texts(item: dict[str, Any]) -> dict[str, str]:
    fields = {"question": item["question"], "answer": item["answer"], "expression": item["metadata"].get("expression")}
    fields["reasoning"] = item["metadata"].get("answer_cot", "").partition("\n####")[0]
    return {name: "" if value is None else str(value) for name, value in fields.items()}


def _folded(answer: Any) -> str:
    return "".join(str(answer).casefold().split())


def _own(answer: str, item: dict[str, Any]) -> bool:
    """Whether an expression uses the numbers it was given: puzzle24's scorer takes any four that make 24."""
    metadata, used = item["metadata"], sorted(map(int, re.findall(r"[0-9]+", answer)))
    return metadata.get("source_dataset") != "puzzle24" or used == sorted(metadata["numbers"])
