"""Does a recipe take what `slingshot plan recipe` said it would? A forecast before each of some runs, then their medians side by side.

    .venv/bin/python benchmarks/forecast.py tiny --until rl_final --runs 3 --out runs/forecast
    .venv/bin/python benchmarks/forecast.py smollm2 --runs 3 --out runs/forecast defaults.threads=1

Runs go into fresh folders under --out, RECIPE-0, RECIPE-1 ...; a forecast is made of rehearsals in the same sitting, and reads no receipt.
Prints Markdown: predicted and measured seconds of every stage, medians, their ratio, and how many lie within 25%. Kept in
benchmarks/forecast.json under the recipe's name. A folder that is there already is refused: its clocks are of another sitting.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from slingshot.cost.receipt import Receipt
from slingshot.forecast import forecast
from slingshot.machine.device import describe_machine
from slingshot.recipe.recipe import Recipe

WITHIN = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", help="STAGE.KEY=VALUE")
    parser.add_argument("--until", default=None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/forecast"))
    given = parser.parse_intermixed_args()
    recipe = Recipe.load(given.recipe, given.overrides)
    folders = [given.out / f"{recipe.name}-{number}" for number in range(given.runs)]
    if there := [str(folder) for folder in folders if folder.exists()]:
        sys.exit(f"{', '.join(there)}: there already; remove it or choose another --out")

    forecasts, walls = [], []
    for folder in folders:
        forecasts.append(forecast(recipe, until=given.until))
        print(f"forecast made in {forecasts[-1].probing_seconds:.0f} s: {forecasts[-1].seconds:.0f} s", file=sys.stderr)
        begin = time.perf_counter()
        until = ["--until", given.until] if given.until else []
        subprocess.run([sys.executable, "-m", "slingshot", "run", given.recipe, *given.overrides, *until, "--out", str(folder)], check=True)
        walls.append(time.perf_counter() - begin)

    places = {stage.name: stage.folder for stage in recipe.until(given.until)}
    stages: dict[str, Any] = {}
    for lines in zip(*(found.stages for found in forecasts), strict=True):
        line = lines[0]
        predictions = [each.here.seconds for each in lines]
        receipts = [Receipt.read(folder / places[line.name]) for folder in folders]
        seconds = [receipt.seconds for receipt in receipts]
        stages[line.name] = {
            "predicted": statistics.median(predictions), "predictions": predictions, "median": statistics.median(seconds), "seconds": seconds,
            "probe_steps": line.here.probed, "predicted_flops": line.work.flops, "flops": statistics.median(receipt.flops for receipt in receipts),
            "predicted_memory": line.here.memory_bytes, "memory": statistics.median(receipt.peak_memory_bytes for receipt in receipts),
        }  # fmt: skip
        stages[line.name]["ratio"] = stages[line.name]["predicted"] / stages[line.name]["median"]
    machine = describe_machine().model_dump() | {"load": os.getloadavg()[2]}
    result = {
        "overrides": given.overrides, "until": given.until, "runs": given.runs, "stages": stages, "walls": walls, "machine": machine,
        "probing_seconds": statistics.median(found.probing_seconds for found in forecasts), "assumptions": forecasts[0].assumptions,
        "predicted_wall": statistics.median(found.seconds for found in forecasts),
    }  # fmt: skip
    table(recipe.name, result)
    file = Path(__file__).with_suffix(".json")
    kept = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps(kept | {recipe.name: result}, indent=2) + "\n", encoding="utf-8")


def table(name: str, result: dict[str, Any]) -> None:
    stages = result["stages"]
    print(f"| {name} | predicted s | measured s | predicted / measured | FLOPs, predicted / counted |")
    print("|---|---|---|---|---|")
    for stage, each in stages.items():
        flops = f"{each['predicted_flops'] / each['flops']:.2f}" if each["flops"] else ""
        print(f"| {stage} | {each['predicted']:.1f} | {each['median']:.1f} | {each['ratio']:.2f} | {flops} |")
    predicted, median = sum(each["predicted"] for each in stages.values()), sum(each["median"] for each in stages.values())
    print(f"| in all | {predicted:.1f} | {median:.1f} | {predicted / median:.2f} | |")
    took = result["probing_seconds"]
    inside = sum(abs(each["ratio"] - 1) <= WITHIN for each in stages.values())
    wall = f"wall clock with processes {result['predicted_wall']:.0f} s, measured {statistics.median(result['walls']):.0f} s"
    print(f"\nMedians of {result['runs']}. {inside} of {len(stages)} stages within {WITHIN:.0%}; {wall}; a forecast took {took:.0f} s.")


if __name__ == "__main__":
    main()
