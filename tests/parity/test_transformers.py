"""transformers is the oracle: it loads what save_checkpoint writes and agrees in logits, loss and gradients; what it writes, we load."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slingshot.config import ModelConfig
from slingshot.data.tokenizer import Tokenizer
from slingshot.model.checkpoint import load_model, save_checkpoint
from slingshot.model.transformer import Transformer

Make = Callable[..., Transformer]

TOLERANCE = 1e-4  # of the logits' standard deviation
TIME = 40

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    yield
    transformers.logging.set_verbosity_warning()


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["3+4=7"], vocab_size=264)


def in_transformers(model: Transformer, tokenizer: Tokenizer, folder: Path) -> torch.nn.Module:
    """The model as transformers reads it from its checkpoint; every tensor it wants must be there, and only the MTP module be unknown to it."""
    folder.mkdir(exist_ok=True)
    save_checkpoint(folder, model, tokenizer)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not [name for name in info["missing_keys"] if model.config.n_shared_experts or "shared_experts" not in name]
    assert not info["mismatched_keys"]
    assert all(name.startswith(f"model.layers.{model.config.num_hidden_layers}.") for name in info["unexpected_keys"])
    return theirs


def by_their_names(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers stacks experts as we do, with gate and up projection in one dimension."""
    renamed = {}
    for name, gradient in gradients.items():
        if ".experts." in name and ".shared_experts." not in name:
            name = name.removesuffix(".weight")
            gradient = gradient.flatten(1, 2) if name.endswith("gate_up_proj") else gradient
        renamed[name] = gradient
    return renamed


def assert_agreement(model: Transformer, theirs: torch.nn.Module, seed: int = 0) -> None:
    """Logits with and without a segment mask, the loss, and the gradient of every parameter."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(0, model.config.vocab_size, (2, TIME), generator=generator)
    theirs.zero_grad()
    output = theirs(tokens_BT, labels=tokens_BT)
    output.loss.backward()
    scale = output.logits.std().item()
    assert scale >= 1, "logits too small for the comparison to mean anything"
    with torch.no_grad():
        causal = model(tokens_BT).logits_BTV
    assert (causal - output.logits).abs().max() <= TOLERANCE * scale

    model.zero_grad()
    masked = model(tokens_BT, segments_BT=torch.ones_like(tokens_BT)).logits_BTV
    assert (masked - output.logits).abs().max() <= TOLERANCE * scale
    loss = F.cross_entropy(masked[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten())
    loss.backward()
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-5)
    ours = by_their_names({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None and p.numel()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max() + 1e-7, name


@st.composite
def deepseek_changes(draw: st.DrawFn) -> dict[str, Any]:
    """Any combination of DeepSeek-V3's options, small."""
    groups = draw(st.sampled_from([1, 2, 4]))
    per_group = draw(st.integers(2, 4))
    topk_group = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    return {
        "num_hidden_layers": layers,
        "num_attention_heads": draw(st.integers(1, 4)),
        "q_lora_rank": draw(st.sampled_from([None, 20])),
        "qk_nope_head_dim": draw(st.sampled_from([4, 8])),
        "v_head_dim": draw(st.sampled_from([6, 14, 20])),  # narrower, equal and wider than a query
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
        "rope_scaling": draw(st.sampled_from([None, YARN, YARN | {"mscale": 0.7, "mscale_all_dim": 1.3}, YARN | {"beta_fast": 4.0, "factor": 10.0}])),
    }


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # transformers, of a model without shared experts
@settings(derandomize=True, deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(deepseek_changes())
def test_deepseek_v3_in_any_shape(
    make_model: Make, deepseek: Callable[..., ModelConfig], tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = make_model(deepseek(**changes, vocab_size=264, initializer_range=0.1))
    assert_agreement(model, in_transformers(model, tokenizer, tmp_path / "model"))


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_theta": 500000.0, "rope_scaling": LLAMA3}),
        ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 6}),
        ("qwen2", {"attention_bias": True, "num_key_value_heads": 1}),
        ("qwen3", {"qk_norm": True, "head_dim": 16, "rms_norm_eps": 1e-5}),
    ],
)
def test_the_dense_family(
    make_model: Make, dense: Callable[..., ModelConfig], tokenizer: Tokenizer, tmp_path: Path, kind: str, changes: dict[str, Any]
) -> None:
    model = make_model(dense(**changes, vocab_size=264))
    theirs = in_transformers(model, tokenizer, tmp_path / "model")
    assert theirs.config.model_type == kind
    assert_agreement(model, theirs)


def theirs_of(kind: str) -> transformers.PreTrainedConfig:
    common = {"vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "deepseek_v3":
        mla = {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 6, "v_head_dim": 10, "num_key_value_heads": 4}
        moe = {"moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 4, "topk_group": 2}
        return transformers.DeepseekV3Config(**common, **mla, **moe, first_k_dense_replace=1)
    if kind == "llama":
        return transformers.LlamaConfig(**common, num_key_value_heads=2, rope_parameters=LLAMA3 | {"rope_theta": 500000.0})
    family = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[kind]
    return family(**common, num_key_value_heads=2, **({"head_dim": 16} if kind == "qwen3" else {}))


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama", "qwen2", "qwen3"])
def test_what_transformers_writes_is_read(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(theirs_of(kind))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    theirs.save_pretrained(tmp_path)
    assert_agreement(load_model(tmp_path), theirs)


def test_greedy_decoding_is_the_same_text(make_model: Make, deepseek: Callable[..., ModelConfig], tokenizer: Tokenizer, tmp_path: Path) -> None:
    """transformers decodes from its expanded cache what we decode from the latent one."""
    from slingshot.engine.engine import Engine
    from slingshot.engine.sampling import SamplingParams

    model = make_model(deepseek(vocab_size=264, rope_scaling=YARN, max_position_embeddings=64))
    theirs = in_transformers(model, tokenizer, tmp_path / "model")
    prompt = list(range(100, 110))
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, temperature=None, top_p=None)[0].tolist()
    output = Engine(model, tokenizer).generate([prompt], SamplingParams(max_tokens=30, temperature=0.0))[0].outputs[0]
    assert output.token_ids == expected[len(prompt) :]
