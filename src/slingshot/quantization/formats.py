"""How quantised matrices lie in a checkpoint: what stands beside them, under which names. No torch."""

from __future__ import annotations

FP8_BLOCK = 128  # DeepSeek-V3's weight_block_size, both ways
SCALE = "_scale_inv"  # appended to the name of an FP8 matrix; despite its name the number multiplies


def scale_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """Shape of the block scales of an FP8 matrix [out, in]; blocks at the edges may be partly filled."""
    rows, columns = shape
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)
