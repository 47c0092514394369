"""What does training in FP8 lose? A small DeepSeek-V3 on real text, bf16 beside FP8 by tiles and by whole matrices.

    .venv/bin/python benchmarks/fp8.py --out runs/fp8                 # prints Markdown, keeps benchmarks/fp8.json
    .venv/bin/python benchmarks/fp8.py --out runs/fp8 --seeds 0       # some of it: what is there already is kept

Of each seed all have the same weights at first, the same data in the same order, and bf16 activations but for one run
in float32 throughout, which shows how far runs part whose numbers differ least. AdamW as DeepSeek-V3's. Held out
are files of the standard library; their bits per byte are measured in the products of training, and of the same
checkpoint in bf16. Intervals are 95% t intervals over seeds of the difference to the run in bf16, in per cent.

A second table is of single products with normal factors of 1,024 x 512 in which one token or one channel is so many
times as large as the others (and what it is multiplied by as much smaller, so that it counts as the others do): the
median over rows of the relative error of output, gradient of the input and gradient of the weight.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch
from tiny import interval
from torch import Tensor

from slingshot.base.config import Strict
from slingshot.base.files import read_jsonl, write_json
from slingshot.checkpoint.load_save import load_model
from slingshot.cost.receipt import Receipt
from slingshot.machine.device import auto_dtype, describe_machine
from slingshot.quantization.fp8_product import FP8Scaling, fp8_matmul
from slingshot.stages import pretrain, tokenize
from slingshot.training.language_model import evaluate_loss
from slingshot.training.parallel import Parallel
from slingshot.training.shard_corpus import ShardCorpus

SCALINGS: tuple[FP8Scaling, ...] = ("block", "tensor")
ARMS: dict[str, dict[str, str]] = {
    "bf16": {"dtype": "bfloat16"}, "float32": {"dtype": "float32"},
    "block": {"dtype": "bfloat16", "fp8": "block"}, "tensor": {"dtype": "bfloat16", "fp8": "tensor"},
}  # fmt: skip
MODEL = {
    "family": "deepseek_v3", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 256, "kv_lora_rank": 32, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8, "v_head_dim": 32, "moe_intermediate_size": 128, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LAST = 20  # steps whose mean is the loss at the end of training
ALIVE: list[torch.library.Library] = []


def multiply_bfloat16_by_float32_units() -> None:
    """For processors that have no units for bfloat16, whose products take several times as long: factors are exact in
    float32, sums are float32's and rounded once, as those units do it."""
    library = torch.library.Library("aten", "IMPL")

    def taken_over(name: str) -> None:
        product = getattr(torch, name)

        def multiply(*factors: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
            wide = [each.float() for each in factors]
            scales = {"beta": beta, "alpha": alpha} if len(factors) == 3 else {}
            shape = *wide[-2].shape[:-1], wide[-1].shape[-1]
            return product(*wide, **scales, out=wide[-1].new_empty(shape)).to(factors[-1].dtype)

        library.impl(name, multiply, "CPU")

    for name in ("mm", "bmm", "addmm", "baddbmm"):
        taken_over(name)
    ALIVE.append(library)


def stage(module: Any, config: Strict, out: Path) -> Path:
    """The artifact of a stage, made where it is not there yet."""
    if not out.exists():
        module.run(config, out)
    return out


def in_bf16(run: Path, corpus: ShardCorpus) -> float:
    """Bits per byte of what is held out, as a run's receipt has them for the products it was trained in."""
    model = load_model(run).requires_grad_(False)
    model.compute_dtype = torch.bfloat16
    nats = sum(evaluate_loss(model, rows, 8, Parallel()) for rows in corpus.heldout)
    return nats / math.log(2) / corpus.heldout_bytes


def train(corpus: Path, arm: str, seed: int, steps: int, out: Path) -> dict[str, float]:
    """What a run came to: held-out bits per byte in its own products and in bf16, and its last training loss."""
    values = {
        "model": MODEL, "shards": [str(corpus)], "steps": steps, "batch_size": 4, "micro_batch_size": 4, "seed": seed,
        "optimizer": {"name": "adamw", "lr": 3e-3}, "threads": 1,
    }  # fmt: skip
    config = pretrain.PretrainConfig.parse(values | ARMS[arm])
    run = stage(pretrain, config, out / f"{arm}-{seed}")
    if not (found := run / "losses.json").exists():
        opened = ShardCorpus.open({corpus: 1.0}, config.sequence_length, seed)
        own, last = Receipt.read(run).extra["bits_per_byte"], [row["loss"] for row in read_jsonl(run / "metrics.jsonl")]
        bf16 = own if arm == "bf16" else in_bf16(run, opened)
        write_json(found, {"own": own, "bf16": bf16, "training": statistics.fmean(last[-LAST:])})
    return json.loads(found.read_text(encoding="utf-8"))


def errors(times: float, of: str, scaling: FP8Scaling) -> list[float]:
    """Median over rows of the relative error of output, gradient of the input and gradient of the weight."""
    generator = torch.Generator().manual_seed(0)
    x_ND, weight_FD, grad_NF = (torch.randn(rows, 512, generator=generator) for rows in (1024, 512, 1024))
    if of == "token":
        x_ND[5] *= times
        grad_NF[5] /= times
    else:
        x_ND[:, 5] *= times
        weight_FD[:, 5] /= times
    x_ND.requires_grad_(), weight_FD.requires_grad_()
    results = []
    for y_NF in (x_ND @ weight_FD.T, fp8_matmul(x_ND, weight_FD, scaling)):
        results.append([y_NF, *torch.autograd.grad(y_NF, (x_ND, weight_FD), grad_NF)])
    pairs = zip(*results, strict=True)
    return [float(((low - exact).norm(dim=1) / exact.norm(dim=1)).median()) for exact, low in pairs]


def outliers() -> dict[str, list[float]]:
    print("\n| one is larger | block: y, dx, dW | tensor: y, dx, dW |\n|---|---|---|")
    found = {}
    for of in ("token", "channel"):
        for power in (0, 8, 12, 14, 16, 20):
            shown = []
            for scaling in SCALINGS:
                found[f"{of} 2^{power} {scaling}"] = row = errors(2.0**power, of, scaling)
                shown.append(", ".join(f"{100 * error:.1f}%" for error in row))
            print(f"| {of}, 2^{power} times | {' | '.join(shown)} |")
    return found


def table(losses: dict[str, list[dict[str, float]]]) -> None:
    print("| products | held-out bits per byte by seed | difference, % (95%) | evaluated in bf16, % | in training, % |")
    print("|---|---|---|---|---|")
    for arm, runs in losses.items():
        shown = []
        for key in ("own", "bf16", "training"):
            pairs = zip(runs, losses["bf16"], strict=True)
            mean, low, high = interval([100 * (run[key] / base[key] - 1) for run, base in pairs])
            shown.append(f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" if arm != "bf16" else "")
        by_seed = ", ".join(f"{run['own']:.4f}" for run in runs)
        print(f"| {arm} | {by_seed} | {' | '.join(shown)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("--steps", type=int, default=150)
    given = parser.parse_args()
    if auto_dtype(torch.device("cpu")) == torch.float32:
        multiply_bfloat16_by_float32_units()
    tokens = {"text": ["stdlib"], "vocab_size": 1024, "heldout": 0.02, "threads": 1}
    corpus = stage(tokenize, tokenize.TokenizeConfig.parse(tokens), given.out / "corpus")
    losses = {arm: [train(corpus, arm, seed, given.steps, given.out) for seed in given.seeds] for arm in given.arms}
    if given.seeds == [0, 1, 2] and given.arms == list(ARMS):
        table(losses)
        machine = describe_machine("cpu").model_dump(mode="json")
        result = {"steps": given.steps, "model": MODEL, "losses": losses, "errors": outliers(), "machine": machine}
        Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
