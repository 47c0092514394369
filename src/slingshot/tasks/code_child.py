"""What runs inside the two processes of a judged function: one holds the answer, the other its tests.

tasks/judge.py sends this file as text, with the call of `answer()` or `tests()` at its end. The two speak JSON lines,
and only plain data passes between them: a test sees a list of numbers, never an object of the answer's.
"""

from __future__ import annotations

import builtins
import json
import os
import sys
import types

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing itself takes longer to import than all the rest
    from collections.abc import Callable
    from typing import Any, TextIO


def pipes() -> tuple[TextIO, TextIO]:
    """Lines in, lines out, moved out of the way of print() and input()."""
    lines, replies = os.fdopen(os.dup(0), encoding="utf-8"), os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    return lines, replies


def encode(value: object) -> Any:
    """JSON for the values that Python's literals write; TypeError for others."""
    if value is None:
        return None
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, list):
        return [encode(each) for each in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key), encode(each)] for key, each in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        kind = "tuple" if isinstance(value, tuple) else "set" if isinstance(value, set) else "frozenset"
        return {kind: [encode(each) for each in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value: Any) -> Any:
    """What `encode` encoded."""
    if isinstance(value, list):
        return [decode(each) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    items = decode(items)
    if kind == "dict":
        return {key: each for key, each in items}
    if kind == "complex":
        return complex(*items)
    kinds: dict[str, Callable[[Any], Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "bytes": bytes}
    return kinds[kind](items)


def run(sources: list[str], name: str) -> dict[str, Any]:
    """A module of these sources; it is not __main__, so what it does as a program is not done."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    for source in sources:
        exec(compile(source, name + ".py", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def answer() -> None:
    """Define the answer, then call its functions as asked. A reply repeats the number of its question."""
    lines, replies = pipes()
    number, sources = json.loads(lines.readline())
    scope: dict[str, Any] = {}

    def found(name: str) -> Callable[..., object]:
        """A function of the answer; else a method of its class Solution, as LeetCode asks for it."""
        return scope[name] if name in scope else getattr(scope["Solution"](), name)

    def reply(number: str, work: Callable[..., object], *args: Any) -> None:
        try:
            said = {"value": encode(work(*args))}
        except BaseException as error:  # SystemExit too
            said = {"error": type(error).__name__}
        replies.write(json.dumps([number, said]) + "\n")
        replies.flush()

    reply(number, lambda: scope.update(run(sources, "answer")))
    for line in lines:
        number, *question = json.loads(line)
        reply(number, lambda name, args, named: found(name)(*decode(args), **decode(named)), *question)


def tests() -> None:
    """Run tests that call the answer's functions in the other process, and tell which of them hold."""
    lines, replies = pipes()

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    asked = 0

    def stands_for(name: str) -> Callable[..., Any]:
        def function(*args: Any, **named: Any) -> Any:
            nonlocal asked
            asked += 1
            say({"call": [name, encode(args), encode(named)]})
            reply = json.loads(lines.readline())
            if "error" in reply:
                kind = getattr(builtins, reply["error"], None)
                raise kind if isinstance(kind, type) and issubclass(kind, Exception) else RuntimeError(reply["error"])
            return decode(reply["value"])

        return function

    setup = json.loads(lines.readline())
    functions = {name: stands_for(name) for name in setup["names"]}
    passed = []
    for test in setup["tests"]:
        before = asked
        try:
            scope = run([setup["preamble"]], "tests")
            scope.update(functions)
            exec(compile(test, "test.py", "exec", dont_inherit=True), scope)
            if setup["check"] and "check" in scope:
                scope["check"](scope[setup["check"]])
            passed.append(asked > before)
        except BaseException:
            passed.append(False)
    say({"passed": passed})
