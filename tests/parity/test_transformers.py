"""transformers is the oracle, in float32 on a CPU: it reads what save_checkpoint writes and agrees in logits, loss and
gradients, the MTP module included, over configurations drawn from all that the two families allow; what it writes, we
read; and it decodes the same text.

How many configurations were compared, and the worst deviations, stand at the end of the run.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from slingshot.checkpoint.load_save import load_model
from slingshot.model.config import ModelConfig, Yarn
from slingshot.model.rope import frequencies, rotation_scale
from slingshot.model.transformer import Transformer
from slingshot.text.tokenizer import Tokenizer

Config = Callable[..., ModelConfig]
Pair = Callable[..., tuple[Path, nn.Module]]
Compare = Callable[..., None]

WINDOW = 16  # the original context of everything scaled; rows are of 40 tokens
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=WINDOW, mscale=1.0, mscale_all_dim=1.0)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, original_max_position_embeddings=WINDOW, low_freq_factor=1.0, high_freq_factor=4.0
)

# DeepSeek-V3's own, V2's, one whose two temperatures differ, and one that interpolates other pairs. Without
# mscale_all_dim transformers departs from DeepSeek unless mscale is 1 (test_rope.py pins DeepSeek's formula).
SCALINGS = [
    None, YARN, YARN | {"factor": 40.0, "mscale": 0.707, "mscale_all_dim": 0.707},
    YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, YARN | {"factor": 10.0, "beta_fast": 4.0, "mscale_all_dim": 0.0},
]  # fmt: skip


@st.composite
def deepseek_changes(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of DeepSeek-V3's options, small, with no two widths alike."""
    groups = draw(st.integers(1, 4))
    per_group = draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.integers(1, 5)),
        "hidden_size": draw(st.sampled_from([32, 36, 45])),
        "intermediate_size": draw(st.sampled_from([40, 48, 51])),
        "moe_intermediate_size": draw(st.sampled_from([16, 19, 28])),
        "q_lora_rank": draw(st.sampled_from([None, 15, 20, 35])),
        "kv_lora_rank": draw(st.sampled_from([12, 17, 24])),
        "qk_nope_head_dim": draw(st.sampled_from([5, 8, 13])),
        "qk_rope_head_dim": draw(st.sampled_from([2, 4, 6, 10])),
        "v_head_dim": draw(st.sampled_from([7, 14, 25])),  # narrower, as wide as, and wider than a query
        "n_routed_experts": groups * per_group,
        "n_group": groups,
        "topk_group": topk_group,
        "num_experts_per_tok": draw(st.integers(1, min(4, topk_group * per_group))),
        "n_shared_experts": draw(st.integers(0, 2)),
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "norm_topk_prob": draw(st.booleans()),
        "routed_scaling_factor": draw(st.sampled_from([1.0, 2.5])),
        "tie_word_embeddings": draw(st.booleans()),
        "num_nextn_predict_layers": draw(st.integers(0, 1)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        "rope_theta": draw(st.sampled_from([100.0, 10000.0])),
        "rope_scaling": draw(st.sampled_from(SCALINGS)),
    }


WIDTHS = ["hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank"]
WIDTHS += ["qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"]


@pytest.mark.filterwarnings(
    "ignore:Initializing zero-element tensors"
)  # transformers, of a model without shared experts
@pytest.mark.parametrize("examples", [6, pytest.param(80, marks=pytest.mark.slow)])
def test_deepseek_v3_in_any_shape(pair: Pair, compare: Compare, deepseek: Config, examples: int) -> None:
    seen: list[ModelConfig] = []

    @settings(max_examples=examples)
    @given(deepseek_changes())
    def agree(changes: dict[str, Any]) -> None:
        config = deepseek(**changes, vocab_size=264)
        folder, theirs = pair(config)
        compare(load_model(folder), theirs, "deepseek_v3")
        seen.append(config)

    agree()
    assert len({str(config) for config in seen}) >= examples * 5 // 6
    if examples == 80:
        assert_every_option_was_drawn(seen)


def assert_every_option_was_drawn(seen: list[ModelConfig]) -> None:
    assert all(len({getattr(config, width) for width in WIDTHS}) == len(WIDTHS) for config in seen)
    with_experts = [config for config in seen if config.first_k_dense_replace < config.num_hidden_layers]
    assert {config.n_group for config in with_experts} == {1, 2, 3, 4} and any(
        config.topk_group < config.n_group for config in with_experts
    )
    assert {config.n_shared_experts for config in with_experts} == {0, 1, 2}
    assert any(config.first_k_dense_replace == 0 for config in seen) and any(
        config.first_k_dense_replace > 0 for config in with_experts
    )
    assert len(with_experts) < len(seen)  # all layers dense
    for option in ("tie_word_embeddings", "norm_topk_prob", "num_nextn_predict_layers", "routed_scaling_factor"):
        assert len({getattr(config, option) for config in with_experts}) == 2, option
    assert (
        sum(config.num_nextn_predict_layers and config.n_shared_experts > 0 for config in seen) >= 10
    )  # MTP modules that transformers can read
    assert {config.q_lora_rank is None for config in seen} == {True, False}
    assert len({str(config.rope_scaling) for config in seen}) == len(SCALINGS)


DENSE: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama (llama3 scaling)": {"rope_theta": 500000.0, "rope_scaling": LLAMA3},
    "llama (YaRN)": {"rope_scaling": YARN},
    "qwen2": {"attention_bias": True},
    "qwen2 (YaRN)": {
        "attention_bias": True,
        "rope_scaling": {key: YARN[key] for key in ("rope_type", "factor", "original_max_position_embeddings")},
    },
    "qwen3": {"qk_norm": True},
    "mistral": {},
}


@st.composite
def dense_changes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads = draw(st.integers(1, 3))
    return {
        "num_hidden_layers": draw(st.integers(1, 3)),
        "hidden_size": 72,  # transformers wants a multiple of the number of heads, even where head_dim is given
        "intermediate_size": draw(st.sampled_from([40, 91])),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
        "head_dim": draw(st.sampled_from([6, 10, 14])),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
    }


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ("llama", "qwen2", "qwen3"))) for kind in DENSE]
)
def test_the_dense_family_in_any_shape(pair: Pair, compare: Compare, dense: Config, kind: str) -> None:
    model_type = kind.split()[0]
    changes = (
        {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        if kind == "mistral"
        else {}
    )
    seen: list[ModelConfig] = []

    @settings(max_examples=10)
    @given(dense_changes())
    def agree(drawn: dict[str, Any]) -> None:
        config = dense(**DENSE[kind], **drawn, vocab_size=264)
        folder, theirs = pair(config, **changes)
        assert theirs.config.model_type == model_type
        compare(load_model(folder), theirs, kind)
        seen.append(config)

    agree()
    assert len({str(config) for config in seen}) >= 8
    assert any(config.head_dim * config.num_attention_heads != config.hidden_size for config in seen)
    assert any(config.num_attention_heads > config.num_key_value_heads > 1 for config in seen)
    assert {config.tie_word_embeddings for config in seen} == {True, False}


@given(
    width=st.sampled_from([2, 8, 64]),
    theta=st.sampled_from([10.0, 10000.0, 1e6]),
    original=st.sampled_from([1, 4, 300, 4096, 10**6]),
    factor=st.sampled_from([1.0, 4.0, 40.0]),
    betas=st.sampled_from([(32.0, 1.0), (4.0, 2.0), (1.0, 1.0)]),
    mscales=st.sampled_from(
        [
            {},
            {"mscale": 1.0, "mscale_all_dim": 1.0},
            {"mscale": 0.7, "mscale_all_dim": 1.3},
            {"mscale": 0.7, "mscale_all_dim": 0.0},
        ]
    ),
)
def test_rotary_tables_are_theirs_at_any_length(
    dense: Config,
    width: int,
    theta: float,
    original: int,
    factor: float,
    betas: tuple[float, float],
    mscales: dict[str, float],
) -> None:
    """Also where nothing or all is interpolated, or the ramp runs backwards: windows too short, too long for theta."""
    scaling = YARN | dict(
        factor=factor, original_max_position_embeddings=original, beta_fast=betas[0], beta_slow=betas[1]
    )
    del scaling["mscale"], scaling["mscale_all_dim"]
    for rope in (scaling | mscales, LLAMA3 | {"factor": factor, "original_max_position_embeddings": original}):
        config = dense(head_dim=width, rope_theta=theta, rope_scaling=rope)
        theirs = transformers.LlamaConfig(head_dim=width, rope_parameters={**rope, "rope_theta": theta})
        expected, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](theirs)
        torch.testing.assert_close(frequencies(config), expected, rtol=1e-6, atol=0)
        assert rotation_scale(config) == pytest.approx(scale, rel=1e-12)


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_logits_beyond_the_original_context_of_deepseek_v3s_yarn(
    pair: Pair, deepseek: Config, dense: Config, family: str
) -> None:
    """Factor 40 of 4,096 tokens: positions 4,096 to 4,599, as `pretrain` extends a model of either family."""
    yarn = Yarn(factor=40.0, original_max_position_embeddings=4096)
    made = deepseek(vocab_size=264) if family == "deepseek_v3" else dense(vocab_size=264, attention_bias=True)
    config = yarn.extended(made, family)
    assert config.max_position_embeddings == 163_840
    folder, theirs = pair(config)
    ours, tokens_BT = load_model(folder), torch.randint(0, 264, (1, 4600), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens_BT, logits_to_keep=504).logits
        hidden = ours(tokens_BT, segments_BT=torch.ones_like(tokens_BT), logits=False).hidden_BTD
        plain = Transformer.empty(made)
        plain.load_state_dict(ours.state_dict())
        unextended = plain.lm_logits(plain(tokens_BT, logits=False).hidden_BTD[:, -504:])
        found = ours.lm_logits(hidden[:, -504:])
    scale = float(expected.std())
    assert float((found - expected).abs().max()) < 2e-5 * scale
    assert float((unextended - expected).abs().max()) > 1e-2 * scale


COMMON = dict(vocab_size=264, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
MLA = dict(q_lora_rank=20, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=6, v_head_dim=10)
MOE = dict(moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=3, n_group=4, topk_group=2)
THEIRS: dict[str, tuple[type[transformers.PreTrainedConfig], dict[str, Any]]] = {
    "deepseek_v3": (
        transformers.DeepseekV3Config,
        MLA
        | MOE
        | dict(first_k_dense_replace=1, rope_parameters=YARN | {"rope_theta": 10000.0}, num_key_value_heads=4),
    ),
    "llama": (transformers.LlamaConfig, dict(rope_parameters=LLAMA3 | {"rope_theta": 500000.0})),
    "mistral": (transformers.MistralConfig, dict(sliding_window=None)),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, dict(head_dim=16)),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_what_transformers_writes_is_read(compare: Compare, kind: str, tmp_path: Path) -> None:
    """Its config.json has a form of its own, and mentions an MTP module that it does not save."""
    torch.manual_seed(0)
    family, changes = THEIRS[kind]
    theirs = transformers.AutoModelForCausalLM.from_config(family(**COMMON | dict(num_key_value_heads=2) | changes))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    assert ours.config.num_nextn_predict_layers == 0
    theirs.mtp = None
    compare(ours, theirs)


def test_greedy_decoding_is_the_same_text(pair: Pair, deepseek: Config, tokenizer: Tokenizer) -> None:
    """transformers decodes from its expanded cache what we decode from the latent one."""
    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams

    folder, theirs = pair(deepseek(vocab_size=264, rope_scaling=YARN, max_position_embeddings=64))
    prompt = list(range(100, 110))
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=30, do_sample=False, temperature=None, top_p=None
    )[0].tolist()
    output = (
        Engine(load_model(folder), tokenizer)
        .generate([prompt], SamplingParams(max_tokens=30, temperature=0.0))[0]
        .outputs[0]
    )
    assert output.token_ids == expected[len(prompt) :]
