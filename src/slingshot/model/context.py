"""What every layer of one forward pass shares: the rotary tables, and how queries meet keys and values.

An attention module makes q, k and v of its tokens and calls `context.attend`; where keys of earlier tokens come from,
and which tokens a query may look at, is the context's. `PackedContext` (training: whole rows of packed documents) is
here, the engine has its own over a cache. The tokens of a batch may have any leading dimensions: [B, T] in rows, [N]
one after the other.

Suffixes: X the leading dimensions, B rows, T time, R rotated width / 2, H query heads, G key heads, W width of queries
and keys, V of values.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from slingshot.kernels.attention import (
    SHORT,
    PrefixedKeys,
    attend_documents,
    attend_short,
    attend_varlen,
    bias_of,
    causal_mask,
    starts_of,
)
from slingshot.kernels.calls import native_for
from slingshot.kernels.packed_attention import Ends, attend_packed, ends_of_documents
from slingshot.model.config import ModelConfig
from slingshot.model.rope import rotary


class Context(ABC):
    """Where attention happens."""

    absorb: bool  # whether MLA moves its queries into the latent space: `attend` then sees one latent entry a token

    def __init__(self, config: ModelConfig, positions_X: Tensor) -> None:
        self.cos_XR, self.sin_XR = rotary(config, positions_X)

    @abstractmethod
    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        """softmax(scale q k^T) v over every token that each query may see: y_XHV.

        Values are as wide as keys, or, where v is a number, the first so many numbers of the keys.
        """


class PackedContext(Context):
    """Causal attention within rows [B, T], and within a segment where rows hold several documents (0 is padding).

    `prefixes_BT`: of each token the segment before that its own goes on from, 0 for none: several documents that begin
    alike have that beginning once. Its tokens are seen, and positions follow on from its length.
    """

    absorb = False

    def __init__(
        self, config: ModelConfig, tokens_BT: Tensor, segments_BT: Tensor | None, prefixes_BT: Tensor | None = None
    ) -> None:
        self.segments_BT = torch.ones_like(tokens_BT) if segments_BT is None else segments_BT
        self.prefixes_BT = prefixes_BT
        self._ends: Ends | None = None
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape)
        if prefixes_BT is not None:
            self._ends = ends = ends_of_documents(self.segments_BT, prefixes_BT)
            assert ends.prefix_end_BT is not None
            skipped_BT = (ends.first_BT - ends.prefix_end_BT).where(prefixes_BT > 0, 0)
            positions_BT = positions_BT - skipped_BT
        super().__init__(config, positions_BT)
        self._bias: Tensor | None = None
        self._lengths: list[int] = []
        self._starts: Tensor | None = None
        self._prefixed: PrefixedKeys | None = None

    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        assert isinstance(v_XGV, Tensor)
        q, k, v = q_XHW, k_XGW, v_XGV
        short = q.shape[1] <= SHORT
        if (short or self.prefixes_BT is not None) and (native := native_for(q)) is not None:
            if self._ends is None:
                self._ends = ends_of_documents(self.segments_BT)
            return attend_packed(native, q, k, v, self._ends, scale)
        if (groups := q.shape[2] // k.shape[2]) > 1:
            k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        if q.device.type == "cpu" and short:
            if self._bias is None:
                self._bias = bias_of(causal_mask(self.segments_BT, self.prefixes_BT), q.shape[2], q.dtype)
            return attend_short(q, k, v, self._bias, scale)
        if self._starts is None:
            self._lengths = document_lengths(self.segments_BT)
            self._starts = starts_of(self._lengths, q.device)
            if self._ends is not None:
                self._prefixed = prefixed_keys(self._ends, self._lengths)
        if q.device.type == "cuda" and q.dtype != torch.float32:
            from torch.nn.attention.varlen import varlen_attn  # here, because a CPU saves its time

            return attend_varlen(q, k, v, self._starts, max(self._lengths), scale, varlen_attn, self._prefixed)
        return attend_documents(q, k, v, self._lengths, scale, self._prefixed)

    @property
    def documents_BT(self) -> Tensor:
        """How many documents each token is of: a prefix's of all that go on from it, padding of none."""
        count_BT = (self.segments_BT > 0).long()
        if self.prefixes_BT is None or self._ends is None:
            return count_BT
        time = torch.arange(count_BT.shape[1], device=count_BT.device)
        begins_BT = (self._ends.first_BT == time) & (self.prefixes_BT > 0)
        sharing = count_BT.new_zeros(len(count_BT), int(self.segments_BT.max()) + 1)
        sharing = sharing.scatter_add(1, self.prefixes_BT, begins_BT.long())
        return count_BT * sharing.gather(1, self.segments_BT).clamp(min=1)


def document_lengths(segments_BT: Tensor) -> list[int]:
    """Lengths of the runs of one segment within a row, row after row; padding is a run like any other."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = [*begins_BT.flatten().nonzero().flatten().tolist(), segments_BT.numel()]
    return [end - start for start, end in pairwise(starts)]


def prefixed_keys(ends: Ends, lengths: list[int]) -> PrefixedKeys:
    """Of documents of these lengths, row after row, whose tokens end as told."""
    assert ends.prefix_first_BT is not None and ends.prefix_end_BT is not None
    time, device = ends.first_BT.shape[1], ends.first_BT.device
    begins = list(accumulate(lengths, initial=0))[:-1]
    pair = (each.flatten()[begins].tolist() for each in (ends.prefix_first_BT, ends.prefix_end_BT))
    places: list[int] = []
    seen = []
    for start, length, first, end in zip(begins, lengths, *pair, strict=True):
        row = start // time * time
        places += [*range(row + first, row + end), *range(start, start + length)]
        seen.append(end - first + length)
    return PrefixedKeys(torch.tensor(places, device=device), seen)
