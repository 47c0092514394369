"""What does each policy loss gain, the rest alike? A small model, trained once a seed, reinforced with every loss.

    .venv/bin/python benchmarks/losses.py --out runs/losses           # prints Markdown, keeps benchmarks/losses.json

The shapes are the recipe micro's. Every step's samples make four optimizer steps, so that ratios and clips count.
Intervals are 95% t intervals over seeds of what reinforcement adds to the model it began from, on the same problems.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tiny import interval

from slingshot.base.files import read_json, read_jsonl
from slingshot.recipe.recipe import Recipe
from slingshot.stages import evaluate, pretrain, rl, sft
from slingshot.training.objectives import POLICY_LOSSES

TASK = {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 3, "languages": ["en"]}}
COMMON = {"dtype": "float32", "threads": 1}


def stage(module: Any, config: type, out: Path, values: dict[str, Any]) -> Path:
    """The artifact of a stage, made where it is not there yet."""
    if not out.exists():
        module.run(config.parse(COMMON | values, out.name), out)
    return out


def score(
    model: Path, out: Path, problems: int, tasks: Sequence[dict[str, Any]] = (TASK,), max_tokens: int = 48, **more: Any
) -> list[dict[str, Any]]:
    """What a model solves of each task at temperature 1, its format and the tokens of a response."""
    values = {"model": str(model), "tasks": [*tasks], "problems": problems, "samples": 4, "examples": 0} | more
    sampling = {"temperature": 1.0, "top_p": 1.0, "max_tokens": max_tokens}
    stage(evaluate, evaluate.EvaluateConfig, out, values | {"sampling": sampling})
    found = read_json(out / "evaluation.json")["tasks"]
    return [found[task["name"]] for task in tasks]


def keys_of(recipe: str) -> dict[str, dict[str, Any]]:
    """What the stages of a recipe set."""
    return {stage.name: stage.values for stage in Recipe.load(recipe).stages}


def pretrained(
    seed: int,
    out: Path,
    tasks: Sequence[dict[str, Any]],
    count: int,
    length: int,
    steps: int = 1500,
    shape: dict[str, int] | None = None,
) -> Path:
    """Micro's base, or one of another `shape`, trained for longer on `count` documents; rows are `length` tokens."""
    base = keys_of("micro")["base"]
    documents = base["documents"] | {"tasks": [*tasks], "count": count}
    values = {"steps": steps, "documents": documents, "sequence_length": length, "seed": seed}
    values |= {"model": base["model"] | (shape or {})}
    return stage(pretrain, pretrain.PretrainConfig, out / "base", base | values)


def reasoner(seed: int, out: Path) -> Path:
    """That base after a cold start on worked solutions."""
    start = pretrained(seed, out, [TASK], 8000, 64)
    cold = {"model": str(start), "tasks": [TASK], "examples": 400, "epochs": 2, "sequence_length": 64, "seed": seed}
    return stage(sft, sft.SFTConfig, out / "cold_start", cold)


def keep(benchmark: str, given: argparse.Namespace, **found: Any) -> None:
    """Write what was found, and with which settings, beside the benchmark."""
    settings = {key: value for key, value in vars(given).items() if not isinstance(value, Path)}
    text = json.dumps({"settings": settings} | found, indent=1)
    Path(benchmark).with_suffix(".json").write_text(text + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    gains: dict[str, list[dict[str, float]]] = {name: [] for name in POLICY_LOSSES}
    before = []
    for seed in range(given.seeds):
        folder = given.out / f"seed-{seed}"
        model = reasoner(seed, folder)
        before += score(model, folder / "cold_start-evaluation", given.problems)
        for name in POLICY_LOSSES:
            values = {
                "model": str(model), "tasks": [TASK], "steps": given.steps, "prompts_per_step": 16, "group_size": 8,
                "sequence_length": 64, "minibatches": 4, "loss": {"name": name, "kl": 0.0}, "seed": seed,
                "sampling": {"max_tokens": 48}, "optimizer": {"lr": given.lr},
            }  # fmt: skip
            out = stage(rl, rl.RLConfig, folder / name, values)
            [found] = score(out, folder / f"{name}-evaluation", given.problems)
            last = read_jsonl(out / "metrics.jsonl")[-1]
            gains[name].append({"pass@1": found["pass@1"], "tokens": found["mean_tokens"], "entropy": last["entropy"]})
    table(before, gains)
    keep(__file__, given, before=[each["pass@1"] for each in before], after=gains)


def table(before: list[dict[str, float]], gains: dict[str, list[dict[str, float]]]) -> None:
    starts = [each["pass@1"] for each in before]
    print("| loss | pass@1 by seed | gain in points (95%) | tokens | entropy at the end |\n|---|---|---|---|---|")
    print(f"| before | {', '.join(f'{100 * each:.1f}' for each in starts)} | | | |")
    for name, runs in gains.items():
        points = [100 * run["pass@1"] for run in runs]
        mean, low, high = interval([point - 100 * start for point, start in zip(points, starts, strict=True)])
        rest = [sum(run[key] for run in runs) / len(runs) for key in ("tokens", "entropy")]
        by_seed = ", ".join(f"{point:.1f}" for point in points)
        print(f"| {name} | {by_seed} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {rest[0]:.0f} | {rest[1]:.3f} |")


if __name__ == "__main__":
    main()
