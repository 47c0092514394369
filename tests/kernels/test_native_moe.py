"""Native router and experts are model/moe.py's at every level this processor has."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slingshot.kernels.native import NativeKernels, pointer
from slingshot.model.config import ModelConfig
from slingshot.model.moe import MLP, MoE

SMALLEST = {
    "family": "deepseek_v3", "vocab_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
    "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
}  # fmt: skip
TINY = {
    "hidden_size": 128, "moe_intermediate_size": 64, "n_routed_experts": 16, "num_experts_per_tok": 4,
    "n_shared_experts": 1, "n_group": 4, "topk_group": 2,
}  # fmt: skip
LARGER = {
    "hidden_size": 768, "moe_intermediate_size": 128, "n_routed_experts": 64, "num_experts_per_tok": 6,
    "n_shared_experts": 1, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
}  # fmt: skip


def drawn(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Weights of a size that keeps that of what passes through; the router stays float32."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        numbers = torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5
        parameter.data = numbers.to(torch.float32 if name == "gate.weight" else dtype)
    for buffer in module.buffers():
        buffer.copy_(torch.randn(buffer.shape, generator=generator) / 10)
    module.requires_grad_(False)


def numbers(rows: int, width: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native_mixture(
    kernels: NativeKernels, module: MoE | MLP, x_ND: Tensor, residual_ND: Tensor, threads: int
) -> tuple[Tensor, Tensor]:
    """residual + module(x) and the experts chosen (int16 [N, k]) by the native kernels."""
    moe = module if isinstance(module, MoE) else None
    shared = moe.shared_experts if moe is not None else module
    gate_up = down = shared_gate_up = shared_down = router = bias = None
    sizes, groups, scaling, normalized = [0, 0], [1, 1], 1.0, 0
    inner, shared_inner = 0, 0
    if isinstance(shared, MLP):
        shared_gate_up = torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
        shared_down, shared_inner = shared.down_proj.weight, len(shared.gate_proj.weight)
    if moe is not None:
        config, inner = moe.gate.config, moe.gate.config.moe_intermediate_size
        sizes = [config.n_routed_experts, config.num_experts_per_tok]
        groups, scaling = [config.n_group, config.topk_group], config.routed_scaling_factor
        normalized = int(config.norm_topk_prob)
        router, bias = moe.gate.weight, moe.gate.e_score_correction_bias
        gate_up, down = moe.experts.gate_up_proj.weight, moe.experts.down_proj.weight
    weights = (router, bias, gate_up, down, shared_gate_up, shared_down)
    y_ND, routed_Nk = residual_ND.clone(), torch.full((len(x_ND), sizes[1]), -1, dtype=torch.int16)
    kernels.door("moe")(
        int(x_ND.dtype == torch.bfloat16), x_ND.shape[1], inner, shared_inner, *sizes, *groups,
        ctypes.c_float(scaling), normalized, *(pointer(weight) for weight in weights), pointer(x_ND), len(x_ND),
        pointer(y_ND), pointer(routed_Nk), threads,
    )  # fmt: skip
    return y_ND, routed_Nk


def is_clear(module: MoE, x_ND: Tensor) -> Tensor:
    """Whether no choice of a token's would change if its scores did by a float32's rounding: bool [N]."""
    config, gate = module.gate.config, module.gate
    choice_NE = (x_ND.double() @ gate.weight.double().T).sigmoid() + gate.e_score_correction_bias
    margins = []
    if config.n_group > 1:
        grouped = choice_NE.unflatten(-1, (config.n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).sort(dim=-1, descending=True)
        if config.topk_group < config.n_group:
            margins.append(best.values[:, config.topk_group - 1] - best.values[:, config.topk_group])
        dropped = torch.ones_like(best.values, dtype=torch.bool)
        dropped.scatter_(1, best.indices[:, : config.topk_group], False)
        choice_NE = grouped.masked_fill(dropped[..., None], -torch.inf).flatten(1)
    ranked_NE = choice_NE.sort(dim=-1, descending=True).values
    margins += list((ranked_NE[:, :-1] - ranked_NE[:, 1:])[:, : config.num_experts_per_tok].nan_to_num(1).T)
    return torch.stack([*margins, torch.ones(len(x_ND))]).amin(0) > 1e-5


def check(kernels: NativeKernels, module: MoE | MLP, rows: int, width: int, dtype: torch.dtype, threads: int) -> Tensor:
    """Compares with torch the rows whose choice is clear, and says which these are."""
    drawn(module, dtype)
    x_ND, residual_ND = numbers(rows, width, dtype, 1), numbers(rows, width, dtype, 2)
    y_ND, routed_Nk = native_mixture(kernels, module, x_ND, residual_ND, threads)
    if isinstance(module, MoE):
        clear_N, (made_ND, routing) = is_clear(module, x_ND), module(x_ND)
        assert torch.equal(routed_Nk[clear_N].long(), routing.experts_Nk[clear_N])
    else:
        clear_N, made_ND = torch.ones(rows, dtype=torch.bool), module(x_ND)
    expected_ND = residual_ND + made_ND
    unit = 2e-6 if dtype == torch.float32 else 2**-7  # sums in another order, each rounding up to a unit off
    limit = 4 * unit * float(expected_ND.abs().max())
    torch.testing.assert_close(y_ND[clear_N], expected_ND[clear_N], atol=limit, rtol=2 * unit)
    return clear_N


@given(data=st.data())
def test_a_mixture_of_any_shape_is_torchs(kernels: NativeKernels, dtype: torch.dtype, data: st.DataObject) -> None:
    groups, members = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    kept, width = data.draw(st.integers(1, groups)), 8 * data.draw(st.integers(1, 20))
    shape = {
        "hidden_size": width,
        "moe_intermediate_size": 8 * data.draw(st.integers(1, 12)),
        "n_routed_experts": groups * members,
        "num_experts_per_tok": data.draw(st.integers(1, min(kept * members, 8))),
        "n_shared_experts": data.draw(st.integers(0, 2)),
        "n_group": groups,
        "topk_group": kept,
        "norm_topk_prob": data.draw(st.booleans()),
    }
    rows = data.draw(st.one_of(st.integers(1, 8), st.integers(9, 90)))
    module = MoE(ModelConfig.parse(SMALLEST | shape))
    check(kernels, module, rows, width, dtype, data.draw(st.integers(1, 3)))


@pytest.mark.parametrize("shape", [TINY, LARGER], ids=["tiny", "larger"])
@pytest.mark.parametrize("rows", [1, 256, 1100])
def test_mixtures_of_real_shapes_are_torchs(
    kernels: NativeKernels, rows: int, shape: dict[str, int], dtype: torch.dtype
) -> None:
    module = MoE(ModelConfig.parse(SMALLEST | shape))
    clear_N = check(kernels, module, rows, shape["hidden_size"], dtype, 2)
    assert clear_N.float().mean() > 0.9


@settings(max_examples=10)
@given(rows=st.integers(1, 70), width=st.integers(1, 100), inner=st.integers(1, 100), threads=st.integers(1, 3))
def test_without_experts_it_is_a_plain_feed_forward(
    kernels: NativeKernels, dtype: torch.dtype, rows: int, width: int, inner: int, threads: int
) -> None:
    check(kernels, MLP(width, inner), rows, width, dtype, threads)


def test_of_equal_scores_the_first_experts_are_chosen(kernels: NativeKernels) -> None:
    """Every expert scores a half; which of equals it takes, torch.topk leaves open."""
    module = MoE(ModelConfig.parse(SMALLEST | TINY))
    drawn(module, torch.float32)
    module.gate.weight.zero_()
    module.gate.e_score_correction_bias.zero_()
    x_ND = numbers(3, 128, torch.float32, 1)
    _, routed_Nk = native_mixture(kernels, module, x_ND, x_ND, 2)
    assert routed_Nk.tolist() == [[0, 1, 2, 3]] * 3
