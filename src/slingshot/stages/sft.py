"""Supervised fine-tuning on prompts with reasoning and answer: R1's cold start, its SFT from the base, and its distillation.

Examples come from JSONL datasets ({"prompt", "reasoning", "answer"} a line) or are written by tasks that can. Loss on the response
only; MTP is trained along (arXiv 2501.12948, 2.3 and 2.4).

    slingshot sft --config sft.toml --out runs/sft
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_jsonl
from slingshot.base.progress import Progress
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.load_save import load_model, load_tokenizer, save_checkpoint
from slingshot.cost.flops import training_parts
from slingshot.data.packing import pack_examples
from slingshot.machine.precision import Dtype, compute_dtype, peak
from slingshot.rollout.rollout import PromptForm
from slingshot.tasks.loader import TaskConfigs
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Problem
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.response import encode_responses
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.checkpointer import Workspace, restore, training_state
from slingshot.training.language_model import LanguageModelLoss, Rows, language_model_step
from slingshot.training.optimizer import MOVED_TO_OPTIMIZER, Optimizer, OptimizerConfig, schedule
from slingshot.training.parallel import Parallel, gathered

kind = "sft"


class SFTConfig(StageConfig):
    """`data` are dataset folders or .jsonl files; `tasks` write `examples` worked solutions in `style` instead or besides."""

    moved: ClassVar[dict[str, str]] = MOVED_TO_OPTIMIZER | {"losses": "loss"}

    model: str
    data: list[str] = []
    tasks: TaskConfigs = []
    examples: int = Field(0, ge=0)
    style: Literal["answer", "steps", "slips"] = "steps"
    form: PromptForm = PromptForm()
    epochs: int = Field(2, ge=1)
    sequence_length: int = Field(256, ge=8)
    batch_size: int = Field(16, ge=1)  # rows of `sequence_length`, over all ranks
    micro_batch_size: int = Field(16, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LanguageModelLoss = LanguageModelLoss()
    dtype: Dtype = "auto"
    save_seconds: float = 60.0

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.data and not (self.tasks and self.examples):
            raise ValueError("no examples: give data = [...], or tasks = [...] with examples = N")
        return self


def run(config: SFTConfig, out: Path) -> None:
    """Fine-tune `config.model` and write a checkpoint to `out`; resumes from `out.partial`."""
    parallel = Parallel.start(config.threads)
    source = locate(config.model)
    parents = [source, *map(Path, config.data)]
    work = Workspace(out, kind, config, parents, parallel, config.save_seconds, peak(config.dtype))
    model, tokenizer = load_model(source, device=parallel.device, shard=parallel.shard), load_tokenizer(source)
    examples = _examples(config, tokenizer)
    per_epoch = [_pack(examples, config, epoch) for epoch in range(config.epochs)]
    steps = sum(-(-len(rows.tokens_BT) // config.batch_size) for rows in per_epoch)
    batches = (
        rows[slice(i, i + config.batch_size)]
        for rows in per_epoch
        for i in range(0, len(rows.tokens_BT), config.batch_size)
    )

    model.compute_dtype = compute_dtype(config.dtype)
    optimizer = Optimizer(model, config.optimizer)
    saved = work.load()
    done = saved.step if saved else 0
    if saved:
        restore(saved, model, optimizer)

    with Progress(out.name, steps, done, parallel.is_first) as progress:
        for step, batch in enumerate(batches):
            if step < done:
                continue
            rows = batch.shard(parallel)
            losses = language_model_step(model, rows, config.loss, config.micro_batch_size, parallel)
            work.check(step + 1, loss=losses.loss)
            lr = schedule(config.optimizer, step, steps)
            norm = optimizer.step(lr)
            work.check(step + 1, gradient_norm=norm)

            flops_before = work.meter.flops
            work.meter.add(rows.n_tokens, **training_parts(model.config, rows.lengths(), mtp=config.loss.mtp > 0))
            speed = work.speed(batch.n_tokens, flops_before)
            work.log(
                {"step": step + 1, **losses.logged(), "lr": lr * config.optimizer.lr, "gradient_norm": norm, **speed}
            )
            progress.update(step + 1, loss=losses.loss, **{"tokens/s": speed["tokens_per_second"]})
            work.keep(step + 1, lambda: training_state(model, optimizer))

    state = gathered(model)
    work.finish(
        lambda folder: save_checkpoint(folder, model, tokenizer, state, source=source), {"examples": len(examples)}
    )
    parallel.stop()


def _examples(config: SFTConfig, tokenizer: Tokenizer) -> list[tuple[list[int], list[int]]]:
    """Prompt and response ids of every example, in file order."""
    rows: list[tuple[Problem, str, str]] = []
    for source in map(Path, config.data):
        file = source / "data.jsonl" if source.is_dir() else source
        for number, row in enumerate(read_jsonl(file), start=1):
            if not isinstance(row, dict) or not all(
                isinstance(row.get(key), str) for key in ("prompt", "reasoning", "answer")
            ):
                raise SlingshotError(f"{file} line {number}: an example holds prompt, reasoning and answer, all text")
            rows.append((Problem(prompt=row["prompt"], key=row["prompt"]), row["reasoning"], row["answer"]))
    if config.tasks:
        rng = random.Random(f"solutions/{config.seed}")
        for item in TaskMix(config.tasks, "train", f"solutions/{config.seed}", repeat=False).draw(0, config.examples):
            solution = item.task.solution(item.problem, config.style, rng)
            rows.append((item.problem, solution.reasoning, solution.answer))
    if not rows:
        raise SlingshotError(f"{', '.join(config.data)}: no examples; did any sample pass the verifier?")
    prompts = [config.form.encode(tokenizer, problem) for problem, _, _ in rows]
    opened = ends_in_reasoning(prompts[0], tokenizer)
    responses = encode_responses(tokenizer, [(reasoning, answer) for _, reasoning, answer in rows], opened)
    kept = [
        pair for pair in zip(prompts, responses, strict=True) if len(pair[0]) + len(pair[1]) <= config.sequence_length
    ]
    if not kept:
        raise SlingshotError(f"every example is longer than sequence_length {config.sequence_length}; raise it")
    return kept


def _pack(examples: list[tuple[list[int], list[int]]], config: SFTConfig, epoch: int) -> Rows:
    """Rows of one epoch, examples in an order of its own."""
    order = np.random.default_rng([config.seed, epoch]).permutation(len(examples))
    marked = [
        (prompt + response, [0] * len(prompt) + [1] * len(response))
        for prompt, response in (examples[i] for i in order)
    ]
    packed = pack_examples(marked, config.sequence_length)
    return Rows.from_numpy(packed.tokens_NT, packed.segments_NT, packed.mask_NT)
