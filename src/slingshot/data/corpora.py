"""Corpora: text documents from files, folders, JSONL, Parquet, data sets of the hub, Python's own standard library and
installed packages.

    corpus = Corpus.open(["stories/", "corpus.jsonl", "stdlib"])
    train, heldout = corpus.split(heldout=0.05)
    for text in Corpus.stream(["huge.parquet"]): ...

A corpus that is opened is held in memory: it is packed and shuffled as a whole. One that is streamed is not.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import parse_json

_log = logging.getLogger(__name__)

_STDLIB, _PACKAGE, _DATASET = "stdlib", "package:", "dataset:"
_PIECE = 8192  # characters: one long file is read as several documents, so that part of it can be held out
# Of the standard library: installed packages, and its own tests, half of it and in part malformed on purpose.
_NOT_SOURCE = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Corpus:
    """Documents in memory, in a fixed order, none blank. skipped: files of folders that are not UTF-8 text."""

    documents: list[str]
    skipped: int

    @classmethod
    def open(cls, sources: str | Path | Iterable[str | Path], text_key: str = "text") -> Corpus:
        """Read sources, each of them one of

        a folder        every file below it, hidden ones apart, each a document; what is no text is skipped and logged
        a text file     documents of about 8192 characters, cut at line ends
        .jsonl .parquet one document a row, under `text_key`; also within folders
        "stdlib"        the modules of Python's standard library, its tests apart
        "package:NAME"  likewise those of a package that is installed beside slingshot
        "dataset:NAME"  the rows of a data set's split train, as they are downloaded: org/name[@REVISION][:SUBSET] of
                        the hub, or a folder in such a repository's shape

        SlingshotError names a source that is missing, unreadable, binary or empty, or a row without text.
        """
        documents: list[str] = []
        skipped: list[SlingshotError] = []
        for source in [sources] if isinstance(sources, str | Path) else sources:
            documents += _texts(source, text_key, skipped)
        return cls(documents, len(skipped))

    @staticmethod
    def stream(sources: Iterable[str | Path], text_key: str = "text") -> Iterator[str]:
        """The documents that `open` finds, one after the other."""
        return itertools.chain.from_iterable(_texts(source, text_key, []) for source in sources)

    @staticmethod
    def size(sources: Iterable[str | Path]) -> int:
        """Bytes of all files that `stream` reads."""
        return sum(file.stat().st_size for source in sources for file in _files_of(source))

    @staticmethod
    def check(sources: Iterable[str | Path], text_key: str = "text") -> None:
        """Read the first document of every source: SlingshotError where `open` would find that it is none."""
        for source in sources:
            next(_texts(source, text_key, []))

    def split(self, heldout: float = 0.05) -> tuple[list[str], list[str]]:
        """(train, held-out) documents. Held out is the share whose texts have the smallest SHA-256.

        So the choice survives moving and reordering files, and copies of one text never stand on both sides.
        """
        digests = [hashlib.sha256(text.encode(errors="surrogatepass")).digest() for text in self.documents]
        different = sorted(set(digests))
        chosen = set(different[: min(math.ceil(heldout * len(different)), len(different) - 1)])
        sides: tuple[list[str], list[str]] = ([], [])
        for text, digest in zip(self.documents, digests, strict=True):
            sides[digest in chosen].append(text)
        return sides


def is_path(source: str | Path) -> bool:
    """Whether a source is a file or folder of the user's, and comes neither with what is installed nor from the hub."""
    return str(source) != _STDLIB and not str(source).startswith((_PACKAGE, _DATASET))


class _NotText(SlingshotError):
    """A file that cannot be read or is binary: skipped within a folder, an error by itself."""


def _texts(source: str | Path, text_key: str, skipped: list[SlingshotError]) -> Iterator[str]:
    """The documents of one source that are not blank; why files of folders are no text goes to `skipped`."""
    path, before, empty = _root(source), len(skipped), True
    if str(source).startswith(_DATASET):
        texts = _read_dataset(str(source).removeprefix(_DATASET), text_key)
    elif path.is_dir():
        texts = _read_folder(path, _files_of(source), text_key, skipped)
    elif path.exists():
        texts = _read_file(path, text_key, whole=False)
    else:
        raise SlingshotError(f"corpus {path} does not exist; give a file, a folder, stdlib, or package:NAME")
    for text in texts:
        if text.strip():
            empty = False
            yield text
    if empty:
        unread = f" ({len(skipped) - before} files are not UTF-8 text)" if len(skipped) > before else ""
        raise SlingshotError(f"corpus {source} holds no text{unread}; give UTF-8 text, .jsonl or .parquet")


def _root(source: str | Path) -> Path:
    """Where a source lies. A package is found by its name and not imported."""
    if str(source) == _STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    if not str(source).startswith(_PACKAGE):
        return Path(source)
    name = str(source).removeprefix(_PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise SlingshotError(f"corpus {source}: no package of that name is installed; pip install it, or give a folder")
    return Path(spec.submodule_search_locations[0])


def _files_of(source: str | Path) -> list[Path]:
    """The files of one source, in the order of their paths."""
    suffix, without = ("", frozenset[str]()) if is_path(source) else (".py", _NOT_SOURCE)
    root = _root(source)
    files = [root] if root.is_file() else []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in without | {"__pycache__"}]
        paths = (Path(folder, name) for name in names if not name.startswith(".") and name.endswith(suffix))
        files += [path for path in paths if path.is_file()]  # not a pipe, a socket or a dangling link
    return sorted(files)


def _read_folder(root: Path, files: list[Path], text_key: str, skipped: list[SlingshotError]) -> Iterator[str]:
    """The documents of all these files below a folder. A file is skipped where it turns out binary at its start."""
    unread: list[SlingshotError] = []
    for file in files:
        begun = False
        try:
            for text in _read_file(file, text_key, whole=True):
                begun = True
                yield text
        except _NotText as reason:
            if begun:
                raise
            unread.append(reason)
    skipped += unread
    if unread:
        _log.warning("%s: skipped %d of %d files, the first because %s", root, len(unread), len(files), unread[0])


def _read_file(path: Path, text_key: str, whole: bool) -> Iterator[str]:
    """The documents of one file; a plain text is one document where `whole`, else several."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, text_key)
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _read_jsonl(path, file, text_key) if path.suffix == ".jsonl" else _read_plain(path, file, whole)
    except OSError as error:
        raise _NotText(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _NotText(f"{path} is not UTF-8 text; is it a binary file?") from error


def _read_plain(path: Path, file: IO[str], whole: bool) -> Iterator[str]:
    while text := file.read() if whole else file.read(_PIECE) + file.readline():
        if "\0" in text:
            raise _NotText(f"{path} holds zero bytes; is it a binary file?")
        yield text


def _read_jsonl(path: Path, file: IO[str], text_key: str) -> Iterator[str]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield _text_of(parse_json(line, where), text_key, where)


def _read_parquet(path: Path, text_key: str) -> Iterator[str]:
    wrong = f"{path} is not a readable Parquet file"
    return _stream_rows(str(path), wrong, text_key, "parquet", data_files=str(path))


def _read_dataset(name: str, text_key: str) -> Iterator[str]:
    repo, _, subset = name.partition(":")
    repo, _, revision = repo.partition("@")
    wrong = f"dataset:{name} cannot be read from the hub"
    return _stream_rows(f"dataset:{name}", wrong, text_key, repo, subset or None, revision=revision or None)


def _stream_rows(where: str, wrong: str, text_key: str, *given: str | None, **options: str | None) -> Iterator[str]:
    """Texts of the rows of a split train, none of which is kept."""
    try:
        import datasets
    except ImportError as error:
        raise SlingshotError(f"reading {where} needs the datasets package: pip install datasets") from error
    try:
        rows = datasets.load_dataset(*given, split="train", streaming=True, **options)
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, text_key, f"{where} row {number}")
    except SlingshotError:
        raise
    except Exception as error:  # datasets, pyarrow, the hub and the network raise kinds of their own
        raise SlingshotError(f"{wrong}: {' '.join(str(error).split())[:300]}") from error


def _text_of(row: Any, text_key: str, where: str) -> str:
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else "it is no object"
        raise SlingshotError(f"{where} has no text under {text_key!r} (keys: {keys}); name the right key with text_key")
    return text
