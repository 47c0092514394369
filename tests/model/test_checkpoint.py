"""Checkpoints: Hugging Face's names there and back, and every broken one refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from slingshot.config import ModelConfig
from slingshot.data.tokenizer import Tokenizer
from slingshot.files import SlingshotError
from slingshot.model.checkpoint import load_config, load_model, load_tokenizer, save_checkpoint, to_hf_tensors
from slingshot.model.transformer import Transformer

Make = Callable[..., Transformer]
Config = Callable[..., ModelConfig]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["3+4=7"], vocab_size=264)


@pytest.fixture
def saved(make_model: Make, deepseek: Config, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    save_checkpoint(folder, make_model(deepseek(vocab_size=264)), tokenizer)
    return folder


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"q_lora_rank": None, "num_nextn_predict_layers": 0}])
def test_a_round_trip_changes_nothing(make_model: Make, deepseek: Config, tokenizer: Tokenizer, tmp_path: Path, changes: dict[str, object]) -> None:
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
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == json.loads((tmp_path / "config.json").read_text())


def test_names_are_deepseeks(make_model: Make, deepseek: Config) -> None:
    """One tensor per expert, gate before up; the MTP module is the layer after the last, with its own copies of embedding and head."""
    model = make_model(deepseek())
    tensors = to_hf_tensors(model.config, model.state_dict())
    stacked = model.model.layers[1].mlp.experts
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.gate_proj.weight"], stacked.gate_up_proj.weight[6, 0])
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.up_proj.weight"], stacked.gate_up_proj.weight[6, 1])
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.down_proj.weight"], stacked.down_proj.weight[6])
    assert tensors["model.layers.1.mlp.gate.e_score_correction_bias"].shape == (8,)
    assert torch.equal(tensors["model.layers.3.embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors["model.layers.3.shared_head.head.weight"], tensors["lm_head.weight"])
    assert {f"model.layers.3.{part}.weight" for part in ("eh_proj", "enorm", "hnorm", "shared_head.norm")} <= set(tensors)
    assert not [name for name in tensors if "gate_up_proj" in name]


def test_a_tied_head_is_not_stored(make_model: Make, deepseek: Config) -> None:
    model = make_model(deepseek(tie_word_embeddings=True))
    tensors = to_hf_tensors(model.config, model.state_dict())
    assert "lm_head.weight" not in tensors and "model.layers.3.shared_head.head.weight" in tensors


def test_a_model_loads_in_the_dtype_asked_for_but_keeps_exact_router_biases(saved: Path) -> None:
    model = load_model(saved, dtype=torch.bfloat16)
    biases = [layer.gate.e_score_correction_bias for layer in model.moe_layers()]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    exact = load_file(saved / "model.safetensors")["model.layers.1.mlp.gate.e_score_correction_bias"]
    assert biases[0].dtype == torch.float32 and torch.equal(biases[0], exact)


def test_shards_are_read_through_their_index(saved: Path) -> None:
    expected = load_model(saved).state_dict()
    tensors = load_file(saved / "model.safetensors")
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, saved / file)
    (saved / "model.safetensors").unlink()
    index = saved / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    state = load_model(saved).state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in expected)

    (saved / "b.safetensors").unlink()
    with pytest.raises(SlingshotError, match=r"b\.safetensors, which is not a file beside it"):
        load_model(saved)
    index.write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))
    with pytest.raises(SlingshotError, match="not a file beside it"):
        load_model(saved)
    index.write_text("{}")
    with pytest.raises(SlingshotError, match="no weight_map"):
        load_model(saved)


def test_a_checkpoint_without_its_mtp_module_loads_without_it(saved: Path) -> None:
    """transformers drops the module when it saves and leaves its mention in config.json; half a module is an error."""
    expected = load_model(saved).state_dict()

    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.3.")]:
            del tensors[name]

    edit(saved, drop)
    model = load_model(saved)
    assert model.config.num_nextn_predict_layers == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.3.eh_proj.weight"), "1 tensors are missing, among them model.layers.3.eh_proj.weight"),
        (lambda t: t.pop("model.layers.2.mlp.experts.7.up_proj.weight"), "among them model.layers.2.mlp.experts.7.up_proj.weight"),
        (lambda t: t.update({"model.layers.9.norm.weight": torch.ones(2)}), "unknown tensor model.layers.9.norm.weight"),
        (lambda t: t.update({"model.layers.1.mlp.experts.8.up_proj.weight": torch.ones(16, 32)}), "unknown tensor model.layers.1.mlp.experts.8"),
        (lambda t: t.update({"model.norm.weight": torch.ones(31)}), r"model.norm.weight has shape \[31\]"),
        (lambda t: t["model.norm.weight"].fill_(torch.nan), "model.norm.weight holds NaN or infinite values"),
    ],
)
def test_tensors_that_do_not_fit_are_named(saved: Path, change: Callable[[dict[str, Tensor]], None], message: str) -> None:
    edit(saved, change)
    with pytest.raises(SlingshotError, match=message):
        load_model(saved)


def test_checkpoints_that_are_none_are_refused(saved: Path, tmp_path: Path) -> None:
    weights = saved / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(SlingshotError, match=r"model\.safetensors cannot be read.*is the download complete"):
        load_model(saved)
    weights.unlink()
    with pytest.raises(SlingshotError, match=r"holds no model\.safetensors$"):
        load_model(saved)
    (saved / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(SlingshotError, match=r"pytorch_model\.bin is pickled and never read: convert it to safetensors"):
        load_model(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(SlingshotError, match="does not hold a JSON object"):
        load_config(saved)
    with pytest.raises(SlingshotError, match="nowhere is not a checkpoint folder"):
        load_model(tmp_path / "nowhere")


def test_a_checkpoint_of_another_family_is_refused(saved: Path) -> None:
    raw = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps(raw | {"model_type": "mixtral"}))
    with pytest.raises(SlingshotError, match="model_type 'mixtral' is not supported; supported: deepseek_v3, llama, qwen2, qwen3"):
        load_model(saved)
