"""Memory of one device: weights, gradients, optimizer, activations, KV cache, from architecture and layout. No torch.

Weights and optimizer state are exact. Activations are what a backward pass needs of a network with fused attention and
normalisation that keep nothing else: the inputs of every product and of every activation function. Allocator waste,
buffers of collectives and the framework's own use are not in here; a plan leaves a share of the memory free for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from itertools import islice
from math import prod
from typing import NamedTuple

from pydantic import computed_field

from slingshot.base.config import Strict
from slingshot.checkpoint.layout import packed_layout
from slingshot.cost.flops import BlockWeights, block_weights
from slingshot.model.config import ModelConfig
from slingshot.planning.layout import Layout, Recompute
from slingshot.quantization.formats import BITS


class Precision(NamedTuple):
    """Bytes per number, and the share of the peak for a model's mix of products that training in it reaches."""

    dtype: str
    weight: float  # matrices of blocks
    other: float  # embeddings, head, router, norms
    gradient: float
    optimizer: float  # master weights and both moments of AdamW
    activation: float  # kept for backward, but for the
    low_activation: float  # inputs of matrix products
    mfu: float = 0.4
    mfu_source: str = "as in bfloat16"


# float32: plain AdamW. bfloat16, float16: 2 + 2 + 12 bytes a parameter (ZeRO, arXiv 1910.02054, 3.1). fp8: DeepSeek-V3
# (arXiv 2412.19437, 3.3.3), e4m3 with a float32 scale per 128 x 128 weights and per 128 activations, float32 gradients
# and master weights, bfloat16 moments. int8 serves only.
_LLAMA = "Llama 3 405B reports 38 to 43% (arXiv 2407.21783, Table 4)"
_V3 = "what DeepSeek-V3's 385 TFLOP/s on an H800 come to (arXiv 2505.09343, Table 4)"
PRECISIONS = {
    precision.dtype: precision
    for precision in (
        Precision("float32", 4, 4, 4, 8, 4, 4),
        Precision("bfloat16", 2, 2, 2, 12, 2, 2, mfu_source=_LLAMA),
        Precision("float16", 2, 2, 2, 12, 2, 2),
        Precision("fp8", 1 + 4 / 128**2, 2, 4, 8, 2, 1 + 4 / 128, mfu=0.22, mfu_source=_V3),
        Precision("int8", 1 + 4 / 128, 2, 0, 0, 2, 2, mfu=0.22),
    )
}


def with_momenta(precision: Precision, dtype: str | None, offload: bool = False) -> Precision:
    """With both of AdamW's moments in this dtype, None: as they are; or with `offload` elsewhere."""
    if not precision.optimizer:
        return precision
    moments = 4 if precision.dtype == "fp8" else 8
    held = 0 if offload else {None: moments, "bfloat16": 4, "float32": 8}[dtype]
    return precision._replace(optimizer=precision.optimizer - moments + held)


class Memory(Strict):
    """Bytes on one device."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0

    @computed_field  # type: ignore[prop-decorator]
    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations + self.cache


def block_activations(config: ModelConfig, moe: bool, precision: Precision, recompute: Recompute) -> float:
    """Bytes kept per token for the backward pass of one block.

    "selective" drops what costs little to compute again, as DeepSeek-V3 does (3.2.3): outputs of norms, MLA's
    up-projections, the product of gate and up, with experts also times their gate values. "full" keeps the block's
    input alone. Scores are never kept (fused attention).
    """
    width, heads = config.hidden_size, config.num_attention_heads
    low, plain = precision.low_activation, precision.activation
    if recompute == "full":
        return width * plain
    inner = config.intermediate_size
    kept = 2 * width * plain  # the block's input, and what follows attention
    cheap = 2 * width * low  # both, normalised
    if config.family == "dense":
        kept += 2 * config.head_dim * (heads + config.num_key_value_heads) * plain  # q, k, v and attention's output
        if config.qk_norm:  # both as they are turned, too
            cheap += config.head_dim * (heads + config.num_key_value_heads) * plain
    else:
        latents = (config.q_lora_rank or 0) + config.kv_lora_rank
        kept += (latents + config.qk_rope_head_dim + heads * config.v_head_dim) * plain
        cheap += latents * low + heads * (config.qk_head_dim + config.v_head_dim) * plain
        if config.q_lora_rank is None:  # a product of full width
            kept += heads * config.qk_head_dim * plain
        else:
            cheap += heads * config.qk_head_dim * plain
    if moe:
        routed = config.num_experts_per_tok
        kept += config.n_routed_experts * 4.0 + routed * width * low  # scores in float32; what was dispatched
        cheap += routed * config.moe_intermediate_size * low  # the product of gate and up, times gate values
        inner = (routed + config.n_shared_experts) * config.moe_intermediate_size
    return kept + 2 * inner * low + (0 if recompute == "selective" else cheap + inner * low)


def stored_bytes(config: ModelConfig) -> float:
    """Per number of blocks' matrices, of a checkpoint of int8 and int4 numbers, each in its own width; what it leaves
    alone has 16 bits."""
    scheme, layers = config.scheme, config.num_hidden_layers + config.num_nextn_predict_layers
    assert scheme is not None
    numbers = sum(sum(block_weights(config, layer)[:2]) for layer in range(layers))
    packed = packed_layout(config)
    fewer = sum(prod(spec.shape) * (2 - scheme.bits(spec.name) / 8 - 2 / scheme.group) for spec in packed)
    return 2 - fewer / numbers


@dataclass(frozen=True)
class Blocks:
    """What a config weighs, by kind of block, and how pipeline stages share the blocks."""

    config: ModelConfig
    precision: Precision
    adapters: float | None = None  # numbers of adapters, where these alone are trained

    @cached_property
    def kinds(self) -> tuple[BlockWeights, BlockWeights, BlockWeights]:
        """A dense block, a block of experts, and the MTP module, where `stages` count any."""
        config, last = self.config, self.config.num_hidden_layers
        return block_weights(config, 0), block_weights(config, last - 1), block_weights(config, last)

    @cached_property
    def held_bytes(self) -> tuple[float, float]:
        """Bytes per number of blocks' matrices and of the rest: beside adapters as int8, int4 and fp8 are stored."""
        config, precision = self.config, self.precision
        stored = config.quantization if self.adapters is not None else None
        if stored in BITS:
            return stored_bytes(config), 2.0
        return PRECISIONS["fp8"].weight if stored == "fp8" else precision.weight, precision.other

    def stages(self, pp: int) -> list[tuple[int, int, int]]:
        """Per pipeline stage its dense and MoE blocks and MTP modules, as even as can be, the middle taking more."""
        config = self.config
        first_moe = config.first_k_dense_replace if config.n_moe_layers else config.num_hidden_layers
        return _stages(config.num_hidden_layers, first_moe, config.num_nextn_predict_layers, pp)

    def telling_stages(self, pp: int) -> list[int]:
        """Those among which the fullest is: the first of every kind, and the last, which has the head."""
        stages = self.stages(pp)
        return sorted({*map(stages.index, stages), pp - 1})

    def stage_weights(self, layout: Layout) -> tuple[float, float]:
        """Numbers on the device that holds most: routed experts' and all others."""
        experts, *others = max((self.on_device(layout, stage) for stage in self.telling_stages(layout.pp)), key=sum)
        return experts, sum(others)

    def trained(self, layout: Layout, experts: float, others: float) -> tuple[float, float]:
        """Of as many numbers on a device those that are trained; adapters are as if evenly shared out."""
        return (experts, others) if self.adapters is None else (0.0, self.adapters / layout.tp / layout.pp)

    def on_device(self, layout: Layout, stage: int) -> tuple[float, float, float]:
        """Numbers that one device of a pipeline stage holds: routed experts', other matrices', the rest."""
        config, blocks = self.config, self.stages(layout.pp)[stage]
        held = [*zip(blocks, self.kinds, strict=True)]
        matrices, experts, rest = (sum(count * kind[part] for count, kind in held) for part in range(3))
        tables = float(stage == 0)  # embedding, head
        if stage == layout.pp - 1:
            rest += config.hidden_size  # the final norm
            tied = config.tie_word_embeddings
            # A tied head, and an MTP module's look-up, need the embedding here too.
            tables += (not tied) + (layout.pp > 1 and (tied or blocks[2] > 0))
        outside = tables * config.vocab_size * config.hidden_size
        return experts / layout.ep, matrices / layout.tp, rest + outside / layout.tp


@cache
def _stages(layers: int, first_moe: int, mtp: int, pp: int) -> list[tuple[int, int, int]]:
    kinds = iter("d" * min(first_moe, layers) + "e" * (layers - first_moe) + "m" * mtp)  # dense, experts, MTP
    base, left = divmod(layers + mtp, pp)
    longer = {*[*range(1, pp - 1), 0, pp - 1][:left]}
    held = (list(islice(kinds, base + (stage in longer))) for stage in range(pp))
    return [(blocks.count("d"), blocks.count("e"), blocks.count("m")) for blocks in held]


def training_memory(
    blocks: Blocks, layout: Layout, context: int, microbatches: float, logits_chunk: int | None = None
) -> Memory:
    """Of the fullest device. Under 1F1B stage s of pp holds the activations of pp - s microbatches.

    `logits_chunk`: tokens whose logits are made at a time, and made again in the backward pass; None is all.
    """
    config, precision, tokens = blocks.config, blocks.precision, context / layout.tp

    def of_stage(stage: int) -> Memory:
        experts, matrices, other = blocks.on_device(layout, stage)

        def sharded(low_bytes: float, other_bytes: float, from_zero: int) -> float:
            dense, copies = matrices * low_bytes + other * other_bytes, experts * low_bytes
            return dense / layout.dp + copies / layout.expert_dp if layout.zero >= from_zero else dense + copies

        dense, moe, mtp = blocks.stages(layout.pp)[stage]
        routed = moe + mtp * config.has_experts(config.num_hidden_layers)
        plain = dense + moe + mtp - routed
        each, of_experts = (block_activations(config, kind, precision, layout.recompute) for kind in (False, True))
        activations = min(layout.pp - stage, microbatches) * tokens * (plain * each + routed * of_experts)
        if layout.recompute == "full":  # one block at a time is computed again and then held whole
            activations += tokens * block_activations(config, routed > 0, precision, "none")
        if stage == layout.pp - 1:  # logits in float32 and their gradient, of one pass through the head at a time
            last_norm = config.hidden_size * (precision.activation + precision.low_activation)  # its input and output
            activations += min(tokens, logits_chunk or context) * 8.0 * config.vocab_size + tokens * last_norm
        weights = sharded(*blocks.held_bytes, 3)
        if blocks.adapters is not None:
            _, trained = blocks.trained(layout, experts, matrices + other)
            weights += trained * precision.weight
            experts, matrices, other = 0.0, trained, 0.0
        return Memory.model_construct(
            weights=weights, activations=activations, gradients=sharded(precision.gradient, precision.gradient, 2),
            optimizer=sharded(precision.optimizer, precision.optimizer, 1),
        )  # fmt: skip

    return max(map(of_stage, blocks.telling_stages(layout.pp)), key=lambda memory: memory.total)
