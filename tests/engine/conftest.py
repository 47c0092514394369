"""What the engine's tests share: a small tokenizer and random models of both families."""

import pytest
import torch

from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

TEXTS = [
    "What is 3+4-2? 3 plus 4 is 7, 7 minus 2 is 5.",
    "3+4-2はいくつ? 3足す4は7、7引く2は5。",
    "The end. Stop here, then go on until the end.",
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Products this small gain nothing from a second thread, and lose much on a busy machine: OpenMP threads wait for
    each other by spinning.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(TEXTS * 20, vocab_size=300)


def random_model(config, seed=0):
    """Weights large enough that the next token is far from uniform, and router biases that matter."""
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    model.init_weights(generator)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0.0, 0.1, generator=generator)
    return model


def family_config(family, vocab_size):
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    shape |= {"initializer_range": 0.3, "max_position_embeddings": 256}
    if family == "dense":
        return ModelConfig(family="dense", num_key_value_heads=2, **shape)
    mla = {"q_lora_rank": 12, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
    moe = {
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
    }
    return ModelConfig(family="deepseek_v3", first_k_dense_replace=1, num_nextn_predict_layers=1, **shape, **mla, **moe)


@pytest.fixture(scope="session", params=["deepseek_v3", "dense"])
def model(request, tokenizer):
    return random_model(family_config(request.param, tokenizer.vocab_size))


@pytest.fixture(scope="session")
def dense_model(tokenizer):
    return random_model(family_config("dense", tokenizer.vocab_size))
