"""The same training on any number of ranks: torchrun ... ranks.py FOLDER EP writes FOLDER/rank-R.json on each, of
which EP share experts."""

import json
import sys
from pathlib import Path

import torch

from slingshot.checkpoint.load_save import FolderWeights, load_model, load_weights
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.training.batch import Rows
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.fp8_training import train_in_fp8
from slingshot.training.language_model import LanguageModelLoss, MemoryConfig, language_model_step
from slingshot.training.optimizer import Optimizer, OptimizerConfig, update_router_biases
from slingshot.training.parallel import Parallel, whole
from slingshot.training.state import State, StateWriter

STEPS = 20
CONFIG = ModelConfig(
    family="deepseek_v3", vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=3, initializer_range=0.1, q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=8,
    qk_rope_head_dim=6, v_head_dim=10, moe_intermediate_size=16, n_routed_experts=8, n_shared_experts=1,
    num_experts_per_tok=3, n_group=4, topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip


def batch(step):
    """Five rows of 24 tokens, which two ranks cannot share evenly; documents of 7 tokens, a row half empty."""
    tokens_BT = torch.randint(0, 64, (5, 24), generator=torch.Generator().manual_seed(step))
    tokens_BT[:, 1:] = (tokens_BT[:, :-1] // 2 + tokens_BT[:, 1:] // 8) % 64  # something to learn
    segments_BT = (torch.arange(24) // 7 + 1).expand(5, 24).clone()
    segments_BT[4, 12:] = 0
    return Rows(tokens_BT, segments_BT, (segments_BT > 0).float())


def train_low(parallel):
    """Losses and gradient norms of four steps with products in FP8."""
    model = Transformer.empty(CONFIG, parallel.device, shard=parallel.shard)
    model.init_weights(torch.Generator().manual_seed(0))
    train_in_fp8(model, "block")
    optimizer = Optimizer(model, OptimizerConfig(lr=0.01, adam_lr=0.01))
    logged = []
    for step in range(4):
        loss = language_model_step(model, batch(step).shard(parallel), LanguageModelLoss(), 2, parallel).loss
        logged.append([loss, optimizer.step(1.0)])
    return logged


def train(parallel, folder, **memory):
    """20 steps; half-way the state is saved into a folder, and a new model and optimizer take it back."""

    def start():
        model = Transformer.empty(CONFIG, parallel.device, shard=parallel.shard)
        model.init_weights(torch.Generator().manual_seed(0))
        MemoryConfig(**memory).apply(model)
        return model, Optimizer(model, OptimizerConfig(lr=0.01, adam_lr=0.01))

    model, optimizer = start()
    logged = []
    for step in range(STEPS):
        losses = language_model_step(model, batch(step).shard(parallel), LanguageModelLoss(balance=0.01), 2, parallel)
        norm = optimizer.step(1.0)
        update_router_biases(model, losses.load_LE, 0.01)
        loads = [float(load.max()) for load in losses.load_LE]
        logged.append([losses.loss, losses.mtp_loss, losses.balance_loss, norm, *loads])
        if step == STEPS // 2:
            tensors, _ = Checkpointer.training_state(model, optimizer)
            StateWriter(folder, parallel, tensors, {"step": step + 1, "meter": {}, "info": {}}).commit()
            parallel.barrier()
            model, optimizer = start()
            restore(State(folder), model, optimizer)
    return {
        "losses": logged,
        "fp8": train_low(parallel),
        "biases": [layer.gate.e_score_correction_bias.tolist() for layer in model.moe_layers()],
        "weights": {name: whole(tensor).flatten()[:50].tolist() for name, tensor in model.state_dict().items()},
        "sharded": sorted({hasattr(parameter, "full_tensor") for parameter in model.parameters()}),
        "gathered": parallel.gather(parallel.mine([{"row": row, "text": "é"} for row in range(5)])),
        "sums": parallel.sums({"ranks": 1.0, "rank": float(parallel.dp_rank)}),
        "max": parallel.max(parallel.dp_rank),
    }


def read(parallel, folder):
    """Fill a sharded model from a checkpoint and count the bytes that took."""
    weights = FolderWeights(folder)
    model = Transformer.empty(CONFIG, shard=parallel.shard)
    load_weights(model, weights)
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in model.state_dict().values()]
    own = sum(tensor.nbytes for tensor in local)
    expected = load_model(folder).state_dict()
    same = all(torch.equal(whole(tensor), expected[name]) for name, tensor in model.state_dict().items())
    size = (folder / "model.safetensors").stat().st_size
    return {"read": weights.shards.bytes_read, "own": own, "same": same, "file": size}


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Parallel.start(int(sys.argv[2])) as me:
        place = Path(sys.argv[1])
        again = train(me, place / "again", recompute="full", logits_chunk=16)["losses"]
        some = train(me, place / "some", recompute="selective")["losses"]
        found = train(me, place / "state") | {"again": again, "some": some, "reading": read(me, place / "model")}
        (place / f"rank-{me.dp_rank}.json").write_text(json.dumps(found))
