"""Quantisation: what is written is read by every door, what was lost is said, and calibration loses less."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from rich.console import Console
from safetensors.torch import load_file, save_file

from slingshot.base.errors import SlingshotError
from slingshot.base.progress import Progress
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.inspection import examine
from slingshot.checkpoint.load_save import load_as_stored, load_grid, load_model, load_tokenizer, open_weights
from slingshot.checkpoint.safetensors import write_shards
from slingshot.cli.inspect import show
from slingshot.cost.receipt import Receipt
from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.kernels.native import native_levels
from slingshot.model.config import ModelConfig
from slingshot.quantization.formats import Scheme
from slingshot.quantization.fp8 import dequantize as dequantize_fp8
from slingshot.quantization.fp8 import quantize as quantize_fp8
from slingshot.quantization.integers import from_numbers
from slingshot.stages.convert import write_gguf_file
from slingshot.stages.quantize import CALIBRATION, CHUNK, FULL, SMALL, QuantizeConfig, held_out, run, scheme_of
from slingshot.tasks.mixture import TaskMix
from slingshot.training.calibration import stream
from slingshot.training.fidelity import fidelity, reading, reading_by_layer
from slingshot.training.fitting import Fit, lone, tensors
from slingshot.training.optimizer import Optimizer
from slingshot.training.quantization_aware import capped_step, held_numbers, hold_rescaled, matching_step


@pytest.fixture(scope="session")
def quantizing(full, sums):
    """quantizing(**changes): 24 responses to calibrate, 8 problems to compare."""
    common = {"model": str(full), "tasks": [sums], "threads": 1, "calibrate": 24, "problems": 8}
    common |= {"sampling": {"max_tokens": 12}, "sequence_length": 48}
    return lambda **changes: QuantizeConfig.parse(common | changes, "quantize")


@pytest.fixture(scope="session")
def small(quantizing, tmp_path_factory):
    folder = tmp_path_factory.mktemp("small") / "int4"
    run(quantizing(), folder)
    return folder


def test_a_quantised_checkpoint_is_read_as_its_numbers_times_their_scales(small, full):
    weights, model, before = open_weights(small), load_model(small), load_model(full)
    name = "model.layers.1.mlp.experts.3.up_proj.weight"
    numbers, scales = weights.packed(name)
    assert numbers.abs().max() <= 8 and scales.min() < 0 < scales.max()
    assert scales.shape == (numbers.shape[0], numbers.shape[1] // 32)
    weight = model.model.layers[1].mlp.experts.gate_up_proj.weight[3, 1]
    assert torch.equal(weight, from_numbers(numbers, scales))
    assert torch.equal(weights.read(name, slice(3, 9)), weight[3:9])
    assert torch.equal(model.lm_head.weight, before.lm_head.weight.bfloat16().float())
    gates = [each.model.layers[1].mlp.gate.weight for each in (model, before)]
    assert torch.equal(gates[0], gates[1].bfloat16().float())
    assert not torch.equal(weight, before.model.layers[1].mlp.experts.gate_up_proj.weight[3, 1])


def test_what_was_lost_stands_beside_the_weights_and_in_the_receipt(small):
    told = json.loads((small / "quantization.json").read_text())
    assert 0 < told["kl"] < told["kl_p99"] and 0 < told["same_top"] <= 1 and told["perplexity_ratio"] > 0.5
    low, high = told["tasks"]["arithmetic"]["ci95"]
    assert told["tasks"]["arithmetic"]["n"] == 8 and low <= told["tasks"]["arithmetic"]["difference"] <= high
    receipt = Receipt.read(small)
    assert receipt.extra["quantization"] == told and receipt.flops > 0 and receipt.stage == "quantize"


def test_eight_bits_lose_less_than_four(quantizing, small, tmp_path):
    run(quantizing(to="int8", calibrate=0), tmp_path / "int8")
    told = [json.loads((folder / "quantization.json").read_text()) for folder in (tmp_path / "int8", small)]
    assert told[0]["kl"] < 0.1 * told[1]["kl"] and told[0]["bytes"] > told[1]["bytes"]
    assert told[0]["calibrated"] == 0 < told[1]["calibrated"]


def test_fp8_is_deepseeks_own_form(quantizing, full, tmp_path):
    run(quantizing(to="fp8"), tmp_path / "fp8")
    told, facts = json.loads((tmp_path / "fp8" / "quantization.json").read_text()), examine(str(tmp_path / "fp8"))
    assert facts["problems"] == facts["notes"] == [] and facts["checkpoint"]["bytes"] == facts["files"]["bytes"]
    assert told["group_size"] == told["calibrated"] == 0 < told["kl"]
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    ours, theirs = open_weights(tmp_path / "fp8").read(name), open_weights(full).read(name)
    assert torch.equal(ours, dequantize_fp8(*quantize_fp8(theirs)))


@pytest.mark.skipif(not native_levels(), reason="no native library is built here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_multiply_the_files_own_numbers(small, dtype):
    """So many rows at once are not brought to 8 bits, but for an expert that few reach: nothing else can differ."""
    engine, plain = Engine.load(small, dtype=dtype), Engine.load(small, dtype="float32", native="off")
    assert engine.runs_on.endswith(", int4)") and plain.runs_on == "torch"
    prompts = [[5 + (start + 1) * step % 40 for step in range(40)] for start in range(16)]
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    said, wanted = (
        torch.tensor([output.prompt_logprobs[1:] for output in each.generate(prompts, params)])
        for each in (engine, plain)
    )
    differences = (said - wanted).abs().flatten()
    assert differences.quantile(0.98) < (1e-4 if dtype == "float32" else 0.1) and differences.max() < 1.0


def test_a_matrix_that_was_left_alone_leaves_the_others_on_their_grid(small, tmp_path):
    folder, name = tmp_path / "some", "model.layers.1.self_attn.o_proj.weight"
    shutil.copytree(small, folder)
    tensors = load_file(folder / "model.safetensors") | {name: open_weights(small).read(name).bfloat16()}
    others = {key: each for key, each in tensors.items() if not key.startswith(f"{name}_")}
    save_file(others, folder / "model.safetensors", {"format": "pt"})
    grid, some = load_grid(small), load_grid(folder)
    assert {*grid.scales} - {*some.scales} == {*grid.bits} - {*some.bits} == {name}
    engine, whole = (Engine.load(each, dtype="float32") for each in (folder, small))
    assert engine.runs_on == whole.runs_on
    params = SamplingParams(max_tokens=1, prompt_logprobs=0)
    said, wanted = (each.generate([list(range(5, 45))], params)[0].prompt_logprobs[1:] for each in (engine, whole))
    assert said == pytest.approx(wanted, abs=0.05)


@pytest.mark.skipif(not native_levels(), reason="no native library is built here")
def test_new_weights_are_not_put_on_the_old_ones_scales(small, full):
    engine, model = Engine.load(small, dtype="float32"), load_model(full)
    with torch.no_grad():
        for parameter in model.model.layers.parameters():
            parameter.mul_(3.0)
    engine.update_weights(model)
    plain, params = Engine(model, engine.tokenizer, native="off"), SamplingParams(max_tokens=1, prompt_logprobs=0)
    said, wanted = (
        torch.tensor(each.generate([list(range(5, 45))], params)[0].prompt_logprobs[1:]) for each in (engine, plain)
    )
    assert (said - wanted).abs().mean() < 0.5 * wanted.abs().mean()


def test_inspection_finds_no_fault_and_counts_the_bytes(small):
    facts = examine(str(small))
    assert facts["problems"] == [] and facts["model"]["quantization"] == "int4"
    told, found = facts["checkpoint"], facts["files"]
    assert (told["tensors"], told["bytes"]) == (found["tensors"], found["bytes"])


def test_what_cannot_be_quantised_is_refused_before_anything_is_written(quantizing, small, tmp_path):
    for changes, said in (
        ({"model": str(small)}, "holds int4 already"),
        ({"group_size": 128}, "do not divide into groups of 128"),
        ({"bits": 5.0, "to": "int8"}, "bits=5 needs to=int4, not int8"),
        ({"bits": 5.0, "calibrate": 0}, "bits=5 needs text of the model: calibrate=128"),
        ({"scale_fmt": "ue8m0"}, "scale_fmt=ue8m0 is of to=fp8, not int4"),
        ({"distill": 5, "to": "fp8"}, "distill=5 is of int4, int8, not fp8"),
    ):
        with pytest.raises(SlingshotError, match=said):
            run(quantizing(**changes), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_answers_are_drawn_until_they_hold_the_tokens_that_were_asked_for(quantizing, tmp_path, capsys):
    run(quantizing(calibrate=100, calibrate_tokens=100, problems=2), tmp_path / "out")
    told = json.loads((tmp_path / "out" / "quantization.json").read_text())
    assert told["calibration_answers"] == CHUNK and 100 <= told["calibration_tokens"] < 200
    parts = {CALIBRATION, FULL, SMALL, "loading", "reading", "fitting", "writing", "comparison"}
    assert told["seconds"].keys() == parts and min(told["seconds"].values()) > 0
    assert f"fitted to {CHUNK} answers, compared on 2 answers: about " in capsys.readouterr().err


def test_too_little_text_to_fit_to_is_refused_and_leaves_nothing(quantizing, tmp_path):
    with pytest.raises(SlingshotError, match=r"1 response to calibrate on hold .* calibrate=128, or calibrate=0"):
        run(quantizing(calibrate=1), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_broken_tensor_is_named_and_leaves_nothing(quantizing, full, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(full, folder)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(SlingshotError, match=f"{name} holds NaN or infinite values"):
        run(quantizing(model=str(folder), calibrate=0), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_larger_models_are_compared_on_fewer_problems_unless_told(quantizing):
    tasks, config = TaskMix(quantizing().tasks, "train", "0").tasks, quantizing(problems=None, sampling={})
    models = [ModelConfig.preset(name) for name in ("smollm2-135m", "qwen2.5-1.5b", "llama-3.1-8b")]
    counts = [len(held_out(tasks, model, config)) for model in models]
    assert 100 > counts[0] > counts[1] >= counts[2] == 2 and len(held_out(tasks, models[2], quantizing())) == 8


def test_an_outlier_that_leaves_its_group_nothing_is_counted_and_said(quantizing, full, tmp_path, capsys):
    folder, name = tmp_path / "full", "model.layers.1.self_attn.o_proj.weight"
    shutil.copytree(full, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 5] = 1e4
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for calibrate in (0, 24):
        run(quantizing(model=str(folder), calibrate=calibrate, problems=1), tmp_path / f"out-{calibrate}")
        said = capsys.readouterr().err
        assert json.loads((tmp_path / f"out-{calibrate}" / "quantization.json").read_text())["outlier_groups"] == 1
        assert f"note: in 1 group ({name} has most) one weight is so large that all others" in said
    assert lone(torch.eye(4).repeat(1, 8), torch.eye(4).repeat(1, 8), 8) == 0  # nothing else was there


@pytest.mark.slow
def test_the_benchmark_measures_a_mixture_of_experts_as_it_is_written(full, tmp_path):
    rows = torch.randint(5, 250, (30, 2, 48), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "texts.json").write_text(json.dumps({"calibration": rows, "questions": rows[::-1]}))
    forms = {"bfloat16": 16, "int8-dynamic:gptq": 8, "int4:gptq:bits4.5": 5, "fp8": 8, "q4_0": 4.5}
    program = Path(__file__).parents[2] / "benchmarks" / "quantize.py"
    command = [sys.executable, program, full, "--texts", tmp_path / "texts.json", "--forms", *forms]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)
    heads, told = done.stdout.splitlines()[::2], done.stdout.splitlines()[1::2]
    for head, (form, bits) in zip(heads, forms.items(), strict=True):
        assert head.startswith(f"{form}: ") and abs(float(head.split(": ")[1].split()[0]) - bits) < 1.1
    losses = [float(line.split("KL ")[1].split()[0]) for line in told]
    assert all(losses[0] < loss < 1 for loss in losses[1:])


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_a_gguf_file_holds_the_same_numbers(small, quantizing, tmp_path, kind):
    """llama.cpp's blocks as the gguf package reads them are number times scale, bit for bit."""
    folder = small
    if kind == "int8":
        folder = tmp_path / "int8"
        run(quantizing(to="int8", calibrate=0, problems=1), folder)
    write_gguf_file(str(folder), tmp_path / "m.gguf", None)
    weights, found = open_weights(folder), {each.name: each for each in GGUFReader(tmp_path / "m.gguf").tensors}
    assert {each.tensor_type.name for each in found.values()} == {"F32", "BF16", "Q4_0" if kind == "int4" else "Q8_0"}
    for name, tensor in (("self_attn.o_proj", "attn_output"), ("mlp.shared_experts.up_proj", "ffn_up_shexp")):
        stored = found[f"blk.1.{tensor}.weight"]
        values = torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy())
        assert torch.equal(values, weights.read(f"model.layers.1.{name}.weight"))
    stored = found["blk.1.ffn_down_exps.weight"]
    experts = torch.stack(
        [weights.read(f"model.layers.1.mlp.experts.{expert}.down_proj.weight") for expert in range(8)]
    )
    assert torch.equal(torch.from_numpy(dequantize(stored.data, stored.tensor_type).copy()), experts)
    assert torch.equal(load_model(tmp_path / "m.gguf").lm_head.weight, load_model(folder).lm_head.weight)


def test_scales_of_fp8_blocks_are_powers_of_two_where_asked_for(quantizing, full, tmp_path):
    run(quantizing(to="fp8", scale_fmt="ue8m0", problems=1), tmp_path / "fp8")
    facts, weights = examine(str(tmp_path / "fp8")), open_weights(tmp_path / "fp8")
    assert facts["problems"] == [] and weights.config.quantization_scale_fmt == "ue8m0"
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert weights.shards.headers[name + "_scale_inv"].dtype == "F8_E8M0"
    assert torch.equal(weights.read(name), dequantize_fp8(*quantize_fp8(open_weights(full).read(name), "ue8m0")))


def told_both_ways(full, made):
    """What is lost by models read a layer at a time, and as they lie in memory whole."""
    texts = torch.randint(5, 250, (9, 41), generator=torch.Generator().manual_seed(0)).tolist()
    batches = stream(texts, 48, 3)
    return (
        fidelity(*readings, batches)
        for readings in (
            [reading_by_layer(each, batches) for each in (full, made)],
            [reading(model, batches) for model in (load_model(full), load_as_stored(made)[0])],
        )
    )


def test_models_read_a_layer_at_a_time_say_what_they_say_in_memory(full, small):
    by_layer, at_once = told_both_ways(full, small)
    assert by_layer == pytest.approx(at_once, rel=1e-3) and by_layer["kl"] > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8-dynamic", "mxfp4"])
def test_other_forms_are_written_read_and_measured(quantizing, full, tmp_path, kind):
    run(quantizing(to=kind), tmp_path / "out")
    told, facts = json.loads((tmp_path / "out" / "quantization.json").read_text()), examine(str(tmp_path / "out"))
    found, expected = facts["files"], facts["checkpoint"]
    assert facts["problems"] == [] and (found["tensors"], found["bytes"]) == (expected["tensors"], expected["bytes"])
    assert facts["model"]["quantization"] == kind and told["kl"] > 0 and told["calibrated"] > 0
    engine, params = Engine.load(tmp_path / "out", dtype="float32"), SamplingParams(max_tokens=1, prompt_logprobs=0)
    assert engine.runs_on.endswith(f", {kind})") or not native_levels()
    torchs = Engine.load(tmp_path / "out", dtype="float32", native="off")
    plain = Engine(load_model(tmp_path / "out"), engine.tokenizer, native="off")
    said, theirs, wanted = (
        torch.tensor(each.generate([list(range(5, 45))], params)[0].prompt_logprobs[1:])
        for each in (engine, torchs, plain)
    )
    off = (said - wanted).abs()
    assert (1e-4 < off.max() < 0.5) if kind == "int8-dynamic" else off.median() < 1e-4
    assert (said - theirs).abs().median() < 1e-4
    by_layer, at_once = told_both_ways(full, tmp_path / "out")
    assert by_layer == pytest.approx(at_once, rel=1e-3)


def test_a_budget_of_bits_goes_where_four_lose_most(quantizing, small, tmp_path, capsys):
    run(quantizing(bits=5.0), tmp_path / "out")
    told, config = (
        json.loads((tmp_path / "out" / "quantization.json").read_text()),
        open_weights(tmp_path / "out").config,
    )
    assert 4.5 < told["bits"] <= 5 and told["kl"] < json.loads((small / "quantization.json").read_text())["kl"]
    assert list(config.quantization_wide) == told["wide"] != []
    facts = examine(str(tmp_path / "out"))
    assert facts["problems"] == [] and facts["checkpoint"]["bytes"] == facts["files"]["bytes"]
    numbers = facts["model"]["quantization_numbers"]
    mean = (4 * numbers["int4"] + 8 * numbers["int8"]) / sum(numbers.values())
    show(facts, Console(file=(shown := io.StringIO())))
    share = numbers["int8"] / sum(numbers.values())
    assert mean == pytest.approx(told["bits"]) and f"int8 ({100 * share:.1f}% of the numbers)" in shown.getvalue()
    assert f"{told['bits']:.2f} on the average" in capsys.readouterr().err
    wide = [unit for unit in told["sensitivities"] if any(each.startswith(unit) for each in told["wide"])]
    assert all(any(part in unit for unit in told["sensitivities"]) for part in ("kv_a_proj_with_mqa", "experts."))
    assert {*wide} < {*told["sensitivities"]}
    engine, plain = (Engine.load(tmp_path / "out", dtype="float32", native=native) for native in ("auto", "off"))
    assert engine.runs_on.endswith(", int4 and int8)") or not native_levels()
    prompts, params = (
        [[5 + (n + 1) * i % 40 for i in range(40)] for n in range(16)],
        SamplingParams(1, prompt_logprobs=0),
    )
    said, wanted = (
        torch.tensor([output.prompt_logprobs[1:] for output in each.generate(prompts, params)])
        for each in (engine, plain)
    )
    assert (said - wanted).abs().flatten().quantile(0.98) < 1e-4
    write_gguf_file(str(tmp_path / "out"), tmp_path / "m.gguf", None)
    assert {"Q4_0", "Q8_0"} < {each.tensor_type.name for each in GGUFReader(tmp_path / "m.gguf").tensors}


def test_distillation_goes_on_from_what_was_fitted_and_is_told(quantizing, small, metrics, tmp_path):
    run(quantizing(distill=3, prompts_per_step=4, dtype="float32", problems=2), tmp_path / "out")
    told, before = (json.loads((each / "quantization.json").read_text()) for each in (tmp_path / "out", small))
    assert (told["distilled"], told["bytes"]) == (3, before["bytes"]) and told["calibrated"] == before["calibrated"]
    first, best = told["held_out_kl"]
    assert 0 < best <= first and told["best_step"] in range(4) and (best < first) == (told["best_step"] > 0)
    rows, receipt = metrics(tmp_path / "out"), Receipt.read(tmp_path / "out")
    assert [row["step"] for row in rows] == [1, 2, 3] and all(0 < row["kl"] < 1 for row in rows)
    assert {"calibration", "teacher", "training", "sampling"} <= receipt.flops_by_part.keys()
    assert examine(str(tmp_path / "out"))["problems"] == []


@pytest.mark.slow
def test_distillation_wins_back_what_rounding_lost_on_texts_it_did_not_see(full):
    student, before = load_model(full), load_model(full)
    hold_rescaled(student, before, {}, Scheme("int4", 32), 0)
    optimizer = Optimizer(student, QuantizeConfig(model="", optimizer={"lr": 0.03}).optimizer)
    texts = torch.randint(5, 250, (42, 8, 48), generator=torch.Generator().manual_seed(0)).tolist()
    unseen = stream([*texts[40], *texts[41]], 48, 8)
    lost = fidelity(reading(before, unseen), reading(student, unseen), unseen)["kl"]
    for step in range(40):
        capped_step(optimizer, 1 - step / 40, matching_step(student, before, stream(texts[step], 48, 8)))
    assert fidelity(reading(before, unseen), reading(student, unseen), unseen)["kl"] < 0.7 * lost


@pytest.mark.parametrize("kind", ["int4", "int8"])
def test_what_is_stored_is_what_was_trained(full, quantizing, tmp_path, kind):
    """Bit for bit: the logits of the student that was trained are those of the folder that is written."""
    config = quantizing(to=kind)
    weights, scheme, before = open_weights(full), scheme_of(config), load_model(full)
    student = load_model(full)
    hold_rescaled(student, before, {}, scheme, 0)
    generator = torch.Generator().manual_seed(0)
    batches = stream(torch.randint(5, 250, (8, 40), generator=generator).tolist(), 48, 4)
    first, optimizer = held_numbers(student), Optimizer(student, config.optimizer)
    for _ in range(3):
        matching_step(student, before, batches)
        optimizer.step(10.0)
    packed = held_numbers(student)
    moved = [name for name in packed if not torch.equal(packed[name][1], first[name][1])]
    assert len(moved) > 10 and all(torch.equal(packed[name][0], first[name][0]) for name in packed)
    with Progress("stored", 1) as progress:
        write_shards(tmp_path, tensors(weights, Fit(packed), scheme, None, progress))
    write_description(tmp_path, weights.config.stored_as(scheme), load_tokenizer(full), "bfloat16", None)
    with torch.no_grad():
        trained, stored = (model(batches[0][0]).logits_BTV for model in (student, load_model(tmp_path)))
    assert torch.equal(trained, stored)
