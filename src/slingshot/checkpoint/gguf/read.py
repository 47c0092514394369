"""Models in GGUF files: weights under Hugging Face's names, and the tokenizer they carry.

    weights = GGUFWeights(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    weights.config; weights.read("model.layers.0.self_attn.q_proj.weight", slice(0, 64))
    tokenizer = load_gguf_tokenizer(path)

Architectures llama, qwen2, qwen3 and deepseek2 (DeepSeek-V3's routing), any tensor type `gguf` can dequantise (F32, F16, BF16, Q8_0, Q4_0,
Q4_1, the K-quants ...), byte-level BPE vocabularies. Whatever would compute something else than llama.cpp does is refused by its name.
model/gguf_writer.py writes such files.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import TokenType
from gguf.quants import dequantize
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf import file as gguf_file
from slingshot.checkpoint.gguf.file import GGUFFile
from slingshot.checkpoint.layout import Spec, layout
from slingshot.model.config import ModelConfig, RopeScaling
from slingshot.model.rope import frequencies
from slingshot.text.pretokenizers import SPLITS
from slingshot.text.tokenizer import Tokenizer

# Hugging Face's names of modules and GGUF's; those of a block stand behind `model.layers.N.` and `blk.N.`.
_MODULES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK_MODULES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction": "exp_probs_b",
    "mlp.experts.gate_proj": "ffn_gate_exps",
    "mlp.experts.up_proj": "ffn_up_exps",
    "mlp.experts.down_proj": "ffn_down_exps",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "eh_proj": "nextn.eh_proj",
    "embed_tokens": "nextn.embed_tokens",
    "shared_head.norm": "nextn.shared_head_norm",
    "shared_head.head": "nextn.shared_head_head",
}
_BLOCK_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)[._](weight|bias)")

ROPE_FREQS = "rope_freqs.weight"
NAMED_TOKENS = {
    "bos": "bos",
    "eos": "eos",
    "unk": "unknown",
    "pad": "padding",
}  # tokenizer_config.json's names and GGUF's
_PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_PIECE = 2**20  # numbers dequantised at a time: `gguf` takes several times their float32 size
SIGMOID = 2  # llama.cpp's number of the gating function; V2's softmax is 1

# Keys of an architecture that do not change what is computed.
_HARMLESS = ("vocab_size", "rope.scaling.finetuned", "tensor_data_layout", "expert_used_count")


def place(name: str) -> tuple[str, int | None]:
    """Where a GGUF file keeps one of Hugging Face's tensors: the name of its tensor there, and which expert in the stack."""
    expert = re.search(r"\.experts\.(\d+)", name)
    if block := _BLOCK_TENSOR.fullmatch(name.replace(expert[0], ".experts") if expert else name):
        return f"blk.{block[1]}.{_BLOCK_MODULES[block[2]]}.{block[3]}", int(expert[1]) if expert else None
    module = name.removesuffix(".weight")
    return f"{_MODULES[module]}.weight", None


def kv_b_parts(name: str) -> tuple[str, str]:
    """The tensors that stand for blk.N.attn_kv_b.weight in newer files: keys [H, K, N] (transposed) and values [H, V, K] of every head."""
    return name.replace("attn_kv_b", "attn_k_b"), name.replace("attn_kv_b", "attn_v_b")


class GGUFWeights:
    """The tensors of a .gguf file as a checkpoint holds them (model/checkpoint.py's Weights)."""

    def __init__(self, path: Path) -> None:
        """Reads the header, and checks every tensor of the architecture: SlingshotError names the key or tensor that does not fit."""
        self.file = GGUFFile(path)
        self.config = _config(self.file)
        self._shapes = {spec.name: spec.shape for spec in self._specs()}

    def where(self, name: str) -> Path:
        tensor, _ = place(name)
        return next(self.file.tensors[part].file for part in (tensor, *kv_b_parts(tensor)) if part in self.file.tensors)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or these rows of it (dimension 0): float32, or the file's own 16-bit type."""
        shape = self._shapes[name]
        start, stop = (0, shape[0]) if rows is None else (rows.start, rows.stop)
        tensor, expert = place(name)
        if name.endswith("kv_b_proj.weight") and tensor not in self.file.tensors:
            return self._kv_b_proj(tensor)[start:stop]
        stored = self.file.tensors[tensor]
        if len(shape) == 1:
            values = self._rows(stored, 0, 1)[0]
            return self._half_split(values, name)[start:stop]
        if not self._is_interleaved(name):
            first = (expert or 0) * shape[0]
            return self._rows(stored, first + start, stop - start)
        first, last = (
            start // self.config.head_dim * self.config.head_dim,
            -(-stop // self.config.head_dim) * self.config.head_dim,
        )
        return self._half_split(self._rows(stored, first, last - first), name)[start - first : stop - first]

    def _specs(self) -> Iterator[Spec]:
        """The tensors of the architecture, each found in the file in its shape, and nothing else in the file."""
        heads, latent = self.config.num_attention_heads, self.config.kv_lora_rank
        known = {ROPE_FREQS} if _architecture(self.file) == "llama" else set()
        for spec in layout(self.config):
            name, expert = place(spec.name)
            if spec.copy_of is None:
                yield spec
            if expert:
                continue  # within the stack that was checked for the first
            expected = {name: spec.shape if expert is None else (self.config.n_routed_experts, *spec.shape)}
            if name not in self.file.tensors and spec.name.endswith("kv_b_proj.weight"):
                key, value = kv_b_parts(name)
                expected = {
                    key: (heads, latent, self.config.qk_nope_head_dim),
                    value: (heads, self.config.v_head_dim, latent),
                }
            known |= expected.keys()
            for part, shape in expected.items():
                if spec.copy_of is None or part in self.file.tensors:
                    self._check(part, shape)
        if unknown := next((name for name in self.file.tensors if name not in known), None):
            raise SlingshotError(
                f"{self.file.path}: {unknown!r:.80} is no tensor of a plain {_architecture(self.file)} model"
            )

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.file.tensors:
            raise SlingshotError(
                f"{self.file.path}: the tensor {name} is missing; {_architecture(self.file)} models of its keys have it"
            )
        stored = self.file.tensors[name]
        if _without_leading_ones(stored.shape) != _without_leading_ones(shape):
            raise SlingshotError(f"{stored.file}: {name} has shape {list(stored.shape)}, its keys say {list(shape)}")
        if stored.kind not in _PLAIN:
            try:
                dequantize(np.zeros((1, stored.row_bytes), dtype=np.uint8), stored.kind)
            except NotImplementedError as error:
                raise SlingshotError(
                    f"{stored.file}: {name} is of type {stored.kind.name}, which cannot be dequantised; give F16 or Q8_0"
                ) from error

    def _rows(self, tensor: gguf_file.Tensor, first: int, count: int) -> Tensor:
        """Rows of a tensor, all dimensions but the last counted through: [count, width]."""
        width = tensor.shape[-1]
        if tensor.kind in _PLAIN:
            return torch.from_numpy(self.file.read(tensor, first, count)).view(_PLAIN[tensor.kind])
        values = torch.empty((count, width), dtype=torch.float32)
        step = max(1, _PIECE // width)
        for row in range(0, count, step):
            data = self.file.read(tensor, first + row, min(step, count - row))
            values[row : row + len(data)] = torch.from_numpy(dequantize(data, tensor.kind))
        return values

    def _kv_b_proj(self, name: str) -> Tensor:
        heads = self.config.num_attention_heads
        key, value = (self.file.tensors[part] for part in kv_b_parts(name))
        key_HKN = self._rows(key, 0, heads * self.config.kv_lora_rank).unflatten(0, (heads, -1))
        value_HVK = self._rows(value, 0, heads * self.config.v_head_dim).unflatten(0, (heads, -1))
        return torch.cat((key_HKN.transpose(1, 2), value_HVK), dim=1).flatten(0, 1)

    def _is_interleaved(self, name: str) -> bool:
        return _architecture(self.file) == "llama" and bool(re.search(r"\.[qk]_proj\.", name))

    def _half_split(self, values: Tensor, name: str) -> Tensor:
        """Whole heads of llama's q or k back in Hugging Face's order: llama.cpp puts row j of the first half before row j of the second."""
        if not self._is_interleaved(name):
            return values
        return values.unflatten(0, (-1, self.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """llama.cpp drops them when it writes a file."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def _architecture(file: GGUFFile) -> str:
    return file.get("general.architecture", str)


def _config(file: GGUFFile) -> ModelConfig:
    """The architecture that the keys describe; llama.cpp's defaults where they are silent."""
    kind = _architecture(file)
    if kind not in ("llama", "qwen2", "qwen3", "deepseek2"):
        raise SlingshotError(
            f"{file.path}: general.architecture {kind!r:.80} is not supported; llama, qwen2, qwen3 and deepseek2 are"
        )
    keys = _Keys(file, kind)
    for name in ("token_embd.weight", "output_norm.weight"):
        if name not in file.tensors:
            raise SlingshotError(f"{file.path}: the tensor {name} is missing; does the file hold a vocabulary alone?")
    values: dict[str, Any] = {
        "vocab_size": math.prod(file.tensors["token_embd.weight"].shape[:-1]),
        "hidden_size": keys.get("embedding_length", int),
        "intermediate_size": keys.get("feed_forward_length", int),
        "num_hidden_layers": keys.get("block_count", int),
        "num_attention_heads": keys.get("attention.head_count", int),
        "max_position_embeddings": keys.get("context_length", int),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "rope_theta": keys.number("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    values |= _deepseek2(keys, values) if kind == "deepseek2" else _dense(keys)
    values["rope_scaling"] = _yarn(keys)
    config = ModelConfig.parse(values, str(file.path))
    keys.only("attention.causal", True)
    if config.family == "dense":
        for key, only in (
            ("attention.value_length", config.head_dim),
            ("rope.dimension_count", config.head_dim),
            ("expert_count", 0),
        ):
            keys.only(key, only)
    if unknown := next(keys.unread(), None):
        raise SlingshotError(f"{file.path}: the key {unknown!r:.80} could change what is computed and is not supported")
    return _llama3(file, config) if kind == "llama" and ROPE_FREQS in file.tensors else config


class _Keys:
    """The keys of an architecture, its name left out; remembers which were read."""

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file, self.architecture = file, architecture
        self._read = {f"{architecture}.{key}" for key in _HARMLESS}

    def get(self, key: str, kind: type[Any], default: Any = None) -> Any:
        self._read.add(f"{self.architecture}.{key}")
        return self.file.get(f"{self.architecture}.{key}", kind, default)

    def number(self, key: str, default: float | None = None) -> float:
        """The decimal number that was written as this float32: 1e-05, not 9.999999747378752e-06."""
        return float(str(np.float32(self.get(key, float, default))))

    def only(self, key: str, *values: Any) -> None:
        """Refuse a key at any but these values; the first is what its absence means."""
        if (given := self.get(key, type(values[0]), values[0])) not in values:
            known = f"{values[0]} is" if len(values) == 1 else f"{' and '.join(map(str, values))} are"
            raise SlingshotError(f"{self.file.path}: {self.architecture}.{key} {given!r:.80} is not supported, {known}")

    def unread(self) -> Iterator[str]:
        return (key for key in self.file.keys if key.startswith(f"{self.architecture}.") and key not in self._read)


def _dense(keys: _Keys) -> dict[str, Any]:
    return {
        "family": "dense",
        "num_key_value_heads": keys.get("attention.head_count_kv", int, 0),  # 0: as many as heads
        "head_dim": keys.get("attention.key_length", int, 0),  # 0: their share of the width
        "attention_bias": "blk.0.attn_q.bias" in keys.file.tensors,
        "qk_norm": keys.architecture == "qwen3",
    }


def _deepseek2(keys: _Keys, values: dict[str, Any]) -> dict[str, Any]:
    """Files whose keys and values are split (the *_mla lengths) describe the one key-value head of the latent cache besides."""
    n_experts, gating = keys.get("expert_count", int, 0), keys.get("expert_gating_func", int, 0)
    if n_experts and gating != SIGMOID:
        raise SlingshotError(
            f"{keys.file.path}: deepseek2.expert_gating_func {gating} is not supported, {SIGMOID} is: DeepSeek-V3's sigmoid router"
        )
    heads, latent, rope = (
        values["num_attention_heads"],
        keys.get("attention.kv_lora_rank", int),
        keys.get("rope.dimension_count", int),
    )
    split = "deepseek2.attention.key_length_mla" in keys.file.keys
    suffix = "_mla" if split else ""
    width, value = keys.get(f"attention.key_length{suffix}", int), keys.get(f"attention.value_length{suffix}", int)
    implied = (
        {"key_length": latent + rope, "value_length": latent, "head_count_kv": 1} if split else {"head_count_kv": heads}
    )
    for key, only in implied.items():
        keys.only(f"attention.{key}", only)
    groups, used = keys.get("expert_group_count", int, 0), keys.get("expert_group_used_count", int, 0)
    nextn = keys.get("nextn_predict_layers", int, 0)
    layers = values["num_hidden_layers"] - nextn
    if (
        f"blk.{layers}.nextn.eh_proj.weight" not in keys.file.tensors
    ):  # llama.cpp reads files without the module they mention
        nextn = 0
    return {
        "family": "deepseek_v3",
        "num_hidden_layers": layers,
        "num_nextn_predict_layers": nextn,
        "q_lora_rank": keys.get("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": latent,
        "qk_nope_head_dim": max(width - rope, 0),
        "qk_rope_head_dim": rope,
        "v_head_dim": value,
        "moe_intermediate_size": keys.get("expert_feed_forward_length", int),
        "n_routed_experts": n_experts,
        "n_shared_experts": keys.get("expert_shared_count", int),
        "num_experts_per_tok": keys.get("expert_used_count", int, 0),
        "n_group": max(groups, 1),
        "topk_group": used if groups > 1 else 1,
        "first_k_dense_replace": keys.get("leading_dense_block_count", int, 0),
        "routed_scaling_factor": keys.number("expert_weights_scale", 0.0) or 1.0,
        "norm_topk_prob": keys.get("expert_weights_norm", bool, False),
    }


def _yarn(keys: _Keys) -> dict[str, Any] | None:
    """YaRN where the keys ask for it; any other scaling of positions is refused.

    llama.cpp's deepseek2 has one multiplier where DeepSeek has mscale and mscale_all_dim: both alike, a tenth of them in the file.
    """
    factor = keys.number("rope.scaling.factor", 0.0) or keys.number("rope.scale_linear", 0.0) or 1.0
    kind = keys.get("rope.scaling.type", str, "none" if factor == 1 else "linear")
    original = keys.get("rope.scaling.original_context_length", int, keys.get("context_length", int))
    betas = {
        f"beta_{name}": keys.number(f"rope.scaling.yarn_beta_{name}", default)
        for name, default in (("fast", 32.0), ("slow", 1.0))
    }
    keys.only("rope.scaling.yarn_ext_factor", 1.0, -1.0)
    for key in ("rope.scaling.yarn_attn_factor", "rope.scaling.attn_factor"):
        keys.only(key, 1.0)
    mscale = {}
    if keys.architecture == "deepseek2":
        multiplier = float(f"{keys.number('rope.scaling.yarn_log_multiplier', 0.0) / 0.1:.6g}")
        mscale = {"mscale": multiplier, "mscale_all_dim": multiplier}
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    if kind != "yarn":
        raise SlingshotError(
            f"{keys.file.path}: {keys.architecture}.rope.scaling.type {kind!r:.80} is not supported, yarn is"
        )
    if 0 in mscale.values():
        raise SlingshotError(
            f"{keys.file.path}: YaRN without deepseek2.rope.scaling.yarn_log_multiplier is not supported; DeepSeek-V3's is 0.1"
        )
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas, **mscale}


def llama3_factors(config: ModelConfig) -> Tensor:
    """By what Llama 3's scaling divides the frequency of each rotated pair: what GGUF files keep of it, float32 [R]."""
    return frequencies(config.model_copy(update={"rope_scaling": None})) / frequencies(config)


def _llama3(file: GGUFFile, config: ModelConfig) -> ModelConfig:
    """Llama 3's scaling recovered from its factors: of its four numbers, released models differ in the first alone, the largest factor."""
    stored = file.tensors[ROPE_FREQS]
    if (stored.kind, stored.shape) != (Kind.F32, (config.head_dim // 2,)):
        raise SlingshotError(
            f"{stored.file}: {ROPE_FREQS} is {stored.kind.name} {list(stored.shape)}, F32 [{config.head_dim // 2}] is expected"
        )
    factors = torch.from_numpy(file.read(stored, 0, 1)).view(torch.float32)[0]
    if config.rope_scaling is None and bool((factors == 1).all()):
        return config
    if config.rope_scaling is None:
        scaling = {"rope_type": "llama3", "factor": float(factors.max()), "original_max_position_embeddings": 8192}
        scaled = config.model_copy(update={"rope_scaling": RopeScaling.parse(scaling, f"{stored.file}: {ROPE_FREQS}")})
        if torch.allclose(factors, llama3_factors(scaled), rtol=1e-5, atol=0):
            return scaled
    raise SlingshotError(
        f"{stored.file}: {ROPE_FREQS} is not Llama 3's scaling from 8192 positions (low_freq_factor 1, high_freq_factor 4)"
    )


def load_gguf_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer and chat template of a .gguf file. SlingshotError names the file and the key that does not fit."""
    file = GGUFFile(path)
    split = file.get("tokenizer.ggml.pre", str, "default")
    for key, given, known in (
        ("model", file.get("tokenizer.ggml.model", str), ("gpt2",)),
        ("pre", split, tuple(SPLITS)),
    ):
        if given not in known:
            way_out = "give a checkpoint folder with its tokenizer.json instead"
            raise SlingshotError(
                f"{path}: tokenizer.ggml.{key} {given!r:.80} is not supported, {', '.join(known)} is; {way_out}"
            )
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", np.ndarray)
    if not len(types) == len(tokens) == len(set(tokens)):
        raise SlingshotError(
            f"{path}: tokenizer.ggml.tokens has {len(tokens)} entries, {len(set(tokens))} different ones, token_type {len(types)}"
        )
    names: dict[str, str] = {}
    for key in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        id = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if id >= len(tokens):
            raise SlingshotError(f"{path}: tokenizer.ggml.{key}_token_id {id} is beyond the {len(tokens)} tokens")
        if id >= 0:
            names[key] = tokens[id]
    config: dict[str, Any] = {f"{ours}_token": names[key] for ours, key in NAMED_TOKENS.items() if key in names}
    # llama.cpp's own defaults
    config["add_bos_token"] = file.get("tokenizer.ggml.add_bos_token", bool, split == "llama-bpe")
    if template := file.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    vocab = {
        token: id
        for id, (token, kind) in enumerate(zip(tokens, types.tolist(), strict=True))
        if kind != TokenType.UNUSED
    }
    added = {
        token: types[id] == TokenType.CONTROL
        for token, id in vocab.items()
        if types[id] in (TokenType.CONTROL, TokenType.USER_DEFINED)
    }
    merges = [
        (first, second)
        for first, _, second in (merge.partition(" ") for merge in file.get("tokenizer.ggml.merges", list))
    ]
    ends = [tokens.index(names[key]) for key in ("eot", "eom") if key in names]
    try:
        return Tokenizer.from_bpe(vocab, merges, added, config, split, ends)
    except Exception as error:  # the Rust side raises plain Exception
        raise SlingshotError(
            f"{path}: tokenizer.ggml.tokens and .merges make no tokenizer: {str(error)!a:.200}"
        ) from error
