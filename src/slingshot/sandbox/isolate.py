"""The worker's side of the sandbox: an emptied environment, limits, and objects that answer calls.

A process of its own, started by `worker.Worker`; it imports the standard library and what its objects need.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import json
import os
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from decimal import Decimal
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from slingshot.base.errors import SlingshotError

T = TypeVar("T")

_MAX_MESSAGE = 300  # characters of an error's own words


def environment(home: str) -> dict[str, str]:
    """All that a worker sees of its parent's environment: where programs are, and the language; no tokens, no home.

    One thread each, as every thread reserves address space; a fixed hash seed, so that sets keep their order.
    """
    threads = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL")}
    path, language = os.environ.get("PATH", os.defpath), os.environ.get("LANG", "C.UTF-8")
    return {"PATH": path, "LANG": language, "HOME": home, "TMPDIR": home, "PYTHONHASHSEED": "0", **threads}


def serve() -> None:
    """Build objects and call their methods, one a line, until the pipe closes."""
    # The pipes move out of the way of print() and input(): what the code writes goes nowhere, and it reads nothing.
    lines, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(nowhere, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    objects, memory, own = list[Any](), 0, os.getpid()
    for line in lines:
        message = json.loads(line)
        # Should the parent itself be killed, nobody but the alarm is left to end a call that hangs.
        signal.alarm(int(message["timeout"]) + 10)
        before = _computed()
        try:
            if "target" in message:
                memory = max(memory, message["memory"])
                with contextlib.suppress(ValueError, OSError):  # a system may know no such limit, or have a lower one
                    resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
                module, _, name = message["target"].partition(":")
                objects.append(getattr(importlib.import_module(module), name)(*message["args"]))
                value = len(objects) - 1
            else:
                value = getattr(objects[message["object"]], message["method"])(*message["args"])
            reply = _encode(value)
        except BaseException as error:  # sys.exit() in a user's verifier too
            reply = json.dumps({"error": _describe(error)})
        if os.getpid() != own:  # a child that the code forked came back: the reply is its parent's
            os._exit(0)
        signal.alarm(0)
        reply = f'{reply[:-1]}, "computed": {_computed() - before:.3f}}}'
        replies.write(reply.encode() + b"\n")
        replies.flush()


def take(items: Iterator[T], count: int, seconds: float = 1.0) -> list[T]:
    """Up to `count` next items, fewer once `seconds` have passed, so that slow ones stay in time; none at the end."""
    deadline, taken = time.monotonic() + seconds, list[T]()
    for item in itertools.islice(items, count):
        taken.append(item)
        if time.monotonic() >= deadline:
            break
    return taken


def number(value: Any) -> bool | int | float | None:
    """The plain number that `value` is, of numpy, torch, fractions, decimal ...; None if it is none."""
    if callable(item := getattr(value, "item", None)) and getattr(value, "shape", None) == ():
        value = item()
    if isinstance(value, bool | int | float):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real | Decimal) else None


def _computed() -> float:
    """Seconds of a core that this process has used, and those it started and waited for."""
    return sum(os.times()[:4])


def _plain(value: Any) -> Any:
    if (plain := number(value)) is not None:
        return plain
    if callable(tolist := getattr(value, "tolist", None)):  # an array
        return tolist()
    raise TypeError(f"Object of type {type(value).__name__} is not JSON serializable")


def _encode(value: Any) -> str:
    try:
        return json.dumps({"value": value}, allow_nan=False, default=_plain)
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return json.dumps({"error": f"returned something that is not JSON: {_shorten(error)}"})


def _describe(error: BaseException) -> str:
    """One line: what was raised and where. A SlingshotError has said so itself."""
    if isinstance(error, SlingshotError):
        return str(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = error if isinstance(error, SyntaxError) and error.filename else frames[-1] if frames else None
    where = f" ({Path(place.filename or '').name} line {place.lineno})" if place else ""
    return f"raised {type(error).__name__}: {_shorten(error)}{where}"


def _shorten(error: BaseException) -> str:
    try:
        words = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # a user's exception may fail at this as well
        words = "without words"
    return " ".join(words[:_MAX_MESSAGE].split())
