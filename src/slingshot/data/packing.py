"""Packing: documents and examples laid into rows of one length, with segment ids that keep attention inside each.

    tokens_NT, segments_NT = pack(documents, length=256)        # pre-training: one stream, cut where a row ends
    packed = pack_examples([(ids, mask), ...], length=256)      # SFT and RL: whole examples only
    row, start = packed.placement[i]                            # where example i begins
    packed = pack_examples(examples, length=256, groups=["a", "a", "b"])     # what a group begins with stands once

Shape suffixes: N rows, T time. Segment ids number the documents of a row from 1; 0 is padding.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]


def pack(documents: Iterable[Sequence[int]], length: int) -> tuple[Int32, Int32]:
    """Lay documents end to end and cut the stream into rows: (tokens_NT, segments_NT), the last row padded."""
    documents = [document for document in documents if len(document)]
    sizes = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
    total = int(sizes.sum())
    rows = -(-total // length)
    tokens = np.zeros(rows * length, dtype=np.int32)
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


MaskedIds = tuple[Sequence[int], Sequence[int]]  # ids, and a mask of them


class Packed(NamedTuple):
    """Examples in rows. mask_NT is true where an example's mask was; placement[i] is example i's (row, start).

    The first shared[i] ids of example i stand in a segment before, and at its start the rest. prefixes_NT is of each
    token the segment with the ids that its own lacks, or 0.
    """

    tokens_NT: Int32
    segments_NT: Int32
    mask_NT: NDArray[np.bool_]
    placement: list[tuple[int, int]]
    prefixes_NT: Int32
    shared: list[int]


def pack_examples(
    examples: Sequence[MaskedIds], length: int, groups: Sequence[Hashable] | None = None, own: int = 1
) -> Packed:
    """Lay whole examples (ids, mask) into rows: each in turn into the fullest row that still has room for it.

    Examples of one group, of which one is named for each example, share what they begin with (`shared_ids`): it stands
    once in a row, and behind it the rest of as many of them as fit there.
    Raises ValueError for an example longer than `length` or with a mask of another size; callers refuse those by name.
    """
    for index, (ids, mask) in enumerate(examples):
        if len(ids) > length or len(mask) != len(ids):
            raise ValueError(f"example {index} has {len(ids)} ids and {len(mask)} mask entries; rows hold {length}")
    pieces = _pieces(examples, length, groups, own)
    sizes = [shared + sum(len(examples[index][0]) - shared for index in members) for shared, members in pieces]
    rows, places = _places(sizes, length)
    tokens_NT, segments_NT, prefixes_NT = (np.zeros((rows, length), dtype=np.int32) for _ in range(3))
    mask_NT = np.zeros((rows, length), dtype=np.bool_)
    count = [0] * rows
    placement, skipped = [(0, 0)] * len(examples), [0] * len(examples)
    for (shared, members), (row, place) in zip(pieces, places, strict=True):
        prefix, start = 0, place + shared
        if shared:
            count[row] += 1
            prefix = count[row]
            tokens_NT[row, place:start], segments_NT[row, place:start] = examples[members[0]][0][:shared], prefix
        for index in members:
            ids, mask = (part[shared:] for part in examples[index])
            count[row] += 1
            span = slice(start, start + len(ids))
            tokens_NT[row, span], segments_NT[row, span], mask_NT[row, span] = ids, count[row], mask
            prefixes_NT[row, span] = prefix
            placement[index], skipped[index] = (row, start), shared
            start += len(ids)
    return Packed(tokens_NT, segments_NT, mask_NT, placement, prefixes_NT, skipped)


def shared_ids(examples: Sequence[MaskedIds], own: int = 1) -> int:
    """How many ids examples share: those with which all begin and where no mask is set, but the last `own` of them.

    Those each keeps for itself, so that what predicts its first id with a mask stands in its own segment (2: also what
    predicts it from one place further off, as MTP does).
    """
    if len(examples) < 2:
        return 0
    ids_of, masks = ([example[part] for example in examples] for part in (0, 1))
    columns = zip(zip(*ids_of, strict=False), zip(*masks, strict=False), strict=True)
    alike = itertools.takewhile(lambda column: len(set(column[0])) == 1 and not any(column[1]), columns)
    return max(0, sum(1 for _ in alike) - own)


def whole_groups(examples: Sequence[MaskedIds], groups: Sequence[Hashable], own: int = 1) -> tuple[int, int]:
    """The tokens of the largest group that shares something, 0 where none does, and those of all examples."""
    largest = total = 0
    for members in _members(examples, groups):
        shared = shared_ids([examples[index] for index in members], own)
        tokens = shared + sum(len(examples[index][0]) - shared for index in members)
        largest, total = max(largest, tokens if shared else 0), total + tokens
    return largest, total


def _members(examples: Sequence[MaskedIds], groups: Sequence[Hashable]) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for index, group in zip(range(len(examples)), groups, strict=True):
        found.setdefault(group, []).append(index)
    return list(found.values())


def _pieces(
    examples: Sequence[MaskedIds], length: int, groups: Sequence[Hashable] | None, own: int
) -> list[tuple[int, list[int]]]:
    """What has to stand together in a row: so many ids, and the examples that share them; in the examples' order."""
    pieces: list[tuple[int, list[int]]] = []
    for members in _members(examples, range(len(examples)) if groups is None else groups):
        shared = shared_ids([examples[index] for index in members], own)
        room = -1
        for index in members:
            size = len(examples[index][0]) - shared
            if not shared or size > room:
                pieces.append((shared, []))
                room = length - shared
            pieces[-1][1].append(index)
            room -= size
    pieces = [(shared if len(members) > 1 else 0, members) for shared, members in pieces]
    return sorted(pieces, key=lambda piece: piece[1][0])


def _places(sizes: Sequence[int], length: int) -> tuple[int, list[tuple[int, int]]]:
    """How many rows it takes, and where each piece begins: (row, start)."""
    used: list[int] = []  # tokens in each row
    by_room: list[list[int]] = [[] for _ in range(length + 1)]  # rows by the room left in them
    rooms = 0  # bit r is set where by_room[r] has a row, so the fullest row with room is its lowest bit from `size` up
    places: list[tuple[int, int]] = []
    for size in sizes:
        fitting = rooms >> size
        if fitting:
            room = size + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = length, len(used)
            used.append(0)
        places.append((row, used[row]))
        used[row] += size
        by_room[room - size].append(row)
        rooms |= 1 << (room - size)
    return len(used), places
