"""Corpora: every kind of source, the split, and what is refused."""

import json
import logging
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

from slingshot.base.errors import SlingshotError
from slingshot.data.corpora import check_corpus, corpus_size, read_corpus, split_documents


def test_a_folder_is_read_in_order_and_skips_what_is_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b.txt").write_bytes("\ufeffzweite\r\nZeile".encode())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "first.md").write_text("first")
    (tmp_path / "a" / "rows.jsonl").write_text('{"text": "row 1"}\n\n{"text": "row 2"}\n')
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "zeros.bin").write_bytes(b"PK\0\0")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for hidden in (".git", "__pycache__"):
        (tmp_path / hidden).mkdir()
        (tmp_path / hidden / "x.txt").write_text("hidden")
    with caplog.at_level(logging.WARNING):
        documents = list(read_corpus([tmp_path]))
    assert documents == ["first", "row 1", "row 2", "zweite\nZeile"]
    assert "skipped 2 of 6 files" in caplog.text and "latin.txt" in caplog.text


def test_one_long_file_becomes_documents_cut_at_line_ends(tmp_path: Path) -> None:
    text = "".join(f"line {number} of a long story\n" for number in range(2000))
    (tmp_path / "story.txt").write_text(text)
    documents = list(read_corpus([tmp_path / "story.txt"]))
    assert "".join(documents) == text
    assert len(documents) > 5
    assert all(document.endswith("\n") and len(document) < 9000 for document in documents)


@pytest.mark.slow
def test_rows_of_jsonl_and_parquet(tmp_path: Path) -> None:
    rows = [{"body": "eins", "id": 1}, {"body": "zwei", "id": 2}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    documents = list(read_corpus([str(tmp_path / "rows.jsonl"), tmp_path / "rows.parquet"], text_key="body"))
    assert documents == ["eins", "zwei", "eins", "zwei"]


def test_the_standard_library() -> None:
    documents = list(read_corpus(["stdlib"]))
    assert len(documents) > 300
    assert Path(json.__file__).read_text() in documents
    assert not any("class TestJson" in document for document in documents)


def test_the_split_is_by_content_and_covers_everything(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(100)] + ["document 7"]
    train, heldout = split_documents(documents, 0.1)
    assert len(heldout) in (10, 11) and sorted(train + heldout) == sorted(documents)
    assert set(train).isdisjoint(heldout)  # copies stand together
    turned_train, turned_heldout = split_documents(documents[::-1], 0.1)
    assert set(turned_train) == set(train) and set(turned_heldout) == set(heldout)
    assert [document for document in documents if document in train] == train  # in order


def test_small_corpora_still_split() -> None:
    assert [len(side) for side in split_documents(["a", "b"], 0.05)] == [1, 1]
    assert split_documents(["a"], 0.5) == (["a"], [])
    assert split_documents(["a", "b"], 0.0) == (["a", "b"], [])


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.txt", b"", "holds no text"), ("binary.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("zeros.txt", b"a\0b", "zero bytes"), ("bad.jsonl", b'{"text": "a"}\n{"text"', "line 2 is not valid JSON"),
        ("key.jsonl", b'{"body": "a"}', r"line 1 has no text under 'text' \(keys: body\)"),
        ("list.jsonl", b"[1]", "line 1 has no text"), ("bad.parquet", b"PAR1 no", "not a readable Parquet file"),
    ],
)  # fmt: skip
def test_unusable_files_are_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SlingshotError, match=reason) as caught:
        list(read_corpus([tmp_path / name]))
    assert name in str(caught.value) and "\n" not in str(caught.value)
    if name == "bad.jsonl":
        check_corpus([tmp_path / name])  # its first row is one
    else:
        with pytest.raises(SlingshotError, match=reason):
            check_corpus(["stdlib", tmp_path / name])


def test_missing_and_unreadable_sources(tmp_path: Path) -> None:
    with pytest.raises(SlingshotError, match="nowhere does not exist"):
        list(read_corpus(["stdlib", tmp_path / "nowhere"]))
    with pytest.raises(SlingshotError, match="holds no text;"):
        list(read_corpus([tmp_path]))
    (tmp_path / "only.bin").write_bytes(b"\xff\0")
    with pytest.raises(SlingshotError, match=r"holds no text \(1 files are not UTF-8 text\)"):
        list(read_corpus([tmp_path]))


def test_an_installed_package_without_its_tests() -> None:
    documents = list(read_corpus(["package:safetensors"]))
    assert Path(safetensors.numpy.__file__).read_text() in documents
    for name in ("no_such_package", "os", "numpy.linalg"):
        with pytest.raises(SlingshotError, match=f"^corpus package:{name}: no package of that name is installed; pip"):
            list(read_corpus([f"package:{name}"]))


@pytest.mark.slow
def test_a_data_set_is_streamed_row_by_row(tmp_path: Path) -> None:
    """A folder in the shape of a repository on the hub, two files of the split train and one of another."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for name, texts in (("train-00000", ["eins", "zwei"]), ("train-00001", ["drei"]), ("test-00000", ["vier"])):
        table = pyarrow.Table.from_pylist([{"text": text, "id": 0} for text in texts])
        pyarrow.parquet.write_table(table, tmp_path / "set" / "data" / f"{name}.parquet")
    source = f"dataset:{tmp_path / 'set'}"
    assert list(read_corpus([source])) == ["eins", "zwei", "drei"] and corpus_size([source]) == 0
    with pytest.raises(SlingshotError, match=r"row 1 has no text under 'body' \(keys: text, id\)"):
        check_corpus([source], text_key="body")
    with pytest.raises(SlingshotError, match=r"^dataset:.*nowhere cannot be read from the hub: ") as caught:
        check_corpus([f"dataset:{tmp_path / 'nowhere'}"])
    assert "\n" not in str(caught.value)
