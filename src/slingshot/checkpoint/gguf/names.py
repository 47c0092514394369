"""Names of llama.cpp's format, and where one of Hugging Face's tensors lies in it. The gguf package knows most of them.

place("model.layers.7.mlp.experts.3.up_proj.weight")     # ("blk.7.ffn_up_exps.weight", 3)
"""

from __future__ import annotations

import re

from gguf import MODEL_ARCH, get_tensor_name_map

ROPE_FREQS = "rope_freqs.weight"
SIGMOID = 2  # the number of a router's gating function; V2's softmax is 1
NAMED_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}  # tokenizer_config.json's, and GGUF's

# Names of tensors are the same in all architectures; these two have all of ours between them, the MTP module's too.
_NAMES = [get_tensor_name_map(architecture, 1) for architecture in (MODEL_ARCH.GLM_DSA, MODEL_ARCH.QWEN3)]
_LAYER, _EXPERT = re.compile(r"^model\.layers\.(\d+)\."), re.compile(r"\.experts\.(\d+)\.")


def place(name: str) -> tuple[str, int | None]:
    """Where a GGUF file keeps one of Hugging Face's tensors: its tensor's name, and which expert of a stack."""
    layer, expert = _LAYER.match(name), _EXPERT.search(name)
    first = _EXPERT.sub(".experts.", _LAYER.sub("model.layers.0.", name))
    module, kind = re.split(r"[._](?=(?:weight|bias)$)", first)
    stored: str = next(found for names in _NAMES if (found := names.get_name(module)))
    if layer:
        stored = stored.replace("blk.0.", f"blk.{layer[1]}.", 1)
    return f"{stored}.{kind}", int(expert[1]) if expert else None


def kv_b_parts(name: str) -> tuple[str, str]:
    """What stands for blk.N.attn_kv_b.weight in newer files: keys [H, K, N] (transposed) and values [H, V, K]."""
    return name.replace("attn_kv_b", "attn_k_b"), name.replace("attn_kv_b", "attn_v_b")
