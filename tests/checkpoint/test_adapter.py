"""Adapter folders as checkpoints: peft's own read as peft computes them, converted, described, and refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.adapter import write_adapter
from slingshot.checkpoint.gguf.read import GGUFWeights
from slingshot.checkpoint.inspection import described, examine
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.load_save import load_model, load_tokenizer, open_weights
from slingshot.stages import convert
from slingshot.training.identity import content_digest
from slingshot.training.lora import LoRAConfig, adapters, add_lora, merged
from slingshot.training.parallel import Parallel


@pytest.fixture
def base(save, dense, tmp_path):
    return save(tmp_path / "base", dense(vocab_size=280))


@pytest.fixture
def adapter(base, tmp_path):
    """Written here: rank 4, beside attention."""
    return written(base, tmp_path / "adapter", targets=["attention"])


def written(base, folder, **keys):
    model, generator = load_model(base), torch.Generator().manual_seed(1)
    add_lora(model, LoRAConfig.parse({"rank": 4, **keys}, "lora"), 0, Parallel())
    for name, each in adapters(model).items():
        if name.endswith("lora_B"):
            each.normal_(0, 0.05, generator=generator)
    folder.mkdir()
    write_adapter(folder, adapters(model), 4, 32, str(base))
    return folder


def edit(folder, **changes):
    """Change adapter_config.json; a None takes a key out."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


@pytest.mark.slow
@pytest.mark.parametrize("keys", [{"lora_alpha": 10}, {"use_rslora": True, "rank_pattern": {"o_proj": 2}}])
def test_pefts_own_adapter_gives_pefts_logits(base, tmp_path, keys):
    import peft
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "o_proj", "down_proj"]
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False, **keys))
    model.save_pretrained(tmp_path / "adapter")
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected, own = model.eval()(tokens).logits, load_model(tmp_path / "adapter")(tokens).logits_BTV
    torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)
    assert load_tokenizer(tmp_path / "adapter").encode("3+4") == load_tokenizer(base).encode("3+4")


def test_experts_are_read_as_they_were_written(save, deepseek, tmp_path):
    base = save(tmp_path / "base", deepseek(vocab_size=280))
    folder = written(base, tmp_path / "adapter", targets=["experts", "kv_b_proj"])
    model, weights = load_model(base), open_weights(folder)
    add_lora(model, LoRAConfig(rank=4, targets=["experts", "kv_b_proj"]), 0, Parallel())
    read = load_model(folder).state_dict()
    for name, each in load_file(folder / "adapter_model.safetensors").items():
        if ".experts." not in name:
            model.state_dict()[name.removeprefix("base_model.model.").removesuffix(".weight")].copy_(each)
    changed = merged(model)["model.layers.1.self_attn.kv_b_proj.weight"]
    torch.testing.assert_close(read["model.layers.1.self_attn.kv_b_proj.weight"], changed)
    a, b = (
        load_file(folder / "adapter_model.safetensors")[
            f"base_model.model.model.layers.1.mlp.experts.5.up_proj.lora_{part}.weight"
        ]
        for part in "AB"
    )
    name = "model.layers.1.mlp.experts.5.up_proj.weight"
    torch.testing.assert_close(weights.read(name), open_weights(base).read(name) + 32 / 4 * b @ a)
    torch.testing.assert_close(weights.read(name, slice(3, 7)), weights.read(name)[3:7])


def test_it_becomes_a_checkpoint_and_a_gguf_file_of_its_own(base, adapter, tmp_path):
    convert.run(convert.ConvertConfig(source=str(adapter)), tmp_path / "out")
    convert.write_gguf_file(str(adapter), tmp_path / "out.gguf", "float32")
    made = open_weights(adapter)
    for spec in layout(made.config):
        for other in (open_weights(tmp_path / "out"), GGUFWeights(tmp_path / "out.gguf")):
            torch.testing.assert_close(other.read(spec.name), made.read(spec.name), atol=1e-6, rtol=1e-6)
    kept = [(folder / "generation_config.json").read_text() for folder in (base, tmp_path / "out")]
    assert kept[0] == kept[1]


def test_its_base_is_part_of_what_it_is(base, adapter, save, dense, tmp_path):
    before, own = content_digest(adapter), content_digest(base)
    save(base, dense(vocab_size=280), seed=1)
    assert content_digest(base) != own and content_digest(adapter) != before


def test_it_is_described_by_its_base(base, adapter):
    facts = examine(str(adapter))
    assert facts["kind"] == "adapter" and not facts["problems"] and facts["files"]["tensors"] == 2 * 4 * 2
    assert facts["parameters"] == examine(str(base))["parameters"] and described(str(adapter)) == described(str(base))


def test_a_base_is_found_beside_its_adapter(base, adapter, tmp_path, monkeypatch):
    edit(adapter, base_model_name_or_path="../base")
    (tmp_path / "else" / "base").mkdir(parents=True)  # no model lies there
    (tmp_path / "else" / "here").mkdir()
    monkeypatch.chdir(tmp_path / "else" / "here")
    assert open_weights(adapter).config == open_weights(base).config


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "LOHA"}, "peft_type is not LORA"),
        ({"use_dora": True}, "use_dora True is not computed here"),
        ({"bias": "all"}, "bias all is not computed"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save .'lm_head'. is not computed"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa is not computed"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern .* is not computed"),
        ({"lora_alpha": None}, "lora_alpha is to be a number above 0"),
        ({"base_model_name_or_path": None}, "names no base_model_name_or_path"),
        ({"base_model_name_or_path": "/nowhere/base"}, "its base is missing: /nowhere/base"),
        ({"base_model_name_or_path": "../adapter"}, "is an adapter too; convert that one first"),
    ],
)
def test_what_is_more_than_a_low_rank_change_of_a_model_here_is_refused(adapter, changes, says):
    edit(adapter, **changes)
    with pytest.raises(SlingshotError, match=says) as error:
        load_model(adapter)
    assert "\n" not in str(error.value) and "adapter_config.json" in str(error.value)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("model.layers.0.self_attn.q_proj.lora_A", (4, 31), r"A and B are \[4, 31\] and \[32, 4\], of \[32, 32\]"),
        ("model.layers.0.self_attn.q_proj.lora_A", (5, 32), r"A and B are \[5, 32\] and \[32, 4\]"),
        ("model.layers.0.self_attn.v_proj.lora_B", None, r"A and B are \[4, 32\] and none"),
        ("model.layers.7.self_attn.q_proj.lora_A", (4, 32), "changes nothing that this model has as a matrix"),
        ("model.embed_tokens.lora_embedding_A", (4, 280), "changes nothing that this model has as a matrix"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused(adapter, name, shape, says):
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file) | {f"base_model.model.{name}.weight": shape and torch.zeros(shape)}
    save_file({key: each for key, each in tensors.items() if each is not None}, file)
    with pytest.raises(SlingshotError, match=says) as error:
        load_model(adapter)
    assert "\n" not in str(error.value) and examine(str(adapter))["problems"] == [str(error.value)]


def test_pickled_adapters_are_never_read(adapter):
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(SlingshotError, match=r"adapter_model\.bin is pickled"):
        load_model(adapter)
