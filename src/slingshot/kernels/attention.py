"""Softmax attention in the forms that are fastest where they run; each gives what `attention_reference` gives.

Suffixes: B rows, T queries, S keys, H query heads, G key heads (consecutive query heads share one), W width of queries
and keys, V width of values, Z = B H, N = B G, M the queries that share a key head of a row, P = B T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Kernel = Callable[..., Any]
SHORT = 256  # up to here plain products beat torch's fused kernel on a CPU: its backward takes 3.9 times as long at 128


def attention_reference(q_BTHW: Tensor, k_BSGW: Tensor, v_BSGV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """softmax(scale q k^T) v over the keys where the mask is True, the softmax in float32: y_BTHV."""
    k_BSHW, v_BSHV = (t.repeat_interleave(q_BTHW.shape[2] // t.shape[2], dim=2) for t in (k_BSGW, v_BSGV))
    scores_BHTS = torch.einsum("bthw,bshw->bhts", q_BTHW, k_BSHW).float() * scale
    weights_BHTS = scores_BHTS.masked_fill(~mask_BTS[:, None], -torch.inf).softmax(-1).to(v_BSHV.dtype)
    return torch.einsum("bhts,bshv->bthv", weights_BHTS, v_BSHV)


def causal_mask(segments_BT: Tensor, prefixes_BT: Tensor | None = None) -> Tensor:
    """Where a packed row's tokens look: backwards within their own segment and the one it goes on from, [B, T, T]."""
    time = segments_BT.shape[1]
    causal_TT = torch.ones(time, time, dtype=torch.bool, device=segments_BT.device).tril()
    seen_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if prefixes_BT is not None:
        seen_BTT |= (prefixes_BT[:, :, None] == segments_BT[:, None, :]) & (prefixes_BT > 0)[:, :, None]
    return causal_TT & seen_BTT


def bias_of(mask_BTS: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """A mask as numbers to be added to scores, for each head: [Z, T, S]."""
    bias = torch.zeros(mask_BTS.shape, dtype=dtype, device=mask_BTS.device)
    bias = bias.masked_fill_(~mask_BTS, -torch.finfo(dtype).max / 2)
    return bias[:, None].expand(-1, heads, -1, -1).flatten(0, 1)


def attend_short(q_BTHW: Tensor, k_BSHW: Tensor, v_BSHV: Tensor, bias_ZTS: Tensor, scale: float) -> Tensor:
    """Plain batched products, for rows of at most `SHORT` tokens on a CPU."""
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q_BTHW, k_BSHW, v_BSHV))
    scores_ZTS = torch.baddbmm(bias_ZTS, q, k.transpose(1, 2), alpha=scale)
    return torch.bmm(scores_ZTS.softmax(-1), v).unflatten(0, (len(q_BTHW), -1)).transpose(1, 2)


class PrefixedKeys(NamedTuple):
    """What each document sees in turn, its prefix and then itself: which of all P tokens, and how many each."""

    places: Tensor
    lengths: list[int]


def attend_documents(
    q_BTHW: Tensor,
    k_BTHW: Tensor,
    v_BTHV: Tensor,
    lengths: list[int],
    scale: float,
    prefixed: PrefixedKeys | None = None,
) -> Tensor:
    """Causal attention within documents of the given lengths, which fill the rows one after the other.

    No work between documents, and no mask unless they go on from prefixes. On a CPU short ones take plain products and
    long ones torch's fused kernel.
    """
    q, k, v = (t.flatten(0, 1) for t in (q_BTHW, k_BTHW, v_BTHV))
    if prefixed is not None:
        k, v = (t.index_select(0, prefixed.places)[None].split(prefixed.lengths, 1) for t in (k, v))
        y = torch.cat([_attend_last(*each, scale)[0] for each in zip(q[None].split(lengths, 1), k, v, strict=True)])
    elif len(set(lengths)) == 1:
        q, k, v = (t.unflatten(0, (-1, lengths[0])) for t in (q, k, v))
        y = _attend_causal(q, k, v, scale).flatten(0, 1)
    else:
        parts = zip(q[None].split(lengths, 1), k[None].split(lengths, 1), v[None].split(lengths, 1), strict=True)
        y = torch.cat([_attend_causal(q, k, v, scale)[0] for q, k, v in parts])
    return y.unflatten(0, q_BTHW.shape[:2])


def _attend_last(q_BTHW: Tensor, k_BSHW: Tensor, v_BSHV: Tensor, scale: float) -> Tensor:
    """Queries of a document's last T tokens, keys of all."""
    time, seen = q_BTHW.shape[1], k_BSHW.shape[1]
    if time == seen:
        return _attend_causal(q_BTHW, k_BSHW, v_BSHV, scale)
    mask = torch.ones(time, seen, dtype=torch.bool, device=q_BTHW.device).tril(seen - time)
    q, k, v = _one_width(*(t.transpose(1, 2) for t in (q_BTHW, k_BSHW, v_BSHV)))
    y = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
    return y[..., : v_BSHV.shape[-1]].transpose(1, 2)


def _attend_causal(q_BTHW: Tensor, k_BTHW: Tensor, v_BTHV: Tensor, scale: float) -> Tensor:
    """Documents of one length."""
    time = q_BTHW.shape[1]
    if q_BTHW.device.type == "cpu" and time <= SHORT:
        future_1TT = torch.full((1, time, time), -torch.finfo(q_BTHW.dtype).max / 2, dtype=q_BTHW.dtype).triu(1)
        return attend_short(q_BTHW, k_BTHW, v_BTHV, future_1TT, scale)
    q, k, v = _one_width(*(t.transpose(1, 2) for t in (q_BTHW, k_BTHW, v_BTHV)))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return y[..., : v_BTHV.shape[-1]].transpose(1, 2)


def attend_varlen(
    q_BTHW: Tensor,
    k_BTHW: Tensor,
    v_BTHV: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    kernel: Kernel,
    prefixed: PrefixedKeys | None = None,
) -> Tensor:
    """`attend_documents` by one call of torch.nn.attention.varlen.varlen_attn (CUDA, 16 bits) or a kernel like it.

    starts: where each document begins among all P tokens, and P, int32 (`starts_of`). The last query meets all keys.
    """
    q, k, v = (t.flatten(0, 1) for t in _one_width(q_BTHW, k_BTHW, v_BTHV))
    key_starts, most_keys = starts, longest
    if prefixed is not None:
        k, v = (t.index_select(0, prefixed.places) for t in (k, v))
        key_starts, most_keys = starts_of(prefixed.lengths, q.device), max(prefixed.lengths)
    y_PHW: Tensor = kernel(q, k, v, starts, key_starts, longest, most_keys, scale=scale, window_size=(-1, 0))
    return y_PHW[..., : v_BTHV.shape[-1]].unflatten(0, q_BTHW.shape[:2])


def starts_of(lengths: list[int], device: torch.device) -> Tensor:
    """Where each of these begins, and where the last ends, int32."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def attend_folded(q_BTHW: Tensor, k_BSGW: Tensor, v_BSGV: Tensor, mask_BTS: Tensor, scale: float) -> Tensor:
    """For few queries and many keys: queries that share a key head are rows of one product; keys are not repeated.

    Plain products: at one query a row, torch's fused CPU kernel takes several times as long.
    """
    (batch, time, heads, width), groups = q_BTHW.shape, k_BSGW.shape[2]
    k_NSW, v_NSV = (t.transpose(1, 2).flatten(0, 1) for t in (k_BSGW, v_BSGV))
    q_BGTMW = q_BTHW.reshape(batch, time, groups, -1, width).transpose(1, 2)
    scores_NMS = torch.bmm(q_BGTMW.reshape(batch * groups, -1, width), k_NSW.mT).float().mul_(scale)
    scores_BGTMS = scores_NMS.view(batch, groups, time, heads // groups, -1)
    scores_BGTMS.masked_fill_(~mask_BTS.unsqueeze(1).unsqueeze(3), -torch.inf)
    y_NMV = torch.bmm(scores_NMS.softmax(-1).to(q_BTHW.dtype), v_NSV)
    return y_NMV.view(batch, groups, time, heads // groups, -1).transpose(1, 2).flatten(2, 3)


def _one_width(*tensors: Tensor) -> list[Tensor]:
    """Fused kernels want one width for q, k and v: the narrower are padded with zeros, which change nothing."""
    width = max(t.shape[-1] for t in tensors)
    return [F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in tensors]
