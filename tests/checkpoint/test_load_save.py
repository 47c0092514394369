"""Checkpoints: Hugging Face's names there and back, and every broken one refused by name."""

import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.description import load_config, write_description
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint, to_hf_tensors
from slingshot.checkpoint.safetensors import write_shards
from slingshot.model.config import ModelConfig
from slingshot.quantization.fp8 import dequantize, quantize
from slingshot.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["3+4=7"], vocab_size=264)


@pytest.fixture
def saved(make_model, deepseek, tokenizer, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_checkpoint(folder, make_model(deepseek(vocab_size=264)), tokenizer)
    return folder


LINEAR = "model.layers.0.self_attn.o_proj"


def edit(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"q_lora_rank": None, "num_nextn_predict_layers": 0}]
)
def test_a_round_trip_changes_nothing(make_model, deepseek, tokenizer, tmp_path, changes):
    model = make_model(deepseek(vocab_size=264, **changes))
    save_checkpoint(tmp_path, model, tokenizer)
    again = load_model(tmp_path)
    assert again.config.model_copy(update={"extra": {}}) == model.config.model_copy(
        update={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    )
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert load_tokenizer(tmp_path).encode("3+4") == tokenizer.encode("3+4")
    (tmp_path / "again").mkdir()
    save_checkpoint(tmp_path / "again", again, tokenizer)
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads(
        (tmp_path / "config.json").read_text()
    )


def test_names_are_deepseeks(make_model, deepseek):
    """One tensor per expert, gate before up; the MTP module is the layer after the last, with its own copies of
    embedding and head."""
    model = make_model(deepseek())
    tensors = to_hf_tensors(model.config, model.state_dict())
    stacked = model.model.layers[1].mlp.experts
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.gate_proj.weight"], stacked.gate_up_proj.weight[6, 0])
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.up_proj.weight"], stacked.gate_up_proj.weight[6, 1])
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.down_proj.weight"], stacked.down_proj.weight[6])
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (8,)
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert {f"model.layers.3.{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm")} <= set(
        tensors
    )
    assert not [name for name in tensors if "gate_up_proj" in name]


def test_a_tied_head_is_not_stored(make_model, deepseek):
    model = make_model(deepseek(tie_word_embeddings=True))
    tensors = to_hf_tensors(model.config, model.state_dict())
    assert "lm_head.weight" not in tensors and "model.layers.3.shared_head.head.weight" in tensors


def test_a_model_loads_in_the_dtype_asked_for_but_keeps_exact_routers(saved):
    model = load_model(saved, dtype=torch.bfloat16)
    biases = [layer.gate.e_score_correction_bias for layer in model.moe_layers()]
    routers = {id(layer.gate.weight) for layer in model.moe_layers()}
    assert {p.dtype for p in model.parameters() if id(p) not in routers} == {torch.bfloat16}
    assert {layer.gate.weight.dtype for layer in model.moe_layers()} == {torch.float32}
    exact = load_file(saved / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert biases[0].dtype == torch.float32 and torch.equal(biases[0], exact)


def test_shards_are_read_through_their_index(saved, tokenizer, tmp_path):
    expected = load_model(saved).state_dict()
    (tmp_path / "sharded").mkdir()
    save_checkpoint(tmp_path / "sharded", load_model(saved), tokenizer, max_shard_size=40_000)
    assert len(list((tmp_path / "sharded").glob("model-*-of-*.safetensors"))) > 3
    state = load_model(tmp_path / "sharded").state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_a_checkpoint_without_its_mtp_module_loads_without_it(saved):
    """transformers drops the module when it saves and leaves its mention in config.json; half a module is an error."""
    expected = load_model(saved).state_dict()

    def drop(tensors):
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    edit(saved, drop)
    model = load_model(saved)
    assert model.config.num_nextn_predict_layers == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(("change", "message"), [
    (lambda t: t.pop("model.layers.3.eh_proj.weight"),
     r"layers\.3\.eh_proj\.weight is missing; config\.json asks for 135 tensors, the files hold 134"),
    (lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight"),
     r"model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight is missing"),
    (lambda t: t.update({"model.layers.9.norm.weight": torch.ones(2)}),
     r"safetensors: model\.layers\.9\.norm\.weight is no tensor of this arch"),
    (lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(16, 32)}),
     r"experts\.8\.up_proj\.weight is no tensor of this"),
    (lambda t: t.update({"model.norm.weight": torch.ones(31)}),
     r"model\.norm\.weight has shape \[31\], config\.json says \[32\]"),
    (lambda t: t["model.norm.weight"].fill_(torch.nan),
     r"safetensors: model\.norm\.weight holds NaN or infinite values"),
    (lambda t: t["lm_head.weight"][-1].fill_(torch.inf),
     r"safetensors: lm_head\.weight holds NaN or infinite values"),
    (lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int32)}),
     r"model\.norm\.weight is stored as I32; weights are read from F64"),
    (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e4m3fn)}),
     r"lm_head\.weight is stored in FP8 without the scales"),
    (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].to(torch.float8_e8m0fnu)}),
     r"lm_head\.weight is stored as F8_E8M0; weights are read from F64"),
    (
        lambda t: t.update(
            {name: t[name].to(torch.float8_e4m3fn) for name in [f"{LINEAR}.weight"]}
            | {f"{LINEAR}.weight_scale_inv": torch.ones(1, 1, dtype=torch.int32)}
        ),
        r"o_proj\.weight_scale_inv is stored as I32; FP8 scales are read from F32, BF16, F8_E8M0",
    ),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(saved, change, message):
    edit(saved, change)
    with pytest.raises(SlingshotError, match=message) as refused:
        load_model(saved)
    # `inspect` comes to the same verdict in the same words, but for numbers, which it does not read
    assert [str(refused.value)] == examine(str(saved))["problems"] or "infinite values" in message


def test_checkpoints_that_are_none_are_refused(saved, tmp_path):
    (saved / "config.json").write_text("[]")
    with pytest.raises(SlingshotError, match="does not hold a JSON object"):
        load_config(saved)
    with pytest.raises(SlingshotError, match="nowhere"):
        load_model(tmp_path / "nowhere")
    (tmp_path / "link.json").write_text("{}")
    (saved / "config.json").unlink()
    (saved / "config.json").symlink_to(tmp_path / "link.json")
    with pytest.raises(SlingshotError, match=r"'config\.json' is a link out of the folder"):
        load_config(saved)


def test_a_tokenizer_larger_than_its_model_is_refused(saved):
    Tokenizer.train(["three plus three"], vocab_size=268).save(saved)
    with pytest.raises(SlingshotError, match=r"model: .*268.*264"):
        load_tokenizer(saved)


@pytest.mark.parametrize(("file", "said", "ends"), [
    ("config.json", {"eos_token_id": [1, 4]}, {1, 4}),
    ("config.json", {"eos_token_id": 4}, {1, 4}),
    ("config.json", {"eos_token_id": [1, 50]}, {1}),  # 50 is a byte of text, and a default that nobody chose
    ("generation_config.json", {"eos_token_id": [4, 3]}, {1, 3, 4}),
    ("tokenizer_config.json", {"eos_token": None}, set()),
    ("special_tokens_map.json", {"eos_token": "<｜Assistant｜>"}, {4}),
    ("special_tokens_map.json", {"eos_token": {"content": "<｜Assistant｜>"}, "unk_token": "?"}, {4}),
])  # fmt: skip
def test_ends_are_read_wherever_they_stand_and_kept(saved, tmp_path, file, said, ends):
    def put(name, values):
        old = json.loads((saved / name).read_text()) if (saved / name).exists() else {}
        (saved / name).write_text(json.dumps(old | values))

    if "token" in file:
        put("tokenizer_config.json", {"eos_token": None})
        put("generation_config.json", {"eos_token_id": None})
        put("config.json", {"eos_token_id": None})
    put(file, said)
    tokenizer = load_tokenizer(saved)
    assert tokenizer.eos_ids == ends
    (tmp_path / "again").mkdir()
    save_checkpoint(tmp_path / "again", load_model(saved), tokenizer)
    assert load_tokenizer(tmp_path / "again").eos_ids == ends


@pytest.mark.parametrize("own", [None, {"temperature": 0.3}, {"do_sample": False, "eos_token_id": [1, 4], "x": 1}])
def test_a_sources_generation_config_is_kept(saved, tmp_path, own):
    """What is missing is added: the ids of the tokenizer's tokens; how to sample is said only where nothing is said."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(saved, source)
    out.mkdir()
    (source / "generation_config.json").unlink()
    if own is not None:
        (source / "generation_config.json").write_text(json.dumps(own))
    save_checkpoint(out, load_model(source), load_tokenizer(source), source=source)
    written = json.loads((out / "generation_config.json").read_text())
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    assert written == ids | (sampling if own is None else own)


def test_a_configuration_beyond_its_tensors_is_refused_at_once(saved):
    """Before anything of that size is built, or a list of its tensors is written out."""
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(raw | {"num_hidden_layers": 1000}))
    start = time.monotonic()
    with pytest.raises(SlingshotError, match=r"is missing; config\.json asks for \d{5} tensors, the files hold 135"):
        load_model(saved)
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_matrices_are_read_through_their_scales(make_model, deepseek, tokenizer, tmp_path, dtype, scales):
    """DeepSeek-V3's scales are float32, V3.1's powers of two, which files may hold as e8m0.

    Wider than a block, with ragged edges; the experts' stack, the MTP module and the router are told apart."""
    config = deepseek(
        vocab_size=264, hidden_size=140, intermediate_size=260, moe_intermediate_size=130, q_lora_rank=129
    )
    model = make_model(config)
    tensors = to_hf_tensors(config, model.state_dict())
    stored, values = {}, {}
    for spec in layout(config):
        if spec.stored == "linear":
            stored[spec.name], scale = quantize(tensors[spec.name])
            stored[spec.name + "_scale_inv"] = scale = torch.exp2(scale.log2().round()).to(scales)
            values[spec.name] = dequantize(stored[spec.name], scale.float())
        else:
            stored[spec.name] = values[spec.name] = tensors[spec.name]
    write_shards(tmp_path, stored.items())
    write_description(tmp_path, config.model_copy(update={"quantization": "fp8"}), tokenizer, "float32", None)
    assert examine(str(tmp_path))["problems"] == []
    loaded = load_model(tmp_path, dtype=dtype)
    for name, tensor in to_hf_tensors(config, loaded.state_dict()).items():
        assert torch.equal(tensor, values[name].to(tensor.dtype)), name


# 640 MiB in bfloat16. Its float32 file is a hole in the disk, so it costs neither space nor time.
_LARGE = {
    "family": "dense", "vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18,
    "num_attention_heads": 16,
}  # fmt: skip

_MEASURE = """
import re, sys
from pathlib import Path
import torch
from slingshot.checkpoint.load_save import load_model, save_checkpoint
from slingshot.text.tokenizer import Tokenizer
from slingshot.stages import convert

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

folder, what = Path(sys.argv[1]), sys.argv[2]
before = peak()
if what == "convert":
    convert.run(convert.ConvertConfig(source=str(folder), dtype="bfloat16", threads=1), folder.with_name("out"))
    size = 2 * int(sys.argv[3])
else:
    model = load_model(folder, dtype=torch.bfloat16)
    size = sum(parameter.nbytes for parameter in model.parameters())
    folder.with_name("out").mkdir()
    save_checkpoint(folder.with_name("out"), model, Tokenizer.load(folder))
print(peak() - before, size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["load and save", "convert"])
def test_memory_stays_within_the_models_size_and_a_piece(tokenizer, tmp_path, what):
    config, folder = ModelConfig(**_LARGE), tmp_path / "large"
    folder.mkdir()
    entries, end = {}, 0
    for spec in layout(config):
        size = 4 * math.prod(spec.shape)
        entries[spec.name] = {"dtype": "F32", "shape": spec.shape, "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    tokenizer.save(folder)
    command = [sys.executable, "-c", _MEASURE, str(folder), what, str(end // 4)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split()[-2:])
    shutil.rmtree(tmp_path)
    print(f"{what}: peak {peak / size:.3f} of {size / 2**30:.2f} GiB")
    assert size >= 600 * 2**20 and peak <= 1.05 * size + 160 * 2**20
