"""Contamination: which of an evaluation's problems stand in data that a model may have been trained on.

    found = contaminated([problem.prompt for problem in problems], ["runs/tiny/sample", "mine.jsonl"])
    found["whole"], found["13-gram"]         # places of problems that stand there whole, or share 13 tokens with it

Memory is bounded by the problems: their n-grams are kept, and the data is read once, a row or a megabyte at a time.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import jsonl_rows, os_errors, parquet_rows

_N = 13  # tokens, as GPT-3's authors compare (arXiv 2005.14165, appendix C)
_TOKEN = re.compile(r"\w+|[^\w\s]")  # signs too: 3 + 4 is not 3 - 4
_PIECE = 1 << 20  # characters
_KINDS = (".jsonl", ".parquet", ".txt", ".md")


def contaminated(prompts: Sequence[str], sources: Sequence[str]) -> dict[str, set[int]]:
    """Places of the prompts that stand in the sources "whole", and of those that share a "13-gram" with them.

    A shorter prompt counts whole only, and so does an n-gram of several prompts: those words are their form's.
    """
    wholes = [tuple(_TOKEN.findall(prompt.casefold())) for prompt in prompts]
    starts, owners = defaultdict[tuple[str, ...], set[int]](set), defaultdict[tuple[str, ...], set[int]](set)
    for place, whole in enumerate(wholes):
        starts[whole[:_N]].add(place)
        for gram in _grams(whole, _N):
            owners[gram].add(place)
    found: dict[str, set[int]] = {"whole": set(), "13-gram": set()}
    for text in (text for source in sources for text in texts(Path(source))):
        tokens = tuple(_TOKEN.findall(text.casefold()))
        for size in {len(start) for start in starts}:
            for at, gram in enumerate(_grams(tokens, size)):
                places = starts.get(gram, ())
                found["whole"].update(p for p in places if tokens[at : at + len(wholes[p])] == wholes[p])
                if size == _N and len(owner := owners.get(gram, ())) == 1:
                    found["13-gram"].update(owner)
    found["13-gram"] |= found["whole"]
    return found


def _grams(tokens: tuple[str, ...], size: int) -> Iterator[tuple[str, ...]]:
    return (tokens[at : at + size] for at in range(len(tokens) - size + 1)) if size else iter(())


def texts(path: Path) -> Iterator[str]:
    """The texts of a file, or of all files of data in a folder. SlingshotError for what is missing or unreadable."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.suffix in _KINDS)
        if not files:
            raise SlingshotError(f"contamination: {path} holds no file of data ({', '.join(_KINDS)})")
        for below in files:
            yield from texts(below)
        return
    if path.suffix == ".parquet":
        yield from (" ".join(_strings(row)) for row in parquet_rows(path))
        return
    try:
        with os_errors(f"contamination: cannot read {path}"), path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                yield from (" ".join(_strings(row)) for _, row in jsonl_rows(path, file))
            else:
                while text := file.read(_PIECE) + file.readline():
                    yield text
    except UnicodeDecodeError as error:
        raise SlingshotError(f"contamination: {path} is not UTF-8 text") from error


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _strings(each)
