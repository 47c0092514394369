"""GGUF files as written: they read back as what they were made of, hold what llama.cpp asks for, and are whole or not
there."""

import errno
import math
import os
from pathlib import Path

import pytest
import tokenizers
import torch
from file_maker import LLAMA3, MSCALE, SCALED, YARN
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf import write as gguf_writer
from slingshot.checkpoint.gguf.config import problems, write_keys
from slingshot.checkpoint.gguf.file import GGUFFile
from slingshot.checkpoint.gguf.read import GGUFWeights
from slingshot.checkpoint.gguf.write import write_gguf
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import hf_tensors, load_tokenizer
from slingshot.model.config import ModelConfig, presets
from slingshot.text.pretokenizers import SPLITS
from slingshot.text.tokenizer import Tokenizer


class Held:
    """The weights of a model in memory. Remembers how many numbers were read at a time; `spoil` changes a tensor."""

    def __init__(self, model, spoil=None):
        self.config, self.spoil, self.sizes = model.config, spoil or {}, []
        self.tensors = {name: each.make() for name, each in hf_tensors(model.config, model.state_dict())}

    def read(self, name, rows=slice(None)):
        values = self.tensors[name][rows]
        self.sizes.append(values.numel())
        return self.spoil[name](values.clone()) if name in self.spoil else values

    def where(self, name):
        return Path("checkpoint/model.safetensors")


@pytest.fixture
def held(make_model, request):
    """held("dense", changes): the weights of such a model of 280 ids."""
    return lambda family, changes=(), spoil=None: Held(
        make_model(request.getfixturevalue(family)(**{"vocab_size": 280, **dict(changes)})), spoil
    )


def rounded(values, dtype):
    if dtype == "q8_0" and values.shape[-1] % 32 == 0:
        return torch.from_numpy(dequantize(quantize(values.numpy(), Type.Q8_0), Type.Q8_0).copy())
    return values.to({"float32": torch.float32, "bfloat16": torch.bfloat16}.get(dtype, torch.float16)).float()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "q8_0"])
@pytest.mark.parametrize(("family", "changes"), [
    ("deepseek", {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "hidden_size": 64}),
    ("deepseek", {"q_lora_rank": None, "tie_word_embeddings": True,
                  "rope_scaling": YARN | MSCALE}),
    ("deepseek", {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "n_shared_experts": 2,
                  "norm_topk_prob": False}),
    ("dense", SCALED),
    ("dense", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    ("dense", {"attention_bias": True, "rope_scaling": YARN, "rms_norm_eps": 1e-5}),
    ("dense", {"qk_norm": True, "head_dim": 32}),
])  # fmt: skip
def test_what_is_written_reads_back(held, tokenizer, tmp_path, family, changes, dtype):
    weights = held(family, changes)
    write_gguf(tmp_path / "m.gguf", weights, tokenizer, dtype)
    again = GGUFWeights(tmp_path / "m.gguf")
    assert again.config == weights.config
    for spec in layout(weights.config):
        if spec.copy_of is None:
            values, expected = again.read(spec.name).float(), weights.tensors[spec.name]
            is_matrix = len(spec.shape) > 1 and not spec.name.endswith("mlp.gate.weight")
            transposed = spec.name.endswith("kv_b_proj.weight")  # its key part, before it is quantised
            if not (transposed and dtype == "q8_0"):
                assert torch.equal(values, rounded(expected, dtype) if is_matrix else expected), spec.name
            assert torch.allclose(values, expected, atol=0.02), spec.name
    assert load_tokenizer(tmp_path / "m.gguf").encode("the fox 3+4") == tokenizer.encode("the fox 3+4")


def test_a_mistral_is_a_llama(held, tokenizer, tmp_path):
    write_gguf(tmp_path / "m.gguf", held("dense", {"extra": {"model_type": "mistral"}}), tokenizer, "float32")
    assert GGUFFile(tmp_path / "m.gguf").get("general.architecture", str) == "llama"


def test_keys_and_values_of_every_head_stand_apart(held, tokenizer, tmp_path):
    weights = held("deepseek")
    write_gguf(tmp_path / "m.gguf", weights, tokenizer, "float32")
    file = GGUFFile(tmp_path / "m.gguf")
    key, value = file.tensors["blk.3.attn_k_b.weight"], file.tensors["blk.3.attn_v_b.weight"]
    assert (key.shape, value.shape) == ((4, 12, 8), (4, 10, 12))  # heads, latent, no-rope; heads, value, latent
    heads = weights.tensors["model.layers.3.self_attn.kv_b_proj.weight"].view(4, 18, 12)
    keys = torch.from_numpy(file.read(key, 0, 48)).view(torch.float32).view(4, 12, 8)
    assert torch.equal(keys, heads[:, :8].transpose(1, 2))
    assert torch.equal(torch.from_numpy(file.read(value, 0, 40)).view(torch.float32).view(4, 10, 12), heads[:, 8:])


def test_deepseek_v3s_keys():
    """Those of llama.cpp's converter; the MTP module's as it writes it for GLM-4.7-Flash, of the same architecture."""
    assert write_keys(ModelConfig.preset("deepseek-v3")) == {
        "vocab_size": 129280, "context_length": 163840, "embedding_length": 7168, "block_count": 62,
        "nextn_predict_layers": 1, "feed_forward_length": 18432, "attention.head_count": 128,
        "attention.head_count_kv": 1, "attention.layer_norm_rms_epsilon": 1e-6, "attention.q_lora_rank": 1536,
        "attention.kv_lora_rank": 512, "attention.key_length": 576, "attention.value_length": 512,
        "attention.key_length_mla": 192, "attention.value_length_mla": 128, "rope.dimension_count": 64,
        "rope.freq_base": 10000.0, "rope.scaling.type": "yarn", "rope.scaling.factor": 40.0,
        "rope.scaling.original_context_length": 4096, "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0, "rope.scaling.yarn_log_multiplier": 0.1, "leading_dense_block_count": 3,
        "expert_feed_forward_length": 2048, "expert_count": 256, "expert_used_count": 8, "expert_shared_count": 1,
        "expert_gating_func": 2, "expert_group_count": 8, "expert_group_used_count": 4, "expert_weights_scale": 2.5,
        "expert_weights_norm": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", presets())
def test_llama_cpp_has_a_place_for_every_preset(name):
    assert list(problems(ModelConfig.preset(name))) == []


def test_what_llama_cpp_reads_as_none(held, tokenizer, tmp_path):
    """All groups chosen is no choice of groups; without an MoE layer there are no experts; no LoRA is rank 0."""
    write_gguf(tmp_path / "m.gguf", held("deepseek", {"topk_group": 4}), tokenizer, "float32")
    config = GGUFWeights(tmp_path / "m.gguf").config
    assert (config.n_group, config.topk_group, config.num_experts_per_tok) == (1, 1, 3)
    no_moe = {"first_k_dense_replace": 3, "num_nextn_predict_layers": 0, "n_shared_experts": 0, "q_lora_rank": None}
    write_gguf(tmp_path / "m.gguf", held("deepseek", no_moe), tokenizer, "float32")
    keys = GGUFFile(tmp_path / "m.gguf").keys
    assert "deepseek2.expert_count" not in keys and keys["deepseek2.attention.q_lora_rank"] == 0
    assert GGUFWeights(tmp_path / "m.gguf").config.n_routed_experts == 0


def test_rows_that_fill_no_block_are_float16(held, tokenizer, tmp_path):
    [note] = write_gguf(tmp_path / "m.gguf", held("deepseek"), tokenizer, "q8_0")
    kinds = {name: tensor.kind for name, tensor in GGUFFile(tmp_path / "m.gguf").tensors.items()}
    assert (kinds["blk.0.attn_q_a.weight"], kinds["blk.0.attn_q_b.weight"]) == (Type.Q8_0, Type.F16)  # of 32 and 20
    exact = ("blk.1.ffn_gate_inp.weight", "blk.1.exp_probs_b.bias", "output_norm.weight")
    assert {kinds[name] for name in exact} == {Type.F32}
    short = sum(kind == Type.F16 for kind in kinds.values())
    assert note.startswith(f"{short} matrices, blk.0.attn_q_b.weight the first, are float16: ")


@pytest.mark.parametrize("family", ["deepseek", "dense"])
def test_tensors_pass_in_pieces(monkeypatch, held, tokenizer, tmp_path, family):
    weights = held(family)
    write_gguf(tmp_path / "whole.gguf", weights, tokenizer, "bfloat16")
    weights.sizes.clear()
    monkeypatch.setattr(gguf_writer, "PIECE", 300)
    write_gguf(tmp_path / "pieces.gguf", weights, tokenizer, "bfloat16")
    heads = weights.tensors.get("model.layers.0.self_attn.kv_b_proj.weight", torch.empty(0)).numel()
    assert max(weights.sizes) <= max(300, heads) and max(weights.sizes[-3:]) > 200
    assert (tmp_path / "pieces.gguf").stat().st_size == (tmp_path / "whole.gguf").stat().st_size
    pieces, whole = GGUFFile(tmp_path / "pieces.gguf"), GGUFFile(tmp_path / "whole.gguf")
    for name, tensor in pieces.tensors.items():
        rows = math.prod(tensor.shape[:-1])
        assert pieces.read(tensor, 0, rows).tobytes() == whole.read(whole.tensors[name], 0, rows).tobytes(), name


@pytest.mark.parametrize(("family", "changes", "said"), [
    ("deepseek", {"n_shared_experts": 0}, "its deepseek2 has at least one shared expert; n_shared_experts is 0"),
    ("deepseek", {"num_hidden_layers": 26}, "it takes a deepseek2 of 26 layers for one without q_lora_rank"),
    ("deepseek", {"num_hidden_layers": 600}, "it has 601 blocks, 512 at most are supported"),
    ("deepseek", {"n_routed_experts": 1200, "n_group": 1, "topk_group": 1}, "n_routed_experts 1200 exceeds its 1024"),
    ("deepseek", {"rope_scaling": LLAMA3}, "rope_scaling of type llama3 is known to its llama only, not to deepseek2"),
    ("deepseek", {"rope_scaling": YARN},
     "of YaRN it knows mscale equal to mscale_all_dim, DeepSeek-V3's way, not 1.0 and 0.0"),
    ("deepseek", {"rope_scaling": YARN | {"mscale": 0.0}}, "of YaRN it knows mscale equal to mscale_all_dim"),
    ("dense", {"rope_theta": 5e5, "rope_scaling": LLAMA3, "attention_bias": True}, "its llama only, not to qwen2"),
    ("dense", SCALED | {"qk_norm": True}, "known to its llama only, not to qwen3"),
    ("dense", {"attention_bias": True, "head_dim": 16},
     "in qwen2, hidden_size 32 must be num_attention_heads 4 x head_dim 16"),
    ("dense", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
     "of YaRN's mscale, mscale_all_dim, attention_factor and attn_factor it knows none"),
])  # fmt: skip
def test_what_llama_cpp_cannot_compute_is_refused_first(request, tokenizer, tmp_path, family, changes, said):
    class Unread:
        config = request.getfixturevalue(family)(vocab_size=280, **changes)

    with pytest.raises(SlingshotError) as error:
        write_gguf(tmp_path / "m.gguf", Unread(), tokenizer, "float32")
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: llama.cpp does not compute this model: ")
    assert said in str(error.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "name", "value", "said"), [
    ("float16", "model.layers.1.mlp.experts.7.up_proj.weight", 7e4, "values too large for F16; bfloat16 has room"),
    ("q8_0", "model.embed_tokens.weight", 1e7, "values too large for Q8_0; bfloat16 has room"),
    ("bfloat16", "lm_head.weight", 3.4e38, "values too large for BF16"),
    ("bfloat16", "model.norm.weight", math.nan, "NaN or infinite values"),
    ("float32", "model.layers.0.self_attn.kv_b_proj.weight", math.inf, "NaN or infinite values"),
])  # fmt: skip
def test_a_value_without_a_place_leaves_the_old_file(held, tokenizer, tmp_path, dtype, name, value, said):
    def spoil(values):
        values.view(-1)[-1] = value
        return values

    (tmp_path / "m.gguf").write_bytes(b"old")
    with pytest.raises(SlingshotError, match=f"^checkpoint/model.safetensors: {name} holds {said}"):
        write_gguf(tmp_path / "m.gguf", held("deepseek", spoil={name: spoil}), tokenizer, dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"] and (tmp_path / "m.gguf").read_bytes() == b"old"


def test_the_whole_file_is_on_disk_before_it_has_its_name(monkeypatch, held, tokenizer, tmp_path):
    seen = []

    def fsync(descriptor):
        assert not (tmp_path / "m.gguf").exists()
        seen.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", fsync)
    write_gguf(tmp_path / "m.gguf", held("dense"), tokenizer, "float32")
    assert seen == [(tmp_path / "m.gguf").stat().st_size]


def test_an_interrupted_write_leaves_nothing(held, tokenizer, tmp_path):
    def stop(values):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "m.gguf", held("dense", spoil={"model.norm.weight": stop}), tokenizer, "float32")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written(monkeypatch, held, tokenizer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SlingshotError, match=r"cannot write .*file/m\.gguf: .*; free space there or choose another"):
        write_gguf(tmp_path / "file" / "m.gguf", held("dense"), tokenizer, "float32")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(GGUFWriter, "close", full)
    with pytest.raises(SlingshotError, match=r"cannot write .*m\.gguf: No space left on device; free space there"):
        write_gguf(tmp_path / "m.gguf", held("dense"), tokenizer, "float32")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


TEXTS = [
    "The quick brown fox's 12345 jumps, don't they? I'LL say: x=y; def f(n):\n    return n+1  # ok\n\n"
    "\n\tdone 3.14159e-10 $%^&*()",
    "3足す4は7、答えは5。 漢字かな交じり文と、カタカナ！",
    "Grüße aus Köln — naïve café, e\u0301 and é; Привет, мир! שלום עולם مرحبا ١٢٣ नमस्ते",
    "🙂🙃👨‍👩‍👧 ½ ² Ⅷ \u00a0\u2003\u200b\r\n end",
]  # fmt: skip


def trained(name):
    """A tokenizer that splits so, with merges across everything the split leaves together."""
    split, alphabet = SPLITS[name], pre_tokenizers.ByteLevel.alphabet()
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=split.ignore_merges))
    backend.pre_tokenizer, backend.decoder = split.pre_tokenizer(), decoders.ByteLevel()
    if normalizer := split.normalizer():
        backend.normalizer = normalizer
    special = {"special_tokens": ["<s>", "</s>"], "initial_alphabet": alphabet}
    backend.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=700, show_progress=False, **special))
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def pairs(make_model, dense, tmp_path_factory):
    """A tokenizer of every split, and what comes back from a GGUF file of it."""
    folder, found = tmp_path_factory.mktemp("tokenizers"), []
    for name in SPLITS:
        one = trained(name)
        write_gguf(folder / f"{name}.gguf", Held(make_model(dense(vocab_size=one.vocab_size))), one, "bfloat16")
        found.append((one, load_tokenizer(folder / f"{name}.gguf")))
    return found


WORDS = st.sampled_from(TEXTS).flatmap(lambda text: st.sampled_from(text.split(" ")))


@given(text=st.lists(WORDS | st.text(max_size=6), max_size=8))
def test_text_has_the_same_ids_after_the_round_trip(pairs, text):
    for separator in ("", " "):
        for ours, again in pairs:
            assert again.encode(separator.join(text)) == ours.encode(separator.join(text))


def test_whole_texts_have_the_same_ids(pairs):
    for ours, again in pairs:
        for text in TEXTS:
            ids = ours.encode(text)
            assert again.encode(text) == ids and again.decode(ids) == ours.decode(ids)
    assert len({tuple(ours.encode(TEXTS[0])) for ours, _ in pairs}) >= len(SPLITS) - 2  # the splits do differ


def test_names_and_kinds_of_tokens(held, tokenizer, tmp_path):
    """special=false makes a token user-defined; rows of the embedding without a token are unused."""
    assert write_gguf(tmp_path / "m.gguf", held("dense", {"vocab_size": 279}), tokenizer, "float32") == []
    keys, again = GGUFFile(tmp_path / "m.gguf").keys, load_tokenizer(tmp_path / "m.gguf")
    kinds = keys["tokenizer.ggml.token_type"].tolist()
    assert kinds[:8] == [TokenType.CONTROL] * 3 + [TokenType.USER_DEFINED] * 4 + [TokenType.NORMAL]
    assert kinds[-3:] == [TokenType.NORMAL, TokenType.UNUSED, TokenType.UNUSED]
    assert keys["tokenizer.ggml.tokens"][-2:] == ["[PAD277]", "[PAD278]"]
    ours, theirs = (one.description()["added_tokens"] for one in (again, tokenizer))
    assert [(each["content"], each["special"]) for each in ours] == [(x["content"], x["special"]) for x in theirs]
    ids = ("vocab_size", "control_ids", "bos_id", "eos_id", "pad_id", "eos_ids", "think_id")
    for name in (*ids, "chat_template"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    said = (("user", "3+4?"), ("assistant", "<think>so</think>7"), ("user", "<|x|>"))
    messages = [{"role": role, "content": content} for role, content in said]
    assert again.encode_chat(messages) == tokenizer.encode_chat(messages)


def changed(tokenizer, config=(), eos_ids=(), **changes):
    """The tokenizer with other parts in its tokenizer.json and tokenizer_config.json (None takes one out)."""
    backend = tokenizers.Tokenizer.from_str(tokenizer._backend.to_str())
    for name, value in changes.items():
        setattr(backend, name, value)
    kept = {key: value for key, value in (tokenizer.config | dict(config)).items() if value is not None}
    return Tokenizer(backend, kept, eos_ids)


def bpe(tokenizer, merged=True, **options):
    model = tokenizer.description()["model"]
    return changed(tokenizer, model=models.BPE(model["vocab"], [*map(tuple, model["merges"] * merged)], **options))


def test_tokens_that_end_a_generation(held, tokenizer, tmp_path):
    assert write_gguf(tmp_path / "m.gguf", held("dense"), changed(tokenizer, eos_ids=(3, 4)), "float32") == []
    assert load_tokenizer(tmp_path / "m.gguf").eos_ids == {1, 3, 4}
    keys = GGUFFile(tmp_path / "m.gguf").keys  # Llama 3's end of turn has a higher id than its end of message
    assert [keys[f"tokenizer.ggml.{name}_token_id"] for name in ("eos", "eot", "eom")] == [1, 4, 3]
    notes = write_gguf(tmp_path / "m.gguf", held("dense"), changed(tokenizer, eos_ids=(2, 3, 4)), "float32")
    assert notes == ["token 2 ends a generation too; of such tokens llama.cpp has places for three, not for this one"]


BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.mark.parametrize(("around", "within_others", "expected"), [
    ("$A", False, False), (f"{BOS} $A", False, True), (f"{BOS} $A", True, True), (f"$A {EOS}", False, False),
])  # fmt: skip
def test_whether_a_text_begins_with_bos(held, tokenizer, tmp_path, around, within_others, expected):
    step = processors.TemplateProcessing(single=around, special_tokens=[(BOS, 0), (EOS, 1)])
    steps = processors.Sequence([processors.ByteLevel(), step]) if within_others else step
    write_gguf(tmp_path / "m.gguf", held("dense"), changed(tokenizer, post_processor=steps), "float32")
    again = load_tokenizer(tmp_path / "m.gguf")
    assert again.config["add_bos_token"] is expected
    assert again.encode_raw("3") == ([0] if expected else []) + tokenizer.encode("3")
    assert again.encode("3") == tokenizer.encode("3")


PUNCTUATION = pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel()])


@pytest.mark.parametrize(("size", "change", "said"), [
    (280, lambda t: changed(t, pre_tokenizer=PUNCTUATION),
     "knows no pre-tokenizer that splits text as this tokenizer.json does"),
    (280, lambda t: changed(t, {"eos_token": None}), "names no eos_token; llama.cpp would take token 11 for it"),
    (280, lambda t: changed(t, {"chat_template": "\ud800"}), "the chat template holds half a surrogate pair"),
    (280, lambda t: bpe(t, merged=False), "the tokenizer has no merges"),
    (280, lambda t: bpe(t, end_of_word_suffix="</w>"), "no tokenizer with end_of_word_suffix"),
    (266, lambda t: t, "the tokenizer has 277 ids, the model's vocabulary 266"),
])  # fmt: skip
def test_a_tokenizer_llama_cpp_cannot_have_is_refused(held, tokenizer, tmp_path, size, change, said):
    with pytest.raises(SlingshotError) as error:
        write_gguf(tmp_path / "m.gguf", held("dense", {"vocab_size": size}), change(tokenizer), "float32")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'm.gguf'}: ") and not list(tmp_path.iterdir())
