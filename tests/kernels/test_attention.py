"""Every form of attention against the definition, gradients included."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from slingshot.kernels import attention
from slingshot.kernels.attention import attention_reference, causal_mask
from slingshot.kernels.packed_attention import ends_of_documents
from slingshot.model.context import document_lengths, prefixed_keys

SCALE = 0.7


def operands(rows: int, time: int, keys: int, groups: int, value_width: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, time, 4, 8), (rows, keys, groups, 8), (rows, keys, groups, value_width))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def by_definition_of_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, ends: Tensor, *longest: int, **options: Any
) -> Tensor:
    """The arguments of torch.nn.attention.varlen.varlen_attn, which runs on CUDA only."""
    assert q.shape[1:] == k.shape[1:] and k.shape == v.shape and starts.dtype == ends.dtype == torch.int32
    sizes = [each.diff() for each in (starts, ends)]
    assert longest == tuple(int(each.max()) for each in sizes) and options.pop("window_size") == (-1, 0)
    document_P, document_S = (torch.arange(len(each)).repeat_interleave(each) for each in sizes)
    left_P, left_S = (
        each[1:][owner] - torch.arange(len(owner)) for each, owner in ((starts, document_P), (ends, document_S))
    )  # a document's last query and last key meet
    mask = (document_P[:, None] == document_S) & (left_S >= left_P[:, None])
    return attention_reference(q[None], k[None], v[None], mask[None], **options)[0]


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    seed = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad(y, inputs, seed, retain_graph=True)


@pytest.mark.parametrize("value_width", [3, 8, 11])
@pytest.mark.parametrize("lengths", [[[7]], [[4, 1, 2], [3, 3, 1]], [[300]], [[257, 40], [1, 296]]])
def test_packed_forms_are_softmax_attention_within_documents(lengths: list[list[int]], value_width: int) -> None:
    """Short documents take plain products, long ones the fused kernel, in one row as well."""
    time = sum(lengths[0])
    inputs = operands(len(lengths), time, time, 4, value_width)
    segments = torch.stack([torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths])
    mask, flat = causal_mask(segments), [length for row in lengths for length in row]
    starts = torch.tensor([0, *flat]).cumsum(0).int()
    expected = attention_reference(*inputs, mask, SCALE)
    for y in (
        attention.attend_short(*inputs, attention.bias_of(mask, 4, torch.float32), SCALE),
        attention.attend_documents(*inputs, flat, SCALE),
        attention.attend_varlen(*inputs, starts, max(flat), SCALE, by_definition_of_varlen),
    ):
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        for found, reference in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(found, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("value_width", [3, 11])
@pytest.mark.parametrize("length", [2, 170])
def test_forms_with_prefixes_are_softmax_attention_over_them_too(length: int, value_width: int) -> None:
    """Two rows: a prefix and two documents that go on from it and one alone; two groups."""
    rows = [[(1, 0), (2, 1), (3, 1), (4, 0)], [(1, 0), (2, 1), (3, 0), (4, 3)]]
    pairs = torch.tensor(rows).repeat_interleave(length, 1)
    segments, prefixes = pairs.unbind(-1)
    inputs = operands(2, segments.shape[1], segments.shape[1], 4, value_width)
    mask = causal_mask(segments, prefixes)
    lengths = document_lengths(segments)
    prefixed = prefixed_keys(ends_of_documents(segments, prefixes), lengths)
    starts = attention.starts_of(lengths, mask.device)
    expected = attention_reference(*inputs, mask, SCALE)
    for y in (
        attention.attend_short(*inputs, attention.bias_of(mask, 4, torch.float32), SCALE),
        attention.attend_documents(*inputs, lengths, SCALE, prefixed),
        attention.attend_varlen(*inputs, starts, max(lengths), SCALE, by_definition_of_varlen, prefixed),
    ):
        torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
        for found, reference in zip(gradients(y, inputs), gradients(expected, inputs), strict=True):
            torch.testing.assert_close(found, reference, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("time", [1, 3])
def test_folded_queries_are_grouped_attention(groups: int, time: int) -> None:
    q, k, v = operands(3, time, 9, groups)
    mask = torch.rand(3, time, 9, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True
    torch.testing.assert_close(attention.attend_folded(q, k, v, mask, SCALE), attention_reference(q, k, v, mask, SCALE))
