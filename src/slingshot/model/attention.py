"""Multi-head latent attention (DeepSeek-V2/V3) and grouped-query attention (Llama, Qwen).

Both take `Context`: rotary tables, the mask, and a cache view when decoding. MLA has two forms of the same mathematics: expanded
(keys and values of every head; used without a cache) and absorbed (queries moved into the latent space, so that only the latent is
cached and nothing is expanded).

Shape suffixes: B batch, T time, S attended time, H heads, D model width, K latent width, R rope width, N no-rope width, V value width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slingshot.model.cache import CacheView
from slingshot.model.config import ModelConfig
from slingshot.model.linear import Linear
from slingshot.model.rope import rotate, softmax_scale


class _RMSNorm(torch.autograd.Function):
    """The norm with its gradient written out: torch's composite takes 2 to 3 times as long on a CPU, most of it in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        normed = (x * inverse).to(x.dtype)
        ctx.save_for_backward(normed, weight, inverse)
        return normed * weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, weight, inverse = ctx.saved_tensors
        flat = (grads[0] * normed).flatten(0, -2)
        mean = torch.mv(flat, weight).div_(len(weight)).view(inverse.shape)
        dx = torch.addcmul(grads[0] * weight, normed, mean, value=-1).mul_(inverse.to(normed.dtype))
        return dx, flat.sum(0), None


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean of squares in float32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _RMSNorm.apply(x, self.weight.to(x.dtype), self.eps)
        return y


def attend(q_BHTW: Tensor, k_BHSW: Tensor, v_BHSV: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax attention without a cache: y_BHTV.

    Short rows on a CPU go through plain batched products: torch's fused kernel has a slow backward there (3.9 times the time at 64 rows
    of 128 tokens in bf16). Everything else takes the fused kernel. mask None is causal.
    """
    if q_BHTW.device.type == "cpu" and q_BHTW.shape[2] <= 256:
        batch, heads, time, _ = q_BHTW.shape
        if mask is None:
            mask = torch.ones(1, 1, time, time, dtype=torch.bool).tril()
        bias = torch.zeros(mask.shape, dtype=q_BHTW.dtype).masked_fill(~mask, -torch.finfo(q_BHTW.dtype).max / 2)
        bias = bias.expand(batch, heads, -1, -1).reshape(-1, time, bias.shape[-1])
        q, k, v = (t.reshape(batch * heads, -1, t.shape[-1]) for t in (q_BHTW, k_BHSW, v_BHSV))
        scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
        return torch.bmm(scores.softmax(-1), v).unflatten(0, (batch, heads))
    # the fused kernel wants one width for q, k and v: the narrower are padded with zeros, which change nothing
    width = max(q_BHTW.shape[-1], v_BHSV.shape[-1])
    q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q_BHTW, k_BHSW, v_BHSV))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return y[..., : v_BHSV.shape[-1]]


@dataclass
class Context:
    """What every layer of one forward pass shares."""

    cos_BTR: Tensor
    sin_BTR: Tensor
    positions_BT: Tensor
    mask: Tensor | None  # True where attention may look, broadcastable to [B, 1, T, S]; None means plain causal
    cache: CacheView | None


class MLA(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, 2.1; 2412.19437, 2.1.1).

    The norms of the two latents have an epsilon of their own, whatever rms_norm_eps is: so it stands in both programs DeepSeek released
    (inference/model.py, modeling_deepseek.py) and in transformers.
    """

    LATENT_EPS = 1e-6

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        heads, width = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, self.LATENT_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(width, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, self.LATENT_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(heads * config.v_head_dim, width)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        config = self.config
        q = (
            self.q_proj(x_BTD)
            if config.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD)))
        )
        q_BTHN, q_BTHR = q.unflatten(-1, (config.num_attention_heads, -1)).split(
            [config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1
        )
        latent_BTK, k_BTR = self.kv_a_proj_with_mqa(x_BTD).split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        latent_BTK = self.kv_a_layernorm(latent_BTK)
        q_BTHR = rotate(q_BTHR, context.cos_BTR, context.sin_BTR, interleaved=True)
        k_BT1R = rotate(k_BTR.unsqueeze(2), context.cos_BTR, context.sin_BTR, interleaved=True)
        if context.cache is None:
            y_BTHV = self._expanded(q_BTHN, q_BTHR, latent_BTK, k_BT1R, context)
        else:
            y_BTHV = self._absorbed(q_BTHN, q_BTHR, latent_BTK, k_BT1R, context)
        return self.o_proj(y_BTHV.flatten(2))

    def _expanded(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BTK: Tensor, k_BT1R: Tensor, context: Context) -> Tensor:
        config = self.config
        kv = self.kv_b_proj(latent_BTK).unflatten(-1, (config.num_attention_heads, -1))
        k_BTHN, v_BTHV = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        q = torch.cat((q_BTHN, q_BTHR), dim=-1).transpose(1, 2)
        k = torch.cat((k_BTHN, k_BT1R.expand(-1, -1, config.num_attention_heads, -1)), dim=-1).transpose(1, 2)
        y = attend(q, k, v_BTHV.transpose(1, 2), context.mask, self.scale)
        return y.transpose(1, 2)

    def _absorbed(self, q_BTHN: Tensor, q_BTHR: Tensor, latent_BTK: Tensor, k_BT1R: Tensor, context: Context) -> Tensor:
        config, cache = self.config, context.cache
        assert cache is not None and context.mask is not None
        entries_BSC = cache.update(self.layer, torch.cat((latent_BTK, k_BT1R.squeeze(2)), dim=-1), context.positions_BT)
        weight = self.kv_b_proj.weight.to(q_BTHN.dtype).unflatten(0, (config.num_attention_heads, -1))
        key_HNK, value_HVK = weight.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        batch, time = q_BTHN.shape[:2]
        q_latent = (
            torch.matmul(q_BTHN.flatten(0, 1).transpose(0, 1), key_HNK).transpose(0, 1).unflatten(0, (batch, time))
        )
        q_BXC = torch.cat((q_latent, q_BTHR), dim=-1).flatten(
            1, 2
        )  # X = T * H: heads share the keys, so they fold into the queries
        scores_BTHS = torch.bmm(q_BXC, entries_BSC.transpose(1, 2)).unflatten(1, (time, -1)).float() * self.scale
        scores_BTHS = scores_BTHS.masked_fill(~context.mask.transpose(1, 2), -torch.inf)
        weights_BXS = scores_BTHS.softmax(dim=-1).to(q_BXC.dtype).flatten(1, 2)
        mixed_BXK = torch.bmm(weights_BXS, entries_BSC[..., : config.kv_lora_rank])
        mixed_HYK = mixed_BXK.unflatten(1, (time, -1)).flatten(0, 1).transpose(0, 1)  # Y = B * T
        return torch.matmul(mixed_HYK, value_HVK.transpose(1, 2)).transpose(0, 1).unflatten(0, (batch, time))


class GQA(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) as in Llama, Qwen2 (bias) and Qwen3 (norms on q and k)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.scale = config, layer, softmax_scale(config)
        width, head_dim = config.hidden_size, config.head_dim
        self.q_proj = Linear(width, config.num_attention_heads * head_dim, bias=config.attention_bias)
        self.k_proj = Linear(width, config.num_key_value_heads * head_dim, bias=config.attention_bias)
        self.v_proj = Linear(width, config.num_key_value_heads * head_dim, bias=config.attention_bias)
        self.o_proj = Linear(config.num_attention_heads * head_dim, width)
        if config.qk_norm:
            self.q_norm = RMSNorm(head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(head_dim, config.rms_norm_eps)

    def forward(self, x_BTD: Tensor, context: Context) -> Tensor:
        config = self.config
        q, k, v = (proj(x_BTD).unflatten(-1, (-1, config.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q = rotate(q, context.cos_BTR, context.sin_BTR, interleaved=False)
        k = rotate(k, context.cos_BTR, context.sin_BTR, interleaved=False)
        if context.cache is not None:
            entries_BSC = context.cache.update(
                self.layer, torch.cat((k.flatten(2), v.flatten(2)), dim=-1), context.positions_BT
            )
            return self.o_proj(self._cached(q, entries_BSC, context))
        groups = config.num_attention_heads // config.num_key_value_heads
        q, k, v = (
            t.transpose(1, 2) for t in (q, k.repeat_interleave(groups, dim=2), v.repeat_interleave(groups, dim=2))
        )
        return self.o_proj(attend(q, k, v, context.mask, self.scale).transpose(1, 2).flatten(2))

    def _cached(self, q_BTHW: Tensor, entries_BSC: Tensor, context: Context) -> Tensor:
        """Queries of one group fold into rows of one product with their keys, which are thus never repeated: y_BTX, X all heads' values.

        Plain products: at one query a row, torch's fused CPU kernel takes several times as long.
        """
        assert context.mask is not None
        (batch, time), n_groups = q_BTHW.shape[:2], self.config.num_key_value_heads
        k, v = entries_BSC.to(q_BTHW.dtype).unflatten(-1, (2, n_groups, -1)).unbind(2)
        k_NSW, v_NSW = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))  # N = B * groups
        q_NXW = (
            q_BTHW.unflatten(2, (n_groups, -1)).transpose(1, 2).flatten(0, 1).flatten(1, 2)
        )  # X = T * heads of a group
        scores = (
            torch.bmm(q_NXW, k_NSW.transpose(1, 2)).unflatten(0, (batch, n_groups)).unflatten(2, (time, -1)).float()
            * self.scale
        )
        scores = scores.masked_fill(~context.mask.unsqueeze(3), -torch.inf)  # [B, groups, T, heads of a group, S]
        weights_NXS = scores.softmax(dim=-1).to(q_NXW.dtype).flatten(2, 3).flatten(0, 1)
        y = torch.bmm(weights_NXS, v_NSW).unflatten(0, (batch, n_groups)).unflatten(2, (time, -1))
        return y.transpose(1, 2).flatten(2)
