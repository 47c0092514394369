"""The sizes of the house: lines of each room and of a file; the package's root; names that grep finds.

A room's limit is its size when it was last set; lower it when the room shrinks.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOPS = ("src", "tests")
FILE = 400  # lines

# Lines of Python at most: the package's, the tests'.
ROOMS = {
    ".": (56, 550),
    "base": (793, 426),
    "checkpoint": (2707, 2766),
    "cli": (2073, 1475),
    "cost": (614, 574),
    "data": (744, 420),
    "engine": (4293, 2898),
    "environments": (751, 297),
    "kernels": (864, 1254),
    "machine": (521, 347),
    "model": (2142, 1406),
    "parity": (0, 1124),
    "planning": (1932, 1310),
    "quantization": (672, 472),
    "recipe": (1494, 1174),
    "rollout": (1487, 1126),
    "sandbox": (1002, 616),
    "serving": (5811, 5402),
    "stages": (2458, 3596),
    "tasks": (3864, 2752),
    "text": (2015, 1788),
    "training": (3117, 2113),
}

FILES = {path: path.read_text(encoding="utf-8").splitlines() for top in TOPS for path in (ROOT / top).rglob("*.py")}


def room(path: Path) -> tuple[str, str]:
    """src or tests, and the room's name there."""
    top, *parts = path.relative_to(ROOT).parts
    parts = parts[1:] if top == "src" else parts
    return top, parts[0] if len(parts) > 1 else "."


@pytest.mark.parametrize("top", TOPS)
def test_no_room_outgrows_its_limit(top: str) -> None:
    lines = Counter[str]()
    for path, text in FILES.items():
        if room(path)[0] == top:
            lines[room(path)[1]] += len(text)
    limits = {name: limits[top == "tests"] for name, limits in ROOMS.items()}
    assert lines.keys() <= limits.keys()
    assert {name: count for name, count in lines.items() if count > limits[name]} == {}


def test_no_file_is_longer_than_one_sitting() -> None:
    assert {str(path.relative_to(ROOT)) for path, text in FILES.items() if len(text) > FILE} == set()


def test_nothing_lies_at_the_root_of_the_package() -> None:
    package = ROOT / "src" / "slingshot"
    assert {path.name for path in package.glob("*.py")} == {"__init__.py", "__main__.py"}


def test_a_class_is_found_by_its_name() -> None:
    """No two public classes of the package share a name, and none has a name that says nothing."""
    names = Counter(
        match[1]
        for path, text in FILES.items()
        if room(path)[0] == "src"
        for line in text
        if (match := re.match(r"class ([A-Z]\w*)", line))
    )
    assert {name for name, count in names.items() if count > 1} == set()
    assert names.keys() & {"Config", "Base", "Manager", "Handler", "Helper"} == set()
