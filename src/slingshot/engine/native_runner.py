"""Runs a step by the compiled kernels: one call, from token ids to logits. TorchRunner gives the same numbers.

    reason = NativeRunner.obstacle(model, cache)       # None, or what the kernels do not cover
    runner = NativeRunner(model, cache, native_kernels())
    output = runner.forward(batch)
    runner.refresh()                                   # after the model's weights have changed

The kernels have a copy of the weights in an order of their own; embedding rows are read from the model's. Threads are
torch's.

Suffixes: N tokens, R wanted logits, V vocabulary, D model width, L MoE layers, k experts a token.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from slingshot.engine.batch import FlatBatch, RunnerOutput
from slingshot.engine.kv_cache import KVCache
from slingshot.kernels.native import NativeKernels, pointer
from slingshot.model.attention import MLA
from slingshot.model.config import ModelConfig
from slingshot.model.linear import Embedding, GroupedLinear, Linear
from slingshot.model.moe import Gate, MoE
from slingshot.model.rope import rotary, softmax_scale
from slingshot.model.transformer import MTP, Block, Transformer

DTYPES = (torch.float32, torch.bfloat16)
WIDTH_STEP = 8  # heads are multiples of so many numbers: a register of the smallest level


class NativeShape(ctypes.Structure):
    """native/model.h's ModelShape."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in [
            "latent_family",
            "vocabulary",
            "width",
            "layers",
            "mtp_layers",
            "heads",
            "inner",
            "groups",
            "head_width",
            "q_rank",
            "latent",
            "nope",
            "rope",
            "value",
            "experts",
            "expert_inner",
            "shared_inner",
            "per_token",
            "expert_groups",
            "kept_groups",
            "first_expert_layer",
            "normalized",
        ]
    ] + [(name, ctypes.c_float) for name in ("eps", "latent_eps", "scale", "routed_scaling")]

    @classmethod
    def of(cls, config: ModelConfig) -> NativeShape:
        moe = config.n_moe_layers > 0
        return cls(
            latent_family=config.family == "deepseek_v3", vocabulary=config.vocab_size, width=config.hidden_size,
            layers=config.num_hidden_layers, mtp_layers=config.num_nextn_predict_layers,
            heads=config.num_attention_heads, inner=config.intermediate_size, groups=config.num_key_value_heads,
            head_width=config.head_dim, q_rank=config.q_lora_rank or 0, latent=config.kv_lora_rank,
            nope=config.qk_nope_head_dim, rope=config.qk_rope_head_dim, value=config.v_head_dim,
            experts=config.n_routed_experts if moe else 0, expert_inner=config.moe_intermediate_size,
            shared_inner=config.moe_intermediate_size * config.n_shared_experts,
            per_token=config.num_experts_per_tok if moe else 0, expert_groups=config.n_group,
            kept_groups=config.topk_group, first_expert_layer=config.first_k_dense_replace,
            normalized=config.norm_topk_prob, eps=config.rms_norm_eps, latent_eps=MLA.LATENT_EPS,
            scale=softmax_scale(config), routed_scaling=config.routed_scaling_factor,
        )  # fmt: skip


class NativeLayer(ctypes.Structure):
    """native/model.h's LayerTensors, and where a block has each of them."""

    PLACES = {
        "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "q_bias": "self_attn.q_proj.bias",
        "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias", "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm", "q_a": "self_attn.q_a_proj", "q_a_norm": "self_attn.q_a_layernorm",
        "q_b": "self_attn.q_b_proj", "kv_a": "self_attn.kv_a_proj_with_mqa", "kv_a_norm": "self_attn.kv_a_layernorm",
        "kv_b": "self_attn.kv_b_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
        "down": "mlp.down_proj", "router": "mlp.gate", "router_bias": "mlp.gate.e_score_correction_bias",
        "expert_gate_up": "mlp.experts.gate_up_proj", "expert_down": "mlp.experts.down_proj",
        "embedding_norm": "enorm", "hidden_norm": "hnorm", "joint": "eh_proj", "output_norm": "shared_head.norm",
    }  # fmt: skip
    _fields_ = [(name, ctypes.c_void_p) for name in PLACES]


class NativeTensors(ctypes.Structure):
    """native/model.h's ModelTensors."""

    _fields_ = [
        ("are_bf16", ctypes.c_int), ("embedding", ctypes.c_void_p), ("norm", ctypes.c_void_p),
        ("head", ctypes.c_void_p), ("layers", ctypes.POINTER(NativeLayer)),
    ]  # fmt: skip


class NativeStep(ctypes.Structure):
    """native/model.h's Step."""

    _fields_ = [
        (name, ctypes.c_int) for name in ["tokens", "sequences", "pages", "wanted", "threads", "routed_layers"]
    ] + [
        (name, ctypes.c_void_p)
        for name in [
            "token_ids",
            "positions",
            "slots",
            "wanted_tokens",
            "starts",
            "lengths",
            "block_tables",
            "cos",
            "sin",
            "keys",
            "values",
            "mtp_hidden",
            "logits",
            "hidden",
            "routed",
        ]
    ]


class NativeRunner:
    """Runs the model over the cache's pages; see the Runner protocol."""

    def __init__(self, model: Transformer, cache: KVCache, kernels: NativeKernels) -> None:
        self._model, self._config = model, model.config
        self._dtype = cache.dtype
        config = model.config
        new_model, free_model = kernels.door("new_model", ctypes.c_void_p), kernels.door("free_model")
        self._run_step, self._refresh = kernels.door("run_step"), kernels.door("refresh_model")
        is_bf16 = int(self._dtype == torch.bfloat16)
        self._handle = ctypes.c_void_p(new_model(ctypes.byref(NativeShape.of(config)), is_bf16))
        weakref.finalize(self, free_model, self._handle)
        self._cache = cache
        firsts = cache.keys or cache.entries
        self._keys = (ctypes.c_void_p * len(firsts))(*(layer.data_ptr() for layer in firsts))
        self._values = (ctypes.c_void_p * len(cache.values))(*(layer.data_ptr() for layer in cache.values))
        self._cos = self._sin = torch.empty(0)
        self._logits = torch.empty(0)
        self._routed_layers = config.n_moe_layers - (config.num_nextn_predict_layers if config.n_moe_layers else 0)
        self.refresh()

    @staticmethod
    def obstacle(model: Transformer, cache: KVCache) -> str | None:
        """Why the kernels cannot run this model over this cache; None if they can."""
        config = model.config
        if type(model) is not Transformer:
            return f"it is a {type(model).__name__}"
        dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        if type(model) is not Transformer:
            return "it is a Transformer of its own kind"
        if any(tensor.device.type != "cpu" for tensor in (model.model.embed_tokens.weight, *cache.layers)):
            return "it is not on a CPU"
        if dtype not in DTYPES or cache.dtype != dtype:
            return f"it computes in {dtype} over a cache of {cache.dtype}"
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            return "its weights are spread over processes"
        widths = {"head_dim": config.head_dim} if config.family == "dense" else {
            name: getattr(config, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim")
        }  # fmt: skip
        for name, width in widths.items():
            if width % WIDTH_STEP:
                return f"{name} {width} is no multiple of {WIDTH_STEP}"
        return None

    def refresh(self) -> None:
        kept: list[Tensor] = []
        embed = self._model.model.embed_tokens
        common = embed.weight.dtype if embed.weight.dtype in DTYPES else self._dtype

        def address(module: Any, dtype: torch.dtype = common) -> int | None:
            """Of the numbers that a module or parameter stands for, as they are now."""
            if module is None:
                return None
            plain = isinstance(module, Tensor) or type(module) in (Linear, Embedding, Gate, GroupedLinear)
            if isinstance(module, Linear) and not plain:
                tensor = module.matrix(self._dtype)
            else:
                tensor = module if isinstance(module, Tensor) else module.weight
            tensor = tensor.detach().to(dtype).contiguous()
            kept.append(tensor)
            return tensor.data_ptr()

        layers = [self._tensors_of(layer, address) for layer in self._model.model.layers if isinstance(layer, Block)]
        tensors = NativeTensors(
            are_bf16=common == torch.bfloat16,
            embedding=address(embed),
            norm=address(self._model.model.norm),
            head=None if self._config.tie_word_embeddings else address(self._model.lm_head),
            layers=(NativeLayer * len(layers))(*layers),
        )
        self._embedding = kept[len(kept) - (2 if self._config.tie_word_embeddings else 3)]
        self._refresh(self._handle, ctypes.byref(tensors), torch.get_num_threads())

    def _tensors_of(self, layer: Block, address: Any) -> NativeLayer:
        found: dict[str, int | None] = {}
        mtp = isinstance(layer, MTP)
        for name, place in NativeLayer.PLACES.items():
            module: Any = layer
            for part in place.split("."):
                if isinstance(layer.mlp, MoE) and name in ("gate", "up", "down") and part == "mlp":
                    module = layer.mlp.shared_experts
                else:
                    module = getattr(module, part, None)
            if not mtp and name in ("embedding_norm", "hidden_norm", "joint", "output_norm"):
                continue
            if name in ("router", "router_bias"):
                found[name] = address(module, torch.float32) if isinstance(layer.mlp, MoE) else None
            else:
                found[name] = address(module)
        return NativeLayer(**found)

    @torch.no_grad()
    def forward(self, batch: FlatBatch) -> RunnerOutput:
        return self._step(batch, None)

    @torch.no_grad()
    def draft(self, batch: FlatBatch, hidden_ND: Tensor) -> RunnerOutput:
        return self._step(batch, hidden_ND.to(self._dtype).contiguous())

    def _step(self, batch: FlatBatch, mtp_hidden_ND: Tensor | None) -> RunnerOutput:
        config, count, wanted = self._config, len(batch.token_ids_N), len(batch.wanted)
        longest = int(batch.lengths.max())
        if longest > len(self._cos):
            positions = torch.arange(min(1 << (longest - 1).bit_length(), max(config.max_position_embeddings, longest)))
            self._cos, self._sin = (table.contiguous() for table in rotary(config, positions))
        if self._logits.numel() < wanted * config.vocab_size:
            self._logits = torch.empty(wanted * config.vocab_size)
        hidden = torch.empty(count, config.hidden_size, dtype=self._dtype) if batch.hidden else None
        routed = None
        if batch.routing and mtp_hidden_ND is None and self._routed_layers:
            routed = torch.empty(count, self._routed_layers, config.num_experts_per_tok, dtype=torch.int16)
        step = NativeStep(
            count, len(batch.lengths), batch.block_tables.shape[1], wanted, torch.get_num_threads(),
            self._routed_layers, *(pointer(tensor) for tensor in (
                batch.token_ids_N, batch.positions_N, batch.slots_N, batch.wanted, batch.starts, batch.lengths,
                batch.block_tables, self._cos, self._sin,
            )),
            ctypes.addressof(self._keys), ctypes.addressof(self._values) if self._cache.values else None,
            *(pointer(tensor) for tensor in (mtp_hidden_ND, self._logits, hidden, routed)),
        )  # fmt: skip
        self._run_step(self._handle, ctypes.byref(step))
        logits_RV = self._logits[: wanted * config.vocab_size].view(wanted, config.vocab_size)
        return RunnerOutput(logits_RV, hidden, routed)
