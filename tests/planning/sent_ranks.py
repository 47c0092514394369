"""What a training step sends: torchrun ... sent_ranks.py FOLDER EP writes FOLDER/rank-R.json, bytes by group size.

Counted are the numbers that each process hands to its collectives, as a ring sends them: of a gather and of a
reduce-scatter over n processes all parts but one's own; of an all-to-all what is for others.
"""

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.training.batch import Rows
from slingshot.training.language_model import LanguageModelLoss, language_model_step
from slingshot.training.parallel import Parallel

CONTEXT, MICROBATCHES = 128, 2
CONFIG = ModelConfig(
    family="deepseek_v3", vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=4,
    num_attention_heads=4, initializer_range=0.1, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
    qk_rope_head_dim=16, v_head_dim=16, moe_intermediate_size=64, n_routed_experts=16, n_shared_experts=1,
    num_experts_per_tok=4, n_group=4, topk_group=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip


class Sent(TorchDispatchMode):
    def __init__(self, own):
        super().__init__()
        self.own, self.bytes = own, Counter()  # this process's place in an all-to-all

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = str(function)
        if name.startswith("c10d._allgather_base_"):
            whole, part = args[0].nbytes, args[1].nbytes
            self.bytes[f"weights over {whole // part}"] += whole - part
        elif name.startswith("c10d._reduce_scatter_base_"):
            part, whole = args[0].nbytes, args[1].nbytes
            self.bytes[f"gradients over {whole // part}"] += whole - part
        elif name.startswith("c10d.alltoall_base_") and sum(splits := args[4]):
            self.bytes["experts"] += args[1].nbytes * (1 - splits[self.own] / sum(splits))
        return function(*args, **(kwargs or {}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, shared = Path(sys.argv[1]), int(sys.argv[2])
    with Parallel.start(shared) as me:
        model = Transformer.empty(CONFIG, me.device, shard=me.shard)
        model.init_weights(torch.Generator().manual_seed(0))
        drawn = torch.Generator().manual_seed(me.dp_rank)
        tokens_BT = torch.randint(0, CONFIG.vocab_size, (MICROBATCHES, CONTEXT), generator=drawn)
        rows = Rows(tokens_BT, torch.ones_like(tokens_BT), torch.ones(tokens_BT.shape))
        with Sent(me.dp_rank % shared) as sent:
            language_model_step(model, rows, LanguageModelLoss(), 1, me)
        (folder / f"rank-{me.dp_rank}.json").write_text(json.dumps(sent.bytes))
