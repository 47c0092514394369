"""SwiGLU's product, silu(gate) * up (arXiv 2002.05202), with its gradient written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.kernels.calls import NativeCall, native_for


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """silu of the first half of the last dimension times the second: [..., 2 F] -> [..., F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """`swiglu_reference`, read and written once in either direction where native kernels are."""
    native = native_for(gate_up)
    y: Tensor = swiglu_reference(gate_up) if native is None else _SwiGLU.apply(gate_up, native)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, native: NativeCall) -> Tensor:
        ctx.native = native
        gate_up = gate_up.contiguous()
        width = gate_up.shape[-1] // 2
        y = gate_up.new_empty(*gate_up.shape[:-1], width)
        ctx.save_for_backward(gate_up)
        if y.numel():
            rows = y.numel() // width
            native("swiglu_forward", gate_up, gate_up[..., width:], 2 * width, rows, width, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        grad, width = grads[0].contiguous(), gate_up.shape[-1] // 2
        change = torch.empty_like(gate_up)
        if grad.numel():
            halves, rows = (gate_up, gate_up[..., width:]), grad.numel() // width
            ctx.native("swiglu_backward", grad, *halves, 2 * width, rows, width, change, change[..., width:])
        return change, None
