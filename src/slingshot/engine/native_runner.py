"""Runs a step by the compiled kernels: one call, from token ids to logits. TorchRunner gives the same numbers.

    reason = NativeRunner.obstacle(model, cache)       # None, or what the kernels do not cover
    runner = NativeRunner(model, cache, native_kernels())
    output = runner.forward(batch)
    runner.refresh()                                   # after the model's weights have changed

The kernels have a copy of the weights in an order of their own; embedding rows are read from the model's. A model that
nobody else uses need not keep its own: with keep_model False its matrices are given up, a layer at a time, as soon as
they are packed, and hold NaN in one number's memory but while they are `restored` for new ones. Threads are torch's.

Suffixes: N tokens, R wanted logits, V vocabulary, D model width, L MoE layers, k experts a token.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.batch import FlatBatch, RunnerOutput
from slingshot.engine.kv_cache import CacheForm, KVCache
from slingshot.kernels.native import FLOAT4, GROUP_STEP, NativeKernels, pointer
from slingshot.model.attention import MLA
from slingshot.model.config import ModelConfig
from slingshot.model.dynamic import DynamicGroupedLinear, DynamicLinear, dynamic_grid
from slingshot.model.linear import Embedding, GroupedLinear, Linear
from slingshot.model.moe import Gate
from slingshot.model.rope import rotary, softmax_scale
from slingshot.model.stored import holds_stored
from slingshot.model.transformer import Transformer
from slingshot.quantization.integers import WeightGrid

DTYPES = (torch.float32, torch.bfloat16)
CACHE_FORMS = ("auto", "int8", "fp8")  # native/attention.h's CacheForm
SCALE_BYTES = 4
NAMES = {8: "int8", 4: "int4", FLOAT4: "mxfp4"}  # of weights by their bits
GROUP = 64  # neighbours of quantized weights that share a scale, where it divides all widths
WIDTH_STEP = 8  # heads are multiples of so many numbers: a register of the smallest level


PLAIN = (Linear, Embedding, Gate, GroupedLinear)  # of which the weight is the matrix
# structure and name of a pointer, what is read there, and as numbers of which kind
PackedFrom = tuple[ctypes.Structure, str, Tensor | Linear | GroupedLinear, torch.dtype]


def _source(module: Any) -> Tensor | Linear | GroupedLinear:
    """A parameter, or a module that makes its matrix of something else."""
    made = isinstance(module, Linear | GroupedLinear) and (
        type(module) not in PLAIN or not isinstance(module.weight, Tensor)
    )
    return module if made else module.weight


def _fields(kind: type, *names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names]


class NativeShape(ctypes.Structure):
    """native/model.h's ModelShape."""

    _fields_ = [
        *_fields(
            ctypes.c_int,
            "latent_family", "vocabulary", "width", "layers", "mtp_layers", "heads", "inner", "groups", "head_width",
            "q_rank", "latent", "nope", "rope", "value", "experts", "expert_inner", "shared_inner", "per_token",
            "expert_groups", "kept_groups", "first_expert_layer", "normalized",
            "weight_group", "head_bits", "cache_form",
        ),
        *_fields(ctypes.c_float, "eps", "latent_eps", "scale", "routed_scaling"),
    ]  # fmt: skip

    @classmethod
    def of(cls, config: ModelConfig, group: int, head_bits: int, form: CacheForm) -> NativeShape:
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
            weight_group=group, head_bits=head_bits, cache_form=CACHE_FORMS.index(form),
        )  # fmt: skip


class NativeLayer(ctypes.Structure):
    """native/model.h's LayerTensors, and where a block has each of them."""

    PLACES = {
        "input_norm": "input_layernorm", "post_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
        "k": "self_attn.k_proj", "v": "self_attn.v_proj", "q_bias": "self_attn.q_proj.bias",
        "k_bias": "self_attn.k_proj.bias", "v_bias": "self_attn.v_proj.bias", "q_norm": "self_attn.q_norm",
        "k_norm": "self_attn.k_norm", "q_a": "self_attn.q_a_proj", "q_a_norm": "self_attn.q_a_layernorm",
        "q_b": "self_attn.q_b_proj", "kv_a": "self_attn.kv_a_proj_with_mqa", "kv_a_norm": "self_attn.kv_a_layernorm",
        "kv_b": "self_attn.kv_b_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj mlp.shared_experts.gate_proj",
        "up": "mlp.up_proj mlp.shared_experts.up_proj", "down": "mlp.down_proj mlp.shared_experts.down_proj",
        "router": "mlp.gate", "router_bias": "mlp.gate.e_score_correction_bias",
        "expert_gate_up": "mlp.experts.gate_up_proj", "expert_down": "mlp.experts.down_proj",
        "embedding_norm": "enorm", "hidden_norm": "hnorm", "joint": "eh_proj", "output_norm": "shared_head.norm",
    }  # fmt: skip
    _fields_ = _fields(ctypes.c_void_p, *PLACES)


class NativeBits(ctypes.Structure):
    """native/model.h's LayerBits, and the layer's tensors that each stands for."""

    PARTS = {
        "input": "q k v q_a kv_a", "q_b": "q_b", "output": "o", "gate_up": "gate up", "down": "down",
        "expert_gate_up": "expert_gate_up", "expert_down": "expert_down", "joint": "joint",
    }  # fmt: skip
    _fields_ = _fields(ctypes.c_int, *PARTS)

    @classmethod
    def of(cls, bits: Mapping[str, list[int]]) -> NativeBits:
        """bits: of each tensor that the layer has; matrices that stand side by side are all few, or none."""
        sides = {field: [b for part in parts.split() for b in bits.get(part, [])] for field, parts in cls.PARTS.items()}
        return cls(**{field: max(its) if its and all(its) else 0 for field, its in sides.items()})


class NativeTensors(ctypes.Structure):
    """native/model.h's ModelTensors."""

    _fields_ = [
        *_fields(ctypes.c_int, "are_bf16", "embedding_goes"), *_fields(ctypes.c_void_p, "embedding", "norm", "head"),
        ("layers", ctypes.POINTER(NativeLayer)), ("scales", ctypes.POINTER(NativeLayer)),
    ]  # fmt: skip


class NativeStep(ctypes.Structure):
    """native/model.h's Step."""

    _fields_ = [
        *_fields(ctypes.c_int, "tokens", "sequences", "pages", "wanted", "threads", "routed_layers"),
        *_fields(
            ctypes.c_void_p,
            "token_ids", "positions", "slots", "wanted_tokens", "starts", "lengths", "block_tables", "cos", "sin",
            "keys", "values", "mtp_hidden", "logits", "hidden", "routed",
        ),
    ]  # fmt: skip


class NativeRunner:
    """Runs the model over the cache's pages; see the Runner protocol.

    weight_bits     8 or 4: the kernels keep their copy of the matrices in so few bits, the head included, rounded to
                    nearest, with a float32 scale for every 64 (or 32) neighbours. Routers, MLA's kv_b_proj and rows of
                    the embedding stay as they are. None: all weights do
    grid            what the model's weights are whole numbers of: the kernels keep these numbers, head and what the
                    grid has not stay as they are. Weights that come later are rounded to nearest. What model/dynamic.py
                    put into the model is kept likewise

    weights: what the kernels keep few bits of, for people; "": nothing
    """

    def __init__(
        self, model: Transformer, cache: KVCache, kernels: NativeKernels, weight_bits: int | None = None,
        keep_model: bool = True, grid: WeightGrid | None = None,
    ) -> None:  # fmt: skip
        grid = dynamic_grid(model) or grid
        if grid is not None and (grid.group % GROUP_STEP or {weight_bits or 0} - {0, *grid.bits.values()}):
            grid = None
        bits, group = (0, 0) if weight_bits is None else (weight_bits, self.weight_group(model.config, weight_bits))
        if grid is not None:
            bits, group = 0, grid.group
        widths = sorted({bits, *(grid.bits.values() if grid is not None else ())} - {0})
        self.weights = " and ".join(NAMES[width] for width in widths) + "-dynamic" * (grid is not None and not group)
        self._model, self._config = model, model.config
        self._dtype = cache.dtype
        config = model.config
        new_model, free_model = kernels.door("new_model", ctypes.c_void_p), kernels.door("free_model")
        self._run_step, self._refresh = kernels.door("run_step"), kernels.door("refresh_model")
        self._return_memory = kernels.library.slingshot_return_memory
        self._run_chain = kernels.door("run_chain")
        is_bf16 = int(self._dtype == torch.bfloat16)
        self._handle = ctypes.c_void_p(
            new_model(ctypes.byref(NativeShape.of(config, group, bits, cache.form)), self._bits(bits, grid), is_bf16)
        )
        weakref.finalize(self, free_model, self._handle)
        self._cache = cache
        firsts = cache.keys or cache.entries
        self._keys = (ctypes.c_void_p * len(firsts))(*(layer.data_ptr() for layer in firsts))
        self._values = (ctypes.c_void_p * len(cache.values))(*(layer.data_ptr() for layer in cache.values))
        self._cos = self._sin = torch.empty(0)
        self._logits = torch.empty(0)
        self._routed_layers = sum(map(config.has_experts, range(config.num_hidden_layers)))
        layers = len(model.model.layers)
        weight = model.model.embed_tokens.weight
        goes = not keep_model and not bits and config.tie_word_embeddings and weight.dtype == self._dtype
        # What is made of stored numbers and adapters is not rounded on its way to kernels that compute in float32.
        are_bf16 = weight.dtype == torch.bfloat16 and (bool(is_bf16) or not holds_stored(model))
        self._tensors = NativeTensors(are_bf16, goes, layers=(NativeLayer * layers)())
        self._sources = [list(self._layer_sources(index)) for index in range(layers)] + [list(self._other_sources())]
        self._plain = all(isinstance(source, Tensor) for part in self._sources for _, _, source, _ in part)
        self.keeps_model = keep_model or not self._plain
        if grid is not None:
            self._tensors.scales = self._scales(grid)
        self.refresh()
        if grid is None or grid.group:
            self._tensors.scales = None  # they are those of these weights alone
        else:
            self._grid = grid  # and the model's, which stay

    @staticmethod
    def obstacle(model: Transformer, cache: KVCache) -> str | None:
        """Why the kernels cannot run this model over this cache; None if they can."""
        config = model.config
        if type(model) is not Transformer:
            return f"it is a {type(model).__name__}"
        dtype = model.compute_dtype or model.model.embed_tokens.weight.dtype
        if any(tensor.device.type != "cpu" for tensor in (model.model.embed_tokens.weight, *cache.layers)):
            return "it is not on a CPU"
        if dtype not in DTYPES or cache.dtype != dtype:
            return f"it computes in {dtype} over a cache of {cache.dtype}"
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            return "its weights are spread over processes"
        for module in model.modules():
            if isinstance(module, DynamicLinear | DynamicGroupedLinear) and module.weight.shape[-1] % GROUP_STEP:
                return f"its rows of {module.weight.shape[-1]} whole numbers are no multiple of {GROUP_STEP}"
        widths = {"head_dim": config.head_dim} if config.family == "dense" else {
            name: getattr(config, name) for name in ("kv_lora_rank", "qk_rope_head_dim", "v_head_dim")
        }  # fmt: skip
        for name, width in widths.items():
            if width % WIDTH_STEP:
                return f"{name} {width} is no multiple of {WIDTH_STEP}"
        return None

    @staticmethod
    def weight_group(config: ModelConfig, bits: int) -> int:
        """How many neighbours in a row of weights share a scale. Raises SlingshotError for widths without groups."""
        if bits not in (4, 8):
            raise SlingshotError(f"weight_bits must be 8 or 4, got {bits}")
        latent, moe = config.family == "deepseek_v3", config.n_moe_layers > 0
        value = config.v_head_dim if latent else config.head_dim
        widths = {"hidden_size": config.hidden_size, "width of all heads": config.num_attention_heads * value}
        if config.first_k_dense_replace or not moe:
            widths["intermediate_size"] = config.intermediate_size
        if latent and config.q_lora_rank:
            widths["q_lora_rank"] = config.q_lora_rank
        if moe:
            widths["moe_intermediate_size"] = config.moe_intermediate_size
        for name, width in widths.items():
            if width % GROUP_STEP:
                raise SlingshotError(f"weight_bits {bits}: {name} {width} is no multiple of {GROUP_STEP}; leave it out")
        return GROUP if all(width % GROUP == 0 for width in widths.values()) else GROUP_STEP

    @torch.no_grad()
    def refresh(self) -> None:
        parts = len(self._sources)
        at_once = self.keeps_model and self._plain
        steps = [(0, parts)] if at_once else [(part, part + 1) for part in range(parts)]
        for first, last in steps:
            kept: list[Tensor] = []  # until the kernels have read them
            for structure, field, source, dtype in chain(*self._sources[first:last]):
                tensor = source if isinstance(source, Tensor) else source.matrix(self._dtype)
                if tensor.dtype != dtype or not tensor.is_contiguous():
                    tensor = tensor.to(dtype).contiguous()
                kept.append(tensor)
                setattr(structure, field, tensor.data_ptr())
            self._refresh(self._handle, ctypes.byref(self._tensors), first, last, torch.get_num_threads())
            if last == parts and not self._tensors.embedding_goes:
                self._embedding_VD = kept[0]  # read at every step
            self._give_up(first, last)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Meanwhile the matrices of a model that is not kept have room for new weights, which `refresh` takes over."""
        for matrix in self._given_up(0, len(self._sources)):
            matrix.data = torch.empty(matrix.shape, dtype=matrix.dtype)
        try:
            yield
        finally:
            self._give_up(0, len(self._sources))

    def _give_up(self, first: int, last: int) -> None:
        for matrix in self._given_up(first, last):
            matrix.data = torch.full((1,), torch.nan, dtype=matrix.dtype).expand(matrix.shape)
        if not self.keeps_model:
            self._return_memory()

    def _given_up(self, first: int, last: int) -> Iterator[Tensor]:
        """The matrices of these parts that the model does not keep."""
        for _, field, source, _ in chain(*self._sources[first:last]):
            goes = field != "embedding" or self._tensors.embedding_goes
            if goes and not self.keeps_model and isinstance(source, Tensor) and source.dim() > 1:
                yield source

    def _other_sources(self) -> Iterator[PackedFrom]:
        """Where the kernels' pointers lead outside of layers."""
        body, tensors = self._model.model, self._tensors
        yield tensors, "embedding", _source(body.embed_tokens), self._stored
        yield tensors, "norm", _source(body.norm), self._stored
        if not self._config.tie_word_embeddings:
            yield tensors, "head", _source(self._model.lm_head), self._stored

    def _layer_sources(self, index: int) -> Iterator[PackedFrom]:
        for field, _, module in self._layer_parts(index):
            dtype = torch.float32 if field.startswith("router") else self._stored
            found = module if isinstance(module, Tensor) else _source(module)
            yield self._tensors.layers[index], field, found, dtype

    def _layer_parts(self, index: int) -> Iterator[tuple[str, str, Any]]:
        """The kernels' name of what a layer has, what the grid calls its weight, and the module or tensor."""
        layer = self._model.model.layers[index]
        for field, places in NativeLayer.PLACES.items():
            for place in places.split():
                module: Any = layer
                for part in place.split("."):
                    module = getattr(module, part, None)
                if module is not None:
                    yield field, f"model.layers.{index}.{place}.weight", module

    def _scales(self, grid: WeightGrid) -> ctypes.Array[NativeLayer]:
        """The grid's scales where the kernels' pointers to matrices are."""
        layers = (NativeLayer * len(self._model.model.layers))()
        for index, layer in enumerate(layers):
            for field, name, _ in self._layer_parts(index):
                if name in grid.scales:
                    setattr(layer, field, grid.scales[name].data_ptr())
        return layers

    def _bits(self, bits: int, grid: WeightGrid | None) -> ctypes.Array[NativeBits]:
        """Of every layer's matrices: the grid's, where there is one."""
        found = []
        for index in range(len(self._model.model.layers)):
            each: dict[str, list[int]] = {}
            for field, name, _ in self._layer_parts(index):
                each[field] = [*each.get(field, []), bits if grid is None else grid.bits.get(name, 0)]
            found.append(NativeBits.of(each))
        return (NativeBits * len(found))(*found)

    @property
    def _stored(self) -> torch.dtype:
        """The dtype in which the kernels are given the weights."""
        return torch.bfloat16 if self._tensors.are_bf16 else torch.float32

    @torch.no_grad()
    def forward(self, batch: FlatBatch) -> RunnerOutput:
        return self._step(batch, None)

    @torch.no_grad()
    def draft(self, batch: FlatBatch, hidden_ND: Tensor) -> RunnerOutput:
        return self._step(batch, hidden_ND.to(self._dtype).contiguous())

    def run_chain(self, chain: ctypes.Structure, longest: int) -> None:
        """A step of one sequence (engine/lone.py) of up to `longest` tokens: what is missing of it is filled in."""
        self._reach_to(longest)
        chain.cos, chain.sin, chain.keys = self._cos.data_ptr(), self._sin.data_ptr(), ctypes.addressof(self._keys)
        chain.values = ctypes.addressof(self._values) if self._cache.values else None
        self._run_chain(self._handle, ctypes.byref(chain))

    def _reach_to(self, longest: int) -> None:
        """Tables of rotary angles for positions below this."""
        if longest > len(self._cos):
            most = max(self._config.max_position_embeddings, longest)
            positions = torch.arange(min(1 << (longest - 1).bit_length(), most))
            self._cos, self._sin = (table.contiguous() for table in rotary(self._config, positions))

    def _step(self, batch: FlatBatch, mtp_hidden_ND: Tensor | None) -> RunnerOutput:
        config, count, wanted = self._config, len(batch.token_ids_N), len(batch.wanted)
        self._reach_to(int(batch.lengths.max()))
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
