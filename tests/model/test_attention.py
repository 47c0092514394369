"""Attention through each context alike: packed rows, the engine's cache, and one of the tests' own over flat tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slingshot.engine.batch import FlatBatch
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import PagedContext, TorchRunner
from slingshot.kernels.attention import attention_reference
from slingshot.model.attention import MLA
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context, PackedContext
from slingshot.model.transformer import Transformer

Make, Config = Callable[..., Transformer], Callable[..., ModelConfig]
TIME = 12
TOLERANCE = 2e-5  # of the logits' standard deviation, in float32; some five times what rounding makes

# Lengths beyond the original one, which is a third of the tests' sequences.
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "mscale_all_dim": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 4}


@pytest.fixture(scope="module", params=["mla", "mla, YaRN", "gqa", "gqa, YaRN", "gqa, Llama 3"])
def model(request: pytest.FixtureRequest, make_model: Make, deepseek: Config, dense: Config) -> Transformer:
    config = {
        "mla": deepseek(),
        "mla, YaRN": deepseek(q_lora_rank=None, rope_scaling=YARN),
        "gqa": dense(qk_norm=True),
        "gqa, YaRN": dense(attention_bias=True, rope_scaling=YARN),
        "gqa, Llama 3": dense(head_dim=10, num_key_value_heads=1, rope_scaling=LLAMA3),
    }[request.param]
    return make_model(config)


def tokens(rows: int, time: int = TIME) -> Tensor:
    return torch.randint(0, 64, (rows, time), generator=torch.Generator().manual_seed(1))


def in_pieces(model: Transformer, tokens_BT: Tensor, cuts: Iterable[int]) -> Tensor:
    """Logits of sequences that come in pieces, of pages that held something else."""
    (rows, time), cache = tokens_BT.shape, KVCache(model.config, 10, torch.float32)
    for layer in cache.layers:
        layer.fill_(1e3)
    runner, logits = TorchRunner(model, cache), []
    for start, stop in pairwise([0, *sorted(cuts), time]):
        parts = [(tokens_BT[row, start:stop].tolist(), start, [2 + 3 * row, 1 + 3 * row]) for row in range(rows)]
        output = runner.forward(FlatBatch.of(parts, wanted=range(rows * (stop - start))))
        logits.append(output.logits_RV.unflatten(0, (rows, -1)))
    return torch.cat(logits, dim=1)


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, of the standard deviation of what is expected."""
    assert expected.std() > 1
    return float((found - expected).abs().max() / expected.std())


class FlatContext(Context):
    """Tokens of several sequences one after the other, in any order: by the definition of attention."""

    def __init__(self, config: ModelConfig, rows_N: Tensor, positions_N: Tensor, absorb: bool) -> None:
        super().__init__(config, positions_N)
        self.absorb, self.rows_N, self.positions_N = absorb, rows_N, positions_N

    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        v = k_XGW[..., :v_XGV] if isinstance(v_XGV, int) else v_XGV
        same = self.rows_N[:, None] == self.rows_N
        mask_1NN = (same & (self.positions_N[:, None] >= self.positions_N))[None]
        return attention_reference(q_XHW[None], k_XGW[None], v[None], mask_1NN, scale)[0]


@torch.no_grad()
@pytest.mark.parametrize("absorb", [False, True])
def test_a_context_over_flat_tokens_serves_the_same_modules(model: Transformer, absorb: bool) -> None:
    """Three rows' tokens shuffled into one line: logits are those of the packed rows."""
    tokens_BT = tokens(3)
    order = torch.randperm(3 * TIME, generator=torch.Generator().manual_seed(0))
    rows, positions = (t.flatten()[order] for t in torch.meshgrid(torch.arange(3), torch.arange(TIME), indexing="ij"))
    context = FlatContext(model.config, rows, positions, absorb)
    found = model(tokens_BT.flatten()[order], context=context).logits_BTV
    assert deviation(found, model(tokens_BT).logits_BTV.flatten(0, 1)[order]) < TOLERANCE


@torch.no_grad()
@settings(max_examples=10)
@example(cuts=set())
@given(cuts=st.sets(st.integers(1, TIME - 1)))
def test_cached_logits_equal_the_full_forward_pass_however_it_is_split(model: Transformer, cuts: set[int]) -> None:
    """Also in one piece, which only the cache makes different: absorbed, not expanded."""
    tokens_BT = tokens(2)
    assert deviation(in_pieces(model, tokens_BT, cuts), model(tokens_BT).logits_BTV) < TOLERANCE


@torch.no_grad()
@given(
    shape=st.fixed_dictionaries({
        "num_attention_heads": st.integers(1, 6), "q_lora_rank": st.sampled_from([None, 20]),
        "kv_lora_rank": st.sampled_from([1, 12, 40]), "qk_nope_head_dim": st.sampled_from([1, 8, 15]),
        "qk_rope_head_dim": st.sampled_from([2, 6, 16]), "v_head_dim": st.sampled_from([1, 10, 30]),
        "rope_scaling": st.sampled_from([None, YARN, YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}]),
    }),
    time=st.integers(1, 300),
)  # fmt: skip
def test_expanded_and_absorbed_attention_are_one(deepseek: Config, shape: dict[str, Any], time: int) -> None:
    """The module alone, without a cache and with one. Rows over 256 tokens take another kernel when expanded."""
    config = deepseek(**shape)
    generator = torch.Generator().manual_seed(time)
    attention = MLA(config, layer=0)
    for parameter in attention.parameters():
        mean, deviation = (1.0, 0.3) if parameter.dim() == 1 else (0.0, parameter.shape[-1] ** -0.5)
        parameter.normal_(mean, deviation, generator=generator)
    x_BTD = torch.randn(2, time, config.hidden_size, generator=generator)
    pages = -(-time // 16)
    cache = KVCache(config, 1 + 2 * pages, torch.float32)
    batch = FlatBatch.of(([0] * time, 0, range(first, first + pages)) for first in (1, 1 + pages))
    expanded = attention(x_BTD, PackedContext(config, x_BTD[..., 0], None))
    absorbed = attention(x_BTD.flatten(0, 1), PagedContext(cache, batch)).view_as(expanded)
    assert (expanded - absorbed).abs().max() < 5e-6 * max(1.0, float(expanded.abs().max()))


def stored(thing: object) -> int:
    """Bytes of every tensor an object holds, directly or in its lists, dictionaries and parts."""
    if isinstance(thing, Tensor):
        return thing.untyped_storage().nbytes()
    if isinstance(thing, dict):
        return sum(map(stored, thing.values()))
    if isinstance(thing, list | tuple):
        return sum(map(stored, thing))
    return stored(vars(thing)) if hasattr(thing, "__dict__") else 0


def test_deepseek_v3_caches_70272_bytes_a_token() -> None:
    """Of 61 layers in bfloat16 (512 + 64 numbers each), as in "Insights into DeepSeek-V3" (ISCA'25), Table 1."""
    config, pages = ModelConfig.preset("deepseek-v3"), 2
    cache = KVCache(config, pages, torch.bfloat16)
    assert sum(layer.nbytes for layer in cache.layers) == pages * 16 * 70272
    assert KVCache.page_bytes(config, torch.bfloat16) == 16 * 70272


@torch.no_grad()
def test_decoding_keeps_the_latent_and_the_rotated_key_and_nothing_else(make_model: Make, deepseek: Config) -> None:
    """In cache or model: kv_lora_rank + qk_rope_head_dim numbers a token and layer, whatever the heads."""
    for heads in (1, 4):
        model = make_model(deepseek(num_attention_heads=heads))
        cache = KVCache(model.config, 2, torch.float32)
        before = stored(dict(model.named_modules()))
        TorchRunner(model, cache).forward(FlatBatch.of([(tokens(1, 5)[0].tolist(), 0, [1])]))
        assert stored(dict(model.named_modules())) == before
        for entries in cache.layers:
            assert entries.count_nonzero() == entries[1, :5].numel() == 5 * (12 + 6)


def test_pages_are_copied_whole(dense: Config) -> None:
    cache = KVCache(dense(), pages=4, dtype=torch.float32)
    for layer in cache.layers:
        layer[1:3] = torch.randn(layer[1:3].shape, generator=torch.Generator().manual_seed(0))
    before = [layer.clone() for layer in cache.layers]
    cache.copy([1, 2], [2, 3])
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer, old[[0, 1, 1, 2]])
