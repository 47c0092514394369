"""GPTQ: weights rounded column by column, each column's error made good by those still to come (arXiv 2210.17323).

    gram_DD += x_ND.T @ x_ND                                       # over the calibration's inputs of the matrix
    numbers_FD, scales_FG = gptq(weight_FD, gram_DD, bits=4, group=32)

Shape suffixes: N rows of inputs, F output width, D input width, G groups of a row, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slingshot.quantization.integers import best_scales, largest

DAMPING = 0.01  # of the mean diagonal, added to it: the paper's value (section 3.3, step 3)
BLOCK = 128  # columns whose errors reach the others together


def gptq(weight_FD: Tensor, gram_DD: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Numbers (int8) and scales for which ||(W - W') X|| is small, where `gram_DD` = X X^T (the paper's algorithm 1).

    A group's scales are chosen when its first column is reached, from the weights as they then are, errors weighed by
    the inputs' squares. Columns whose inputs were always 0 are rounded to nearest.
    """
    weight_FD, unit = weight_FD.float().clone(), gram_DD.diagonal().double().mean()
    gram_DD = gram_DD.float() / torch.where(unit > 0, unit, 1.0)  # inputs that differ by much from 1 make no difference
    diagonal_D = gram_DD.diagonal()
    importance_D = diagonal_D.clone()
    dead_D = diagonal_D == 0
    diagonal_D[dead_D] = 1.0
    diagonal_D += DAMPING * diagonal_D.mean()
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(gram_DD))
    root_DD = torch.linalg.cholesky(inverse_DD, upper=True)
    importance_D = importance_D + DAMPING * importance_D.mean() + torch.finfo(torch.float32).tiny
    numbers_FD = torch.empty_like(weight_FD, dtype=torch.int8)
    scales = []
    block = max(group, BLOCK // group * group)
    for start in range(0, weight_FD.shape[1], block):
        stop = min(start + block, weight_FD.shape[1])
        errors_FB = torch.zeros_like(weight_FD[:, start:stop])
        for column in range(start, stop):
            if column % group == 0:
                own = slice(column, column + group)
                scales.append(best_scales(weight_FD[:, own], bits, group, importance_D[own])[:, 0])
            number_F = (weight_FD[:, column] / scales[-1]).round_().clamp_(-largest(bits) - 1, largest(bits))
            numbers_FD[:, column] = number_F
            error_F = (weight_FD[:, column] - number_F * scales[-1]) / root_DD[column, column]
            weight_FD[:, column:stop] -= error_F[:, None] * root_DD[column, column:stop]
            errors_FB[:, column - start] = error_F
        weight_FD[:, stop:] -= errors_FB @ root_DD[start:stop, stop:]
    return numbers_FD, torch.stack(scales, dim=1)
