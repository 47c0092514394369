"""The native runner gives what the plain model gives, at this processor's first level and its best."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.engine.batch import FlatBatch
from slingshot.engine.engine import Engine
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.native_runner import NativeRunner
from slingshot.engine.runner import TorchRunner
from slingshot.engine.sampling import SamplingParams
from slingshot.kernels.native import NativeKernels, native_kernels
from slingshot.model.config import ModelConfig
from slingshot.model.dynamic import multiply_whole_numbers
from slingshot.model.transformer import Transformer
from slingshot.quantization.integers import WeightGrid

from .asking import LEVELS, logits_in_pieces, used_cache

EACH_LEVEL = pytest.mark.parametrize("kernels", LEVELS, indirect=True)
VOCABULARY = 83


@pytest.fixture(scope="module")
def kernels(request: pytest.FixtureRequest) -> NativeKernels | None:
    return native_kernels(request.param)


def dense_configs() -> st.SearchStrategy[ModelConfig]:
    """Llama's, Qwen2's and Qwen3's differences, widths that fill no register."""
    kind = st.sampled_from([{}, {"attention_bias": True}, {"qk_norm": True}])
    shape = st.fixed_dictionaries({
        "hidden_size": st.sampled_from([24, 40, 64, 100]), "intermediate_size": st.sampled_from([32, 72, 100]),
        "num_hidden_layers": st.integers(1, 3), "head_dim": st.sampled_from([8, 16, 40, 64]),
        "num_key_value_heads": st.integers(1, 3), "tie_word_embeddings": st.booleans(),
    })  # fmt: skip

    def config(kind: dict[str, Any], shape: dict[str, Any], per_group: int) -> ModelConfig:
        heads = shape["num_key_value_heads"] * per_group
        return ModelConfig(family="dense", vocab_size=VOCABULARY, num_attention_heads=heads, **kind, **shape)

    return st.builds(config, kind, shape, st.integers(1, 3))


def deepseek_configs() -> st.SearchStrategy[ModelConfig]:
    return st.builds(
        ModelConfig, family=st.just("deepseek_v3"), vocab_size=st.just(VOCABULARY),
        hidden_size=st.sampled_from([24, 40, 64]), intermediate_size=st.sampled_from([32, 72]),
        num_hidden_layers=st.integers(1, 3), num_attention_heads=st.integers(1, 4),
        q_lora_rank=st.sampled_from([None, 20, 32]), kv_lora_rank=st.sampled_from([8, 32, 40]),
        qk_nope_head_dim=st.sampled_from([6, 16, 32]), qk_rope_head_dim=st.sampled_from([8, 16]),
        v_head_dim=st.sampled_from([8, 24]), moe_intermediate_size=st.sampled_from([16, 20]),
        n_routed_experts=st.sampled_from([8, 16]), n_shared_experts=st.integers(0, 2), n_group=st.just(4),
        topk_group=st.integers(2, 4), num_experts_per_tok=st.integers(1, 4), first_k_dense_replace=st.integers(0, 3),
        norm_topk_prob=st.booleans(), routed_scaling_factor=st.sampled_from([1.0, 2.5]),
        num_nextn_predict_layers=st.integers(0, 1),
    )  # fmt: skip


def random_model(config: ModelConfig, dtype: torch.dtype) -> Transformer:
    """Weights that make every part matter. The routers' choices are far from ties: their biases stand well apart."""
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    model.init_weights(generator)
    for name, parameter in model.named_parameters():
        scale = 0.3 if parameter.dim() == 1 else 0.02 if name.endswith("mlp.gate.weight") else 0.15
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    for moe in model.moe_layers():
        moe.gate.e_score_correction_bias.copy_(torch.randperm(config.n_routed_experts, generator=generator) * 0.7)
    model.cast(dtype)
    return model.requires_grad_(False)


def runner_of(
    model: Transformer, dtype: torch.dtype, kernels: NativeKernels | None, bits: int | None = None
) -> NativeRunner | TorchRunner:
    cache = used_cache(model, dtype)
    return TorchRunner(model, cache) if kernels is None else NativeRunner(model, cache, kernels, bits)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@EACH_LEVEL
@settings(max_examples=8)
@given(config=st.one_of(dense_configs(), deepseek_configs()), data=st.data())
def test_steps_over_pages_give_the_plain_models_logits(
    kernels: NativeKernels, config: ModelConfig, data: st.DataObject
) -> None:
    """With one thread or two."""
    model = random_model(config, torch.float32)
    torch.set_num_threads(data.draw(st.integers(1, 2)))
    try:
        for found_V, expected_V in logits_in_pieces(runner_of(model, torch.float32, kernels), model, data):
            assert relative(found_V, expected_V) < 2e-5
    finally:
        torch.set_num_threads(1)


@EACH_LEVEL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=12)
@given(config=st.one_of(dense_configs(), deepseek_configs()), tokens=st.integers(1, 40))
def test_what_a_step_gives_besides_logits_is_the_torch_runners(
    kernels: NativeKernels, dtype: torch.dtype, config: ModelConfig, tokens: int
) -> None:
    """Hidden states, the experts chosen, logits of any tokens, and the MTP module's; in bfloat16 as well."""
    model = random_model(config, dtype)
    ids = [(7 * i + 3) % VOCABULARY for i in range(tokens)]
    batch = FlatBatch.of([(ids, 0, [3, 9, 4]), (ids[:5], 0, [7])], [tokens - 1, 0, tokens - 1], True, True)
    native, torchs = runner_of(model, dtype, kernels), runner_of(model, dtype, None)
    found, expected = native.forward(batch), torchs.forward(batch)
    tolerance = 2e-5 if dtype == torch.float32 else 6e-2
    assert found.hidden_ND is not None and expected.hidden_ND is not None
    assert relative(found.logits_RV, expected.logits_RV) < tolerance
    assert relative(found.hidden_ND.float(), expected.hidden_ND.float()) < tolerance
    if expected.routing_NLk is None:
        assert found.routing_NLk is None
    else:
        assert torch.equal(found.routing_NLk, expected.routing_NLk)
    if config.num_nextn_predict_layers:
        drafts = native.draft(batch, expected.hidden_ND), torchs.draft(batch, expected.hidden_ND)
        assert relative(drafts[0].logits_RV, drafts[1].logits_RV) < tolerance
        assert relative(drafts[0].hidden_ND.float(), drafts[1].hidden_ND.float()) < tolerance


@EACH_LEVEL
def test_new_weights_are_taken_over_when_told(kernels: NativeKernels) -> None:
    """Of masters in float32 too, from which the kernels make their own bfloat16."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = random_model(ModelConfig(family="dense", vocab_size=VOCABULARY, **shape), torch.float32)
    model.compute_dtype = torch.bfloat16
    batch = FlatBatch.of([(list(range(30)), 0, [1, 2])])
    native, torchs = runner_of(model, torch.bfloat16, kernels), runner_of(model, torch.bfloat16, None)
    before = native.forward(batch).logits_RV.clone()
    assert relative(before, torchs.forward(batch).logits_RV) < 6e-2
    for parameter in model.parameters():
        parameter.mul_(-0.7)
    native.refresh()
    after = native.forward(batch).logits_RV
    assert relative(after, torchs.forward(batch).logits_RV) < 6e-2
    assert relative(after, before) > 0.5


def rounded_to(model: Transformer, bits: int, group: int) -> Transformer:
    """A copy whose matrices are the nearest ones of so few bits, but for what the kernels keep; its head is its own."""
    state = model.state_dict()
    config = model.config.model_copy(update={"tie_word_embeddings": False})
    state.setdefault("lm_head.weight", state["model.embed_tokens.weight"])
    copied = Transformer(config).to(model.model.embed_tokens.weight.dtype)
    copied.load_state_dict(state)
    for name, parameter in copied.requires_grad_(False).named_parameters():
        if parameter.dim() > 1 and not any(kept in name for kept in ("embed_tokens", "mlp.gate.weight", "kv_b_proj")):
            parts = parameter.float().unflatten(-1, (-1, group))
            scale = parts.abs().amax(-1, keepdim=True) / (127 if bits == 8 else 7)
            parameter.copy_(((parts / scale).round() * scale).flatten(-2))
    return copied


WIDE = {
    "dense": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    "deepseek_v3": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "q_lora_rank": 64, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "moe_intermediate_size": 64, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 4,
        "n_shared_experts": 1, "first_k_dense_replace": 1, "num_nextn_predict_layers": 1,
    },
}  # fmt: skip


# Every expert has every token, so that many tokens are many rows for all of them.
@EACH_LEVEL
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tokens", [1, 6, 30])
def test_weights_of_few_bits_are_the_nearest_ones(kernels: NativeKernels, family: str, bits: int, tokens: int) -> None:
    """As a model whose matrices were rounded so, after new weights as well. Up to 16 rows go through 8 bits besides."""
    model = random_model(ModelConfig(family=family, vocab_size=VOCABULARY, **WIDE[family]), torch.float32)
    group = NativeRunner.weight_group(model.config, bits)
    assert group == (32 if family == "dense" else 64)
    batch = FlatBatch.of([(list(range(tokens)), 0, [1, 2])], list(range(tokens)))
    native = runner_of(model, torch.float32, kernels, bits)
    for _ in range(2):
        expected = runner_of(rounded_to(model, bits, group), torch.float32, None).forward(batch).logits_RV
        found = native.forward(batch).logits_RV
        assert relative(found, expected) < (2e-5 if tokens > 16 else 6e-2)
        exact = runner_of(model, torch.float32, None).forward(batch).logits_RV
        assert bits == 8 or relative(found, exact) > 0.1
        for parameter in model.parameters():
            parameter.mul_(-0.9)
        native.refresh()


def on_grid(model: Transformer, bits: dict[str, int], group: int) -> WeightGrid:
    """Puts matrices on grids of these bits: by the end of a layer's name of them. 0: they stay as they are."""
    widths, scales = dict[str, int](), dict[str, torch.Tensor]()
    for name, parameter in model.named_parameters():
        its = next((width for end, width in bits.items() if name.endswith(f"{end}.weight")), 0)
        if its and name.startswith("model.layers"):
            largest = 127 if its == 8 else 7
            parts = parameter.unflatten(-1, (-1, group or parameter.shape[-1]))
            scales[name] = (parts.abs().amax(-1) / largest).bfloat16().float()
            numbers = (parts / scales[name][..., None]).round().clamp(-largest, largest)
            parameter.copy_((numbers * scales[name][..., None]).flatten(-2))
            widths[name] = its
    return WeightGrid(widths, group, scales)


FOUR = ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "o_proj", "gate_proj", "up_proj")
WIDTHS = [
    dict.fromkeys((*FOUR, "experts.gate_up_proj"), 4) | dict.fromkeys(("down_proj", "experts.down_proj"), 8),
    dict.fromkeys(FOUR, 8) | {"o_proj": 0, "experts.gate_up_proj": 8, "down_proj": 4},
    dict.fromkeys(FOUR, 4) | {"k_proj": 8, "kv_a_proj_with_mqa": 8, "up_proj": 0, "down_proj": 8},  # side by side
]  # fmt: skip


@EACH_LEVEL
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("bits", WIDTHS, ids=["both", "some", "side by side"])
@pytest.mark.parametrize("tokens", [6, 30])
def test_each_matrix_has_the_bits_of_its_own(
    kernels: NativeKernels, family: str, bits: dict[str, int], tokens: int
) -> None:
    """The kernels keep the grid's numbers. Up to 16 rows go through 8 bits besides."""
    model = random_model(ModelConfig(family=family, vocab_size=VOCABULARY, **WIDE[family]), torch.float32)
    grid = on_grid(model, bits, 32)
    batch = FlatBatch.of([(list(range(tokens)), 0, [1, 2])], list(range(tokens)))
    native = NativeRunner(model, used_cache(model, torch.float32), kernels, grid=grid)
    assert native.weights == "int4 and int8"
    expected = runner_of(model, torch.float32, None).forward(batch).logits_RV
    assert relative(native.forward(batch).logits_RV, expected) < (2e-5 if tokens > 16 else 6e-2)


@EACH_LEVEL
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("tokens", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_are_rounded_to_8_bits_where_the_model_does(
    kernels: NativeKernels, family: str, tokens: int, dtype: torch.dtype
) -> None:
    """Token by token, of however many; after new weights of the same scales too."""
    model = random_model(ModelConfig(family=family, vocab_size=VOCABULARY, **WIDE[family]), torch.float32)
    multiply_whole_numbers(model, on_grid(model, dict.fromkeys((*FOUR, "down_proj", "experts.gate_up_proj"), 8), 0))
    model.cast(dtype)
    batch = FlatBatch.of([(list(range(tokens)), 0, [1, 2])], list(range(tokens)))
    native, torchs = (runner_of(model, dtype, each) for each in (kernels, None))
    assert isinstance(native, NativeRunner) and native.weights == "int8-dynamic"
    for _ in range(2):
        found, expected = native.forward(batch).logits_RV, torchs.forward(batch).logits_RV
        # a number that another order of a sum brings over the middle between two moves what follows
        assert (found - expected).abs().median() < (1e-4 if dtype == torch.float32 else 1e-2) * expected.abs().max()
        assert relative(found, expected) < 6e-2
        model.model.layers[0].self_attn.o_proj.weight.copy_(model.model.layers[0].self_attn.o_proj.weight.flip(0))
        native.refresh()


@EACH_LEVEL
def test_a_weight_that_is_no_number_is_none_in_few_bits(kernels: NativeKernels) -> None:
    model = random_model(ModelConfig(family="dense", vocab_size=VOCABULARY, **WIDE["dense"]), torch.float32)
    model.lm_head.weight[3, 5], model.lm_head.weight[7] = torch.nan, 1e-40
    logits_V = runner_of(model, torch.float32, kernels, 4).forward(FlatBatch.of([([1, 2], 0, [1])])).logits_RV[0]
    assert logits_V.isnan().nonzero().tolist() == [[3]] and abs(logits_V[7]) < 1e-30


@pytest.mark.skipif(not LEVELS, reason="no native library is built here")
@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"native": "off", "weight_bits": 8}, "weight_bits 8: only native code has them: native is off"),
        ({}, {"dtype": torch.float16, "weight_bits": 4}, "weight_bits 4: only native code has them: it computes in"),
        ({}, {"weight_bits": 0}, "weight_bits must be 8 or 4, got 0"),
        ({"intermediate_size": 72}, {"weight_bits": 8}, "weight_bits 8: intermediate_size 72 is no multiple of 32"),
    ],
)
def test_few_bits_that_cannot_be_are_told_in_one_line(tokenizer: Any, change: Any, options: Any, message: str) -> None:
    config = ModelConfig(family="dense", vocab_size=300, **WIDE["dense"] | change)
    with pytest.raises(SlingshotError, match=message) as raised:
        Engine(random_model(config, torch.float32), tokenizer, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(not LEVELS, reason="no native library is built here")
@pytest.mark.parametrize("family", WIDE)
@pytest.mark.parametrize("bits", [8, 4])
def test_an_engine_rounds_its_weights_and_new_ones(tokenizer: Any, family: str, bits: int) -> None:
    """Logprobs of prompts are a model's with the rounded weights: so many tokens do not go through 8 bits."""
    models = [random_model(ModelConfig(family=family, vocab_size=300, **WIDE[family]), torch.float32) for _ in range(2)]
    for parameter in models[1].parameters():
        parameter.mul_(-0.9)
    engine = Engine(copy.deepcopy(models[0]), tokenizer, weight_bits=bits)
    assert engine.runs_on.endswith(f", int{bits})")
    prompts = [[(7 * start + step) % 290 + 7 for step in range(3 + 9 * start)] for start in range(5)]
    params = SamplingParams(1, prompt_logprobs=0)
    for model in models:
        engine.update_weights(model)
        plain = Engine(rounded_to(model, bits, 32 if family == "dense" else 64), tokenizer, native="off")
        for ours, theirs in zip(engine.generate(prompts, params), plain.generate(prompts, params), strict=True):
            assert ours.prompt_logprobs[1:] == pytest.approx(theirs.prompt_logprobs[1:], abs=1e-3)


def test_what_the_kernels_do_not_cover_is_said(dense: Any) -> None:
    model = random_model(dense(vocab_size=VOCABULARY), torch.float32)
    cache = KVCache(model.config, 4, torch.float32)
    assert NativeRunner.obstacle(model, cache) is None
    assert NativeRunner.obstacle(model, KVCache(model.config, 4, torch.bfloat16)) == (
        "it computes in torch.float32 over a cache of torch.bfloat16"
    )
    narrow = random_model(dense(vocab_size=VOCABULARY, head_dim=4), torch.float32)
    found = NativeRunner.obstacle(narrow, KVCache(narrow.config, 4, torch.float32))
    assert found == "head_dim 4 is no multiple of 8"


@pytest.mark.parametrize(
    ("speculation", "kv_cache"), [("on", "auto"), ("off", "fp8"), pytest.param("on", "int8", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("family", ["dense", "deepseek_v3"])
def test_an_engine_on_native_kernels_samples_what_one_on_torch_does(
    make_model, dense, deepseek, tokenizer, family, speculation, kv_cache
):
    """Prompts in chunks, shared by samples and by requests, greedy and not; and after the weights have changed."""
    wide = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
    config = dense(vocab_size=300) if family == "dense" else deepseek(vocab_size=300, **wide)
    models = [make_model(config, seed=seed) for seed in (0, 1)]
    prompts = [[(7 * start + step) % 290 + 7 for step in range(3 + 11 * start)] for start in range(5)]
    params = [SamplingParams(24, [0.0, 1.0][index % 2], n=2, ignore_eos=True) for index in range(5)]
    found: dict[str, list[Any]] = {}
    for native in ("auto", "off"):
        options = {"native": native, "step_tokens": 30, "speculation": speculation, "kv_cache": kv_cache}
        engine = Engine(copy.deepcopy(models[0]), tokenizer, **options)
        assert kv_cache == "auto" or engine.runs_on.endswith(f", {kv_cache} cache")
        outputs = engine.generate(prompts, params)
        engine.update_weights(models[1])
        outputs += engine.generate(prompts, params)
        found[native] = [completion for output in outputs for completion in output.outputs]
    for ours, theirs in zip(found["auto"], found["off"], strict=True):
        assert ours.token_ids == theirs.token_ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-4 if kv_cache == "auto" else 5e-3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("family", [pytest.param("dense", marks=pytest.mark.slow), "deepseek_v3"])
def test_a_sequence_alone_is_sampled_in_one_call_a_step_as_torch_does_it_by_turns(
    make_model, dense, deepseek, tokenizer, family, level, monkeypatch
):
    """With guesses and without, greedy and not, over page borders, after a cached prefix, up to limits and stops."""
    monkeypatch.setenv("SLINGSHOT_NATIVE", level)
    wide = {"kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "num_nextn_predict_layers": 1}
    model = make_model(dense(vocab_size=300) if family == "dense" else deepseek(vocab_size=300, **wide))
    with torch.no_grad():
        model.lm_head.weight *= 0.2  # what is drawn depends more on noise, which the module's guesses share
    prompts = [list(range(20, 20 + size)) for size in (3, 30, 41, 60)]
    kinds: list[dict[str, Any]] = [
        {}, {"top_p": 0.8, "seed": 1}, {"temperature": 0.0},
        {"min_p": 0.4, "top_k": 50, "stop_token_ids": (70,), "ignore_eos": False},
    ]  # fmt: skip
    params = [SamplingParams(**{"max_tokens": 45, "ignore_eos": True, **kind}) for kind in kinds]
    found, counted = {}, {}
    for native, speculation in [("auto", "off"), ("auto", "on"), ("off", "on")]:
        engine = Engine(copy.deepcopy(model), tokenizer, native=native, speculation=speculation)
        outputs = [engine.generate([prompt], its)[0].outputs[0] for prompt, its in zip(prompts, params, strict=True)]
        found[native, speculation], counted[native, speculation] = outputs, engine.counters
    for outputs in zip(*found.values(), strict=True):
        assert outputs[0].token_ids == outputs[1].token_ids == outputs[2].token_ids
        for output in outputs[1:]:
            assert output.logprobs == pytest.approx(outputs[0].logprobs, abs=2e-4)
    assert counted["auto", "on"] == counted["off", "on"]
    saved = counted["auto", "off"].steps - counted["auto", "on"].steps
    assert counted["auto", "on"].accepted == saved > 3
