"""The peak memory of some training steps: python peak.py CONFIG MEMORY TOKENS DTYPE prints the bytes of this process
beyond what it had before the model was made, and the processor's seconds of the last step. CONFIG and MEMORY are JSON;
two micro-batches of so many tokens a step."""

import json
import sys
import time

import torch

from slingshot.machine.memory import peak_host_memory_bytes
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.training.batch import Rows
from slingshot.training.language_model import LanguageModelLoss, MemoryConfig, language_model_step
from slingshot.training.optimizer import Optimizer, OptimizerConfig
from slingshot.training.parallel import Parallel


def train(config, memory, tokens, compute):
    parallel = Parallel.start()
    model = Transformer.empty(config, parallel.device)
    model.init_weights(torch.Generator().manual_seed(0))
    model.compute_dtype = getattr(torch, compute)
    memory.apply(model)
    optimizer = Optimizer(model, OptimizerConfig(name="adamw"))
    for step in range(3):
        start = time.process_time()
        shape = 2 * tokens // 256, 256
        tokens_BT = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(step))
        rows = Rows(tokens_BT, torch.ones_like(tokens_BT), torch.ones(shape))
        language_model_step(model, rows, LanguageModelLoss(), shape[0] // 2, parallel)
        optimizer.step(1.0)
    return time.process_time() - start


if __name__ == "__main__":
    torch.set_num_threads(1)
    config, memory = ModelConfig(**json.loads(sys.argv[1])), MemoryConfig(**json.loads(sys.argv[2]))
    small = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 64, "num_hidden_layers": 2}
    train(config.model_copy(update=small), memory, 256, sys.argv[4])  # libraries take memory of their own at first
    before = peak_host_memory_bytes()
    seconds = train(config, memory, int(sys.argv[3]), sys.argv[4])
    print(json.dumps([peak_host_memory_bytes() - before, seconds]))
