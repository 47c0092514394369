"""Files written whole or not at all.

Every artifact is prepared beside its final place, fsynced and renamed, so a reader never meets half a file:

    write_json(path, {"loss": 1.5})
    with new_folder(out) as folder:        # appears as `out` when the block ends, or not at all
        write_json(folder / "receipt.json", receipt)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import time
import tomllib
from collections.abc import Iterable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError

_NO_SPACE = "; free space there or choose another place"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def os_errors(what: str, way_out: str = "") -> Iterator[None]:
    """An OSError within is told in one line: `what`, why, and the way out."""
    try:
        yield
    except OSError as error:
        raise SlingshotError(f"{what}: {error.strerror or error}{way_out}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole: temporary name, fsync, rename. SlingshotError when the place takes none or is no file."""
    if not path.name or (path.exists() and not path.is_file()):
        raise SlingshotError(f"cannot write {path}: that is no file; choose another place")
    temporary = path.with_name(f".{path.name}.tmp")
    with os_errors(f"cannot write {path}", _NO_SPACE):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            _fsync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))  # lone surrogates: as JSON escapes them


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_text(path: Path) -> str:
    """Read UTF-8 text without its byte order mark; a missing, unreadable or binary file is a SlingshotError."""
    try:
        with os_errors(f"cannot read {path}"):
            return path.read_text(encoding="utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise SlingshotError(f"{path} is not UTF-8 text (byte {error.start}); is it a binary file?") from error


def read_json(path: Path) -> Any:
    return parse_json(read_text(path), str(path))


def read_jsonl(path: Path) -> list[Any]:
    return [row for _, row in jsonl_rows(path, read_text(path).split("\n"))]


def jsonl_rows(path: Path, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """The values of a file's lines, blank ones apart, each with its place for an error."""
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path} line {number}"
            yield where, parse_json(line, where)


def parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a table, some in memory at once. SlingshotError for a file that is missing or broken."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise SlingshotError(f"reading {path} needs the datasets package: pip install datasets") from error
    try:
        for batch in ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except Exception as error:  # pyarrow raises kinds of its own
        raise SlingshotError(f"{path} is not a readable Parquet file: {' '.join(str(error).split())[:200]}") from error


def package_folder(name: str) -> Path | None:
    """Where an installed package lies, none of whose code runs; None where there is none of that name."""
    found = importlib.util.find_spec(name) if name.isidentifier() else None
    return next(map(Path, found.submodule_search_locations or ()), None) if found else None


def packaged_toml(package: str, name: str) -> dict[str, Any]:
    """A table that comes along with a room's source."""
    return tomllib.loads((files(package) / name).read_text(encoding="utf-8"))


def rendered(package: str, name: str, /, **values: Any) -> str:
    """An HTML template beside a room's source, filled in: values are text, and one that is missing is an error."""
    import jinja2  # only here: who renders nothing need not wait for it

    rules: Any = {"autoescape": True, "undefined": jinja2.StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    return jinja2.Template((files(package) / name).read_text(encoding="utf-8"), **rules).render(**values)


def parse_json(text: str, where: str) -> Any:
    """A JSON value; `where` names the text in the error."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SlingshotError(f"{where} is not valid JSON: {error}") from error


def read_span(path: Path, start: int, buffer: memoryview, what: str) -> None:
    """Fill `buffer` with a file's bytes from `start` on. SlingshotError when it cannot, or ends within `what`."""
    with os_errors(f"cannot read {path}"), path.open("rb", buffering=0) as file:
        file.seek(start)
        while buffer:
            count = file.readinto(buffer)
            if not count:
                raise SlingshotError(f"{path} ends within {what}; is the download complete?")
            buffer = buffer[count:]


def inside(folder: Path, name: str) -> Path:
    """The path of a file in an untrusted folder, which need not be there.

    SlingshotError when `name` is no plain file name, or when what lies there is a symlink out of the folder or to
    nothing, or no plain file. Hugging Face's cache links a snapshot's files to the blobs of its repository, and those
    to blobs that repositories share: links there pass.
    """
    if Path(name).name != name or not name or "\\" in name or "\0" in name:
        raise SlingshotError(f"{folder}: {name!r:.100} is no file name; a checkpoint's files lie in its folder itself")
    path, home = folder / name, folder.resolve()
    repository, homes = home.parent.parent, [home]
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        homes += [repository / "blobs", repository.parent / "blobs"]
    with contextlib.suppress(OSError, UnicodeError):  # of a name that no file system takes
        target = Path(os.path.realpath(path))
        if not {*homes}.isdisjoint(target.parents) and (target.is_file() or not os.path.lexists(path)):
            return path
    what = f"{folder}: {name!r:.100} is a link out of the folder or no plain file"
    raise SlingshotError(f"{what}; put a copy of the file itself there")


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` (replacing what was there) if the block ends well."""
    temporary = path.with_name(f".{path.name}.tmp")
    with os_errors(f"cannot write {path}", "; choose another --out"):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        with os_errors(f"cannot write {path}", _NO_SPACE):
            yield temporary
            rename_folder(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def rename_folder(temporary: Path, path: Path) -> None:
    """Give a folder beside `path` this name, in place of what had it, once all of it is on the disk."""
    retired = path.with_name(f".{path.name}.old")
    for file in (*sorted(temporary.rglob("*")), temporary):
        _fsync(file)
    if path.exists():
        shutil.rmtree(retired, ignore_errors=True)
        path.rename(retired)
    temporary.rename(path)
    _fsync(path.parent)
    shutil.rmtree(retired, ignore_errors=True)


# Locks of this process, by the file that is locked: a stage that is begun again in a notebook keeps its own.
_held: dict[tuple[int, int], int] = {}


def lock(folder: Path, patience: float = 0.0) -> int:
    """Make a folder and lock it against every other process; returns the descriptor that holds the lock until `unlock`.

    Children that inherit the descriptor keep the folder locked when this process was killed; `patience` seconds are
    waited for such a one to be gone. SlingshotError when another process is at work there.
    """
    deadline = time.monotonic() + patience
    while True:
        with os_errors(f"cannot write {folder}", "; choose another --out"):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        opened = os.fstat(descriptor)
        if (opened.st_dev, opened.st_ino) in _held:
            os.close(descriptor)
            return _held[opened.st_dev, opened.st_ino]
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if opened.st_ino == os.stat(folder / ".lock").st_ino:  # not removed and made anew meanwhile
                _held[opened.st_dev, opened.st_ino] = descriptor
                return descriptor
        os.close(descriptor)
        if time.monotonic() >= deadline:
            raise SlingshotError(f"another slingshot is at work in {folder}; wait for it or choose another --out")
        time.sleep(0.1)


def unlock(descriptor: int) -> None:
    """Give up what `lock` returned."""
    for file in [file for file, held in _held.items() if held == descriptor]:
        del _held[file]
        os.close(descriptor)


def put_aside(path: Path) -> Path:
    """Move what lies at `path` to `.stale/NAME-N` beside it, so that another can be made there; returns where."""
    places = (path.parent / ".stale" / f"{path.name}-{number}" for number in itertools.count(1))
    place = next(place for place in places if not place.exists())
    with os_errors(f"cannot move {path} aside", "; move or remove it"):
        place.parent.mkdir(exist_ok=True)
        path.rename(place)
    return place


def digest(value: Any) -> str:
    """A short, stable name of a JSON value: the first 16 hex digits of the SHA-256 of its canonical form."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]
