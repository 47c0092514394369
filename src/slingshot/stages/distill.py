"""On-policy distillation: the student writes, a teacher says at every token what it would have (arXiv 2306.13649).

Every step draws problems, samples the student's responses, and lowers the divergence of its next-token distribution
from the teacher's on these very tokens: reverse KL over the whole vocabulary unless said otherwise. With several
teachers each problem goes to the one that names its task, and so specialists become one model. The rewards are logged
and teach nothing. MTP modules and the biases of routers stay as they are.

    slingshot distill --config distill.toml --out runs/small
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.progress import Progress
from slingshot.checkpoint.frozen import load_frozen
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.flops import forward_flops, training_parts
from slingshot.machine.device import Dtype
from slingshot.model.transformer import Transformer
from slingshot.rollout.rollout import PromptForm, Rollout
from slingshot.rollout.sampler import EngineSampler, Sampler, SamplingConfig
from slingshot.rollout.trajectory import Trajectory, pack, row_shape, sampling_cost
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.verification import VerificationPool
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.distillation import Divergence, distillation_loss, divergences
from slingshot.training.interrupts import Interrupts
from slingshot.training.lora import LoRAConfig, add_lora, merged
from slingshot.training.objectives import targets_ahead
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule
from slingshot.training.parallel import Parallel
from slingshot.training.policy import DocumentSizes


class TeacherConfig(Strict):
    """A teacher's checkpoint, and the tasks whose problems go to it; none named is all that no other teacher names."""

    model: str
    tasks: list[str] = []


class DistillConfig(StageConfig):
    """`max_flops` ends training once this stage has spent as many (sampling and the teachers included)."""

    model: str
    teachers: list[TeacherConfig] = Field(min_length=1)
    tasks: list[TaskConfig] = Field(min_length=1)
    form: PromptForm = PromptForm()
    steps: int = Field(100, ge=1)
    prompts_per_step: int = Field(64, ge=1)
    group_size: int = Field(1, ge=1)
    sampling: SamplingConfig = SamplingConfig()
    optimizer: OptimizerConfig = OptimizerConfig(name="adamw", lr=1e-4, warmup=0.0, decay=0.0, weight_decay=0.0)
    lora: LoRAConfig | None = None
    divergence: Divergence = "reverse"
    beta: float = Field(0.5, gt=0, lt=1)
    top_k: int = Field(0, ge=0)
    micro_batch_size: int = Field(32, ge=1)
    sequence_length: int = Field(256, ge=8)
    max_flops: float | None = Field(None, gt=0)
    dtype: Dtype = "auto"

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.sampling.temperature == 0 or self.sampling.top_p < 1 or self.sampling.top_k > 0:
            way_out = "leave top_p 1, top_k 0, temperature above 0"
            raise ValueError(f"sampling: distill trains the whole distribution; {way_out}")
        known = {task.name for task in self.tasks}
        if others := [name for teacher in self.teachers for name in teacher.tasks if name not in known]:
            raise ValueError(f"teachers: {others[0]} is none of the tasks; they are {', '.join(sorted(known))}")
        for name in known:
            self.teacher_of(name)  # which refuses a task of none or of several
        return self

    def teacher_of(self, task: str) -> int:
        """The teacher that names the task, else the one that names none."""
        named = [index for index, teacher in enumerate(self.teachers) if task in teacher.tasks]
        found = named or [index for index, teacher in enumerate(self.teachers) if not teacher.tasks]
        if len(found) != 1:
            raise ValueError(f"teachers: {len(found)} of them are for the task {task}; name it in one's tasks")
        return found[0]


def run(config: DistillConfig, out: Path, sampler: Sampler | None = None) -> None:
    """Train `config.model` on its own samples as its teachers judge them; write a checkpoint to `out`; resumes."""
    with Parallel.start() as parallel, Checkpointer(out, "distill", config, parallel) as work:
        if parallel.mesh is not None:
            raise SlingshotError("distill: runs in one process; start it without torchrun")
        mix, source = TaskMix(config.tasks, "train", f"distill/{config.seed}"), work.reads[config.model]
        load = load_model if config.lora is None else load_frozen
        model, tokenizer = load(source, device=parallel.device), load_tokenizer(source)
        passed = add_lora(model, config.lora, config.seed, parallel)
        teachers = []
        for teacher in config.teachers:
            path = work.reads[teacher.model]
            network = load_model(path, device=parallel.device).requires_grad_(False)
            same = load_tokenizer(path).description() == tokenizer.description()
            if not same or network.config.vocab_size != model.config.vocab_size:
                raise SlingshotError(f"teachers: {teacher.model} has another tokenizer than {config.model}")
            teachers.append(network)
        sampler = sampler or EngineSampler.beside(model, tokenizer, work.dtype, alone=True)
        pool = VerificationPool(mix.tasks)
        rollout = Rollout(sampler, config.sampling.params(config.group_size, config.seed), config.form, pool, parallel)
        for network in (model, *teachers):
            network.compute_dtype = work.dtype
        optimizer = Optimizer(model, config.optimizer)
        saved = work.load()
        restore(saved, model, optimizer)
        with pool, Interrupts() as interrupts, Progress(out.name, config.steps, saved.step, True) as progress:
            for step in range(saved.step, config.steps):
                if config.max_flops is not None and work.meter.flops >= config.max_flops:
                    break
                sampler.update_weights(step, merged(model))
                groups = rollout.run(mix.draw(step * config.prompts_per_step, config.prompts_per_step))
                each = [trajectory for group in groups for trajectory in group]
                n_tokens = sum(sum(t.mask) for t in each)
                total = 0.0
                for index, judge in enumerate(teachers):
                    own = [t for t in each if config.teacher_of(task_name(config, mix, t)) == index]
                    loss, sizes = distill_step(model, judge, own, n_tokens, config, parallel)
                    total += loss
                    parts = training_parts(model.config, sizes.lengths, False, passed, sizes.before)
                    taught = forward_flops(judge.config, sizes.lengths, before=sizes.before)
                    work.meter.add(0, teacher=taught, **parts)
                factor = schedule(config.optimizer, step, config.steps)
                update: dict[str, float] = {}
                if n_tokens:
                    update = {"loss": total / n_tokens, "gradient_norm": optimizer.step(factor)}
                tokens, flops = sampling_cost(model.config, groups)
                work.meter.add(tokens, sampling=flops)
                row = {
                    "pass_rate": sum(t.scores["accuracy"] for t in each) / max(1, len(each)),
                    "response_tokens": n_tokens / max(1, len(each)),
                }
                speed, lr = work.speed(tokens), config.optimizer.lr * factor
                work.log({"step": step + 1, **row, **update, **rollout.counts, "lr": lr, **speed})
                shown = {"pass": row["pass_rate"], "length": row["response_tokens"]}
                shown |= {"loss": update["loss"]} if update else {}
                progress.update(step + 1, **shown, **{"tokens/s": speed["tokens_per_second"]})
                work.keep(step + 1, lambda: work.training_state(model, optimizer), stop=interrupts.asked)
        rollout.refuse_nothing()
        work.finish_checkpoint(model, tokenizer, source)


def task_name(config: DistillConfig, mix: TaskMix, trajectory: Trajectory) -> str:
    """As the config names the trajectory's task."""
    return next(c.name for c, task in zip(config.tasks, mix.tasks, strict=True) if task is trajectory.item.task)


def distill_step(
    model: Transformer,
    teacher: Transformer,
    trajectories: Sequence[Trajectory],
    n_tokens: int,
    config: DistillConfig,
    parallel: Parallel,
) -> tuple[float, DocumentSizes]:
    """Forward and backward; gradients are of the mean over `n_tokens`.

    Returns the sum over these trajectories, and the sizes of their documents.
    """
    length, micro_batch_size = row_shape(trajectories, config.sequence_length, config.micro_batch_size, parallel, own=1)
    rows, total = pack(trajectories, length, own=1).to(parallel.device), 0.0
    judged = partial(
        divergences, divergence=config.divergence, beta=config.beta, top_k=config.top_k,
        temperature=config.sampling.temperature,
    )  # fmt: skip
    for start in range(0, len(rows), micro_batch_size):
        micro = rows[start : start + micro_batch_size]
        weights_BT = targets_ahead(micro.tokens_BT, micro.segments_BT, micro.mask_BT)[1]
        places_N = weights_BT.flatten().nonzero().squeeze(1)

        def chosen(network: Transformer, micro: Any = micro, places_N: Tensor = places_N) -> Tensor:
            hidden_BTD = network(**micro.documents()).hidden_BTD
            return hidden_BTD.flatten(0, 1).index_select(0, places_N)

        with torch.no_grad():
            teacher_ND = chosen(teacher)
        loss = distillation_loss(chosen(model), model.head, teacher_ND, teacher.head, judged)
        (loss / n_tokens).backward()
        total += float(loss.detach())
    return total, rows.sizes()
