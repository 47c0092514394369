"""Queries and keys from their parts: numbers that stay as they are, then pairs turned by their position's angle.

Suffixes: X leading dimensions, H heads, G heads of the turned part (H, or 1 that all share), N numbers that stay,
R pairs, W = N + 2 R.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slingshot.kernels.calls import NativeCall


def turned_heads(
    native: NativeCall, plain_XHN: Tensor, x_XGR: Tensor, cos_XR: Tensor, sin_XR: Tensor, interleaved: bool
) -> Tensor:
    """cat(plain, rotate(x)) of every head in one pass, y_XHW; interleaved pairs come out half-split."""
    y: Tensor = _TurnedHeads.apply(plain_XHN, x_XGR, cos_XR, sin_XR, interleaved, native)
    return y


class _TurnedHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plain: Tensor, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, native: NativeCall
    ) -> Tensor:
        parts = [part.reshape(-1, *part.shape[-2:]) for part in (plain, x)]
        parts = [part if part.stride(2) == 1 else part.contiguous() for part in parts]
        (tokens, heads, width), (_, turned, pairs) = parts[0].shape, parts[1].shape
        ctx.sizes = tokens, heads, width, pairs // 2, int(turned == 1 < heads), int(interleaved)
        ctx.shapes, ctx.native = (plain.shape, x.shape), native
        cos, sin = cos.contiguous(), sin.contiguous()
        y = plain.new_empty(*plain.shape[:-1], width + pairs)
        placed = [value for part in parts for value in (part, part.stride(0), part.stride(1))]
        native("heads_forward", *ctx.sizes, *placed, cos, sin, y)
        ctx.save_for_backward(cos, sin)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0].contiguous()
        dplain, dx = (grad.new_empty(shape) for shape in ctx.shapes)
        ctx.native("heads_backward", *ctx.sizes, grad, *ctx.saved_tensors, dplain, dx)
        return dplain, dx, None, None, None, None
