"""The fit of reward against compute by which ScaleRL extrapolates runs (arXiv 2510.13786, equation 1).

    fit = fit_sigmoid(seconds, rewards)          # None where the curve does not determine one
    fit.at(seconds)                              # the fit's rewards
    fit.ceiling, fit.ceiling_se                  # A, and its standard error

Shape suffixes: N points, P the four numbers fitted, G points of a grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FEWEST = 16  # points, four a fitted number
ROUNDS = 100  # of Gauss and Newton
GENTLEST, STEEPEST = 0.3, 12.0


@dataclass(frozen=True)
class SigmoidFit:
    """R(C) = start + (ceiling - start) / (1 + (middle / C)^steepness), with standard errors of the last three.

    `middle_se` is a share of the middle: the error of its logarithm.
    """

    start: float
    ceiling: float
    middle: float
    steepness: float
    ceiling_se: float
    middle_se: float
    steepness_se: float

    def at(self, compute: Sequence[float]) -> list[float]:
        numbers_P = np.array([self.start, self.ceiling, np.log(self.middle), self.steepness])
        return _curve(numbers_P, np.log(np.asarray(compute, dtype=float)))[0].tolist()

    @property
    def determined(self) -> bool:
        """Whether the curve says where it ends: its middle was passed, each number is larger than twice its error."""
        gain = abs(self.ceiling - self.start)
        return 2 * self.ceiling_se < gain and 2 * self.steepness_se < self.steepness and self.middle_se < 0.5


def fit_sigmoid(compute: Sequence[float], rewards: Sequence[float]) -> SigmoidFit | None:
    """Least squares over all four numbers; None where there are fewer than 16 points or no fit is `determined`.

    For a middle and a steepness the best start and ceiling are a linear fit, so that a grid over the former finds where
    to begin; Gauss and Newton, damped, go on from there. Errors are those of the linearised fit with equal noise.
    """
    at = [(c, r) for c, r in zip(compute, rewards, strict=True) if c > 0]
    if len(at) < FEWEST:
        return None
    log_N, reward_N = np.log([c for c, _ in at]), np.array([r for _, r in at])
    numbers_P = _refined(_begun(log_N, reward_N), log_N, reward_N)
    values_N, slopes_NP = _curve(numbers_P, log_N)
    noise = float(np.square(reward_N - values_N).sum()) / (len(at) - 4)
    scale_P = np.linalg.norm(slopes_NP, axis=0) + 1e-300
    unit_NP = slopes_NP / scale_P
    if not np.isfinite(unit_NP).all() or np.linalg.cond(unit_NP) > 1e6:
        return None
    errors_P = np.sqrt(noise * np.diag(np.linalg.inv(unit_NP.T @ unit_NP))) / scale_P
    start, ceiling, log_middle, steepness = map(float, numbers_P)
    middle = float(np.exp(log_middle))
    fit = SigmoidFit(start, ceiling, middle, steepness, *map(float, errors_P[1:]))
    passed = log_N[0] <= log_middle <= log_N[-1]
    return fit if passed and fit.determined else None


def _curve(numbers_P: Floats, log_N: Floats) -> tuple[Floats, Floats]:
    """Values [N] of start, ceiling, log middle and steepness at these logarithms of compute, and derivatives [N, 4]."""
    start, ceiling, log_middle, steepness = numbers_P
    away_N = log_N - log_middle
    risen_N = 1 / (1 + np.exp(np.clip(-steepness * away_N, -50, 50)))
    slope_N = (ceiling - start) * risen_N * (1 - risen_N)
    return start + (ceiling - start) * risen_N, np.stack(
        (1 - risen_N, risen_N, -steepness * slope_N, away_N * slope_N), axis=1
    )


def _begun(log_N: Floats, reward_N: Floats) -> Floats:
    """The best of a grid."""
    best, found = np.inf, np.zeros(4)
    for log_middle in np.linspace(log_N[0], log_N[-1], 24):
        for steepness in np.geomspace(GENTLEST, STEEPEST, 16):
            shape_NP = _curve(np.array([0.0, 1.0, log_middle, steepness]), log_N)[1][:, :2]
            ends, _, _, _ = np.linalg.lstsq(shape_NP, reward_N, rcond=None)
            off = float(np.square(shape_NP @ ends - reward_N).sum())
            if off < best:
                best, found = off, np.array([*ends, log_middle, steepness])
    return found


def _refined(numbers_P: Floats, log_N: Floats, reward_N: Floats) -> Floats:
    """Levenberg and Marquardt's damping: a step that does not improve is taken smaller."""
    damping = 1e-3
    values_N, slopes_NP = _curve(numbers_P, log_N)
    off = float(np.square(reward_N - values_N).sum())
    for _ in range(ROUNDS):
        normal_PP = slopes_NP.T @ slopes_NP
        normal_PP += damping * np.diag(np.diag(normal_PP) + 1e-12)
        step_P, _, _, _ = np.linalg.lstsq(normal_PP, slopes_NP.T @ (reward_N - values_N), rcond=None)
        tried_P = numbers_P + step_P
        tried_P[3] = np.clip(tried_P[3], GENTLEST, STEEPEST)
        tried = _curve(tried_P, log_N)
        its = float(np.square(reward_N - tried[0]).sum())
        if its < off:
            numbers_P, (values_N, slopes_NP), off, damping = tried_P, tried, its, damping / 3
        else:
            damping *= 4
    return numbers_P
