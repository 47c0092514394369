"""The task `multiplication`: products of numbers of several digits, worked out digit by digit as on paper.

    What is 384 x 276?  ->  4 8 3 by 6 7 2. 6: 4*6=24,+0=24; 8*6=48,+2=50; 3*6=18,+5=23: 4 0 3 2.
                            7: 4*7=28,+0=28,+0=28; ...  ->  105984
    384 x 276はいくつ?  ->  4 8 3に6 7 2。6:4*6=24、+0=24;...  ->  105984

Lowest digits stand first, so that a carry is known before it is needed. A digit of the second number takes a row: each
digit of the first number times it, plus the digit of the sum so far at that place, plus the carry. After a row stands
the sum so far; the last one is read back into the answer's order. Every calculation is a fact of one or two digits,
which a small model can be sure of.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from pydantic import Field

from slingshot.tasks.arithmetic import SLIP, NumberTask, natural_near_miss
from slingshot.tasks.task import FULL_STOP, Call, Problem, Style

_PROMPT = {"en": "What is %d x %d?", "ja": "%d x %dはいくつ?"}
_BY = {"en": "%s by %s. ", "ja": "%sに%s。"}
_ROW = {"en": "%d: %s: %s", "ja": "%d:%s:%s"}
_THEN = {"en": "; ", "ja": ";"}
_BACK = {"en": ", read back %s.", "ja": "、逆に%s。"}


class Multiplication(NumberTask):
    """Products of two numbers, each of `min_digits` to `max_digits` digits, each length as likely."""

    min_digits: int = Field(3, ge=1, le=9, description="digits of a number, at least")
    max_digits: int = Field(3, ge=1, le=9, description="digits of a number, at most")

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        uniform, lengths = rng.random, self.max_digits - self.min_digits + 1
        while True:
            lows = [10 ** (self.min_digits - 1 + int(uniform() * lengths)) for _ in range(2)]
            a, b = (low + int(uniform() * 9 * low) for low in lows)
            language = self.languages[int(uniform() * len(self.languages))]
            key = "x".join(map(str, sorted((a, b))))
            data = {"factors": [a, b], "level": "x".join(map(str, sorted(map(len, (str(a), str(b))))))}
            yield Problem(_PROMPT[language] % (a, b), key, str(a * b), language, data)

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        language = problem.language
        first, second = (lowest_first(factor) for factor in problem.data["factors"])
        rows = long_multiplication(first, second)
        results = sum(1 + len(step.added) for row in rows for step in row.steps)
        slipped = int(rng.random() * results) if style == "slips" else -1
        said = []
        for row in rows:
            steps = []
            for step in row.steps:
                steps.append(step.tell(slipped, SLIP[language], rng))
                slipped -= 1 + len(step.added)
            said.append(_ROW[language] % (row.steps[0].b, _THEN[language].join(steps), spaced(row.total)))
        worked = _BY[language] % (spaced(first), spaced(second)) + FULL_STOP[language].join(said)
        return worked + _BACK[language] % " ".join(problem.answer)

    def calls(self, problem: Problem) -> tuple[Call, ...]:
        first, second = problem.data["factors"]
        return (Call("calculator", json.dumps({"expression": f"{first}*{second}"})),)


class DigitStep(NamedTuple):
    """A digit times a digit, and what is added to the product: the digit of the sum so far, if any, and the carry."""

    a: int
    b: int
    added: tuple[int, ...]

    @property
    def value(self) -> int:
        return self.a * self.b + sum(self.added)

    def tell(self, slipped: int, slip: str, rng: random.Random) -> str:
        """ "8*7=56,+0=56,+2=58"; the result numbered `slipped`, if there is one, is first wrong, then corrected."""
        text, result = f"{self.a}*{self.b}", self.a * self.b
        for at, more in enumerate((0, *self.added)):
            result += more
            shown = slip % (natural_near_miss(result, rng), result) if at == slipped else result
            text += f",+{more}={shown}" if at else f"={shown}"
        return text


class DigitRow(NamedTuple):
    """What a digit of the second number adds: the steps, and the sum after them, lowest digit first."""

    steps: list[DigitStep]
    total: list[int]


def long_multiplication(first: Sequence[int], second: Sequence[int]) -> list[DigitRow]:
    """The rows that multiply two numbers, given and summed lowest digit first; the last sum is the product.

    A sum has as many digits as it can need, and so may end in a zero.
    """
    total, rows = [0] * len(first), list[DigitRow]()
    for place, b in enumerate(second):
        carry, steps = 0, list[DigitStep]()
        for at, a in enumerate(first, start=place):
            step = DigitStep(a, b, (total[at], carry) if place else (carry,))
            steps.append(step)
            carry, total[at] = divmod(step.value, 10)
        total.append(carry)
        rows.append(DigitRow(steps, total.copy()))
    return rows


def lowest_first(number: int) -> list[int]:
    """The digits of a number, ones first."""
    return [int(digit) for digit in reversed(str(number))]


def spaced(digits: Sequence[int]) -> str:
    """Digits apart, so that a tokenizer which keeps digits together has each by itself."""
    return " ".join(map(str, digits))
