"""Memory of one device: weights, gradients, optimizer, activations, KV cache, from the architecture and the layout. No torch.

    training_memory(sizes(config, PRECISIONS["fp8"]), layout, context=4096, microbatches=120)     # the fullest pipeline stage
    serving_weights(config, devices=144)                                                           # for serving.Fleet, which adds the cache

Weights and optimizer state are exact. Activations are what a backward pass needs of a network with fused attention and normalisation that
keep nothing else: the inputs of every product and of every activation function. Allocator waste, buffers of collectives and the
framework's own use are not in here; a plan leaves a share of the memory free for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from slingshot.base.config import Strict
from slingshot.cost.flops import Weights, block_weights, is_moe, parameters
from slingshot.model.config import ModelConfig

if TYPE_CHECKING:
    from slingshot.planning.sharding import Layout

Recompute = Literal["none", "selective", "full"]


class Precision(Strict):
    """Bytes per number. `weight`: matrices of blocks; `other`: embeddings, head, router, norms; `optimizer`: master weights and both moments
    of AdamW together; `low_activation`: inputs of matrix products; `activation`: everything else that is kept for the backward pass."""

    dtype: str
    weight: float
    other: float
    gradient: float
    optimizer: float
    activation: float
    low_activation: float


# float32: plain AdamW. bfloat16, float16: 2 + 2 + 12 bytes a parameter (ZeRO, arXiv 1910.02054, 3.1). fp8: DeepSeek-V3 (arXiv 2412.19437,
# 3.3.3), e4m3 with a float32 scale per 128 x 128 weights and per 128 activations, float32 gradients and master weights, bfloat16 moments.
PRECISIONS = {
    precision.dtype: precision
    for precision in (
        Precision(dtype="float32", weight=4, other=4, gradient=4, optimizer=8, activation=4, low_activation=4),
        Precision(dtype="bfloat16", weight=2, other=2, gradient=2, optimizer=12, activation=2, low_activation=2),
        Precision(dtype="float16", weight=2, other=2, gradient=2, optimizer=12, activation=2, low_activation=2),
        Precision(
            dtype="fp8",
            weight=1 + 4 / 128**2,
            other=2,
            gradient=4,
            optimizer=8,
            activation=2,
            low_activation=1 + 4 / 128,
        ),
        Precision(dtype="int8", weight=1 + 4 / 128, other=2, gradient=0, optimizer=0, activation=2, low_activation=2),
    )
}
TRAINABLE = ("float32", "bfloat16", "float16", "fp8")


class Memory(Strict):
    """Bytes on one device; `total` is their sum."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    total: float = 0.0

    @classmethod
    def of(
        cls,
        weights: float,
        gradients: float = 0.0,
        optimizer: float = 0.0,
        activations: float = 0.0,
        cache: float = 0.0,
    ) -> Memory:
        total = weights + gradients + optimizer + activations + cache
        return cls(
            weights=weights, gradients=gradients, optimizer=optimizer, activations=activations, cache=cache, total=total
        )


def block_activations(config: ModelConfig, moe: bool, precision: Precision, recompute: Recompute) -> float:
    """Bytes kept per token for the backward pass of one block.

    "selective" drops what costs little to compute again, as DeepSeek-V3 does (3.2.3): outputs of norms, MLA's up-projections, the product of
    gate and up. "full" keeps the block's input alone. Scores are never kept (fused attention), nor are the outputs of experts: their gate
    values scale the input of the down projection.
    """
    width, low, plain = config.hidden_size, precision.low_activation, precision.activation
    if recompute == "full":
        return width * plain
    heads = config.num_attention_heads
    # (numbers, bytes each, cheap to compute again)
    kept: list[tuple[int, float, bool]] = [
        (width, plain, False),
        (width, low, True),
    ]  # the block's input, and normalised
    if config.family == "dense":
        kept += [
            (config.head_dim * (heads + 2 * config.num_key_value_heads), plain, False),
            (config.head_dim * heads, plain, False),
        ]
    else:
        query = config.q_lora_rank or 0
        kept += [
            (query, plain, False),
            (query, low, True),
            (config.kv_lora_rank + config.qk_rope_head_dim, plain, False),
            (config.kv_lora_rank, low, True),
        ]
        kept += [
            (heads * (2 * config.qk_head_dim + config.v_head_dim), plain, True),
            (heads * config.v_head_dim, plain, False),
        ]
    kept += [(width, plain, False), (width, low, True)]  # after attention, and normalised
    if moe:
        routed, shared = config.num_experts_per_tok, config.n_shared_experts
        kept += [
            (config.n_routed_experts, 4.0, False),
            (routed * width, low, False),
        ]  # scores in float32; what was dispatched
        inner = (routed + shared) * config.moe_intermediate_size
    else:
        inner = config.intermediate_size
    kept += [(2 * inner, low, False), (inner, low, True)]
    return sum(numbers * each for numbers, each, cheap in kept if not (cheap and recompute == "selective"))


@dataclass(frozen=True)
class Sizes:
    """What a config weighs, by kind of block; `sizes` makes it once, layouts by the thousand are then weighed quickly."""

    config: ModelConfig
    precision: Precision
    plain: Weights
    moe: Weights
    mtp: Weights
    embedding: int
    head: int
    _stages: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)

    @property
    def blocks(self) -> int:
        return self.config.num_hidden_layers + self.config.num_nextn_predict_layers

    def stages(self, pp: int) -> list[tuple[int, int, int]]:
        """Per pipeline stage its dense blocks, MoE blocks and MTP modules: as even as can be, the stages in the middle taking what is left over."""
        if pp not in self._stages:
            base, left = divmod(self.blocks, pp)
            longer = set([*range(1, pp - 1), 0, pp - 1][:left])
            first_moe = self.config.first_k_dense_replace if self.config.n_moe_layers else self.config.num_hidden_layers
            found, start = [], 0
            for stage in range(pp):
                end = start + base + (stage in longer)
                mtp = max(0, end - max(start, self.config.num_hidden_layers))
                plain = max(0, min(end, first_moe, self.config.num_hidden_layers) - start)
                found.append((plain, end - start - plain - mtp, mtp))
                start = end
            self._stages[pp] = found
        return self._stages[pp]

    def telling_stages(self, pp: int) -> list[int]:
        """Those among which the fullest is: the first of every kind (it holds most activations) and the last, which has the head."""
        first_of_kind: dict[tuple[int, int, int], int] = {}
        for index, kind in enumerate(self.stages(pp)):
            first_of_kind.setdefault(kind, index)
        return sorted({*first_of_kind.values(), pp - 1})

    def stage_weights(self, layout: Layout) -> tuple[float, float]:
        """Numbers on the device that holds most: routed experts' and all others."""
        held = [self.on_device(layout, stage) for stage in self.telling_stages(layout.pp)]
        experts, matrices, other = max(held, key=sum)
        return experts, matrices + other

    def on_device(self, layout: Layout, stage: int) -> tuple[float, float, float]:
        """Numbers that one device of a pipeline stage holds: routed experts', other matrices', the rest."""
        blocks = self.stages(layout.pp)[stage]
        kinds = tuple(zip(blocks, (self.plain, self.moe, self.mtp), strict=True))
        experts = sum(count * kind.experts for count, kind in kinds) / layout.ep
        matrices = sum(count * kind.matrices for count, kind in kinds) / layout.tp
        outside = self.embedding * (stage == 0)
        rest = sum(count * kind.rest for count, kind in kinds)
        if stage == layout.pp - 1:
            rest += self.config.hidden_size  # the final norm
            outside += self.head
            if layout.pp > 1 and (self.config.tie_word_embeddings or blocks[2]):
                outside += self.embedding  # a tied head, and an MTP module's look-up, need it here too
        return experts, matrices, rest + outside / layout.tp


def sizes(config: ModelConfig, precision: Precision) -> Sizes:
    """Weigh the blocks of `config`."""
    counts = parameters(config)
    layers = config.num_hidden_layers
    moe = block_weights(config, layers - 1) if is_moe(config, layers - 1) else Weights()
    plain = Weights() if is_moe(config, 0) else block_weights(config, 0)
    mtp = block_weights(config, layers) if config.num_nextn_predict_layers else Weights()
    return Sizes(config, precision, plain, moe, mtp, counts.embedding, counts.head)


def training_memory(weighed: Sizes, layout: Layout, context: int, microbatches: float) -> Memory:
    """Of the fullest device. Under 1F1B the stage at place s of pp holds the activations of pp - s microbatches of one sequence each."""
    stages = (
        _stage_memory(weighed, layout, stage, context, microbatches) for stage in weighed.telling_stages(layout.pp)
    )
    return max(stages, key=lambda memory: memory.total)


def _stage_memory(weighed: Sizes, layout: Layout, index: int, context: int, microbatches: float) -> Memory:
    config, precision = weighed.config, weighed.precision
    experts, matrices, other = weighed.on_device(layout, index)

    def sharded(low_bytes: float, other_bytes: float, from_zero: int) -> float:
        dense, copies = matrices * low_bytes + other * other_bytes, experts * low_bytes
        return dense / layout.dp + copies / layout.expert_dp if layout.zero >= from_zero else dense + copies

    tokens = context / layout.tp
    in_flight = min(layout.pp - index, microbatches)
    dense, moe, mtp = weighed.stages(layout.pp)[index]
    kept = [block_activations(config, kind, precision, layout.recompute) for kind in (False, True)]
    blocks = dense * kept[0] + moe * kept[1] + mtp * kept[bool(weighed.mtp.experts)]
    activations = in_flight * tokens * blocks
    if layout.recompute == "full":  # one block at a time is computed again and then held whole
        activations += tokens * block_activations(config, bool(moe or (mtp and weighed.mtp.experts)), precision, "none")
    if index == layout.pp - 1:
        # Logits in float32 and their gradient, of one pass through the head at a time; the last norm's input and output.
        activations += tokens * (
            8.0 * config.vocab_size + config.hidden_size * (precision.activation + precision.low_activation)
        )
    return Memory.of(
        weights=sharded(precision.weight, precision.other, 3),
        gradients=sharded(precision.gradient, precision.gradient, 2),
        optimizer=sharded(precision.optimizer, precision.optimizer, 1),
        activations=activations,
    )


def serving_weights(config: ModelConfig, devices: int) -> tuple[float, float, float]:
    """Numbers on each of `devices` devices that serve one copy: experts', other matrices', and the rest (embedding, head, router, norms).

    A mixture of experts has its experts spread over the devices and everything else on each (attention data parallel, as DeepSeek serves);
    a dense model is split into `devices` equal parts (tensor parallel). The MTP module is left out.
    """
    blocks = [block_weights(config, layer) for layer in range(config.num_hidden_layers)]
    experts = sum(block.experts for block in blocks) / devices
    counts = parameters(config)
    others, rest = sum(block.matrices for block in blocks), sum(block.rest for block in blocks) + config.hidden_size
    split = 1 if config.n_moe_layers else devices
    return experts, others / split, (rest + counts.embedding + counts.head) / split
