"""What does a training step hold, and how long does it take, with more or less computed again? On this machine.

    .venv/bin/python benchmarks/memory.py [--rounds 3] [--tokens 512] [--shapes dense experts] [--heaps kept returned]

In turns, each in a process of its own with one thread (tests/planning/peak.py): the peak beyond what the process had
before, beside what `slingshot plan` counts, and the processor's seconds of the third step of two micro-batches. With
memory kept from step to step, as stages run, or returned to the system at once (MALLOC_MMAP_THRESHOLD_). Printed, and
kept in benchmarks/memory.json: of each the median, lowest and highest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from slingshot.machine.device import describe_machine
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import RECOMPUTE, Layout
from slingshot.planning.memory import PRECISIONS, Blocks, training_memory

PEAK = Path(__file__).resolve().parent.parent / "tests" / "planning" / "peak.py"
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "family": "dense", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
    },
    "dense": {
        "family": "dense", "vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 12,
        "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64,
    },
    "experts": {
        "family": "deepseek_v3", "vocab_size": 8192, "hidden_size": 384, "intermediate_size": 1024,
        "num_hidden_layers": 8, "num_attention_heads": 6, "q_lora_rank": 192, "kv_lora_rank": 128,
        "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64, "moe_intermediate_size": 192,
        "n_routed_experts": 24, "n_shared_experts": 1, "num_experts_per_tok": 4, "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


def measured(shape: dict[str, Any], recompute: str, tokens: int, dtype: str, heap: str) -> tuple[float, float]:
    command = [sys.executable, str(PEAK), json.dumps(shape), json.dumps({"recompute": recompute}), str(tokens), dtype]
    environment = (
        os.environ | {"OMP_NUM_THREADS": "1"} | ({"MALLOC_MMAP_THRESHOLD_": "131072"} if heap == "returned" else {})
    )
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    bytes_, seconds = json.loads(found)
    return bytes_ / 2**20, seconds


def spread(values: list[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES], default=["dense", "experts"])
    parser.add_argument("--heaps", nargs="+", choices=["kept", "returned"], default=["kept", "returned"])
    asked = parser.parse_args()
    cases = [(shape, way, heap) for shape in asked.shapes for way in RECOMPUTE for heap in asked.heaps]
    found = defaultdict[tuple[str, str, str], list[tuple[float, float]]](list)
    for _ in range(asked.rounds):
        for shape, way, heap in cases:
            found[shape, way, heap].append(measured(SHAPES[shape], way, asked.tokens, asked.dtype, heap))
            print(shape, way, heap, *found[shape, way, heap][-1], flush=True)
    rows = []
    for shape, way, heap in cases:
        blocks = Blocks(ModelConfig(**SHAPES[shape]), PRECISIONS[asked.dtype])
        planned = training_memory(blocks, Layout(recompute=way), asked.tokens, 2).total / 2**20
        peaks, seconds = (spread([*column]) for column in zip(*found[shape, way, heap], strict=True))
        rows.append({"shape": shape, "recompute": way, "heap": heap, "planned_mib": planned})
        rows[-1] |= {"peak_mib": peaks, "seconds": seconds}
        told = f"{peaks[0]:.0f} MiB ({peaks[0] / planned - 1:+.0%}), {planned:.0f} planned"
        print(f"{shape:8} {way:10} {heap:8} {told}; {seconds[0]:.2f} s ({seconds[1]:.2f} to {seconds[2]:.2f})")
    told = vars(asked) | {"machine": describe_machine().model_dump(), "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
