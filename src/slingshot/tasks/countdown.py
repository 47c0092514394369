"""The task `countdown`: reach a target with the given numbers, each used exactly once.

    Make 13 from 2, 3, 7.   ->   2+3+7 is 5+7 is 12, no. 3*2+7 is 6+7 is 13, yes.   ->   3*2+7
    2、3、7で13を作れ。       ->   2+3+7は5+7は12、違う。3*2+7は6+7は13、正解。            ->   3*2+7

Reasoning proposes an expression, works it out one operation at a time, compares, and tries another: what a model learns
to do longer when that pays. An answer is parsed by `ast` and accepted only if it holds the given integers, + - * / and
parentheses alone; nothing is evaluated as code.
"""

from __future__ import annotations

import ast
import operator
import random
import re
from collections.abc import Iterator
from fractions import Fraction
from typing import Self, TypeAlias

from pydantic import Field, model_validator

from slingshot.tasks.arithmetic import near_miss
from slingshot.tasks.task import GeneratedTask, Problem, Style

Tree: TypeAlias = "int | tuple[str, Tree, Tree]"  # a number, or an operator with its two sides

_PROMPT = {"en": "Make {target} from {numbers}.", "ja": "{numbers}で{target}を作れ。"}
_COMMA = {"en": ", ", "ja": "、"}
_IS = {"en": " is ", "ja": "は"}
_WRONG = {"en": ", no. ", "ja": "、違う。"}
_RIGHT = {"en": ", yes.", "ja": "、正解。"}
_SLIP = {"en": ", wait, ", "ja": "、いや"}

_OPERATORS: dict[type[ast.operator], str] = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}
_COMPUTE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
_SIGNS = str.maketrans("\u00d7\u00f7\u2212", "*/-")  # the typographic signs for times, divided by and minus
_EXPRESSION = re.compile(r"[0-9(][0-9+\-*/() ]*")
_MAX_LENGTH = 256  # characters of an expression
_MAX_DEPTH = 16  # operations inside one another


class Countdown(GeneratedTask):
    """Numbers from 1 to `max_number`; targets, and all that occurs on the way, are whole and from 1 to `max_target`.

    Solvable by construction. A worked solution tries up to `max_misses` others before the right expression.
    """

    n_numbers: int = Field(3, ge=2, le=8, description="numbers to be used")
    max_number: int = Field(10, ge=2, description="the largest of them")
    max_target: int = Field(50, le=10**6, description="the largest target, and the largest value on the way")
    operators: str = Field("+-*", pattern=r"^[+\-*/]+$", description="those a problem can be solved with, of + - * /")
    max_misses: int = Field(3, ge=0, description="attempts that fail in a worked solution, at most")

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
                prompt=_PROMPT[language].format(target=target, numbers=_COMMA[language].join(map(str, numbers))),
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

    def reasoning(self, problem: Problem, style: Style, rng: random.Random) -> str:
        language, target = problem.language, problem.data["target"]
        misses: dict[str, Tree] = {}
        for _ in range(int(rng.random() * (self.max_misses + 1))):
            combined = self._combine(problem.data["numbers"], rng)
            if combined is not None and combined[1] != target:
                misses[render(combined[0])] = combined[0]
        solving = parse(problem.answer)
        assert solving is not None, f"{problem.answer!r} was written by render()"
        attempts = [*misses.values(), solving]
        slipped = int(rng.random() * len(attempts)) if style == "slips" else -1
        worked = [_work_out(tree, language, rng if index == slipped else None) for index, tree in enumerate(attempts)]
        return _WRONG[language].join(worked) + _RIGHT[language]

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


def _work_out(tree: Tree, language: str, slip: random.Random | None) -> str:
    """ "3*2+7 is 6+7 is 13": one operation done at a time. With `slip`, one result is first wrong, then corrected."""
    stages = [tree]
    while not isinstance(stages[-1], int):
        stages.append(_reduce(stages[-1], 0))
    said = [render(stage) for stage in stages]
    if slip is not None:
        at = int(slip.random() * (len(stages) - 1))
        said[at + 1] = render(_reduce(stages[at], near_miss(0, slip))) + _SLIP[language] + said[at + 1]
    return _IS[language].join(said)


def _reduce(tree: Tree, error: int) -> Tree:
    """The tree with its first operation on two plain numbers replaced by its result plus `error`."""
    assert not isinstance(tree, int), "a number has no operation left"
    sign, left, right = tree
    if not isinstance(left, int):
        return (sign, _reduce(left, error), right)
    if not isinstance(right, int):
        return (sign, left, _reduce(right, error))
    result = apply(sign, left, right)
    assert result is not None, "generated expressions stay positive and whole"
    return result + error if result + error > 0 else result - error
