"""RMSNorm: the definition, and forms with the gradient written out, alone and with the residual sum before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.kernels.calls import as_rows, native_for


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight, the mean of squares in float32 (arXiv 1910.07467)."""
    inverse = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    return (x * inverse).to(x.dtype) * weight.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`rms_norm_reference`, each number read and written once where native kernels are. Any float dtype of weight."""
    if _in_one_kernel(x):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)
    y: Tensor = _RMSNorm.apply(x, None, weight, eps, False)
    return y


def residual_norm(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more (x where there is no more), and the norm of that.

    Whoever goes on with the first spares the addition of two gradients: the norm's backward pass makes it.
    """
    if _in_one_kernel(x):
        total = x if more is None else x + more
        return total, F.rms_norm(total, weight.shape, weight.to(x.dtype), eps)
    total, y = _RMSNorm.apply(x, more, weight, eps, True)
    return total, y


def _in_one_kernel(x: Tensor) -> bool:
    """Where starting kernels takes longer than they do, and torch has one for the whole of it."""
    return x.device.type != "cpu" and not torch.is_grad_enabled()


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, eps: float, passes_on: bool) -> Any:
        ctx.set_materialize_grads(False)
        ctx.eps, ctx.has_more, ctx.passes_on = eps, more is not None, passes_on
        native, width = native_for(x), x.shape[-1]
        if native is not None:
            rows, total, y = as_rows(x), x, torch.empty(x.shape, dtype=x.dtype)
            inverse = torch.empty(len(rows))
            if more is not None:
                more, total = more.contiguous(), torch.empty_like(y)
            held = weight.to(x.dtype).float()  # rounded as a copy of the model in this dtype is
            native("norm_forward", rows, rows.stride(0), more, held, eps, len(rows), width, total, y, inverse)
        else:
            total = x if more is None else x + more
            wide = torch.promote_types(x.dtype, torch.float32)
            squares = torch.linalg.vector_norm(total, dim=-1, keepdim=True, dtype=wide).square_()
            inverse = squares.div_(width).add_(eps).rsqrt_()
            y = (total * inverse).to(x.dtype).mul_(weight.to(x.dtype))
        ctx.save_for_backward(total, weight, inverse)
        return (total, y) if passes_on else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        kept, grad = grads if ctx.passes_on else (None, grads[0])
        if grad is None:
            return kept, kept if ctx.has_more else None, None, None, None
        native, width = native_for(x), x.shape[-1]
        if native is not None:
            rows, grad = as_rows(x), grad.contiguous()
            dx, dweight = torch.empty(x.shape, dtype=x.dtype), torch.empty(width)
            kept = None if kept is None else kept.contiguous()
            held = weight.to(x.dtype).float()  # rounded as a copy of the model in this dtype is
            native("norm_backward", grad, kept, rows, rows.stride(0), held, inverse, len(rows), width, dx, dweight)
        else:
            normed = (x * inverse).to(x.dtype)
            flat, gains = (grad * normed).flatten(0, -2), weight.to(x.dtype)
            mean = torch.mv(flat, gains).div_(width).view(inverse.shape)
            dx = torch.addcmul(grad * gains, normed, mean, value=-1).mul_(inverse.to(x.dtype))
            dx, dweight = dx if kept is None else dx.add_(kept), flat.sum(0)
        return dx, dx if ctx.has_more else None, dweight.to(weight.dtype), None, None
