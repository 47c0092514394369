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


@pytest.fixture
def source(make_model, deepseek, tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    save_checkpoint(folder, make_model(deepseek(vocab_size=264)), Tokenizer.train(["3+4=7"], vocab_size=264))
    return folder


def test_a_checkpoint_with_its_receipt(source, tmp_path):
    out = tmp_path / "out"
    run(ConvertConfig(source=str(source), threads=1), out)
    before, after = load_model(source).state_dict(), load_model(out).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(out).encode("3+4") == load_tokenizer(source).encode("3+4")
    receipt = Receipt.read(out)
    assert (receipt.stage, receipt.flops, receipt.parents[0].digest) == ("convert", 0.0, artifact_digest(source))
    assert not out.with_name("out.partial").exists()


def test_bfloat16_on_disk_is_what_config_json_says(source, tmp_path):
    run(ConvertConfig(source=str(source), dtype="bfloat16", threads=1), tmp_path / "out")
    stored, exact = load_file(tmp_path / "out" / "model.safetensors"), load_file(source / "model.safetensors")
    assert all(
        torch.equal(stored[name], exact[name].to(torch.float32 if "correction_bias" in name else torch.bfloat16))
        for name in exact
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_fp8_and_back(source, tmp_path):
    """Matrices of attention and experts in blocks of e4m3, the rest in bfloat16; read back, every number is within half
    a step of e4m3."""
    run(ConvertConfig(source=str(source), dtype="fp8", threads=1), tmp_path / "fp8")
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    assert stored["model.layers.1.mlp.experts.5.up_proj.weight"].dtype == torch.float8_e4m3fn
    assert stored["model.layers.1.mlp.experts.5.up_proj.weight_scale_inv"].shape == (1, 1)
    assert {
        str(tensor.dtype)
        for name, tensor in stored.items()
        if "mlp.gate.weight" in name or "norm" in name or "eh_proj" in name
    } == {"torch.bfloat16"}
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    assert raw["quantization_config"] == {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
    assert raw["torch_dtype"] == "bfloat16"

    run(ConvertConfig(source=str(tmp_path / "fp8"), dtype="float32", threads=1), tmp_path / "back")
    assert "quantization_config" not in json.loads((tmp_path / "back" / "config.json").read_text())
    exact, back = load_file(source / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == exact.keys()
    for name, tensor in exact.items():
        assert ((back[name] - tensor).abs() <= tensor.abs() / 16 + tensor.abs().max() / 448 * 2**-10).all(), name
    assert not torch.equal(
        back["model.layers.1.mlp.experts.5.up_proj.weight"], exact["model.layers.1.mlp.experts.5.up_proj.weight"]
    )


def test_resharding_keeps_every_byte(source, tmp_path):
    """FP8 numbers and scales, and a tensor that is no part of the architecture, pass as they are."""
    run(ConvertConfig(source=str(source), dtype="fp8", threads=1), tmp_path / "fp8")
    run(ConvertConfig(source=str(tmp_path / "fp8"), max_shard_size="20KB", threads=1), tmp_path / "shards")
    run(ConvertConfig(source=str(tmp_path / "shards"), threads=1), tmp_path / "whole")
    shards = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 40_000 for shard in shards)
    expected, again = (
        load_file(tmp_path / "fp8" / "model.safetensors"),
        load_file(tmp_path / "whole" / "model.safetensors"),
    )
    assert expected.keys() == again.keys()
    assert all(
        torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)) for name, tensor in expected.items()
    )
    assert json.loads((tmp_path / "whole" / "config.json").read_text()) == json.loads(
        (tmp_path / "fp8" / "config.json").read_text()
    )


@pytest.mark.parametrize(("value", "dtype"), [(torch.nan, "bfloat16"), (torch.inf, "fp8"), (70_000.0, "float16")])
def test_values_that_the_dtype_cannot_hold_are_named_and_nothing_is_left(source, tmp_path, value, dtype):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][3, 3] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        SlingshotError,
        match=r"model\.safetensors: model\.layers\.0\.self_attn\.o_proj\.weight holds NaN or infinite values",
    ):
        run(ConvertConfig(source=str(source), dtype=dtype, threads=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_sources_own_generation_config_is_kept(source, tmp_path):
    own = {"eos_token_id": [1, 4], "temperature": 0.3, "max_new_tokens": 2048, "pad_token_id": 2, "bos_token_id": 0}
    (source / "generation_config.json").write_text(json.dumps(own))
    run(ConvertConfig(source=str(source), dtype="bfloat16", threads=1), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == own
    assert load_tokenizer(tmp_path / "out").eos_ids == {1, 4}


def test_weights_are_converted_beside_a_tokenizer_that_cannot_be_read(source, tmp_path, capsys):
    """Its files are passed on byte for byte, for the programs that can; a GGUF file cannot do without."""
    odd = json.dumps({"model": {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}, "decoder": None})
    (source / "tokenizer.json").write_text(odd)
    (source / "tokenizer.model").write_bytes(b"sentencepiece")
    config = json.loads((source / "config.json").read_text())
    out = tmp_path / "out"
    run(ConvertConfig(source=str(source), dtype="bfloat16", threads=1), out)
    note = capsys.readouterr().err
    assert note.startswith("note: the tokenizer cannot be read here and is passed on as it is: ")
    assert (out / "tokenizer.json").read_text() == odd and (out / "tokenizer.model").read_bytes() == b"sentencepiece"
    assert json.loads((out / "config.json").read_text()) == config | {"torch_dtype": "bfloat16"}
    state, expected = load_model(out).state_dict(), load_model(source, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(state[name].bfloat16(), expected[name].bfloat16()) for name in expected)
    with pytest.raises(SlingshotError, match="tokenizer"):
        write_gguf_file(str(source), tmp_path / "model.gguf", None)
    assert not (tmp_path / "model.gguf").exists()


def test_what_a_gguf_file_has_not_is_refused(source, tmp_path):
    with pytest.raises(
        SlingshotError, match="--dtype fp8: a GGUF file here is one of float32, float16, bfloat16, q8_0"
    ):
        write_gguf_file(str(source), tmp_path / "model.gguf", "fp8")
