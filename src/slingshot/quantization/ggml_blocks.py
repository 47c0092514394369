"""GGUF's blocks of 32 weights, made of numbers that are there already: Q4_0 and Q8_0 (block_q4_0, block_q8_0 of ggml).

    bytes_FB = blocks(numbers_FD, scales_FG, bits=4)      # uint8: float16 scale, then 16 bytes, or with 8 bits 32

Q4_0 adds 8 to a number; the first 16 of a block lie in the low halves of its bytes. Groups of several blocks repeat
their scale. Nothing is rounded but scales that float16 has not.

Shape suffixes: F output width, D input width, G groups of a row, K blocks of a row, I numbers of a block, B bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 32


def blocks(numbers_FD: Tensor, scales_FG: Tensor, bits: int) -> Tensor:
    """A row's blocks one after the other. ValueError where a scale is beyond what float16 holds exactly."""
    numbers_FKI = numbers_FD.unflatten(-1, (-1, BLOCK))
    scales_FK = scales_FG.repeat_interleave(numbers_FKI.shape[-2] // scales_FG.shape[-1], dim=-1)
    halves_FK = scales_FK.half()
    if not torch.equal(halves_FK.float(), scales_FK.float()):
        raise ValueError("has scales that float16 does not hold exactly; --dtype bfloat16 has room")
    if bits == 4:
        low_FKI, high_FKI = (numbers_FKI.int() + 8).to(torch.uint8).split(BLOCK // 2, dim=-1)
        packed_FKB = low_FKI | (high_FKI << 4)
    else:
        packed_FKB = numbers_FKI.to(torch.int8).contiguous().view(torch.uint8)
    return torch.cat([halves_FK[..., None].contiguous().view(torch.uint8), packed_FKB], dim=-1).flatten(-2)
