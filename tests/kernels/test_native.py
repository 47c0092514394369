"""Native products are torch's at every level this processor has; a library that is not ours is left aside."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.kernels.native import (
    FLOAT4,
    LIBRARY,
    NativeKernels,
    aligned_bytes,
    native_kernels,
    native_library,
    padded,
    pointer,
)
from slingshot.model.dynamic import whole_product
from slingshot.quantization.mxfp4 import E2M1

pytestmark = pytest.mark.skipif(native_library() is None, reason="no native library is built here")


def drawn(rows: int, width: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@given(data=st.data())
def test_products_with_packed_weights_are_torchs(
    kernels: NativeKernels, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Any rows and widths, one thread or several: float32 sums of products of the numbers as they are."""
    rows = data.draw(st.one_of(st.integers(1, 9), st.integers(10, 70)))
    width, out = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 150))
    threads, masters = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    x_ND = drawn(rows, width, 0).to(dtype)
    weight_FD = drawn(out, width, 1).to(torch.float32 if masters else dtype)
    y_NF = kernels.matmul(x_ND, kernels.pack(weight_FD, dtype), out, threads)
    expected_NF = x_ND.double() @ weight_FD.to(dtype).double().T
    scale_NF = x_ND.double().abs() @ weight_FD.to(dtype).double().abs().T
    assert ((y_NF - expected_NF).abs() / scale_NF).max() < 2e-6  # float32's rounding, in any order of summation


def test_products_of_long_prompts_go_in_parts(kernels: NativeKernels) -> None:
    x_ND, weight_FD = (drawn(rows, 1536, rows).bfloat16() for rows in (700, 48))
    y_NF = kernels.matmul(x_ND, kernels.pack(weight_FD, torch.bfloat16), 48, threads=2)
    torch.testing.assert_close(y_NF, x_ND.float() @ weight_FD.float().T, atol=1e-3, rtol=1e-4)


def quantized_product(
    kernels: NativeKernels, x_ND: torch.Tensor, numbers_FD: torch.Tensor, scales_FG: torch.Tensor,
    bits: int, group: int, threads: int,
) -> torch.Tensor:  # fmt: skip
    """x W^T in float32, W in the kernels' order; numbers of `FLOAT4` are twice its values. group 0: a row."""
    shape, y_NF = numbers_FD.shape, torch.empty(len(x_ND), len(numbers_FD))
    packed = aligned_bytes(kernels.door("quantized_bytes", ctypes.c_size_t)(bits, group, *shape))
    numbers, scales, x = numbers_FD.to(torch.int8).contiguous(), scales_FG.float().contiguous(), padded(x_ND)
    kernels.door("pack_quantized")(bits, group, pointer(numbers), pointer(scales), *shape, pointer(packed))
    kinds = int(x_ND.dtype == torch.bfloat16), bits, group
    kernels.door("matmul_quantized")(*kinds, *shape, pointer(packed), pointer(x), len(x_ND), pointer(y_NF), threads)
    return y_NF


def to_groups(weight_FD: torch.Tensor, group: int, largest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers and scales, by groups: those of weights that reach -8 have either sign."""
    parts = weight_FD.float().unflatten(1, (-1, group))
    scales_FG = parts.abs().amax(-1).clamp(min=1e-30) / largest
    if largest == 8:
        scales_FG = torch.where(parts.amax(-1) > -parts.amin(-1), -scales_FG, scales_FG)
    numbers = (parts / scales_FG[..., None]).round().clamp(max=largest - (largest == 8))
    return numbers.flatten(1), scales_FG


@pytest.mark.parametrize("bits", [8, 4, FLOAT4])
@given(data=st.data())
def test_products_with_quantized_weights_are_those_of_their_numbers(
    kernels: NativeKernels, bits: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    """Up to 16 rows of x become whole numbers too, as here; more meet the weights as numbers of their own dtype."""
    group = data.draw(st.sampled_from([32, 64, 128]))
    rows, width = data.draw(st.integers(1, 24)), group * data.draw(st.integers(1, 4))
    out, threads = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 2))
    largest = 127 if bits == 8 else 8
    x_ND = drawn(rows, width, 0).to(dtype)
    numbers_FD, scales_FG = to_groups(drawn(out, width, 1), group, largest)
    if bits == FLOAT4:  # of the same 15 numbers others, under powers of two
        numbers_FD = 2 * E2M1[numbers_FD.abs().clamp(max=7).int()] * numbers_FD.sign()
        scales_FG = torch.exp2(scales_FG.abs().log2().round())
    y_NF = quantized_product(kernels, x_ND, numbers_FD, scales_FG, bits, group, threads)
    weight_FD = numbers_FD * scales_FG.repeat_interleave(group, 1)
    if rows <= 16:  # a number of x near the middle of two may go either way: half a step of each group's scale at most
        x_numbers, x_scales = to_groups(x_ND, group, 127)
        seen_ND = x_numbers * x_scales.repeat_interleave(group, 1)
        slack = ((x_ND.float() / x_scales.repeat_interleave(group, 1)) % 1 - 0.5).abs() < 1e-4
        slack_NF = (slack * x_scales.repeat_interleave(group, 1)) @ weight_FD.abs().T
    else:
        seen_ND, weight_FD = x_ND.float(), weight_FD.to(dtype).float()
        slack_NF = torch.zeros(rows, out)
    scale_NF = seen_ND.abs() @ weight_FD.abs().T
    assert ((y_NF - seen_ND @ weight_FD.T).abs() <= 4e-6 * scale_NF + slack_NF).all()


@pytest.mark.parametrize("rows", [1, 3, 17, 70])
def test_rows_that_share_a_scale_are_multiplied_as_torch_multiplies_whole_numbers(
    kernels: NativeKernels, dtype: torch.dtype, rows: int
) -> None:
    """To the bit, ties of x's rounding too, whatever the number of rows."""
    generator = torch.Generator().manual_seed(rows)
    x_ND = (torch.randn(rows, 12320, generator=generator) * torch.logspace(-2, 2, rows)[:, None]).to(dtype)
    x_ND[:, :2], x_ND[0, 5:] = x_ND.abs().amax(1, keepdim=True) * torch.tensor([1.0, 0.5]), 0
    numbers_FD = torch.randint(-128, 128, (40, 12320), generator=generator, dtype=torch.int8)
    scales_F1 = torch.rand(40, 1, generator=generator) + 0.1
    y_NF = quantized_product(kernels, x_ND, numbers_FD, scales_F1, 8, 0, 2)
    assert torch.equal(y_NF.to(x_ND.dtype), whole_product(x_ND, numbers_FD, scales_F1))


def test_what_is_no_number_stays_none(kernels: NativeKernels) -> None:
    """In x, where it goes through 8 bits; numbers that are all nearly zero do not become infinite by their scale."""
    x_ND = torch.ones(3, 64)
    x_ND[0, 5], x_ND[1, 40], x_ND[2] = torch.nan, torch.inf, 1e-40
    y_NF = quantized_product(kernels, x_ND, torch.ones(20, 64), torch.ones(20, 2), 8, 32, 1)
    assert not y_NF[:2].isfinite().any() and (y_NF[2].abs() < 1e-30).all()


def test_a_level_is_chosen_by_its_name() -> None:
    assert native_kernels("off") is None
    with pytest.raises(SlingshotError, match="choose off, avx2"):
        native_kernels("sse")


@pytest.mark.parametrize("content", [b"no library", None], ids=["broken", "foreign"])
def test_a_library_that_is_not_ours_is_named_and_left_aside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes | None
) -> None:
    import _ctypes

    strange = tmp_path / LIBRARY.name
    strange.write_bytes(Path(_ctypes.__file__).read_bytes() if content is None else content)
    monkeypatch.setattr("slingshot.kernels.native.LIBRARY", strange)
    with pytest.warns(UserWarning, match=f"{strange} is no library of slingshot's and is left aside"):
        assert native_library.__wrapped__() is None
