"""The task `arithmetic`: chains of + - x over small numbers, asked and reasoned about in English or Japanese.

    What is 3+4-2+9?   ->   3 plus 4 is 7, 7 minus 2 is 5, 5 plus 9 is 14   ->   14
    3+4-2+9はいくつ?    ->   3足す4は7、7引く2は5、5足す9は14                   ->   14

One calculation a step, so that a small model can be sure of every step while the whole is out of its reach at a glance.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from typing import Self

from pydantic import Field, model_validator

from slingshot.tasks.task import COMMA, Call, GeneratedTask, Problem, Style

_PROMPT = {"en": "What is %s?", "ja": "%sはいくつ?"}
_STEP = {
    "en": {"+": "%d plus %d is %s", "-": "%d minus %d is %s", "x": "%d times %d is %s"},
    "ja": {"+": "%d足す%dは%s", "-": "%d引く%dは%s", "x": "%d掛ける%dは%s"},
}
SLIP = {"en": "%d, wait, %d", "ja": "%d、いや%d"}
# A minus right after a digit or a closing bracket is an operator, not a sign.
_NUMBER = re.compile(r"(?:(?<![0-9)])-)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_MINUS = str.maketrans({"\u2212": "-", "\uff0d": "-"})  # the typographic and the full-width minus
_MAX_LENGTH = 64  # characters; no task here has longer answers, and int() of thousands of digits is slow


class NumberTask(GeneratedTask):
    """One whose answers are numbers."""

    def read(self, text: str) -> str | None:
        return read_number(text)

    def extract(self, text: str) -> str | None:
        return last_number(text)


class Arithmetic(NumberTask):
    """Chains of numbers without zeros, each length as likely, joined by `operators`."""

    min_terms: int = Field(4, ge=2, le=64, description="numbers in a chain, at least")
    max_terms: int = Field(8, ge=2, le=64, description="numbers in a chain, at most")
    digits: int = Field(1, ge=1, le=9, description="digits of a number, at most")
    operators: str = Field("+-", pattern=r"^[+\-x]+$", description="those that may occur, of + - x")

    @model_validator(mode="after")
    def _answers_can_be_read(self) -> Self:
        if "x" in self.operators and (most := self.max_terms * self.digits) >= _MAX_LENGTH:
            raise ValueError(f"products have up to {most} digits, {_MAX_LENGTH - 1} can be read; take fewer terms")
        return self

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        # rng.random() scaled by hand: randrange takes several times as long, and pre-training draws millions.
        uniform = rng.random
        more_terms = self.max_terms - self.min_terms + 1
        while True:
            n_terms = self.min_terms + int(uniform() * more_terms)
            lows = [10 ** int(uniform() * self.digits) for _ in range(n_terms)] if self.digits > 1 else [1] * n_terms
            numbers = [low + int(uniform() * 9 * low) for low in lows]
            operators = [self.operators[int(uniform() * len(self.operators))] for _ in range(n_terms - 1)]
            language = self.languages[int(uniform() * len(self.languages))]
            yield Problem(
                prompt=_PROMPT[language] % _spelt(numbers, operators),
                key=chain_key(numbers, operators),
                answer=str(chain_steps(numbers, operators)[-1][3]),
                language=language,
                data={"numbers": numbers, "operators": operators},
            )

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        steps = chain_steps(problem.data["numbers"], problem.data["operators"])
        words, slip = _STEP[problem.language], SLIP[problem.language]
        slipped = int(rng.random() * len(steps)) if style == "slips" else -1
        said = [
            words[operator] % (left, right, slip % (near_miss(result, rng), result) if index == slipped else result)
            for index, (left, operator, right, result) in enumerate(steps)
        ]
        return COMMA[problem.language].join(said)

    def calls(self, problem: Problem) -> tuple[Call, ...]:
        spelt = _spelt(problem.data["numbers"], problem.data["operators"])
        return (Call("calculator", json.dumps({"expression": spelt.replace("x", "*")})),)


def _spelt(numbers: Sequence[int], operators: Sequence[str]) -> str:
    return str(numbers[0]) + "".join(map("{}{}".format, operators, numbers[1:]))


def chain_steps(numbers: Sequence[int], operators: Sequence[str]) -> list[tuple[int, str, int, int]]:
    """The calculations (left, operator, right, result) that solve a chain: products first, then left to right.

    The last result is the answer.
    """
    values, waiting, steps = list(numbers), list(operators), []
    while waiting:
        at = waiting.index("x") if "x" in waiting else 0
        left, operator, right = values[at], waiting.pop(at), values[at + 1]
        result = left + right if operator == "+" else left - right if operator == "-" else left * right
        steps.append((left, operator, right, result))
        values[at : at + 2] = [result]
    return steps


def chain_key(numbers: Sequence[int], operators: Sequence[str]) -> str:
    """One spelling for all orders of the same chain, factors and terms ordered: 3+4-2+9 gives +3+4+9-2."""
    terms = [("+", [numbers[0]])]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "x":
            terms[-1][1].append(number)
        else:
            terms.append((operator, [number]))
    return "".join(sorted(f"{sign}{'x'.join(map(str, sorted(factors)))}" for sign, factors in terms))


def near_miss(result: int, rng: random.Random) -> int:
    """A wrong result of the kind people slip into: off by one or two."""
    return result + (-2, -1, 1, 2)[int(rng.random() * 4)]


def natural_near_miss(result: int, rng: random.Random) -> int:
    """The same for a result that is not negative; neither is the wrong one."""
    wrong = near_miss(result, rng)
    return wrong if wrong >= 0 else result + 1


def canonical(number: str) -> str:
    """One spelling per number: no separators, leading zeros, trailing decimal zeros or negative zero."""
    sign = "-" if number.startswith("-") else ""
    whole, _, decimals = number.lstrip("-").replace(",", "").partition(".")
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    value = f"{whole}.{decimals}" if decimals else whole
    return value if value == "0" else sign + value


def read_number(text: str) -> str | None:
    """The number that `text` is, but for surrounding space and one full stop; None if it is anything else."""
    text = re.sub(r"[.。]$", "", text.strip().translate(_MINUS))
    return canonical(text) if len(text) <= _MAX_LENGTH and _NUMBER.fullmatch(text) else None


def last_number(text: str) -> str | None:
    """The last number in `text`; None if it has none."""
    *_, found = "", *_NUMBER.findall(text.translate(_MINUS))
    return canonical(found) if 0 < len(found) <= _MAX_LENGTH else None
