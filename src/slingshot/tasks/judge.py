"""Judging programs: tests run in another process than the answer, and what they see of it is plain data.

    passed_tests(answer, HiddenTests(inputs=[[3]], outputs=[9], entry_point="square"), limits)     # [True]

An answer cannot reach what judges it: expected values never enter its process, results are compared outside, and each
reply repeats a number that was drawn for its question. So ending the process, replacing a test, an `__eq__` that is
always true, or results that are printed earn nothing; only right values do.
"""

from __future__ import annotations

import ast
import json
import math
import re
import secrets
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Any

from slingshot.sandbox.program import Program, ProgramLimits, run_program
from slingshot.tasks.code_child import decode, encode
from slingshot.tasks.hidden_tests import HiddenTests, called_names

_CHILD = Path(__file__).with_name("code_child.py")
OPEN = "    pass\n"  # ends the preamble's last function, if that is what the answer is to complete
_REPLIES = (["error"], ["value"], ["after", "value"])
_SETTLE = "_arguments_are_as_they_became"  # what tests call behind a statement
_NOTHING = object()  # equal to nothing
_REAL = re.compile(r"[+-]?[0-9]*\.[0-9]+(e[+-]?[0-9]+)?", re.IGNORECASE)


def passed_tests(
    answer: str, hidden: HiddenTests, limits: ProgramLimits, trusted: bool = False, all_tests: bool = False
) -> list[bool]:
    """Which tests hold, within `limits.seconds` for all together; ends at the first that fails unless `all_tests`."""
    sources = _sources(answer, hidden)
    if not all(map(_is_python, sources)):  # what a model says that begins to learn is worth no process
        return [False]
    end = monotonic() + limits.seconds
    if hidden.tests:
        return _asserted(sources, hidden, limits, trusted)
    if hidden.entry_point:
        return _called(sources, hidden, limits, trusted, all_tests)
    passed, program = list[bool](), _program(*sources)
    for given, expected in zip(hidden.inputs, hidden.outputs, strict=True):
        left = replace(limits, seconds=max(0.0, end - monotonic()))
        outcome = run_program(program, given, left, trusted)
        passed.append(outcome.reason == "ok" and same_text(outcome.stdout, expected, hidden.tolerance))
        if not passed[-1] and not all_tests:
            break
    return passed


def _is_python(text: str) -> bool:
    try:
        ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True


class _Answer:
    """The process that holds an answer; asked no more once it has ended or spoken out of turn."""

    def __init__(self, sources: list[str], limits: ProgramLimits, trusted: bool) -> None:
        self.program = Program(_child("answer"), limits, trusted)
        self._sources = sources

    def define(self) -> bool:
        """Whether the answer could be run at all."""
        return "value" in (self.ask(self._sources) or {})

    def ask(self, *question: Any) -> dict[str, Any] | None:
        """{"value": encoded}, "after" with what it made of its arguments, or {"error": an exception's name}.

        None from an answer that is gone. A question: its kind ("call" a function, "operate" on objects, "use" an
        object's methods), a name, arguments, named arguments.
        """
        number = secrets.token_hex(8)
        try:
            repeated, reply = json.loads(self.program.exchange(json.dumps([number, *question])) or "")
            valid = repeated == number and isinstance(reply, dict) and sorted(reply) in _REPLIES
            return reply if valid and isinstance(reply.get("error", ""), str) else None
        except (ValueError, TypeError, RecursionError):
            return None


def _sources(answer: str, hidden: HiddenTests) -> list[str]:
    """What comes before an answer, and it; in one where it goes on in the middle of a function, as base models do."""
    begun = hidden.preamble.removesuffix(OPEN)
    if hidden.entry_point and begun != hidden.preamble and f"def {hidden.entry_point}" not in answer:
        return [begun + answer]
    return [hidden.preamble, answer]


def _program(preamble: str, answer: str) -> str:
    """One source of both. They are compiled apart, for an answer may begin with imports from __future__."""
    return f"{preamble}\nimport builtins\nbuiltins.exec({answer!r})\n" if preamble else answer


def _child(role: str) -> str:
    return f"{_CHILD.read_text(encoding='utf-8')}\n\n{role}()\n"


def _called(
    sources: list[str], hidden: HiddenTests, limits: ProgramLimits, trusted: bool, all_tests: bool
) -> list[bool]:
    """One that returns nothing is judged by its first argument: where it changes nothing, if it did so elsewhere."""
    held = _Answer(sources, limits, trusted)
    passed, idle, works_in_place = list[bool](), list[int](), False
    with held.program:
        if not held.define():
            return [False]
        for given, expected in zip(hidden.inputs, hidden.outputs, strict=True):
            reply = held.ask("use" if hidden.uses(given) else "call", hidden.entry_point, encode(given), encode({}))
            passed.append(reply is not None and same(_result(reply, expected), expected, hidden.tolerance))
            works_in_place |= passed[-1] and reply is not None and "after" in reply and reply["value"] is None
            if (
                reply == {"value": None}
                and expected is not None
                and given
                and same(given[0], expected, hidden.tolerance)
            ):
                idle.append(len(passed) - 1)
            elif reply is None or not (passed[-1] or all_tests):
                break
    return [each or (works_in_place and number in idle) for number, each in enumerate(passed)]


def _result(reply: dict[str, Any], expected: Any) -> Any:
    """What a function returned; where it returned nothing, what its first argument has become."""
    try:
        value = decode(reply["value"])
        return decode(reply["after"])[0][0] if value is None is not expected and "after" in reply else value
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError):  # an error, or not what `encode` wrote
        return _NOTHING


class _Settling(ast.NodeTransformer):
    """Behind each statement the arguments that a call in it has changed become what they are in the answer's process.

    Not sooner: `assert f(x) == sorted(x)` shall not hold for an f that empties x and returns it.
    """

    def visit(self, node: ast.AST) -> ast.AST:
        head = getattr(node, "test", getattr(node, "iter", None))
        self.generic_visit(node)
        if isinstance(node, ast.If | ast.While | ast.For) and head is not None and _calls(head):
            node.body[:0] = ast.parse(f"{_SETTLE}()").body
        for field in ("body", "orelse", "finalbody"):
            if isinstance(statements := getattr(node, field, None), list):
                setattr(node, field, [each for statement in statements for each in self._settled(statement)])
        return node

    def _settled(self, statement: ast.stmt) -> list[ast.stmt]:
        headed = isinstance(statement, ast.If | ast.While | ast.For)
        plain = isinstance(statement, ast.Assert | ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Expr)
        if not (headed or (plain and _calls(statement))):
            return [statement]
        return [statement, *ast.parse(f"{_SETTLE}()").body]


def _calls(node: ast.AST) -> bool:
    return any(isinstance(each, ast.Call) for each in ast.walk(node))


def _asserted(sources: list[str], hidden: HiddenTests, limits: ProgramLimits, trusted: bool) -> list[bool]:
    """An answer that ends, hangs or speaks out of turn loses all tests."""
    end = monotonic() + limits.seconds
    with ExitStack() as ends:
        tests = ends.enter_context(Program(_child("tests"), limits, trusted))
        held = _Answer(sources, limits, trusted)
        ends.enter_context(held.program)
        names = [hidden.entry_point] if hidden.entry_point else called_names(hidden)
        classes = [name for name in names if name[:1].isupper()]
        setup: dict[str, Any] = {"functions": sorted({*names} - {*classes}), "classes": classes, "settle": _SETTLE}
        setup |= {"preamble": hidden.preamble, "check": hidden.entry_point}
        line = json.dumps(setup | {"tests": [ast.unparse(_Settling().visit(ast.parse(test))) for test in hidden.tests]})
        if not held.define():
            return [False]
        while said := tests.exchange(line):
            message = json.loads(said)
            if "passed" in message:
                return [value is True for value in message["passed"]]
            if "failed" in message:
                held.program.close()
                held = _Answer(sources, replace(limits, seconds=max(0.0, end - monotonic())), trusted)
                ends.enter_context(held.program)
                if not held.define():
                    break
                line = "{}"
            elif (reply := held.ask(*message["call"])) is None:
                break
            else:
                line = json.dumps(reply)
    return [False]


def same(value: Any, expected: Any, tolerance: float) -> bool:
    """Whether a result is what was expected, as JSON has it: a tuple is a list, and floats are near."""
    if isinstance(expected, list):
        pairs = isinstance(value, list | tuple) and len(value) == len(expected) and zip(value, expected, strict=True)
        return bool(pairs is not False and all(same(*pair, tolerance) for pair in pairs))
    if isinstance(expected, dict):
        keyed = {str(key): each for key, each in value.items()} if isinstance(value, dict) else {}
        return keyed.keys() == expected.keys() and all(same(keyed[key], expected[key], tolerance) for key in keyed)
    if isinstance(expected, float) and type(value) in (int, float):
        return abs(value) < 1e300 and math.isclose(value, expected, rel_tol=tolerance, abs_tol=tolerance)
    if type(expected) is int and type(value) is float:
        return value == expected
    return type(value) is type(expected) and bool(value == expected)


def same_text(written: str, expected: str, tolerance: float) -> bool:
    """Whether a program wrote what was expected, word by word and line by line; numbers with a point are near."""
    lines, wanted = ([line.split() for line in text.strip().splitlines()] for text in (written, expected))
    return [len(line) for line in lines] == [len(line) for line in wanted] and all(
        word == want or (_REAL.fullmatch(want) and _REAL.fullmatch(word) and same(float(word), float(want), tolerance))
        for line, wants in zip(lines, wanted, strict=True)
        for word, want in zip(line, wants, strict=True)
    )
