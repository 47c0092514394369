"""Parameters and floating-point operations of a ModelConfig, exact from the architecture. Plain arithmetic, no torch.

What is counted: every matrix product, 2 FLOPs per multiply-add, and attention over the causal half only: the query at
position t of its document meets t keys. A backward pass costs twice its forward, but for frozen matrices, which have no
gradient of their own, as much as its forward; recomputation is not counted.

    parameters(config).total                               # 671.03e9 for DeepSeek-V3
    training_parts(config, [4096] * 16)                    # FLOPs of a step over 16 documents, of it and of its MTP
    generation_flops(config, prompt_length=64, new_tokens=[120, 87])     # two samples that share their prompt's prefill
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from slingshot.model.config import ModelConfig


class Parameters(NamedTuple):
    """Counts of numbers that are trained (router biases are not)."""

    total: int  # the main model: embedding, blocks, final norm, head (a tied head once); the MTP module is apart
    active: int  # of those, what one token passes through: its chosen experts, embedding and head included
    embedding: int  # the input embedding
    head: int  # the output head, 0 when tied
    mtp: int  # the MTP module without its copies of embedding and head

    @property
    def active_ways(self) -> dict[str, int]:
        """Active ones as they are counted. A tied matrix is multiplied by as the head: without the look-up it stays."""
        without, neither = self.active - (self.embedding if self.head else 0), self.active - self.embedding - self.head
        ways = {"active": self.active, "active_without_embedding": without}
        return ways | {"active_without_embedding_and_head": neither}


def parameters(config: ModelConfig) -> Parameters:
    """Count the parameters of `config`."""
    embedding = config.vocab_size * config.hidden_size
    head = 0 if config.tie_word_embeddings else embedding
    blocks = [block_weights(config, layer) for layer in range(config.num_hidden_layers)]
    total = embedding + head + config.hidden_size + sum(block.total for block in blocks)  # the third is the final norm
    experts = sum(block.experts for block in blocks)
    chosen = experts // config.n_routed_experts * config.num_experts_per_tok if experts else 0
    mtp = config.num_nextn_predict_layers * block_weights(config, config.num_hidden_layers).total
    return Parameters(total, total - experts + chosen, embedding, head, mtp)


class BlockWeights(NamedTuple):
    """Counts of numbers in a block: matrices, routed experts' matrices, and the rest (norms, biases, router)."""

    matrices: int = 0
    experts: int = 0
    rest: int = 0

    @property
    def total(self) -> int:
        return sum(self)


def block_weights(config: ModelConfig, layer: int) -> BlockWeights:
    """What block `layer` holds; block `num_hidden_layers` is the MTP module: one more block with eh_proj, from both
    inputs to one width, and with enorm, hnorm and shared_head.norm."""
    width, extra = config.hidden_size, layer >= config.num_hidden_layers
    matrices, rest = projection_weights(config) + extra * 2 * width * width, (2 + extra * 3) * width
    if config.family == "dense":
        rest += config.attention_bias * config.head_dim * (config.num_attention_heads + 2 * config.num_key_value_heads)
        rest += config.qk_norm * 2 * config.head_dim
    else:
        rest += (config.q_lora_rank or 0) + config.kv_lora_rank
    if not config.has_experts(layer):
        return BlockWeights(matrices + 3 * width * config.intermediate_size, 0, rest)
    expert, routed = 3 * width * config.moe_intermediate_size, config.n_routed_experts
    return BlockWeights(matrices + config.n_shared_experts * expert, routed * expert, rest + width * routed)


def cache_bytes_per_token(config: ModelConfig, bytes_per_number: float = 2) -> float:
    """Bytes a token has in the KV cache: 70,272 for DeepSeek-V3 in bf16 (arXiv 2505.09343, Table 1)."""
    return config.cache_width * config.num_hidden_layers * bytes_per_number


def forward_parts(
    config: ModelConfig, lengths: Iterable[int], mtp: bool = False, adapters: float = 0.0, before: Sequence[int] = ()
) -> dict[str, float]:
    """FLOPs of one forward pass over documents of these lengths, with logits at every position, by part of the network.

    `before`: how many tokens of another document each of them goes on from and sees, where any does.

    Keys: projections, attention, mlp, router, shared_experts, routed_experts, head, adapters (so many numbers of which
    a token passes through), and mtp when asked for: the whole MTP module, its own pass through the head included. It
    runs everywhere but at a document's last position.
    """
    lengths, layers = list(lengths), config.num_hidden_layers
    tokens = sum(lengths)
    parts = _block_parts(config, range(layers), tokens, _pairs(lengths, before), tokens)
    module = _mtp_parts(config, lengths, before) if mtp else {}
    parts |= {"adapters": 2.0 * adapters * tokens, "mtp": sum(module.values())}
    return {part: flops for part, flops in parts.items() if flops}


def _mtp_parts(config: ModelConfig, lengths: list[int], before: Sequence[int]) -> dict[str, float]:
    """Of the MTP module, one forward pass."""
    if not config.num_nextn_predict_layers:
        return {}
    shorter = [length - 1 for length in lengths]
    tokens = sum(shorter)
    block = _block_parts(config, [config.num_hidden_layers], tokens, _pairs(shorter, before), tokens)
    return block | {"eh_proj": 4.0 * config.hidden_size**2 * tokens}


def _pairs(lengths: list[int], before: Sequence[int] = ()) -> int:
    own = sum(length * (length + 1) // 2 for length in lengths)
    return own + sum(length * seen for length, seen in zip(lengths, before, strict=bool(before)))


def forward_flops(
    config: ModelConfig, lengths: Iterable[int], mtp: bool = False, adapters: float = 0.0, before: Sequence[int] = ()
) -> float:
    """FLOPs of one forward pass over documents of these lengths; see `forward_parts`."""
    return sum(forward_parts(config, lengths, mtp, adapters, before).values())


def trained(parts: Mapping[str, float], adapters: float | None = None) -> dict[str, float]:
    """FLOPs of forward and backward by part, of those of a forward pass; `adapters` as in `training_parts`."""
    whole = parts if adapters is None else ("attention", "adapters")  # the former multiplies no weights
    return {part: flops * (3 if part in whole else 2) for part, flops in parts.items()}


def training_parts(
    config: ModelConfig, lengths: Iterable[int], mtp: bool = True, adapters: float | None = None,
    before: Sequence[int] = (),
) -> dict[str, float]:  # fmt: skip
    """FLOPs of forward and backward over documents of these lengths, as receipts keep them apart: "training" of the
    main model, and "mtp", its module that is trained along.

    adapters: of a frozen model with adapters, how many numbers of theirs a token passes through (arXiv 2106.09685);
    every gradient of an activation is counted, those below the first adapter too.
    """
    lengths = list(lengths)
    main = forward_parts(config, lengths, adapters=adapters or 0.0, before=before)
    module = _mtp_parts(config, lengths, before) if mtp else {}
    return {"training": sum(trained(main, adapters).values()), "mtp": sum(trained(module, adapters).values())}


def generation_flops(config: ModelConfig, prompt_length: int, new_tokens: Iterable[int]) -> float:
    """FLOPs of sampling with a cache: one prefill of the prompt, then one decode step for each further token.

    `new_tokens`: of each of the samples that share the prompt, the first of them by the prefill.
    MLA decodes in absorbed form, attention over the latent (arXiv 2405.04434, 2.1.2).
    """
    # A sample of n tokens decodes n - 1 of them; decode step i (from 1) sees prompt_length + i keys.
    steps = [max(0, count - 1) for count in new_tokens]
    keys = prompt_length + _pairs(steps) / max(1, sum(steps))  # in the mean
    decoded = sum(decode_parts(config, keys, sum(steps)).values())
    return sum(prefill_parts(config, prompt_length).values()) + decoded


def prefill_parts(config: ModelConfig, length: float, cached: float = 0) -> dict[str, float]:
    """FLOPs of reading a prompt whose first `cached` tokens are in the cache already, by part; logits at its end only.

    Attention is in expanded form: every token after the cached ones meets itself and all before it. What MLA cached is
    latents, which kv_b_proj expands anew wherever a token is left to read. Means of many prompts may be fractions.
    """
    pairs = (length * (length + 1) - cached * (cached + 1)) / 2
    parts = _block_parts(config, range(config.num_hidden_layers), length - cached, pairs, logits=1)
    if config.family == "deepseek_v3" and cached < length:
        parts["projections"] += 2.0 * cached * config.num_hidden_layers * _expansion_weights(config)
    return parts


def decode_parts(config: ModelConfig, context: float, tokens: float = 1) -> dict[str, float]:
    """FLOPs of decoding tokens that meet `context` keys each, themselves included, by part; in absorbed form."""
    return _block_parts(config, range(config.num_hidden_layers), tokens, tokens * context, tokens, absorbed=True)


def projection_weights(config: ModelConfig) -> int:
    """Matrix elements a token is multiplied by around attention; the same in MLA's expanded and absorbed form."""
    width, heads = config.hidden_size, config.num_attention_heads
    if config.family == "dense":
        return 2 * width * config.head_dim * (heads + config.num_key_value_heads)  # q and o; k and v
    query = width * heads * config.qk_head_dim
    if config.q_lora_rank is not None:
        query = config.q_lora_rank * (width + heads * config.qk_head_dim)
    latent = width * (config.kv_lora_rank + config.qk_rope_head_dim)
    return query + latent + _expansion_weights(config) + heads * config.v_head_dim * width


def _expansion_weights(config: ModelConfig) -> int:
    """Matrix elements of MLA's kv_b_proj, which makes keys and values of a latent."""
    return config.kv_lora_rank * config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)


def remade_flops(config: ModelConfig, tokens: float) -> float:
    """What selective recomputation computes again, MTP included, but for norms, rotation and SwiGLU: products of MLA's
    latents, which make queries, keys and values."""
    if config.family == "dense":
        return 0.0
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    queries = (config.q_lora_rank or 0) * config.num_attention_heads * config.qk_head_dim
    return 2.0 * tokens * layers * (queries + _expansion_weights(config))


def _block_parts(
    config: ModelConfig, layers: Sequence[int], tokens: float, pairs: float, logits: float, absorbed: bool = False
) -> dict[str, float]:
    """Forward FLOPs of these layers for `tokens` tokens that form `pairs` query-key pairs, and of the head for those of
    `logits` tokens."""
    n_moe = sum(map(config.has_experts, layers))
    expert = 3 * config.hidden_size * config.moe_intermediate_size  # gate, up, down
    weights = {
        "projections": len(layers) * projection_weights(config),
        "mlp": (len(layers) - n_moe) * 3 * config.hidden_size * config.intermediate_size,
        "router": n_moe * config.hidden_size * config.n_routed_experts,
        "shared_experts": n_moe * config.n_shared_experts * expert,
        "routed_experts": n_moe * config.num_experts_per_tok * expert,
    }
    # Multiply-adds of a head for a query and a key: the widths of score and value.
    score_and_value = config.qk_head_dim + config.v_head_dim
    if config.family == "dense":
        score_and_value = 2 * config.head_dim
    elif absorbed:
        score_and_value = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    attention = 2.0 * pairs * len(layers) * config.num_attention_heads * score_and_value
    ends = {"attention": attention, "head": 2.0 * logits * config.vocab_size * config.hidden_size}
    return {part: 2.0 * tokens * count for part, count in weights.items()} | ends
