"""Routed experts with SwiGLU: every token's rows through the experts it chose and back, in one call either way.

Suffixes: N tokens, D model width, F expert width, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.kernels.calls import NativeCall, native_for
from slingshot.kernels.swiglu import swiglu

ExpertsKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # as `experts_reference`
FEW = 256  # tokens below which packing the weights takes longer than the products


def experts_reference(
    x_ND: Tensor, experts_Nk: Tensor, gates_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """Sum over a token's experts of gate value times down(silu(gate x) * up x): y_ND."""
    gate_up_Nk2F = torch.einsum("nd,nkxfd->nkxf", x_ND, gate_up_E2FD.to(x_ND.dtype)[experts_Nk])
    hidden_NkF = F.silu(gate_up_Nk2F[..., 0, :]) * gate_up_Nk2F[..., 1, :]
    y_NkD = torch.einsum("nkf,nkdf->nkd", hidden_NkF, down_EDF.to(x_ND.dtype)[experts_Nk])
    return (y_NkD * gates_Nk.to(x_ND.dtype)[..., None]).sum(1)


def experts_kernel(x_ND: Tensor, hidden: int) -> ExpertsKernel | None:
    """What takes these rows through experts of `hidden` numbers faster than row counts on the host, where it pays."""
    if x_ND.is_cuda:
        return grouped_experts if not torch.is_grad_enabled() and _has_grouped_products(x_ND, hidden) else None
    native = native_for(x_ND) if torch.is_grad_enabled() or len(x_ND) >= FEW else None
    return None if native is None else partial(routed_experts, native)


def _has_grouped_products(x_ND: Tensor, hidden: int) -> bool:
    """Where torch multiplies groups in one kernel; elsewhere it asks the device for their sizes, and waits."""
    built = torch.version.hip is None and torch.cuda.get_device_capability(x_ND.device)[0] in (9, 10)
    aligned = x_ND.shape[1] % 8 == 0 and hidden % 8 == 0  # rows of 16 bits begin at multiples of 16 bytes
    return built and aligned and x_ND.dtype == torch.bfloat16


def grouped_experts(
    x_ND: Tensor, experts_Nk: Tensor, gates_Nk: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
) -> Tensor:
    """`experts_reference` without gradients: rows are sorted by expert on the device, and nobody waits for it."""
    (count, k), n_experts = experts_Nk.shape, len(down_EDF)
    expert_A, order_A = experts_Nk.flatten().sort(stable=True)
    ends_E = torch.searchsorted(expert_A, torch.arange(n_experts, device=x_ND.device), right=True, out_int32=True)
    gate_up_EFD, down_EDF = gate_up_E2FD.to(x_ND.dtype).flatten(1, 2), down_EDF.to(x_ND.dtype)
    hidden_AF = swiglu(F.grouped_mm(x_ND[order_A // k], gate_up_EFD.mT, offs=ends_E))
    rows_AD = F.grouped_mm(hidden_AF, down_EDF.mT, offs=ends_E)
    y_AD = torch.empty_like(rows_AD).index_copy_(0, order_A, rows_AD)
    return (y_AD.view(count, k, -1) * gates_Nk.to(x_ND.dtype)[..., None]).sum(1)


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
