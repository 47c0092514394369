"""GGUF: a model written as llama.cpp writes it comes back with its logits and its tokenizer; every broken file is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter, TokenType
from tokenizers import pre_tokenizers

from slingshot.config import ModelConfig
from slingshot.files import SlingshotError
from slingshot.model.checkpoint import load_model, load_tokenizer
from slingshot.model.transformer import Transformer

CONTROL = ["<|end|>", "<|start|>"]
TOKENS = [*CONTROL, "<tool>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt", "12"]
TYPES = [TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED] + [TokenType.NORMAL] * (len(TOKENS) - 3)
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{% if add_generation_prompt %}<tool>{% endif %}"

# llama.cpp's names.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip

CONFIG = ModelConfig(
    family="dense", vocab_size=len(TOKENS), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5, rope_theta=50000.0, initializer_range=0.3,
)  # fmt: skip


def interleaved(weight_FD: np.ndarray, head_dim: int) -> np.ndarray:
    """As llama.cpp stores q and k: row j of a head's first half, then row j of its second."""
    half = head_dim // 2
    order = [start + row for start in range(0, len(weight_FD), head_dim) for j in range(half) for row in (j, half + j)]
    return weight_FD[order]


def write(path: Path, model: Transformer, kind: Type = Type.F32, keys: dict[str, Any] | None = None, skip: str = "", extra: str = "") -> None:
    """Write `model` with its matrices as `kind`; `keys` replace metadata (None leaves one out), `skip` and `extra` name tensors."""
    config = model.config
    values: dict[str, Any] = {
        "llama.embedding_length": config.hidden_size,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.context_length": config.max_position_embeddings,
        "llama.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "llama.rope.freq_base": config.rope_theta,
        "llama.rope.dimension_count": config.head_dim,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [int(kind) for kind in TYPES],
        "tokenizer.ggml.merges": ["h e", "Ġ t", "1 2"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.chat_template": TEMPLATE,
    }
    values |= keys or {}
    writer = GGUFWriter(path, values.pop("general.architecture", "llama"))
    adders: dict[type, Callable[[str, Any], None]] = {
        int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, list: writer.add_array, bool: writer.add_bool,
    }  # fmt: skip
    for key, value in values.items():
        if value is not None:
            adders[type(value)](key, value)
    for name, tensor in model.state_dict().items():
        if name == skip:
            continue
        place, _, module = name.removesuffix(".weight").rpartition("layers.")
        block, _, module = module.partition(".") if place else ("", "", module)
        array = tensor.numpy()
        if module.endswith(("q_proj", "k_proj")):
            array = interleaved(array, config.head_dim)
        stored = kind if array.ndim == 2 else Type.F32
        writer.add_tensor(
            f"blk.{block}.{NAMES[module]}.weight" if place else f"{NAMES[module]}.weight", gguf.quants.quantize(array, stored), raw_dtype=stored
        )
    if extra:
        writer.add_tensor(extra, np.zeros(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(kind: Type = Type.F32, **changes: Any) -> Transformer:
    """A random model whose matrices `kind` can hold exactly."""
    model = Transformer(CONFIG.model_copy(update=changes))
    model.init_weights(torch.Generator().manual_seed(0))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data = torch.from_numpy(np.array(gguf.quants.dequantize(gguf.quants.quantize(parameter.detach().numpy(), kind), kind)))
        else:
            parameter.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(1))
    return model


def logits(model: Transformer) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[1, 40, 41, 2, 90, 7, 261, 15]])).logits_BTV


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1], ids=lambda kind: kind.name)
def test_logits_are_the_source_models(kind: Type, tmp_path: Path) -> None:
    source = make(kind)
    write(tmp_path / "m.gguf", source, kind)
    loaded = load_model(tmp_path / "m.gguf")
    assert loaded.config == source.config.model_copy(update={"initializer_range": 0.02})
    assert torch.equal(loaded.model.layers[1].self_attn.q_proj.weight, source.model.layers[1].self_attn.q_proj.weight)
    assert torch.allclose(logits(loaded), logits(source), atol=1e-5)


def test_a_model_without_head_is_tied_and_dtype_is_as_asked(tmp_path: Path) -> None:
    source = make(tie_word_embeddings=True)
    write(tmp_path / "m.gguf", source)
    loaded = load_model(tmp_path / "m.gguf", dtype=torch.bfloat16)
    assert loaded.config.tie_word_embeddings and {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.model.embed_tokens.weight, source.model.embed_tokens.weight.bfloat16())


def test_k_quants_by_hand(tmp_path: Path) -> None:
    # One block of 256 values a row. Q6_K: scale 1, six-bit 0 stands for -32. Q4_K: scales 1, minimum 0, nibbles 1 and 2 by turns of 32.
    one, zero = (np.float16(value).tobytes() for value in (1, 0))
    six = np.frombuffer(bytes(192) + b"\1" * 16 + one, dtype=np.uint8)
    four = np.frombuffer(one + zero + b"\1" * 12 + b"\x21" * 128, dtype=np.uint8)
    path = tmp_path / "m.gguf"
    source = make(intermediate_size=256)
    down = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in (0, 1)]
    written = GGUFWriter.add_tensor

    def swapped(writer: GGUFWriter, name: str, array: np.ndarray, raw_dtype: Type) -> None:
        if "ffn_down" in name:
            raw_dtype, block = (Type.Q6_K, six) if "blk.0" in name else (Type.Q4_K, four)
            array = np.tile(block, (64, 1))
        written(writer, name, array, raw_dtype=raw_dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "add_tensor", swapped)
        write(path, source)
    first, second = (load_model(path).state_dict()[name] for name in down)
    assert torch.equal(first, torch.full((64, 256), -32.0))
    assert torch.equal(second, torch.tensor([1.0, 2.0]).repeat_interleave(32).repeat(64, 4))


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", make())
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    ids = {token: id for id, token in enumerate(TOKENS)}
    assert tokenizer.encode("he 12") == [ids[token] for token in ("he", "Ġ", "1", "2")]  # digits stand alone, whatever the merges say
    assert tokenizer.encode(" the") == [ids["Ġt"], ids["he"]]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (1, 0, None, len(TOKENS))
    assert tokenizer.encode_chat([{"role": "user", "content": "he<tool>"}]) == [1, ids["he"], *(ids[c] for c in "<tool>"), 0, 2]
    assert tokenizer.decode([1, 2, ids["he"], 0]) == "<tool>he"  # user-defined tokens are text, control tokens are not
    assert tokenizer.config["add_bos_token"] is False


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"general.architecture": "mamba"}, "general.architecture 'mamba' is not supported"),
        ({"llama.block_count": None}, "key llama.block_count is missing"),
        ({"llama.block_count": "two"}, "llama.block_count must be of type int, got 'two'"),
        ({"llama.attention.head_count": 3}, "num_attention_heads 3 must divide"),
        ({"llama.expert_count": 8}, "llama.expert_count 8 is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type 'yarn' is not supported"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count 8 is not supported, 16 is"),
        ({"llama.block_count": 3}, "tensors are missing, among them model.layers.2"),
        ({"llama.feed_forward_length": 128}, "mlp.gate_proj.weight has shape [96, 64]"),
    ],
)
def test_a_model_that_would_read_differently_is_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    write(tmp_path / "m.gguf", make(), keys=keys)
    with pytest.raises(SlingshotError) as error:
        load_model(tmp_path / "m.gguf")
    assert said in str(error.value) and str(tmp_path / "m.gguf") in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model 'llama' is not supported"),
        ({"tokenizer.ggml.pre": "qwen2"}, "tokenizer.ggml.pre 'qwen2' is not supported"),
        ({"tokenizer.ggml.tokens": None}, "key tokenizer.ggml.tokens is missing"),
        ({"tokenizer.ggml.eos_token_id": 9999}, f"tokenizer.ggml.eos_token_id 9999 is beyond the {len(TOKENS)} tokens"),
        ({"tokenizer.ggml.eos_token_id": 5}, "make no tokenizer"),  # an ordinary token cannot end a text
        ({"tokenizer.ggml.merges": ["q zz"]}, "make no tokenizer"),
    ],
)
def test_a_tokenizer_that_would_read_differently_is_refused(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    write(tmp_path / "m.gguf", make(), keys=keys)
    with pytest.raises(SlingshotError) as error:
        load_tokenizer(tmp_path / "m.gguf")
    assert said in str(error.value) and str(tmp_path / "m.gguf") in str(error.value)


def test_tensors_must_be_a_plain_llamas(tmp_path: Path) -> None:
    write(tmp_path / "extra.gguf", make(), extra="rope_freqs.weight")
    with pytest.raises(SlingshotError, match=r"the tensor rope_freqs\.weight is not part of a plain llama model"):
        load_model(tmp_path / "extra.gguf")
    write(tmp_path / "missing.gguf", make(), skip="model.norm.weight")
    with pytest.raises(SlingshotError, match=r"missing.gguf: 1 tensors are missing, among them model\.norm\.weight"):
        load_model(tmp_path / "missing.gguf")


def test_files_must_be_whole(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", make())
    content = (tmp_path / "m.gguf").read_bytes()
    broken = tmp_path / "broken.gguf"
    for cut in (0, 3, 20, 2000, len(content) - 100):
        broken.write_bytes(content[:cut])
        with pytest.raises(SlingshotError, match=r"broken.gguf is no whole GGUF file.*is the download complete"):
            load_model(broken)
    broken.write_bytes(b"PK\3\4" + content[4:])
    with pytest.raises(SlingshotError, match="GGUF magic invalid"):
        load_tokenizer(broken)
    with pytest.raises(SlingshotError, match=r"cannot read .*absent.gguf: No such file"):
        load_model(tmp_path / "absent.gguf")
