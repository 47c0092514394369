"""inspect: what it says of a model follows from the headers alone; what would stop a load is named before."""

import io
import json
import subprocess
import sys

import pytest
from file_maker import write_headers
from rich.console import Console
from typer.testing import CliRunner

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.write import write_gguf
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import load_tokenizer, open_weights
from slingshot.cli.inspect import show
from slingshot.cli.main import app
from slingshot.model.config import ModelConfig
from slingshot.quantization.formats import SCALE, scale_shape
from tests.waiting import PATIENCE


def inspect(source):
    target = io.StringIO()
    facts = examine(str(source))
    show(facts, Console(file=target, width=60))
    return not facts["problems"], target.getvalue()


def tensors_of(config, dtype="BF16"):
    """Name, dtype and shape of all that a checkpoint of this configuration holds."""
    tensors = {}
    for spec in layout(config):
        tensors[spec.name] = ("F32" if spec.stored == "float32" else dtype, spec.shape)
        if config.quantization and spec.stored == "linear":
            tensors[spec.name] = ("F8_E4M3", spec.shape)
            tensors[spec.name + SCALE] = ("F32", scale_shape(spec.shape))
    return tensors


@pytest.fixture
def checkpoint(tmp_path, deepseek, tokenizer):
    """checkpoint(config, tensors): a folder with these headers and a tokenizer."""

    def make(config=None, tensors=None, **raw):
        config = config or deepseek(vocab_size=277)
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config.to_hf() | {"torch_dtype": "bfloat16"} | raw))
        write_headers(folder / "model.safetensors", tensors_of(config) if tensors is None else tensors)
        tokenizer.save(folder)
        return folder

    return make


def test_deepseek_v3_as_its_makers_count_it():
    usable, text = inspect("deepseek-v3")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert usable
    for line in (
        "model 671,026,404,352 671B", "MTP module 11,610,067,968 11.61B",
        "all, in 91,991 tensors 684,531,386,000 684.5B",
        "with embedding and head 37.55B", "without the input embedding 36.63B", "without both 35.7B",
        "one token 70,272 bytes", "full context 10.7 GiB for 163,840 tokens",
        "as plain MHA 4,997,120 bytes a token, 71 times as much",
        "a checkpoint's size 641 GiB", "bfloat16 1.22 TiB 1.24 TiB", "type deepseek_v3, its matrices stored in FP8",
    ):  # fmt: skip
        assert line in lines
    assert "37B" in text and "37B" not in inspect("deepseek-v3-239m")[1]


def test_all_of_it_as_json():
    told = CliRunner().invoke(app, ["inspect", "deepseek-v3", "--json"])
    facts = json.loads(told.output)
    assert told.exit_code == 0 and facts == examine("deepseek-v3")
    assert facts["kind"] == "preset" and not facts["problems"]
    assert facts["files"] is facts["tokenizer"] is facts["template"] is None
    assert facts["checkpoint"] == {"tensors": 91_991, "numbers": 684_531_386_000, "bytes": 688_574_839_360}
    assert facts["model"]["rope_scaling"]["factor"] == 40 and facts["model"]["qk_rope_head_dim"] == 64


def test_a_tied_matrix_counts_as_the_head():
    counts = examine("smollm2-135m")["parameters"]
    assert counts["active"] == counts["active_without_embedding"] == counts["total"] == 134_515_008
    assert counts["active_without_embedding_and_head"] == 134_515_008 - 49152 * 576


def test_a_dense_model_has_no_experts_and_no_mtp_to_show():
    text = inspect("llama-3.1-8b")[1]
    assert "32 heads of 128 on 8 of keys and values" in text
    assert "131,072 tokens (Llama 3's scaling: 8 times 8,192)" in text
    assert not any(word in text for word in ("MTP", "experts", "router", "FP8 scales", "Model cards"))


def test_memory_by_dtype(dense, checkpoint):
    """By hand: fp8 has a scale for each of the 14 matrices; q8_0, int8 and int4 have 2 bytes for every 32 numbers."""
    config = dense(vocab_size=272, tie_word_embeddings=False)
    matrices, outside, norms = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48), 2 * 272 * 32, 5 * 32
    assert examine(str(checkpoint(config)))["memory"] == {
        "float32": {"main": 4 * (matrices + outside + norms), "mtp": 0},
        "bfloat16": {"main": 2 * (matrices + outside + norms), "mtp": 0},
        "fp8": {"main": matrices + 4 * 14 + 2 * (outside + norms), "mtp": 0},
        "q8_0": {"main": (matrices + outside) * 34 // 32 + 4 * norms, "mtp": 0},
        "int8": {"main": matrices * 34 // 32 + 2 * (outside + norms), "mtp": 0},
        "int4": {"main": matrices * 18 // 32 + 2 * (outside + norms), "mtp": 0},
    }


def test_a_whole_checkpoint_fits(checkpoint):
    folder = checkpoint()
    facts = examine(str(folder))
    assert (facts["kind"], facts["problems"], facts["notes"]) == ("folder", [], [])
    files, dtypes = facts["files"], facts["files"]["dtypes"]
    assert all(files[key] == facts["checkpoint"][key] for key in ("tensors", "numbers", "bytes"))
    assert files["bytes"] == 4 * dtypes["F32"]["numbers"] + dtypes["BF16"]["bytes"]
    assert dtypes["F32"]["tensors"] == 3  # the router biases of two layers and the MTP module
    said = facts["tokenizer"]
    assert (said["vocab_size"], said["special"]["eos"]) == (277, "<｜end▁of▁sentence｜>")
    assert (facts["template"]["reasoning"], facts["template"]["switchable"]) == ("opened", True)
    usable, text = inspect(folder)
    assert usable and "opens <think> in the prompt, can be switched off" in text
    assert "Everything fits. Headers only" in text and "1 file 135 tensors" in " ".join(text.split())


def test_piped_output_is_never_wrapped(checkpoint):
    folder = checkpoint(tensors={})
    line = next(line for line in inspect(folder)[1].splitlines() if line.startswith("problem: "))
    assert line == f"problem: {examine(str(folder))['problems'][0]}" and len(line) > 60


def test_many_problems_of_a_kind_are_counted(checkpoint, deepseek, tmp_path):
    config = deepseek(vocab_size=300)
    problems = examine(str(checkpoint(config, moe_intermediate_size=8)))["problems"]
    assert len(problems) == 6 and problems[5] == f"... and {3 * (8 + 1) * 3 - 5} more like these"
    usable, text = inspect(tmp_path / "model")
    assert not usable and f"problem: {problems[0]}" in text and "Everything fits" not in text


@pytest.mark.parametrize(("said", "held", "has"), [
    ("fp8", "fp8", None),
    ("fp8", None, "a quantization_config, but no FP8 tensors"),
    (None, "fp8", "no quantization_config, but FP8 tensors"),
])  # fmt: skip
def test_fp8_that_config_json_and_files_disagree_on_is_noted(said, held, has, checkpoint, deepseek):
    said, held = (deepseek(vocab_size=300, quantization=kind) for kind in (said, held))
    facts = examine(str(checkpoint(said, tensors_of(held))))
    assert facts["problems"] == [] and (has is None) == (facts["notes"] == []) and (has or "") in str(facts["notes"])
    if has is None:  # every matrix here is one block
        assert facts["parameters"]["fp8_scales"] == facts["files"]["dtypes"]["F8_E4M3"]["tensors"]
        assert all(facts["files"][key] == facts["checkpoint"][key] for key in ("tensors", "bytes"))


def test_a_config_json_alone_is_counted(checkpoint):
    folder = checkpoint()
    whole = examine(str(folder))
    for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    facts = examine(str(folder))
    assert facts["problems"] == [] and facts["files"] is None and facts["tokenizer"] is None
    assert all(facts[part] == whole[part] for part in ("model", "parameters", "cache", "memory", "checkpoint"))
    usable, text = inspect(folder)
    assert usable and f"note: {folder} holds no weights: these are the numbers of what its config.json" in text


def test_an_empty_folder(tmp_path):
    facts = examine(str(tmp_path))
    assert facts["problems"] == [f"cannot read {tmp_path}/config.json: No such file or directory"]
    assert facts["notes"] == [] and facts["model"] is None and facts["memory"] is None


def test_a_folder_goes_before_the_preset_of_its_name(checkpoint, monkeypatch):
    folder = checkpoint()
    folder.rename(folder.with_name("deepseek-v3"))
    monkeypatch.chdir(folder.parent)
    assert examine("deepseek-v3")["kind"] == "folder"


@pytest.mark.parametrize(("spoil", "problem"), [
    (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'),
     "{folder}/config.json: model_type 'gpt2' is not supported"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "{folder} has no tokenizer.json"),
    (lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
     "{folder} holds no model.safetensors; pytorch_model.bin is"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 40),
     "{folder}/model.safetensors is no whole safetensors file"),
])  # fmt: skip
def test_what_a_folder_lacks_is_named(spoil, problem, checkpoint):
    folder = checkpoint()
    spoil(folder)
    [found] = examine(str(folder))["problems"]
    assert found.startswith(problem.format(folder=folder))
    assert not inspect(folder)[0]


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_out_of_the_folder_is_not_followed(file, checkpoint, tmp_path):
    folder = checkpoint()
    (folder / file).rename(tmp_path / "elsewhere")
    (folder / file).symlink_to(tmp_path / "elsewhere")
    [problem] = examine(str(folder))["problems"]
    assert file in problem and "link" in problem
    with pytest.raises(SlingshotError) as refused:
        (load_tokenizer if file == "tokenizer.json" else open_weights)(folder)
    assert str(refused.value) == problem


def test_pickles_and_programs_beside_the_model_are_noted(checkpoint):
    folder = checkpoint()
    for file in ("optimizer.pt", "modeling_deepseek.py", "model.Q8_0.gguf"):
        (folder / file).write_text("")
    facts = examine(str(folder))
    assert facts["problems"] == [] and inspect(folder)[0]
    assert sorted(facts["notes"]) == [
        f"{folder}: model.Q8_0.gguf is another checkpoint; give its own path to look at it",
        f"{folder}: modeling_deepseek.py is a program, and is never run",
        f"{folder}: optimizer.pt is pickled, can run code when opened, and is never read",
    ]


@pytest.mark.parametrize(("template", "facts", "note"), [
    (None, None, "there is no chat template; chat, sft and rl need one, generate --raw does not"),
    ("{{ messages[0].content }}", {"tools": False, "reasoning": "tags", "switchable": False}, None),
    ("{% if tools %}{{ raise_exception('none') }}{% endif %}",
     {"tools": False, "reasoning": "tags", "switchable": False}, None),
    ("{% if tools %}{% endif %}{{ '<think>' }}", {"tools": True, "reasoning": "opened", "switchable": False}, None),
    ("{{ raise_exception('no') }}", {"tools": False, "reasoning": None, "switchable": None},
     "the chat template fails on a plain question: "),
])  # fmt: skip
def test_the_template_is_tried(template, facts, note, checkpoint):
    folder = checkpoint()
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    found = examine(str(folder))
    assert found["template"] == facts and found["problems"] == []
    assert len(found["notes"]) == (note is not None) and (note or "") in "".join(found["notes"])


def test_a_tokenizer_of_another_model_is_named(checkpoint, deepseek):
    folder = checkpoint(deepseek(vocab_size=100, eos_token_id=7))
    [problem] = examine(str(folder))["problems"]
    assert problem.startswith(f"{folder}: the tokenizer has 277 ids, the model's vocabulary 100: ")
    [note] = examine(str(folder))["notes"]
    assert note == f"{folder}: config.json's eos_token_id 7 is none of the tokenizer's (1), which count"


def test_names_from_a_file_cannot_steer_the_terminal(checkpoint, deepseek):
    config = deepseek(vocab_size=300)
    usable, text = inspect(checkpoint(config, tensors_of(config) | {"\x1b[2J[red]weight": ("F32", (1,))}))
    assert not usable and "\x1b" not in text and "[2J[red]weight is no tensor" in text


@pytest.mark.slow
def test_all_of_deepseek_v3_is_judged_by_its_headers(checkpoint):
    """641 GiB, of which nothing but the headers lies here; the rest is a hole in the disk."""
    config = ModelConfig.preset("deepseek-v3")
    tensors = tensors_of(config)
    folder = checkpoint(config, tensors)
    facts = examine(str(folder))
    assert (facts["problems"], facts["notes"]) == ([], [])
    assert (facts["files"]["tensors"], facts["files"]["numbers"]) == (91_991, 684_531_386_000)
    numbers = {dtype: entry["numbers"] for dtype, entry in facts["files"]["dtypes"].items()}
    # as the hub counts the released files
    assert numbers == {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600}
    assert facts["files"]["bytes"] == facts["checkpoint"]["bytes"]
    del tensors["model.layers.60.self_attn.o_proj.weight"]
    write_headers(folder / "model.safetensors", tensors)
    [problem] = examine(str(folder))["problems"]
    assert "model.layers.60.self_attn.o_proj.weight is missing" in problem


def test_a_gguf_file(tmp_path, dense, save, tokenizer):
    folder, file = save(tmp_path / "model", dense(vocab_size=277, rms_norm_eps=1e-5)), tmp_path / "model.gguf"
    write_gguf(file, open_weights(folder), tokenizer, "q8_0")
    facts, whole = examine(str(file)), examine(str(folder))
    assert (facts["kind"], facts["problems"]) == ("gguf", []) and facts["parameters"] == whole["parameters"]
    assert facts["tokenizer"]["vocab_size"] == 277 and facts["template"] == whole["template"]
    assert facts["files"]["tensors"] == whole["files"]["tensors"]
    assert facts["files"]["dtypes"]["Q8_0"]["bytes"] == facts["files"]["dtypes"]["Q8_0"]["numbers"] * 34 // 32
    assert "Q8_0" in inspect(file)[1]


def test_a_source_that_is_none_is_refused_with_the_nearest_preset():
    said = "^deepseek-v2: no such folder or .gguf file; .*; or did you mean the preset deepseek-v3[?]$"
    with pytest.raises(SlingshotError, match=said):
        examine("deepseek-v2")


def test_looking_at_a_folder_needs_no_torch(checkpoint):
    code = (
        "import sys; from slingshot.checkpoint.inspection import examine; "
        "assert not examine(sys.argv[1])['problems']; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(checkpoint())], check=True, timeout=PATIENCE)
