"""Token shards: a corpus as token ids on disk, written once, read a row at a time and never as a whole.

    shards = TokenShards.open(folder)                        # reads index.json and the shards' headers
    tokens_NT, segments_NT = shards.read([7, 12], length=256)
    writer = ShardWriter(folder, "tokens", vocab_size=2048, size=2**24); writer.add(ids); writer.flush()

    index.json                  counts, the tokenizer's digest, an entry for every shard
    tokens-00000.safetensors    one tensor `tokens`, uint16 where ids fit, else uint32: whole documents, laid end to end
    heldout-00000.safetensors   likewise, those held out

Every document ends with the tokenizer's eos, which no text has within: that is where the next one begins. Rows are read
by position and not mapped: pages of a map that was once touched count as this process's memory. Row i of a shard is
what data/packing.pack makes of the shard's documents; the last one is padded. Shape suffixes: N rows, T time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from safetensors.numpy import save

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.files import inside, read_json, read_span, write_bytes
from slingshot.data.packing import Int32

INDEX = "index.json"
_DTYPES: dict[str, type[np.unsignedinteger[Any]]] = {"U16": np.uint16, "U32": np.uint32}


class Shard(Strict):
    """A file of the folder: how many tokens, and 16 hex digits of the SHA-256 of its bytes."""

    file: str
    tokens: int = Field(ge=1)
    digest: str


class ShardIndex(Strict):
    """The content of index.json. Documents and bytes of text are of both sides together."""

    tokenizer: str  # Tokenizer.digest
    eos_id: int = Field(ge=0)
    documents: int = Field(ge=1)
    bytes: int = Field(ge=1)
    heldout_bytes: int = Field(ge=0)
    tokens: list[Shard] = Field(min_length=1)
    heldout: list[Shard] = []


class TokenShards:
    """A folder of shards, opened. Reading takes as much memory as what is read."""

    def __init__(self, folder: Path, index: ShardIndex) -> None:
        self.folder, self.index = folder, index
        self._starts = {shard.file: _start(folder, shard) for shard in (*index.tokens, *index.heldout)}
        self.tokens = sum(shard.tokens for shard in index.tokens)

    @classmethod
    def open(cls, folder: Path) -> TokenShards:
        """SlingshotError where a folder holds no shards, or names the one that is missing or cut short."""
        if not (folder / INDEX).is_file():
            raise SlingshotError(f"{folder} holds no token shards (no {INDEX}); slingshot tokenize makes some")
        return cls(folder, ShardIndex.parse(read_json(folder / INDEX), str(folder / INDEX)))

    def verify(self) -> None:
        """Read every byte: SlingshotError names the shard that is not what was written."""
        for shard in (*self.index.tokens, *self.index.heldout):
            with (self.folder / shard.file).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest()[:16] != shard.digest:
                    raise SlingshotError(f"{self.folder / shard.file} was changed after it was written; {_AGAIN}")

    def rows(self, length: int) -> int:
        """How many rows of `length` tokens the shards have."""
        return sum(-(-shard.tokens // length) for shard in self.index.tokens)

    def read(self, rows: Sequence[int] | NDArray[np.int64], length: int) -> tuple[Int32, Int32]:
        """(tokens_NT, segments_NT) of rows by number, of which those of a shard follow those of the shard before."""
        ends = np.cumsum([-(-shard.tokens // length) for shard in self.index.tokens])
        tokens_NT = np.zeros((len(rows), length), dtype=np.int32)
        filled_NT = np.zeros((len(rows), length), dtype=np.bool_)
        for place, row in enumerate(rows):
            which = int(np.searchsorted(ends, row, side="right"))
            shard = self.index.tokens[which]
            first = (int(row) - (int(ends[which - 1]) if which else 0)) * length
            ids = self._ids(shard, first, min(length, shard.tokens - first))
            tokens_NT[place, : len(ids)], filled_NT[place, : len(ids)] = ids, True
        begun_NT = np.cumsum(tokens_NT[:, :-1] == self.index.eos_id, axis=1, dtype=np.int32)
        segments_NT = np.ones_like(tokens_NT)
        segments_NT[:, 1:] += begun_NT
        return tokens_NT, segments_NT * filled_NT

    def heldout(self) -> Iterator[list[int]]:
        """The documents held out, one by one; a shard of them is in memory."""
        for shard in self.index.heldout:
            ids = self._ids(shard, 0, shard.tokens)
            for document in np.split(ids, np.flatnonzero(ids == self.index.eos_id) + 1):
                if len(document):
                    yield document.tolist()

    def _ids(self, shard: Shard, first: int, count: int) -> NDArray[Any]:
        start, dtype = self._starts[shard.file]
        ids = np.empty(count, dtype=dtype)
        read_span(self.folder / shard.file, start + first * ids.itemsize, ids.view(np.uint8).data, "its tokens")
        return ids


class ShardWriter:
    """Takes documents, writes each shard whole once `size` tokens are there. `waiting`: ids that are in none yet."""

    def __init__(self, folder: Path, name: str, vocab_size: int, size: int) -> None:
        self.folder, self.name, self.size = folder, name, size
        self.dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self.shards: list[Shard] = []
        self._waiting: list[NDArray[Any]] = []
        self._count = 0

    @property
    def waiting(self) -> NDArray[Any]:
        return np.concatenate([np.empty(0, dtype=self.dtype), *self._waiting])

    def resume(self, shards: Sequence[Any], waiting: NDArray[Any]) -> None:
        """Go on behind these shards, as JSON has them, and ids."""
        self.shards = [Shard.parse(shard) for shard in shards]
        self._waiting, self._count = [waiting.astype(self.dtype)], len(waiting)

    def add(self, ids: Sequence[int]) -> None:
        self._waiting.append(np.array(ids, dtype=self.dtype))
        self._count += len(ids)
        if self._count >= self.size:
            self.flush()

    def flush(self) -> None:
        """Write what waits, if something does."""
        if len(ids := self.waiting):
            file, content = f"{self.name}-{len(self.shards):05}.safetensors", save({"tokens": ids})
            write_bytes(self.folder / file, content)
            digest = hashlib.sha256(content).hexdigest()[:16]
            self.shards.append(Shard(file=file, tokens=len(ids), digest=digest))
        self._waiting, self._count = [], 0


_AGAIN = "have the stage tokenize write it again, or copy it anew"


def _start(folder: Path, shard: Shard) -> tuple[int, type[np.unsignedinteger[Any]]]:
    """Where a shard's ids begin in its file, and their type."""
    path, length = inside(folder, shard.file), bytearray(8)
    if not path.is_file():
        raise SlingshotError(f"{path} is missing; {_AGAIN}")
    read_span(path, 0, memoryview(length), "its header")
    start = 8 + int.from_bytes(length, "little")
    try:
        header = bytearray(min(start - 8, 1 << 16))
        read_span(path, 8, memoryview(header), "its header")
        dtype = _DTYPES[json.loads(header)["tokens"]["dtype"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise SlingshotError(f"{path} is no shard of tokens; {_AGAIN}") from error
    if (size := path.stat().st_size) != (whole := start + shard.tokens * np.dtype(dtype).itemsize):
        raise SlingshotError(f"{path} has {size} bytes and should have {whole}: it was cut short or changed; {_AGAIN}")
    return start, dtype
