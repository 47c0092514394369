"""Quantisation: a checkpoint's matrices in 8 or 4 bits, and what was lost by it, in numbers.

The model writes responses to its tasks' problems. On some of them the matrices are calibrated, layer by layer (GPTQ,
arXiv 2210.17323); on others, to held-out problems, the small model is compared with the full one. Routers, norms,
embeddings, the head and MLA's kv_b_proj stay, in bfloat16. The folder is as compressed-tensors has it, which
transformers and vLLM read; what was found stands in quantization.json. fp8 is DeepSeek-V3's own form: e4m3, a scale for
each 128 x 128 block, kv_b_proj too, rounded to nearest.

    slingshot quantize runs/tiny/rl_final --to int4 --out runs/tiny-int4
    slingshot quantize runs/tiny/rl_final --bits 4.5 --out runs/tiny-4.5        # 8 bits where 4 lose most
    slingshot quantize runs/tiny/rl_final --distill 300 --out runs/tiny-int4    # numbers moved until it says the same
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.base.progress import Progress
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.layout import layout, tensor_count
from slingshot.checkpoint.load_save import StoredWeights, load_model, load_tokenizer, open_weights, read_into
from slingshot.checkpoint.safetensors import write_shards
from slingshot.cost.flops import forward_flops, training_parts
from slingshot.cost.receipt import RECEIPT, Receipt
from slingshot.engine.engine import Engine
from slingshot.machine.device import Dtype
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization.encode import encoded, grid
from slingshot.quantization.formats import BITS, MX_BLOCK, SCALE, Scheme, is_packed
from slingshot.quantization.fp8 import quantize
from slingshot.quantization.gptq import gptq, rounded
from slingshot.quantization.integers import IntegerGrid, check_groups, from_numbers
from slingshot.rollout.metrics import difference
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, sampling_cost
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item, TaskMix, distinct
from slingshot.tasks.task import Task
from slingshot.tasks.verification import VerificationPool
from slingshot.training.calibration import Batch, by_layer, stream
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.fidelity import fidelity, reading_by_layer
from slingshot.training.interrupts import Interrupts
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule
from slingshot.training.parallel import Parallel
from slingshot.training.quantization_aware import Packed, held_numbers, hold_rounded, matching_step
from slingshot.training.sensitivity import chosen, modules, sensitivities, together

# Of the mean KL divergence, in nats a token: a loss beyond is said.
BOUNDS = {"int8": 0.002, "int4": 0.05, "fp8": 0.02, "int8-dynamic": 0.01, "mxfp4": 0.1}
DISTILLED = ("int4", "int8", "mxfp4")  # what the rounded model computes with is what is stored
_FEW = 64  # rows of inputs: experts that saw fewer are rounded to nearest
_ROWS = 8  # of a batch
_CACHE = 2**29  # bytes of the keys and values of what is being answered
_PROBED = 512  # tokens on which each matrix's sensitivity is measured


class QuantizeConfig(StageConfig):
    """`tasks`: unless told those that the model was trained on, which its receipt names. `calibrate`: responses that
    the matrices are fitted to; 0 rounds to nearest, as fp8 always does. `problems`: of each task, for both models.
    `bits`: of int4, a number's on the average, scales not counted: matrices that lose most by 4 bits get 8.
    `distill`: steps after that, each on answers to `prompts_per_step` other problems; learning rates are in units of
    the scales. `scale_fmt`: of fp8, scales that are powers of two, as DeepSeek-V3.1's."""

    model: str
    to: Literal["int8", "int4", "fp8", "int8-dynamic", "mxfp4"] = "int4"
    bits: float | None = Field(None, ge=4, le=8)
    group_size: Literal[32, 64, 128] = 32
    scale_fmt: Literal["ue8m0"] | None = None
    tasks: list[TaskConfig] = []
    form: PromptForm = PromptForm()
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=256)
    calibrate: int = Field(128, ge=0)
    distill: int = Field(0, ge=0)
    prompts_per_step: int = Field(16, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", lr=0.01, warmup=0.0, decay=1.0, final=0.0, weight_decay=0.0
    )
    dtype: Dtype = "auto"
    problems: int = Field(200, ge=1)
    sequence_length: int = Field(256, ge=8)


def run(config: QuantizeConfig, out: Path) -> None:
    """Quantise `config.model` into `out`, with quantization.json beside the weights."""
    with Parallel.start() as parallel, Checkpointer(out, "quantize", config, parallel) as work:
        if parallel.mesh is not None:
            raise SlingshotError("quantize: runs in one process; start it without torchrun")
        source, made = work.reads[config.model], work.folder / "checkpoint"
        weights, tokenizer = open_weights(source), load_tokenizer(source)
        check(weights.config, config)
        tasks = config.tasks or trained_on(source, config.model)
        mix = TaskMix(tasks, "train", f"quantize/{config.seed}")
        params = config.sampling.params(1, config.seed)
        with VerificationPool(mix.tasks) as pool:

            def writer(model: Path) -> Rollout:
                sampler = EngineSampler(Engine.load(model, cache_bytes=_CACHE))
                return Rollout(sampler, params, config.form, pool, parallel)

            def answered(model: Path, items: Sequence[Item]) -> tuple[list[Trajectory], float]:
                """A checkpoint's responses, and how many tokens a second."""
                rollout, began = writer(model), time.perf_counter()
                groups = rollout.run(items)
                tokens, flops = sampling_cost(weights.config, groups)
                work.meter.add(tokens, sampling=flops)
                return [group[0] for group in groups], tokens / (time.perf_counter() - began)

            packed, scheme, probed = dict[str, Packed](), scheme_of(config), dict[str, Any]()
            if config.calibrate and scheme is not None:
                texts = [t.ids for t in answered(source, mix.draw(0, config.calibrate))[0]]
                if config.bits is not None:
                    held = getattr(torch, weights.dtype)
                    scheme, probed = widened(load_model(source, held), texts, config, scheme)
                    work.meter.add(sensitivity=probed.pop("flops"))
                packed = calibrated(weights, stream(texts, config.sequence_length, _ROWS), scheme)
                work.meter.add(calibration=2 * forward_flops(weights.config, map(len, texts)))
            probed |= {"calibrated": len(packed), "distilled": config.distill}
            if config.distill and scheme is not None:
                packed = distilled(packed, scheme, writer(source), mix, config, work)
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            with Progress(out.name, tensor_count(weights.config)) as progress:
                write_shards(made, tensors(weights, packed, scheme, config.scale_fmt, progress))
            stored = weights.config.stored_as(scheme, config.to == "fp8", config.scale_fmt)
            write_description(made, stored, tokenizer, "bfloat16", source)

            asked = held_out(mix.tasks, config)
            (full, speed), (small, small_speed) = answered(source, asked), answered(made, asked)
            texts = [t.ids for t in full]
            batches = stream(texts, config.sequence_length, _ROWS)
            told = fidelity(reading_by_layer(source, batches), reading_by_layer(made, batches), batches)
            work.meter.add(comparison=2 * forward_flops(weights.config, map(len, texts)))
        result = {
            "to": config.to, "group_size": scheme.group if scheme else 0, **probed, **told,
            "kl_bound": BOUNDS[config.to], "tasks": compared(full, small, config.seed),
            "tokens_per_second": {"full": speed, "small": small_speed},
            "bytes": (size := sum(file.stat().st_size for file in made.glob("*.safetensors"))),
            "share_of_bfloat16": size / (2 * sum(prod(spec.shape) for spec in layout(weights.config))),
        }  # fmt: skip
        if told["kl"] > BOUNDS[config.to]:
            way_out = "; ".join(mended(config))
            print(f"note: KL {told['kl']:.4f} a token is beyond {BOUNDS[config.to]:g}: {way_out}", file=sys.stderr)
        write_json(made / "quantization.json", result)

        def move(folder: Path) -> None:
            for file in made.iterdir():
                file.rename(folder / file.name)

        work.finish(move, {"quantization": result})


def distilled(
    packed: Mapping[str, Packed], scheme: Scheme, rollout: Rollout, mix: TaskMix, config: QuantizeConfig,
    work: Checkpointer,
) -> dict[str, Packed]:  # fmt: skip
    """Numbers that were moved until the rounded model says of the full one's answers what that one does; resumes."""
    source, device = work.reads[config.model], work.parallel.device
    full, student = load_model(source), load_model(source)
    hold_rounded(student, full, packed, scheme)
    for model in (full.to(device), student.to(device)):
        model.compute_dtype = work.dtype
    optimizer = Optimizer(student, config.optimizer)
    if saved := work.load():
        restore(saved, student, optimizer)
    done = saved.step if saved else 0
    with Interrupts() as interrupts, Progress(f"{work.out.name}: distilled", config.distill, done) as progress:
        for step in range(done, config.distill):
            groups = rollout.run(mix.draw(config.calibrate + step * config.prompts_per_step, config.prompts_per_step))
            texts = [trajectory.ids for group in groups for trajectory in group]
            kl = matching_step(student, full, stream(texts, config.sequence_length, _ROWS))
            factor = schedule(config.optimizer, step, config.distill)
            row = {"kl": kl, "gradient_norm": optimizer.step(factor), "lr": config.optimizer.lr * factor}
            tokens, flops = sampling_cost(full.config, groups)
            lengths = [len(text) for text in texts]
            taught, parts = forward_flops(full.config, lengths), training_parts(full.config, lengths, mtp=False)
            work.meter.add(tokens, sampling=flops, teacher=taught, **parts)
            work.log({"step": step + 1, **row, **(speed := work.speed(tokens))})
            progress.update(step + 1, KL=kl, **{"tokens/s": speed["tokens_per_second"]})
            work.keep(step + 1, lambda: work.training_state(student, optimizer), stop=interrupts.asked)
    return held_numbers(student)


def mended(config: QuantizeConfig) -> Iterator[str]:
    """What would lose less."""
    if config.to != "fp8" and not config.calibrate:
        yield "calibrate=128 fits the numbers to the model's own text"
    if config.to in DISTILLED and not config.distill:
        yield "distill=300 moves them further, in minutes for a small model"
    if config.to in BITS and config.group_size > 32:
        yield "group_size=32 has more scales"
    if config.to == "int4" and (config.bits or 4) < 8:
        yield f"bits={min(8, (config.bits or 4) + 1):g} gives 8 where 4 lose most"
    yield "the model is sensitive; look at its evaluation" if config.to == "int8" else "int8 loses least"


def scheme_of(config: QuantizeConfig) -> Scheme | None:
    """How matrices will be stored, before any has more bits than the rest; None: as fp8."""
    group = {"int8": config.group_size, "int4": config.group_size, "mxfp4": MX_BLOCK}.get(config.to, 0)
    return None if config.to == "fp8" else Scheme(config.to, group)


def check(model: ModelConfig, config: QuantizeConfig) -> None:
    """Raise SlingshotError for what is quantised already, rows that are no whole groups, and keys of another `to`."""
    if model.quantization not in (None, "fp8") or model.quantization == config.to:
        raise SlingshotError(f"quantize: {config.model} holds {model.quantization} already; give what it was made from")
    if config.bits is not None and (config.to != "int4" or not config.calibrate):
        needs = f"to=int4, not {config.to}" if config.to != "int4" else "text of the model: calibrate=128"
        raise SlingshotError(f"quantize: bits={config.bits:g} needs {needs}")
    if config.scale_fmt is not None and config.to != "fp8":
        raise SlingshotError(f"quantize: scale_fmt={config.scale_fmt} is of to=fp8, not {config.to}")
    if config.distill and config.to not in DISTILLED:
        raise SlingshotError(f"quantize: distill={config.distill} is of {', '.join(DISTILLED)}, not {config.to}")
    group = (scheme_of(config) or Scheme("int8-dynamic")).group or 1
    for spec in layout(model):
        if is_packed(spec.name, spec.stored):
            check_groups(spec.shape, group, f"quantize: {config.model}: {spec.name}")


def trained_on(source: Path, named: str) -> list[TaskConfig]:
    """The tasks that a checkpoint's receipt names."""
    found = Receipt.read(source).config.get("tasks") if (source / RECEIPT).is_file() else None
    if not found:
        way_out = "name some whose problems it shall answer, such as tasks=arithmetic"
        raise SlingshotError(f"quantize: no receipt says what tasks {named} was trained on; {way_out}")
    return [TaskConfig.parse(task, f"{source / RECEIPT}: tasks") for task in found]


def held_out(tasks: Sequence[Task], config: QuantizeConfig) -> list[Item]:
    """Test problems of each task, the same for every model."""
    seed = f"quantize/{config.seed}"
    return [Item(task, each, each.key) for task in tasks for each in distinct(task, "test", seed, config.problems)]


def widened(
    model: Transformer, texts: Sequence[Sequence[int]], config: QuantizeConfig, scheme: Scheme
) -> tuple[Scheme, dict[str, Any]]:
    """The scheme with 8 bits where 4 lose most, and what was measured."""
    assert config.bits is not None
    shapes = {spec.name: spec.shape for spec in layout(model.config) if is_packed(spec.name, spec.stored)}
    units = together(shapes)
    sizes = {unit: sum(prod(shapes[name]) for name in names) for unit, names in units.items()}
    length = min(config.sequence_length, _PROBED)
    batches = stream(texts, length, _PROBED // length)[:1]
    lost = sensitivities(model, batches, units, IntegerGrid(4, config.group_size))
    wide = chosen(lost, sizes, config.bits)
    scheme = Scheme(scheme.kind, scheme.group, tuple(each for unit in wide for each in modules(unit, units[unit])))
    mean = sum(prod(shape) * scheme.bits(name) for name, shape in shapes.items()) / sum(sizes.values())
    print(f"8 bits for {len(wide)} of {len(units)}, {mean:.2f} on the average; KL of each at 4:", file=sys.stderr)
    for unit in wide:
        print(f"    {unit.removeprefix('model.').rstrip('.')} {lost[unit]:.2g}", file=sys.stderr)
    tokens = [batches[0][0].numel()] if batches else []
    flops = (1 + len(units) / 2) * forward_flops(model.config, tokens)  # half of the layers on the average
    return scheme, {"bits": mean, "sensitivities": lost, "wide": list(scheme.wide), "flops": flops}


def calibrated(weights: StoredWeights, batches: Sequence[Batch], scheme: Scheme) -> dict[str, Packed]:
    """Numbers and scales of the matrices that enough of the text went through."""
    packed = dict[str, Packed]()
    for name, weight_FD, gram_DD, rows in by_layer(weights, batches):
        if not is_packed(name, "linear") or name.endswith("eh_proj.weight"):
            continue
        if rows >= _FEW and gram_DD.isfinite().all():
            numbers_FD, scales_FG = gptq(weight_FD, gram_DD, grid(scheme, name))
            weight_FD.copy_(from_numbers(numbers_FD, scales_FG))
            packed[name] = numbers_FD.to(torch.bfloat16 if scheme.kind == "mxfp4" else torch.int8), scales_FG
    return packed


def tensors(
    weights: StoredWeights, packed: Mapping[str, Packed], scheme: Scheme | None, scale_fmt: str | None,
    progress: Progress,
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """The new checkpoint's tensors: what is not `packed` yet is rounded to nearest; without a scheme all, to fp8."""
    for number, spec in enumerate(layout(weights.config), start=1):
        tensor = torch.empty(spec.shape, dtype=torch.float32 if spec.stored != "plain" else torch.bfloat16)
        read_into(tensor, weights, spec)
        if scheme is None and spec.stored == "linear":
            values, scale_inv = quantize(tensor, scale_fmt)
            yield spec.name, values
            yield spec.name + SCALE, scale_inv
        elif scheme is not None and is_packed(spec.name, spec.stored):
            numbers, scales = packed.get(spec.name) or rounded(tensor, grid(scheme, spec.name))
            for suffix, part in encoded(scheme, spec.name, numbers, scales):
                yield spec.name + suffix, part
        else:
            yield spec.name, tensor if spec.stored == "float32" else tensor.bfloat16()
        progress.update(number)


def compared(full: Sequence[Trajectory], small: Sequence[Trajectory], seed: int) -> dict[str, Any]:
    """pass@1 of both models on each task, and the difference with its interval over the problems."""
    found = {}
    for name in dict.fromkeys(t.item.task.name for t in full):
        before, after = (
            {t.item.key: t.scores["accuracy"] for t in each if t.item.task.name == name} for each in (full, small)
        )
        pairs = [(before[key], after[key]) for key in before if key in after]
        found[name] = difference([a for a, _ in pairs], [b for _, b in pairs], seed)
    return found
