"""Multi-head latent attention (DeepSeek-V2/V3) and grouped-query attention (Llama, Qwen).

Both make queries, keys and values of the tokens they are given and let the context attend. MLA has two forms of the
same mathematics: expanded (keys and values of every head) and absorbed (queries moved into the latent space, where one
entry a token serves all heads: what an engine caches). The context says which it wants.

Shape suffixes: X leading dimensions of the tokens, H query heads, G key heads, D model width, K latent width, L that
of queries, R rope width, N no-rope width, V value width, W width of queries and keys.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from slingshot.kernels.calls import native_for
from slingshot.kernels.heads import turned_heads
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context
from slingshot.model.linear import Linear, RMSNorm
from slingshot.model.recompute import remade
from slingshot.model.rope import rotate, softmax_scale


class MLA(nn.Module):
    """Multi-head latent attention (arXiv 2405.04434, 2.1; 2412.19437, 2.1.1).

    The norms of the two latents have an epsilon of their own, whatever rms_norm_eps is: so it stands in both programs
    DeepSeek released (inference/model.py, modeling_deepseek.py) and in transformers.
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

    def forward(self, x_XD: Tensor, context: Context) -> Tensor:
        config, heads = self.config, self.config.num_attention_heads
        nope, rope, compressed = config.qk_nope_head_dim, config.qk_rope_head_dim, config.q_lora_rank is not None
        if compressed:
            low_XL = self.q_a_layernorm(self.q_a_proj(x_XD))
            q = remade(self.q_b_proj(low_XL), self.q_b_proj, low_XL)
        else:
            q = self.q_proj(x_XD)
        q_XHN, q_XHR = q.unflatten(-1, (heads, -1)).split([nope, rope], dim=-1)
        latent_XK, k_XR = self.kv_a_proj_with_mqa(x_XD).split([config.kv_lora_rank, rope], dim=-1)
        latent_XK, k_X1R = self.kv_a_layernorm(latent_XK), k_XR.unsqueeze(-2)
        if context.absorb:
            q_XHR, k_X1R = (rotate(x, context.cos_XR, context.sin_XR, interleaved=True) for x in (q_XHR, k_X1R))
            q_XHK = self.kv_b_proj.by_head(q_XHN, slice(0, nope), transposed=True)
            q_XHW, entries_X1W = torch.cat((q_XHK, q_XHR), -1), torch.cat((latent_XK.unsqueeze(-2), k_X1R), -1)
            mixed_XHK = context.attend(self.layer, q_XHW, entries_X1W, config.kv_lora_rank, self.scale)
            y_XHV = self.kv_b_proj.by_head(mixed_XHK, slice(nope, None))
        else:
            kv = remade(self.kv_b_proj(latent_XK), self.kv_b_proj, latent_XK)
            k_XHN, v_XHV = kv.unflatten(-1, (heads, -1)).split([nope, config.v_head_dim], dim=-1)
            q_XHW, k_XHW = _turned(q_XHN, q_XHR, context), _turned(k_XHN, k_X1R, context)
            if compressed:  # else q would be kept in its place
                remade(q_XHW, _turned, q_XHN, q_XHR, context)
            remade(k_XHW, _turned, k_XHN, k_X1R, context)
            y_XHV = context.attend(self.layer, q_XHW, k_XHW, v_XHV, self.scale)
        return self.o_proj(y_XHV.flatten(-2))


def _turned(plain_XHN: Tensor, x_XGR: Tensor, context: Context) -> Tensor:
    """Of every head what stays as it is, then the pairs that are turned, which all heads may share: W = N + R."""
    if (native := native_for(plain_XHN)) is not None:
        return turned_heads(native, plain_XHN, x_XGR, context.cos_XR, context.sin_XR, True)
    x_XGR = rotate(x_XGR, context.cos_XR, context.sin_XR, interleaved=True)
    return torch.cat((plain_XHN, x_XGR.expand(*plain_XHN.shape[:-1], -1)), -1)


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

    def forward(self, x_XD: Tensor, context: Context) -> Tensor:
        width = self.config.head_dim
        q_XHW, k_XGW, v_XGW = (p(x_XD).unflatten(-1, (-1, width)) for p in (self.q_proj, self.k_proj, self.v_proj))
        turn = partial(rotate, cos_XR=context.cos_XR, sin_XR=context.sin_XR, interleaved=False)
        if self.config.qk_norm:  # which keep what they are given
            q_XHW, k_XGW = self.q_norm(q_XHW), self.k_norm(k_XGW)
            q_XHW, k_XGW = remade(turn(q_XHW), turn, q_XHW), remade(turn(k_XGW), turn, k_XGW)
        else:
            q_XHW, k_XGW = turn(q_XHW), turn(k_XGW)
        return self.o_proj(context.attend(self.layer, q_XHW, k_XGW, v_XGW, self.scale).flatten(-2))
