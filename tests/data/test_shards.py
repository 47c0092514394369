"""Token shards: rows are those of `pack`, whatever the shards; what is not whole is refused by name."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.data.packing import pack
from slingshot.data.shards import INDEX, ShardIndex, ShardWriter, TokenShards

EOS = 1


def write(folder: Path, documents: list[list[int]], size: int = 50, vocab_size: int = 300) -> TokenShards:
    """Documents as shards of about `size` tokens; the last two are held out."""
    sides = {side: ShardWriter(folder, side, vocab_size, size) for side in ("tokens", "heldout")}
    for number, document in enumerate(documents):
        sides["heldout" if number >= len(documents) - 2 else "tokens"].add(document)
    for writer in sides.values():
        writer.flush()
    counts = {"documents": len(documents), "bytes": 9, "heldout_bytes": 2}
    files = {side: writer.shards for side, writer in sides.items()}
    write_json(folder / INDEX, ShardIndex(tokenizer="t", eos_id=EOS, **counts, **files).model_dump())
    return TokenShards.open(folder)


texts = st.lists(st.lists(st.integers(2, 299), max_size=70).map(lambda ids: [*ids, EOS]), min_size=3, max_size=40)


@given(documents=texts, length=st.integers(8, 40), size=st.integers(1, 400))
def test_rows_are_what_packing_each_shards_documents_gives(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], length: int, size: int
) -> None:
    shards = write(tmp_path_factory.mktemp("shards"), documents, size)
    tokens, segments, waiting = [], [], list[list[int]]()
    for document in documents[:-2]:
        waiting.append(document)
        if sum(map(len, waiting)) >= size or document is documents[-3]:
            rows = pack(waiting, length)
            tokens.append(rows[0])
            segments.append(rows[1])
            waiting = []
    expected = np.concatenate(tokens), np.concatenate(segments)
    assert shards.rows(length) == len(expected[0])
    found = shards.read(range(shards.rows(length)), length)
    assert np.array_equal(found[0], expected[0]) and np.array_equal(found[1], expected[1])
    assert list(shards.heldout()) == documents[-2:]


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1 << 16, np.uint16), ((1 << 16) + 1, np.uint32)])
def test_ids_take_two_bytes_where_the_vocabulary_allows(tmp_path: Path, vocab_size: int, dtype: type) -> None:
    documents = [[5, vocab_size - 1, EOS], [6, EOS], [7, EOS]]
    shards = write(tmp_path, documents, vocab_size=vocab_size)
    assert shards.read([0], 8)[0][0, :3].tolist() == documents[0]
    assert load_file(tmp_path / "tokens-00000.safetensors")["tokens"].dtype == dtype


def test_a_shard_that_is_missing_cut_short_or_changed_is_refused_by_name(tmp_path: Path) -> None:
    shards = write(tmp_path, [[2, 3, 4, EOS]] * 40)
    shards.verify()
    file = tmp_path / "tokens-00001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"\7")
    with pytest.raises(SlingshotError, match=r"tokens-00001\.safetensors was changed after it was written; have the"):
        TokenShards.open(tmp_path).verify()
    file.write_bytes(whole[:-3])
    with pytest.raises(SlingshotError, match=r"tokens-00001\.safetensors has \d+ bytes and should have \d+: it was"):
        TokenShards.open(tmp_path)
    file.write_bytes(b"\xff" * len(whole))
    with pytest.raises(SlingshotError, match=r"tokens-00001\.safetensors (is no shard|ends within)"):
        TokenShards.open(tmp_path)
    file.unlink()
    with pytest.raises(SlingshotError, match=r"tokens-00001\.safetensors is missing"):
        TokenShards.open(tmp_path)
    with pytest.raises(SlingshotError, match=r"holds no token shards \(no index\.json\); slingshot tokenize makes"):
        TokenShards.open(tmp_path.parent)


def test_a_disk_that_takes_no_more_leaves_no_half_of_a_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "tokens", 300, 1000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(SlingshotError, match=r"cannot write .*tokens-00000\.safetensors: File too large; free"):
            writer.add([2] * 999 + [EOS])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not list(tmp_path.iterdir())
    writer.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["tokens-00000.safetensors"]
