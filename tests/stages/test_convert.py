"""Conversion: dtypes, FP8 blocks, shards; a receipt; and what cannot be held is refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.cost.receipt import Receipt, artifact_digest
from slingshot.stages.convert import ConvertConfig, run, write_gguf_file
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.identity import Identity

NAME = "model.layers.1.mlp.experts.5.up_proj.weight"


@pytest.fixture
def source(make_model, deepseek, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_checkpoint(folder, make_model(deepseek(vocab_size=264)), Tokenizer.train(["3+4=7"], vocab_size=264))
    return folder


def convert(source, out, **options):
    run(ConvertConfig(source=str(source), threads=1, **options), out)
    return out


def weights(folder):
    return load_file(folder / "model.safetensors")


def told(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def test_a_checkpoint_with_its_receipt(source, tmp_path):
    out = convert(source, tmp_path / "out")
    before, after = load_model(source).state_dict(), load_model(out).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(out).encode("3+4") == load_tokenizer(source).encode("3+4")
    receipt = Receipt.read(out)
    assert (receipt.stage, receipt.flops, receipt.parents[0].digest) == ("convert", 0.0, artifact_digest(source))
    assert not out.with_name("out.partial").exists()


def test_a_packages_weights_make_the_same_artifact_until_they_change(make_model, deepseek, tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    tokenizer = Tokenizer.train(["the same words as before"] * 9, vocab_size=280)
    save_checkpoint(source, make_model(deepseek(vocab_size=280)), tokenizer)
    package = tmp_path / "carrier_of_weights"
    package.mkdir()
    (package / "__init__.py").touch()
    write_gguf_file(str(source), package / "model.gguf", None)
    monkeypatch.syspath_prepend(tmp_path)
    out = convert("package:carrier_of_weights", tmp_path / "out")
    config = ConvertConfig(source="package:carrier_of_weights", threads=1)

    def differences():
        return Identity.of("convert", config).differences(Identity.of_receipt(Receipt.read(out)), ConvertConfig)

    assert differences() == []
    (package / "model.gguf").unlink()
    write_gguf_file(str(source), package / "model.gguf", "float16")
    assert differences() == ["package:carrier_of_weights changed"]


def test_bfloat16_on_disk_is_what_config_json_says(source, tmp_path):
    out = convert(source, tmp_path / "out", dtype="bfloat16")
    stored = weights(out)
    for name, exact in weights(source).items():
        assert torch.equal(stored[name], exact if "correction_bias" in name else exact.bfloat16()), name
    assert told(out)["torch_dtype"] == "bfloat16"


def test_fp8_and_back(source, tmp_path):
    """Matrices in blocks of e4m3, the rest in bfloat16; read back, every number is within half a step of e4m3."""
    fp8 = convert(source, tmp_path / "fp8", dtype="fp8")
    stored, raw = weights(fp8), told(fp8)
    assert stored[NAME].dtype == torch.float8_e4m3fn and stored[f"{NAME}_scale_inv"].shape == (1, 1)
    rest = [tensor for name, tensor in stored.items() if any(part in name for part in ("gate.weight", "norm", "eh_"))]
    assert {tensor.dtype for tensor in rest} == {torch.bfloat16} and raw["torch_dtype"] == "bfloat16"
    quantized = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    assert raw["quantization_config"] == quantized
    folder = convert(fp8, tmp_path / "back", dtype="float32")
    exact, back = weights(source), weights(folder)
    assert back.keys() == exact.keys() and "quantization_config" not in told(folder)
    for name, tensor in exact.items():
        assert ((back[name] - tensor).abs() <= tensor.abs() / 16 + tensor.abs().max() / 448 * 2**-10).all(), name
    assert not torch.equal(back[NAME], exact[NAME])


def test_resharding_keeps_every_byte(source, tmp_path):
    """FP8 numbers and scales pass as they are."""
    fp8 = convert(source, tmp_path / "fp8", dtype="fp8")
    shards = convert(fp8, tmp_path / "shards", max_shard_size="20KB")
    sizes = [shard.stat().st_size for shard in shards.glob("*.safetensors")]
    assert len(sizes) > 2 and max(sizes) < 40_000
    whole = convert(shards, tmp_path / "whole")
    again = weights(whole)
    for name, tensor in weights(fp8).items():
        assert torch.equal(tensor.view(torch.uint8), again.pop(name).view(torch.uint8)), name
    assert again == {} and told(whole) == told(fp8)


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, "bfloat16"), (torch.inf, "fp8"), (70_000.0, "float16")])
def test_values_that_the_dtype_cannot_hold_are_named_and_nothing_is_left(source, tmp_path, value, dtype):
    tensors, name = weights(source), "model.layers.0.self_attn.o_proj.weight"
    tensors[name][3, 3] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(SlingshotError, match=f"model.safetensors: {name} holds NaN or infinite values"):
        convert(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out").exists()


def test_a_sources_own_generation_config_is_kept(source, tmp_path):
    own = {"eos_token_id": [1, 4], "temperature": 0.3, "max_new_tokens": 2048, "pad_token_id": 2, "bos_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(own))
    out = convert(source, tmp_path / "out", dtype="bfloat16")
    assert told(out, "generation_config.json") == own and load_tokenizer(out).eos_ids == {1, 4}


def test_weights_are_converted_beside_a_tokenizer_that_cannot_be_read(source, tmp_path, capsys):
    """Its files are passed on byte for byte, for the programs that can; a GGUF file cannot do without."""
    odd = json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}, "decoder": None})
    (source / "tokenizer.json").write_text(odd)
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    out = convert(source, tmp_path / "out", dtype="bfloat16")
    note = "note: the tokenizer cannot be read here and is passed on as it is: "
    assert capsys.readouterr().err.startswith(note)
    assert (out / "tokenizer.json").read_text() == odd and (out / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert told(out) == told(source) | {"torch_dtype": "bfloat16"}
    state, expected = load_model(out, torch.bfloat16).state_dict(), load_model(source, torch.bfloat16).state_dict()
    assert all(torch.equal(state[name].bfloat16(), expected[name].bfloat16()) for name in expected)
    with pytest.raises(SlingshotError, match="tokenizer"):
        write_gguf_file(str(source), tmp_path / "model.gguf", None)
    assert not (tmp_path / "model.gguf").exists()
