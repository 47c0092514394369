"""cost/flops.py against figures worked out by hand, DeepSeek-V3's published ones, and the network itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from slingshot.cost import flops
from slingshot.cost.flops import decode_parts, forward_flops, forward_parts, parameters, prefill_parts, training_parts
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer

# Widths are different primes or products of them, so that no two terms can be mistaken for each other.
TINY = ModelConfig(
    family="deepseek_v3", vocab_size=11, hidden_size=6, intermediate_size=7, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=None, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=4, moe_intermediate_size=3,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, num_nextn_predict_layers=1,
)  # fmt: skip
DENSE = ModelConfig(
    family="dense", vocab_size=13, hidden_size=8, intermediate_size=5, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=2, tie_word_embeddings=True,
)  # fmt: skip
V3 = ModelConfig.preset("deepseek-v3")

# TINY's attention matrices: q 6 x 2(3+2), kv_a 6 x (5+2), kv_b 5 x 2(3+4), o 2*4 x 6.
PROJECTIONS = 60 + 42 + 70 + 48
EXPERT = 3 * 6 * 3


def test_tiny_forward_by_hand() -> None:
    """Two documents of 3 and 2 tokens: 5 tokens, and 3*4/2 + 2*3/2 = 9 query-key pairs."""
    assert forward_parts(TINY, [3, 2]) == {
        "projections": 2 * 5 * 2 * PROJECTIONS, "attention": 2 * 9 * 2 * 2 * (5 + 4), "mlp": 2 * 5 * 3 * 6 * 7,
        "router": 2 * 5 * 6 * 4, "shared_experts": 2 * 5 * EXPERT, "routed_experts": 2 * 5 * 2 * EXPERT,
        "head": 2 * 5 * 6 * 11,
    }  # fmt: skip


def test_tiny_mtp_by_hand() -> None:
    """The module sees 2 and 1 tokens: 3 tokens and 3 + 1 pairs through one MoE block, eh_proj [6, 12] and the head."""
    block = 3 * (PROJECTIONS + 6 * 4 + 3 * EXPERT) + 4 * 2 * (5 + 4)
    by_hand = 2 * (block + 3 * (12 * 6 + 6 * 11))
    assert forward_parts(TINY, [3, 2], mtp=True)["mtp"] == by_hand
    assert sum(training_parts(TINY, [3, 2]).values()) == 3 * (forward_flops(TINY, [3, 2]) + by_hand)
    assert sum(training_parts(TINY, [3, 2], mtp=False).values()) == 3 * forward_flops(TINY, [3, 2])
    assert "mtp" not in forward_parts(TINY.model_copy(update={"num_nextn_predict_layers": 0}), [3, 2], mtp=True)


def test_tiny_generation_by_hand() -> None:
    """Prompt of 3; samples of 1 and 3 tokens share the prefill. The second decodes 2 tokens that see 4 and 5 keys of
    width 2*5+2."""
    weights = 2 * PROJECTIONS + 3 * 6 * 7 + 6 * 4 + 3 * EXPERT
    prefill = 2 * (3 * weights + 6 * 2 * 2 * (5 + 4) + 6 * 11)
    decode = 2 * (2 * weights + (4 + 5) * 2 * 2 * (2 * 5 + 2) + 2 * 6 * 11)
    assert flops.generation_flops(TINY, 3, [1]) == prefill
    assert flops.generation_flops(TINY, 3, [3]) == flops.generation_flops(TINY, 3, [1, 3]) == prefill + decode
    assert flops.generation_flops(TINY, 3, [3, 3]) == prefill + 2 * decode


def test_what_is_made_again_by_hand_and_by_the_network() -> None:
    """TINY's kv_b in three blocks, with queries' latents of 5 their product too; and what a count of the network's
    products is more."""
    assert flops.remade_flops(TINY, 5) == 2 * 5 * 3 * 70 and flops.remade_flops(DENSE, 5) == 0
    compressed = TINY.model_copy(update={"q_lora_rank": 5, "num_nextn_predict_layers": 0})
    counts = []
    for recompute in ("none", "selective"):
        model = Transformer(compressed)
        model.recompute = recompute
        with FlopCounterMode(display=False) as counter:
            model(torch.arange(5)[None]).logits_BTV.square().mean().backward()
        counts.append(counter.get_total_flops())
    assert counts[1] - counts[0] == flops.remade_flops(compressed, 5) == 2 * 5 * 2 * (70 + 5 * 2 * 5)


def test_dense_by_hand() -> None:
    """q and o 8 x 8, k and v 8 x 4; a tied head costs FLOPs but no parameters."""
    attention = 2 * 64 + 2 * 32
    assert forward_flops(DENSE, [4]) == 2 * (4 * (attention + 3 * 8 * 5 + 8 * 13) + 10 * 4 * (2 + 2))
    counts = parameters(DENSE)
    assert counts.total == counts.active == 13 * 8 + 2 * 8 + attention + 3 * 8 * 5 + 8
    assert (counts.embedding, counts.head, counts.mtp) == (104, 0, 0)
    assert flops.cache_bytes_per_token(DENSE, 4) == 2 * 2 * 2 * 4


def test_deepseek_v3_published_figures() -> None:
    """What tests/cost/test_published.py does not look at: a trained token with the MTP module, and the size of the
    released checkpoint."""
    counts = parameters(V3)
    assert round(3 * forward_flops(V3, [4096], mtp=True) / 4096 / 1e9, 1) == 260.6
    # The released checkpoint: MTP with its copies of embedding and head, router biases, and an FP32 scale per 128 x 128
    # block of FP8.
    biases = 59 * 256
    unscaled = 3 * (counts.embedding) + counts.head  # embedding, head and both copies
    scales = (counts.total + counts.mtp - unscaled / 2) / 128**2
    assert round((counts.total + counts.mtp + counts.embedding + counts.head + biases + scales) / 1e9, 2) == 684.53


CHANGES = [
    (TINY, {}), (TINY, {"q_lora_rank": 3, "tie_word_embeddings": True}), (DENSE, {}), (DENSE, {"qk_norm": True}),
    (TINY, {"n_shared_experts": 0, "first_k_dense_replace": 0}),
    (DENSE, {"attention_bias": True, "tie_word_embeddings": False}),
]  # fmt: skip


@pytest.mark.parametrize("config", [config.model_copy(update=change) for config, change in CHANGES])
def test_parameters_are_the_network_s_own(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config)
    counts = parameters(config)
    assert counts.total + counts.mtp == sum(parameter.numel() for parameter in model.parameters())


@given(st.lists(st.integers(1, 64), min_size=1, max_size=6))
def test_documents_add_up_and_packing_them_together_would_cost_more(lengths: list[int]) -> None:
    """Documents do not see each other, so a batch costs the sum of its documents, never more than one long document."""
    assert forward_flops(TINY, lengths) == sum(forward_flops(TINY, [length]) for length in lengths)
    assert forward_flops(TINY, lengths) <= forward_flops(TINY, [sum(lengths)])


def test_what_goes_on_from_another_document_meets_its_tokens_too() -> None:
    """Three tokens behind four of another: the last three of seven; the MTP module runs at two of them."""

    def cost(*lengths: int, mtp: bool, before: Sequence[int] = ()) -> float:
        return forward_flops(TINY, lengths, mtp, before=before) - mtp * forward_flops(TINY, lengths, before=before)

    for mtp, shared in ((False, 4), (True, 5)):
        behind = cost(6, 3, mtp=mtp, before=[0, 4]) - cost(6, mtp=mtp)
        assert behind == cost(7, mtp=mtp) - cost(shared, mtp=mtp) > 0


@given(st.integers(1, 50), st.integers(1, 50))
def test_dense_generation_equals_one_forward_pass(prompt: int, new: int) -> None:
    """Without absorption, decoding with a cache does the same products as a forward pass, but for the logits of the
    prompt."""
    skipped = 2 * (prompt - 1) * DENSE.hidden_size * DENSE.vocab_size
    assert flops.generation_flops(DENSE, prompt, [new]) == forward_flops(DENSE, [prompt + new - 1]) - skipped


def test_tiny_request_by_hand() -> None:
    """A prompt of 5 tokens, 2 of them cached: 3 tokens that meet 3 + 4 + 5 = 12 keys, 2 latents expanded again in 2
    layers by kv_b; then 4 tokens decoded that meet 7 keys each on average."""
    weights = 2 * PROJECTIONS + 3 * 6 * 7 + 6 * 4 + 3 * EXPERT
    read = 2 * (3 * weights + 2 * 2 * 70 + 12 * 2 * 2 * (5 + 4) + 6 * 11)
    assert sum(prefill_parts(TINY, 5, cached=2).values()) == read
    assert sum(decode_parts(TINY, 7, tokens=4).values()) == 2 * (4 * weights + 4 * 7 * 2 * 2 * (2 * 5 + 2) + 4 * 6 * 11)
    assert decode_parts(TINY, 7)["head"] == 2 * 6 * 11


def test_cached_latents_are_expanded_wherever_a_token_is_left_to_read() -> None:
    """V3: 61 layers of a 512-wide latent made 128 heads of 128 + 128 numbers; a dense model caches keys and values as
    they are."""
    again = prefill_parts(V3, 4000, cached=3000)["projections"] - prefill_parts(V3, 1000)["projections"]
    assert again == 2 * 3000 * 61 * 512 * 128 * 256
    assert prefill_parts(V3, 4000, cached=4000)["projections"] == 0
    assert prefill_parts(DENSE, 40, cached=30)["projections"] == prefill_parts(DENSE, 10)["projections"]
