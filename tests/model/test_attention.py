"""Attention: norms, both ways of computing softmax, and the cache: absorbed MLA and cached GQA equal the full forward pass."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slingshot.config import ModelConfig
from slingshot.model.attention import RMSNorm, attend
from slingshot.model.cache import Cache
from slingshot.model.transformer import Transformer

TIME = 12


@pytest.fixture(scope="module", params=["mla", "mla_yarn", "gqa"])
def model(
    request: pytest.FixtureRequest, make_model: Callable[..., Transformer], deepseek: Callable[..., ModelConfig], dense: Callable[..., ModelConfig]
) -> Transformer:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "mscale_all_dim": 1.0}
    config = {"mla": deepseek(), "mla_yarn": deepseek(q_lora_rank=None, rope_scaling=yarn), "gqa": dense(qk_norm=True)}[request.param]
    return make_model(config)


def tokens(rows: int, time: int = TIME) -> Tensor:
    return torch.randint(0, 64, (rows, time), generator=torch.Generator().manual_seed(1))


def test_rms_norm_by_hand() -> None:
    norm = RMSNorm(2, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 10.0]))
    # mean square of (1, 3) is 5; sqrt(5.5) = 2.345208
    assert torch.allclose(norm(torch.tensor([1.0, 3.0])), torch.tensor([1 / 2.345208, 30 / 2.345208]))


@pytest.mark.parametrize("value_width", [3, 8, 11])
@pytest.mark.parametrize("time", [7, 257])
def test_both_kernels_are_softmax_attention(time: int, value_width: int) -> None:
    """Against the definition, with a mask (plain products up to 256 tokens, the fused kernel beyond) and without (causal)."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 2, time, 8, generator=generator) for _ in range(2))
    v = torch.randn(1, 2, time, value_width, generator=generator)
    causal = torch.ones(time, time, dtype=torch.bool).tril()
    expected = (q @ k.mT * 0.7).masked_fill(~causal, -torch.inf).softmax(-1) @ v
    assert torch.allclose(attend(q, k, v, causal[None, None], 0.7), expected, atol=1e-5)
    assert torch.allclose(attend(q, k, v, None, 0.7), expected, atol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=12)
@given(cuts=st.sets(st.integers(1, TIME - 1)))
def test_cached_logits_equal_the_full_forward_pass_however_the_tokens_come(model: Transformer, cuts: set[int]) -> None:
    tokens_BT = tokens(2)
    cache = Cache(model.config, slots=4, length=TIME + 3, dtype=torch.float32)
    positions = torch.arange(TIME).expand(2, TIME)
    with torch.no_grad():
        parts = [
            model(tokens_BT[:, a:b], positions[:, a:b], cache=cache.view(1, 2, extent=b)).logits_BTV for a, b in pairwise([0, *sorted(cuts), TIME])
        ]
        expected = model(tokens_BT).logits_BTV
    assert expected.std() > 1
    assert (torch.cat(parts, dim=1) - expected).abs().max() < 1e-4


def test_rows_of_different_lengths_decode_together(model: Transformer) -> None:
    """Right padding in a prefill is overwritten or masked, and so is whatever an earlier sequence left in the slot."""
    tokens_BT, lengths = tokens(2), torch.tensor([3, 8])
    cache = Cache(model.config, slots=2, length=TIME, dtype=torch.float32)
    for layer in cache.data:
        layer.fill_(1e3)
    with torch.no_grad():
        model(tokens_BT[:, :8], torch.arange(8).expand(2, 8), cache=cache.view(0, 2))
        expected = model(tokens_BT).logits_BTV
        for step in range(4):
            positions_B1 = (lengths + step)[:, None]
            logits = model(tokens_BT.gather(1, positions_B1), positions_B1, cache=cache.view(0, 2)).logits_BTV
            assert (logits[:, 0] - expected[torch.arange(2), lengths + step]).abs().max() < 1e-4


def test_the_cache_holds_the_latent_only(make_model: Callable[..., Transformer], deepseek: Callable[..., ModelConfig]) -> None:
    """DeepSeek-V3's figure: kv_lora_rank + qk_rope_head_dim numbers a token and layer, whatever the number of heads; no slot for the MTP module."""
    cache = Cache(deepseek(num_attention_heads=4), slots=2, length=5, dtype=torch.float32)
    assert [layer.shape for layer in cache.data] == [(2, 5, 12 + 6)] * 3


def test_cache_rows_copy_and_grow(dense: Callable[..., ModelConfig]) -> None:
    config = dense()
    cache = Cache(config, slots=3, length=4, dtype=torch.float32)
    entries = torch.arange(2.0 * config.cache_width).view(1, 2, -1) + 1
    seen = cache.view(1, 1, extent=3).update(0, entries, torch.tensor([[2, 0]]))
    assert seen.shape == (1, 3, config.cache_width)
    assert torch.equal(seen[0, [2, 0]], entries[0]) and seen[0, 1].count_nonzero() == 0
    cache.copy(source=1, target=2, length=1)
    assert torch.equal(cache.data[0][2, 0], entries[0, 1]) and cache.data[0][2, 1:].count_nonzero() == 0
    before = cache.data[0].clone()
    cache.grow(6)
    assert cache.length == 6 and torch.equal(cache.data[0][:, :4], before) and cache.data[0][:, 4:].count_nonzero() == 0
    assert len({layer.shape for layer in cache.data}) == 1
