"""LoRA: what is trained, that merged weights compute the same, and what PEFT makes of an adapter."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.adapter import write_adapter
from slingshot.checkpoint.layout import adapter_numbers
from slingshot.cost.flops import forward_parts, training_parts
from slingshot.model.config import ModelConfig
from slingshot.model.linear import GroupedLinear, Linear, LoRAGroupedLinear, LoRALinear
from slingshot.model.transformer import Transformer
from slingshot.training.lora import LoRAConfig, adapters, add_lora, merged, twin
from slingshot.training.optimizer import Optimizer, OptimizerConfig
from slingshot.training.parallel import Parallel

COMMON = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = {**COMMON, "family": "dense", "intermediate_size": 48, "num_key_value_heads": 2}
MOE = {
    **COMMON, "family": "deepseek_v3", "intermediate_size": 48, "moe_intermediate_size": 16, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1,
}  # fmt: skip
TOKENS_BT = torch.arange(24).view(2, 12) % 64


def adapted(shape: dict[str, object], moved: bool = True, **keys: object) -> Transformer:
    """A model with adapters; `moved`: their B are not zero."""
    generator = torch.Generator().manual_seed(1)
    model = Transformer.empty(ModelConfig.parse(shape, "test"))
    model.init_weights(generator)
    add_lora(model, LoRAConfig.parse({"rank": 4, **keys}, "lora"), 0, Parallel())
    for name, each in adapters(model).items() if moved else ():
        if name.endswith("lora_B"):
            each.normal_(0, 0.05, generator=generator)
    return model


def logits(model: Transformer) -> torch.Tensor:
    found = model(TOKENS_BT).logits_BTV
    assert found is not None
    return found


def test_gradients_are_those_of_the_change_written_out() -> None:
    generator = torch.Generator().manual_seed(0)
    base = Linear(6, 5).double()
    torch.nn.init.normal_(base.weight, generator=generator)
    layer = LoRALinear(base.requires_grad_(False), torch.randn(3, 6, generator=generator).double(), scale=2.0)
    torch.nn.init.normal_(layer.lora_B, generator=generator)
    a, b = (each.detach().clone().requires_grad_() for each in (layer.lora_A, layer.lora_B))
    x = torch.randn(7, 6, generator=generator).double()
    layer(x).square().sum().backward()
    (x @ (base.weight + 2.0 * (b @ a)).T).square().sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, a.grad)
    torch.testing.assert_close(layer.lora_B.grad, b.grad)
    assert layer.weight.grad is None


@pytest.mark.parametrize("out", [(5,), (2, 5)])
def test_each_expert_has_a_change_of_its_own(out: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    base = GroupedLinear(3, 6, *out)
    torch.nn.init.normal_(base.weight, generator=generator)
    lora_A = torch.randn(3, *out[:-1], 2, 6, generator=generator)
    layer = LoRAGroupedLinear(base.requires_grad_(False), lora_A, scale=2.0)
    torch.nn.init.normal_(layer.lora_B, generator=generator)
    x, counts = torch.randn(7, 6, generator=generator), [4, 0, 3]
    whole = GroupedLinear(3, 6, *out)
    whole.weight = torch.nn.Parameter(layer.matrix(torch.float32).detach())
    torch.testing.assert_close(layer(x, counts), whole(x, counts))


@pytest.mark.parametrize(("shape", "targets"), [(LLAMA, ["attention", "mlp"]), (MOE, ["attention", "mlp", "experts"])])
def test_merged_weights_give_the_logits_of_base_and_adapters(shape: dict[str, object], targets: list[str]) -> None:
    model = adapted(shape, targets=targets)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    plain = Transformer.empty(model.config)
    plain.load_state_dict(dict(merged(model)))
    torch.testing.assert_close(logits(model), logits(plain), atol=1e-5, rtol=1e-4)
    base = twin(plain)
    base.load_state_dict({name: before[name] for name in plain.state_dict()})
    assert (logits(model) - logits(base)).abs().max() > 1e-3
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())


def test_only_adapters_have_gradients_and_optimizer_state() -> None:
    model = adapted(MOE, moved=False, targets=["q_b_proj", "experts"])
    base = {name: each.clone() for name, each in model.state_dict().items() if name not in adapters(model)}
    optimizer = Optimizer(model, OptimizerConfig(name="adamw"))
    logits(model).square().mean().backward()
    assert {name for name, each in model.named_parameters() if each.grad is not None} == adapters(model).keys()
    optimizer.step(1.0)
    assert {name.rpartition(".")[0] for name in optimizer.state()} == adapters(model).keys()
    assert all(torch.equal(model.state_dict()[name], each) for name, each in base.items())


@pytest.mark.parametrize(
    ("keys", "says"),
    [({"targets": ["experts"]}, "no experts; it has attention, mlp"), ({"rank": 33}, "above 32, the smaller side of")],
)
def test_what_does_not_fit_the_model_is_refused(keys: dict[str, object], says: str) -> None:
    with pytest.raises(SlingshotError, match=says):
        adapted(LLAMA, **keys)


def test_peft_loads_an_adapter_and_gives_the_same_logits(tmp_path) -> None:
    import peft
    import transformers

    model = adapted({**LLAMA, "rms_norm_eps": 1e-6}, targets=["attention", "up_proj"], alpha=10)
    write_adapter(tmp_path, adapters(model), rank=4, alpha=10, base="base")
    keys = {key: each for key, each in LLAMA.items() if key != "family"}
    config = transformers.LlamaConfig(**keys, rms_norm_eps=1e-6, rope_theta=model.config.rope_theta)
    config.tie_word_embeddings = model.config.tie_word_embeddings
    theirs = transformers.LlamaForCausalLM(config)
    beside = adapters(model)
    theirs.load_state_dict({name: each for name, each in model.state_dict().items() if name not in beside})
    with torch.no_grad():
        found = peft.PeftModel.from_pretrained(theirs, str(tmp_path)).eval()(TOKENS_BT).logits
    torch.testing.assert_close(found, logits(model).detach(), atol=1e-5, rtol=1e-4)


def test_experts_are_written_one_by_one(tmp_path) -> None:
    model = adapted(MOE, targets=["experts"])
    write_adapter(tmp_path, adapters(model), rank=4, alpha=32, base="base")
    stored, stack = load_file(tmp_path / "adapter_model.safetensors"), "model.layers.1.mlp.experts"
    assert len(stored) == 4 * 3 * 2
    up = stored[f"base_model.model.{stack}.2.up_proj.lora_B.weight"]
    assert torch.equal(up, adapters(model)[f"{stack}.gate_up_proj.lora_B"][2, 1])


@pytest.mark.parametrize(
    ("shape", "targets"),
    [(LLAMA, ["attention"]), (LLAMA, ["q_proj", "mlp"]), (MOE, ["attention", "experts"]), (MOE, ["mlp", "down_proj"]),
     (MOE, ["gate_up_proj", "kv_b_proj"])],
)  # fmt: skip
def test_what_adapters_hold_is_known_from_the_architecture(shape: dict[str, object], targets: list[str]) -> None:
    """Of four experts a token passes through two."""
    model = adapted(shape, targets=targets)
    numbers = {name: each.numel() for name, each in adapters(model).items()}
    experts = sum(count for name, count in numbers.items() if ".experts." in name)
    held = sum(numbers.values())
    assert adapter_numbers(model.config, 4, targets) == (held, held - experts // 2)


def addmm_flops(y: list[int], a: list[int], b: list[int], **_: object) -> int:
    """torch counts addmm, but not what adds to y in place."""
    return 2 * a[0] * a[1] * b[1]


ALL_EXPERTS = MOE | {"n_routed_experts": 2, "num_nextn_predict_layers": 1}  # no expert's rows are padded


@pytest.mark.parametrize(
    ("shape", "targets"),
    [
        *((shape, targets) for shape in (LLAMA, ALL_EXPERTS) for targets in (None, ["attention", "mlp"])),
        (ALL_EXPERTS, ["attention", "mlp", "experts"]),
    ],
)
def test_flops_of_a_step_are_those_that_torch_counts(shape: dict[str, object], targets: list[str] | None) -> None:
    """With adapters frozen matrices have no gradient: torch's products are two thirds of a whole step's, and A and B.

    In float64, which none of the uncounted native kernels takes. Attention there multiplies whole squares.
    """
    config = ModelConfig.parse(shape, "test")
    model, passed = Transformer.empty(config), None
    model.init_weights(torch.Generator().manual_seed(1))
    if targets:
        lora = LoRAConfig(rank=4, targets=targets)
        add_lora(model, lora, 0, Parallel())
        model.recompute, passed = "none", lora.numbers_passed(config)
    tokens, mtp = torch.arange(64).view(2, 32), bool(config.num_nextn_predict_layers)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_flops}) as counter:
        output = model.double()(tokens, mtp=mtp)
        loss = output.logits_BTV.square().mean()
        if mtp:
            loss = loss + model.head.product(output.mtp_hidden_BTD).square().mean()
        loss.backward()
    flops = training_parts(config, [32, 32], False, passed)["training"]
    flops += training_parts(config, [33, 33], mtp, passed)["mtp"]  # torch runs the module at the last position, too
    of_a_layer = 3 * forward_parts(config, [32, 32])["attention"] / config.num_hidden_layers
    squares = (2 * 32 / 33 - 1) * of_a_layer * (config.num_hidden_layers + mtp)
    assert counter.get_total_flops() == pytest.approx(flops + squares)
