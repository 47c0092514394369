"""MXFP4: numbers e2m1 of 4 bits, and a power of two for every 32 neighbours (OCP Microscaling Formats 1.0, 5.3.3).

    values_FD, scales_FG = rounded(weight_FD, MXFP4Grid())            # gptq.py; scales are powers of two
    packed_FB, exponents_FG = pack(values_FD), exponents(scales_FG)   # uint8: two numbers a byte; ue8m0
    weight_FD = dequantize(packed_FB, exponents_FG)                   # float32, exact in bfloat16 too

Bytes are those of compressed-tensors' `mxfp4-pack-quantized`: the first of two numbers in the low half.

Shape suffixes: F output width, D input width, G groups of 32, I numbers of a group,
C candidates, B bytes of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slingshot.quantization.formats import MX_BLOCK

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])  # by the lower three bits; the fourth is the sign
_LARGEST = 2  # the exponent of e2m1's largest power of two
_BIAS = 127


class MXFP4Grid:
    """e2m1's numbers and powers of two."""

    group, power = MX_BLOCK, 0

    def candidates(self, weight_FGI: Tensor) -> Tensor:
        """The standard's power of two (6.3: the largest number's own, less 2), and the next.

        Under the first the largest number may be cut off at 6; under the second it never is.
        """
        exponent_FG = weight_FGI.abs().amax(-1).frexp().exponent - 1 - _LARGEST + _BIAS
        exponents_CFG = torch.stack([exponent_FG, exponent_FG + 1]).clamp(0, 2 * _BIAS)
        return powers(exponents_CFG.to(torch.uint8))

    def nearest(self, scaled: Tensor) -> Tensor:
        """e2m1's nearest value, halves to the one whose last bit is 0; beyond 6 is 6."""
        size = scaled.abs()
        step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
        return torch.copysign(((size / step).round() * step).clamp(max=6.0), scaled)


def pack(values_FD: Tensor) -> Tensor:
    """Two of e2m1's values a byte, uint8 [F, D / 2]."""
    codes_FD = torch.bucketize(values_FD.abs().float(), E2M1).to(torch.uint8) | (values_FD < 0).to(torch.uint8) << 3
    return codes_FD[:, ::2] | codes_FD[:, 1::2] << 4


def exponents(scales_FG: Tensor) -> Tensor:
    """ue8m0 of powers of two: their exponents, 127 more."""
    return scales_FG.to(torch.float8_e8m0fnu).view(torch.uint8)


def powers(exponents_FG: Tensor) -> Tensor:
    """The powers of two that ue8m0's bytes stand for; 255 is no number."""
    return exponents_FG.view(torch.float8_e8m0fnu).float()


def dequantize(packed_FB: Tensor, exponents_FG: Tensor) -> Tensor:
    """The float32 weights that bytes stand for."""
    codes_FD = torch.stack([packed_FB & 15, packed_FB >> 4], dim=-1).flatten(-2).long()
    values_FD = torch.where(codes_FD < 8, 1.0, -1.0) * E2M1[codes_FD & 7]
    return (values_FD.unflatten(-1, (-1, MX_BLOCK)) * powers(exponents_FG)[..., None]).flatten(-2)
