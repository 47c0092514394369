"""The multi-token prediction module: how it trains, is stored, and trains on. tests/parity compares its numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from slingshot.checkpoint.load_save import load_model, save_checkpoint
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.stages import convert
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.batch import Rows
from slingshot.training.language_model import LanguageModelLoss, language_model_step
from slingshot.training.optimizer import Optimizer, OptimizerConfig, update_router_biases
from slingshot.training.parallel import Parallel

Config = Callable[..., ModelConfig]
Make = Callable[..., Transformer]
Tensors = dict[str, Tensor]

MTP = "model.layers.3."  # the module of a model of three layers
VOCABULARY = 264


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["3+4=7"], vocab_size=VOCABULARY)


def tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def saved(model: Transformer, tokenizer: Tokenizer, folder: Path) -> Tensors:
    folder.mkdir()
    save_checkpoint(folder, model, tokenizer)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("tied", [False, True])
def test_the_checkpoint_holds_the_module_as_one_more_layer(
    make_model: Make, deepseek: Config, tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    """Layer num_hidden_layers: everything a layer has, three norms, the projection, copies of embedding and head."""
    model = make_model(deepseek(vocab_size=VOCABULARY, tie_word_embeddings=tied))
    tensors = saved(model, tokenizer, tmp_path / "model")
    module = {name.removeprefix(MTP) for name in tensors if name.startswith(MTP)}
    layer = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    extra = {f"{name}.weight" for name in ("enorm", "hnorm", "eh_proj", "embed_tokens")}
    extra |= {f"shared_head.{name}.weight" for name in ("norm", "head")}
    assert module == layer | extra and not any(name.startswith("model.layers.4.") for name in tensors)
    assert tensors[f"{MTP}eh_proj.weight"].shape == (32, 64)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(tensors[f"{MTP}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[f"{MTP}shared_head.head.weight"], tensors[head])
    assert ("lm_head.weight" in tensors) != tied


OPTIMIZER = OptimizerConfig(lr=0.01, adam_lr=0.01)


def train(model: Transformer, optimizer: Optimizer, steps: range) -> list[float | None]:
    """One row batch a step, of its own seed; router biases move as in pre-training."""
    losses = []
    for step in steps:
        rows = tokens(4, 24, seed=100 + step)
        packed = Rows(rows, torch.ones_like(rows), torch.ones(4, 24))
        step_losses = language_model_step(model, packed, LanguageModelLoss(), 4, Parallel())
        optimizer.step(1.0)
        update_router_biases(model, step_losses.load_LE, 0.01)
        losses.append(step_losses.mtp_loss)
    return losses


def test_a_trained_module_survives_saving_loading_and_converting_and_trains_on(
    deepseek: Config, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Bit for bit: three steps, a checkpoint, the same checkpoint converted, and three more steps are six steps."""
    model = Transformer(deepseek(vocab_size=VOCABULARY, initializer_range=0.1))
    model.init_weights(torch.Generator().manual_seed(0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.startswith(MTP)}
    optimizer = Optimizer(model, OPTIMIZER)
    train(model, optimizer, range(3))
    after = model.state_dict()
    unmoved = [name for name, tensor in before.items() if torch.equal(tensor, after[name])]
    assert before and not unmoved

    tensors = saved(model, tokenizer, tmp_path / "trained")
    convert.run(convert.ConvertConfig(source=str(tmp_path / "trained"), threads=1), tmp_path / "converted")
    converted: Tensors = {}
    for file in (tmp_path / "converted").glob("*.safetensors"):
        converted |= load_file(file)
    assert converted.keys() == tensors.keys()
    assert all(torch.equal(converted[name], tensor) for name, tensor in tensors.items())

    loaded = load_model(tmp_path / "converted")
    assert loaded.config.num_nextn_predict_layers == 1
    state = loaded.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], tensor) for name, tensor in after.items())
    resumed = Optimizer(loaded, OPTIMIZER)
    saved_state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    resumed.load(lambda name, _: saved_state.get(name))
    assert train(loaded, resumed, range(3, 6)) == train(model, optimizer, range(3, 6))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(loaded.state_dict()[f"{MTP}eh_proj.weight"], tensors[f"{MTP}eh_proj.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_detached_mtp_trains_itself_only(make_model: Make, deepseek: Config, tied: bool) -> None:
    """Detached, with a detached head, no gradient reaches anything of the main model; else it reaches everything."""
    model = make_model(deepseek(tie_word_embeddings=tied))
    rows = tokens(2, 8)

    def reached(detach: bool) -> set[str]:
        model.zero_grad()
        hidden = model(rows, mtp=True, detach_mtp=detach, logits=False).mtp_hidden_BTD
        model.head.product(hidden, detach).logsumexp(-1).sum().backward()
        return {name for name, p in model.named_parameters() if p.grad is not None and p.grad.count_nonzero()}

    own = {name for name, _ in model.named_parameters() if name.startswith(MTP)}
    assert reached(detach=True) == own
    assert reached(detach=False) == {name for name, _ in model.named_parameters()}


def test_a_step_without_mtp_leaves_the_module_alone(make_model: Make, deepseek: Config) -> None:
    model = make_model(deepseek())
    model(tokens(1, 4)).logits_BTV.sum().backward()
    assert all((parameter.grad is None) == name.startswith(MTP) for name, parameter in model.named_parameters())
