"""GPTQ: weights rounded column by column, each column's error made good by those still to come (arXiv 2210.17323).

    gram_DD += x_ND.T @ x_ND                                       # over the calibration's inputs of the matrix
    numbers_FD, scales_FG = gptq(weight_FD, gram_DD, IntegerGrid(bits=4, group=32))

Shape suffixes: N rows of inputs, F output width, D input width, G groups of a row, I numbers of a group,
C candidates, B columns of a block.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from slingshot.kernels.calls import native_for
from slingshot.quantization.integers import SHARES, IntegerGrid

DAMPING = 0.01  # of the mean diagonal, added to it: the paper's value (section 3.3, step 3)
BLOCK = 128  # columns whose errors reach the others together
_CHUNK = (1 << 15) - 1  # numbers at a time: they stay in a cache, and torch spreads no fewer than 2^15 over threads


class Grid(Protocol):
    """What numbers there are, and which scales a group may have."""

    @property
    def group(self) -> int:
        """Neighbours of a row that share a scale; 0: the whole row."""

    @property
    def power(self) -> int:
        """The square of an error counts as its weight's magnitude to this power, where inputs are not known."""

    def candidates(self, weight_FGI: Tensor) -> Tensor:
        """Scales [C, F, G] that are tried."""

    def nearest(self, scaled: Tensor) -> Tensor:
        """The nearest numbers to weights that were divided by their scales."""


def best_scales(weight_FD: Tensor, grid: Grid, importance_D: Tensor | None = None) -> Tensor:
    """Of a grid's candidates those of least squared error, the first of equals: scales [F, G], float32.

    importance_D: what the square of an error in each column counts, such as the mean square of its inputs.
    """
    weight_FD = weight_FD.detach().float().contiguous()
    weight_FGI = weight_FD.unflatten(-1, (-1, grid.group or weight_FD.shape[-1]))
    if isinstance(grid, IntegerGrid) and (native := native_for(weight_FD)) is not None:
        scales_FG, shares = weight_FD.new_empty(weight_FGI.shape[:2]), SHARES[grid.bits]
        sizes = *weight_FD.shape, weight_FGI.shape[-1], grid.bits
        importance = None if importance_D is None else importance_D.float().contiguous()
        native("best_scales", weight_FD, importance, grid.power, *sizes, shares, len(shares), scales_FG)
        return scales_FG

    def best_of(rows_FGI: Tensor) -> Tensor:
        importance = rows_FGI.abs() ** grid.power if importance_D is None else importance_D.view(rows_FGI.shape[1:])
        candidates_CFG = grid.candidates(rows_FGI)
        errors_CFG = torch.empty_like(candidates_CFG)
        for inverse_FG, error_FG in zip(candidates_CFG[..., None].reciprocal(), errors_CFG, strict=True):
            scaled_FGI = rows_FGI * inverse_FG
            torch.sum(grid.nearest(scaled_FGI).sub_(scaled_FGI).square_().mul_(importance), -1, out=error_FG)
        errors_CFG *= candidates_CFG.square()
        return candidates_CFG.gather(0, errors_CFG.min(0, keepdim=True).indices)[0]  # argmin takes four times as long

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return torch.cat([*pool.map(best_of, weight_FGI.split(max(1, _CHUNK // weight_FD.shape[-1])))])


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

    With X X^T = L L^T the error is ||(W - W') L||, and column d of that has no error of columns before d in it. So from
    the last column to the first each makes good what those behind it have lost (Babai's nearest plane, which is the
    paper's algorithm without its inverse: arXiv 2507.18553).
    """
    unit = gram_DD.diagonal().double().mean()
    unit = torch.where(unit > 0, unit, 1.0)  # inputs that differ by much from 1 make no difference
    diagonal_D = (gram_DD.diagonal() / unit).float()
    damping = DAMPING * diagonal_D.mean()
    scales_FG = best_scales(weight_FD, grid, diagonal_D + damping + torch.finfo(torch.float32).tiny)
    diagonal_D[diagonal_D == 0] = 1.0
    order_D = diagonal_D.argsort(descending=True, stable=True).flip(0)
    gram_DD = _reordered(gram_DD, order_D).div_(unit).float()
    gram_DD.diagonal().copy_(diagonal_D[order_D] + damping)
    root_DD = torch.linalg.cholesky(gram_DD.mT, out=gram_DD.mT)
    root_DD.div_(root_DD.diagonal().clone())
    group, scales_GF = weight_FD.shape[1] // scales_FG.shape[1], scales_FG.T.contiguous()
    weight_DF = weight_FD.float().index_select(1, order_D).T.contiguous()
    numbers_DF = torch.empty_like(weight_DF)
    errors_DF = torch.empty_like(numbers_DF)
    native = native_for(weight_DF) if isinstance(grid, IntegerGrid) else None
    for stop in range(len(order_D), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        wanted_BF = torch.addmm(weight_DF[start:stop], root_DD[stop:, start:stop].T, errors_DF[stop:])
        if native is not None and isinstance(grid, IntegerGrid):
            factors, block = root_DD[start:, start:], slice(start, stop)
            sizes = stop - start, weight_FD.shape[0], group, grid.bits
            native(
                "fit_block", wanted_BF, weight_DF[block], factors, *factors.stride(), order_D[block], scales_GF, *sizes,
                numbers_DF, errors_DF[block],
            )  # fmt: skip
            continue
        for row in range(stop - 1, start - 1, -1):
            wanted_F, column = wanted_BF[row - start], order_D[row]
            wanted_F += root_DD[row + 1 : stop, row] @ errors_DF[row + 1 : stop]
            scale_F = scales_GF[column // group]
            numbers_DF[column] = grid.nearest(wanted_F / scale_F)
            errors_DF[row] = weight_DF[row] - numbers_DF[column] * scale_F
    return numbers_DF.T.contiguous(), scales_FG


def _reordered(gram_DD: Tensor, order_D: Tensor) -> Tensor:
    """gram[order][:, order], some rows at a time: in a fifth of the time of torch's indexing, and no more memory."""
    found_DD, columns_DD = torch.empty_like(gram_DD), order_D.expand_as(gram_DD)
    for rows_BD, order_B in zip(found_DD.split(BLOCK), order_D.split(BLOCK), strict=True):
        torch.gather(gram_DD.index_select(0, order_B), 1, columns_DD[: len(order_B)], out=rows_BD)
    return found_DD
