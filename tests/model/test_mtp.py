"""The multi-token prediction module: DeepSeek-V3's as released, against its equations in float64; it trains, is stored,
and trains on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from slingshot.checkpoint.load_save import load_model, save_checkpoint
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import ModelOutput, Transformer
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


def mtp_of(output: ModelOutput) -> Tensor:
    assert output.mtp_hidden_BTD is not None
    return output.mtp_hidden_BTD


def saved(model: Transformer, tokenizer: Tokenizer, folder: Path) -> Tensors:
    folder.mkdir()
    save_checkpoint(folder, model, tokenizer)
    return load_file(folder / "model.safetensors")


# DeepSeek-V3 by its equations (arXiv 2412.19437, 2.1 and 2.2), in float64, from the tensors of a checkpoint; sequences
# x_TD, without YaRN.


def norm(x: Tensor, gain: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def rotate(x_TR: Tensor) -> Tensor:
    """Neighbours as the two parts of complex numbers, turned by their position."""
    time, width = x_TR.shape
    angles = torch.arange(time, dtype=torch.float64)[:, None] / 10000 ** (
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    return torch.view_as_real(
        torch.view_as_complex(x_TR.reshape(time, -1, 2)) * torch.polar(torch.ones_like(angles), angles)
    ).flatten(1)


def attention(t: Tensors, x_TD: Tensor, config: ModelConfig) -> Tensor:
    """Equations 1 to 11, head by head."""
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    queries = norm(x_TD @ t["q_a_proj.weight"].T, t["q_a_layernorm.weight"]) @ t["q_b_proj.weight"].T
    latent, shared_key = (x_TD @ t["kv_a_proj_with_mqa.weight"].T).split([config.kv_lora_rank, rope], dim=1)
    expanded = norm(latent, t["kv_a_layernorm.weight"]) @ t["kv_b_proj.weight"].T
    heads = []
    for q, kv in zip(queries.split(nope + rope, dim=1), expanded.split(nope + value, dim=1), strict=True):
        scores = q[:, :nope] @ kv[:, :nope].T + rotate(q[:, nope:]) @ rotate(shared_key).T
        future = torch.ones_like(scores).triu(1).bool()
        heads.append((scores / math.sqrt(nope + rope)).masked_fill(future, -torch.inf).softmax(1) @ kv[:, nope:])
    return torch.cat(heads, dim=1) @ t["o_proj.weight"].T


def mlp(t: Tensors, x: Tensor, prefix: str = "") -> Tensor:
    return (F.silu(x @ t[f"{prefix}gate_proj.weight"].T) * (x @ t[f"{prefix}up_proj.weight"].T)) @ t[
        f"{prefix}down_proj.weight"
    ].T


def experts(t: Tensors, x_TD: Tensor, config: ModelConfig) -> Tensor:
    """Equations 12 to 16 and the group limit, token by token."""
    rows = []
    for x_D in x_TD:
        scores = (t["gate.weight"] @ x_D).sigmoid()
        groups = (scores + t["gate.e_score_correction_bias"]).split(config.n_routed_experts // config.n_group)
        best = sorted(range(config.n_group), key=lambda group: -groups[group].topk(2).values.sum())[: config.topk_group]
        choice = torch.cat(
            [group if index in best else torch.full_like(group, -torch.inf) for index, group in enumerate(groups)]
        )
        chosen = choice.topk(config.num_experts_per_tok).indices.tolist()
        routed = sum(scores[e] / scores[chosen].sum() * mlp(t, x_D, f"experts.{e}.") for e in chosen)
        rows.append(mlp(t, x_D, "shared_experts.") + config.routed_scaling_factor * routed)
    return torch.stack(rows)


def block(t: Tensors, x_TD: Tensor, config: ModelConfig) -> Tensor:
    part = {
        key: {name.removeprefix(key): tensor for name, tensor in t.items() if name.startswith(key)}
        for key in ("self_attn.", "mlp.")
    }
    x_TD = x_TD + attention(part["self_attn."], norm(x_TD, t["input_layernorm.weight"]), config)
    forward = experts if "gate.weight" in part["mlp."] else mlp
    y_TD = norm(x_TD, t["post_attention_layernorm.weight"])
    return x_TD + (forward(part["mlp."], y_TD, config) if forward is experts else mlp(part["mlp."], y_TD))


def reference(tensors: Tensors, tokens_T: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Logits of the main model [T, V], and of the MTP module [T-1, V] with its own copies of embedding and head."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    layers = [
        {
            name.removeprefix(f"model.layers.{n}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"model.layers.{n}.")
        }
        for n in range(config.num_hidden_layers + 1)
    ]
    *main, mtp = layers
    x_TD = tensors["model.embed_tokens.weight"][tokens_T]
    for layer in main:
        x_TD = block(layer, x_TD, config)
    hidden_TD = norm(x_TD, tensors["model.norm.weight"])
    embedded = mtp["embed_tokens.weight"][tokens_T[1:]]
    joined = torch.cat((norm(embedded, mtp["enorm.weight"]), norm(hidden_TD[:-1], mtp["hnorm.weight"])), dim=1)
    predicted = norm(block(mtp, joined @ mtp["eh_proj.weight"].T, config), mtp["shared_head.norm.weight"])
    head = tensors["model.embed_tokens.weight"] if config.tie_word_embeddings else tensors["lm_head.weight"]
    return hidden_TD @ head.T, predicted @ mtp["shared_head.head.weight"].T


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_both_predictions_follow_the_equations(
    make_model: Make, deepseek: Config, tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    config = deepseek(vocab_size=VOCABULARY, tie_word_embeddings=tied)
    model = make_model(config)
    tensors = saved(model, tokenizer, tmp_path / "model")
    row = torch.randint(0, VOCABULARY, (1, 25), generator=torch.Generator().manual_seed(2))

    def deviations() -> list[float]:
        output = model(row, mtp=True)
        found = output.logits_BTV[0], model.lm_logits(mtp_of(output))[0, :-1]
        return [
            float((a - b).abs().max() / b.std()) for a, b in zip(found, reference(tensors, row[0], config), strict=True)
        ]

    assert max(deviations()) < 2e-5
    # the comparison tells the order of the concatenation, and one norm from the other
    mtp = model.model.layers[3]
    mtp.eh_proj.weight.copy_(mtp.eh_proj.weight.roll(config.hidden_size, dims=1))
    main, far = deviations()
    assert main < 2e-5 and far > 0.1
    mtp.eh_proj.weight.copy_(mtp.eh_proj.weight.roll(config.hidden_size, dims=1))
    mtp.enorm, mtp.hnorm = mtp.hnorm, mtp.enorm
    assert deviations()[1] > 0.1


@pytest.mark.parametrize("tied", [False, True])
def test_the_checkpoint_holds_the_module_as_one_more_layer(
    make_model: Make, deepseek: Config, tokenizer: Tokenizer, tmp_path: Path, tied: bool
) -> None:
    """Layer num_hidden_layers: everything a layer has, three norms, the projection, copies of embedding and head."""
    model = make_model(deepseek(vocab_size=VOCABULARY, tie_word_embeddings=tied))
    tensors = saved(model, tokenizer, tmp_path / "model")
    module = {name.removeprefix(MTP) for name in tensors if name.startswith(MTP)}
    layer = {name.removeprefix("model.layers.2.") for name in tensors if name.startswith("model.layers.2.")}
    extra = {
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "shared_head.norm.weight",
        "embed_tokens.weight",
        "shared_head.head.weight",
    }
    assert module == layer | extra and not any(name.startswith("model.layers.4.") for name in tensors)
    assert tensors[f"{MTP}eh_proj.weight"].shape == (32, 64)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert torch.equal(tensors[f"{MTP}embed_tokens.weight"], tensors["model.embed_tokens.weight"])
    assert torch.equal(tensors[f"{MTP}shared_head.head.weight"], tensors[head])
    assert ("lm_head.weight" in tensors) != tied


OPTIMIZER = OptimizerConfig(lr=0.01, adam_lr=0.01)
ALONE = Parallel()


def train(model: Transformer, optimizer: Optimizer, steps: range) -> list[float | None]:
    """One row batch a step, of its own seed; router biases move as in pre-training."""
    losses = []
    for step in steps:
        rows = tokens(4, 24, seed=100 + step)
        step_losses = language_model_step(
            model, Rows(rows, torch.ones_like(rows), torch.ones(4, 24)), LanguageModelLoss(), 4, ALONE
        )
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
    assert converted.keys() == tensors.keys() and all(
        torch.equal(converted[name], tensor) for name, tensor in tensors.items()
    )

    loaded = load_model(tmp_path / "converted")
    assert loaded.config.num_nextn_predict_layers == 1
    state = loaded.state_dict()
    assert state.keys() == after.keys() and all(torch.equal(state[name], tensor) for name, tensor in after.items())
    resumed = Optimizer(loaded, OPTIMIZER)
    resumed.load({name: tensor.clone() for name, tensor in optimizer.state().items()})
    assert train(loaded, resumed, range(3, 6)) == train(model, optimizer, range(3, 6))
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert not torch.equal(loaded.state_dict()[f"{MTP}eh_proj.weight"], tensors[f"{MTP}eh_proj.weight"])


@pytest.mark.parametrize("tied", [False, True])
def test_detached_mtp_trains_itself_only(make_model: Make, deepseek: Config, tied: bool) -> None:
    """With detach_mtp and a detached head no gradient reaches embedding, head or any layer of the main model; without,
    it does.
    """
    model = make_model(deepseek(tie_word_embeddings=tied))
    rows = tokens(2, 8)

    def reached(detach: bool) -> set[str]:
        model.zero_grad()
        hidden = mtp_of(model(rows, mtp=True, detach_mtp=detach, logits=False))
        model.lm_logits(hidden, detach_head=detach).logsumexp(-1).sum().backward()
        return {
            name
            for name, parameter in model.named_parameters()
            if parameter.grad is not None and parameter.grad.count_nonzero()
        }

    own = {name for name, _ in model.named_parameters() if name.startswith(MTP)}
    assert reached(detach=True) == own
    everything = {name for name, _ in model.named_parameters()}
    assert reached(detach=False) == everything


def test_a_step_without_mtp_leaves_the_module_alone(make_model: Make, deepseek: Config) -> None:
    model = make_model(deepseek())
    model(tokens(1, 4)).logits_BTV.sum().backward()
    assert all((parameter.grad is None) == name.startswith(MTP) for name, parameter in model.named_parameters())
