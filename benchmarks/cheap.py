"""What do sparse experts, latent attention, MTP and Muon gain over a dense model, in FLOPs, in time and in bytes sent?

    .venv/bin/python benchmarks/cheap.py --time            # processor time of a step, in turns; of experts by width
    .venv/bin/python benchmarks/cheap.py --plan            # where the plan says that it turns
    for seed in 0 1 2; do .venv/bin/slingshot run cheap --seed $seed --out runs/cheap-$seed; done
    .venv/bin/python benchmarks/cheap.py runs/cheap-0 runs/cheap-1 runs/cheap-2

Prints Markdown and keeps benchmarks/cheap.json. Intervals are 95% t intervals of the mean over seeds, paired by seed.
Costs to the dense model's loss are interpolated, log-linearly, between the lengths that the sparse one was trained for;
beyond them the nearest two are extended, and the cell says so. Time is a step's processor time times steps: runs share
machines. Bytes sent are `slingshot plan`'s, of one of 8 devices, in the layout in which the model sends least.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from tiny import interval

from slingshot.cost.devices import device
from slingshot.cost.flops import parameters
from slingshot.cost.receipt import Receipt
from slingshot.model.config import ModelConfig
from slingshot.model.moe import MLP, MoE
from slingshot.model.transformer import Transformer
from slingshot.planning.layout import layouts
from slingshot.planning.memory import PRECISIONS, Blocks
from slingshot.planning.network import transfers
from slingshot.planning.plan_training import plan_pretrain
from slingshot.planning.request import NamedModel, PretrainRequest
from slingshot.recipe.recipe import Recipe
from slingshot.stages.pretrain import PretrainConfig
from slingshot.training.batch import Rows
from slingshot.training.language_model import language_model_step
from slingshot.training.optimizer import Optimizer
from slingshot.training.parallel import Parallel

DENSE, SPARSE, LENGTHS = ("dense", "dense_fourfold"), "cheap", ("cheap_quarter", "cheap_half", "cheap")
WIDTHS = (192, 384, 768, 1536)
DEVICES = 8
SCALED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "kv_lora_rank",
          "moe_intermediate_size")  # fmt: skip


def configs() -> dict[str, PretrainConfig]:
    """The recipe's pre-training stages by name."""
    stages = [stage for stage in Recipe.load("cheap").stages if stage.kind == "pretrain"]
    return {each.name: PretrainConfig.parse(each.values | {"shards": ["."]}, each.name) for each in stages}


def step_seconds(names: list[str], turns: int, steps: int) -> dict[str, list[float]]:
    """Processor seconds of a whole step of each, the median of each turn; one thread, bfloat16, the recipe's shapes."""
    torch.set_num_threads(1)
    found: dict[str, list[float]] = {name: [] for name in names}
    works = {}
    with Parallel.start() as parallel:
        for name in names:
            config = configs()[name]
            model = Transformer.empty(config.shape(2048))
            model.init_weights(torch.Generator().manual_seed(0))
            model.compute_dtype = torch.bfloat16
            works[name] = config, model, Optimizer(model, config.optimizer)
        for turn in range(turns):
            for name, (config, model, optimizer) in works.items():
                seconds = []
                for step in range(steps):
                    generator = torch.Generator().manual_seed(100 * turn + step)
                    shape = config.batch_size, config.sequence_length
                    tokens_BT = torch.randint(0, 2048, shape, generator=generator)
                    rows = Rows(tokens_BT, torch.ones_like(tokens_BT), torch.ones(shape))
                    begin = time.process_time()
                    language_model_step(model, rows, config.loss, config.micro_batch_size, parallel)
                    optimizer.step(0.01)
                    seconds.append(time.process_time() - begin)
                found[name].append(statistics.median(seconds))
    return found


def width_rates(turns: int) -> dict[int, dict[str, list[float]]]:
    """FLOP/s of processor time, forward and backward over 4,096 tokens, of a SwiGLU layer and of one of experts with as
    many FLOPs a token, by the model's width."""
    rates: dict[int, dict[str, list[float]]] = {}
    for width in WIDTHS:
        given = configs()[SPARSE].shape(2048).model_dump() | {"hidden_size": width, "moe_intermediate_size": width // 3}
        config = ModelConfig.parse(given, "width")
        active = config.num_experts_per_tok + config.n_shared_experts
        layers = {"dense": MLP(width, active * width // 3), "experts": MoE(config)}
        rates[width] = {name: [] for name in layers}
        for layer in layers.values():
            for parameter in layer.parameters():
                torch.nn.init.normal_(parameter, std=width**-0.5)
        for turn in range(turns + 1):  # the first makes the libraries' code
            for name, layer in layers.items():
                x_ND = torch.randn(4096, width, dtype=torch.bfloat16, requires_grad=True)
                begin = time.process_time()
                y = layer(x_ND)
                (y[0] if isinstance(y, tuple) else y).float().square().mean().backward()
                seconds = time.process_time() - begin
                if turn:
                    rates[width][name].append(3 * 2 * 4096 * active * 3 * width * (width // 3) / seconds)
    return rates


def sent_bytes(config: PretrainConfig, shape: ModelConfig) -> tuple[float, str]:
    """Bytes that one of 8 devices sends in a step in which each has the recipe's batch, and the layout with fewest."""
    blocks, tokens = Blocks(shape, PRECISIONS["bfloat16"]), DEVICES * config.batch_size * config.sequence_length
    context = config.batch_size * config.sequence_length  # a micro-batch
    choices = layouts(shape, DEVICES, tp=1, pp=1, recompute="none")
    sums = {each: sum(t.n_bytes for t in transfers(blocks, each, device("h800"), tokens, context)) for each in choices}
    best = min(sums, key=lambda each: sums[each])
    return sums[best], str(best)


def planned(times: int) -> dict[str, dict[str, float]]:
    """What `slingshot plan` says of a step of each on one H800: the recipe's shapes so many times as wide, up to 8
    times as deep, a vocabulary of 32,768; 4M tokens a step in sequences of 4,096."""
    found = {}
    for name in (DENSE[0], SPARSE):
        given = configs()[name].shape(32_768).model_dump(exclude={"head_dim"})
        given |= {key: times * given[key] for key in SCALED if given[key]}
        given |= {"num_hidden_layers": min(times, 8) * given["num_hidden_layers"], "max_position_embeddings": 4096}
        config = ModelConfig.parse(given, name)
        asked = {"model": NamedModel(name=name, config=config), "device": "h800", "tokens": 4e9}
        dominates = plan_pretrain(PretrainRequest.parse(asked)).dominates
        seconds = {key: float(dominates[key]) for key in ("compute_seconds", "memory_traffic_seconds")}
        found[name] = {"total": parameters(config).total, "active": parameters(config).active, **seconds}
    return found


def at_loss(loss: float, costs: list[float], losses: list[float]) -> tuple[float, bool]:
    """The cost at which a falling curve is at `loss`, and whether that lies outside the curve."""
    points = sorted(zip(costs, losses, strict=True))
    inside = [i for i in range(len(points) - 1) if points[i][1] >= loss >= points[i + 1][1]]
    i = inside[0] if inside else 0 if loss > points[0][1] else len(points) - 2
    (x0, y0), (x1, y1) = points[i], points[i + 1]
    share = (loss - y0) / (y1 - y0)
    return math.exp(math.log(x0) + share * (math.log(x1) - math.log(x0))), not inside


def shown(values: list[float], form: str = "{:.2f}") -> str:
    mean, low, high = interval(values)
    by_seed = ", ".join(form.format(value) for value in values)
    return by_seed if len(values) < 2 else f"{by_seed}; {form.format(mean)} ({form.format(low)} to {form.format(high)})"


def tables(runs: list[Path], seconds: dict[str, list[float]]) -> dict[str, Any]:
    """Print what finished runs say; by stage and seed."""
    known = configs()
    receipts = {
        name: [Receipt.read(run / name) for run in runs if (run / name / "receipt.json").exists()] for name in known
    }
    receipts = {name: some for name, some in receipts.items() if some}
    bits = {name: [each.extra["bits_per_byte"] for each in some] for name, some in receipts.items()}
    steps = {name: known[name].steps for name in receipts}
    shapes = {name: known[name].shape(2048) for name in receipts}
    time_of = {name: statistics.median(seconds[name]) for name in seconds}
    time_of |= {name: time_of[base] for base, names in ((SPARSE, LENGTHS), (DENSE[0], DENSE)) for name in names
                if base in time_of}  # fmt: skip
    costs = {
        "FLOPs": {name: some[0].flops for name, some in receipts.items()},
        "processor seconds": {name: steps[name] * time_of[name] for name in receipts if name in time_of},
        "bytes sent": {name: steps[name] * sent_bytes(known[name], shapes[name])[0] for name in receipts},
    }
    print("| stage | parameters, active | steps | bits per byte by seed; mean (95%) | FLOPs | seconds | bytes sent |")
    print("|---|---|---|---|---|---|---|")
    for name in receipts:
        count, took = parameters(shapes[name]), costs["processor seconds"].get(name)
        sizes = f"{count.total / 1e6:.2f}M, {count.active / 1e6:.2f}M"
        cost = f"{costs['FLOPs'][name]:.2e} | {took and f'{took:.0f}'} | {costs['bytes sent'][name]:.2e}"
        print(f"| {name} | {sizes} | {steps[name]} | {shown(bits[name], '{:.3f}')} | {cost} |")
    print("\n| to the loss of | cost | dense over sparse, by seed; mean (95%) |\n|---|---|---|")
    found: dict[str, Any] = {"bits_per_byte": bits, "costs": costs, "gains": {}}
    for goal in (*DENSE, "dense_muon"):
        for kind, of in costs.items():
            if not {goal, *LENGTHS} <= of.keys():
                continue
            curves = zip(*(bits[name] for name in LENGTHS), strict=False)  # a seed each
            costs_here, pairs = [of[name] for name in LENGTHS], zip(bits[goal], curves, strict=False)
            met = [at_loss(loss, costs_here, list(losses)) for loss, losses in pairs]
            gains = [of[goal] / cost for cost, _ in met]
            found["gains"][f"{goal}, {kind}"] = gains
            beyond = " (extended beyond the lengths trained)" * any(outside for _, outside in met)
            print(f"| {goal} | {kind} | {shown(gains)}{beyond} |")
    print("\n| change | beside | bits per byte more, by seed | FLOPs | seconds |")
    print("|---|---|---|---|---|")
    for name in (each for each in receipts if each not in LENGTHS):
        also = DENSE if name.startswith("dense") else LENGTHS
        if beside := [each for each in also if each in receipts and each != name and steps[each] == steps[name]]:
            differences = [a - b for a, b in zip(bits[name], bits[beside[0]], strict=False)]
            ratios = [costs[kind][name] / costs[kind][beside[0]] for kind in ("FLOPs", "processor seconds")
                      if name in costs[kind]]  # fmt: skip
            shares = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {name} | {beside[0]} | {shown(differences, '{:+.3f}')} | {shares} |")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="*")
    parser.add_argument("--time", action="store_true")
    parser.add_argument("--plan", action="store_true")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    given = parser.parse_args()
    kept = Path(__file__).with_suffix(".json")
    result: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    if given.time:
        names = [name for name in configs() if name in (SPARSE, DENSE[0]) or name not in (*LENGTHS, *DENSE)]
        result["step_seconds"] = step_seconds(names, given.turns, given.steps)
        result["width_rates"] = width_rates(given.turns)
        print("| processor seconds of a step | median (lowest to highest) |\n|---|---|")
        for name, its in result["step_seconds"].items():
            print(f"| {name} | {statistics.median(its):.3f} ({min(its):.3f} to {max(its):.3f}) |")
        print("\n| width | dense layer, GFLOP/s | experts, GFLOP/s | share |\n|---|---|---|---|")
        for width, its in result["width_rates"].items():
            dense, experts = (statistics.median(its[name]) / 1e9 for name in ("dense", "experts"))
            print(f"| {width} | {dense:.0f} | {experts:.0f} | {experts / dense:.0%} |")
    if given.plan:
        result["planned"] = {times: planned(times) for times in (1, 2, 4, 8, 16)}
        print("| times as wide | dense: parameters; computing, memory | sparse, likewise | sparse over dense |")
        print("|---|---|---|---|")
        for times, its in result["planned"].items():
            longest, cells = [], []
            for name in (DENSE[0], SPARSE):
                both = [its[name][key] for key in ("compute_seconds", "memory_traffic_seconds")]
                sizes = ", ".join(dict.fromkeys(f"{its[name][key] / 1e6:.0f}M" for key in ("total", "active")))
                longest.append(max(both))
                cells.append(f"{sizes}; {both[0]:.2f} s, {both[1]:.2f} s")
            print(f"| {times} | {' | '.join(cells)} | {longest[1] / longest[0]:.2f} |")
    if given.runs:
        result["runs"] = tables(given.runs, result.get("step_seconds", {}))
    kept.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
