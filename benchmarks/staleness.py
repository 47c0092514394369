"""What do rollouts beside the updates (rl's `staleness`) gain in time, and cost in learning?

    .venv/bin/python benchmarks/staleness.py --out runs/staleness [--only time | learning | simulated]
    ... --only time --tail 0 --model BASE --more '{"rollouts": ["http://127.0.0.1:8101"], "partial": true}'

It prints Markdown and keeps benchmarks/staleness.json.
Model and shapes are those of benchmarks/losses.py. Time: a verifier answers one response in sixteen after `--tail`
seconds, as a program that runs into its time limit, and the others at once; in turns, seconds of a step without the
first 3 + k of each run, a multiple of k + 1 steps, as k + 1 of them wait for the same verifiers. Learning: a free
verifier, equal samples; gains as in benchmarks/losses.py, and rewards of the last ten steps, what they are above those
without staleness by seed. `--more`: other keys of rl.
Simulated: one process and 64, each with a share of its own as large as that run's, which meet at every update;
responses of exponential length, cut off at four times the mean, for the longest of which new weights wait, or not.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections import deque
from heapq import heapreplace
from pathlib import Path
from typing import Any

from losses import TASK, reasoner, score, stage
from tiny import interval

from slingshot.base.files import read_jsonl
from slingshot.stages import rl
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.verification import IN_ALL, MOST_WORKERS

VERIFIER = """
import hashlib, json, time
from pathlib import Path

def problems(split, seed):
    return [json.loads(line) for line in Path({rows!r}).read_text().splitlines()]

def verify(problem, text):
    if hashlib.sha256((problem["prompt"] + text).encode()).digest()[0] < 16:
        time.sleep({tail})
    return text.strip() == problem["answer"]
"""
SHAPE = {
    "prompts_per_step": 16, "group_size": 8, "sequence_length": 64, "sampling": {"max_tokens": 48},
    "loss": {"kl": 0.0, "importance": "truncated"},
}  # fmt: skip


def slow_task(folder: Path, tail: float) -> str:
    """A task file of arithmetic's problems with that verifier."""
    items = TaskMix([TaskConfig(**TASK)], "train", "staleness").draw(0, 4000)
    rows = {item.problem.prompt: item.problem.answer for item in items}
    lines = [json.dumps({"prompt": prompt, "answer": answer, "key": prompt}) for prompt, answer in rows.items()]
    (folder / "problems.jsonl").write_text("\n".join(lines), encoding="utf-8")
    (folder / "slow.py").write_text(VERIFIER.format(rows=str((folder / "problems.jsonl").resolve()), tail=tail))
    return str(folder / "slow.py")


def step_seconds(folder: Path, turn: int, values: dict[str, Any]) -> float:
    """The mean of a run's last steps: in the first ones nothing is stale yet, and workers are still added."""
    staleness = values["staleness"]
    out = stage(rl, rl.RLConfig, folder / f"time-{staleness}-{turn}", values)
    rows = read_jsonl(out / "metrics.jsonl")
    count = (len(rows) - 3 - staleness) // (1 + staleness) * (1 + staleness)
    return (rows[-1]["seconds"] - rows[-1 - count]["seconds"]) / count


def simulated(
    ranks: int, staleness: int, mean: float, update: float, slow: float, tail: float, partial: bool = False
) -> float:
    """Seconds of a step as `RolloutsAhead` goes about it: `mean` of a response, `update`; `slow`: the share of answers
    whose verifier takes `tail`. 128 answers a process, verified by workers of its own in the order they are made."""
    rng, steps = random.Random(f"staleness/{ranks}"), 100
    workers = min(IN_ALL, MOST_WORKERS * (1 + staleness))
    clock, sampled, begun = 0.0, [0.0] * ranks, deque[float]()
    free = [[0.0] * workers for _ in range(ranks)]  # heaps: when each worker has done what it was asked
    for step in range(steps):
        if not partial:
            clock = max(clock, *sampled)  # new weights wait for what is being sampled
        while len(begun) < min(steps - step, staleness + 1):
            verified = 0.0
            for rank in range(ranks):
                began = clock if partial else max(clock, sampled[rank])
                made = sorted(began + mean * min(rng.expovariate(1.0), 4.0) for _ in range(128))
                for at in made:
                    done = max(at, free[rank][0]) + (tail if rng.random() < slow else 0.0)
                    heapreplace(free[rank], done)
                    verified = max(verified, done)
                sampled[rank] = made[-1]
            begun.append(verified)
        clock = max(clock, begun.popleft()) + update
    return clock / steps


def show_simulated(staleness: list[int], mean: float, update: float, tail: float) -> None:
    cases = {"slow verifiers": (mean, 1 / 16, tail), "long responses": (2 * update / 4, 0.0, 0.0)}
    cases["both"] = (2 * update / 4, 1 / 16, tail)
    print("| case, processes | " + " | ".join(f"staleness {each}" for each in staleness) + " |")
    print("|" + "---|" * (1 + len(staleness)))
    for name, (response, slow, seconds) in cases.items():
        for ranks, partial in ((1, False), (64, False), (64, True)):
            its = [simulated(ranks, each, response, update, slow, seconds, partial) for each in staleness]
            row = " | ".join(f"{each:.2f} s, {its[0] / each:.2f} x" for each in its)
            print(f"| {name}, {ranks}{', partial' * partial} | {row} |")


def keys_with(given: dict[str, Any], staleness: int) -> dict[str, Any]:
    """The keys of a run with so much staleness; without any nothing is partial."""
    return {"staleness": staleness} | {key: each for key, each in given.items() if staleness or key != "partial"}


def late_reward(out: Path) -> float:
    return statistics.mean(row["reward"] for row in read_jsonl(out / "metrics.jsonl")[-10:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["time", "learning", "simulated"])
    parser.add_argument("--staleness", type=int, nargs="+", default=[0, 1, 2, 4])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--tail", type=float, default=5.0, help="seconds")
    parser.add_argument("--response-seconds", type=float, default=0.06, help="of a mean response, for simulations")
    parser.add_argument("--update-seconds", type=float, default=0.4, help="for simulations")
    parser.add_argument("--timed-steps", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--model", type=Path, help="for time, in place of the trained one")
    parser.add_argument("--more", type=json.loads, default={}, help="other keys of rl, as JSON")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if given.only in (None, "simulated"):
        show_simulated(given.staleness, given.response_seconds, given.update_seconds, given.tail)
    if given.only in (None, "time"):
        model = given.model or reasoner(0, given.out / "seed-0")
        values = SHAPE | {"model": str(model), "tasks": [slow_task(given.out, given.tail)], "steps": given.timed_steps}
        seconds: dict[int, list[float]] = {each: [] for each in given.staleness}
        for turn in range(given.turns):
            for each, its in seconds.items():
                its.append(step_seconds(given.out, turn, values | keys_with(given.more, each)))
        print("| staleness | seconds of a step | times as fast |\n|---|---|---|")
        for each, its in seconds.items():
            times = statistics.median(seconds[given.staleness[0]]) / statistics.median(its)
            print(f"| {each} | {statistics.median(its):.2f} ({min(its):.2f} to {max(its):.2f}) | {times:.2f} |")
        found = {"tail": given.tail, "steps": given.timed_steps, "seconds": seconds}
        result["time"] = result.get("time", {}) | {json.dumps(given.more): found}
    if given.only in (None, "learning"):
        rewards: dict[int, list[float]] = {each: [] for each in given.staleness}
        gains: dict[int, list[float]] = {each: [] for each in given.staleness}
        for seed in range(given.seeds):
            folder = given.out / f"seed-{seed}"
            model = reasoner(seed, folder)
            before = score(model, folder / "cold_start-evaluation", given.problems)[0]["pass@1"]
            for each, its in gains.items():
                values = SHAPE | {"model": str(model), "tasks": [TASK], "steps": given.steps, "seed": seed}
                values |= {"optimizer": {"lr": given.lr}} | keys_with(given.more, each)
                out = stage(rl, rl.RLConfig, folder / f"rl-{each}", values)
                after = score(out, folder / f"rl-{each}-evaluation", given.problems)[0]["pass@1"]
                its.append(100 * (after - before))
                rewards[each].append(late_reward(out))
        print("| staleness | gain in points by seed | mean (95%) | above that without | late reward | above it |")
        print("|---|---|---|---|---|---|")
        for each, its in gains.items():
            mean, low, high = interval(its)
            by_seed = ", ".join(f"{gain:+.1f}" for gain in its)
            cells = [str(each), by_seed, f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"]
            for found in (gains, rewards):
                more, low, high = interval([a - b for a, b in zip(found[each], found[given.staleness[0]], strict=True)])
                cells += [f"{more:+.3f} ({low:+.3f} to {high:+.3f})"]
            cells.insert(4, f"{statistics.mean(rewards[each]):.3f}")
            print(f"| {' | '.join(cells)} |")
        settings = {"steps": given.steps, "lr": given.lr, "problems": given.problems}
        its = settings | {"gains": gains, "late rewards": rewards}
        result["learning"] = result.get("learning", {}) | {json.dumps(given.more): its}
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
