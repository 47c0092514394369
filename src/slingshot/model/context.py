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

from slingshot.kernels.attention import SHORT, attend_documents, attend_short, attend_varlen, bias_of, causal_mask
from slingshot.kernels.calls import native_for
from slingshot.kernels.packed_attention import attend_packed, ends_of_documents
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
    """Causal attention within rows [B, T], and within a segment where rows hold several documents (0 is padding)."""

    absorb = False

    def __init__(self, config: ModelConfig, tokens_BT: Tensor, segments_BT: Tensor | None) -> None:
        super().__init__(config, torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand(tokens_BT.shape))
        self.segments_BT = torch.ones_like(tokens_BT) if segments_BT is None else segments_BT
        self._bias: Tensor | None = None
        self._ends: tuple[Tensor, Tensor] | None = None
        self._lengths: list[int] = []
        self._starts: Tensor | None = None

    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        assert isinstance(v_XGV, Tensor)
        q, k, v = q_XHW, k_XGW, v_XGV
        if q.shape[1] <= SHORT and (native := native_for(q)) is not None:
            if self._ends is None:
                self._ends = ends_of_documents(self.segments_BT)
            return attend_packed(native, q, k, v, self._ends, scale)
        if (groups := q.shape[2] // k.shape[2]) > 1:
            k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        if q.device.type == "cpu" and q.shape[1] <= SHORT:
            if self._bias is None:
                self._bias = bias_of(causal_mask(self.segments_BT), q.shape[2], q.dtype)
            return attend_short(q, k, v, self._bias, scale)
        if self._starts is None:
            self._lengths = document_lengths(self.segments_BT)
            self._starts = torch.tensor([0, *accumulate(self._lengths)], dtype=torch.int32, device=q.device)
        if q.device.type == "cuda" and q.dtype != torch.float32:
            from torch.nn.attention.varlen import varlen_attn  # here, because a CPU saves its time

            return attend_varlen(q, k, v, self._starts, max(self._lengths), scale, varlen_attn)
        return attend_documents(q, k, v, self._lengths, scale)


def document_lengths(segments_BT: Tensor) -> list[int]:
    """Lengths of the runs of one segment within a row, row after row; padding is a run like any other."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    starts = [*begins_BT.flatten().nonzero().flatten().tolist(), segments_BT.numel()]
    return [end - start for start, end in pairwise(starts)]
