"""GGUF models: written here as llama.cpp's converter writes them, they come back with their tensors, logits and
tokenizer; or are refused."""

import tracemalloc

import gguf
import numpy as np
import pytest
import torch
from file_maker import LLAMA, LLAMA3, MSCALE, SCALED, TOKENS, V3, YARN, factors, tensors_of, write
from gguf import GGMLQuantizationType as Type
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.read import GGUFWeights
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import load_model, load_tokenizer


@pytest.fixture
def file(tmp_path):
    return tmp_path / "m.gguf"


def exact(model, kind):
    """The model with its matrices rounded to what `kind` can hold."""
    for parameter in model.parameters():
        if parameter.dim() == 2:
            stored = gguf.quants.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(np.array(gguf.quants.dequantize(stored, kind)))
    return model


def assert_same(path, model, **changes):
    """The file's configuration, logits (the MTP module's too) and tensors are the model's."""
    loaded = load_model(path)
    assert loaded.config == model.config.model_copy(update=changes)
    tokens, mtp = torch.tensor([[1, 40, 41, 2, 90, 7, 261, 15]]), model.config.num_nextn_predict_layers > 0
    with torch.no_grad():
        ours, source = (one(tokens, mtp=mtp and loaded.config.num_nextn_predict_layers > 0) for one in (loaded, model))
    assert torch.allclose(ours.logits_BTV, source.logits_BTV, atol=1e-5)
    assert ours.mtp_hidden_BTD is None or torch.allclose(ours.mtp_hidden_BTD, source.mtp_hidden_BTD, atol=1e-5)
    state, expected = loaded.state_dict(), model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1])
def test_a_llama_in_every_type(make_model, dense, kind, file):
    model = exact(make_model(dense(**LLAMA)), kind)
    write(file, model, kind)
    assert_same(file, model)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(("family", "changes"), [
    ("dense", {"attention_bias": True, "rope_scaling": YARN}),
    ("dense", {"qk_norm": True, "head_dim": 32, "tie_word_embeddings": True}),
    ("dense", {"num_key_value_heads": 1, "num_attention_heads": 2, "rope_scaling": YARN | {"factor": 2.5}}),
    ("dense", SCALED),
    ("dense", SCALED | {"rope_scaling": LLAMA3 | {"factor": 8.0}, "tie_word_embeddings": True}),
    ("deepseek", {}),
    ("deepseek", {"q_lora_rank": None, "tie_word_embeddings": True, "norm_topk_prob": False}),
    ("deepseek", {"rope_scaling": YARN | MSCALE, "n_shared_experts": 2, "num_nextn_predict_layers": 0}),
    ("deepseek", {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 0, "num_attention_heads": 1}),
])  # fmt: skip
def test_both_families(request, make_model, family, changes, legacy, file):
    model = make_model(request.getfixturevalue(family)(**(LLAMA if family == "dense" else V3) | changes))
    extra = {"rope_freqs.weight": factors(model.config)} if "rope_theta" in changes else {}
    write(file, model, legacy=legacy, extra=extra)
    assert_same(file, model)


def test_an_mtp_module_may_lack_its_copies_or_be_lacking(make_model, deepseek, file):
    model = make_model(deepseek(**V3))
    write(file, model, skip=("blk.3.nextn.embed_tokens.weight", "blk.3.nextn.shared_head_head.weight"))
    assert_same(file, model)
    write(file, model, skip=tuple(name for name in tensors_of(model) if name.startswith("blk.3.")))
    assert load_model(file).config == model.config.model_copy(update={"num_nextn_predict_layers": 0})


def test_keys_that_are_silent(make_model, dense, deepseek, file):
    """llama.cpp's defaults, and keys that say what is so anyway."""
    model = make_model(dense(**LLAMA | {"num_key_value_heads": 4, "rope_theta": 10000.0}))
    keys = dict.fromkeys(("rope.freq_base", "attention.head_count_kv", "rope.dimension_count"))
    keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 1.0}
    for idle in (
        keys | {"expert_count": 0, "vocab_size": 1},
        {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    ):
        write(file, model, keys={f"llama.{key}": value for key, value in idle.items()})
        assert_same(file, model)
    plain = {"first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "norm_topk_prob": False}
    model = make_model(deepseek(**V3, **plain, n_group=1, topk_group=1))
    names = "expert_group_count expert_group_used_count leading_dense_block_count expert_weights_scale"
    write(file, model, keys=dict.fromkeys(f"deepseek2.{key}" for key in [*names.split(), "expert_weights_norm"]))
    assert_same(file, model)


def test_leading_ones_of_a_shape_may_be_gone(make_model, deepseek, file):
    """llama.cpp's quantizer writes a matrix of one row as a vector."""
    one = dict.fromkeys(("n_routed_experts", "num_experts_per_tok", "n_group", "topk_group"), 1)
    model = make_model(deepseek(**V3, **one, num_nextn_predict_layers=0))
    flat = {name: array[0] for name, array in tensors_of(model).items() if array.ndim > 1 and len(array) == 1}
    assert {"blk.1.ffn_gate_inp.weight", "blk.1.ffn_up_exps.weight"} <= flat.keys()
    write(file, model, extra=flat)
    assert_same(file, model)


def test_k_quants_by_hand(make_model, dense, file):
    """256 values a row. Q6_K: scale 1, six-bit 0 means -32. Q4_K: scales 1, minimum 0, nibbles 1 and 2 by turns."""
    one, zero = (np.float16(value).tobytes() for value in (1, 0))
    blocks = (Type.Q6_K, bytes(192) + b"\1" * 16 + one), (Type.Q4_K, one + zero + b"\1" * 12 + b"\x21" * 128)
    down = {
        f"blk.{layer}.ffn_down.weight": (np.tile(np.frombuffer(block, dtype=np.uint8), (64, 1)), kind)
        for layer, (kind, block) in enumerate(blocks)
    }
    write(file, make_model(dense(**LLAMA | {"intermediate_size": 256})), extra=down)
    first, second = (load_model(file).model.layers[layer].mlp.down_proj.weight for layer in (0, 1))
    assert torch.equal(first, torch.full((64, 256), -32.0))
    assert torch.equal(second, torch.tensor([1.0, 2.0]).repeat_interleave(32).repeat(64, 4))


@pytest.mark.parametrize("kind", [Type.F32, Type.BF16, Type.Q8_0])
def test_rows_are_those_of_the_whole(make_model, dense, deepseek, kind, file):
    names = ("intermediate_size", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim", "moe_intermediate_size")
    widths = dict.fromkeys((*names, "q_lora_rank"), 32) | {"hidden_size": 64}
    for config in (dense(**LLAMA), deepseek(**V3, **widths)):
        write(file, make_model(config), kind)
        weights = GGUFWeights(file)
        for spec in layout(config):
            if spec.copy_of is None:
                whole, rows = weights.read(spec.name), spec.shape[0]
                assert whole.shape == spec.shape and weights.where(spec.name) == file
                assert whole.dtype in (torch.float32, torch.bfloat16 if kind == Type.BF16 else torch.float32)
                for start, stop in ((0, 1), (rows // 3, rows // 2 + 1), (rows - 1, rows)):
                    assert torch.equal(weights.read(spec.name, slice(start, stop)), whole[start:stop]), spec.name


@pytest.mark.slow
def test_dequantising_takes_little_memory(make_model, dense, file):
    model = make_model(dense(**LLAMA | {"hidden_size": 1024, "intermediate_size": 16384, "num_hidden_layers": 1}))
    write(file, model, Type.Q8_0)
    weights = GGUFWeights(file)
    tracemalloc.start()  # knows numpy's memory, not the result, which is torch's
    try:
        up = weights.read("model.layers.0.mlp.up_proj.weight")
        assert up.nbytes == 2**26 and tracemalloc.get_traced_memory()[1] < up.nbytes / 2
    finally:
        tracemalloc.stop()


def test_the_tokenizer_comes_along(make_model, dense, file):
    write(file, make_model(dense(**LLAMA)))
    tokenizer = load_tokenizer(file)
    ids = {token: id for id, token in enumerate(TOKENS)}
    # digits stand alone, whatever the merges say
    assert tokenizer.encode("he 12") == [ids[token] for token in ("he", "Ġ", "1", "2")]
    assert tokenizer.encode(" the") == [ids["Ġt"], ids["he"]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, None, len(TOKENS))
    assert tokenizer.eos_ids == {0, ids["<|eot|>"]} and tokenizer.control_ids == {0, 1, 2, ids["<|eot|>"]}
    asked = tokenizer.encode_chat([{"role": "user", "content": "he<tool>"}])
    assert asked == [1, ids["he"], *(ids[c] for c in "<tool>"), 0, 2]
    # user-defined tokens are text, control tokens are not
    assert tokenizer.decode([1, 2, ids["he"], 0, ids["[unused]"]]) == "<tool>he"
    assert tokenizer.config["add_bos_token"] is False


@pytest.mark.parametrize(("keys", "text", "expected"), [
    ({"pre": "gpt-2"}, "he 12", ["he", "Ġ", "12"]),
    # a whole piece that is a token needs no merge
    ({"pre": "llama-bpe", "merges": ["Ġ t"]}, "he 121", ["he", "Ġ", "1", "2", "1"]),
    ({"pre": "dbrx", "merges": ["Ġ t"]}, "he 121", ["h", "e", "Ġ", "1", "2", "1"]),
    ({"pre": "qwen2"}, "he 12 e\u0301", ["he", "Ġ", "1", "2", "Ġ", "Ã", "©"]),
    ({"pre": "deepseek-v3"}, "he 12", ["he", "Ġ", "12"]),
    ({"pre": None}, "he 12", ["he", "Ġ", "12"]),
])  # fmt: skip
def test_text_is_split_as_the_file_says(make_model, dense, file, keys, text, expected):
    write(file, make_model(dense(**LLAMA)), keys={f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    tokenizer = load_tokenizer(file)
    assert [TOKENS[id] for id in tokenizer.encode(text)] == expected
    assert tokenizer.config["add_bos_token"] is (keys["pre"] == "llama-bpe")


@pytest.mark.parametrize(("key", "value", "said"), [
    ("general.architecture", "mamba", "'mamba' is not supported; llama, qwen2, qwen3 and deepseek2 are"),
    ("llama.block_count", None, "key llama.block_count is missing"),
    ("llama.block_count", "two", "llama.block_count must be of type int, got 'two'"),
    ("llama.attention.head_count", 3, "hidden_size 64 must divide evenly into num_attention_heads 3"),
    ("llama.attention.head_count", 0, "num_attention_heads: Input should be greater than or equal to 1, got 0"),
    ("llama.expert_count", 8, "llama.expert_count 8 is not supported"),
    ("llama.rope.scaling.type", "longrope", "llama.rope.scaling.type 'longrope' is not supported, yarn is"),
    ("llama.rope.scaling.factor", 2.0, "llama.rope.scaling.type 'linear' is not supported, yarn is"),
    ("llama.rope.scale_linear", 2.0, "llama.rope.scaling.type 'linear' is not supported, yarn is"),
    ("llama.rope.scaling.attn_factor", 2.0, "llama.rope.scaling.attn_factor 2.0 is not supported, 1.0 is"),
    ("llama.rope.dimension_count", 8, "llama.rope.dimension_count 8 is not supported, 16 is"),
    ("llama.attention.causal", False, "llama.attention.causal False is not supported"),
    ("llama.attention.sliding_window", 64, "the key 'llama.attention.sliding_window' could change what is computed"),
    ("llama.block_count", 3, "the tensor blk.2.attn_norm.weight is missing"),
    ("llama.block_count", 2**31, "num_hidden_layers: "),
    ("llama.feed_forward_length", 128, "blk.0.ffn_gate.weight has shape [96, 64], its keys say [128, 64]"),
    ("llama.attention.layer_norm_rms_epsilon", float("nan"), "got nan"),
    ("deepseek2.expert_gating_func", 1, "expert_gating_func 1 is not supported, 2 is: DeepSeek-V3's sigmoid"),
    ("deepseek2.expert_gating_func", None, "deepseek2.expert_gating_func 0 is not supported"),
    ("deepseek2.attention.head_count_kv", 4, "deepseek2.attention.head_count_kv 4 is not supported, 1 is"),
    ("deepseek2.attention.key_length", 99, "deepseek2.attention.key_length 99 is not supported, 18 is"),
    ("deepseek2.rope.scaling.yarn_log_multiplier", None, "yarn_log_multiplier 0 is not supported with YaRN"),
    ("deepseek2.rope.scaling.yarn_ext_factor", 0.5, "yarn_ext_factor 0.5 is not supported, 1.0 and -1.0 are"),
    ("deepseek2.nextn_predict_layers", 2, "'blk.2.attn_norm.weight' is no tensor of a plain deepseek2 model"),
    ("deepseek2.expert_group_used_count", None, "topk_group 0 must be between 1 and n_group 4"),
    ("deepseek2.expert_group_count", 3, "n_routed_experts 8 must divide evenly into n_group 3"),
    ("deepseek2.expert_count", 9, "n_routed_experts 9 must divide"),
    ("deepseek2.expert_count", 16, "ffn_gate_inp.weight has shape [8, 32], its keys say [16, 32]"),
    ("deepseek2.expert_count", 2**31, "n_routed_experts"),
    ("deepseek2.attention.temperature_scale", 0.5, "temperature_scale' could change what is computed"),
    ("tokenizer.ggml.model", "llama", "tokenizer.ggml.model 'llama' is not supported"),
    ("tokenizer.ggml.pre", "gpt-5", "tokenizer.ggml.pre 'gpt-5' is not supported, smollm, gpt-2, llama-bpe"),
    ("tokenizer.ggml.tokens", None, "key tokenizer.ggml.tokens is missing"),
    ("tokenizer.ggml.tokens", [*TOKENS[:-1], "he"],
     f"ggml.tokens has {len(TOKENS)} entries, {len(TOKENS) - 1} different ones"),
    ("tokenizer.ggml.token_type", [1, 1], "token_type 2"),
    ("tokenizer.ggml.eos_token_id", 9999, f"tokenizer.ggml.eos_token_id 9999 is beyond the {len(TOKENS)} tokens"),
    ("tokenizer.ggml.eos_token_id", 5, "make no tokenizer"),  # an ordinary token cannot end a text
    ("tokenizer.ggml.merges", ["q zz"], "make no tokenizer"),
    ("tokenizer.ggml.merges", ["q \nz"], "make no tokenizer"),
    ("tokenizer.ggml.add_bos_token", True, "make no tokenizer"),
])  # fmt: skip
def test_what_would_be_read_differently_is_refused(make_model, dense, deepseek, file, key, value, said):
    """One key put otherwise, or gone (None)."""
    model = make_model(deepseek(**V3, rope_scaling=YARN | MSCALE) if "deepseek2" in key else dense(**LLAMA))
    of_tokenizer = key.startswith("tokenizer")
    write(file, model, keys={key: value} | ({"tokenizer.ggml.bos_token_id": None} if of_tokenizer else {}))
    with pytest.raises(SlingshotError) as error:
        (load_tokenizer if of_tokenizer else load_model)(file)
    assert said in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_rope_freqs_that_are_not_llama_3s_are_refused(make_model, dense, file):
    model = make_model(dense(**LLAMA | SCALED))
    right = factors(model.config)
    holed, ones = np.where(right > 2, np.float32("nan"), right), np.ones(8, dtype=np.float32)
    for wrong in (right * 2, right + 0.01, holed, right[:4], right.astype(np.float16)):
        write(file, model, extra={"rope_freqs.weight": wrong})
        with pytest.raises(SlingshotError, match=r"m\.gguf: rope_freqs\.weight( is |.factor: |: )"):
            load_model(file)
    plain = make_model(dense(**LLAMA))
    write(file, plain, extra={"rope_freqs.weight": ones})
    assert_same(file, plain)
    write(file, make_model(dense(**LLAMA, attention_bias=True)), extra={"rope_freqs.weight": ones})
    with pytest.raises(SlingshotError, match=r"'rope_freqs.weight' is no tensor of a plain qwen2 model"):
        load_model(file)


@pytest.mark.parametrize(("extra", "skip", "said"), [
    ({"blk.0.attn_sinks.weight\n": np.zeros(4, np.float32)}, "", r"'blk\.0\.attn_sinks\.weight\\n' is no tensor of a"),
    ({}, "blk.1.ffn_up.weight", r"m\.gguf: the tensor blk\.1\.ffn_up\.weight is missing"),
    ({}, "token_embd.weight", r"token_embd\.weight is missing; does the file hold a vocabulary alone"),
    ({"blk.1.ffn_norm.weight": np.full(64, np.nan, np.float32)}, "", r"layernorm\.weight holds NaN or infinite values"),
    ({"blk.0.attn_k.weight": (np.zeros((32, 64), np.int32), Type.I32)}, "",
     r"m\.gguf: blk\.0\.attn_k\.weight is of type I32, .*; give F16 or Q8_0"),
])  # fmt: skip
def test_tensors_must_be_the_architectures(make_model, dense, file, extra, skip, said):
    write(file, make_model(dense(**LLAMA)), extra=extra, skip=(skip,))
    with pytest.raises(SlingshotError, match=said):
        load_model(file)


@pytest.fixture(scope="module")
def whole(make_model, dense, deepseek, tmp_path_factory):
    """Files to be broken: both families, several types, every kind of key."""
    folder = tmp_path_factory.mktemp("whole")
    llama = dense(**LLAMA | SCALED | {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1})
    write(folder / "llama.gguf", make_model(llama), Type.Q8_0, extra={"rope_freqs.weight": factors(llama)})
    few = {"num_hidden_layers": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1}
    write(folder / "deepseek.gguf", make_model(deepseek(**V3, **few)), Type.BF16)
    return [folder / "llama.gguf", folder / "deepseek.gguf"]


ABSURD = [0, 1, 2, 3, 4, 8, 9, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]
NUMBERS = st.sampled_from([(n % 2 ** (8 * size)).to_bytes(size, "little") for n in ABSURD for size in (4, 8)])
GONE = st.sampled_from([None, 0, 0, 10**9]) | st.integers(1, 40)
# What takes the place of how many bytes (of all, or of as many as are put), mostly within the header.
STEPS = st.tuples(st.floats(0, 1), NUMBERS | st.binary(max_size=9), GONE)


@pytest.mark.slow
@settings(max_examples=200)
@given(st.integers(0, 1), st.lists(STEPS, min_size=1, max_size=3))
def test_broken_bytes_are_one_line_of_error(whole, file, which, steps):
    content = whole[which].read_bytes()
    for where, put, gone in steps:
        at = int(where * min(len(content), 9000))
        content = content[:at] + put + content[at + (len(put) if gone is None else gone) :]
    file.write_bytes(content)
    for read in (read_all, load_tokenizer):
        try:
            read(file)
        except SlingshotError as error:
            assert str(file) in str(error) and len(str(error).splitlines()) == 1, error


def read_all(path):
    weights = GGUFWeights(path)
    for spec in layout(weights.config):
        if spec.copy_of is None:
            assert weights.read(spec.name).shape == spec.shape
