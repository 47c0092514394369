"""Do specialists become one model that loses nothing of either (DeepSeek-V4's way, arXiv 2306.13649's objective)?

    .venv/bin/python benchmarks/specialists.py --out runs/specialists     # Markdown, and benchmarks/specialists.json

Micro's model learns to work sums and products out; from there reinforcement on sums alone and on products alone makes
two specialists, and on-policy distillation, each problem judged by the specialist of its task, one model of both.
Beside it reinforcement on both tasks at once, of as many responses. Intervals are 95% t intervals over seeds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from losses import reasoner, score, stage
from tiny import interval

from slingshot.stages import distill, rl

TASKS: list[dict[str, Any]] = [
    {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 4, "languages": ["en"]}},
    {"name": "multiplication", "params": {"min_digits": 1, "max_digits": 2, "languages": ["en"]}},
]
SAMPLING = {"max_tokens": 180}


def models(seed: int, folder: Path, steps: int) -> dict[str, Path]:
    """Where all began, both specialists, the one made of them, and the one reinforced on both tasks."""
    start = reasoner(seed, folder, TASKS, count=20_000, examples=800, length=256)
    common = {"model": str(start), "sequence_length": 256, "sampling": SAMPLING, "seed": seed}
    policy = common | {"group_size": 8, "minibatches": 4, "loss": {"kl": 0.0}, "optimizer": {"lr": 1e-4}}
    shapes = {"sums": (TASKS[:1], 16), "products": (TASKS[1:], 16), "both": (TASKS, 32)}
    made = {"before": start}
    for name, (tasks, prompts) in shapes.items():
        values = policy | {"tasks": tasks, "steps": steps, "prompts_per_step": prompts}
        made[name] = stage(rl, rl.RLConfig, folder / name, values)
    teachers = [
        {"model": str(made[name]), "tasks": [task["name"]]}
        for name, task in zip(("sums", "products"), TASKS, strict=True)
    ]
    optimizer = {"lr": 1e-3, "decay": 0.7}
    values = common | {"tasks": TASKS, "teachers": teachers, "steps": 2 * steps, "optimizer": optimizer}
    made["merged"] = stage(distill, distill.DistillConfig, folder / "merged", values)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=300)
    given = parser.parse_args()
    by_model: dict[str, list[list[float]]] = {}
    for seed in range(given.seeds):
        folder = given.out / f"seed-{seed}"
        for name, model in models(seed, folder, given.steps).items():
            found = score(model, folder / f"{name}-evaluation", given.problems, TASKS, **SAMPLING)
            by_model.setdefault(name, []).append([100 * each["pass@1"] for each in found])
    print("| model | sums by seed | products by seed |\n|---|---|---|")
    for name, runs in by_model.items():
        print(f"| {name} | " + " | ".join(", ".join(f"{p:.1f}" for p in its) for its in zip(*runs, strict=True)) + " |")
    for number, name in enumerate(("sums", "products")):
        pairs = zip(by_model["merged"], by_model[name], strict=True)
        mean, low, high = interval([merged[number] - its[number] for merged, its in pairs])
        print(f"\nmerged above the specialist of {name}: {mean:+.1f} points ({low:+.1f} to {high:+.1f})")
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    text = json.dumps({"settings": settings, "solved": by_model}, indent=1)
    Path(__file__).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
