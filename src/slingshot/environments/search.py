"""The tool `search`: passages of the text files in a folder, the nearest to a question first, by BM25.

FolderSearch(Path("notes")).call({"query": "when was the bridge built"})      # "notes/bridge.md\\nThe bridge ..."

The files are read once, when it starts; a query is words and never a path. BM25 as in Robertson and Zaragoza,
"The Probabilistic Relevance Framework: BM25 and Beyond" (2009), 3.1, with k1 = 1.2, b = 0.75.
"""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.environments.tool import ToolError, text_argument

_PASSAGE = 600  # characters, about; a file is cut at line ends
_FOUND = 4  # passages told
_MOST_BYTES = 64 << 20  # of all files together
_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[^\W_]+")
_ALONE = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # scripts without spaces: a word a pair of these


class FolderSearch:
    """Text files below `folder`, hidden ones and links that lead out of it apart. SlingshotError: there is none."""

    name = "search"
    description = "Finds passages in a folder of text files."
    parameters: Mapping[str, Any] = text_argument("query")

    def __init__(self, folder: Path) -> None:
        self._passages: list[tuple[str, str]] = []  # of a file's name, and text
        self._holders: dict[str, list[tuple[int, int]]] = {}  # word -> (passage, how often)
        self._lengths: list[int] = []  # words
        for name, text in _files(folder):
            for passage in _cut(text):
                self._add(name, passage)
        if not self._passages:
            raise SlingshotError(f"search:{folder}: there is no text file in it")
        self._mean = sum(self._lengths) / len(self._lengths)

    def call(self, arguments: dict[str, Any]) -> str:
        words = set(_words(arguments["query"][:_PASSAGE]))
        if not words:
            raise ToolError("the query has no words")
        scores = Counter[int]()
        for word in words:
            holders = self._holders.get(word, [])
            rarity = math.log(1 + (len(self._passages) - len(holders) + 0.5) / (len(holders) + 0.5))
            for place, count in holders:
                long = 1 - _B + _B * self._lengths[place] / self._mean
                scores[place] += rarity * count * (_K1 + 1) / (count + _K1 * long)  # type: ignore[assignment]
        best = sorted(scores, key=lambda place: (-scores[place], place))[:_FOUND]
        if not best:
            raise ToolError(f"nothing found for {arguments['query']!r:.80}")
        return "\n\n".join("{}\n{}".format(*self._passages[place]) for place in best)

    def _add(self, name: str, passage: str) -> None:
        counts = Counter(_words(f"{name} {passage}"))
        for word, count in counts.items():
            self._holders.setdefault(word, []).append((len(self._passages), count))
        self._passages.append((name, passage))
        self._lengths.append(counts.total())


def _files(folder: Path) -> list[tuple[str, str]]:
    """Names, from the folder on, and texts."""
    if not folder.is_dir():
        raise SlingshotError(f"search:{folder}: there is no such folder")
    root, found, size = folder.resolve(), list[tuple[str, str]](), 0
    for at, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(at, name) for name in sorted(names) if not name.startswith(".")):
            if not path.is_file() or not path.resolve().is_relative_to(root):
                continue
            if (size := size + path.stat().st_size) > _MOST_BYTES:
                raise SlingshotError(f"search:{folder}: more than {_MOST_BYTES >> 20} MiB; name a folder within it")
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (UnicodeDecodeError, OSError):
                continue
            if text.strip() and "\0" not in text:
                found.append((str(path.relative_to(root)), text))
    return found


def _cut(text: str) -> list[str]:
    """Pieces of about a passage's size: whole lines, but for lines that are longer."""
    pieces, piece = list[str](), ""
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), _PASSAGE):
            part = line[start : start + _PASSAGE]
            if len(piece) + len(part) > _PASSAGE:
                pieces.append(piece)
                piece = ""
            piece += part
    return [each.strip() for each in [*pieces, piece] if each.strip()]


def _words(text: str) -> list[str]:
    words = list[str]()
    for word in _WORD.findall(unicodedata.normalize("NFKC", text).casefold()):
        if _ALONE.search(word):
            words += [word[place : place + 2] for place in range(max(1, len(word) - 1))]
        else:
            words.append(word)
    return words
