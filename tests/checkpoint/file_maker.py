"""Files made from nothing but their formats' descriptions: headers of safetensors, GGUF as llama.cpp's converter.

write_headers(path, {"a": ("BF16", (7168, 512))})
write(path, model, Type.Q8_0, keys={"llama.block_count": None}, extra={"rope_freqs.weight": factors(config)})
"""

import json
import math
import os
import re

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers

from slingshot.checkpoint.load_save import hf_tensors

BYTES = {"F32": 4, "BF16": 2, "F8_E4M3": 1}


def write_headers(file, tensors):
    """A safetensors file of zeros, which take no space on the disk, by dtype and shape."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + BYTES[dtype] * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + end)


TOKENS = ["<|end|>", "<|start|>", "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt", "12"]
PLAIN = len(TOKENS) - 3
TOKENS += ["[unused]", "<|eot|>"]
TYPES = [TokenType.CONTROL] * 2 + [TokenType.USER_DEFINED] + [TokenType.NORMAL] * PLAIN
TYPES += [TokenType.UNUSED, TokenType.CONTROL]
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}<tool>{% endif %}"
VOCABULARY = {
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [int(kind) for kind in TYPES], "tokenizer.ggml.merges": ["h e", "Ġ t", "1 2"],
    "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.ggml.eot_token_id": len(TOKENS) - 1, "tokenizer.chat_template": TEMPLATE,
}  # fmt: skip

# Hugging Face's names and llama.cpp's; those of the MTP module stand behind `nextn.`.
NAMES = """
model.embed_tokens=token_embd model.norm=output_norm lm_head=output input_layernorm=attn_norm
self_attn.q_proj=attn_q self_attn.k_proj=attn_k self_attn.v_proj=attn_v self_attn.o_proj=attn_output
self_attn.q_norm=attn_q_norm self_attn.k_norm=attn_k_norm self_attn.q_a_proj=attn_q_a
self_attn.q_a_layernorm=attn_q_a_norm self_attn.q_b_proj=attn_q_b self_attn.kv_a_proj_with_mqa=attn_kv_a_mqa
self_attn.kv_a_layernorm=attn_kv_a_norm self_attn.kv_b_proj=attn_kv_b post_attention_layernorm=ffn_norm
mlp.gate_proj=ffn_gate mlp.up_proj=ffn_up mlp.down_proj=ffn_down mlp.gate=ffn_gate_inp mlp.exp_probs_b=exp_probs_b
mlp.experts.gate_proj=ffn_gate_exps mlp.experts.up_proj=ffn_up_exps mlp.experts.down_proj=ffn_down_exps
mlp.shared_experts.gate_proj=ffn_gate_shexp mlp.shared_experts.up_proj=ffn_up_shexp
mlp.shared_experts.down_proj=ffn_down_shexp enorm=nextn.enorm hnorm=nextn.hnorm eh_proj=nextn.eh_proj
embed_tokens=nextn.embed_tokens shared_head.norm=nextn.shared_head_norm shared_head.head=nextn.shared_head_head
"""
NAMES = dict(pair.split("=") for pair in NAMES.split())

LLAMA = {
    "vocab_size": len(TOKENS), "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
}  # fmt: skip
V3 = {"vocab_size": len(TOKENS), "max_position_embeddings": 128}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
MSCALE = {"mscale": 0.707, "mscale_all_dim": 0.707}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "original_max_position_embeddings": 8192}
SCALED = {"rope_theta": 500000.0, "head_dim": 32, "rope_scaling": LLAMA3}


def interleaved(rows, head_dim):
    """As llama.cpp stores q and k: row j of a head's first half, then row j of its second."""
    half = head_dim // 2
    return rows[[start + row for start in range(0, len(rows), head_dim) for j in range(half) for row in (j, half + j)]]


def tensors_of(model, legacy=False):
    """The model's tensors under llama.cpp's names: experts stacked; keys and values of kv_b apart unless `legacy`."""
    config, tensors = model.config, {}
    for name, tensor in hf_tensors(model.config, model.state_dict()):
        array, name = tensor.make().numpy(), name.replace("gate.e_score_correction_bias", "exp_probs_b.bias")
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        prefix, rest = (f"blk.{layer[1]}.", name[layer.end() :]) if layer else ("", name)
        module, _, leaf = rest.rpartition(".")
        place = f"{prefix}{NAMES[re.sub(r'experts.[0-9]+', 'experts', module)]}.{leaf}"
        if ".experts." in module:
            tensors[place] = np.concatenate([*([tensors[place]] if place in tensors else []), array[None]])
        elif module.endswith("kv_b_proj") and not legacy:
            heads = array.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
            tensors[place.replace("kv_b", "k_b")] = heads[:, : config.qk_nope_head_dim].transpose(0, 2, 1)
            tensors[place.replace("kv_b", "v_b")] = heads[:, config.qk_nope_head_dim :]
        elif config.model_type == "llama" and module.endswith(("q_proj", "k_proj")):
            tensors[place] = interleaved(array, config.head_dim)
        else:
            tensors[place] = array
    return tensors


def keys_of(config, legacy=False):
    """The architecture's keys, without its name in front; None for one that is not there."""
    keys = {
        "embedding_length": config.hidden_size, "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers + config.num_nextn_predict_layers,
        "attention.head_count": config.num_attention_heads, "context_length": config.max_position_embeddings,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps, "rope.freq_base": config.rope_theta,
    }  # fmt: skip
    rope = config.rope_scaling
    if rope is not None and rope.rope_type == "yarn":
        keys |= {"rope.scaling.type": "yarn", "rope.scaling.factor": rope.factor}
        keys["rope.scaling.original_context_length"] = rope.original_max_position_embeddings
    if config.family == "dense":
        given = config.head_dim if config.head_dim * config.num_attention_heads != config.hidden_size else None
        keys |= {"attention.head_count_kv": config.num_key_value_heads, "rope.dimension_count": config.head_dim}
        return keys | {"attention.key_length": given, "attention.value_length": given}
    suffix = "" if legacy else "_mla"
    return keys | {
        "rope.scaling.yarn_log_multiplier": rope and 0.1 * rope.mscale_all_dim,
        "nextn_predict_layers": config.num_nextn_predict_layers or None,
        "attention.head_count_kv": config.num_attention_heads if legacy else 1,
        "attention.key_length": config.cache_width, "attention.value_length": config.kv_lora_rank,
        f"attention.key_length{suffix}": config.qk_head_dim, f"attention.value_length{suffix}": config.v_head_dim,
        "attention.q_lora_rank": config.q_lora_rank, "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": config.qk_rope_head_dim, "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts, "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_used_count": config.num_experts_per_tok, "expert_shared_count": config.n_shared_experts,
        "expert_gating_func": 2, "expert_group_count": config.n_group, "expert_group_used_count": config.topk_group,
        "expert_weights_scale": config.routed_scaling_factor, "expert_weights_norm": config.norm_topk_prob,
    }  # fmt: skip


def finish(writer):
    """Write what a GGUFWriter was given."""
    for part in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{part}_to_file")()
    writer.close()


def write(path, model, kind=Type.F32, keys=(), legacy=False, skip=(), extra=()):
    """Write `model` with its matrices as `kind`; `keys` (None takes one out) and `extra` tensors are put in."""
    name = {"deepseek_v3": "deepseek2"}.get(model.config.model_type, model.config.model_type)
    values = VOCABULARY | {f"{name}.{key}": value for key, value in keys_of(model.config, legacy).items()} | dict(keys)
    writer = GGUFWriter(path, values.pop("general.architecture", name))
    adders = {int: "uint32", float: "float32", str: "string", list: "array", bool: "bool"}
    for key, value in values.items():
        if value is not None:
            getattr(writer, f"add_{adders[type(value)]}")(key, value)
    for name, array in (tensors_of(model, legacy) | dict(extra)).items():
        if name not in skip:
            array, stored = array if isinstance(array, tuple) else (array, None)
            if stored is None:
                stored = kind if array.ndim > 1 and name != "blk.1.ffn_gate_inp.weight" else Type.F32
                array = gguf.quants.quantize(np.ascontiguousarray(array), stored)
            writer.add_tensor(name, array, raw_dtype=stored)
    finish(writer)


def factors(config):
    """Llama 3's, by the published rule: long wavelengths by `factor`, short ones not, those between by degrees."""
    wavelengths = 2 * np.pi * config.rope_theta ** (np.arange(0, config.head_dim, 2) / config.head_dim)
    between = np.clip((8192 / wavelengths - 1) / 3, 0, 1)
    return (1 / ((1 - between) / config.rope_scaling.factor + between)).astype(np.float32)
