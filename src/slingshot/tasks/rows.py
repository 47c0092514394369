"""Rows of data sets, of a .jsonl or .parquet file or of a repository on the hub, and texts made of their columns.

file_rows(Path("mine.jsonl"))                       # [{"question": ..., "answer": ...}, ...]
hub_rows("openai/gsm8k", "main", {})                # {"train": [...], "test": [...]}, or {"all": [...]}
fill("{question}\\nOptions: {choices}", row)
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from string import Formatter
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import jsonl_rows, parquet_rows, read_jsonl
from slingshot.base.names import did_you_mean

LETTERS = "ABCDEFGHIJ"
Row = Mapping[str, Any]


def file_rows(path: Path) -> list[Row]:
    """The rows of a file. Raises SlingshotError for one that is missing, unreadable, empty, or no table."""
    if not path.is_file():
        raise SlingshotError(f"{path}: no such file; a data set is a .jsonl or .parquet file, or a hub's org/name")
    if path.suffix == ".parquet":
        rows: list[Any] = list(parquet_rows(path))
    else:
        rows = _zipped(path) if path.suffix == ".gz" else read_jsonl(path)
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise SlingshotError(f"{path} row {number} is no object with names and values")
    if not rows:
        raise SlingshotError(f"{path} holds no rows")
    return rows


def _zipped(path: Path) -> list[Any]:
    try:
        lines = gzip.decompress(path.read_bytes()).decode().split("\n")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise SlingshotError(f"{path} is not a readable gzip file: {error}") from error
    return [row for _, row in jsonl_rows(path, lines)]


def hub_rows(repo: str, subset: str, splits: dict[Any, str]) -> dict[str, list[Row]]:
    """The rows of "train" and "test", by the repository's names for them; "all" where only one split is published.

    `repo` is org/name, or a folder in a repository's shape. Without a connection what the hub's cache holds is read.
    Without `splits` they are those called train, and test or validation. Raises SlingshotError in one line.
    """
    try:
        import datasets
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise SlingshotError(f"reading {repo} needs the datasets package: pip install datasets") from error
    try:
        found = _splits(datasets, repo, subset, splits)
    except Exception as error:  # the library's, the hub's and the network's own kinds
        said = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        refused = SlingshotError(f"{repo} cannot be read from the hub: {said}")
        if Path(repo).is_dir() or not isinstance(error, ConnectionError):
            raise refused from error
        try:  # datasets looks only for what it prepared itself, not for what was downloaded
            found = _splits(
                datasets, snapshot_download(repo, repo_type="dataset", local_files_only=True), subset, splits
            )
        except Exception:
            raise refused from error
    if splits:
        return found
    test = found.get("test", found.get("validation"))
    if len(found) > 1 and "train" in found and test is not None:
        return {"train": found["train"], "test": test}
    if len(found) > 1:
        way = 'say splits = { train = "...", test = "..." }'
        raise SlingshotError(f"{repo} has the splits {', '.join(found)}; {way}")
    return {"all": next(iter(found.values()))}


def _splits(datasets: Any, repo: str, subset: str, splits: dict[Any, str]) -> dict[str, list[Row]]:
    if splits:
        return {ours: list(datasets.load_dataset(repo, subset or None, split=name)) for ours, name in splits.items()}
    return {name: list(rows) for name, rows in datasets.load_dataset(repo, subset or None).items()}


def fill(form: str, row: Row, where: str) -> str:
    """The column that `form` names, or `form` with its {columns} filled in: names alone, nothing is evaluated.

    A list is lettered, a line each. Raises SlingshotError for a column that is not there or holds no text.
    """
    if form in row:
        return text_of(row[form], form, where)
    parts, pieces = list[str](), _pieces(form, where)
    if all(name is None for _, name, *_ in pieces):
        raise _no_column(form, row, where)
    for literal, name, spec, conversion in pieces:
        parts.append(literal)
        if name is None:
            continue
        if spec or conversion:
            raise SlingshotError(f"{where}: {form!r:.80}: braces hold the name of a column and nothing else")
        if name not in row:
            raise _no_column(name, row, where)
        parts.append(text_of(row[name], name, where))
    return "".join(parts)


def _pieces(form: str, where: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """What `string.Formatter` makes of a form: texts, each with the name in the braces behind it."""
    try:
        return list(Formatter().parse(form))
    except ValueError as error:
        raise SlingshotError(f"{where}: {form!r:.80} is no text with {{columns}}: {error}") from error


def fill_code(form: str, row: Row, where: str) -> str:
    """As `fill`, of Python: a list is its lines, and a form of several lines without braces is the code itself."""
    if form not in row and "\n" in form and "{" not in form:
        return form
    lists = {name: "\n".join(value) for name, value in row.items() if _is_lines(value)}
    return fill(form, {**row, **lists}, where)


def _is_lines(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(line, str) for line in value)


def text_of(value: Any, column: str, where: str) -> str:
    """A column's value as text."""
    if isinstance(value, list) and value and len(value) <= len(LETTERS):
        return lettered([text_of(each, column, where) for each in value])
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, Decimal) and value.is_finite():
        value = f"{value:f}"
    nothing = isinstance(value, float) and not math.isfinite(value)  # as tables write what is missing
    if not isinstance(value, str | int | float) or isinstance(value, bool) or nothing:
        raise SlingshotError(f"{where}: column {column} holds {value!r:.60}, which is no text and no number")
    return str(value)


def lettered(choices: list[str]) -> str:
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def columns_of(form: str, row: Row, where: str) -> list[str]:
    """The column that `form` names, or all that stand in its braces."""
    if form in row:
        return [form]
    names = [name for _, name, *_ in _pieces(form, where) if name]
    if not names:
        raise _no_column(form, row, where)
    return names


def column(name: str, row: Row, where: str) -> Any:
    if name not in row:
        raise _no_column(name, row, where)
    return row[name]


def _no_column(name: str, row: Row, where: str) -> SlingshotError:
    return SlingshotError(f"{where} has no column {name!r:.80}; {did_you_mean(name, row)}")
