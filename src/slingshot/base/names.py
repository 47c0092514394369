"""The way out of a misspelt name, told in the same words wherever a name is looked up.

did_you_mean("lrr", ["lr", "steps"])                 # "did you mean lr?"
did_you_mean("zzz", ["lr", "steps"])                 # "there are: lr, steps"
raise unknown_name("task", "arithmetics", tasks)     # "task 'arithmetics' is unknown; did you mean arithmetic?"
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from slingshot.base.errors import SlingshotError

_MOST_NAMES = 8  # a longer list is no way out: the nearest three of it are named


def closest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """The known name that was probably meant, in whatever case it was typed; None when none is near."""
    return next(iter(_near(name, known, 1, cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", cutoff: float = 0.6) -> str:
    """The name that was meant; where none is near, `otherwise`, or the names there are: all of a few, the nearest of
    many."""
    names = list(known)
    if meant := closest(name, names, cutoff):
        return f"did you mean {meant}?"
    if otherwise or not names:
        return otherwise or "there are none"
    if len(names) <= _MOST_NAMES:
        return f"there are: {', '.join(names)}"
    return f"the nearest of {len(names)} are {', '.join(_near(name, names, 3, 0.0))}"


def unknown_name(what: str, name: str, known: Iterable[str]) -> SlingshotError:
    """The error for a name that is not among `known`."""
    return SlingshotError(f"{what} {name!r:.80} is unknown; {did_you_mean(name, known)}")


def _near(name: str, known: Iterable[str], count: int, cutoff: float) -> list[str]:
    by_case = {spelling.lower(): spelling for spelling in known}
    return [by_case[key] for key in difflib.get_close_matches(name.lower(), by_case, n=count, cutoff=cutoff)]
