"""The task `countdown`: reach a target with the given numbers, each used exactly once.

    Make 13 from 2, 3, 7.  ->  3+2=5: 7+5=12<13, 7-5=2<13, 7*5=35>13. 3-2=1: 7+1=8<13, 7-1=6<13, 7*1=7<13. 3*2=6:
                               7+6=13, yes.  ->  7+3*2
    2、3、7で12を作れ。      ->  3+2=5:7+5=12、正解。  ->  7+3+2

Reasoning is a search in a fixed order, which ends at the target: no step of it knows the answer beforehand, so that a
model can learn each from what it reads. An answer is parsed by `ast` and accepted only if it holds the given integers,
+ - * / and parentheses alone; nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import combinations
from typing import NamedTuple, Self, TypeAlias

from pydantic import Field, model_validator

from slingshot.base.errors import SlingshotError
from slingshot.tasks.arithmetic import natural_near_miss
from slingshot.tasks.task import COLON, COMMA, FULL_STOP, YES, GeneratedTask, Problem, Solution, Style

Tree: TypeAlias = "int | tuple[str, Tree, Tree]"  # a number, or an operator with its two sides

_PROMPT = {"en": "Make {target} from {numbers}.", "ja": "{numbers}で{target}を作れ。"}
_SLIP = {"en": ", wait, ", "ja": "、いや"}

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIGNS = str.maketrans("\u00d7\u00f7\u2212", "*/-")  # the typographic signs for times, divided by and minus
_EXPRESSION = re.compile(r"[0-9(][0-9+\-*/() ]*")
_MAX_LENGTH = 256  # characters of an expression
_MAX_DEPTH = 16  # operations inside one another
_SEARCHED = 4  # numbers at most that a worked solution searches through: some 700 calculations, for 5 20,000


class Countdown(GeneratedTask):
    """Numbers from 1 to `max_number`; targets, and all that occurs on the way, are whole and from 1 to `max_target`.

    Solvable by construction. Worked solutions search, which is short for 3 numbers, long for 4, and too long for more.
    """

    n_numbers: int = Field(3, ge=2, le=8, description="numbers to be used")
    max_number: int = Field(10, ge=2, description="the largest of them")
    max_target: int = Field(50, le=10**6, description="the largest target, and the largest value on the way")
    operators: str = Field("+-*", pattern=r"^[+\-*/]+$", description="those a problem can be solved with, of + - * /")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.max_number > self.max_target:
            raise ValueError(f"max_number {self.max_number} is above max_target {self.max_target}")
        return self

    def generate(self, rng: random.Random) -> Iterator[Problem]:
        while True:
            numbers = [1 + int(rng.random() * self.max_number) for _ in range(self.n_numbers)]
            if (combined := self._combine(numbers, rng)) is None:
                continue
            tree, target = combined
            language = self.languages[int(rng.random() * len(self.languages))]
            yield Problem(
                prompt=_PROMPT[language].format(target=target, numbers=COMMA[language].join(map(str, numbers))),
                key=f"{','.join(map(str, sorted(numbers)))}={target}",
                answer=render(tree),
                language=language,
                data={"numbers": numbers, "target": target},
            )

    def _combine(self, numbers: list[int], rng: random.Random) -> tuple[Tree, int] | None:
        """Numbers joined at random into a tree, and its value. None where the bounds leave no operation for a pair."""
        pool: list[tuple[Tree, int]] = [(number, number) for number in numbers]
        while len(pool) > 1:
            left, a = pool.pop(int(rng.random() * len(pool)))
            right, b = pool.pop(int(rng.random() * len(pool)))
            if a < b or (a == b and isinstance(left, int)):
                left, a, right, b = right, b, left, a
            results = [(sign, apply(sign, a, b)) for sign in self.operators]
            allowed = [(sign, value) for sign, value in results if value is not None and value <= self.max_target]
            if not allowed:
                return None
            sign, value = allowed[int(rng.random() * len(allowed))]
            pool.append(((sign, left, right), value))
        return pool[0]

    @property
    def has_solutions(self) -> bool:
        return self.n_numbers <= _SEARCHED

    def solution(self, problem: Problem, style: Style, rng: random.Random) -> Solution:
        """The first expression that the search finds, behind the search unless the style is "answer"."""
        if not self.has_solutions:
            most = f"search through up to {_SEARCHED} numbers"
            raise SlingshotError(f"countdown: worked solutions {most}; give data or text for more")
        steps, reasoning = self._search(problem.data["numbers"], problem.data["target"]), ""
        if style != "answer":
            reasoning = self._tell(steps, problem, rng if style == "slips" else None)
        return Solution(reasoning, render(steps[-1].tree))

    def _tell(self, steps: Sequence[_Step], problem: Problem, slips: random.Random | None) -> str:
        language, target = problem.language, problem.data["target"]
        workable = [at for at, step in enumerate(steps) if step.value <= self.max_target]
        slipped = -1 if slips is None else workable[int(slips.random() * len(workable))]
        text = ""
        for at, (step, later) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
            text += step.tell(target, self.max_target, _SLIP[language], slips if at == slipped else None)
            if later is None:
                text += YES[language]
            elif later.others < step.others:
                text += COLON[language]
            else:
                text += COMMA[language] if step.others == later.others == 0 else FULL_STOP[language]
        return text

    def _search(self, numbers: Sequence[int], target: int) -> list[_Step]:
        """The calculations up to the first that makes the target of all numbers."""
        steps = list[_Step]()
        for step in self._steps([(number, number) for number in numbers]):
            steps.append(step)
            if step.others == 0 and step.value == target:
                break
        return steps

    def _steps(self, pool: list[tuple[Tree, int]]) -> Iterator[_Step]:
        """All ways to join the numbers, depth first: pairs from left to right, each by every operator in turn."""
        for first, second in combinations(range(len(pool)), 2):
            (one, a), (two, b) = sorted((pool[first], pool[second]), key=lambda item: -item[1])
            rest = [item for place, item in enumerate(pool) if place not in (first, second)]
            for sign in self.operators:
                if sign == "/" and a % b:
                    continue
                value = a - b if sign == "-" else apply(sign, a, b)
                assert value is not None
                tree = (sign, one, two)
                yield _Step(a, sign, b, value, tree, len(rest))
                if rest and 0 < value <= self.max_target:
                    yield from self._steps([*rest, (tree, value)])

    def read(self, text: str) -> str | None:
        text = re.sub(r"[.。]$", "", text.strip().translate(_SIGNS)).rstrip()
        return text if len(text) <= _MAX_LENGTH and _EXPRESSION.fullmatch(text) else None

    def extract(self, text: str) -> str | None:
        for found in reversed(_EXPRESSION.findall(text.translate(_SIGNS))):
            expression = str(found).rstrip("+-*/( ")  # the run goes on into a dash or bracket of the prose
            if isinstance(parse(expression), tuple):
                return expression
        return None

    def score(self, problem: Problem, answer: str) -> float:
        tree = parse(answer)
        if tree is None or sorted(leaves(tree)) != sorted(problem.data["numbers"]):
            return 0.0
        return float(value_of(tree) == problem.data["target"])


def apply(sign: str, a: int, b: int) -> int | None:
    """The result for positive whole numbers; None unless it is positive and whole too."""
    if (sign == "-" and a <= b) or (sign == "/" and a % b):
        return None
    return int(_COMPUTE[sign](a, b))


def parse(text: str) -> Tree | None:
    """The expression in `text` as a tree; None unless it is of whole numbers, + - * / and parentheses, in bounds."""
    if len(text) > _MAX_LENGTH or not _EXPRESSION.fullmatch(text):
        return None
    try:
        body = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None
    return _whitelisted(body, _MAX_DEPTH)


def _whitelisted(node: ast.expr, depth: int) -> Tree | None:
    if isinstance(node, ast.Constant):
        return node.value if type(node.value) is int else None
    if depth and isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _whitelisted(node.left, depth - 1), _whitelisted(node.right, depth - 1)
        if left is not None and right is not None:
            return (_OPERATORS[type(node.op)], left, right)
    return None


def leaves(tree: Tree) -> list[int]:
    """The numbers of a tree, left to right."""
    return [tree] if isinstance(tree, int) else leaves(tree[1]) + leaves(tree[2])


def value_of(tree: Tree) -> Fraction | None:
    """The exact value of a tree; None where it divides by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    left, right = value_of(tree[1]), value_of(tree[2])
    if left is None or right is None or (tree[0] == "/" and right == 0):
        return None
    return _COMPUTE[tree[0]](left, right)


def render(tree: Tree, precedence: int = 0) -> str:
    """A tree as text, with the parentheses it needs where an operator below `precedence` cannot stand alone."""
    if isinstance(tree, int):
        return str(tree)
    sign, left, right = tree
    own = _PRECEDENCE[sign]
    text = f"{render(left, own)}{sign}{render(right, own + 1)}"
    return text if own >= precedence else f"({text})"


class _Step(NamedTuple):
    """One calculation of a search, the expression that it ends, and how many numbers stand beside its value then."""

    a: int
    sign: str
    b: int
    value: int
    tree: Tree
    others: int

    def tell(self, target: int, limit: int, wait: str, slip: random.Random | None) -> str:
        """ "3*2=6", compared with the target where no number is left. With `slip`, first wrong, then corrected.

        A value beyond the limit leads nowhere, and is not worked out.
        """
        against = "" if self.others or self.value == target else f"{'<' if self.value < target else '>'}{target}"
        if self.value > limit:
            return f"{self.a}{self.sign}{self.b}{against or f'>{limit}'}"
        wrong = "" if slip is None else f"{natural_near_miss(self.value, slip)}{wait}"
        return f"{self.a}{self.sign}{self.b}={wrong}{self.value}{against}"
