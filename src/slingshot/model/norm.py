"""RMSNorm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slingshot.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)
