"""Corpora: text documents from files, folders, JSONL, Parquet, data sets of the hub, Python's own standard library and
installed packages.

    for text in read_corpus(["huge.parquet"]): ...                                # one in memory at a time
    train, heldout = split_documents(read_corpus(["stories/", "corpus.jsonl", "stdlib"]))
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import jsonl_rows, package_folder, parquet_rows

_log = logging.getLogger(__name__)

_STDLIB, _PACKAGE, _DATASET = "stdlib", "package:", "dataset:"
_PIECE = 8192  # characters: one long file is read as several documents, so that part of it can be held out
# Of the standard library: installed packages, and its own tests, half of it and in part malformed on purpose.
_NOT_SOURCE = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test"})


def read_corpus(sources: Iterable[str | Path], text_key: str = "text") -> Iterator[str]:
    """The documents of all sources, in a fixed order, none blank. A source is one of

    a folder        every file below it, hidden ones apart, each a document; what is no text is skipped and logged
    a text file     documents of about 8192 characters, cut at line ends
    .jsonl .parquet one document a row, under `text_key`; also within folders
    "stdlib"        the modules of Python's standard library, its tests apart
    "package:NAME"  likewise those of a package that is installed beside slingshot
    "dataset:NAME"  the rows of a data set's split train, as they are downloaded: org/name[@REVISION][:SUBSET] of the
                    hub, or a folder in such a repository's shape

    SlingshotError names a source that is missing, unreadable, binary or empty, or a row without text.
    """
    return itertools.chain.from_iterable(_texts(source, text_key) for source in sources)


def corpus_size(sources: Iterable[str | Path]) -> int:
    """Bytes of all files that `read_corpus` reads."""
    return sum(file.stat().st_size for source in sources for file in _files_of(source))


def check_corpus(sources: Iterable[str | Path], text_key: str = "text") -> None:
    """Read the first document of every source: SlingshotError where `read_corpus` would find that it is none."""
    for source in sources:
        next(_texts(source, text_key))


def split_documents(documents: Iterable[str], heldout: float = 0.05) -> tuple[list[str], list[str]]:
    """(train, held-out) documents. Held out is the share whose texts have the smallest SHA-256.

    So the choice survives moving and reordering files, and copies of one text never stand on both sides.
    """
    texts = list(documents)
    digests = [hashlib.sha256(text.encode(errors="surrogatepass")).digest() for text in texts]
    different = sorted(set(digests))
    chosen = set(different[: min(math.ceil(heldout * len(different)), len(different) - 1)])
    sides: tuple[list[str], list[str]] = ([], [])
    for text, digest in zip(texts, digests, strict=True):
        sides[digest in chosen].append(text)
    return sides


def is_path(source: str | Path) -> bool:
    """Whether a source is a file or folder of the user's, and comes neither with what is installed nor from the hub."""
    return str(source) != _STDLIB and not str(source).startswith((_PACKAGE, _DATASET))


class _NotText(SlingshotError):
    """A file that cannot be read or is binary: skipped within a folder, an error by itself."""


def _texts(source: str | Path, text_key: str) -> Iterator[str]:
    """The documents of one source that are not blank."""
    path, skipped, empty = _root(source), list[SlingshotError](), True
    if str(source).startswith(_DATASET):
        texts = _read_dataset(str(source), text_key)
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
        unread = f" ({len(skipped)} files are not UTF-8 text)" if skipped else ""
        raise SlingshotError(f"corpus {source} holds no text{unread}; give UTF-8 text, .jsonl or .parquet")


def _root(source: str | Path) -> Path:
    """Where a source lies. A package is found by its name and not imported."""
    if str(source) == _STDLIB:
        return Path(sysconfig.get_path("stdlib"))
    if not str(source).startswith(_PACKAGE):
        return Path(source)
    if (folder := package_folder(str(source).removeprefix(_PACKAGE))) is None:
        raise SlingshotError(f"corpus {source}: no package of that name is installed; pip install it, or give a folder")
    return folder


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
    """The documents of all these files below a folder. A file is `skipped` where it turns out binary at its start."""
    for file in files:
        begun = False
        try:
            for text in _read_file(file, text_key, whole=True):
                begun = True
                yield text
        except _NotText as reason:
            if begun:
                raise
            skipped.append(reason)
    if skipped:
        _log.warning("%s: skipped %d of %d files, the first because %s", root, len(skipped), len(files), skipped[0])


def _read_file(path: Path, text_key: str, whole: bool) -> Iterator[str]:
    """The documents of one file; a plain text is one document where `whole`, else several."""
    if path.suffix == ".parquet":
        for number, row in enumerate(parquet_rows(path), start=1):
            yield _text_of(row, text_key, f"{path} row {number}")
        return
    try:
        with path.open(encoding="utf-8-sig") as file:
            if path.suffix == ".jsonl":
                yield from (_text_of(row, text_key, where) for where, row in jsonl_rows(path, file))
            else:
                yield from _read_plain(path, file, whole)
    except OSError as error:
        raise _NotText(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise _NotText(f"{path} is not UTF-8 text; is it a binary file?") from error


def _read_plain(path: Path, file: IO[str], whole: bool) -> Iterator[str]:
    while text := file.read() if whole else file.read(_PIECE) + file.readline():
        if "\0" in text:
            raise _NotText(f"{path} holds zero bytes; is it a binary file?")
        yield text


def _read_dataset(source: str, text_key: str) -> Iterator[str]:
    """Texts of the rows of a split train, none of which is kept."""
    repo, _, subset = source.removeprefix(_DATASET).partition(":")
    repo, _, revision = repo.partition("@")
    try:
        import datasets
    except ImportError as error:
        raise SlingshotError(f"reading {source} needs the datasets package: pip install datasets") from error
    try:
        rows = datasets.load_dataset(repo, subset or None, revision=revision or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _text_of(row, text_key, f"{source} row {number}")
    except SlingshotError:
        raise
    except Exception as error:  # datasets, pyarrow, the hub and the network raise kinds of their own
        said = " ".join(str(error).split())[:300]
        raise SlingshotError(f"{source} cannot be read from the hub: {said}") from error


def _text_of(row: Any, text_key: str, where: str) -> str:
    text = row.get(text_key) if isinstance(row, dict) else None
    if not isinstance(text, str):
        keys = ", ".join(map(str, row)) if isinstance(row, dict) else "it is no object"
        raise SlingshotError(f"{where} has no text under {text_key!r} (keys: {keys}); name the right key with text_key")
    return text
