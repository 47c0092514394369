"""The rows that decode together: the cache and, beside it, each row's last token and position.

Active rows are always the first ones: a sequence that leaves gives its slot to the last row, so a step reads slices.

    first_slot = batch.place(sequences)     # into the next free slots; their prompts must then be written to the cache
    batch.remove(slot)

Suffix: S slots.
"""

from __future__ import annotations

import torch

from slingshot.engine.sequence import Sequence
from slingshot.engine.slot_cache import SlotCache
from slingshot.model.config import ModelConfig

LENGTH_STEP = 64  # the cache grows by multiples of this many tokens


class Batch:
    """Up to `max_batch` sequences in slots 0, 1, ... of a cache of about `cache_bytes` (one sequence always fits)."""

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device, max_batch: int, cache_bytes: int
    ) -> None:
        self._cache_of = lambda slots, length: SlotCache(config, slots, length, dtype, device)
        self._max_batch = max_batch
        self._max_entries = cache_bytes // (config.cache_width * config.num_hidden_layers * dtype.itemsize)
        self.sequences: list[Sequence] = []
        self.cache = self._cache_of(0, 0)
        self.tokens_S, self.positions_S = (torch.zeros(max_batch, dtype=torch.long, device=device) for _ in range(2))
        self._rows_S = self.tokens_S, self.positions_S

    def fits(self, rows: int, length: int) -> bool:
        """Whether `rows` sequences of at most `length` tokens may be active at once."""
        return rows <= self._max_batch and (rows == 1 or rows * length <= self._max_entries)

    def place(self, sequences: list[Sequence]) -> int:
        """Give each sequence the next slot, its row poised to decode the prompt's last token; -> the first one's."""
        first, last = len(self.sequences), len(self.sequences) + len(sequences)
        self._reserve(last, max(sequence.request.limit for sequence in [*self.sequences, *sequences]))
        prompts = [sequence.request.prompt for sequence in sequences]
        values = [prompt[-1] for prompt in prompts], [len(prompt) - 1 for prompt in prompts]
        for rows_S, row_values in zip(self._rows_S, values, strict=True):
            rows_S[first:last] = torch.tensor(row_values, dtype=rows_S.dtype)
        self.sequences += sequences
        return first

    def remove(self, slot: int) -> Sequence:
        """Take out the sequence in this slot; the last row moves there. Several leave from the highest slot down."""
        leaving, last, source = self.sequences[slot], self.sequences[-1], len(self.sequences) - 1
        if slot != source:
            self.cache.copy(source, slot, last.length - 1)
            for rows_S in self._rows_S:
                rows_S[slot] = rows_S[source]
            self.sequences[slot] = last
        self.sequences.pop()
        return leaving

    def _reserve(self, rows: int, length: int) -> None:
        """Make the cache hold `rows` sequences of `length` tokens. Rows grow by doubling, so that copies are few."""
        old, active = self.cache, len(self.sequences)
        if rows <= old.slots and length <= old.length:
            return
        if not active:
            old.data.clear()  # nothing to keep: its memory goes before its successor's comes
        doubled = min(self._max_batch, 1 << (rows - 1).bit_length())
        length = -(-length // LENGTH_STEP) * LENGTH_STEP
        self.cache = self._cache_of(doubled if self.fits(doubled, length) else rows, length)
        if active:
            used = max(sequence.length for sequence in self.sequences)
            for layer, old_layer in zip(self.cache.data, old.data, strict=True):
                layer[:active, :used] = old_layer[:active, :used]
