"""How much longer is a step of reinforcement whose verifier takes a second a response than one whose verifier is free?

    .venv/bin/python benchmarks/verifiers.py --out runs/verifiers [--prompts 8 12] [--turns 2]

It prints Markdown and keeps benchmarks/verifiers.json.
In process, one thread, without staleness. Micro's network with more layers and random weights says tokens at random
until it ends a response by chance, so lengths are spread and a step is sampled for seconds; every response is
verified. None is right, so no group has a signal and there is no update: a step is sampling and verification alone,
and with an update the ratio is smaller. In turns, free and slow; their steps are the same to the token, and ratios
are of the same step of a turn. The first step of a run, in which workers start, is told by itself. The pool's
capacity: answers that as many workers as there may be verify while a step is sampled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from losses import COMMON, keys_of, stage

from slingshot.base.files import read_jsonl
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.machine.device import describe_machine
from slingshot.rollout.sampler import EngineSampler, Prompts, Samples
from slingshot.stages import pretrain, rl
from slingshot.tasks.verification import MOST_WORKERS

VERIFIER = """
import time

def problems(split, seed):
    return [{{"prompt": f"What is {{n}}?", "key": str(n)}} for n in range(20_000)]

def verify(problem, text):
    time.sleep({seconds})
    return False
"""
LENGTH, LAYERS, GROUP = 2048, 48, 8


class ClockedSampler(EngineSampler):
    """Notes what each sampling took, in seconds."""

    def __init__(self, model: Path) -> None:
        super().__init__(Engine.load(model, dtype="float32", device="cpu"))
        self.seconds = list[float]()

    def sample(self, prompts: Prompts, params: Sequence[SamplingParams], keys: Sequence[str]) -> Samples:
        began = time.monotonic()
        yield from super().sample(prompts, params, keys)
        self.seconds.append(time.monotonic() - began)


def network(out: Path) -> Path:
    base = keys_of("micro")["base"]
    base["model"] |= {"max_position_embeddings": LENGTH, "num_hidden_layers": LAYERS}
    return stage(pretrain, pretrain.PretrainConfig, out / "base", base | {"steps": 1, "optimizer": {"lr": 1e-8}})


def steps(model: Path, out: Path, verifier: Path, prompts: int, count: int) -> tuple[list[float], list[float]]:
    """Seconds of a run's steps, the first one too, and of the sampling in each."""
    values = {
        "model": str(model), "tasks": [str(verifier)], "form": {"chat": False, "lenient": True}, "steps": 1 + count,
        "prompts_per_step": prompts, "group_size": GROUP, "sampling": {"max_tokens": LENGTH - 64},
        "loss": {"kl": 0.0}, **COMMON,
    }  # fmt: skip
    sampler = ClockedSampler(model)
    rl.run(rl.RLConfig.parse(values, out.name), out, sampler)
    rows = read_jsonl(out / "metrics.jsonl")
    ends = [0.0, *(row["seconds"] for row in rows)]
    return [after - before for before, after in pairwise(ends)], sampler.seconds


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, nargs="+", default=[8, 12], help=f"a step, {GROUP} answers each")
    parser.add_argument("--seconds", type=float, default=1.0, help="that the slow verifier sleeps")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5, help="counted steps of a run")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    kept = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    model = network(given.out)
    verifiers = {}
    for name, seconds in (("free", 0.0), ("slow", given.seconds)):
        verifiers[name] = given.out / f"{name}.py"
        verifiers[name].write_text(VERIFIER.format(seconds=seconds), encoding="utf-8")
    print(describe_machine("cpu").cpu)
    print("| answers | sampling, s | capacity | free, s a step | slow | slow / free | first step, free | slow |")
    print("|---|---|---|---|---|---|---|---|")
    for prompts in given.prompts:
        took: dict[str, list[list[float]]] = {name: [] for name in verifiers}
        sampling = list[float]()
        for turn in range(given.turns):
            for name, verifier in verifiers.items():
                out = given.out / f"{name}-{prompts}-{turn}"
                each, sampled = steps(model, out, verifier, prompts, given.steps)
                took[name].append(each)
                sampling += sampled[1:] if name == "free" else []
        free, slow = ([second for run in took[name] for second in run[1:]] for name in verifiers)
        ratios = [b / a for a, b in zip(free, slow, strict=True)]
        capacity = MOST_WORKERS * statistics.median(sampling) / given.seconds
        firsts = [spread([run[0] for run in took[name]]) for name in verifiers]
        cells = [str(GROUP * prompts), spread(sampling), f"{capacity:.0f}", *map(spread, (free, slow, ratios)), *firsts]
        print(f"| {' | '.join(cells)} |", flush=True)
        result[f"{GROUP * prompts} answers, {given.seconds:g} s"] = {"seconds": took, "sampling": sampling}
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
