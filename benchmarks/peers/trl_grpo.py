"""TRL's GRPOTrainer on a CPU, for benchmarks/rl_step.py. See there for what is read and written."""

import json
import os
import random
import sys
import time
from itertools import pairwise

# The libraries print on standard output too: the answer gets that descriptor, everything else goes to standard error.
answer = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)

setup = json.loads(sys.stdin.readline())
os.environ |= {"OMP_NUM_THREADS": str(setup["threads"]), "HF_HUB_OFFLINE": "1"}

import torch  # noqa: E402 (reads the environment on import)
import trl  # noqa: E402
from datasets import Dataset  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

torch.set_num_threads(setup["threads"])
coin, group, size = random.Random(0), setup["group_size"], setup["prompts_per_step"] * setup["group_size"]
steps, ends, lengths = len(setup["prompts"]) // setup["prompts_per_step"], [], []


def reward(completion_ids, **_):
    lengths.append(sum(map(len, completion_ids)))
    return [float(coin.random() < 0.5) for _ in completion_ids]


class Clock(TrainerCallback):
    def on_step_end(self, *_, **__):
        ends.append(time.perf_counter())


trainer = trl.GRPOTrainer(
    model=setup["model"],
    reward_funcs=reward,
    train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": text}]} for text in setup["prompts"]]),
    callbacks=[Clock()],
    args=trl.GRPOConfig(
        output_dir=setup["out"],
        max_steps=steps,
        per_device_train_batch_size=size // 4,
        gradient_accumulation_steps=4,
        num_generations=group,
        max_completion_length=setup["max_tokens"],
        shuffle_dataset=False,
        learning_rate=setup["lr"],
        lr_scheduler_type="constant",
        loss_type="dapo",
        epsilon_high=0.28,
        beta=setup["kl"],
        gradient_checkpointing=setup["checkpointing"],
        bf16=setup["dtype"] == "bfloat16",
        model_init_kwargs={"dtype": "float32"},
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
)
trainer.train()
seconds = [later - earlier for earlier, later in pairwise(ends)]
print(json.dumps({"version": f"TRL {trl.__version__}", "seconds": seconds, "tokens": lengths[1:]}), file=answer)
