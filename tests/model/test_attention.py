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

from slingshot.engine.slot_cache import SlotCache
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
    """Logits of a sequence that comes in pieces, in slots 1 and 2 of four."""
    rows, time = tokens_BT.shape
    cache = SlotCache(model.config, slots=4, length=time + 3, dtype=torch.float32)
    positions = torch.arange(time).expand(rows, time)
    pieces = [slice(a, b) for a, b in pairwise([0, *sorted(cuts), time])]
    contexts = (cache.context(1, positions[:, piece], extent=piece.stop) for piece in pieces)
    parts = zip(pieces, contexts, strict=True)
    return torch.cat([model(tokens_BT[:, piece], context=context).logits_BTV for piece, context in parts], dim=1)


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
@settings(derandomize=True, deadline=None, max_examples=25)
@example(cuts=set())
@given(cuts=st.sets(st.integers(1, TIME - 1)))
def test_cached_logits_equal_the_full_forward_pass_however_it_is_split(model: Transformer, cuts: set[int]) -> None:
    """Also in one piece, which only the cache makes different: absorbed, not expanded."""
    tokens_BT = tokens(2)
    assert deviation(in_pieces(model, tokens_BT, cuts), model(tokens_BT).logits_BTV) < TOLERANCE


@torch.no_grad()
@settings(derandomize=True, deadline=None, max_examples=30)
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
    cache = SlotCache(config, slots=2, length=time, dtype=torch.float32)
    packed = PackedContext(config, x_BTD[..., 0], None)
    cached = cache.context(0, torch.arange(time).expand(2, time))
    expanded, absorbed = (attention(x_BTD, context) for context in (packed, cached))
    assert (expanded - absorbed).abs().max() < 5e-6 * max(1.0, float(expanded.abs().max()))


@torch.no_grad()
def test_rows_of_different_lengths_decode_together(model: Transformer) -> None:
    """Right padding in a prefill is overwritten or masked, and so is whatever an earlier sequence left in the slot."""
    tokens_BT, lengths = tokens(2), torch.tensor([3, 8])
    cache = SlotCache(model.config, slots=2, length=TIME, dtype=torch.float32)
    for layer in cache.data:
        layer.fill_(1e3)
    model(tokens_BT[:, :8], context=cache.context(0, torch.arange(8).expand(2, 8)))
    expected = model(tokens_BT).logits_BTV
    for step in range(4):
        positions_B1 = (lengths + step)[:, None]
        logits = model(tokens_BT.gather(1, positions_B1), context=cache.context(0, positions_B1)).logits_BTV
        assert deviation(logits[:, 0], expected[torch.arange(2), lengths + step]) < TOLERANCE


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
    cache = SlotCache(ModelConfig.preset("deepseek-v3"), slots=2, length=3, dtype=torch.bfloat16)
    assert stored(cache.data) == 2 * 3 * 70272


@torch.no_grad()
def test_decoding_keeps_the_latent_and_the_rotated_key_and_nothing_else(make_model: Make, deepseek: Config) -> None:
    """In cache or model: kv_lora_rank + qk_rope_head_dim numbers a token and layer, whatever the heads."""
    for heads in (1, 4):
        model = make_model(deepseek(num_attention_heads=heads))
        cache = SlotCache(model.config, slots=2, length=5, dtype=torch.float32)
        before = stored(dict(model.named_modules()))
        model(tokens(2, 5), context=cache.context(0, torch.arange(5).expand(2, 5)))
        assert stored(dict(model.named_modules())) == before
        assert stored(cache.data) == 2 * 5 * 3 * (12 + 6) * 4
        for layer_BSC in cache.data:
            assert layer_BSC.count_nonzero() == layer_BSC.numel()


def test_a_slot_is_copied_up_to_a_length(dense: Config) -> None:
    cache = SlotCache(dense(), slots=3, length=4, dtype=torch.float32)
    for layer in cache.data:
        layer[1] = torch.randn(layer[1].shape, generator=torch.Generator().manual_seed(0))
    cache.copy(source=1, target=2, length=3)
    for layer in cache.data:
        assert torch.equal(layer[2, :3], layer[1, :3]) and layer[2, 3:].count_nonzero() == 0
