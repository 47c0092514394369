"""Files appear whole or not at all, and what cannot be read or written is named."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base import files
from slingshot.base.errors import SlingshotError
from slingshot.base.files import digest, inside, new_folder, read_json, read_jsonl, read_text, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_text_and_json_come_back(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "a.txt", "3足す4は7\n")
    write_json(tmp_path / "b.json", {"答え": 7, "x": [1.5, None]})
    assert read_text(tmp_path / "deep" / "a.txt") == "3足す4は7\n"
    assert read_json(tmp_path / "b.json") == {"答え": 7, "x": [1.5, None]}
    assert "答え" in (tmp_path / "b.json").read_text()
    assert names(tmp_path) == ["b.json", "deep", "deep/a.txt"]


LEAVES = st.none() | st.booleans() | st.integers() | st.text()
JSON = st.recursive(LEAVES, lambda value: st.lists(value) | st.dictionaries(st.text(), value), max_leaves=5)


@pytest.mark.slow
@given(rows=st.lists(JSON, max_size=4))
def test_any_rows_come_back_from_jsonl(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    """Strings with line separators of any kind included: only a line feed ends a row."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    files.write_jsonl(path, rows)
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        (None, read_text, "cannot read .*file: No such file or directory"),
        (b"ab\xff", read_text, r"file is not UTF-8 text \(byte 2\); is it a binary file\?"),
        (b'{"a": 1', read_json, "file is not valid JSON: "), (b"[" * 100_000, read_json, "file is not valid JSON: "),
        (b'{"a": 1}\n\n{"a": \n', read_jsonl, "file line 3 is not valid JSON: "),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, read: Callable[[Path], Any], message: str
) -> None:
    path = tmp_path / "file"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SlingshotError, match=message) as refused:
        read(path)
    assert "\n" not in str(refused.value)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(tmp_path / "file", "old")
    monkeypatch.setattr(files.os, "fsync", full)
    said = r"cannot write .*file: No space left on device; free space there or choose another place"
    with pytest.raises(SlingshotError, match=said):
        write_text(tmp_path / "file", "new")
    assert names(tmp_path) == ["file"] and (tmp_path / "file").read_text() == "old"


def test_a_file_in_the_way_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(SlingshotError, match=r"cannot write .*taken/file: .*choose another place"):
        write_text(tmp_path / "taken" / "file", "x")
    with pytest.raises(SlingshotError, match=r"cannot write .*taken/folder: .*choose another --out"):
        new_folder(tmp_path / "taken" / "folder").__enter__()


def test_what_is_no_plain_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("")):
        with pytest.raises(SlingshotError, match="that is no file"):
            write_text(path, "x")
    assert (tmp_path / "pipe").is_fifo() and names(tmp_path) == ["pipe"]


def test_a_folder_appears_when_it_is_whole_in_place_of_the_one_before(tmp_path: Path) -> None:
    """Without what an attempt that was killed has left."""
    write_text(tmp_path / "runs" / ".a.tmp" / "half", "")
    for content in ("old", "new"):
        before = names(tmp_path / "runs" / "a")
        with new_folder(tmp_path / "runs" / "a") as folder:
            write_text(folder / "inner" / content, content)
            assert names(tmp_path / "runs" / "a") == before
        assert names(tmp_path / "runs") == ["a", "a/inner", f"a/inner/{content}"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_folder_whose_making_fails_leaves_what_was_there(tmp_path: Path, error: type[BaseException]) -> None:
    with new_folder(tmp_path / "a") as folder:
        write_text(folder / "old", "old")
    with pytest.raises(error), new_folder(tmp_path / "a") as folder:
        write_text(folder / "new", "new")
        raise error
    assert names(tmp_path) == ["a", "a/old"]


def test_a_full_disk_makes_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = r"cannot write .*a: No space left on device"
    with pytest.raises(SlingshotError, match=said), new_folder(tmp_path / "a") as folder:
        write_text(folder / "file", "x")
        monkeypatch.setattr(files.os, "fsync", full)
    assert names(tmp_path) == []


def test_a_digest_names_the_value_whatever_its_order() -> None:
    assert digest({"a": 1, "b": [2, "é"]}) == digest({"b": [2, "é"], "a": 1})
    assert len({digest(value) for value in ({"a": 1}, {"a": 2}, {"a": "1"}, [1], "a")}) == 5
    assert digest({}) == "44136fa355b3678a"  # SHA-256 of "{}"


HOSTILE_NAMES = ["../a", "a/b", "/etc/passwd", "..", ".", "", "a/", "a\\b", "a\0b", "./a", "\ud800", "a" * 5000, "\n/x"]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_a_name_that_is_no_file_of_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    said = r"is no file name; a checkpoint's files|is a link out of the folder or no plain file"
    with pytest.raises(SlingshotError, match=said) as refused:
        inside(tmp_path, name)
    assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@settings(max_examples=100)
@given(name=st.text(st.sampled_from("ab./\\\0\n~ é\udc80") | st.characters(), max_size=8))
def test_no_name_leaves_the_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = tmp_path_factory.getbasetemp()
    try:
        path = inside(folder, name)
    except SlingshotError:
        return
    assert path.parent == folder and Path(os.path.realpath(path)).parent == folder.resolve()


def test_links_and_special_files_of_a_folder(tmp_path: Path) -> None:
    """Within the folder a link may point where it likes; out of it, to nothing, in a circle, at a folder or a pipe it
    is refused."""
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("x")
    (folder / "deep" / "file").write_text("x")
    links = {"kept": "deep/file", "out": "../secret", "absolute": str(tmp_path / "secret")}
    links |= {"nothing": "absent", "circle": "circle", "chain": "out"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    assert inside(folder, "kept") == folder / "kept" and inside(folder, "absent") == folder / "absent"
    (tmp_path / "elsewhere").symlink_to(folder)  # the folder itself is the user's choice
    assert inside(tmp_path / "elsewhere", "kept").read_text() == "x"
    for name in ("out", "absolute", "nothing", "circle", "chain", "pipe", "deep"):
        said = f"{folder}: '{name}' is a link out of the folder or no plain file; put a copy of the file itself"
        with pytest.raises(SlingshotError, match=said):
            inside(folder, name)


def test_a_snapshot_of_the_hubs_cache_may_link_to_its_blobs(tmp_path: Path) -> None:
    """To its own repository's, and through those to what repositories share; not to another repository, and not from
    any other folder."""
    cache = tmp_path / "hub"
    snapshot = cache / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for file in ("models--a--b/blobs/own", "models--c--d/blobs/other", "blobs/ab/shared", "models--a--b/refs/main"):
        write_text(cache / file, "x")
    (cache / "models--a--b" / "blobs" / "linked").symlink_to("../../blobs/ab/shared")
    links = {"own": "../../blobs/own", "linked": "../../blobs/linked"}
    links |= {"other": "../../../models--c--d/blobs/other", "ref": "../../refs/main"}
    for name, target in links.items():
        (snapshot / name).symlink_to(target)
    assert inside(snapshot, "own").read_text() == inside(snapshot, "linked").read_text() == "x"
    for name in ("other", "ref"):
        with pytest.raises(SlingshotError, match=f"'{name}' is a link out of the folder"):
            inside(snapshot, name)
    (tmp_path / "mine" / "snapshots" / "c").mkdir(parents=True)
    write_text(tmp_path / "mine" / "blobs" / "own", "x")
    (tmp_path / "mine" / "snapshots" / "c" / "own").symlink_to("../../blobs/own")
    with pytest.raises(SlingshotError, match="is a link out of the folder"):
        inside(tmp_path / "mine" / "snapshots" / "c", "own")
