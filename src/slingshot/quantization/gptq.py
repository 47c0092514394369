"""GPTQ: weights rounded column by column, each column's error made good by those still to come (arXiv 2210.17323).

    gram_DD += x_ND.T @ x_ND                                       # over the calibration's inputs of the matrix
    numbers_FD, scales_FG = gptq(weight_FD, gram_DD, IntegerGrid(bits=4, group=32))

Shape suffixes: N rows of inputs, F output width, D input width, G groups of a row, I numbers of a group,
C candidates, B columns of a block.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

DAMPING = 0.01  # of the mean diagonal, added to it: the paper's value (section 3.3, step 3)
BLOCK = 128  # columns whose errors reach the others together
_CHUNK = 1 << 17  # numbers at a time, that stay in a core's cache


class Grid(Protocol):
    """What numbers there are, and which scales a group may have."""

    @property
    def group(self) -> int:
        """Neighbours of a row that share a scale; 0: the whole row."""

    def candidates(self, weight_FGI: Tensor) -> Tensor:
        """Scales [C, F, G] that are tried."""

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest numbers to weights that were divided by their scales."""


def best_scales(weight_FD: Tensor, grid: Grid, importance_D: Tensor | None = None) -> Tensor:
    """Of a grid's candidates those of least squared error, the first of equals: scales [F, G], float32.

    importance_D: what the square of an error in each column counts, such as the mean square of its inputs.
    """
    weight_FGI = weight_FD.float().unflatten(-1, (-1, grid.group or weight_FD.shape[-1]))
    importance_D = torch.ones(weight_FD.shape[-1]) if importance_D is None else importance_D
    importance_GI = importance_D.view(weight_FGI.shape[1:])
    best = []
    for rows_FGI in weight_FGI.split(max(1, _CHUNK // weight_FD.shape[-1])):
        candidates_CFG = grid.candidates(rows_FGI)
        errors_CFG = torch.empty_like(candidates_CFG)
        for scales_FG, error_FG in zip(candidates_CFG[..., None], errors_CFG, strict=True):
            errors_FGI = grid.nearest(rows_FGI / scales_FG).mul_(scales_FG).sub_(rows_FGI).square_()
            torch.sum(errors_FGI.mul_(importance_GI), -1, out=error_FG)
        best.append(candidates_CFG.gather(0, errors_CFG.argmin(0, keepdim=True))[0])
    return torch.cat(best)


def rounded(weight_FD: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Each weight's nearest number, and the scales."""
    scales_FG = best_scales(weight_FD, grid)
    weight_FGI = weight_FD.float().unflatten(-1, (scales_FG.shape[-1], -1))
    return grid.nearest(weight_FGI / scales_FG[..., None]).flatten(-2), scales_FG


def gptq(weight_FD: Tensor, gram_DD: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Numbers and scales for which ||(W - W') X|| is small, where `gram_DD` = X X^T (the paper's algorithm 1).

    Scales are chosen beforehand, errors weighed by the inputs' squares. Columns are then rounded from the one with the
    largest inputs to the one with the smallest, so that what counts most is rounded while all others can still make it
    good; groups stay those of neighbours. Columns whose inputs were always 0 are rounded to nearest.
    """
    unit = gram_DD.diagonal().double().mean()
    gram_DD = gram_DD.float() / torch.where(unit > 0, unit, 1.0)  # inputs that differ by much from 1 make no difference
    diagonal_D = gram_DD.diagonal()
    importance_D = diagonal_D + DAMPING * diagonal_D.mean() + torch.finfo(torch.float32).tiny
    scales_FG = best_scales(weight_FD, grid, importance_D)
    diagonal_D[diagonal_D == 0] = 1.0
    diagonal_D += DAMPING * diagonal_D.mean()
    order_D = diagonal_D.argsort(descending=True, stable=True)
    scales_FD = scales_FG.repeat_interleave(weight_FD.shape[1] // scales_FG.shape[1], dim=1)[:, order_D]
    left_FD = weight_FD.float()[:, order_D]
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(gram_DD[order_D][:, order_D]))
    root_DD = torch.linalg.cholesky(inverse_DD, upper=True)
    numbers_FD = torch.empty_like(left_FD)
    for start in range(0, left_FD.shape[1], BLOCK):
        stop = min(start + BLOCK, left_FD.shape[1])
        errors_FB = torch.empty_like(left_FD[:, start:stop])
        for column in range(start, stop):
            scale_F = scales_FD[:, column]
            number_F = grid.nearest(left_FD[:, column] / scale_F)
            numbers_FD[:, order_D[column]] = number_F
            error_F = (left_FD[:, column] - number_F * scale_F) / root_DD[column, column]
            left_FD[:, column:stop] -= error_F[:, None] * root_DD[column, column:stop]
            errors_FB[:, column - start] = error_F
        left_FD[:, stop:] -= errors_FB @ root_DD[start:stop, stop:]
    return numbers_FD, scales_FG
