"""Checkpoints: Hugging Face's names there and back, and every broken one refused by name."""

import json
import math
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping

import pytest
import torch
from file_maker import write_headers
from safetensors.torch import load_file, save_file

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import hf_tensors, load_model, load_tokenizer, save_checkpoint
from slingshot.checkpoint.safetensors import write_shards
from slingshot.quantization.fp8 import dequantize, quantize


@pytest.fixture
def saved(save, deepseek, tmp_path):
    return save(tmp_path / "model", deepseek(vocab_size=280))


def edit(folder, **changes):
    """Put other tensors in, or what a function makes of the old ones; None takes one out."""
    tensors = load_file(folder / "model.safetensors")
    for name, change in changes.items():
        tensors[name] = change(tensors[name]) if callable(change) else change
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


@pytest.mark.parametrize(
    "changes", [{}, {"tie_word_embeddings": True}, {"q_lora_rank": None, "num_nextn_predict_layers": 0}]
)
def test_a_round_trip_changes_nothing(make_model, deepseek, tokenizer, tmp_path, changes):
    model = make_model(deepseek(vocab_size=280, **changes))
    save_checkpoint(tmp_path, model, tokenizer)
    again = load_model(tmp_path)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("bos", "eos", "pad")}
    assert again.config.model_copy(update={"extra": {}}) == model.config.model_copy(update=ids)
    state, expected = again.state_dict(), model.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)
    assert load_tokenizer(tmp_path).encode("3+4") == tokenizer.encode("3+4")
    (tmp_path / "again").mkdir()
    save_checkpoint(tmp_path / "again", again, tokenizer)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / file).read_bytes()


def test_names_are_deepseeks(make_model, deepseek):
    """One tensor per expert, gate before up; the MTP module, after the last layer, has copies of embedding and head."""
    model = make_model(deepseek())
    tensors = {name: each.make() for name, each in hf_tensors(model.config, model.state_dict())}
    stacked, expert = model.model.layers[1].mlp.experts, "model.layers.1.mlp.experts.6"
    assert torch.equal(tensors[f"{expert}.gate_proj.weight"], stacked.gate_up_proj.weight[6, 0])
    assert torch.equal(tensors[f"{expert}.up_proj.weight"], stacked.gate_up_proj.weight[6, 1])
    assert torch.equal(tensors[f"{expert}.down_proj.weight"], stacked.down_proj.weight[6])
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])


def test_a_model_loads_in_the_dtype_asked_for_but_keeps_exact_routers(saved):
    model = load_model(saved, dtype=torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {dtype for name, dtype in dtypes.items() if ".gate." not in name} == {torch.bfloat16}
    assert {dtype for name, dtype in dtypes.items() if ".gate." in name} == {torch.float32}
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(model.state_dict()[name], load_file(saved / "model.safetensors")[name])


def test_a_checkpoint_without_its_mtp_module_loads_without_it(saved):
    """transformers drops the module when it saves and leaves its mention in config.json; half a module is an error."""
    expected = load_model(saved)
    names = [spec.name for spec in layout(expected.config)]
    edit(saved, **{name: None for name in names if name.startswith("model.layers.3.")})
    model = load_model(saved)
    assert model.config.num_nextn_predict_layers == 0
    facts, said = examine(str(saved)), "config.json mentions an MTP module that the files have not; the model is read"
    assert facts["problems"] == [] and facts["parameters"]["mtp"] == 0
    assert facts["notes"] == [f"{saved}/{said} without"]
    state = expected.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


LINEAR, NORM, HEAD = "model.layers.0.self_attn.o_proj.weight", "model.norm.weight", "lm_head.weight"
EXPERT = "model.layers.2.mlp.experts"


@pytest.mark.parametrize(("changes", "message"), [
    ({"model.layers.3.eh_proj.weight": None},
     r"layers\.3\.eh_proj\.weight is missing; config\.json asks for 135 tensors, the files hold 134"),
    ({f"{EXPERT}.7.up_proj.weight": None}, r"model\.layers\.2\.mlp\.experts\.7\.up_proj\.weight is missing"),
    ({"model.layers.9.norm.weight": torch.ones(2)}, r"model\.layers\.9\.norm\.weight is no tensor of this arch"),
    ({f"{EXPERT}.8.up_proj.weight": torch.ones(16, 32)}, r"experts\.8\.up_proj\.weight is no tensor of this"),
    ({NORM: torch.ones(31)}, r"model\.norm\.weight has shape \[31\], config\.json says \[32\]"),
    ({NORM: lambda t: t.fill_(torch.nan)}, r"safetensors: model\.norm\.weight holds NaN or infinite values"),
    ({HEAD: lambda t: torch.cat([t[:-1], t[-1:] / 0])}, r"lm_head\.weight holds NaN or infinite values"),
    ({NORM: torch.ones(32, dtype=torch.int32)}, r"model\.norm\.weight is stored as I32; weights are read from F64"),
    ({HEAD: lambda t: t.to(torch.float8_e4m3fn)}, r"lm_head\.weight is stored in FP8 without the scales"),
    ({HEAD: lambda t: t.to(torch.float8_e8m0fnu)}, r"is stored as F8_E8M0; weights are read from F64"),
    ({LINEAR: lambda t: t.to(torch.float8_e4m3fn), f"{LINEAR}_scale_inv": torch.ones(1, 1, dtype=torch.int32)},
     r"o_proj\.weight_scale_inv is stored as I32; FP8 scales are read from F32, BF16, F8_E8M0"),
])  # fmt: skip
def test_tensors_that_do_not_fit_are_named(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(SlingshotError, match=message) as refused:
        load_model(saved)
    # `inspect` comes to the same verdict in the same words, but for numbers, which it does not read
    assert [str(refused.value)] == examine(str(saved))["problems"] or "infinite values" in message


def test_a_tokenizer_larger_than_its_model_is_refused(save, deepseek, tmp_path):
    with pytest.raises(SlingshotError, match=r"small: the tokenizer has 277 ids, the model's vocabulary 270"):
        load_tokenizer(save(tmp_path / "small", deepseek(vocab_size=270)))


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
        for name in ("tokenizer", "generation", "model"):
            put(f"{name}_config.json".removeprefix("model_"), {"eos_token": None, "eos_token_id": None})
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
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("scales", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_matrices_are_read_through_their_scales(make_model, deepseek, tokenizer, tmp_path, dtype, scales):
    """DeepSeek-V3's scales are float32, V3.1's powers of two, which files may hold as e8m0. Wider than a block."""
    ragged = {"hidden_size": 140, "intermediate_size": 260, "moe_intermediate_size": 130, "q_lora_rank": 129}
    config = deepseek(vocab_size=280, **ragged)
    tensors = {name: each.make() for name, each in hf_tensors(config, make_model(config).state_dict())}
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
    for name, tensor in hf_tensors(config, loaded.state_dict()):
        assert torch.equal(tensor.make(), values[name].to(tensor.dtype)), name


# 640 MiB in bfloat16. Its float32 file is a hole in the disk, so it costs neither space nor time.
_LARGE = {"vocab_size": 16_000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 18}

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
def test_memory_stays_within_the_models_size_and_a_piece(dense, tokenizer, tmp_path, what):
    config, folder = dense(**_LARGE, num_attention_heads=16, num_key_value_heads=16), tmp_path / "large"
    folder.mkdir()
    tensors = {spec.name: ("F32", spec.shape) for spec in layout(config)}
    write_headers(folder / "model.safetensors", tensors)
    numbers = sum(math.prod(shape) for _, shape in tensors.values())
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    tokenizer.save(folder)
    command = [sys.executable, "-c", _MEASURE, str(folder), what, str(numbers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak, size = map(int, done.stdout.split()[-2:])
    shutil.rmtree(tmp_path)
    print(f"{what}: peak {peak / size:.3f} of {size / 2**30:.2f} GiB")
    assert size >= 600 * 2**20 and peak <= 1.05 * size + 160 * 2**20


class MadeWhenAsked(Mapping):
    """Weights that are made anew, as a merged model's are; knows how many bytes of them lived at once."""

    def __init__(self, state):
        self.state, self.made, self.most = state, [], 0

    def __getitem__(self, name):
        array = self.state[name].numpy().copy()  # which lives as long as a tensor's memory does
        self.made.append(weakref.ref(array))
        self.most = max(self.most, sum(each.nbytes for made in self.made if (each := made()) is not None))
        return torch.from_numpy(array)

    def __iter__(self):
        return iter(self.state)

    def __len__(self):
        return len(self.state)


def test_weights_that_are_made_for_it_are_let_go_as_they_are_written(make_model, deepseek, tokenizer, tmp_path):
    """No second copy of a model in memory: one tensor at a time, and the one before it until it is replaced."""
    model = make_model(deepseek(vocab_size=280))
    made = MadeWhenAsked(model.state_dict())
    save_checkpoint(tmp_path, model, tokenizer, made)
    largest = max(tensor.nbytes for tensor in made.state.values())
    assert largest <= made.most <= 2 * largest < sum(tensor.nbytes for tensor in made.state.values()) / 2
    loaded = load_model(tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in made.state.items())
