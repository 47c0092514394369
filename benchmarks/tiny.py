"""What does the recipe tiny teach? The table and the claims over several seeds, from finished runs.

    for seed in 0 1 2; do .venv/bin/slingshot run tiny --seed $seed evaluation.samples=8 --out runs/tiny-$seed; done
    .venv/bin/python benchmarks/tiny.py runs/tiny-0 runs/tiny-1 runs/tiny-2

Prints Markdown and keeps benchmarks/tiny.json. Intervals are 95% t intervals of the mean over seeds, paired by seed.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

TASK = "arithmetic"
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # Student's t, by degrees of freedom
KEYS = ("pass@1", "pass@8", "mean_tokens", "format", "language")
CLAIMS = {
    "zero - base": ("zero", "base"),
    "zero_random - base": ("zero_random", "base"),
    "rl_final - zero": ("rl_final", "zero"),
    "distill - student": ("distill", "student"),
    "distill - student_rl (equal student FLOPs)": ("distill", "student_rl"),
    "distill - student_rl_3x (3 times the FLOPs)": ("distill", "student_rl_3x"),
}


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95% t interval."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, float("nan"), float("nan")
    half = T_975[len(values) - 1] * statistics.stdev(values) / len(values) ** 0.5
    return mean, mean - half, mean + half


def read(run: Path) -> dict[str, Any]:
    """The stages of a run by name; those without an evaluation have none."""
    return {stage["name"]: stage for stage in json.loads((run / "report.json").read_text(encoding="utf-8"))["stages"]}


def main() -> None:
    runs = [read(Path(argument)) for argument in sys.argv[1:]]
    if not runs:
        sys.exit("usage: python benchmarks/tiny.py RUN [RUN ...]")
    result: dict[str, Any] = {"runs": sys.argv[1:], "stages": {}, "claims": {}}
    columns = f"{TASK} pass@1 by seed | mean (95%) | pass@8 | tokens | format | language | countdown pass@1"
    print(f"| stage | {columns} | FLOPs | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in runs[0]:
        stages = [run[name] for run in runs if run.get(name, {}).get("receipt")]
        flops = statistics.fmean(stage["receipt"]["flops"] for stage in stages) if stages else 0.0
        seconds = [stage["receipt"]["seconds"] for stage in stages]
        took = f"{min(seconds):.0f} to {max(seconds):.0f}" if stages else ""
        scored = [stage["eval"][TASK] for stage in stages if TASK in (stage.get("eval") or {})]
        if not scored:
            print(f"| {name} | | | | | | | | {flops:.2e} | {took} |")
            continue
        values = {key: [score[key] for score in scored if score[key] is not None] for key in KEYS}
        mean, low, high = interval(values["pass@1"])
        countdown = [stage["eval"]["countdown"]["pass@1"] for stage in stages]
        result["stages"][name] = values | {"countdown pass@1": countdown, "flops": flops, "seconds": seconds}
        by_seed = ", ".join(f"{value:.1%}" for value in values["pass@1"])
        means = {key: statistics.fmean(values[key]) if values[key] else float("nan") for key in KEYS}
        shares = f"{means['format']:.1%} | {means['language']:.1%} | {statistics.fmean(countdown):.1%}"
        score = f"{by_seed} | {mean:.1%} ({low:.1%} to {high:.1%}) | {means['pass@8']:.1%} | {means['mean_tokens']:.1f}"
        print(f"| {name} | {score} | {shares} | {flops:.2e} | {took} |")
    print("\n| difference in points of pass@1 | by seed | mean (95%) |\n|---|---|---|")
    for claim, (better, worse) in CLAIMS.items():
        pairs = [
            (run[better]["eval"], run[worse]["eval"])
            for run in runs
            if run.get(better, {}).get("eval") and run.get(worse, {}).get("eval")
        ]
        if pairs:
            differences = [100 * (a[TASK]["pass@1"] - b[TASK]["pass@1"]) for a, b in pairs]
            mean, low, high = interval(differences)
            result["claims"][claim] = differences
            by_seed = ", ".join(f"{value:+.1f}" for value in differences)
            print(f"| {claim} | {by_seed} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) |")
    growth = [
        run["zero"]["eval"][TASK]["mean_tokens"] / run["base"]["eval"][TASK]["mean_tokens"]
        for run in runs
        if run.get("zero", {}).get("eval")
    ]
    result["claims"]["response length, zero / base"] = growth
    print(f"\nResponses of zero are {', '.join(f'{value:.2f}' for value in growth)} times as long as those of base.")
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
