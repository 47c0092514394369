"""Supervised fine-tuning on prompts with reasoning and answer: R1's cold start, SFT from the base, and distillation.

Examples come from JSONL datasets (their forms: data/examples.py) or are written by tasks that can. Loss on the response
only; MTP is trained along (arXiv 2501.12948, 2.3 and 2.4).

    slingshot sft --config sft.toml --out runs/sft
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.progress import Progress
from slingshot.checkpoint.frozen import load_frozen
from slingshot.checkpoint.load_save import load_model, load_tokenizer
from slingshot.cost.flops import training_parts
from slingshot.data.examples import Conversation, Example, read_examples
from slingshot.data.mixing import epoch_order
from slingshot.machine.device import Dtype
from slingshot.quantization.fp8_product import FP8Scaling
from slingshot.rollout.rollout import PromptForm
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import TaskMix
from slingshot.tasks.task import Problem
from slingshot.text.reasoning import before_reasoning, encode_answers, encode_responses, ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer
from slingshot.text.turns import encode_conversation
from slingshot.training.batch import Rows
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.fp8_training import train_in_fp8
from slingshot.training.interrupts import Interrupts
from slingshot.training.language_model import LanguageModelLoss, MemoryConfig, language_model_step
from slingshot.training.lora import LoRAConfig, add_lora
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule
from slingshot.training.parallel import Parallel

Marked = tuple[list[int], list[int]]  # ids, and a mask: 1 on those that are learnt


class SFTConfig(StageConfig):
    """`data` are dataset folders or .jsonl files; `tasks` write `examples` worked solutions in `style` besides.

    Examples without reasoning learn to answer behind an empty think block, or with `no_reasoning` "none" without any.
    """

    model: str
    data: list[str] = []
    tasks: list[TaskConfig] = []
    examples: int = Field(0, ge=0)
    style: Literal["answer", "steps", "slips"] = "steps"
    no_reasoning: Literal["empty", "none"] = "empty"
    form: PromptForm = PromptForm()
    epochs: int = Field(2, ge=1)
    sequence_length: int = Field(256, ge=8)
    batch_size: int = Field(16, ge=1)  # rows of `sequence_length`, over all ranks
    micro_batch_size: int = Field(16, ge=1)
    memory: MemoryConfig = MemoryConfig()
    expert_parallel: int = Field(1, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LanguageModelLoss = LanguageModelLoss()
    lora: LoRAConfig | None = None
    dtype: Dtype = "auto"
    fp8: FP8Scaling | None = None

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.data and not (self.tasks and self.examples):
            raise ValueError("no examples: give data = [...], or tasks = [...] with examples = N")
        if self.lora is not None and self.fp8 is not None:
            raise ValueError("fp8: with lora the matrices that it is for are frozen; leave one of them out")
        return self


def run(config: SFTConfig, out: Path) -> None:
    """Fine-tune `config.model` and write a checkpoint to `out`; resumes from `out.partial`."""
    with Parallel.start(config.expert_parallel) as parallel, Checkpointer(out, "sft", config, parallel) as work:
        source = work.reads[config.model]
        model = load_frozen(source, parallel.device) if config.lora else load_model(
            source, device=parallel.device, shard=parallel.shard
        )  # fmt: skip
        tokenizer = load_tokenizer(source)
        longest = min(config.sequence_length, model.config.max_position_embeddings)
        examples, dropped = fitting(encode(read(config), tokenizer, config), longest)
        if dropped and parallel.is_first:
            given = f"{dropped} of {dropped + len(examples)} examples"
            print(f"{out.name}: {given} are longer than {longest} tokens and left out", file=sys.stderr)
        size, batches = config.batch_size, []
        for rows in (rows_of_epoch(examples, config, epoch) for epoch in range(config.epochs)):
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]

        model.compute_dtype = work.dtype
        train_in_fp8(model, config.fp8)
        passed = add_lora(model, config.lora, config.seed, parallel)
        if config.lora is not None:  # else it is sharded as it is loaded
            parallel.shard(model)
        config.memory.apply(model)
        optimizer = Optimizer(model, config.optimizer)
        saved = work.load()
        restore(saved, model, optimizer)

        with Interrupts() as interrupts, Progress(out.name, len(batches), saved.step, parallel.is_first) as progress:
            for step in range(saved.step, len(batches)):
                rows = batches[step].shard(parallel)
                losses = language_model_step(model, rows, config.loss, config.micro_batch_size, parallel)
                lr = schedule(config.optimizer, step, len(batches))
                norm = optimizer.step(lr)

                parts = training_parts(model.config, rows.lengths(), config.loss.mtp > 0, passed)
                work.meter.add(rows.n_tokens, **parts)
                speed = work.speed(batches[step].n_tokens)
                clocks = {"lr": lr * config.optimizer.lr, "gradient_norm": norm, **speed}
                work.log({"step": step + 1, **losses.logged(), **clocks})
                progress.update(step + 1, loss=losses.loss, **{"tokens/s": speed["tokens_per_second"]})
                work.keep(step + 1, lambda: work.training_state(model, optimizer), stop=interrupts.asked)

        extra = {"examples": len(examples)} | ({"dropped": dropped} if dropped else {})
        work.finish_checkpoint(model, tokenizer, source, extra)


def read(config: SFTConfig) -> list[Example | Conversation]:
    """Every example, of files and then of tasks."""
    examples = [example for source in config.data for example in read_examples(Path(source))]
    if config.tasks:
        rng = random.Random(f"solutions/{config.seed}")
        for item in TaskMix(config.tasks, "train", f"solutions/{config.seed}", repeat=False).draw(0, config.examples):
            if item.task.tools:
                way = "leave its `tools` to pretrain and rl"
                raise SlingshotError(f"{item.task.name}: sft writes no calls of tools; {way}")
            if not item.task.has_solutions:
                way = "leave `examples` out" if config.data else "give data = [...] instead"
                raise SlingshotError(f"the task {item.task.name} writes no worked solutions; {way}")
            solution = item.task.solution(item.problem, config.style, rng)
            examples.append(Example(item.problem.prompt, solution.reasoning, solution.answer))
    if not examples:
        raise SlingshotError(f"{', '.join(config.data)}: no examples; did any sample pass the verifier?")
    return examples


def encode(examples: Sequence[Example | Conversation], tokenizer: Tokenizer, config: SFTConfig) -> list[Marked]:
    """Ids of every example and which of them are learnt, in order: single turns, then conversations.

    A conversation that this tokenizer's model sampled is learnt by its ids, and another by what was said.
    """
    marked = _single_turns([each for each in examples if isinstance(each, Example)], tokenizer, config)
    for each in examples:
        if isinstance(each, Conversation) and each.ids and each.tokenizer == tokenizer.digest:
            marked.append((each.ids, each.mask))
        elif isinstance(each, Conversation):
            silent = config.no_reasoning == "none"
            marked.append(encode_conversation(tokenizer, each.messages, each.tools, silent))
    return marked


def _single_turns(examples: Sequence[Example], tokenizer: Tokenizer, config: SFTConfig) -> list[Marked]:
    prompts = []
    for example in examples:
        if isinstance(example.prompt, str):
            prompts.append(config.form.encode(tokenizer, Problem(prompt=example.prompt, key=example.prompt)))
            continue
        try:
            prompts.append(tokenizer.encode_chat(example.prompt))
        except SlingshotError as error:
            raise SlingshotError(f"the example {example.prompt!r:.120}: {error}") from error
    silent = {i for i, example in enumerate(examples) if example.reasoning is None and config.no_reasoning == "none"}
    opened = {i for i, prompt in enumerate(prompts) if ends_in_reasoning(prompt, tokenizer)}
    responses: dict[int, list[int]] = {}
    for is_opened in (False, True):
        places = [i for i in range(len(examples)) if i not in silent and (i in opened) == is_opened]
        texts = [(examples[i].reasoning or "", examples[i].answer) for i in places]
        responses |= zip(places, encode_responses(tokenizer, texts, is_opened), strict=True)
    places = sorted(silent)
    responses |= zip(places, encode_answers(tokenizer, [examples[i].answer for i in places]), strict=True)
    for i in silent & opened:
        prompts[i] = before_reasoning(prompts[i], tokenizer)
    return [(p + responses[i], [0] * len(p) + [1] * len(responses[i])) for i, p in enumerate(prompts)]


def fitting(examples: Sequence[Marked], longest: int) -> tuple[list[Marked], int]:
    """The examples of at most `longest` tokens, and how many are left out; SlingshotError when those are most."""
    kept = [(ids, mask) for ids, mask in examples if len(ids) <= longest]
    dropped = len(examples) - len(kept)
    if dropped > len(kept):
        most = max(len(ids) for ids, _ in examples)
        way_out = "raise sequence_length (as far as max_position_embeddings allow) or give shorter examples"
        lengths = f"longer than {longest} tokens, the longest has {most}"
        raise SlingshotError(f"{dropped} of {len(examples)} examples are {lengths}; {way_out}")
    return kept, dropped


def rows_of_epoch(examples: Sequence[Marked], config: SFTConfig, epoch: int) -> Rows:
    """Rows of one epoch, examples in an order of its own; targets are the responses."""
    order = epoch_order(len(examples), config.seed, epoch)
    return Rows.of_examples([examples[i] for i in order], config.sequence_length)
