"""Quantisation: a checkpoint's matrices in 8 or 4 bits, and what was lost by it, in numbers.

The model writes responses to its tasks' problems. On some of them the matrices are calibrated, layer by layer (GPTQ,
arXiv 2210.17323); on others, to held-out problems, the small model is compared with the full one. Routers, norms,
embeddings, the head and MLA's kv_b_proj stay, in bfloat16. The folder is compressed-tensors' pack-quantized, which
transformers and vLLM read; what was found stands in quantization.json. fp8 is DeepSeek-V3's own form: e4m3, a scale for
each 128 x 128 block, kv_b_proj too, rounded to nearest.

    slingshot quantize runs/tiny/rl_final --to int4 --out runs/tiny-int4
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
from slingshot.cost.flops import forward_flops
from slingshot.cost.receipt import RECEIPT, Receipt
from slingshot.engine.engine import Engine
from slingshot.model.config import ModelConfig
from slingshot.model.transformer import Transformer
from slingshot.quantization.formats import BITS, PACKED, PACKED_SCALE, PACKED_SHAPE, SCALE, is_packed
from slingshot.quantization.fp8 import quantize
from slingshot.quantization.gptq import gptq
from slingshot.quantization.integers import best_scales, check_groups, from_numbers, pack, to_numbers
from slingshot.rollout.metrics import difference
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, sampling_cost
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item, TaskMix, distinct
from slingshot.tasks.task import Task
from slingshot.tasks.verification import VerificationPool
from slingshot.training.calibration import Batch, by_layer, stream
from slingshot.training.checkpointer import Checkpointer
from slingshot.training.fidelity import fidelity
from slingshot.training.parallel import Parallel

BOUNDS = {"int8": 0.002, "int4": 0.05, "fp8": 0.02}  # of the mean KL divergence, in nats a token: a loss beyond is said
_FEW = 64  # rows of inputs: experts that saw fewer are rounded to nearest
_ROWS = 8  # of a batch

Packed = tuple[Tensor, Tensor]  # numbers and scales


class QuantizeConfig(StageConfig):
    """`tasks`: unless told those that the model was trained on, which its receipt names. `calibrate`: responses that
    the matrices are fitted to; 0 rounds to nearest, as fp8 always does. `problems`: of each task, for both models."""

    model: str
    to: Literal["int8", "int4", "fp8"] = "int4"
    group_size: Literal[32, 64, 128] = 32
    tasks: list[TaskConfig] = []
    form: PromptForm = PromptForm()
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=256)
    calibrate: int = Field(128, ge=0)
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
        with VerificationPool(mix.tasks) as pool, Progress(out.name, tensor_count(weights.config)) as progress:

            def answered(model: Path, items: Sequence[Item]) -> tuple[list[Trajectory], float]:
                """A checkpoint's responses, and how many tokens a second."""
                sampler, began = EngineSampler(Engine.load(model)), time.perf_counter()
                groups = Rollout(sampler, params, config.form, pool, parallel).run(items)
                tokens, flops = sampling_cost(sampler.model_config, groups)
                work.meter.add(tokens, sampling=flops)
                return [group[0] for group in groups], tokens / (time.perf_counter() - began)

            packed: dict[str, Packed] = {}
            if config.calibrate and config.to in BITS:
                texts = [t.ids for t in answered(source, mix.draw(0, config.calibrate))[0]]
                packed = calibrated(load_model(source), stream(texts, config.sequence_length, _ROWS), config)
                work.meter.add(calibration=2 * forward_flops(weights.config, map(len, texts)))
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            write_shards(made, tensors(weights, packed, config, progress))
            update = {"quantization": config.to, "quantization_group_size": group_size(config)}
            write_description(made, weights.config.model_copy(update=update), tokenizer, "bfloat16", source)

            asked = held_out(mix.tasks, config)
            (full, speed), (small, small_speed) = answered(source, asked), answered(made, asked)
            texts = [t.ids for t in full]
            told = fidelity(load_model(source), load_model(made), stream(texts, config.sequence_length, _ROWS))
            work.meter.add(comparison=2 * forward_flops(weights.config, map(len, texts)))
        result = {
            "to": config.to, "group_size": group_size(config), "calibrated": len(packed), **told,
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


def mended(config: QuantizeConfig) -> Iterator[str]:
    """What would lose less."""
    if config.to in BITS and not config.calibrate:
        yield "calibrate=128 fits the numbers to the model's own text"
    if group_size(config) > 32:
        yield "group_size=32 has more scales"
    yield "the model is sensitive; look at its evaluation" if config.to == "int8" else "int8 loses least"


def group_size(config: QuantizeConfig) -> int:
    """0 where scales are not those of groups."""
    return config.group_size if config.to in BITS else 0


def check(model: ModelConfig, config: QuantizeConfig) -> None:
    """Raise SlingshotError for a model that is quantised already, and for rows that are no whole groups."""
    if model.quantization in (*BITS, config.to):
        raise SlingshotError(f"quantize: {config.model} holds {model.quantization} already; give what it was made from")
    for spec in layout(model):
        if config.to in BITS and is_packed(spec.name, spec.stored):
            check_groups(spec.shape, config.group_size, f"quantize: {config.model}: {spec.name}")


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


def calibrated(model: Transformer, batches: Sequence[Batch], config: QuantizeConfig) -> dict[str, Packed]:
    """Numbers and scales of the matrices that enough of the text went through; the model's weights become these."""
    packed, bits, group = dict[str, Packed](), BITS[config.to], config.group_size
    for name, weight_FD, gram_DD, rows in by_layer(model, batches):
        if not is_packed(name, "linear") or name.endswith("eh_proj.weight"):
            continue
        if rows >= _FEW and gram_DD.isfinite().all():
            packed[name] = gptq(weight_FD, gram_DD, bits, group)
            weight_FD.copy_(from_numbers(*packed[name]))
    return packed


def tensors(
    weights: StoredWeights, packed: Mapping[str, Packed], config: QuantizeConfig, progress: Progress
) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's tensors: what is not `packed` yet is rounded to nearest."""
    bits, dtype = BITS.get(config.to), torch.bfloat16
    for number, spec in enumerate(layout(weights.config), start=1):
        tensor = torch.empty(spec.shape, dtype=torch.float32 if spec.stored != "plain" else dtype)
        read_into(tensor, weights, spec)
        if bits is None and spec.stored == "linear":
            values, scale_inv = quantize(tensor)
            yield spec.name, values
            yield spec.name + SCALE, scale_inv
        elif bits is not None and is_packed(spec.name, spec.stored):
            numbers, scales = packed.get(spec.name) or rounded(tensor, bits, config.group_size)
            yield spec.name + PACKED, pack(numbers, bits)
            yield spec.name + PACKED_SCALE, scales.to(dtype)
            yield spec.name + PACKED_SHAPE, torch.tensor(spec.shape)
        else:
            yield spec.name, tensor if spec.stored == "float32" else tensor.to(dtype)
        progress.update(number)


def rounded(weight_FD: Tensor, bits: int, group: int) -> Packed:
    """Each weight's nearest number."""
    scales_FG = best_scales(weight_FD, bits, group)
    return to_numbers(weight_FD, scales_FG, bits), scales_FG


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
