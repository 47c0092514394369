"""Do specialists become one model that loses nothing of any (DeepSeek-V4's way, arXiv 2306.13649's objective)?

    .venv/bin/python benchmarks/specialists.py --out runs/specialists     # Markdown, and benchmarks/specialists.json

A small model reads sums, countdown and code; from there, once a seed, reinforcement on one task alone makes a
specialist of it, and on-policy distillation, each problem judged by the specialist of its task, one model of all.
Beside it reinforcement on all tasks at once, of as many responses as the specialists' together. Intervals are 95% t
intervals over seeds, which share the model that all began from.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from losses import keep, keys_of, score, stage
from tiny import interval

from slingshot.cost.receipt import Receipt
from slingshot.stages import distill, pretrain, rl, sft

TASKS: list[dict[str, Any]] = [
    {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": 4, "languages": ["en"]}},
    {"name": "countdown", "params": {"max_number": 10, "max_target": 30, "languages": ["en"]}},
    {"name": "code", "params": {"level": 2, "languages": ["en"]}},
]
SHAPE = {
    "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3,
    "moe_intermediate_size": 48,
}  # fmt: skip
PRECISION: dict[str, Any] = {"dtype": "bfloat16"}
SAMPLING: dict[str, Any] = {"max_tokens": 200}


def reasoner(folder: Path) -> Path:
    """The recipe code's model, smaller, after 4.1M tokens of all tasks and a cold start on worked solutions."""
    base = keys_of("code")["base"]
    documents = {"count": 90_000, "styles": {"answer": 0.3, "steps": 0.7}, "template_share": 0.4, "language_mix": 0.0}
    base |= {"model": base["model"] | SHAPE, "documents": documents | {"tasks": TASKS}, "steps": 500}
    common = {"sequence_length": 256} | PRECISION
    start = stage(pretrain, pretrain.PretrainConfig, folder / "base", base | common)
    cold = {"model": str(start), "tasks": TASKS, "examples": 1200, "epochs": 2}
    return stage(sft, sft.SFTConfig, folder / "cold_start", cold | common)


def models(start: Path, seed: int, folder: Path, steps: int, at_once: bool) -> dict[str, list[Path]]:
    """A specialist a task, the one made of them, and if `at_once` the one reinforced on all tasks."""
    common = {"model": str(start), "sequence_length": 256, "sampling": SAMPLING, "seed": seed} | PRECISION
    policy = {"group_size": 8, "minibatches": 4, "loss": {"kl": 0.0}, "optimizer": {"lr": 2e-4, "decay": 1.0}}

    def reinforced(name: str, tasks: list[dict[str, Any]]) -> Path:
        values = common | policy | {"tasks": tasks, "steps": steps, "prompts_per_step": 16 * len(tasks)}
        return stage(rl, rl.RLConfig, folder / name, values)

    specialists = [reinforced(task["name"], [task]) for task in TASKS]
    teachers = [{"model": str(model), "tasks": [task["name"]]} for model, task in zip(specialists, TASKS, strict=True)]
    values = {"tasks": TASKS, "teachers": teachers, "steps": 2 * steps, "optimizer": {"lr": 1e-3, "decay": 0.7}}
    merged = stage(distill, distill.DistillConfig, folder / "merged", common | values)
    made = {"before": [start], "specialists": specialists, "merged": [merged]}
    return made | {"all at once": [reinforced("all", TASKS)]} if at_once else made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--at-once", type=int, default=3, help="seeds, the first ones, that have all tasks at once too")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--problems", type=int, default=300)
    given = parser.parse_args()
    solved: dict[str, list[list[float]]] = {}
    gflop: dict[str, list[float]] = {}
    start = reasoner(given.out)
    for seed in range(given.seeds):
        made = models(start, seed, given.out / f"seed-{seed}", given.steps, seed < given.at_once)
        for name, its in made.items():
            found, spent = list[float](), 0.0
            for model, tasks in zip(its, [TASKS] if len(its) == 1 else [[task] for task in TASKS], strict=True):
                out = model.with_name(f"{model.name}-evaluation")
                scores = score(model, out, given.problems, tasks, **SAMPLING, **PRECISION)
                found += [100 * each["pass@1"] for each in scores]
                spent += Receipt.read(model).flops / 1e9
            solved.setdefault(name, []).append(found)
            gflop.setdefault(name, []).append(spent)
    table(solved, gflop)
    keep(__file__, given, solved=solved, gflop=gflop)


def table(solved: dict[str, list[list[float]]], gflop: dict[str, list[float]]) -> None:
    columns = [*(f"{task['name']} by seed" for task in TASKS), "GFLOP of this stage by seed"]
    print("| model | " + " | ".join(columns) + " |\n|" + "---|" * (1 + len(columns)))
    for name, runs in solved.items():
        cells = [", ".join(f"{points:.1f}" for points in its) for its in zip(*runs, strict=True)]
        print(f"| {name} | " + " | ".join([*cells, ", ".join(f"{each:.0f}" for each in gflop[name])]) + " |")
    for better, worse in (("specialists", "before"), ("merged", "specialists"), ("merged", "all at once")):
        if worse not in solved:
            continue
        cells = []
        for number in range(len(TASKS)):
            pairs = zip(solved[better], solved[worse], strict=False)  # of the first seeds where one has fewer
            mean, low, high = interval([one[number] - other[number] for one, other in pairs])
            cells.append(f"{mean:+.1f} ({low:+.1f} to {high:+.1f})")
        print(f"| {better} - {worse} | " + " | ".join(cells) + " | |")


if __name__ == "__main__":
    main()
