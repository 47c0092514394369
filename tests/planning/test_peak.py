"""The peak of a process that trains is what the plan says, within 15%, as stages run; where native/heap is not built,
with every block that is freed given back to the system."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slingshot.machine.memory import HEAP
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Layout
from slingshot.planning.memory import PRECISIONS, Blocks, training_memory

SCRIPT = Path(__file__).with_name("peak.py")
TOKENS = 512
DENSE = {
    "family": "dense", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64,
}  # fmt: skip
MOE = {
    "family": "deepseek_v3", "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "q_lora_rank": None, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "moe_intermediate_size": 128, "n_routed_experts": 16, "n_shared_experts": 1,
    "num_experts_per_tok": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
}  # fmt: skip


def peak(config, memory, dtype):
    command = [sys.executable, SCRIPT, json.dumps(config), json.dumps(memory), str(TOKENS), dtype]
    exact = os.environ | {"OMP_NUM_THREADS": "1"} | ({} if HEAP.exists() else {"MALLOC_MMAP_THRESHOLD_": "131072"})
    found, _ = json.loads(subprocess.run(command, env=exact, capture_output=True, text=True, check=True).stdout)
    return found


@pytest.mark.parametrize(
    ("model", "memory", "dtype"),
    [
        (DENSE, {}, "float32"), (DENSE, {"recompute": "full"}, "float32"), (DENSE, {"logits_chunk": 128}, "float32"),
        (DENSE, {"recompute": "selective"}, "float32"), (DENSE, {}, "bfloat16"), (MOE, {}, "float32"),
        (MOE, {"recompute": "selective"}, "float32"), (MOE, {"recompute": "full"}, "bfloat16"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_training_takes_the_memory_that_is_planned(model, memory, dtype):
    layout = Layout(recompute=memory.get("recompute", "none"))
    chunk = memory.get("logits_chunk")
    planned = training_memory(Blocks(ModelConfig(**model), PRECISIONS[dtype]), layout, TOKENS, 2, chunk).total
    measured = peak(model, memory, dtype)
    print(f"planned {planned / 2**20:.0f} MiB, measured {measured / 2**20:.0f} ({measured / planned - 1:+.1%})")
    assert measured == pytest.approx(planned, rel=0.15)
