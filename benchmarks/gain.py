"""How much better is one evaluation than another, problem by problem? Paired bootstrap over the problems both have.

.venv/bin/python benchmarks/gain.py runs/smollm2/evaluations/sft runs/smollm2/evaluations/rl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

RESAMPLES = 10_000


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: python benchmarks/gain.py EVALUATION_BEFORE EVALUATION_AFTER")
    before, after = (
        json.loads((Path(folder) / "evaluation.json").read_text(encoding="utf-8")) for folder in sys.argv[1:]
    )
    for task, scores in after["scores"].items():
        earlier = before["scores"].get(task)
        if earlier is None or len(earlier) != len(scores):
            sys.exit(
                f"{task}: the evaluations hold different problems; run both with the same tasks, problems and seed"
            )
        differences = np.asarray(scores) - np.asarray(earlier)
        draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
        low, high = np.percentile(differences[draws].mean(1), [2.5, 97.5])
        means = f"{np.mean(earlier):.1%} -> {np.mean(scores):.1%}"
        points = f"{100 * differences.mean():+.1f} points (95% {100 * low:+.1f} to {100 * high:+.1f}"
        print(f"{task}: {means}, {points}, {len(scores)} problems, paired)")


if __name__ == "__main__":
    main()
