"""Weights of few bits: nearest numbers, scales that err least, words as compressed-tensors packs them, GPTQ."""

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.kernels.native import native_levels
from slingshot.quantization.ggml_blocks import blocks
from slingshot.quantization.gptq import best_scales, gptq, rounded
from slingshot.quantization.integers import IntegerGrid, check_groups, from_numbers, pack, unpack

BITS = st.sampled_from([4, 8])


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@given(BITS, st.integers(1, 5), st.integers(1, 70), st.integers(0, 9))
def test_numbers_come_back_out_of_their_words(bits, rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, width), generator=generator, dtype=torch.int8)
    words = pack(numbers, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-width * bits // 32))
    assert torch.equal(unpack(words, bits, width), numbers)


def test_words_by_hand():
    """Number i stands at bits 4 i, moved up by 8: -8 is 0, 7 is 15; the ninth begins the next word."""
    numbers = torch.tensor([[-8, -7, 7, 0, 1, 2, 3, -1, 5]], dtype=torch.int8)
    assert [word & 0xFFFFFFFF for word in pack(numbers, 4)[0].tolist()] == [0x7BA98F10, 0x0000000D]
    assert pack(torch.tensor([[-128, 127, 0, 1]], dtype=torch.int8), 8)[0, 0].item() & 0xFFFFFFFF == 0x8180FF00


@given(BITS, st.sampled_from([32, 64]), st.integers(1, 4), st.integers(0, 9))
def test_a_scale_cuts_nothing_off_that_costs_more_than_it_gains(bits, group, rows, seed):
    weight = draw(rows, 128, seed=seed) * 10 ** (4 * draw(rows, 1, seed=seed + 100))
    numbers, scales = rounded(weight, IntegerGrid(bits, group))
    assert scales.shape == (rows, 128 // group) and torch.equal(scales, scales.bfloat16().float())
    groups = weight.unflatten(1, (-1, group))
    largest = groups.abs().amax(-1) / (127 if bits == 8 else 8)
    furthest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (largest[..., None] if bits == 8 else furthest / -8).bfloat16().float()  # as ggml's Q8_0 and Q4_0
    plain = (IntegerGrid(bits, group).nearest(groups / scale) * scale).flatten(1)
    ours = from_numbers(numbers, scales)
    counts = weight.abs() if bits == 4 else 1.0
    assert (((ours - weight) ** 2) * counts).sum() <= (((plain - weight) ** 2) * counts).sum() * (1 + 1e-5)
    if bits == 8:
        assert scales.min() > 0
        assert ((ours - weight).unflatten(1, (-1, group)).abs().amax(-1) <= largest * 0.75).all()


def test_eight_bits_find_the_grid_of_four_again():
    """What was of 16 levels before is nearly exact in some grid, and far nearer than under the largest weight's."""
    weight = torch.randint(0, 16, (64, 32), generator=torch.Generator().manual_seed(0)) * 0.37 - draw(64, 1) - 2.5
    found = from_numbers(*rounded(weight, IntegerGrid(8, 32)))
    scale = (weight.abs().amax(-1, keepdim=True) / 127).bfloat16().float()
    plain = (weight / scale).round() * scale
    assert ((found - weight) ** 2).sum() < 0.6 * ((plain - weight) ** 2).sum()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_furthest_of_four_bits_is_minus_eight_whatever_its_sign(sign):
    weight = sign * torch.tensor([[8.0, *(step / 4 - 3 for step in range(31))]])
    numbers, scales = rounded(weight, IntegerGrid(4, 32))
    assert numbers[0, 0] == -8 and numbers.max() <= 7 and scales.item() * sign < 0
    assert (from_numbers(numbers, scales) - weight).abs().max() <= 0.52


def test_a_group_of_zeros_stays_zeros():
    weight = torch.zeros(2, 64)
    assert torch.equal(from_numbers(*rounded(weight, IntegerGrid(4, 32))), weight)


def test_importance_moves_the_scale_to_what_counts():
    """One outlier that no input meets does not ruin the others of its group."""
    weight = draw(1, 32, seed=1) * 0.1
    weight[0, 5] = 1.0
    importance = torch.ones(32)
    importance[5] = 0.0
    errors, grid = [], IntegerGrid(4, 32)
    for given_importance in (None, importance):
        scales = best_scales(weight, grid, given_importance)
        error = (grid.nearest(weight / scales) * scales - weight) ** 2
        errors.append((error[0] * importance).sum())
    assert errors[1] < errors[0]


def test_gptq_errs_less_on_the_inputs_than_rounding_does():
    """Correlated inputs: the output's error falls, though the weights' own grows."""
    inputs = draw(512, 16, seed=2) @ draw(16, 64, seed=3) + 0.1 * draw(512, 64, seed=4)
    weight = draw(24, 64, seed=5)
    plain = from_numbers(*rounded(weight, IntegerGrid(4, 32)))
    numbers, scales = gptq(weight, inputs.T @ inputs, IntegerGrid(4, 32))
    found = from_numbers(numbers, scales)
    assert torch.equal(numbers, numbers.round()) and numbers.min() >= -8 and numbers.max() <= 7
    error = [((inputs @ (each - weight).T) ** 2).mean() for each in (plain, found)]
    assert error[1] < 0.4 * error[0]
    assert ((found - weight) ** 2).mean() > ((plain - weight) ** 2).mean()


def test_columns_are_rounded_from_the_largest_inputs_to_the_smallest():
    """The column that counts most is rounded to nearest, whichever it is; the others make its error good."""
    inputs = draw(512, 16, seed=2) @ draw(16, 64, seed=3)
    inputs[:, 50] *= 30
    weight, grid = draw(24, 64, seed=5), IntegerGrid(4, 32)
    numbers, scales = gptq(weight, inputs.T @ inputs, grid)
    assert torch.equal(numbers[:, 50], grid.nearest(weight[:, 50] / scales[:, 1]))
    assert not torch.equal(numbers[:, 0], grid.nearest(weight[:, 0] / scales[:, 0]))


@pytest.mark.parametrize("level", native_levels())
@pytest.mark.parametrize(("bits", "group", "width"), [(4, 32, 256), (4, 64, 192), (8, 32, 160), (8, 0, 150)])
def test_compiled_kernels_choose_scales_and_round_as_torch_does(bits, group, width, level, monkeypatch):
    """But where sums in another order put a near-tie the other way."""
    inputs, weight = draw(512, width, seed=2) @ draw(width, width, seed=3), draw(45, width, seed=5)
    weight[3, :64] = 0.0
    gram, grid, found = inputs.T @ inputs, IntegerGrid(bits, group), {}
    for name in ("off", level):
        monkeypatch.setenv("SLINGSHOT_NATIVE", name)
        found[name] = [*rounded(weight, grid), best_scales(weight, grid, gram.diagonal()), *gptq(weight, gram, grid)]
    for ours, expected in zip(found[level], found["off"], strict=True):
        assert (ours != expected).float().mean() < 0.01
    error = {
        name: ((inputs @ (from_numbers(*each[-2:]) - weight).T) ** 2).mean().item() for name, each in found.items()
    }
    assert error[level] == pytest.approx(error["off"], rel=0.01)


def test_gptq_without_correlation_is_rounding_to_nearest():
    weight = draw(8, 64, seed=6)
    for found, expected in zip(
        gptq(weight, torch.eye(64), IntegerGrid(8, 32)), rounded(weight, IntegerGrid(8, 32)), strict=True
    ):
        assert torch.equal(found, expected)


def test_gptq_leaves_inputs_that_never_come_to_rounding():
    gram = torch.eye(64)
    gram[:, 7] = gram[7] = 0.0
    weight = draw(4, 64, seed=7)
    numbers, _ = gptq(weight, gram, IntegerGrid(8, 64))
    assert torch.equal(numbers[:, 7], rounded(weight, IntegerGrid(8, 64))[0][:, 7])


@pytest.mark.parametrize("times", [1e-30, 1e30])
def test_gptq_takes_inputs_of_any_size(times):
    inputs, weight = draw(512, 64, seed=2), draw(8, 64, seed=6)
    gram, grid = inputs.T @ inputs, IntegerGrid(4, 32)
    for found, expected in zip(gptq(weight, gram * times, grid), gptq(weight, gram, grid), strict=True):
        assert (found != expected).float().mean() < 0.01  # a rounding that falls on a tie


def test_rows_that_are_no_whole_groups_are_refused_with_what_fits():
    check_groups((8, 96), 32, "w")
    with pytest.raises(SlingshotError, match="rows of 96 do not divide into groups of 64; group_size 32 does"):
        check_groups((8, 96), 64, "w")
    with pytest.raises(SlingshotError, match="groups of 32; fp8 takes any"):
        check_groups((8, 24), 32, "w")


@pytest.mark.parametrize(("bits", "kind"), [(4, Kind.Q4_0), (8, Kind.Q8_0)])
@pytest.mark.parametrize("group", [32, 64])
def test_ggml_blocks_hold_the_same_weights(bits, kind, group):
    weight = draw(5, 192, seed=8)
    numbers, scales = rounded(weight, IntegerGrid(bits, group))
    assert (scales.min() < 0) == (bits == 4)
    stored = blocks(numbers, scales, bits).numpy()
    assert stored.shape == (5, 6 * (2 + 4 * bits))
    assert torch.equal(torch.from_numpy(dequantize(stored, kind)), from_numbers(numbers, scales))


def test_scales_that_float16_has_not_are_refused():
    for scale in (1e6, 1e-8):
        with pytest.raises(ValueError, match="float16 does not hold"):
            blocks(torch.ones(1, 32, dtype=torch.int8), torch.full((1, 1), scale).bfloat16().float(), 4)
