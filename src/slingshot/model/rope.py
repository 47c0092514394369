"""Rotary position embeddings: plain, YaRN and Llama 3 frequencies; interleaved pairs (DeepSeek) or half-split (Llama).

cos_XR, sin_XR = rotary(config, positions_X)        # X any leading dimensions, R = rotated width / 2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slingshot.model.config import ModelConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1 (arXiv 2309.00071, 3.4; mscale is DeepSeek's)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Attention's scale: width^-0.5, for DeepSeek-V3 under YaRN times yarn_mscale(factor, mscale_all_dim)^2.

    The two programs DeepSeek released agree where mscale = mscale_all_dim, as in V3's config.json: inference/model.py
    knows one mscale, squares it into this scale and leaves cos and sin alone. Where they differ, modeling_deepseek.py
    is followed, as it reads this config.json: mscale_all_dim here, mscale and mscale_all_dim in `rotation_scale`. As
    there, YaRN holds at every length, where inference/model.py leaves it out when its context is no longer than the
    original one.
    """
    scale = config.qk_head_dim**-0.5
    rope = config.rope_scaling
    if config.family == "deepseek_v3" and rope is not None and rope.rope_type == "yarn":
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def rotation_scale(config: ModelConfig) -> float:
    """Factor of cos and sin under YaRN; 1 without.

    DeepSeek-V3: yarn_mscale(factor, mscale) / yarn_mscale(factor, mscale_all_dim), as in its modeling_deepseek.py.
    transformers takes that only where both are given and not 0, and yarn_mscale(factor, 1) otherwise: DeepSeek is
    followed for deepseek_v3, transformers, whose models these are, for the dense family (Qwen2.5's long-context configs
    give neither). A config's attention_factor replaces all of that, as in transformers; attn_factor multiplies it, as
    in vLLM, for which it was written.
    """
    rope = config.rope_scaling
    if rope is None or rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        own = rope.attention_factor
    elif config.family == "dense" and not (rope.mscale and rope.mscale_all_dim):
        own = yarn_mscale(rope.factor, 1.0)
    else:
        own = yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return own * rope.attn_factor


def frequencies(config: ModelConfig) -> Tensor:
    """Angular frequency of each rotated pair, float32 [R].

    YaRN: by parts (arXiv 2309.00071, 3.2), the ramp's ends rounded (unless truncate is false) and clamped as in
    modeling_deepseek.py and transformers. Llama 3: as in transformers, which took it over from Meta's release of 3.1.
    """
    width = config.head_dim if config.family == "dense" else config.qk_rope_head_dim
    exponent = torch.arange(0, width, 2, dtype=torch.float32) / width
    plain = 1.0 / config.rope_theta**exponent
    rope = config.rope_scaling
    if rope is None:
        return plain
    length = rope.original_max_position_embeddings
    if rope.rope_type == "llama3":
        wavelength = 2 * math.pi / plain
        smooth = (length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = smooth.clamp(0, 1)
        return (1 - smooth) * plain / rope.factor + smooth * plain

    def pair_with_rotations(rotations: float) -> float:
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low, high = pair_with_rotations(rope.beta_fast), pair_with_rotations(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / (high - low or 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def rotary(config: ModelConfig, positions_X: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles times `rotation_scale`, float32 [X, R]."""
    angles = positions_X[..., None].float() * frequencies(config).to(positions_X.device)
    scale = rotation_scale(config)
    return angles.cos() * scale, angles.sin() * scale


def rotate(x_XHR: Tensor, cos_XR: Tensor, sin_XR: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of x by the given angles. Interleaved input comes out half-split, as q and k alike do."""
    cos, sin = cos_XR.unsqueeze(-2), sin_XR.unsqueeze(-2)
    first, second = (x_XHR[..., 0::2], x_XHR[..., 1::2]) if interleaved else x_XHR.chunk(2, dim=-1)
    if x_XHR.device.type != "cpu" and not torch.is_grad_enabled():  # fewer kernels; products with float32 are float32
        return _turned(first, second, cos, sin).to(x_XHR.dtype)
    first, second = first.float(), second.float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_XHR.dtype)


def _turned(first: Tensor, second: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    halves = (first * cos).addcmul_(second, sin, value=-1), (second * cos).addcmul_(first, sin)
    return torch.cat(halves, dim=-1)
