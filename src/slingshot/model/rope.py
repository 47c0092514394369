"""Rotary position embeddings: plain, YaRN and Llama 3 frequencies; interleaved pairs (DeepSeek) or half-split (Llama).

cos_BTR, sin_BTR = rotary(config, positions_BT)        # R = rotated width / 2
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from slingshot.config import ModelConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature: 0.1 mscale ln(factor) + 1 (arXiv 2309.00071, as in DeepSeek-V3's inference code)."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Attention's scale: width^-0.5, times mscale^2 under YaRN (DeepSeek-V3)."""
    scale = config.qk_head_dim**-0.5
    rope = config.rope_scaling
    if config.family == "deepseek_v3" and rope is not None and rope.rope_type == "yarn" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def frequencies(config: ModelConfig) -> Tensor:
    """Angular frequency of each rotated pair, float32 [R]."""
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

    low = max(math.floor(pair_with_rotations(rope.beta_fast)), 0)
    high = min(math.ceil(pair_with_rotations(rope.beta_slow)), width - 1)
    ramp = (torch.arange(width // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    interpolated = ramp.clamp(0, 1)
    return plain / rope.factor * interpolated + plain * (1 - interpolated)


def rotary(config: ModelConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles, float32 [B, T, R]."""
    angles = positions_BT[..., None].float() * frequencies(config).to(positions_BT.device)
    rope = config.rope_scaling
    magnitude = 1.0
    if rope is not None and rope.rope_type == "yarn":
        magnitude = yarn_mscale(rope.factor, rope.mscale)
        if rope.mscale_all_dim:
            magnitude /= yarn_mscale(rope.factor, rope.mscale_all_dim)
    return angles.cos() * magnitude, angles.sin() * magnitude


def rotate(x_BTHR: Tensor, cos_BTR: Tensor, sin_BTR: Tensor, interleaved: bool) -> Tensor:
    """Turn the pairs of x by the given angles. Interleaved input comes out half-split: a fixed permutation that q and k share."""
    cos, sin = cos_BTR.unsqueeze(2), sin_BTR.unsqueeze(2)
    first, second = (x_BTHR[..., 0::2], x_BTHR[..., 1::2]) if interleaved else x_BTHR.chunk(2, dim=-1)
    first, second = first.float(), second.float()
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHR.dtype)
