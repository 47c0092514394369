"""Is reinforcement of an adapter as good as that of the whole model, and what does either take?

    .venv/bin/slingshot run functions --until smollm2 --out runs/functions
    .venv/bin/python benchmarks/lora.py runs/functions/smollm2 --out runs/lora    # Markdown, benchmarks/lora.json

The recipe functions' stages: SmolLM2-135M-Instruct reads a few worked functions; from there, with the same problems in
each seed, its reinforcement of an adapter of rank 16, and of the whole model at a tenth of the rate. Scored on held-out
problems by their hidden tests at temperature 1. Intervals are 95% t intervals over seeds of reinforcement, paired.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from losses import keep, keys_of, score, stage
from tiny import interval

from slingshot.cost.receipt import Receipt
from slingshot.stages import rl, sft

KEYS = keys_of("functions")
ADAPTER, WHOLE = "adapter", "whole model"
KINDS: dict[str, dict[str, Any]] = {ADAPTER: {}, WHOLE: {"lora": None, "optimizer": {"lr": 2e-5}}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct, converted")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3, help="of reinforcement")
    parser.add_argument("--problems", type=int, default=150, help="held-out ones")
    parser.add_argument("--at-once", type=int, default=1, help="runs")
    given = parser.parse_args()
    begun = stage(sft, sft.SFTConfig, given.out / "sft", KEYS["sft"] | {"model": str(given.model)})
    runs: dict[str, list[dict[str, float]]] = {}
    with ProcessPoolExecutor(given.at_once, get_context("spawn"), max_tasks_per_child=1) as pool:  # each its own peak
        asked = [
            (kind, pool.submit(reinforced, begun, given.out / f"seed-{seed}", kind, seed, given.problems))
            for seed in range(given.seeds)
            for kind in KINDS
        ]
        for kind, row in asked:
            runs.setdefault(kind, []).append(row.result())
    runs["before"] = [measured(begun, given.problems)] * given.seeds
    table(runs)
    keep(__file__, given, runs=runs)


def reinforced(begun: Path, folder: Path, kind: str, seed: int, problems: int) -> dict[str, float]:
    """What reinforcement of one kind makes of it."""
    asked = KEYS["rl"] | {"model": str(begun), "seed": seed} | KINDS[kind]
    return measured(stage(rl, rl.RLConfig, folder / kind.replace(" ", "-"), asked), problems)


def measured(model: Path, problems: int) -> dict[str, float]:
    """What a model solves, in percent, and what its last stage took."""
    place = model.with_name(f"{model.name}-evaluation")
    [found] = score(model, place, problems, KEYS["rl"]["tasks"], KEYS["rl"]["sampling"]["max_tokens"])
    receipt = Receipt.read(model)
    return {
        "pass@1": 100 * found["pass@1"], "pass@4": 100 * found["at_k"]["pass@4"]["mean"],
        "GiB": (receipt.peak_host_memory_bytes or 0) / 2**30, "TFLOP": receipt.flops / 1e12, "seconds": receipt.seconds,
    }  # fmt: skip


def table(runs: dict[str, list[dict[str, float]]]) -> None:
    """By model what its seeds solve and took, and the differences."""
    print("| | pass@1 by seed | pass@4 | gain in points | above the whole model | GiB | TFLOP | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for kind in ("before", *KINDS):
        beyond = ["", ""]
        for place, other in enumerate(("before", WHOLE)):
            if kind not in ("before", other):
                pairs = zip(runs[kind], runs[other], strict=True)
                mean, low, high = interval([its["pass@1"] - theirs["pass@1"] for its, theirs in pairs])
                beyond[place] = f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        solved = [", ".join(f"{row[key]:.1f}" for row in runs[kind]) for key in ("pass@1", "pass@4")]
        spent = [", ".join(f"{row[key]:.3g}" for row in runs[kind]) for key in ("GiB", "TFLOP", "seconds")]
        print(f"| {' | '.join([kind, *solved, *beyond, *spent])} |")


if __name__ == "__main__":
    main()
