"""The tool `calculator`: exact arithmetic on whole numbers, decimals and fractions.

    Calculator().call({"expression": "3 * (4 - 1/2)"})      # "10.5"
    Calculator().call({"expression": "1/3"})                # "1/3, about 0.333333333333"
    Calculator().call({"expression": "9**9**9"})            # ToolError: the result of a power has too many digits

Python's grammar reads the expression, and only numbers and operators are computed with; nothing is evaluated.
"""

from __future__ import annotations

import ast
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from decimal import Context
from fractions import Fraction
from typing import Any

from slingshot.environments.tool import ToolError, text_argument

_LONGEST = 500  # characters of an expression
_BITS = 4096  # of a numerator or denominator, some 1,200 digits
_DIGITS = 12  # of what stands beside a fraction that no decimal is equal to
_SIGNS = str.maketrans({"×": "*", "·": "*", "⋅": "*", "÷": "/", "−": "-", "^": "**"})
_RAISED = re.compile(r"[⁰¹²³⁴-⁹]+")
_TIMES = re.compile(r"(?<=[\d)\s])x(?=[\d(\s])")

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction | int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


class Calculator:
    """+ - * / // % ** and brackets; x, × and ÷ are read too, and ^ is a power."""

    name = "calculator"
    description = "Exact arithmetic: + - * / // % ** and brackets."
    parameters: Mapping[str, Any] = text_argument("expression")

    def call(self, arguments: dict[str, Any]) -> str:
        text = arguments["expression"].strip()
        if len(text) > _LONGEST:
            raise ToolError(f"the expression has {len(text)} characters, {_LONGEST} at most")
        text = _RAISED.sub(r"**\g<0>", text.translate(_SIGNS))  # before NFKC makes 52 of 5²
        text = unicodedata.normalize("NFKC", text).removesuffix("=").strip()
        text = _TIMES.sub("*", text)
        try:
            tree = ast.parse(text, mode="eval")
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            raise ToolError(f"{text!r:.80} is no expression; write one such as 2*(3+4)") from error
        return _spelt(_value(tree.body, text))


def _value(node: ast.expr, text: str) -> Fraction:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _number(ast.get_source_segment(text, node) or "")
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.UAdd | ast.USub):
        value = _value(node.operand, text)
        return -value if isinstance(node.op, ast.USub) else value
    if isinstance(node, ast.BinOp):
        left, right = _value(node.left, text), _value(node.right, text)
        if isinstance(node.op, ast.Pow):
            return _power(left, right)
        if compute := _BINARY.get(type(node.op)):
            try:
                return _bounded(Fraction(compute(left, right)))
            except ZeroDivisionError as error:
                raise ToolError("division by zero") from error
    raise ToolError(f"{ast.get_source_segment(text, node)!r:.80} is no arithmetic; numbers, + - * / // % ** and ()")


def _number(text: str) -> Fraction:
    """A literal as it is written, for 0.1 is a tenth. An exponent is bounded before it is computed with."""
    exponent = re.search(r"e([+-]?\d+)$", text, re.IGNORECASE)
    if exponent and abs(int(exponent[1])) > _BITS // 4:
        raise ToolError(f"{text:.80} has too large an exponent")
    try:
        return _bounded(Fraction(text))
    except ValueError as error:
        raise ToolError(f"{text:.80} is no decimal number") from error


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        raise ToolError("an exponent is a whole number; roots are not computed")
    if not base and exponent < 0:
        raise ToolError("division by zero")
    bits = max(abs(base.numerator), base.denominator).bit_length() - (base in (-1, 0, 1))
    if abs(exponent) * bits > 2 * _BITS:
        raise ToolError("the result of a power has too many digits")
    if not bits:  # of -1, 0 and 1 any power is quickly told
        exponent = exponent % 2 if base else min(exponent, Fraction(1))
    return _bounded(Fraction(base ** int(exponent)))


def _bounded(value: Fraction) -> Fraction:
    if max(abs(value.numerator), value.denominator).bit_length() > _BITS:
        raise ToolError("the result has too many digits")
    return value


def _spelt(value: Fraction) -> str:
    """A decimal where one is equal, else the fraction and about what it is."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, places = value.denominator, 0
    for factor in (2, 5):
        power = 0
        while rest % factor == 0:
            rest, power = rest // factor, power + 1
        places = max(places, power)
    if rest == 1 and places <= 50:
        digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
        return f"{'-' * (value < 0)}{digits[:-places]}.{digits[-places:]}"
    about = Context(prec=_DIGITS).divide(value.numerator, value.denominator)
    return f"{value}, about {about}"
