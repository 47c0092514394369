"""GGUF models: written here as llama.cpp's converter writes them, they come back with their tensors, logits and
tokenizer; or are refused."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.read import GGUFWeights
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import load_model, load_tokenizer, to_hf_tensors
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer

Make = Callable[..., Transformer]
Config = Callable[..., ModelConfig]

CONTROL = ["<|end|>", "<|start|>"]
TOKENS = [*CONTROL, "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt", "12", "[unused]", "<|eot|>"]
TYPES = (
    [TokenType.CONTROL] * 2
    + [TokenType.USER_DEFINED]
    + [TokenType.NORMAL] * (len(TOKENS) - 5)
    + [TokenType.UNUSED, TokenType.CONTROL]
)
MERGES = ["h e", "Ġ t", "1 2"]
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}<tool>{% endif %}"
VOCABULARY: dict[str, Any] = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [int(kind) for kind in TYPES], "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eot_token_id": len(TOKENS) - 1,
    "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip

# llama.cpp's names; those of the MTP module stand behind `nextn.`.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm", "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm", "self_attn.kv_b_proj": "attn_kv_b",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "mlp.gate": "ffn_gate_inp",
    "mlp.experts.gate_proj": "ffn_gate_exps", "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp", "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp", "enorm": "nextn.enorm", "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens", "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}  # fmt: skip

LLAMA: dict[str, Any] = {
    "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
}  # fmt: skip
V3: dict[str, Any] = {"vocab_size": len(TOKENS), "max_position_embeddings": 128}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}


def interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """As llama.cpp stores q and k: row j of a head's first half, then row j of its second."""
    half = head_dim // 2
    return rows[[start + row for start in range(0, len(rows), head_dim) for j in range(half) for row in (j, half + j)]]


def tensors_of(model: Transformer, legacy: bool = False) -> dict[str, np.ndarray]:
    """The model's tensors under llama.cpp's names: experts stacked; keys and values of kv_b_proj apart unless
    `legacy`."""
    config, tensors = model.config, dict[str, np.ndarray]()
    for name, tensor in to_hf_tensors(model.config, model.state_dict()).items():
        array = tensor.numpy()
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        prefix, rest = (f"blk.{layer[1]}.", name[layer.end() :]) if layer else ("", name)
        if rest == "mlp.gate.e_score_correction_bias":
            tensors[f"{prefix}exp_probs_b.bias"] = array
            continue
        module, _, leaf = rest.rpartition(".")
        place = f"{prefix}{NAMES[re.sub(r'experts.[0-9]+', 'experts', module)]}.{leaf}"
        if ".experts." in module:
            before = [tensors[place]] if place in tensors else []
            tensors[place] = np.concatenate([*before, array[None]])
        elif module.endswith("kv_b_proj") and not legacy:
            heads = array.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            tensors[place.replace("kv_b", "k_b")] = heads[:, : config.qk_nope_head_dim].transpose(0, 2, 1)
            tensors[place.replace("kv_b", "v_b")] = heads[:, config.qk_nope_head_dim :]
        elif config.model_type == "llama" and module.endswith(("q_proj", "k_proj")):
            tensors[place] = interleaved(array, config.head_dim)
        else:
            tensors[place] = array
    return tensors


def keys_of(config: ModelConfig, legacy: bool = False) -> dict[str, Any]:
    """The architecture's keys, without its name in front."""
    keys: dict[str, Any] = {
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads, "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    if config.rope_scaling is not None and config.rope_scaling.rope_type == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": config.rope_scaling.factor}
        keys["rope.scaling.original_context_length"] = config.rope_scaling.original_max_position_embeddings
    if config.family == "dense":
        keys |= {"attention.head_count_kv": config.num_key_value_heads, "rope.dimension_count": config.head_dim}
        given = config.head_dim * config.num_attention_heads != config.hidden_size
        return keys | (
            dict.fromkeys(("attention.key_length", "attention.value_length"), config.head_dim) if given else {}
        )
    if config.rope_scaling is not None:
        keys["rope.scaling.yarn_log_multiplier"] = 0.1 * config.rope_scaling.mscale_all_dim
    widths = {"attention.key_length": config.qk_head_dim, "attention.value_length": config.v_head_dim}
    if legacy:
        keys |= widths | {"attention.head_count_kv": config.num_attention_heads}
    else:
        keys |= {f"{key}_mla": width for key, width in widths.items()} | {"attention.head_count_kv": 1}
        keys |= {"attention.key_length": config.cache_width, "attention.value_length": config.kv_lora_rank}
    keys["block_count"] += config.num_nextn_predict_layers
    optional = {"nextn_predict_layers": config.num_nextn_predict_layers, "attention.q_lora_rank": config.q_lora_rank}
    return (
        keys
        | {key: value for key, value in optional.items() if value}
        | {
            "attention.kv_lora_rank": config.kv_lora_rank, "rope.dimension_count": config.qk_rope_head_dim,
            "leading_dense_block_count": config.first_k_dense_replace,
            "expert_feed_forward_length": config.moe_intermediate_size,
            "expert_count": config.n_routed_experts, "expert_used_count": config.num_experts_per_tok,
            "expert_shared_count": config.n_shared_experts, "expert_gating_func": 2,
            "expert_group_count": config.n_group,
            "expert_group_used_count": config.topk_group, "expert_weights_scale": config.routed_scaling_factor,
            "expert_weights_norm": config.norm_topk_prob,
        }
    )  # fmt: skip


def write(
    path: Path,
    model: Transformer,
    kind: Type = Type.F32,
    keys: dict[str, Any] | None = None,
    legacy: bool = False,
    skip: tuple[str, ...] = (),
    extra: dict[str, np.ndarray] | None = None,
) -> None:
    """Write `model` with its matrices as `kind`; `keys` are put in (None takes one out), tensors of `skip` left out,
    `extra` ones added."""
    architecture = {"deepseek_v3": "deepseek2"}.get(model.config.model_type, model.config.model_type)
    values = (
        VOCABULARY
        | {f"{architecture}.{key}": value for key, value in keys_of(model.config, legacy).items()}
        | (keys or {})
    )
    writer = GGUFWriter(path, values.pop("general.architecture", architecture))
    adders: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array,
        bool: writer.add_bool,
    }  # fmt: skip
    for key, value in values.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, array in (tensors_of(model, legacy) | (extra or {})).items():
        if name not in skip:
            stored = kind if array.ndim > 1 and name != "blk.1.ffn_gate_inp.weight" else Type.F32
            writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(array), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def exact(model: Transformer, kind: Type) -> Transformer:
    """The model with its matrices rounded to what `kind` can hold."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.from_numpy(
                np.array(gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind))
            )
    return model


def assert_same(path: Path, model: Transformer, **changes: Any) -> None:
    """The file's configuration, logits (the MTP module's too) and tensors are the model's."""
    loaded = load_model(path)
    assert loaded.config == model.config.model_copy(update=changes)
    tokens, mtp = torch.tensor([[1, 40, 41, 2, 90, 7, 261, 15]]), model.config.num_nextn_predict_layers > 0
    with torch.no_grad():
        ours, source = (one(tokens, mtp=mtp and loaded.config.num_nextn_predict_layers > 0) for one in (loaded, model))
    assert torch.allclose(ours.logits_BTV, source.logits_BTV, atol=1e-5)
    assert ours.mtp_hidden_BTD is None or torch.allclose(ours.mtp_hidden_BTD, source.mtp_hidden_BTD, atol=1e-5)
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize(
    "kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name
)
def test_a_llama_in_every_type(make_model: Make, dense: Config, kind: Type, tmp_path: Path) -> None:
    model = exact(make_model(dense(**LLAMA)), kind)
    write(tmp_path / "m.gguf", model, kind)
    assert_same(tmp_path / "m.gguf", model)


@pytest.mark.parametrize("changes", [
    {"attention_bias": True, "rope_scaling": YARN},
    {"qk_norm": True, "head_dim": 32, "tie_word_embeddings": True},
    {"num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 32, "rope_scaling": YARN | {"factor": 2.5}},
    {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": LLAMA3},
    {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": LLAMA3 | {"factor": 8.0}, "tie_word_embeddings": True},
])  # fmt: skip
def test_the_dense_family(make_model: Make, dense: Config, changes: dict[str, Any], tmp_path: Path) -> None:
    model = make_model(dense(**LLAMA | changes))
    scaled = changes.get("rope_theta") == 500000.0
    write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors(model.config)} if scaled else None)
    assert_same(tmp_path / "m.gguf", model)


def factors(config: ModelConfig) -> np.ndarray:
    """Llama 3's, each pair's by the published rule: long wavelengths by `factor`, short ones not, those between by
    degrees."""
    scaling, values = config.rope_scaling, []
    assert scaling is not None
    for pair in range(config.head_dim // 2):
        wavelength = 2 * np.pi * config.rope_theta ** (2 * pair / config.head_dim)
        between = min(max((8192 / wavelength - 1) / 3, 0), 1)
        values.append(1 / ((1 - between) / scaling.factor + between))
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize("legacy", [False, True], ids=["split", "legacy"])
@pytest.mark.parametrize("changes", [
    {},
    {"q_lora_rank": None, "tie_word_embeddings": True, "norm_topk_prob": False, "routed_scaling_factor": 1.0},
    {"rope_scaling": YARN | MSCALE, "n_shared_experts": 2, "num_nextn_predict_layers": 0},
    {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_attention_heads": 1},
])  # fmt: skip
def test_a_deepseek(make_model: Make, deepseek: Config, changes: dict[str, Any], legacy: bool, tmp_path: Path) -> None:
    model = make_model(deepseek(**V3 | changes))
    write(tmp_path / "m.gguf", model, legacy=legacy)
    assert_same(tmp_path / "m.gguf", model)


def test_an_mtp_module_may_lack_its_copies_or_be_lacking(make_model: Make, deepseek: Config, tmp_path: Path) -> None:
    model = make_model(deepseek(**V3))
    write(tmp_path / "m.gguf", model, skip=("blk.3.nextn.embed_tokens.weight", "blk.3.nextn.shared_head_head.weight"))
    assert_same(tmp_path / "m.gguf", model)
    write(tmp_path / "m.gguf", model, skip=tuple(name for name in tensors_of(model) if name.startswith("blk.3.")))
    assert load_model(tmp_path / "m.gguf").config == model.config.model_copy(update={"num_nextn_predict_layers": 0})


def test_keys_that_are_silent(make_model: Make, dense: Config, deepseek: Config, tmp_path: Path) -> None:
    """llama.cpp's defaults, and keys that say what is so anyway."""
    model = make_model(dense(**LLAMA | {"num_key_value_heads": 4, "rope_theta": 10000.0}))
    silent = {"rope.freq_base": None, "attention.head_count_kv": None, "rope.dimension_count": None}
    idle = {
        "rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "expert_count": 0, "vocab_size": 1,
        "rope.scaling.attn_factor": 1.0,
    }  # fmt: skip
    write(tmp_path / "m.gguf", model, keys={f"llama.{key}": value for key, value in (silent | idle).items()})
    assert_same(tmp_path / "m.gguf", model)
    write(tmp_path / "m.gguf", model, keys={"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": 4.0})
    assert_same(tmp_path / "m.gguf", model)
    shape = {
        "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0,
        "norm_topk_prob": False,
    }  # fmt: skip
    model = make_model(deepseek(**V3 | shape))
    names = (
        "expert_group_count", "expert_group_used_count", "leading_dense_block_count", "expert_weights_scale",
        "expert_weights_norm",
    )  # fmt: skip
    write(tmp_path / "m.gguf", model, keys={f"deepseek2.{key}": None for key in names})
    assert_same(tmp_path / "m.gguf", model)


def test_leading_ones_of_a_shape_may_be_gone(make_model: Make, deepseek: Config, tmp_path: Path) -> None:
    """llama.cpp's quantizer writes a matrix of one row as a vector."""
    model = make_model(
        deepseek(**V3, n_routed_experts=1, num_experts_per_tok=1, n_group=1, topk_group=1, num_nextn_predict_layers=0)
    )
    flat = {name: array[0] for name, array in tensors_of(model).items() if array.ndim > 1 and len(array) == 1}
    assert {"blk.1.ffn_gate_inp.weight", "blk.1.ffn_up_exps.weight"} <= flat.keys()
    write(tmp_path / "m.gguf", model, extra=flat)
    assert_same(tmp_path / "m.gguf", model)


def test_k_quants_by_hand(make_model: Make, dense: Config, tmp_path: Path) -> None:
    # One block of 256 values a row. Q6_K: scale 1, six-bit 0 stands for -32. Q4_K: scales 1, minimum 0, nibbles 1 and 2
    # by turns of 32.
    one, zero = (np.float16(value).tobytes() for value in (1, 0))
    six = np.frombuffer(bytes(192) + b"\1" * 16 + one, dtype=np.uint8)
    four = np.frombuffer(one + zero + b"\1" * 12 + b"\x21" * 128, dtype=np.uint8)
    path = tmp_path / "m.gguf"
    source = make_model(dense(**LLAMA | {"intermediate_size": 256}))
    down = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    written = GGUFWriter.add_tensor

    def swapped(writer: GGUFWriter, name: str, array: np.ndarray, raw_dtype: Type) -> None:
        if "ffn_down" in name:
            raw_dtype, block = (Type.Q6_K, six) if "blk.0" in name else (Type.Q4_K, four)
            array = np.tile(block, (64, 1))
        written(writer, name, array, raw_dtype=raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "add_tensor", swapped)
        write(path, source)
    first, second = (load_model(path).state_dict()[name] for name in down)
    assert torch.equal(first, torch.full((64, 256), -32.0))
    assert torch.equal(second, torch.tensor([1.0, 2.0]).repeat_interleave(32).repeat(64, 4))


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q8_0], ids=lambda kind: kind.name)
def test_rows_are_those_of_the_whole(
    make_model: Make, dense: Config, deepseek: Config, kind: Type, tmp_path: Path
) -> None:
    widths = {
        "hidden_size": 64, "intermediate_size": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
        "moe_intermediate_size": 32,
    }  # fmt: skip
    for config in (dense(**LLAMA | {"attention_bias": False}), deepseek(**V3 | widths, q_lora_rank=32)):
        write(tmp_path / "m.gguf", make_model(config), kind)
        weights = GGUFWeights(tmp_path / "m.gguf")
        for spec in layout(config):
            if spec.copy_of is None:
                whole = weights.read(spec.name)
                assert whole.shape == spec.shape
                assert whole.dtype in (torch.float32, torch.bfloat16 if kind == Type.BF16 else torch.float32)
                rows = spec.shape[0]
                for start, stop in ((0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
                    assert torch.equal(weights.read(spec.name, slice(start, stop)), whole[start:stop]), spec.name
                assert weights.where(spec.name) == tmp_path / "m.gguf"


def test_dequantising_takes_little_memory(make_model: Make, dense: Config, tmp_path: Path) -> None:
    model = make_model(dense(**LLAMA | {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 1}))
    write(tmp_path / "m.gguf", model, Type.Q8_0)
    weights = GGUFWeights(tmp_path / "m.gguf")
    tracemalloc.start()  # knows numpy's memory, not the result, which is torch's
    try:
        up = weights.read("model.layers.0.mlp.up_proj.weight")
        assert up.nbytes == 2**26 and tracemalloc.get_traced_memory()[1] < up.nbytes / 2
    finally:
        tracemalloc.stop()


def test_the_tokenizer_comes_along(make_model: Make, dense: Config, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", make_model(dense(**LLAMA)))
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    ids = {token: id for id, token in enumerate(TOKENS)}
    # digits stand alone, whatever the merges say
    assert tokenizer.encode("he 12") == [ids[token] for token in ("he", "Ġ", "1", "2")]
    assert tokenizer.encode(" the") == [ids["Ġt"], ids["he"]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, None, len(TOKENS))
    assert tokenizer.eos_ids == {0, ids["<|eot|>"]} and tokenizer.control_ids == {0, 1, 2, ids["<|eot|>"]}
    asked = tokenizer.encode_chat([{"role": "user", "content": "he<tool>"}])
    assert asked == [1, ids["he"], *(ids[c] for c in "<tool>"), 0, 2]
    # user-defined tokens are text, control tokens are not
    assert tokenizer.decode([1, 2, ids["he"], 0, ids["[unused]"]]) == "<tool>he"
    assert tokenizer.config["add_bos_token"] is False


@pytest.mark.parametrize(("keys", "text", "expected"), [
    ({"pre": "gpt-2"}, "he 12", ["he", "Ġ", "12"]),
    # a whole piece that is a token needs no merge
    ({"pre": "llama-bpe", "merges": ["Ġ t"]}, "he 121", ["he", "Ġ", "1", "2", "1"]),
    ({"pre": "dbrx", "merges": ["Ġ t"]}, "he 121", ["h", "e", "Ġ", "1", "2", "1"]),
    ({"pre": "qwen2"}, "he 12 e\u0301", ["he", "Ġ", "1", "2", "Ġ", "Ã", "©"]),
    ({"pre": "deepseek-v3"}, "he 12", ["he", "Ġ", "12"]),
    ({"pre": None}, "he 12", ["he", "Ġ", "12"]),
])  # fmt: skip
def test_text_is_split_as_the_file_says(
    make_model: Make, dense: Config, tmp_path: Path, keys: dict[str, Any], text: str, expected: list[str]
) -> None:
    keys_ = {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    write(tmp_path / "m.gguf", make_model(dense(**LLAMA)), keys=keys_)
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert [TOKENS[id] for id in tokenizer.encode(text)] == expected
    assert tokenizer.config["add_bos_token"] is (keys["pre"] == "llama-bpe")


# Of which file, which keys are put otherwise, and what is said.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"general.architecture": "mamba"},
     "general.architecture 'mamba' is not supported; llama, qwen2, qwen3 and deepseek2 are"),
    ("llama", {"llama.block_count": None}, "key llama.block_count is missing"),
    ("llama", {"llama.block_count": "two"}, "llama.block_count must be of type int, got 'two'"),
    ("llama", {"llama.attention.head_count": 3}, "hidden_size 64 must divide evenly into num_attention_heads 3"),
    ("llama", {"llama.attention.head_count": 0},
     "num_attention_heads: Input should be greater than or equal to 1, got 0"),
    ("llama", {"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
    ("llama", {"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type 'longrope' is not supported, yarn is"),
    ("llama", {"llama.rope.scaling.factor": 2.0}, "llama.rope.scaling.type 'linear' is not supported, yarn is"),
    ("llama", {"llama.rope.scale_linear": 2.0}, "llama.rope.scaling.type 'linear' is not supported, yarn is"),
    ("llama", {"llama.rope.scaling.attn_factor": 2.0}, "llama.rope.scaling.attn_factor 2.0 is not supported, 1.0 is"),
    ("llama", {"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8 is not supported, 16 is"),
    ("llama", {"llama.attention.causal": False}, "llama.attention.causal False is not supported"),
    ("llama", {"llama.attention.sliding_window": 64},
     "the key 'llama.attention.sliding_window' could change what is computed"),
    ("llama", {"llama.block_count": 3}, "the tensor blk.2.attn_norm.weight is missing"),
    ("llama", {"llama.block_count": 2**31}, "num_hidden_layers: "),
    ("llama", {"llama.feed_forward_length": 128}, "blk.0.ffn_gate.weight has shape [96, 64], its keys say [128, 64]"),
    ("llama", {"llama.attention.layer_norm_rms_epsilon": float("nan")}, "got nan"),
    ("deepseek", {"expert_gating_func": 1},
     "deepseek2.expert_gating_func 1 is not supported, 2 is: DeepSeek-V3's sigmoid router"),
    ("deepseek", {"expert_gating_func": None}, "deepseek2.expert_gating_func 0 is not supported"),
    ("deepseek", {"attention.head_count_kv": 4}, "deepseek2.attention.head_count_kv 4 is not supported, 1 is"),
    ("deepseek", {"attention.key_length": 99}, "deepseek2.attention.key_length 99 is not supported, 18 is"),
    ("deepseek", {"rope.scaling.yarn_log_multiplier": None},
     "rope.scaling.yarn_log_multiplier 0 is not supported with YaRN"),
    ("deepseek", {"rope.scaling.yarn_ext_factor": 0.5},
     "deepseek2.rope.scaling.yarn_ext_factor 0.5 is not supported, 1.0 and -1.0 are"),
    ("deepseek", {"nextn_predict_layers": 2}, "'blk.2.attn_norm.weight' is no tensor of a plain deepseek2 model"),
    ("deepseek", {"expert_group_used_count": None}, "topk_group 0 must be between 1 and n_group 4"),
    ("deepseek", {"expert_group_count": 3}, "n_routed_experts 8 must divide evenly into n_group 3"),
    ("deepseek", {"expert_count": 9}, "n_routed_experts 9 must divide"),
    ("deepseek", {"expert_count": 16}, "ffn_gate_inp.weight has shape [8, 32], its keys say [16, 32]"),
    ("deepseek", {"expert_count": 2**31}, "n_routed_experts"),
    ("deepseek", {"attention.temperature_scale": 0.5},
     "the key 'deepseek2.attention.temperature_scale' could change what is computed"),
    ("tokenizer", {"model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
    ("tokenizer", {"pre": "gpt-5"}, "tokenizer.ggml.pre 'gpt-5' is not supported, smollm, gpt-2, llama-bpe"),
    ("tokenizer", {"tokens": None}, "key tokenizer.ggml.tokens is missing"),
    ("tokenizer", {"tokens": [*TOKENS[:-1], "he"]},
     f"tokenizer.ggml.tokens has {len(TOKENS)} entries, {len(TOKENS) - 1} different ones"),
    ("tokenizer", {"token_type": [1, 1]}, "token_type 2"),
    ("tokenizer", {"eos_token_id": 9999}, f"tokenizer.ggml.eos_token_id 9999 is beyond the {len(TOKENS)} tokens"),
    ("tokenizer", {"eos_token_id": 5}, "make no tokenizer"),  # an ordinary token cannot end a text
    ("tokenizer", {"merges": ["q zz"]}, "make no tokenizer"),
    ("tokenizer", {"merges": ["q \nz"]}, "make no tokenizer"),
    ("tokenizer", {"bos_token_id": None, "add_bos_token": True}, "make no tokenizer"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "keys", "said"), REFUSED)
def test_what_would_be_read_differently_is_refused(
    make_model: Make, dense: Config, deepseek: Config, tmp_path: Path, what: str, keys: dict[str, Any], said: str
) -> None:
    model = make_model(deepseek(**V3, rope_scaling=YARN | MSCALE) if what == "deepseek" else dense(**LLAMA))
    prefix = {"llama": "", "deepseek": "deepseek2.", "tokenizer": "tokenizer.ggml."}[what]
    write(tmp_path / "m.gguf", model, keys={f"{prefix}{key}": value for key, value in keys.items()})
    with pytest.raises(SlingshotError) as error:
        (load_tokenizer if what == "tokenizer" else load_model)(tmp_path / "m.gguf")
    assert said in str(error.value) and str(tmp_path / "m.gguf") in str(error.value) and "\n" not in str(error.value)


def test_rope_freqs_that_are_not_llama_3s_are_refused(make_model: Make, dense: Config, tmp_path: Path) -> None:
    model = make_model(dense(**LLAMA | {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": LLAMA3}))
    right = factors(model.config)
    holed = np.where(right > 2, np.float32("nan"), right)
    for wrong in (right * 2, right + 0.01, holed, right[:4], right.astype(np.float16)):
        write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": wrong})
        with pytest.raises(SlingshotError, match=r"m\.gguf: rope_freqs\.weight( is |.factor: |: )"):
            load_model(tmp_path / "m.gguf")
    plain = make_model(dense(**LLAMA))
    write(tmp_path / "m.gguf", plain, extra={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    assert_same(tmp_path / "m.gguf", plain)
    qwen2 = make_model(dense(**LLAMA, attention_bias=True))
    write(tmp_path / "m.gguf", qwen2, extra={"rope_freqs.weight": np.ones(8, dtype=np.float32)})
    with pytest.raises(SlingshotError, match=r"'rope_freqs.weight' is no tensor of a plain qwen2 model"):
        load_model(tmp_path / "m.gguf")


def test_tensors_must_be_the_architectures(make_model: Make, dense: Config, tmp_path: Path) -> None:
    model, path = make_model(dense(**LLAMA)), tmp_path / "m.gguf"
    write(path, model, extra={"blk.0.attn_sinks.weight\n": np.zeros(4, dtype=np.float32)})
    with pytest.raises(SlingshotError, match=r"'blk\.0\.attn_sinks\.weight\\n' is no tensor of a plain llama model"):
        load_model(path)
    write(path, model, skip=("blk.1.ffn_up.weight",))
    with pytest.raises(SlingshotError, match=r"m\.gguf: the tensor blk\.1\.ffn_up\.weight is missing"):
        load_model(path)
    write(path, model, skip=("token_embd.weight",))
    with pytest.raises(SlingshotError, match=r"token_embd\.weight is missing; does the file hold a vocabulary alone"):
        load_model(path)
    write(path, model, extra={"blk.1.ffn_norm.weight": np.full(64, np.nan, dtype=np.float32)})
    with pytest.raises(SlingshotError, match=r"post_attention_layernorm\.weight holds NaN or infinite values"):
        load_model(path)


def test_types_that_cannot_be_dequantised_are_named(make_model: Make, dense: Config, tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", make_model(dense(**LLAMA)))
    content = (tmp_path / "m.gguf").read_bytes()
    name = b"blk.0.attn_k.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert content[at : at + 4] == bytes(4)
    (tmp_path / "m.gguf").write_bytes(content[:at] + int(Type.I32).to_bytes(4, "little") + content[at + 4 :])
    with pytest.raises(SlingshotError, match=r"m\.gguf: blk\.0\.attn_k\.weight is of type I32, .*; give F16 or Q8_0"):
        load_model(tmp_path / "m.gguf")


@pytest.fixture(scope="module")
def whole(make_model: Make, dense: Config, deepseek: Config, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files to be broken: both families, several types, every kind of key."""
    folder = tmp_path_factory.mktemp("whole")
    narrow = {
        "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 32, "rope_theta": 500000.0,
        "rope_scaling": LLAMA3,
    }  # fmt: skip
    llama = dense(**LLAMA | narrow)
    write(folder / "llama.gguf", make_model(llama), Type.Q8_0, extra={"rope_freqs.weight": factors(llama)})
    few = {"num_hidden_layers": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    write(folder / "deepseek.gguf", make_model(deepseek(**V3, **few)), Type.BF16)
    return [folder / "llama.gguf", folder / "deepseek.gguf"]


@st.composite
def breakage(draw: st.DrawFn) -> tuple[int, list[tuple[str, float, Any]]]:
    """Which file, and what is done to it: bytes overwritten, cut out, put in, or numbers made absurd, mostly within the
    header."""
    numbers = st.sampled_from([0, 1, 2, 3, 4, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1])
    step = st.one_of(
        st.tuples(st.just("put"), st.floats(0, 1), st.binary(min_size=1, max_size=4)),
        st.tuples(st.just("insert"), st.floats(0, 1), st.binary(min_size=1, max_size=9)),
        st.tuples(st.just("cut"), st.floats(0, 1), st.integers(1, 40)),
        st.tuples(st.just("number"), st.floats(0, 1), st.tuples(numbers, st.sampled_from([4, 8]))),
        st.tuples(st.just("end"), st.floats(0, 1), st.none()),
    )
    return draw(st.integers(0, 1)), draw(st.lists(step, min_size=1, max_size=3))


def broken(content: bytes, steps: list[tuple[str, float, Any]]) -> bytes:
    for what, where, how in steps:
        at = int(where * min(len(content), 9000))
        if what == "put":
            content = content[:at] + how + content[at + len(how) :]
        elif what == "insert":
            content = content[:at] + how + content[at:]
        elif what == "cut":
            content = content[:at] + content[at + how :]
        elif what == "number":
            value, size = how
            content = content[:at] + (value % 2 ** (8 * size)).to_bytes(size, "little") + content[at + size :]
        else:
            content = content[: int(where * len(content))]
    return content


@pytest.mark.slow
@settings(
    derandomize=True, deadline=None, max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(breakage())
def test_broken_bytes_are_one_line_of_error(
    whole: list[Path], tmp_path: Path, case: tuple[int, list[tuple[str, float, Any]]]
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(broken(whole[case[0]].read_bytes(), case[1]))
    for read in (read_all, load_tokenizer):
        try:
            read(path)
        except SlingshotError as error:
            assert str(path) in str(error) and len(str(error).splitlines()) == 1, error


def read_all(path: Path) -> None:
    weights = GGUFWeights(path)
    for spec in layout(weights.config):
        if spec.copy_of is None:
            assert weights.read(spec.name).shape == spec.shape
