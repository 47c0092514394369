"""What runs inside the two processes of a judged function: one holds the answer, the other its tests.

tasks/judge.py sends this file as text, with the call of `answer()` or `tests()` at its end. The two speak JSON lines,
and only plain data passes between them: a test sees a list of numbers, never an object of the answer's. Where a test
speaks of a class, it holds a reference, and each thing it does with that is a question to the answer's process.
"""

from __future__ import annotations

import builtins
import json
import operator
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


def encode(value: object, refer: Callable[[object], Any] | None = None) -> Any:
    """JSON for the values that Python's literals write; for others what `refer` says, or TypeError."""
    if value is None:
        return None
    for plain in (bool, int, float, str):
        if isinstance(value, plain):
            return plain(value)
    if isinstance(value, list):
        return [encode(each, refer) for each in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key, refer), encode(each, refer)] for key, each in value.items()]}
    if isinstance(value, tuple | set | frozenset):
        kind = "tuple" if isinstance(value, tuple) else "set" if isinstance(value, set) else "frozenset"
        return {kind: [encode(each, refer) for each in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, bytes | bytearray):
        return {"bytes": list(value)}
    if refer is not None:
        return {"object": refer(value)}
    raise TypeError(f"{type(value).__name__} is no plain value")


def decode(value: Any, find: Callable[[Any], object] | None = None) -> Any:
    """What `encode` encoded; what `find` finds for a reference, where there may be some."""
    if isinstance(value, list):
        return [decode(each, find) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, items),) = value.items()
    items = decode(items, find)
    if kind == "object" and find is not None:
        return find(items)
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


# What may be done with an object of the answer's, beside calling it and its methods.
_COMPARED = ("eq", "ne", "lt", "le", "gt", "ge")
_COMPUTED = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
_BINARY = (*_COMPARED, *_COMPUTED, "contains", "getitem", "delitem")
_OPERATIONS: dict[str, Callable[..., object]] = {
    **{name: getattr(operator, name) for name in [*_BINARY, "neg", "setitem"]},
    **{work.__name__: work for work in (getattr, setattr, isinstance, len, str, repr, hash, bool, list, next)},
    "call": lambda work, *args, **named: work(*args, **named),
}
# What plain values alone are asked: an object that stands instead of one would say what the test wants to hear.
_YES_OR_NO = {
    *(name for name in dir(str) if name.startswith("is")), *("startswith", "endswith", "is_integer"),
    *("issubset", "issuperset", "isdisjoint"),
}  # fmt: skip


def answer() -> None:
    """Define the answer, then call its functions as asked. A reply repeats the number of its question."""
    lines, replies = pipes()
    number, sources = json.loads(lines.readline())
    scope: dict[str, Any] = {}
    held = list[object]()  # objects that tests refer to by their places

    def hold(value: object) -> int:
        held.append(value)
        return len(held) - 1

    def found(name: str) -> Callable[..., object]:
        """A function of the answer; else a method of its class Solution, as LeetCode asks for it."""
        if name in scope:
            return scope[name]
        if "Solution" in scope:
            return getattr(scope["Solution"](), name)
        raise NameError(name)  # no KeyError, which a test may want

    def find(reference: int | str) -> object:
        return found(reference) if isinstance(reference, str) else held[reference]

    def call(name: str, args: Any, named: Any) -> dict[str, Any]:
        """What a function returns, and its arguments where it has changed them."""
        given = decode([args, named])
        said = {"value": encode(found(name)(*given[0], **given[1]))}
        return said | changes(given, [args, named])

    def operate(name: str, args: Any, named: Any) -> dict[str, Any]:
        """What an operation on objects gives, plain or another object, and plain arguments that a call has changed."""
        given = [decode(args, find), decode(named, find)]
        said = {"value": encode(_OPERATIONS[name](*given[0], **given[1]), hold)}
        return said | (changes([given[0][1:], given[1]], [args[1:], named]) if name == "call" else {})

    def changes(given: Any, before: Any) -> dict[str, Any]:
        try:
            after = encode(given)
        except (TypeError, RecursionError):  # objects are among them, or something else has been put into them
            return {}
        return {} if after == before else {"after": after}

    def use(name: str, args: Any, named: Any) -> dict[str, Any]:
        """What the methods of a new object return, one after the other: names and arguments, the class's first."""
        methods, given = decode(args)
        made = scope[name](*given[0])
        results = (getattr(made, method)(*each) for method, each in zip(methods[1:], given[1:], strict=True))
        return {"value": encode([None, *results])}

    def reply(number: str, work: Callable[..., dict[str, Any]], *args: Any) -> None:
        try:
            said = work(*args)
        except BaseException as error:  # SystemExit too
            said = {"error": type(error).__name__}
        replies.write(json.dumps([number, said]) + "\n")
        replies.flush()

    def define() -> dict[str, Any]:
        scope.update(run(sources, "answer"))
        return {"value": None}

    reply(number, define)
    for line in lines:
        number, kind, *question = json.loads(line)
        reply(number, {"call": call, "operate": operate, "use": use}[kind], *question)


def tests() -> None:
    """Run tests that call the answer's functions in the other process, and tell which of them hold."""
    lines, replies = pipes()

    def say(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    asked = 0
    changed: list[tuple[Any, Any]] = []

    def ask(kind: str, name: str, args: Any, named: Any) -> dict[str, Any]:
        nonlocal asked
        asked += 1
        say({"call": [kind, name, args, named]})
        reply: dict[str, Any] = json.loads(lines.readline())
        if "error" in reply:
            known = getattr(builtins, reply["error"], None)
            ends_a_loop = known in (StopIteration, StopAsyncIteration) and name != "next"  # maybe one of the test's
            if isinstance(known, type) and issubclass(known, Exception) and not ends_a_loop:
                raise known
            raise RuntimeError(reply["error"])
        return reply

    def settle() -> None:
        while changed:
            restore(*changed.pop(0))

    def stands_for(name: str) -> Callable[..., Any]:
        def function(*args: Any, **named: Any) -> Any:
            settle()
            reply = ask("call", name, encode(args)["tuple"], encode(named))
            value = decode(reply["value"])
            if "after" in reply:
                changed.append(([args, named], decode(reply["after"])))
            if value is None:
                settle()
            return value

        return function

    class Reference:
        """An object or a class of the answer's. Equal to no plain value, whatever the answer says.

        _made: whether it is a class, or what calling one gave; any other may be there instead of a plain value.
        _mixed: whether it was computed of such a one and of a plain value.
        """

        def __init__(self, place: int | str, made: bool = False, mixed: bool = False) -> None:
            for name, value in (("_place", place), ("_made", made), ("_mixed", mixed)):
                object.__setattr__(self, name, value)

        def __getattr__(self, name: str) -> Any:
            if name.startswith("_") or (name in _YES_OR_NO and not self._made):
                raise AttributeError(name)
            return operated("getattr", self, name)

        def __contains__(self, item: object) -> bool:
            return bool(operated("contains", self, item) if self._made else item in operated("list", self))

        def __bool__(self) -> bool:
            if self._mixed:
                raise TypeError("an object computed of a plain value is neither true nor false")
            return bool(operated("bool", self))

        def __instancecheck__(self, instance: object) -> bool:
            return isinstance(instance, Reference) and bool(operated("isinstance", instance, self))

        def __setattr__(self, name: str, value: object) -> None:
            operated("setattr", self, name, value)

        def __call__(self, *args: Any, **named: Any) -> Any:
            return operated("call", self, *args, **named)

        def __iter__(self) -> Any:
            return iter(operated("list", self))

    def operated(name: str, *args: Any, **named: Any) -> Any:
        settle()
        refer = lambda each: each._place if isinstance(each, Reference) else encode(each)  # noqa: E731
        reply = ask("operate", name, encode(args, refer)["tuple"], encode(named, refer))
        if "after" in reply:
            changed.append(([args[1:], named], decode(reply["after"])))
        objects = [each for each in args if isinstance(each, Reference)]
        made = name in _COMPUTED and all(each._made for each in objects)
        made = made or (name in ("getattr", "call") and isinstance(args[0]._place, str))
        mixed = name in _COMPUTED and not made and (len(objects) < len(args) or any(each._mixed for each in objects))
        return decode(reply["value"], lambda place: Reference(place, made, mixed))

    def binary(name: str, swapped: bool = False) -> Callable[[Any, Any], Any]:
        def operation(this: Any, other: Any) -> Any:
            alike = isinstance(other, Reference)
            if name in _COMPARED and not alike:  # an answer's word is none on whether it is what was expected
                return NotImplemented
            made = operated(name, *((other, this) if swapped else (this, other)))
            if name in _COMPARED and (this._mixed or other._mixed):
                raise TypeError(f"{name} of an object that was computed of a plain value")
            if not alike and name in _COMPUTED and not isinstance(made, Reference):
                raise TypeError(f"{name} of an object and a plain value gives a plain value")
            return made

        return operation

    for each in (*_COMPARED, *_COMPUTED, "getitem", "delitem"):
        plain = each.rstrip("_")
        setattr(Reference, f"__{plain}__", binary(each))
        if each in _COMPUTED:
            setattr(Reference, f"__r{plain}__", binary(each, swapped=True))
    for each in ("neg", "len", "str", "repr", "hash", "next", "setitem"):
        setattr(Reference, f"__{each}__", lambda *args, each=each: operated(each, *args))

    setup = json.loads(lines.readline())
    passed = []
    for test in setup["tests"]:
        before = asked
        try:
            scope = run([setup["preamble"]], "tests")
            scope.update({name: stands_for(name) for name in setup["functions"]})
            scope.update({name: Reference(name, made=True) for name in setup["classes"]})
            scope[setup["settle"]] = settle
            exec(compile(test, "test.py", "exec", dont_inherit=True), scope)
            if setup["check"] and "check" in scope:
                scope["check"](scope[setup["check"]])
            passed.append(asked > before)
        except BaseException:
            passed.append(False)
            if setup["classes"]:  # its objects may have heard what they should have been
                say({"failed": len(passed)})
                lines.readline()
        changed.clear()
    say({"passed": passed})


def restore(given: Any, after: Any) -> None:
    """Make lists, dicts and sets what they have become in the other process; they stay the objects that they are."""
    if isinstance(given, list | tuple) and isinstance(after, list | tuple) and len(given) == len(after):
        for place, each in enumerate(after):
            restore(given[place], each)
            if isinstance(given, list) and given[place] != each:
                given[place] = each
    elif isinstance(given, list):
        given[:] = after
    elif isinstance(given, dict):
        kept = {key: given[key] for key in after if key in given}
        for key, each in kept.items():
            restore(each, after[key])
        given.clear()
        given.update({key: kept[key] if key in kept and kept[key] == each else each for key, each in after.items()})
    elif isinstance(given, set):
        given.clear()
        given.update(after)
    elif isinstance(given, bytearray):
        given[:] = after
