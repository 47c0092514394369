"""What does a device make of training, decoding and reinforcement? One command, meant to end within 8 minutes on a GPU.

    .venv/bin/python benchmarks/gpu_train.py                                 # on a GPU: a DeepSeek-V3 of 1.1B weights
    .venv/bin/python benchmarks/gpu_train.py --shape tiny --out tiny.json    # anywhere, in seconds: whether it runs

Random weights and tokens. Training: whole steps with AdamW, float32 masters and products in bf16, then in FP8 as the
option `fp8` computes them: tokens a second, and FLOPs as receipts count them over the time and over the device's
measured peak of bf16 products (MFU). Decoding: tokens a second, and the bytes that a step has to read over its time
and over the measured bandwidth. Reinforcement: seconds of a step of the stage rl, sampling and update. Medians of
`--rounds` that follow one that does not count. What is printed is kept as it comes; a part that would begin after
`--minutes` is left out, and named.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from slingshot.base.files import read_jsonl
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.cli.bench import bench
from slingshot.cost.flops import forward_flops, parameters
from slingshot.engine.engine import Engine
from slingshot.machine.device import auto_device, describe_machine, machine_peak, measure_bandwidth
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization.fp8_product import FP8Scaling
from slingshot.stages import rl
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.batch import Rows
from slingshot.training.fp8_training import train_in_fp8
from slingshot.training.language_model import LanguageModelLoss, language_model_step
from slingshot.training.optimizer import Optimizer, OptimizerConfig
from slingshot.training.parallel import Parallel


@dataclass(frozen=True)
class Shape:
    """A model, and how much of everything: rows of `length` tokens in a training step, `batches` that decode `new`
    tokens after `prompt`, `prompts` problems of a group of 8 in a step of reinforcement."""

    model: dict[str, Any]
    rows: int
    length: int
    batches: tuple[int, ...]
    prompt: int
    new: int
    prompts: int


V3 = {"family": "deepseek_v3", "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
SHAPES = {
    "1b": Shape(
        V3 | {
            "vocab_size": 32768, "hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 16,
            "num_attention_heads": 12, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
            "v_head_dim": 128, "moe_intermediate_size": 512, "n_routed_experts": 24, "num_experts_per_tok": 4,
            "max_position_embeddings": 4096,
        },
        rows=8, length=4096, batches=(1, 64), prompt=128, new=128, prompts=16,
    ),
    "tiny": Shape(
        V3 | {
            "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
            "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
            "max_position_embeddings": 256,
        },
        rows=2, length=64, batches=(1, 4), prompt=8, new=8, prompts=2,
    ),
}  # fmt: skip


def train(
    config: ModelConfig, shape: Shape, fp8: FP8Scaling | None, rounds: int, device: torch.device
) -> dict[str, float]:
    """Whole steps: forward, losses, backward, optimizer."""
    model = Transformer.empty(config, device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02) if parameter.dim() > 1 else parameter.fill_(1.0)
        for buffer in model.buffers():
            buffer.zero_()
    model.compute_dtype = torch.bfloat16
    train_in_fp8(model, fp8)
    optimizer, parallel = Optimizer(model, OptimizerConfig(name="adamw", lr=1e-4)), Parallel(device=device)
    tokens_BT = torch.randint(config.vocab_size, (shape.rows, shape.length), device=device)
    rows = Rows(tokens_BT, torch.ones_like(tokens_BT), torch.ones_like(tokens_BT).float())
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        language_model_step(model, rows, LanguageModelLoss(), 1, parallel)
        optimizer.step(1.0)
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - start)
    step, count = statistics.median(seconds[1:]), shape.rows * shape.length
    flops = 3 * forward_flops(config, [shape.length] * shape.rows, mtp=True) / step
    found = {"tokens_per_second": count / step, "flops_per_second": flops, "first_step": seconds[0]}
    if device.type == "cuda":
        found["memory_gib"] = torch.cuda.max_memory_allocated(device) / 2**30
        torch.cuda.reset_peak_memory_stats(device)
    return found | {"mfu": flops / machine_peak(torch.bfloat16, device)}


def random_model(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint in bf16 with a tokenizer."""
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.cast(torch.bfloat16)
    folder.mkdir()
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")]
    save_checkpoint(folder, model, Tokenizer.train(texts, config.vocab_size))
    return folder


def decode(folder: Path, shape: Shape, rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    model = load_model(folder, dtype=torch.bfloat16, device=device).requires_grad_(False)
    engine = Engine(model, load_tokenizer(folder), max(shape.batches), shape.prompt + shape.new + 1)
    bandwidth = measure_bandwidth(device)
    found = {}
    for row in bench(engine, shape.batches, shape.prompt, shape.new, rounds):
        read = row.bytes_read / row.step_seconds
        rates = {"tokens_per_second": row.tokens_per_second, "bytes_per_second": read, "of_bandwidth": read / bandwidth}
        found[f"batch {row.batch}"] = rates
    return found


def reinforce(folder: Path, shape: Shape, rounds: int, out: Path) -> dict[str, float]:
    config = {
        "model": str(folder), "tasks": ["arithmetic"], "steps": rounds + 1, "prompts_per_step": shape.prompts,
        "group_size": 8, "micro_batch_size": 8, "sequence_length": shape.length, "rewards": {"random": True},
        "sampling": {"max_tokens": shape.new}, "loss": {"kl": 0.0}, "dtype": "bfloat16", "save_seconds": 3600.0,
    }  # fmt: skip
    rl.run(rl.RLConfig.parse(config, "rl"), out)
    rows = list(read_jsonl(out / "metrics.jsonl"))
    seconds = [later["seconds"] - earlier["seconds"] for earlier, later in pairwise(rows)]
    sampled = statistics.fmean(row["response_tokens"] for row in rows[1:]) * shape.prompts * 8
    return {"seconds": statistics.median(seconds), "responses": shape.prompts * 8, "tokens_sampled": sampled}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="1b on a GPU, tiny elsewhere")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    given = parser.parse_args(arguments)
    device, end = auto_device(), time.monotonic() + 60 * given.minutes
    name = given.shape or ("tiny" if device.type == "cpu" else "1b")
    shape, config = SHAPES[name], ModelConfig.parse(SHAPES[name].model)
    machine = describe_machine(device)
    size = parameters(config)
    result: dict[str, Any] = {"machine": machine.model_dump(mode="json"), "shape": name, "parts": {}}
    print(f"{machine.accelerator or machine.cpu}: {size.total:,} parameters, {size.active:,} active")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        parts: dict[str, Callable[[], Any]] = {
            "training in bf16": lambda: train(config, shape, None, given.rounds, device),
            "decoding": lambda: decode(random_model(config, folder), shape, given.rounds, device),
            "reinforcement": lambda: reinforce(folder, shape, given.rounds, Path(made) / "rl"),
            "training in FP8, block": lambda: train(config, shape, "block", given.rounds, device),
            "training in FP8, tensor": lambda: train(config, shape, "tensor", given.rounds, device),
        }
        for part, measure in parts.items():
            if time.monotonic() > end:
                print(f"{part}: left out, {given.minutes:g} minutes are over")
                continue
            result["parts"][part] = measure()
            print(f"{part}: {json.dumps(result['parts'][part])}", flush=True)
            given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
