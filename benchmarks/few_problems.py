"""Where problems are few: what does a student gain by its teacher's responses, by its teacher's judgement, by a reward?

    .venv/bin/slingshot run tiny --until rl_final --out runs/tiny
    .venv/bin/python benchmarks/few_problems.py runs/tiny --out runs/few  # Markdown, benchmarks/few_problems.json

The recipe tiny's dense student, pre-trained once a seed, has 200 sums to learn from, of which the teacher has answered
each right: SFT on these responses for more and more epochs, and, after the least of it, on-policy distillation or
reinforcement on the same 200 until as many FLOPs are spent as the most of SFT took, the teacher's included. All are
scored on held-out sums. Intervals are 95% t intervals over seeds of the difference to on-policy distillation.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from losses import keep, keys_of, score, stage
from tiny import interval

from slingshot.base.files import write_jsonl
from slingshot.cost.receipt import Receipt
from slingshot.stages import distill, pretrain, rl, sample, sft
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix

TASK: dict[str, Any] = {"name": "arithmetic", "params": {"languages": ["en"]}}
PROBLEMS, EPOCHS, STEPS = 200, (5, 15, 45), 60
ROW: dict[str, Any] = {"sequence_length": 128}
SAMPLING: dict[str, Any] = {"max_tokens": 96}
ON_POLICY = "on-policy distillation"


def student(seed: int, tokenizer: Path, folder: Path) -> Path:
    """As the recipe pre-trains it."""
    values = keys_of("tiny")["student"] | {"tokenizer": str(tokenizer), "seed": seed}
    return stage(pretrain, pretrain.PretrainConfig, folder / "student", values)


def few(seed: int, folder: Path) -> dict[str, Any]:
    """The task whose problems are the first of those for training, and no others."""
    drawn = TaskMix([TaskConfig(**TASK)], "train", f"few/{seed}", repeat=False).draw(0, PROBLEMS + 1)
    rows = [{"prompt": item.problem.prompt, "answer": item.problem.answer} for item in drawn]
    train, other = folder / "problems.jsonl", folder / "other.jsonl"  # with one for testing, none of ours is kept back
    write_jsonl(train, rows[:PROBLEMS])
    write_jsonl(other, rows[PROBLEMS:])
    return {"name": "dataset", "params": {"source": str(train), "test": str(other), "verifier": "number"}}


def models(start: Path, teacher: Path, seed: int, folder: Path) -> dict[str, Path]:
    """What the student becomes in each way."""
    task = few(seed, folder)
    asked = {"model": str(teacher), "tasks": [task], "problems": PROBLEMS, "samples": 4, "seed": seed}
    answered = stage(sample, sample.SampleConfig, folder / "answered", asked | {"sampling": SAMPLING})
    made = {"student": start}
    for epochs in EPOCHS:
        taught = {"model": str(start), "data": [str(answered)], "epochs": epochs, "seed": seed} | ROW
        taught |= {"optimizer": {"name": "adamw", "lr": 1e-3}}
        made[f"SFT, {epochs} epochs"] = stage(sft, sft.SFTConfig, folder / f"sft-{epochs}", taught)
    least, *_, most = (made[f"SFT, {epochs} epochs"] for epochs in EPOCHS)
    common: dict[str, Any] = {"model": str(least), "tasks": [task], "sampling": SAMPLING, "seed": seed} | ROW
    common |= {"max_flops": Receipt.read(most).flops - Receipt.read(least).flops}
    judged = {"teachers": [{"model": str(teacher)}], "steps": STEPS, "optimizer": {"lr": 4e-4, "decay": 0.7}}
    made[ON_POLICY] = stage(distill, distill.DistillConfig, folder / "on-policy", common | judged)
    made["reinforcement"] = stage(rl, rl.RLConfig, folder / "rl", common | {"steps": 1000})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run of the recipe tiny; its rl_final is the teacher")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--problems", type=int, default=500, help="held-out ones")
    given = parser.parse_args()
    solved: dict[str, list[float]] = {}
    gflop: dict[str, list[float]] = {}
    for seed in range(given.seeds):
        folder = given.out / f"seed-{seed}"
        start = student(seed, given.run / "base", folder)
        for name, model in models(start, given.run / "rl_final", seed, folder).items():
            [found] = score(model, model.with_name(f"{model.name}-evaluation"), given.problems, [TASK], **SAMPLING)
            solved.setdefault(name, []).append(100 * found["pass@1"])
            gflop.setdefault(name, []).append(Receipt.read(model).flops / 1e9)
    print(
        "| model | pass@1 by seed | on-policy distillation - it | GFLOP of the last stage by seed |\n|---|---|---|---|"
    )
    for name, points in solved.items():
        mean, low, high = interval([ours - its for ours, its in zip(solved[ON_POLICY], points, strict=True)])
        beyond = "" if name == ON_POLICY else f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"
        spent = ", ".join(f"{each:.0f}" for each in gflop[name])
        print(f"| {name} | {', '.join(f'{each:.1f}' for each in points)} | {beyond} | {spent} |")
    keep(__file__, given, solved=solved, gflop=gflop)


if __name__ == "__main__":
    main()
