"""What does an update of reinforcement learning save by computing a group's prompt once? In turns, on this machine.

    .venv/bin/python benchmarks/shared_prompts.py [--rounds 3] [--threads 1]

Forward and backward over groups of responses (no sampling, no optimizer), once with each response whole and once with
prompts shared, in rows and micro-batches as the rl stage makes them; ids and weights are random. Printed and kept in
benchmarks/shared_prompts.json: of each shape the seconds of both, median, lowest and highest, and the ratio.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from losses import keys_of

from slingshot.machine.device import describe_machine
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.rollout.trajectory import Trajectory, pack, row_shape
from slingshot.tasks.loader import load_task
from slingshot.tasks.mixture import Item
from slingshot.tasks.task import Problem
from slingshot.training.parallel import Parallel
from slingshot.training.policy import PolicyLoss, PolicyRows, policy_step, trains_mtp

LENGTH = 256


def trajectories(config: ModelConfig, problems: int, group: int, prompt: int, response: int) -> list[Trajectory]:
    """Responses of exactly so many tokens to prompts of about so many."""
    generator, task, made = torch.Generator().manual_seed(0), load_task("arithmetic"), []

    def ids(count: int) -> list[int]:
        return torch.randint(config.vocab_size, (count,), generator=generator).tolist()

    for number in range(problems):
        item, asked = Item(task, Problem("", f"{number}"), f"{number}"), ids(prompt + number % 5 - 2)
        for index in range(group):
            each = Trajectory(item, asked + ids(response), [])
            each.mask[len(asked) :] = [1] * response
            each.logprobs, each.advantage = [-6.0 * sampled for sampled in each.mask], index - (group - 1) / 2
            made.append(each)
    return made


def seconds(model: Transformer, rows: PolicyRows, loss: PolicyLoss, micro_batch_size: int) -> float:
    started = time.perf_counter()
    policy_step(model, None, rows, len(rows), loss, 1.0, micro_batch_size, Parallel())
    model.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=["smollm2-50", "smollm2-300", "tiny"])
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    smollm2 = ModelConfig.preset("smollm2-135m")
    base = keys_of("tiny")["base"]
    tiny = ModelConfig.model_validate(base["model"] | {"vocab_size": base["vocab_size"]})
    shapes = {"smollm2-50": (smollm2, 8, 50, 64), "smollm2-300": (smollm2, 8, 300, 64), "tiny": (tiny, 16, 60, 120)}
    found: dict[str, Any] = {
        "machine": describe_machine().model_dump(mode="json"),
        "threads": given.threads,
        "problems": given.problems,
    }
    for name in given.shapes:
        config, group, prompt, response = shapes[name]
        model, loss = Transformer.empty(config), PolicyLoss(kl=0.0)
        model.init_weights(torch.Generator().manual_seed(0))
        each = trajectories(config, given.problems, group, prompt, response)
        own = 2 if trains_mtp(model, loss) else 1
        wide, few = row_shape(each, LENGTH, 32, Parallel(), own)
        forms = {"apart": (pack(each, LENGTH), 32), "shared": (pack(each, wide, own=own), few)}
        taken: dict[str, list[float]] = {form: [] for form in forms}
        for turn in range(given.rounds + 1):
            for form, (rows, micro_batch_size) in forms.items():
                spent = seconds(model, rows, loss, micro_batch_size)
                taken[form] += [spent] if turn else []
        ratio = statistics.median(taken["apart"]) / statistics.median(taken["shared"])
        tokens = {form: int((rows.segments_BT > 0).sum()) for form, (rows, _) in forms.items()}
        found[name] = {"tokens": tokens, "seconds": taken, "ratio": ratio}
        spreads = (
            f"{form} {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f}), {tokens[form]:,} tokens"
            for form, times in taken.items()
        )
        print(f"{name}: {', '.join(spreads)}: {ratio:.2f} times as fast", flush=True)
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
