"""Adapters beside a base that stays in the numbers it was stored in: int4, int8 and FP8."""

import json

import pytest
import torch

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.frozen import load_frozen
from slingshot.checkpoint.load_save import load_model, load_tokenizer, open_weights, save_checkpoint
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.model.stored import StoredMatrix
from slingshot.planning.layout import Layout
from slingshot.planning.memory import PRECISIONS, Blocks, training_memory
from slingshot.planning.plan_training import plan_rl
from slingshot.planning.request import NamedModel, RLRequest
from slingshot.stages import convert, distill, rl, sft
from slingshot.training.lora import LoRAConfig, adapters, add_lora
from slingshot.training.parallel import Parallel

ALL = ["attention", "mlp", "experts"]


def beside(model, targets):
    """The model with adapters whose B are not zero, the same at every call."""
    add_lora(model, LoRAConfig(rank=4, targets=targets), 0, Parallel())
    generator = torch.Generator().manual_seed(1)
    for name, each in adapters(model).items():
        if name.endswith("lora_B"):
            each.normal_(0, 0.05, generator=generator)
    return model


@pytest.mark.parametrize("targets", [ALL, pytest.param(["q_proj", "down_proj"], marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["int4", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("int8", "fp8"))])
def test_gradients_are_those_beside_a_float_base_of_the_same_numbers(stored, kind, targets):
    found = []
    tokens = torch.arange(96).view(2, 48) % 250
    for model in (load_frozen(stored(kind)), load_model(stored(kind))):
        model.compute_dtype = torch.float32
        output = beside(model, targets)(tokens, mtp=True)
        (output.logits_BTV.square().mean() + output.mtp_hidden_BTD.square().mean()).backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    assert found[0].keys() == found[1].keys() == adapters(model).keys()
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_matrix_stands_for_the_files_numbers(stored, kind, dtype):
    model, weights = load_frozen(stored(kind)), open_weights(stored(kind))
    body = model.model.layers[1]
    matrix = weights.read("model.layers.1.self_attn.o_proj.weight").to(dtype)
    assert isinstance(body.self_attn.o_proj.weight, StoredMatrix)
    assert torch.equal(body.self_attn.o_proj.matrix(dtype), matrix)
    up = weights.read("model.layers.1.mlp.experts.3.up_proj.weight").to(dtype)
    assert torch.equal(body.mlp.experts.gate_up_proj.matrix(dtype)[3, 1], up)
    assert torch.equal(body.mlp.experts.gate_up_proj.weight.matrix(dtype, 3)[1], up)


@pytest.mark.parametrize("kind", ["int4", "int8", "fp8"])
def test_the_base_takes_the_memory_of_its_files(stored, kind):
    """But for the shapes that stand beside packed matrices and the MTP module's copies of embedding and head."""
    model, headers = load_frozen(stored(kind)), open_weights(stored(kind)).shards.headers
    extra = 16 * sum(name.endswith("_shape") for name in headers)
    extra += 2 * 2 * model.model.embed_tokens.weight.numel()
    held = {each.data_ptr(): each.nbytes for each in model.state_dict().values()}
    (file,) = stored(kind).glob("*.safetensors")
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    routers = sum(each.nbytes // 2 for name, each in model.state_dict().items() if name.endswith("mlp.gate.weight"))
    assert sum(held.values()) == file.stat().st_size - header - extra + routers
    asked = {"model": NamedModel(name="it", config=open_weights(stored(kind)).config), "device": "h100", "count": 1}
    asked |= {"steps": 1, "response": 100, "longest": 1000, "lora": 4}
    planned = training_memory(Blocks(asked["model"].config, PRECISIONS["bfloat16"], 0.0), Layout(), 16, 1).weights
    assert planned == pytest.approx(sum(held.values()), rel=0.05 if kind == "fp8" else 0.02)
    assert plan_rl(RLRequest.parse(asked)).precision == ("fp8" if kind == "fp8" else "bfloat16")


@pytest.mark.slow
def test_fine_tuning_learns_and_leaves_an_adapter_that_names_its_base(stored, tuning, metrics, tmp_path):
    base, out = stored("int4"), tmp_path / "out"
    sft.run(tuning(base, epochs=6, lora={"rank": 4}), out)
    losses = [row["loss"] for row in metrics(out)]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    written = json.loads((out / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(base) and written["r"] == 4
    assert not (out / "config.json").exists() and (out / "receipt.json").exists()

    engine, plain = Engine.load(out, dtype="float32"), load_model(out)  # the base's numbers and the change
    tokens, params = [5 + 3 * step % 40 for step in range(40)], SamplingParams(max_tokens=1, prompt_logprobs=0)
    said = torch.tensor(engine.generate([tokens], params)[0].prompt_logprobs[1:])
    logprobs = plain(torch.tensor([tokens])).logits_BTV[0].log_softmax(-1)
    assert (said - logprobs[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]).abs().max() < 1e-3
    before = load_model(base)(torch.tensor([tokens])).logits_BTV[0].log_softmax(-1)
    assert (before - logprobs).abs().max() > 0.1

    served = Engine.load(base, dtype="float32", adapters={"sums": out})
    beside = torch.tensor(served.generate([tokens], params, adapters="sums")[0].prompt_logprobs[1:])
    torch.testing.assert_close(beside, said, atol=1e-3, rtol=1e-3)


def test_what_is_stored_in_fewer_bits_is_not_merged_nor_gone_on_from(stored, tuning, tmp_path):
    out = tmp_path / "out"
    sft.run(tuning(stored("int8"), epochs=1), out)
    for door in (
        lambda: convert.run(convert.ConvertConfig(source=str(out)), tmp_path / "merged"),
        lambda: convert.write_gguf_file(str(out), tmp_path / "merged.gguf", None),
    ):
        with pytest.raises(
            SlingshotError, match=r"changes int8 numbers .* --dtype bfloat16, and write DENSE there"
        ) as e:
            door()
        assert "\n" not in str(e.value)
    with pytest.raises(SlingshotError, match="is itself an adapter, over int8 numbers; train from"):
        sft.run(tuning(out), tmp_path / "more")


@pytest.mark.parametrize("kind", ["int4", "fp8"])
def test_reinforcement_samples_from_what_it_trains_and_is_compared_with_the_base(
    stored, training, metrics, tmp_path, kind
):
    lora = {"rank": 4, "targets": ALL}
    rl.run(training(model=str(stored(kind)), lora=lora, steps=3, optimizer={"lr": 0.01}), tmp_path / "out")
    rows = metrics(tmp_path / "out")
    assert abs(rows[0]["kl"]) < 1e-6 < rows[2]["kl"]
    assert all(row["logprob_gap"] < 1e-4 for row in rows)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_adapters_beside_few_bits_move_towards_a_teacher(stored, full, sums, metrics, tmp_path):
    """One that is surer of everything that the model says."""
    teacher, folder = load_model(full), tmp_path / "teacher"
    with torch.no_grad():
        teacher.lm_head.weight.mul_(2.0)
    folder.mkdir()
    save_checkpoint(folder, teacher, load_tokenizer(full))
    given = {"model": str(stored("int4")), "teachers": [{"model": str(folder)}], "tasks": [sums], "dtype": "float32"}
    sizes = {"threads": 1, "steps": 8, "prompts_per_step": 8, "sampling": {"max_tokens": 12}, "sequence_length": 48}
    lora = {"lora": {"rank": 4, "targets": ALL}, "optimizer": {"lr": 1e-3}}
    distill.run(distill.DistillConfig.parse({**given, **sizes, **lora}, "distill"), tmp_path / "out")
    losses = [row["loss"] for row in metrics(tmp_path / "out")]
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
