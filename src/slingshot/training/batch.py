"""Rows of packed tokens, as training takes them.

    rows = Rows.of(tokens_NT, segments_NT)                       # documents
    rows = Rows.of_examples([(ids, mask), ...], length=256)      # whole examples; loss where the mask is
    mine = rows.shard(parallel)

Shape suffixes: B rows, T time; N rows of a numpy array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slingshot.data.packing import pack_examples
from slingshot.training.parallel import Parallel


@dataclass
class Rows:
    """tokens_BT, segments_BT (documents of a row numbered from 1, 0 padding), weights_BT of each token as a target."""

    tokens_BT: Tensor
    segments_BT: Tensor
    weights_BT: Tensor

    @classmethod
    def of(cls, tokens_NT: np.ndarray, segments_NT: np.ndarray, weights_NT: np.ndarray | None = None) -> Rows:
        """From numpy's arrays; without weights every token of a document is a target."""
        tokens_BT, segments_BT = (
            torch.from_numpy(np.ascontiguousarray(array)).long() for array in (tokens_NT, segments_NT)
        )
        weights_BT = segments_BT > 0 if weights_NT is None else torch.from_numpy(np.ascontiguousarray(weights_NT))
        return cls(tokens_BT, segments_BT, weights_BT.float())

    @classmethod
    def of_examples(cls, examples: Sequence[tuple[Sequence[int], Sequence[int]]], length: int) -> Rows:
        """Whole examples (ids, mask), each as well into a row as it fits."""
        packed = pack_examples(examples, length)
        return cls.of(packed.tokens_NT, packed.segments_NT, packed.mask_NT)

    def __len__(self) -> int:
        return len(self.tokens_BT)

    def __getitem__(self, rows: slice) -> Rows:
        return Rows(self.tokens_BT[rows], self.segments_BT[rows], self.weights_BT[rows])

    def shard(self, parallel: Parallel) -> Rows:
        """This rank's rows; empty ones are added where the ranks do not divide them: all take part in every step."""
        missing = -len(self) % parallel.dp_size
        fields = [self.tokens_BT, self.segments_BT, self.weights_BT]
        if missing:
            fields = [torch.cat((field, field.new_zeros(missing, field.shape[1]))) for field in fields]
        return Rows(*(field[parallel.dp_rank :: parallel.dp_size].to(parallel.device) for field in fields))

    @property
    def n_tokens(self) -> int:
        return int((self.segments_BT > 0).sum())

    def lengths(self) -> list[int]:
        """Tokens of every document in the rows, for counting FLOPs."""
        first = torch.arange(len(self), device=self.segments_BT.device)[:, None] * (self.segments_BT.shape[1] + 1)
        counts: list[int] = (self.segments_BT + first)[self.segments_BT > 0].unique(return_counts=True)[1].tolist()
        return counts
