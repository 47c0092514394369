"""The sequences that decode, as arrays with one row each, changed where something changes and never rebuilt.

    rows.enter(resident, token_id)      # into the next row, its last token still to be run
    rows.leave(resident)                # the last row moves to its place
    batch = rows.batch()                # every row's last token as a FlatBatch
    rows.advance(ids)                   # the tokens that were drawn for every row

Suffixes: M rows at most, P pages of the longest possible sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from slingshot.engine.batch import PAGE, FlatBatch
from slingshot.engine.sequence import Sequence


@dataclass(eq=False)
class Resident:
    """A sequence that has a place in the engine, and its pages.

    known           its tokens when it entered, of which `computed` are in the cache; beyond them it is a row
    keys            names of their full pages
    serial          who came later gives way first
    followers       other samples of the request, waiting for the prompt to be there for all of them
    drafts          guessed tokens that the next step runs behind the last one; speculation.py's are the rest:
    guesses, reach  what the MTP module says comes next; how many guesses are worth running
    mtp_page, mtp_next  the page at which the module began, the position at which it goes on
    """

    sequence: Sequence
    known: list[int]
    keys: list[bytes]
    serial: int
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    row: int = -1
    followers: list[Resident] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    guesses: list[int] = field(default_factory=list)
    reach: int = 1
    mtp_page: int = 0
    mtp_next: int = 0


class DecodingRows:
    """Up to `most` rows of at most `max_length` tokens."""

    def __init__(self, most: int, max_length: int) -> None:
        self.residents: list[Resident] = []
        self.guessing = False  # whether some of them have drafts
        self._tokens_M, self._positions_M = np.zeros(most, np.int64), np.zeros(most, np.int64)
        self._page_counts_M = np.zeros(most, np.int64)
        self._tables_MP = np.zeros((most, -(-max_length // PAGE)), np.int32)
        self._table_address = self._tables_MP.ctypes.data
        self._first_page_M = np.arange(most, dtype=np.int64) * self._tables_MP.shape[1]  # in the flat tables
        self._starts = torch.arange(most + 1, dtype=torch.int32)
        self._wanted = torch.arange(most)

    def __len__(self) -> int:
        return len(self.residents)

    def enter(self, resident: Resident, token_id: int, position: int) -> None:
        """Take the next row; the token at `position` is to be run next."""
        row = resident.row = len(self.residents)
        self.residents.append(resident)
        self._tokens_M[row], self._positions_M[row] = token_id, position
        self._page_counts_M[row] = len(resident.pages)
        self._tables_MP[row, : len(resident.pages)] = resident.pages
        self._tables_MP[row, len(resident.pages) :] = 0

    def leave(self, resident: Resident) -> None:
        """Give the row to the last one's."""
        row, last = resident.row, len(self.residents) - 1
        if row != last:
            moved = self.residents[row] = self.residents[last]
            moved.row = row
            for array in (self._tokens_M, self._positions_M, self._page_counts_M, self._tables_MP):
                array[row] = array[last]
        self.residents.pop()
        resident.row = -1

    def short_of_pages(self) -> list[Resident]:
        """Rows whose next token has no page yet."""
        count = len(self.residents)
        short = np.flatnonzero(self._positions_M[:count] >= self._page_counts_M[:count] * PAGE)
        return [self.residents[row] for row in short]

    def set_page(self, resident: Resident, index: int, page: int) -> None:
        """Page number `index` of a row, its last or the next one."""
        resident.pages[index:] = [page]
        self._tables_MP[resident.row, index] = page
        self._page_counts_M[resident.row] = len(resident.pages)

    def position(self, resident: Resident) -> int:
        """Of the token that is to be run next: as many are in the cache."""
        return int(self._positions_M[resident.row])

    def table(self, resident: Resident) -> int:
        """The address of its page numbers, int32."""
        return self._table_address + resident.row * self._tables_MP.strides[0]

    def batch(self) -> FlatBatch:
        """Every row's last token."""
        count = len(self.residents)
        positions_N = self._positions_M[:count]
        pages = int(positions_N.max()) // PAGE + 1
        slots_N = self._tables_MP.take(self._first_page_M[:count] + (positions_N >> 4)) * PAGE + (positions_N & 15)
        return FlatBatch(
            torch.from_numpy(self._tokens_M[:count]),
            torch.from_numpy(positions_N),
            torch.from_numpy(slots_N.astype(np.int64, copy=False)),
            self._starts[: count + 1],
            torch.from_numpy((positions_N + 1).astype(np.int32)),
            torch.from_numpy(self._tables_MP[:count, :pages].copy()),
            self._wanted[:count],
        )

    def guessing_batch(self) -> FlatBatch:
        """Every row's last token and its drafts, with the logits after each of them."""
        count = len(self.residents)
        last = zip(self._tokens_M[:count].tolist(), self._positions_M[:count].tolist(), strict=True)
        parts = [([token, *its.drafts], at, its.pages) for its, (token, at) in zip(self.residents, last, strict=True)]
        return FlatBatch.of(parts, wanted=range(sum(len(ids) for ids, _, _ in parts)))

    def advance(self, ids: list[int]) -> None:
        """The next token of every row."""
        count = len(ids)
        self._tokens_M[:count] = ids
        self._positions_M[:count] += 1

    def advance_one(self, resident: Resident, token_id: int, count: int) -> None:
        """A row took `count` tokens, the last of them this one."""
        self._tokens_M[resident.row] = token_id
        self._positions_M[resident.row] += count
