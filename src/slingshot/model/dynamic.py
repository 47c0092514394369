"""Matrices and activations of 8 bits, multiplied as whole numbers: y = s_x s_w (q_x q_w).

    multiply_whole_numbers(model, load_grid(folder))     # where the grid has rows for groups
    dynamic_grid(model)                                  # that grid again, or None

Weights have a scale for each output; every row of activations gets one as it comes, largest magnitude / 127, as in
vLLM. Sums of products are exact in int32 (for rows of less than 2^17 numbers), so that results do not depend on order.

Shape suffixes: X leading dimensions, N rows, D input width, F output width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slingshot.model.linear import GroupedLinear, Linear
from slingshot.quantization.integers import WeightGrid


class DynamicLinear(Linear):
    """A matrix of whole numbers, int8 [F, D], with scales [F, 1]; without gradients."""

    def __init__(self, base: Linear, scales_F1: Tensor) -> None:
        nn.Module.__init__(self)
        self.weight, self.bias = _numbers(base.weight, scales_F1), base.bias
        self.register_buffer("scales", scales_F1.to(base.weight.device), persistent=False)
        self.scales: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Number times scale."""
        return (self.weight * self.scales).to(dtype)

    def product(self, x_XD: Tensor, detach: bool = False) -> Tensor:
        y_XF = whole_product(x_XD.flatten(0, -2), self.weight, self.scales).unflatten(0, x_XD.shape[:-1])
        return y_XF if self.bias is None else y_XF + self.bias.to(x_XD.dtype)


class DynamicGroupedLinear(GroupedLinear):
    """Expert matrices of whole numbers, int8 [E, *out, D], with scales [E, *out, 1]."""

    def __init__(self, base: GroupedLinear, scales: Tensor) -> None:
        nn.Module.__init__(self)
        self.weight = _numbers(base.weight, scales)
        self.register_buffer("scales", scales.to(base.weight.device), persistent=False)
        self.scales: Tensor

    def matrix(self, dtype: torch.dtype) -> Tensor:
        """Number times scale."""
        return (self.weight * self.scales).to(dtype)

    def forward(self, x_ND: Tensor, counts: list[int]) -> Tensor:
        weights = zip(self.weight.flatten(1, -2), self.scales.flatten(1, -2), strict=True)
        return torch.cat([whole_product(x, *each) for x, each in zip(x_ND.split(counts), weights, strict=True)])


def _numbers(weight: Tensor, scales: Tensor) -> nn.Parameter:
    """What was multiplied by the scales: rounded back, since weights may have been rounded to 16 bits since."""
    numbers = (weight.float() / scales.to(weight.device)).round_().to(torch.int8)
    return nn.Parameter(numbers, requires_grad=False)


def whole_product(x_ND: Tensor, weight_FD: Tensor, scales_F1: Tensor) -> Tensor:
    """x W^T in x's dtype, x rounded to 8 bits by rows. NaN where a row holds what is no number."""
    largest_N1 = x_ND.abs().amax(-1, keepdim=True).float() if x_ND.numel() else x_ND.new_zeros(len(x_ND), 1).float()
    scale_N1 = largest_N1 / 127
    numbers_ND = (x_ND.float() / torch.where(scale_N1 > 0, scale_N1, 1.0)).round_().nan_to_num_().to(torch.int8)
    sums_NF = torch._int_mm(numbers_ND, weight_FD.mT) if len(x_ND) else x_ND.new_zeros(0, len(weight_FD))
    return (sums_NF.float() * scale_N1 * scales_F1.mT).to(x_ND.dtype)


def dynamic_grid(model: nn.Module) -> WeightGrid | None:
    """Of all matrices of whole numbers that a model multiplies so; None where it does not."""
    scales = {
        f"{name}.weight": module.scales
        for name, module in model.named_modules()
        if isinstance(module, DynamicLinear | DynamicGroupedLinear)
    }
    return WeightGrid(dict.fromkeys(scales, 8), 0, scales) if scales else None


def multiply_whole_numbers(model: nn.Module, grid: WeightGrid) -> None:
    """Put matrices of whole numbers in place of those that the grid has scales of."""
    for name, scales in grid.scales.items():
        module = model.get_submodule(name.removesuffix(".weight"))
        if isinstance(module, GroupedLinear):
            model.set_submodule(name.removesuffix(".weight"), DynamicGroupedLinear(module, scales))
        elif isinstance(module, Linear):
            model.set_submodule(name.removesuffix(".weight"), DynamicLinear(module, scales))
