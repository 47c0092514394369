"""When does the recipe calculator call? Accuracy and calls by kind of problem over several seeds, from finished runs.

    for seed in 0 1 2; do .venv/bin/slingshot run calculator --seed $seed --out runs/calculator-$seed; done
    .venv/bin/python benchmarks/calculator.py runs/calculator-0 runs/calculator-1 runs/calculator-2

Prints Markdown and keeps benchmarks/calculator.json. Intervals are 95% t intervals of the mean over seeds, paired by
seed. "all" is the mean of sums and products.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tiny import interval, read

KEYS = {"pass@1": ".1%", "calls": ".2f"}
DIFFERENCES = (("pass@1", "priced", "without"), ("pass@1", "priced", "always"), ("calls", "priced", "always"))


def kinds(run: Path, stage: str) -> dict[str, dict[str, float]]:
    """pass@1 and calls of each kind of problem; a model that is told of no tool calls none."""
    found = json.loads((run / "evaluations" / stage / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    rows: dict[str, Any] = {"sums": found["arithmetic"], "products": found["multiplication"]}
    rows |= {f"sums of {terms}": row for terms, row in found["arithmetic"]["by_level"].items()}
    told = {name: {key: row.get(key, 0.0) for key in KEYS} for name, row in rows.items()}
    return told | {"all": {key: (told["sums"][key] + told["products"][key]) / 2 for key in KEYS}}


def cell(values: list[float], form: str) -> str:
    mean, low, high = interval(values)
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def main() -> None:
    runs = [Path(argument) for argument in sys.argv[1:]]
    if not runs:
        sys.exit("usage: python benchmarks/calculator.py RUN [RUN ...]")
    reports = [read(run) for run in runs]
    found = {stage: [kinds(run, stage) for run in runs] for stage in reports[0]}
    names = list(next(iter(found.values()))[0])
    for key, form in KEYS.items():
        print(f"\n| {key} | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
        for stage, each in found.items():
            print(f"| {stage} | {' | '.join(cell([row[name][key] for row in each], form) for name in names)} |")
    print("\n| difference over all | by seed | mean (95%) |\n|---|---|---|")
    for key, one, other in DIFFERENCES:
        values = [a["all"][key] - b["all"][key] for a, b in zip(found[one], found[other], strict=True)]
        by_seed = ", ".join(f"{value:+.3f}" for value in values)
        print(f"| {key}, {one} - {other} | {by_seed} | {cell(values, '+.3f')} |")
    print("\n| stage | FLOPs | seconds |\n|---|---|---|")
    for stage in found:
        flops, seconds = ([report[stage]["receipt"][key] for report in reports] for key in ("flops", "seconds"))
        print(f"| {stage} | {min(flops):.2e} to {max(flops):.2e} | {min(seconds):.0f} to {max(seconds):.0f} |")
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
