"""Packing: documents and examples laid into rows of one length, with segment ids that keep attention inside each.

    tokens_NT, segments_NT = pack(documents, length=256)        # pre-training: one stream, cut where a row ends
    packed = pack_examples([(ids, mask), ...], length=256)      # SFT and RL: whole examples only
    row, start = packed.placement[i]                            # where example i begins

Shape suffixes: N rows, T time. Segment ids number the documents of a row from 1; 0 is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


def pack(documents: Iterable[Sequence[int]], length: int, pad_id: int = 0) -> tuple[Int32, Int32]:
    """Lay documents end to end and cut the stream into rows: (tokens_NT, segments_NT), the last row padded."""
    documents = [document for document in documents if len(document)]
    sizes = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    total = int(sizes.sum())
    rows = -(-total // length)
    tokens = np.full(rows * length, pad_id, dtype=np.int32)
    tokens[:total] = np.fromiter(itertools.chain.from_iterable(documents), dtype=np.int32, count=total)
    owner = np.full(rows * length, -1, dtype=np.int32)
    owner[:total] = np.repeat(np.arange(len(documents), dtype=np.int32), sizes)
    owner_NT = owner.reshape(rows, length)
    segments_NT = np.where(owner_NT >= 0, owner_NT - owner_NT[:, :1] + 1, 0).astype(np.int32)
    return tokens.reshape(rows, length), segments_NT


def strided(documents: Iterable[Sequence[int]], length: int) -> Iterator[tuple[Sequence[int], list[int]]]:
    """Examples (ids, mask) of at most `length` tokens; each token but a document's first is a target exactly once.

    A longer document is cut into windows half a length apart; the targets of a window are the tokens that the one
    before does not hold, so that each has at least half a length of context.
    """
    for document in documents:
        stride = max(1, length // 2)
        done = 1  # the first token, which nothing predicts
        for start in range(0, max(1, len(document) - length + stride), stride):
            window = document[start : start + length]
            mask = [int(start + place >= done) for place in range(len(window))]
            yield window, mask
            done = start + len(window)


class Packed(NamedTuple):
    """Examples in rows. mask_NT is true where an example's mask was; placement[i] is example i's (row, start)."""

    tokens_NT: Int32
    segments_NT: Int32
    mask_NT: NDArray[np.bool_]
    placement: list[tuple[int, int]]


def pack_examples(examples: Sequence[tuple[Sequence[int], Sequence[int]]], length: int, pad_id: int = 0) -> Packed:
    """Lay whole examples (ids, mask) into rows: each in turn into the fullest row that still has room for it.

    Raises ValueError for an example longer than `length` or with a mask of another size; callers refuse those by name.
    """
    used: list[int] = []  # tokens in each row
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set where by_room[r] has a row, so the fullest row with room is its lowest bit from `size` up
    placement: list[tuple[int, int]] = []
    for index, (ids, mask) in enumerate(examples):
        size = len(ids)
        if size > length or len(mask) != size:
            raise ValueError(f"example {index} has {size} ids and {len(mask)} mask entries; rows hold {length}")
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(used)
            used.append(0)
        placement.append((row, used[row]))
        used[row] += size
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)

    tokens_NT = np.full((len(used), length), pad_id, dtype=np.int32)
    segments_NT = np.zeros((len(used), length), dtype=np.int32)
    mask_NT = np.zeros((len(used), length), dtype=np.bool_)
    count = [0] * len(used)
    for (ids, mask), (row, start) in zip(examples, placement, strict=True):
        count[row] += 1
        span = slice(start, start + len(ids))
        tokens_NT[row, span], segments_NT[row, span], mask_NT[row, span] = ids, count[row], mask
    return Packed(tokens_NT, segments_NT, mask_NT, placement)
