"""Quantisation: a checkpoint's matrices in 8 or 4 bits, and what was lost by it, in numbers.

The model writes responses to its tasks' problems. On some of them the matrices are calibrated, layer by layer (GPTQ,
arXiv 2210.17323); on others, to held-out problems, the small model is compared with the full one. Routers, norms,
embeddings, the head and MLA's kv_b_proj stay, in bfloat16. The folder is as compressed-tensors has it, which
transformers and vLLM read; what was found stands in quantization.json. fp8 is DeepSeek-V3's own form: e4m3, a scale for
each 128 x 128 block, kv_b_proj too, rounded to nearest.

    slingshot quantize runs/tiny/rl_final --to int4 --out runs/tiny-int4
    slingshot quantize runs/tiny/rl_final --bits 4.5 --out runs/tiny-4.5        # 8 bits where 4 lose most
    slingshot quantize runs/tiny/rl_final --distill 200 --out runs/tiny-int4    # scales moved until it says the same
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import inf, prod
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from slingshot.base.clock import Clock
from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import new_folder, write_json
from slingshot.base.progress import Progress
from slingshot.base.quantity import plural, show_count, show_duration
from slingshot.checkpoint.description import write_description
from slingshot.checkpoint.layout import layout, packed_layout, tensor_count
from slingshot.checkpoint.load_save import load_model, load_tokenizer, open_weights
from slingshot.checkpoint.safetensors import write_shards
from slingshot.cost.flops import forward_flops, training_parts
from slingshot.cost.receipt import RECEIPT, Receipt
from slingshot.engine.engine import Engine
from slingshot.kernels.native import native_levels
from slingshot.machine.device import Dtype, machine_peak
from slingshot.model.config import ModelConfig
from slingshot.quantization.formats import BITS, MX_BLOCK, Scheme
from slingshot.quantization.integers import check_groups
from slingshot.rollout.metrics import difference
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, Sampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, sampling_cost
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import Item, TaskMix, distinct
from slingshot.tasks.task import Task
from slingshot.tasks.verification import VerificationPool
from slingshot.training.calibration import TextRows, stream
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.fidelity import fidelity, reading_by_layer
from slingshot.training.fitting import FEW, Fit, fitted, tensors, widened
from slingshot.training.interrupts import Interrupts
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule
from slingshot.training.parallel import Parallel
from slingshot.training.quantization_aware import (
    HeldOut,
    Packed,
    capped_step,
    held_numbers,
    hold_rescaled,
    matching_step,
    trained,
)

# Of the mean KL divergence, in nats a token: a loss beyond is said.
BOUNDS = {"int8": 0.002, "int4": 0.05, "fp8": 0.02, "int8-dynamic": 0.01, "mxfp4": 0.1}
DISTILLED = ("int4", "int8")  # whose scales are more than powers of two, and what they compute with is what is stored
CALIBRATION, FULL, SMALL = "calibration's answers", "full model's answers", "small model's answers"
CHUNK = 32  # problems that are answered at a time
_ROWS = 8  # of a batch
_CACHE = 2**29  # bytes of the keys and values of what is being answered
HELD_OUT, _MEASUREMENTS = 32, 10  # answers that distillation does not see, and how often KL is measured there
_ANSWERING, _MEASURING = "held-out answers", "held-out KL"
# Held-out problems of each task where their number is not told: so many, or what both models answer and read for so
# many FLOPs, but never fewer than that.
_MOST, _SPENT, _FEWEST = 200, 6e12, 2
# What takes the time, in FLOPs of a matrix product that takes as long (docs/compression.md): a number that is rounded,
# one that is fitted; of an answer's forward pass, to write it and fit to it, to write it twice and compare.
_ROUNDING, _FITTING, _CALIBRATION, _COMPARISON, _BEGINNING = 4e3, 2e4, 4.0, 6.0, 10.0
_LONG = 120  # seconds: from there on it is said what would take less


class QuantizeConfig(StageConfig):
    """`tasks`: unless told those that the model was trained on, which its receipt names. `calibrate`: responses that
    the matrices are fitted to, no more than hold about `calibrate_tokens`; 0 rounds to nearest, as fp8 always does.
    `problems`: of each task, for both models; unless told as many as a bounded amount of work allows (`held_out`).
    `bits`: of int4, a number's on the average, scales not counted: matrices that lose most by 4 bits get 8. `distill`:
    steps after that, each on answers to `prompts_per_step` other problems; a learning rate is a share of the scales,
    and less where a step would promise too much. `scale_fmt`: of fp8, scales that are powers of two, as V3.1's."""

    model: str
    to: Literal["int8", "int4", "fp8", "int8-dynamic", "mxfp4"] = "int4"
    bits: float | None = Field(None, ge=4, le=8)
    group_size: Literal[32, 64, 128] = 32
    scale_fmt: Literal["ue8m0"] | None = None
    tasks: list[TaskConfig] = []
    form: PromptForm = PromptForm()
    sampling: SamplingConfig = SamplingConfig(temperature=0.6, top_p=0.95, max_tokens=256)
    calibrate: int = Field(128, ge=0)
    calibrate_tokens: int = Field(8192, ge=FEW)
    distill: int = Field(0, ge=0)
    prompts_per_step: int = Field(16, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig(
        name="adamw", lr=3e-3, warmup=0.1, decay=1.0, final=0.0, weight_decay=0.0
    )
    dtype: Dtype = "auto"
    problems: int | None = Field(None, ge=1)
    sequence_length: int = Field(256, ge=8)


def run(config: QuantizeConfig, out: Path, sampler: Callable[[Path], Sampler] | None = None) -> None:
    """Quantise `config.model` into `out`, with quantization.json beside the weights.

    sampler: makes what a checkpoint's responses come from, by default the engine in this process.
    """
    with Parallel.start() as parallel, Checkpointer(out, "quantize", config, parallel) as work:
        if parallel.mesh is not None:
            raise SlingshotError("quantize: runs in one process; start it without torchrun")
        source, made, clock = work.reads[config.model], work.folder / "checkpoint", Clock()
        weights, tokenizer = open_weights(source), load_tokenizer(source)
        check(weights.config, config)
        mix = TaskMix(config.tasks or trained_on(source, config.model), "train", f"quantize/{config.seed}")
        asked = held_out(mix.tasks, weights.config, config)
        peak = machine_peak(torch.float32, parallel.device)  # of fitting and comparing, whatever answers are made in
        print(f"{out.name}: {foretold(weights.config, config, len(asked), peak)}", file=sys.stderr)
        params = config.sampling.params(1, config.seed)
        with VerificationPool(mix.tasks) as pool:

            def writer(model: Path) -> Rollout:
                with clock("loading"):
                    return Rollout((sampler or engine_of)(model), params, config.form, pool, parallel)

            def answered(rollout: Rollout, items: Sequence[Item], part: str, most: float = inf) -> list[Trajectory]:
                """Responses to problems, some at a time until they hold so many tokens."""
                said, read = list[Trajectory](), 0
                with clock(part), Progress(f"{out.name}: {part}", len(items)) as progress:
                    for start in range(0, len(items), CHUNK):

                        def heard(ended: int, before: int = start) -> None:
                            progress.update(before + ended)

                        groups = rollout.run(items[start : start + CHUNK], heard)
                        tokens, flops = sampling_cost(weights.config, groups)
                        work.meter.add(tokens, sampling=flops)
                        said += [group[0] for group in groups]
                        read = sum(len(trajectory.ids) for trajectory in said)
                        if read >= most:
                            if start + CHUNK < len(items):
                                progress.total = start + CHUNK
                                progress.update(progress.total)
                            break
                rollout.refuse_nothing()
                return said

            scheme, probed, fit = scheme_of(config), dict[str, Any](), Fit()
            if config.calibrate and scheme is not None:
                said = answered(writer(source), mix.draw(0, config.calibrate), CALIBRATION, config.calibrate_tokens)
                ends = accumulate(len(t.ids) for t in said)
                texts = [t.ids for t, end in zip(said, ends, strict=True) if end - len(t.ids) < config.calibrate_tokens]
                if (read := sum(map(len, texts))) < FEW:
                    way_out = "calibrate=128, or calibrate=0 to round to nearest"
                    hold = f"{plural(len(said), 'response')} to calibrate on hold {plural(read, 'token')}"
                    raise SlingshotError(f"quantize: {hold}; a matrix is fitted to {FEW} at least: {way_out}")
                if config.bits is not None:
                    with clock("sensitivities"):
                        model = load_model(source, getattr(torch, weights.dtype))
                        scheme, probed = widened(model, texts, scheme, config.bits, config.sequence_length)
                        del model
                    work.meter.add(sensitivity=probed.pop("flops"))
                batches = stream(texts, config.sequence_length, _ROWS)
                fit = fitted(weights, batches, scheme, f"{out.name}: fitted", clock)
                work.meter.add(calibration=2 * forward_flops(weights.config, map(len, texts)) + fit.flops)
                probed |= {"calibration_answers": len(said), "calibration_tokens": read}
            probed |= {"calibrated": len(fit.packed), "distilled": config.distill}
            if config.distill and scheme is not None:
                fit.packed, went = distilled(fit.packed, scheme, writer(source), mix, config, work, clock)
                probed |= went
            with clock("writing"), new_folder(made) as folder:
                with Progress(f"{out.name}: written", tensor_count(weights.config)) as progress:
                    write_shards(folder, tensors(weights, fit, scheme, config.scale_fmt, progress))
                stored = weights.config.stored_as(scheme, config.to == "fp8", config.scale_fmt)
                write_description(folder, stored, tokenizer, "bfloat16", source)

            full, small = (answered(writer(model), asked, part) for model, part in ((source, FULL), (made, SMALL)))
            with clock("comparison"):
                batches, lengths = compared_on(full, config)
                told = fidelity(reading_by_layer(source, batches), reading_by_layer(made, batches), batches)
            work.meter.add(comparison=2 * forward_flops(weights.config, lengths))
        speed = {
            name: sum(sum(t.mask) for t in each) / clock.seconds[part]
            for name, each, part in (("full", full, FULL), ("small", small, SMALL))
        }
        result = {
            "to": config.to, "group_size": scheme.group if scheme else 0, **probed, **told,
            "kl_bound": BOUNDS[config.to], "tasks": compared(full, small, config.seed),
            "tokens_per_second": speed, "outlier_groups": fit.outliers.total(),
            "bytes": (size := sum(file.stat().st_size for file in made.glob("*.safetensors"))),
            "share_of_bfloat16": size / (2 * sum(prod(spec.shape) for spec in layout(weights.config))),
            "seconds": dict(clock.seconds),
        }  # fmt: skip
        for note in notes(config, result, fit):
            print(f"note: {note}", file=sys.stderr)
        write_json(made / "quantization.json", result)

        def move(folder: Path) -> None:
            for file in made.iterdir():
                file.rename(folder / file.name)

        work.finish(move, {"quantization": result})


def distilled(
    packed: Mapping[str, Packed], scheme: Scheme, rollout: Rollout, mix: TaskMix, config: QuantizeConfig,
    work: Checkpointer, clock: Clock,
) -> tuple[dict[str, Packed], dict[str, Any]]:  # fmt: skip
    """Numbers with the scales under which they say of the full model's answers what that one does, the best on answers
    held out, and what KL was there; resumes."""
    source, steps, asked = work.reads[config.model], config.distill, config.prompts_per_step
    full, student = load_model(source), load_model(source)
    hold_rescaled(student, full, packed, scheme, config.seed)
    for model in (full.to(work.parallel.device), student.to(work.parallel.device)):
        model.compute_dtype = work.dtype

    def answers(first: int, count: int) -> tuple[list[TextRows], list[int], int]:
        """Of problems of the mix by the full model: in batches, the length of each, and the tokens sampled."""
        groups = rollout.run(mix.draw(first, count))
        batches, lengths = compared_on([trajectory for group in groups for trajectory in group], config)
        tokens, flops = sampling_cost(full.config, groups)
        work.meter.add(tokens, sampling=flops, teacher=forward_flops(full.config, lengths))
        return batches, lengths, tokens

    with clock(_ANSWERING):
        batches, _, _ = answers(config.calibrate + steps * asked, HELD_OUT)
    with clock(_MEASURING):
        held_out = HeldOut(full, student, batches)
    optimizer = Optimizer(student, config.optimizer)
    if saved := work.load():
        held_out.state = {name: saved.read(f"best/{name}", tensor) for name, tensor in trained(student).items()}
        restore(saved, student, optimizer)
        held_out.best, held_out.step = saved.info["best"], saved.info["best_step"]
    else:  # a step reads its answers as the two did, and goes back, which is as long again
        answering, reading = clock.seconds[_ANSWERING], clock.seconds[_MEASURING]
        seconds = steps * asked / HELD_OUT * (answering + 2 * reading) + _MEASUREMENTS * reading / 2
        print(f"{work.out.name}: {steps} steps of distillation take about {show_duration(seconds)}", file=sys.stderr)

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        groups = {"model": trained(student), "optimizer": optimizer.state(), "best": held_out.state}
        tensors = {f"{group}/{name}": each for group, its in groups.items() for name, each in its.items()}
        return tensors, {"best": held_out.best, "best_step": held_out.step}

    with Interrupts() as interrupts, Progress(f"{work.out.name}: distilled", steps, saved.step) as progress:
        for step in range(saved.step, steps):
            with clock("distillation"):
                batches, lengths, tokens = answers(config.calibrate + step * asked, asked)
                kl, factor = matching_step(student, full, batches), schedule(config.optimizer, step, steps)
                norm = capped_step(optimizer, factor, kl)
            row = {"kl": kl, "gradient_norm": norm, "lr": config.optimizer.lr * factor}
            if (step + 1) % -(-steps // _MEASUREMENTS) == 0 or step + 1 == steps:
                with clock(_MEASURING):
                    row["held_out_kl"] = held_out.measure(student, step + 1)
            work.meter.add(0, **training_parts(full.config, lengths, mtp=False))
            work.log({"step": step + 1, **row, **(speed := work.speed(tokens))})
            progress.update(step + 1, KL=kl, **{"tokens/s": speed["tokens_per_second"]})
            work.keep(step + 1, state, stop=interrupts.asked)
    for name, tensor in trained(student).items():
        tensor.copy_(held_out.state[name])
    before, after = f"{held_out.kl:.4f}", f"{held_out.best:.4f} at step {held_out.step}, whose scales are taken"
    helped = f"became {after}" if held_out.step else "only rose: the scales stay as they were"
    print(f"{work.out.name}: KL {before} on answers held out {helped}", file=sys.stderr)
    return held_numbers(student), {"held_out_kl": [held_out.kl, held_out.best], "best_step": held_out.step}


def compared_on(said: Sequence[Trajectory], config: QuantizeConfig) -> tuple[list[TextRows], list[int]]:
    """Answers in batches, of which what the model wrote counts, and the length of each."""
    texts, written = [t.ids for t in said], [t.mask for t in said]
    return stream(texts, config.sequence_length, _ROWS, written), list(map(len, texts))


def notes(config: QuantizeConfig, told: dict[str, Any], fit: Fit) -> Iterator[str]:
    """What qualifies the result: a large loss, outliers, matrices that saw too little text."""
    if told["kl"] > BOUNDS[config.to]:
        way_out = "; ".join(mended(config))
        yield f"KL {told['kl']:.4f} a token is beyond {BOUNDS[config.to]:g}: {way_out}"
    if outliers := fit.outliers.total():
        (name, _), way_out = fit.outliers.most_common(1)[0], "int8 or smaller groups keep more"
        where = f"in {plural(outliers, 'group')} ({name} has most)"
        yield f"{where} one weight is so large that all others of its scale became 0; {way_out}"
    if fit.unseen:
        few = f"{len(fit.unseen):,} of the matrices saw fewer than {FEW} tokens, {fit.unseen[0]} one of them"
        yield f"{few}, and were rounded to nearest; a larger calibrate and calibrate_tokens reach more"


def mended(config: QuantizeConfig) -> Iterator[str]:
    """What would lose less."""
    if config.to != "fp8" and not config.calibrate:
        yield "calibrate=128 fits the numbers to the model's own text"
    if config.to in DISTILLED and not config.distill:
        yield "distill=100 moves their scales, at some seconds a step for 100M numbers"
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
    scheme = scheme_of(config)
    for spec in packed_layout(model):
        check_groups(spec.shape, (scheme and scheme.group) or 1, f"quantize: {config.model}: {spec.name}")


def engine_of(model: Path) -> Sampler:
    """A checkpoint in the engine of this process, in 16 bits where it is stored so and compiled kernels multiply it."""
    sixteen = open_weights(model).dtype != "float32" and native_levels()
    return EngineSampler(Engine.load(model, dtype="bfloat16" if sixteen else "auto", cache_bytes=_CACHE))


def trained_on(source: Path, named: str) -> list[TaskConfig]:
    """The tasks that a checkpoint's receipt names."""
    found = Receipt.read(source).config.get("tasks") if (source / RECEIPT).is_file() else None
    if not found:
        way_out = "name some whose problems it shall answer, such as tasks=arithmetic"
        raise SlingshotError(f"quantize: no receipt says what tasks {named} was trained on; {way_out}")
    return [TaskConfig.parse(task, f"{source / RECEIPT}: tasks") for task in found]


def held_out(tasks: Sequence[Task], model: ModelConfig, config: QuantizeConfig) -> list[Item]:
    """Test problems of each task, the same for every model of a size."""
    seed, count = f"quantize/{config.seed}", config.problems
    if count is None:  # written twice and read twice
        work = 4 * forward_flops(model, [config.sampling.max_tokens]) * len(tasks)
        count = max(_FEWEST, min(_MOST, int(_SPENT / work)))
    return [Item(task, each, each.key) for task in tasks for each in distinct(task, "test", seed, count)]


def foretold(model: ModelConfig, config: QuantizeConfig, problems: int, peak: float) -> str:
    """What will be done, and about how long it takes where every answer is as long as it may be.

    peak: FLOP/s of this machine's matrix products, by which it is told.
    """
    length, numbers = config.sampling.max_tokens, sum(prod(spec.shape) for spec in packed_layout(model))
    most = CHUNK * -(-config.calibrate_tokens // (CHUNK * length))
    answers = 0 if config.to == "fp8" else min(config.calibrate, most)
    answer = forward_flops(model, [length])
    work = numbers * (_FITTING if answers else _ROUNDING) + answer * (answers * _CALIBRATION + problems * _COMPARISON)
    by = f"fitted to {plural(answers, 'answer')}, " if answers else ""
    if config.distill:
        by += f"distilled in {plural(config.distill, 'step')}, whose time is told when they begin, "
    seconds = _BEGINNING + work / peak
    bounded = "; problems=N asks others" if config.problems is None else ""
    if seconds > _LONG:
        bounded = f"; fewer problems{' or calibrate' if answers else ''}, a smaller sampling.max_tokens take less"
    done = f"{show_count(numbers)} numbers to {config.to}, {by}compared on {plural(problems, 'answer')}"
    return f"{done}: about {show_duration(seconds)} if nothing else runs{bounded}"


def compared(full: Sequence[Trajectory], small: Sequence[Trajectory], seed: int) -> dict[str, Any]:
    """pass@1 of both models on each task, and the difference with its interval over the problems."""
    found = {}
    for name in dict.fromkeys(t.item.task.name for t in full):
        mine = ([t for t in each if t.item.task.name == name] for each in (full, small))
        before, after = ({t.item.key: t.scores["accuracy"] for t in its} for its in mine)
        pairs = [(before[key], after[key]) for key in before if key in after]
        found[name] = difference([a for a, _ in pairs], [b for _, b in pairs], seed)
    return found
