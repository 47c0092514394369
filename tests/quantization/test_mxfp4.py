"""MXFP4 to the bit: e2m1's sixteen numbers, ue8m0's powers of two, two numbers a byte."""

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize as ggml_dequantize

from slingshot.quantization import mxfp4
from slingshot.quantization.gptq import gptq, rounded
from slingshot.quantization.mxfp4 import MXFP4Grid

ALL = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_bytes_by_hand():
    """The first number in the low half; 8 is the sign; a scale of 1 is 127, of 1/4 125, of 2 128."""
    row = torch.tensor([*ALL, *(-each for each in ALL)] * 2)
    values, scales = rounded(torch.stack([row, row / 4, row * 2]), MXFP4Grid())
    assert mxfp4.exponents(scales).tolist() == [[127], [125], [128]]
    packed = mxfp4.pack(values)
    assert packed.dtype == torch.uint8 and packed[0, :8].tolist() == [0x10, 0x32, 0x54, 0x76, 0x90, 0xBA, 0xDC, 0xFE]
    assert torch.equal(packed[1], packed[0]) and torch.equal(packed[2], packed[0])
    assert torch.equal(mxfp4.dequantize(packed, mxfp4.exponents(scales))[1], row / 4)


def test_halves_go_to_the_number_whose_last_bit_is_0():
    scaled = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 5.01, 100.0, -0.26, -5.0])
    assert MXFP4Grid().nearest(scaled).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 6, -0.5, -4]


def test_weights_are_what_the_gguf_package_reads_of_the_same_numbers():
    """ggml's MXFP4: the exponent's byte, then number i and number i + 16 in a byte; in twos, at half of the scale."""
    values, scales = rounded(draw(4, 32) * 10 ** draw(4, 1, seed=1), MXFP4Grid())
    packed, exponents = mxfp4.pack(values), mxfp4.exponents(scales)
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    theirs = torch.cat([exponents, codes[:, :16] | codes[:, 16:] << 4], dim=1)
    found = torch.from_numpy(ggml_dequantize(theirs.numpy(), Kind.MXFP4))
    assert torch.equal(found, mxfp4.dequantize(packed, exponents))


@pytest.mark.parametrize("seed", range(4))
def test_the_better_of_two_powers_is_taken(seed):
    weight = draw(8, 64, seed=seed) * 10 ** draw(8, 1, seed=seed + 9)
    values, scales = rounded(weight, MXFP4Grid())
    assert torch.equal(scales, scales.log2().round().exp2()) and (values.abs() <= 6).all()
    found = (values.view(8, 2, 32) * scales[..., None]).flatten(1)
    for other in (scales / 2, scales * 2):
        parts = weight.view(8, 2, 32) / other[..., None]
        others = (MXFP4Grid().nearest(parts) * other[..., None]).flatten(1)
        assert ((found - weight) ** 2).sum() < ((others - weight) ** 2).sum()


def test_zeros_stay_and_the_smallest_weights_are_not_lost():
    weight = torch.zeros(2, 32)
    weight[1] = 2.0**-120 * torch.arange(32)
    values, scales = rounded(weight, MXFP4Grid())
    found = mxfp4.dequantize(mxfp4.pack(values), mxfp4.exponents(scales))
    assert not found[0].any() and ((found[1] - weight[1]).abs() <= 2.0**-120 * 8).all() and found[1, 31] > 0


def test_calibration_errs_less_on_the_inputs():
    inputs = draw(512, 16, seed=2) @ draw(16, 64, seed=3) + 0.1 * draw(512, 64, seed=4)
    weight = draw(24, 64, seed=5)
    errors = []
    for values, scales in (rounded(weight, MXFP4Grid()), gptq(weight, inputs.T @ inputs, MXFP4Grid())):
        found = (values.view(24, 2, 32) * scales[..., None]).flatten(1)
        errors.append(((inputs @ (found - weight).T) ** 2).mean())
    assert errors[1] < 0.5 * errors[0]
