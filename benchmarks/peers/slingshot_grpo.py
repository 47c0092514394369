"""slingshot's stage rl, for benchmarks/rl_step.py. See there for what is read and written."""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

setup = json.loads(sys.stdin.readline())
os.environ["OMP_NUM_THREADS"] = str(setup["threads"])

import slingshot  # noqa: E402 (torch reads the environment on import)
from slingshot.stages import rl  # noqa: E402

config = {
    "model": setup["model"],
    "tasks": setup["tasks"],
    "steps": len(setup["prompts"]) // setup["prompts_per_step"],
    "prompts_per_step": setup["prompts_per_step"],
    "group_size": setup["group_size"],
    "micro_batch_size": setup["prompts_per_step"] * setup["group_size"] // 4,
    "rewards": {"random": True},
    "sampling": {"max_tokens": setup["max_tokens"]},
    "optimizer": {"lr": setup["lr"]},
    "loss": {"kl": setup["kl"]},
    "dtype": setup["dtype"],
    "threads": setup["threads"],
    "seed": setup["seed"],
}
rl.run(rl.RLConfig.parse(config, "rl"), Path(setup["out"]))
lines = (Path(setup["out"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
rows = [json.loads(line) for line in lines]
samples = setup["prompts_per_step"] * setup["group_size"]
seconds = [later["seconds"] - earlier["seconds"] for earlier, later in pairwise(rows)]
tokens = [round(row["response_tokens"] * samples) for row in rows[1:]]
version = f"slingshot {slingshot.__version__}"
print(json.dumps({"version": version, "seconds": seconds, "tokens": tokens}), file=answer)
