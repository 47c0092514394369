"""What do a reward for short responses and thinking budgets cost in accuracy, and save in tokens?

    .venv/bin/python benchmarks/length.py --out runs/length          # prints Markdown, keeps benchmarks/length.json

Micro's model, twice as deep, trained for longer on sums of 2 to 4 terms: answers at a glance, most of them of 2 and 3
terms, and worked solutions of all; its cold start is worked solutions, so that it works out also what it knows. From
there reinforcement without `rewards.length` and with two, and the first of these models at thinking budgets.
Each number of terms counts as much as another. Intervals are 95% t intervals over seeds of reinforcement, all from one
start, of the difference to the model without such a reward and without a budget, on the same problems.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

from losses import keep, pretrained, score, stage
from tiny import interval

from slingshot.stages import rl, sft

ALL, SHORTER = (
    {"name": "arithmetic", "params": {"min_terms": 2, "max_terms": terms, "languages": ["en"]}} for terms in (4, 3)
)
WRITTEN = [
    SHORTER | {"weight": 0.5, "styles": {"answer": 1.0}},
    ALL | {"weight": 0.5, "styles": {"answer": 0.3, "steps": 0.7}},
]
SHAPE = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 3}
ROW, MAX_TOKENS = 96, 64
KEYS = ("pass@1", "mean_tokens")
PLAIN = "rewards.length 0"
Found = dict[str, dict[str, float]]  # by number of terms


def start(seed: int, out: Path) -> Path:
    """Where all begin."""
    base = pretrained(seed, out, WRITTEN, count=40_000, length=ROW, steps=3000, shape=SHAPE)
    cold = {"model": str(base), "tasks": [ALL], "examples": 200, "epochs": 1, "sequence_length": ROW, "seed": seed}
    return stage(sft, sft.SFTConfig, out / "cold_start", cold | {"optimizer": {"lr": 1e-3, "adam_lr": 1e-3}})


def reinforced(model: Path, seed: int, folder: Path, steps: int, lengths: Sequence[float]) -> dict[str, Path]:
    """What reinforcement with each reward for short responses makes of it."""
    values = {
        "model": str(model), "tasks": [ALL], "steps": steps, "prompts_per_step": 16, "group_size": 8, "minibatches": 4,
        "sequence_length": ROW, "sampling": {"max_tokens": MAX_TOKENS}, "optimizer": {"lr": 1e-4}, "seed": seed,
        "loss": {"kl": 0.0, "advantage_std": "none"},
    }  # fmt: skip
    return {
        f"rewards.length {length:g}": stage(
            rl, rl.RLConfig, folder / f"length-{length:g}", values | {"rewards": {"length": length}}
        )
        for length in lengths
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=int, default=0, help="the seed of the model that all begin from")
    parser.add_argument("--seeds", type=int, default=3, help="of reinforcement")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--problems", type=int, default=400)
    parser.add_argument("--lengths", type=float, nargs="*", default=[0.1, 0.15])
    parser.add_argument("--budgets", type=int, nargs="*", default=[0, 8, 16])
    given = parser.parse_args()
    by_model: dict[str, list[Found]] = {}
    begun = start(given.start, given.out)
    for seed in range(given.seeds):
        folder = given.out / f"seed-{seed}"
        made = {"before": begun} | reinforced(begun, seed, folder, given.steps, [0.0, *given.lengths])
        asked: dict[str, tuple[Path, int | None]] = {name: (model, None) for name, model in made.items()}
        asked |= {f"{PLAIN}, budget {budget}": (made[PLAIN], budget) for budget in given.budgets}
        for name, (model, budget) in asked.items():
            out = folder / "evaluations" / name.replace(" ", "-")
            [found] = score(model, out, given.problems, [ALL], MAX_TOKENS, thinking_budget=budget)
            its = {terms: {key: row[key] for key in (*KEYS, "n")} for terms, row in found["by_level"].items()}
            by_model.setdefault(name, []).append(its)
    table(by_model)
    by_terms(by_model)
    keep(__file__, given, models=by_model)


def overall(found: Found, key: str) -> float:
    return fmean(row[key] for row in found.values())


def table(by_model: dict[str, list[Found]]) -> None:
    """What each model solves and spends, and its difference to the one without a reward for short responses."""

    def beyond(runs: list[Found], key: str, of: Callable[[float, float], float]) -> str:
        pairs = zip(runs, by_model[PLAIN], strict=True)
        mean, low, high = interval([100 * of(overall(its, key), overall(plain, key)) for its, plain in pairs])
        return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"

    print("| model | pass@1 by seed | tokens by seed | points (95%) | tokens in % (95%) |\n|---|---|---|---|---|")
    for name, runs in by_model.items():
        solved = ", ".join(f"{100 * overall(its, 'pass@1'):.1f}" for its in runs)
        spent = ", ".join(f"{overall(its, 'mean_tokens'):.1f}" for its in runs)
        points = beyond(runs, "pass@1", lambda its, plain: its - plain)
        tokens = beyond(runs, "mean_tokens", lambda its, plain: its / plain - 1)
        print(f"| {name} | {solved} | {spent} | {points} | {tokens} |")


def by_terms(by_model: dict[str, list[Found]]) -> None:
    """What each model solves and spends by the number of terms, means over seeds."""
    names = list(by_model[PLAIN][0])
    print(f"\n| pass@1, tokens | {' | '.join(f'{name} terms' for name in names)} |\n|---|{'---|' * len(names)}")
    for model, runs in by_model.items():
        means = [[fmean(its[name][key] for its in runs) for key in KEYS] for name in names]
        print(f"| {model} | {' | '.join(f'{100 * solved:.1f}, {spent:.1f}' for solved, spent in means)} |")


if __name__ == "__main__":
    main()
