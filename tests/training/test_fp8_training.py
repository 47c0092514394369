"""Training in FP8: what multiplies in it and what does not, and that the rest of a step is left as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from slingshot.model.config import ModelConfig
from slingshot.model.linear import GroupedLinear, Linear
from slingshot.model.transformer import Transformer
from slingshot.quantization.fp8_product import FP8Scaling, fp8_matmul
from slingshot.training.batch import Rows
from slingshot.training.fp8_training import train_in_fp8
from slingshot.training.language_model import LanguageModelLoss, language_model_step
from slingshot.training.parallel import Parallel

Make, Shape = Callable[..., Transformer], Callable[..., ModelConfig]


def step(model: Transformer) -> tuple[float, torch.Tensor]:
    """Loss and all gradients of one step over random tokens."""
    tokens_BT = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    segments_BT = torch.ones_like(tokens_BT)
    rows = Rows(tokens_BT, segments_BT, segments_BT.float())
    loss = language_model_step(model, rows, LanguageModelLoss(), 4, Parallel()).loss
    gradients = [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) == len([*model.parameters()])
    model.zero_grad()
    return loss, torch.cat(gradients)


def test_attention_mlps_and_experts_multiply_in_fp8_and_nothing_else_does(make_model: Make, deepseek: Shape) -> None:
    """DeepSeek-V3 leaves embedding, head, routers and norms (3.3.1), and of the MTP module what joins its inputs."""
    model = make_model(deepseek())
    train_in_fp8(model, "block")
    linears = {name: each for name, each in model.named_modules() if isinstance(each, Linear | GroupedLinear)}
    left = {name for name, each in linears.items() if each.fp8 is None}
    routers = {f"model.layers.{layer}.mlp.gate" for layer in (1, 2, 3)}
    assert left == {"model.embed_tokens", "lm_head", "model.layers.3.eh_proj"} | routers
    assert (
        len(linears) == len(left) + 4 * (5 + 2 + 3) - 2
    )  # of attention, experts and MLP; the dense layer has no experts


@pytest.mark.parametrize("scaling", ["block", "tensor"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen2"])
def test_a_step_is_near_one_in_float32_and_the_same_again_without(
    make_model: Make, deepseek: Shape, dense: Shape, family: str, scaling: FP8Scaling
) -> None:
    """e4m3 rounds by up to 1/16: loss and gradients move by per cents, not by nothing and not by much."""
    model = make_model(deepseek() if family == "deepseek_v3" else dense(attention_bias=True, tie_word_embeddings=True))
    loss, gradient = step(model)
    train_in_fp8(model, scaling)
    other, moved = step(model)
    assert 1e-5 < abs(other - loss) < 0.05 * loss
    assert 0.01 < (moved - gradient).norm() / gradient.norm() < 0.3
    train_in_fp8(model, None)
    assert step(model)[0] == loss


def test_a_bias_is_added_beside_the_product() -> None:
    layer = Linear(6, 4, bias=True)
    torch.nn.init.ones_(layer.weight)
    assert layer.bias is not None
    torch.nn.init.constant_(layer.bias, 0.7)
    layer.fp8 = "block"
    x_BTD = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
    expected = fp8_matmul(x_BTD.flatten(0, 1), layer.weight, "block").view(2, 3, 4) + 0.7
    assert torch.equal(layer(x_BTD), expected)
