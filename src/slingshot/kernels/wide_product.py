"""A product whose factors are narrow and whose result is float32: the head's logits in bfloat16 training.

Suffixes: N rows, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slingshot.kernels.native import NativeKernels, native_kernels


def wide_product_reference(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """y_NV = x W^T in float32, of W's numbers in x's dtype."""
    return F.linear(x_ND.float(), weight_VD.to(x_ND.dtype).float())


def wide_product(x_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """`wide_product_reference`, for bfloat16 by the processor's own products of it where there are any.

    Backward the gradient of y has x's dtype, as that of any other product in a training of that dtype.
    """
    kernels = native_kernels() if x_ND.device.type == "cpu" else None
    fast = x_ND.is_cuda or (kernels is not None and kernels.level in ("avx512bf16", "amx"))
    if not fast or x_ND.dtype != torch.bfloat16:
        return wide_product_reference(x_ND, weight_VD)
    y_NV: Tensor = _WideProduct.apply(x_ND, weight_VD, kernels)
    return y_NV


class _WideProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor, kernels: NativeKernels | None) -> Tensor:
        narrow_VD = weight_VD.to(x_ND.dtype)
        ctx.save_for_backward(x_ND, narrow_VD)
        ctx.weight_dtype = weight_VD.dtype
        if kernels is None:
            return torch.mm(x_ND, narrow_VD.T, out_dtype=torch.float32)
        packed = kernels.pack(narrow_VD, x_ND.dtype)
        return kernels.matmul(x_ND, packed, len(narrow_VD), torch.get_num_threads())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_ND, weight_VD = ctx.saved_tensors
        grad_NV = grad_NV.to(x_ND.dtype)
        dx_ND = grad_NV @ weight_VD if ctx.needs_input_grad[0] else None
        dw_VD = (grad_NV.T @ x_ND).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return dx_ND, dw_VD, None
