"""The worker's side of a user's task: the imported file, and what its functions return, checked.

Many workers may start at once, beside a model that samples, so this imports little: what checks problems, solutions and
messages comes where there are some, and a verifier starts without.
"""

from __future__ import annotations

import importlib
import itertools
import random
import reprlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.sandbox.isolate import number, take

FUNCTIONS = {"problems": "problems(split, seed)", "verify": "verify(problem, text)"}  # those a file must have


class File:
    """The imported file, and its iterators of problems where the parent left them."""

    def __init__(self, path: str) -> None:
        # A module of a package among the worker's temporary files, which looks into the file's folder: so it may be
        # called random.py, `from . import helper` works, and processes of its own import it by its name.
        folder, package = str(Path(path).parent), f"task_{sha256(path.encode()).hexdigest()[:8]}"
        init = Path(tempfile.gettempdir(), package, "__init__.py")
        init.parent.mkdir(exist_ok=True)
        init.write_text(f"__path__ = [{folder!r}]", encoding="utf-8")
        sys.path += [folder, str(init.parents[1])]  # the folder for `import helper`
        self._seed(0)
        self._module = importlib.import_module(f"{package}.{Path(path).stem}")
        self._open: dict[tuple[str, int, int], tuple[Iterator[Any], list[Any]]] = {}

    def _seed(self, seed: int) -> None:
        for put, *_ in _generators():
            put(seed)

    def functions(self) -> list[str]:
        names = (*FUNCTIONS, "solution", "step")
        return [name for name in names if callable(getattr(self._module, name, None))]

    def problems(self, split: str, seed: int, start: int, count: int) -> list[dict[str, Any]]:
        """Next items from `start` of problems(split, seed), none at its end. A new worker starts it over, and skips."""
        from slingshot.tasks.user_returned import ReturnedProblem

        iterator, states = self._open.pop((split, seed, start), (None, []))
        for (*_, put), state in zip(_generators(), states, strict=False):
            put(state)
        if iterator is None:
            self._seed(seed)
            made = self._module.problems(split, seed)
            try:
                iterator = itertools.islice(made, start, None)
            except TypeError as error:
                raise SlingshotError(f"returned {reprlib.repr(made)}; it should yield problems") from error
        items = take(iterator, count)
        self._open[split, seed, start + len(items)] = iterator, [get() for _, get, _ in _generators()]
        if len(self._open) > 16:  # left where their readers stopped; who comes back to one starts it over
            del self._open[next(iter(self._open))]
        parsed = [ReturnedProblem.parse(item, f"item {place}") for place, item in enumerate(items, start)]
        return [dict(item) | {"key": item.key or item.prompt} for item in parsed]

    def verify(self, problem: dict[str, Any], text: str) -> bool | int | float:
        given = self._module.verify(problem, text)
        value = number(given)
        if value is None or not 0 <= value <= 1:
            raise SlingshotError(f"returned {reprlib.repr(given)}; return True, False or a number from 0 to 1")
        return value

    def solution(self, problem: dict[str, Any], style: str) -> dict[str, str]:
        from slingshot.tasks.user_returned import ReturnedSolution

        return ReturnedSolution.parse(self._module.solution(problem, style), "returned").model_dump()

    def step(self, problem: dict[str, Any], messages: list[dict[str, str]]) -> list[dict[str, str]] | None:
        """The messages that were returned: none, one or a list, each a dict or what a user says."""
        from slingshot.tasks.user_returned import ReturnedMessage

        given = self._module.step(problem, messages)
        said = given if isinstance(given, list | tuple) else [given]
        dicts = [each if isinstance(each, Mapping) else {"content": each} for each in said]
        return None if given is None else [ReturnedMessage.parse(each, "message").model_dump() for each in dicts]


def _generators() -> list[tuple[Callable[[int], Any], Callable[[], Any], Callable[[Any], Any]]]:
    """How the global random generators are seeded, and their states read and set. A file that draws from them draws by
    the seed too, the same in every process, whatever else is drawn meanwhile."""
    found: list[Any] = [(random.seed, random.getstate, random.setstate)]
    if numpy := sys.modules.get("numpy"):
        found.append((numpy.random.seed, numpy.random.get_state, numpy.random.set_state))
    return found
