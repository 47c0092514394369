"""Causal attention within the documents of packed rows, for training: no mask, no scores in memory.

Suffixes: B rows, T time, H query heads, G key heads (consecutive query heads share one), W width of queries and keys,
V width of values.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from slingshot.kernels.calls import NativeCall


class Ends(NamedTuple):
    """Of every token of packed rows, as places within its row, int32 [B, T]: the first token of its document, and the
    last token that sees it; where the keys of its document's prefix begin and end (both 0: none).

    Every token between a prefix and the last token that sees it sees it, too.
    """

    first_BT: Tensor
    last_BT: Tensor
    prefix_first_BT: Tensor | None = None
    prefix_end_BT: Tensor | None = None


def ends_of_documents(segments_BT: Tensor, prefixes_BT: Tensor | None = None) -> Ends:
    """Padding is a document like any. `prefixes_BT`: of each token the segment that its document goes on from, or 0."""
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    ends_BT = begins_BT.roll(-1, dims=1)
    ends_BT[:, -1] = True
    time = torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)
    first_BT = time.where(begins_BT, 0).cummax(1).values
    last_BT = time.where(ends_BT, segments_BT.shape[1]).flip(1).cummin(1).values.flip(1)
    found = [first_BT, last_BT]
    if prefixes_BT is not None:
        of_segment = last_BT.new_zeros(len(segments_BT), int(segments_BT.max()) + 1)
        seen_until = of_segment.scatter_reduce(1, prefixes_BT, last_BT, "amax").index_fill_(1, time[0, :1], 0)
        pair = (of_segment.scatter(1, segments_BT, each).gather(1, prefixes_BT) for each in (first_BT, last_BT + 1))
        found = [first_BT, last_BT.maximum(seen_until.gather(1, segments_BT))]
        found += [each.where(prefixes_BT > 0, 0) for each in pair]
    return Ends(*(each.int().contiguous() for each in found))


def attend_packed(
    native: NativeCall, q_BTHW: Tensor, k_BTGW: Tensor, v_BTGV: Tensor, ends: Ends, scale: float
) -> Tensor:
    """softmax(scale q k^T) v over a document's prefix, its earlier tokens and itself: y_BTHV; scores, sums float32."""
    y: Tensor = _PackedAttention.apply(q_BTHW, k_BTGW, v_BTGV, ends, scale, native)
    return y


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Ends, scale: float, native: NativeCall) -> Tensor:
        q, k, v = (_side_by_side(t) for t in (q, k, v))
        rows, time, heads, width = q.shape
        y, lse = q.new_empty(rows, time, heads, v.shape[3]), torch.empty(rows, time, heads)
        ctx.sizes, ctx.ends, ctx.native = (rows, time, heads, k.shape[2], width, v.shape[3], scale), ends, native
        native("packed_attention_forward", *ctx.sizes, *ends, *_placed(q, k, v), y, lse)
        ctx.save_for_backward(q, k, v, y, lse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, lse = ctx.saved_tensors
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype) for t in (q, k, v))
        given = *ctx.sizes, *ctx.ends, *_placed(q, k, v), y, lse, grads[0].contiguous()
        ctx.native("packed_attention_backward", *given, dq, dk, dv)
        return dq, dk, dv, None, None, None


def _side_by_side(x_BTHW: Tensor) -> Tensor:
    """As it is where a head's numbers are side by side and rows follow each other in steps of whole tokens."""
    strides = x_BTHW.stride()
    return x_BTHW if strides[3] == 1 and strides[0] == x_BTHW.shape[1] * strides[1] else x_BTHW.contiguous()


def _placed(*tensors: Tensor) -> list[Any]:
    return [value for x in tensors for value in (x, x.stride(1), x.stride(2))]
