"""FP8 blocks: within the format's error, exact where it is, right at ragged edges."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slingshot.quantization.formats import scale_shape
from slingshot.quantization.fp8 import dequantize, quantize

SHAPES = st.tuples(st.integers(1, 300), st.integers(1, 300))


def matrix(shape, seed):
    """Rows and columns of very different size, so that a block with another block's scale is far off."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (10 ** (6 * torch.rand(size, generator=generator) - 3) for size in shape)
    return torch.randn(shape, generator=generator) * rows[:, None] * columns


@given(SHAPES, st.integers(0, 9))
def test_a_round_trip_stays_within_the_formats_error(shape, seed):
    """e4m3 has 3 bits behind the leading one: half a step is 1/16; below 2^-6 half of one is 2^-10."""
    weight = matrix(shape, seed)
    stored, scale = quantize(weight)
    assert stored.shape == weight.shape and tuple(scale.shape) == scale_shape(shape)
    values = dequantize(stored, scale)
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            place = slice(128 * row, 128 * row + 128), slice(128 * column, 128 * column + 128)
            block, error = weight[place].abs(), (values[place] - weight[place]).abs()
            assert scale[row, column] == pytest.approx(block.max().item() / 448, rel=1e-6)
            assert (error <= torch.maximum(block / 16, scale[row, column] * 2**-10) * (1 + 1e-5)).all()


def test_values_by_hand():
    """896 makes the scale 2; e4m3 holds 1 to 16 in steps of 1/8 of their power of two, and 17 / 2 rounds to even."""
    weight = torch.zeros(130, 129)
    weight[0, :4] = torch.tensor([896.0, 2.0, -17.0, 0.001])
    weight[129, 128] = -448.0
    stored, scale = quantize(weight)
    assert scale.tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert stored[0, :4].float().tolist() == [448.0, 1.0, -8.0, 0.0]
    assert dequantize(stored, scale)[0, :4].tolist() == [896.0, 2.0, -16.0, 0.0]
    assert dequantize(stored, scale)[129, 128] == -448.0
    assert not dequantize(stored, scale)[1:129].any()


@given(SHAPES, st.data())
def test_rows_alone_are_the_rows_of_the_whole(shape, data):
    stored, scale = quantize(matrix(shape, 0))
    first = data.draw(st.integers(0, shape[0] - 1))
    last = data.draw(st.integers(first + 1, shape[0]))
    assert torch.equal(dequantize(stored[first:last], scale, first), dequantize(stored, scale)[first:last])


def test_what_is_stored_already_is_stored_the_same_again():
    stored, scale = quantize(matrix((200, 260), 3))
    again, scale_again = quantize(dequantize(stored, scale))
    assert torch.equal(stored.view(torch.uint8), again.view(torch.uint8)) and torch.equal(scale, scale_again)


def test_scales_of_ue8m0_are_the_next_power_of_two():
    """Nothing is cut off: the largest of a block becomes 224 to 448; a power of two itself stays."""
    weight = matrix((200, 260), 4)
    weight[0, 0] = 448.0 * 4
    weight[:128, :128].clamp_(-448.0 * 4, 448.0 * 4)
    stored, scale = quantize(weight, "ue8m0")
    exact = quantize(weight)[1]
    assert scale.dtype == torch.float8_e8m0fnu and scale[0, 0].float() == 4.0
    assert ((scale.float() >= exact) & (scale.float() < 2 * exact)).all()
    assert torch.equal(scale.float().log2(), scale.float().log2().round())
    step = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)[:200, :260]
    error = (dequantize(stored, scale) - weight).abs()
    assert (error <= torch.maximum(weight.abs() / 16, step * 2**-10) * (1 + 1e-5)).all()
