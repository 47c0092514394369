"""One step's work as flat tokens, and what runs it.

A step takes N tokens of S sequences: chunks of prompts and rows that decode alike. Where a token's cache entry goes and
where its sequence's earlier entries are is told in pages of `PAGE` tokens. Page 0 is nobody's: padding writes there.

    batch = FlatBatch.of([([5, 9, 4], 0, [3]), ([7], 20, [1, 2])])     # ids, position of the first, pages
    output = runner.forward(batch)                                     # logits after each sequence's last token

Suffixes: N tokens, S sequences, P pages of the longest sequence, R wanted logits, V vocabulary, D model width, L MoE
layers, k experts a token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAGE = 16  # tokens of a page


@dataclass
class FlatBatch:
    """N tokens of S sequences, on the CPU. All of one sequence stand together, in the order of their positions.

    token_ids_N, positions_N    int64
    slots_N                     int64: page * PAGE + offset, where the token's cache entry is written
    starts                      int32 [S + 1]: tokens of sequence s are starts[s] to starts[s + 1]
    lengths                     int32 [S]: tokens of the sequence in the cache after this step
    block_tables                int32 [S, P]: its pages in order, filled up with 0
    wanted                      int64 [R]: tokens after which logits are needed; the same may be wanted several times
    hidden, routing             what the output shall hold besides the logits
    adapters_S                  the number of each sequence's adapter, 0 for none; None: there are none at all
    """

    token_ids_N: Tensor
    positions_N: Tensor
    slots_N: Tensor
    starts: Tensor
    lengths: Tensor
    block_tables: Tensor
    wanted: Tensor
    hidden: bool = False
    routing: bool = False
    adapters_S: Tensor | None = None

    @classmethod
    def of(
        cls,
        sequences: Iterable[tuple[Sequence[int], int, Sequence[int]]],
        wanted: Sequence[int] | None = None,
        hidden: bool = False,
        routing: bool = False,
    ) -> Self:
        """From (token ids, position of the first, pages) of each sequence; default: wanted after each one's last."""
        token_ids: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts, lengths, tables = [0], [], []
        for ids, first, pages in sequences:
            end = first + len(ids)
            token_ids += ids
            positions += range(first, end)
            slots += [pages[at >> 4] * PAGE + (at & 15) for at in range(first, end)]
            starts.append(len(token_ids))
            lengths.append(end)
            tables.append(pages)
        block_tables = np.zeros((len(tables), max(map(len, tables))), dtype=np.int32)
        for row, pages in enumerate(tables):
            block_tables[row, : len(pages)] = pages
        wanted = [start - 1 for start in starts[1:]] if wanted is None else list(wanted)
        return cls(
            _tensor(token_ids, np.int64),
            _tensor(positions, np.int64),
            _tensor(slots, np.int64),
            _tensor(starts, np.int32),
            _tensor(lengths, np.int32),
            torch.from_numpy(block_tables),
            _tensor(wanted, np.int64),
            hidden,
            routing,
        )

    def only(self, chosen_S: Tensor) -> tuple[Self, Tensor, Tensor]:
        """The sequences where the mask is True, and masks of their tokens and of their logits among all."""
        counts_S = self.starts.diff()
        chosen_N = chosen_S.repeat_interleave(counts_S)
        place_N, chosen_R = chosen_N.cumsum(0) - 1, chosen_N[self.wanted]
        part = replace(
            self,
            token_ids_N=self.token_ids_N[chosen_N],
            positions_N=self.positions_N[chosen_N],
            slots_N=self.slots_N[chosen_N],
            starts=F.pad(counts_S[chosen_S].cumsum(0), (1, 0)).to(torch.int32),
            lengths=self.lengths[chosen_S],
            block_tables=self.block_tables[chosen_S].contiguous(),
            wanted=place_N[self.wanted[chosen_R]],
            adapters_S=None if self.adapters_S is None else self.adapters_S[chosen_S],
        )
        return part, chosen_N, chosen_R

    def joined(self, other: Self) -> Self:
        """This batch's sequences, then the other's."""
        pages = max(self.block_tables.shape[1], other.block_tables.shape[1])
        tables = (F.pad(its.block_tables, (0, pages - its.block_tables.shape[1])) for its in (self, other))
        return type(self)(
            torch.cat((self.token_ids_N, other.token_ids_N)),
            torch.cat((self.positions_N, other.positions_N)),
            torch.cat((self.slots_N, other.slots_N)),
            torch.cat((self.starts, other.starts[1:] + len(self.token_ids_N))),
            torch.cat((self.lengths, other.lengths)),
            torch.cat(tuple(tables)),
            torch.cat((self.wanted, other.wanted + len(self.token_ids_N))),
            self.hidden or other.hidden,
            self.routing or other.routing,
        )


def _tensor(values: list[int], dtype: type[np.integer]) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=dtype))  # half the time of torch.tensor


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device: a GPU takes it from pinned memory, for which nobody waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


@dataclass
class RunnerOutput:
    """What a step's tokens gave.

    logits_RV       float32
    hidden_ND       after the final norm, of every token, where asked: what the MTP module continues from
    routing_NLk     int16, the experts that each MoE layer of the main model chose for every token, where asked
    """

    logits_RV: Tensor
    hidden_ND: Tensor | None = None
    routing_NLk: Tensor | None = None


class Runner(Protocol):
    """Runs the network over flat batches and a KVCache. Single-threaded; tensors of the output may be reused by the
    next call."""

    def forward(self, batch: FlatBatch) -> RunnerOutput: ...

    def draft(self, batch: FlatBatch, hidden_ND: Tensor) -> RunnerOutput:
        """The MTP module over the same kind of batch, whose token_ids_N are those that follow each position:
        from the hidden state at t and token t + 1, logits for t + 2. Its layer of the cache is `num_hidden_layers`.

        With batch.hidden the output's hidden_ND is the module's own (after its norm), from which a next draft may go
        on.
        """

    def refresh(self) -> None:
        """The model's weights have changed."""
