"""docs/architecture.md is true: every file it mentions is there, and says every name that follows it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MENTIONED = [
    (found[1], re.findall(r"`([\w.]+)[^`]*`", found[2]))
    for found in re.finditer(r"`([\w/]+\.py)`((?:,?\s+`[A-Za-z_.]+`)*)", (ROOT / "docs/architecture.md").read_text())
]


@pytest.mark.parametrize(("file", "names"), MENTIONED, ids=[f"{file} {names}" for file, names in MENTIONED])
def test_every_file_and_name_is_there(file: str, names: list[str]) -> None:
    text = (ROOT / file if file.startswith("tests/") else ROOT / "src/slingshot" / file).read_text()
    for name in names:
        assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b|^{name}\b", text, re.MULTILINE), f"{file}: no {name}"


def test_the_walk_is_found() -> None:
    assert len(MENTIONED) > 40 and sum(len(names) for _, names in MENTIONED) > 40
