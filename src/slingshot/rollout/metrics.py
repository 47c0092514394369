"""Statistics of evaluations: pass@k, maj@k, and 95% intervals.

pass_at_k(16, correct=2, k=8)
maj_at_k(["7", "9", "7", None], [1.0, 0.0, 1.0, 0.0], k=4)      # 1.0
wilson(0.5, 100)                                                # [0.404, 0.596]
difference([1, 0, 1], [1, 0, 0], seed=0)                        # {"full": 0.667, "small": 0.333, "difference": ...}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from math import comb, sqrt
from typing import Any

import numpy as np

_RESAMPLES = 2000


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n samples (arXiv 2107.03374, equation 1)."""
    return 1.0 - comb(n - correct, k) / comb(n, k)


def maj_at_k(answers: Sequence[str | None], accuracy: Sequence[float], k: int) -> float:
    """Accuracy of the answer that most of k samples give (arXiv 2203.11171), the mean over the n // k groups of k.

    What could not be read (None) has no vote; of answers with as many votes the first counts; no vote at all is 0.
    """
    found = []
    for start in range(0, len(answers) - k + 1, k):
        votes = Counter(answer for answer in answers[start : start + k] if answer is not None)
        best = max(votes, key=lambda answer: votes[answer], default=None)
        found.append(0.0 if best is None else accuracy[answers.index(best, start)])
    return float(np.mean(found))


def interval(scores: Sequence[float], samples: int, seed: int) -> list[float]:
    """95% interval of the mean of problems' scores: Wilson's for one sample of each, else a bootstrap over problems.

    Where all problems score alike a bootstrap would claim a width of 0: Wilson's there too.
    """
    if samples == 1 or len(set(scores)) == 1:
        return wilson(float(np.mean(scores)), len(scores))
    draws = np.random.default_rng(seed).integers(0, len(scores), (_RESAMPLES, len(scores)))
    low, high = np.percentile(np.asarray(scores)[draws].mean(1), [2.5, 97.5])
    return [float(low), float(high)]


def wilson(share: float, n: int, z: float = 1.959964) -> list[float]:
    """Wilson's score interval of a share seen in n trials (J. of the American Statistical Association 22, 1927)."""
    centre, spread = share + z * z / (2 * n), z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + side * spread) / (1 + z * z / n) for side in (-1, 1))
    return [max(0.0, low), min(1.0, high)]


def difference(full: Sequence[float], small: Sequence[float], seed: int) -> dict[str, Any]:
    """The means of two models' scores on the same problems, and small - full with its 95% interval over the problems.

    A bootstrap of the pairs; where not one of n problems differs, as wide as Wilson's interval of a share of 0 of n.
    """
    change = np.asarray(small) - np.asarray(full)
    draws = np.random.default_rng(seed).integers(0, len(change), (_RESAMPLES, len(change)))
    low, high = np.percentile(change[draws].mean(1), [2.5, 97.5])
    if not change.any():
        low, high = (side * wilson(0.0, len(change))[1] for side in (-1, 1))
    means = {"full": float(np.mean(full)), "small": float(np.mean(small)), "difference": float(change.mean())}
    return means | {"ci95": [float(low), float(high)], "n": len(change)}
