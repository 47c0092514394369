"""How fast is pre-training beside transformers' DeepseekV3ForCausalLM? Same shape, batch, dtype and optimizer, no MTP.

    .venv/bin/python benchmarks/pretrain.py [--rounds 5] [--threads 2]

Both models train on the same random tokens in turns, a few steps a round, so that noise slows both alike. Printed and
kept in benchmarks/pretrain.json: tokens per second of each (median, lowest, highest round) and the ratio of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers

from slingshot.cost.flops import forward_flops
from slingshot.machine.device import auto_device, describe_machine, machine_peak
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.training.batch import Rows
from slingshot.training.language_model import LanguageModelLoss, language_model_step
from slingshot.training.optimizer import Optimizer, OptimizerConfig
from slingshot.training.parallel import Parallel

# 14.1M parameters
CONFIG = ModelConfig(
    family="deepseek_v3",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=768,
    moe_intermediate_size=192,
    num_hidden_layers=6,
    first_k_dense_replace=1,
    num_attention_heads=4,
    kv_lora_rank=64,
    qk_nope_head_dim=32,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=16,
    n_shared_experts=1,
    num_experts_per_tok=4,
    max_position_embeddings=1024,
)
BATCH, LENGTH, STEPS = 16, 256, 3


def ours(parallel: Parallel) -> Callable[[torch.Tensor], float]:
    model = Transformer(CONFIG)
    model.init_weights(torch.Generator().manual_seed(0))
    model.compute_dtype = torch.bfloat16
    optimizer = Optimizer(model, OptimizerConfig(name="adamw", lr=1e-3))

    def step(tokens_BT: torch.Tensor) -> float:
        segments_BT = torch.ones_like(tokens_BT)
        rows = Rows(tokens_BT, segments_BT, segments_BT.float())
        loss = language_model_step(model, rows, LanguageModelLoss(), BATCH, parallel).loss
        optimizer.step(1.0)
        return loss

    return step


def theirs(attention: str) -> Callable[[torch.Tensor], float]:
    config = transformers.DeepseekV3Config.from_dict(CONFIG.to_hf() | {"_attn_implementation": attention})
    model = transformers.DeepseekV3ForCausalLM(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step(tokens_BT: torch.Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens_BT, labels=tokens_BT).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    parallel = Parallel.start()
    tokens = [torch.randint(0, CONFIG.vocab_size, (BATCH, LENGTH)) for _ in range(STEPS)]
    runners = {"slingshot": ours(parallel), "transformers eager": theirs("eager"), "transformers sdpa": theirs("sdpa")}
    speeds: dict[str, list[float]] = {name: [] for name in runners}
    for round_index in range(options.rounds + 1):
        for name, step in runners.items():
            start = time.perf_counter()
            losses = [step(batch) for batch in tokens]
            if round_index:  # the first warms up
                speeds[name].append(STEPS * BATCH * LENGTH / (time.perf_counter() - start))
                print(
                    f"round {round_index}  {name:20}  {speeds[name][-1]:8,.0f} tokens/s  loss {losses[-1]:.3f}",
                    flush=True,
                )
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    best = max(medians[name] for name in medians if name != "slingshot")
    flops_per_token = 3 * forward_flops(CONFIG, [LENGTH] * BATCH, mtp=True) / (BATCH * LENGTH)
    result = {
        "tokens_per_second": {
            name: {"median": medians[name], "low": min(values), "high": max(values)} for name, values in speeds.items()
        },
        "ratio_to_best_peer": medians["slingshot"] / best,
        "mfu": medians["slingshot"] * flops_per_token / machine_peak(torch.bfloat16, auto_device()),
        "threads": options.threads,
        "transformers": transformers.__version__,
        "machine": describe_machine().model_dump(mode="json"),
    }
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(f"slingshot is {result['ratio_to_best_peer']:.2f} times as fast; its MFU is {result['mfu']:.1%}")


if __name__ == "__main__":
    main()
