"""Routed experts with SwiGLU: every token's rows through the experts it chose and back, in one call either way.

Suffixes: N tokens, D model width, F expert width, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.kernels.calls import NativeCall, native_for

FEW = 256  # tokens below which packing the weights takes longer than the products


def experts_reference(
    x_ND: Tensor, experts_Nk: Tensor, gates_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's experts of gate value times down(silu(gate x) * up x): y_ND."""
    gate_up_Nk2F = torch.einsum("nd,nkxfd->nkxf", x_ND, gate_up_E2FD.to(x_ND.dtype)[experts_Nk])
    hidden_NkF = F.silu(gate_up_Nk2F[..., 0, :]) * gate_up_Nk2F[..., 1, :]
    y_NkD = torch.einsum("nkf,nkdf->nkd", hidden_NkF, down_EDF.to(x_ND.dtype)[experts_Nk])
    return (y_NkD * gates_Nk.to(x_ND.dtype)[..., None]).sum(1)


def experts_kernel(x_ND: Tensor) -> NativeCall | None:
    """The native kernel for these rows, where there is one and it pays."""
    return native_for(x_ND) if torch.is_grad_enabled() or len(x_ND) >= FEW else None


def routed_experts(
    native: NativeCall, x_ND: Tensor, experts_Nk: Tensor, gates_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`experts_reference`; weights in x's dtype or float32 masters, gates and all gradients of weights in float32."""
    y_ND: Tensor = _RoutedExperts.apply(x_ND, gates_Nk, gate_up_E2FD, down_EDF, experts_Nk, native)
    return y_ND


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, gates_Nk: Tensor, gate_up: Tensor, down: Tensor, experts_Nk: Tensor, native: NativeCall
    ) -> Tensor:
        (tokens, k), (n_experts, _, hidden, width) = experts_Nk.shape, gate_up.shape
        x_ND, gates_Nk, gate_up, down = (t.contiguous() for t in (x_ND, gates_Nk.float(), gate_up, down))
        order_A, starts = (torch.empty(size, dtype=torch.int32) for size in (tokens * k, n_experts + 1))
        native("experts_order", experts_Nk.contiguous(), tokens * k, n_experts, order_A, starts)
        y_ND, rows_AD = torch.empty_like(x_ND), x_ND.new_empty(tokens * k, width)
        ctx.shape = int(gate_up.dtype == torch.bfloat16), tokens, k, n_experts, width, hidden
        given = x_ND, order_A, starts, gate_up, down, gates_Nk
        native("experts_forward", *ctx.shape, *given, None, rows_AD, y_ND)
        ctx.save_for_backward(*given)
        ctx.native = native
        return y_ND

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, order_A, _, gate_up, down, gates_Nk = given = ctx.saved_tensors
        dx_ND, dgates_Nk = torch.empty_like(x_ND), torch.empty_like(gates_Nk)
        rows_AD = x_ND.new_empty(len(order_A), x_ND.shape[1])
        dgate_up, ddown = (torch.zeros(weight.shape) for weight in (gate_up, down))
        results = rows_AD, dx_ND, dgates_Nk, dgate_up, ddown
        ctx.native("experts_backward", *ctx.shape, grads[0].contiguous(), *given, *results)
        return dx_ND, dgates_Nk, dgate_up.to(gate_up.dtype), ddown.to(down.dtype), None, None
