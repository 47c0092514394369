"""Pre-training: corpus, tokenizer, and the DeepSeek-V3 recipe (arXiv 2412.19437) at any size; from scratch, or on from
a checkpoint, whose context YaRN makes longer.

The corpus is tasks' own worked documents of the train split, real text, or both; or token shards, which need not fit
into memory. Documents are packed to a fixed length and attention stays within each. A multi-token prediction module is
trained along; routers are balanced by their biases.

    slingshot pretrain --config pretrain.toml --out runs/base
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from slingshot.base.config import StageConfig, Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.progress import Progress
from slingshot.checkpoint.load_save import load_tokenizer, load_weights, open_weights
from slingshot.cost.flops import training_parts
from slingshot.data.corpora import read_corpus, split_documents
from slingshot.data.mixing import epoch_order
from slingshot.data.packing import pack, strided
from slingshot.machine.device import Dtype
from slingshot.model.config import ModelConfig, Yarn
from slingshot.model.transformer import Transformer
from slingshot.quantization.fp8_product import FP8Scaling
from slingshot.stages.tool_documents import ToolDocument
from slingshot.tasks.loader import TaskConfig
from slingshot.tasks.mixture import passes
from slingshot.tasks.task import Style
from slingshot.text.pretokenizers import DEFAULT_SPLIT, SPLIT_OF_MODEL_TYPE
from slingshot.text.reasoning import encode_responses
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.batch import Rows
from slingshot.training.checkpointer import Checkpointer, restore
from slingshot.training.fp8_training import train_in_fp8
from slingshot.training.interrupts import Interrupts
from slingshot.training.language_model import LanguageModelLoss, MemoryConfig, evaluate_loss, language_model_step
from slingshot.training.optimizer import Optimizer, OptimizerConfig, schedule, update_router_biases
from slingshot.training.parallel import Parallel
from slingshot.training.shard_corpus import ShardCorpus

Share = Annotated[float, Field(gt=0)]


class WrittenTask(TaskConfig):
    """A task that writes documents, in `styles` of its own where it has some."""

    styles: dict[Style, Share] = {}


class Documents(Strict):
    """Documents written by tasks: how many, in which styles, and how many of them as a chat in R1's template.

    In style "calls" a task's tools are asked (docs/tools.md); those documents are chats, all of them. `weight`: their
    share of the rows beside shards.
    """

    tasks: list[WrittenTask] = Field(min_length=1)
    count: int = Field(ge=1)
    styles: dict[Style, Share] = Field({"answer": 0.6, "steps": 0.3, "slips": 0.1}, min_length=1)
    template_share: float = Field(0.25, ge=0, le=1)
    language_mix: float = Field(0.2, ge=0, le=1)
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _calls_have_tools(self) -> Self:
        for task in self.tasks:
            if "calls" in (task.styles or self.styles) and not task.tools:
                way = 'give it tools = ["calculator"], or styles of its own'
                raise ValueError(f"{task.name} has no tools to call in style calls; {way}")
        return self

    def counts(self, task: WrittenTask) -> dict[Style, int]:
        """How many documents a task writes in each style."""
        styles = task.styles or self.styles
        total = sum(each.weight for each in self.tasks) * sum(styles.values())
        return {style: round(self.count * task.weight * share / total) for style, share in styles.items()}


class ShardSource(Strict):
    """A folder of token shards, and its share of the rows where several are mixed. A text is its path."""

    path: str
    weight: float = Field(1.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _by_path(cls, given: Any) -> Any:
        return {"path": given} if isinstance(given, str) else given


class PretrainConfig(StageConfig):
    """`model` holds ModelConfig's fields, or names a preset; the vocabulary follows from the tokenizer. With `start`
    it is a checkpoint that is trained on: its architecture, weights and tokenizer, `yarn` in addition."""

    model: dict[str, Any] = {}
    start: str | None = None
    yarn: Yarn | None = None
    documents: Documents | None = None
    text: list[str] = []  # files, folders, .jsonl, .parquet, "stdlib", package:NAME, dataset:NAME
    text_key: str = "text"  # of a .jsonl or .parquet row
    shards: list[ShardSource] = []  # what the stage tokenize wrote, instead of text
    tokenizer: str | None = None  # of this checkpoint, instead of a new one
    vocab_size: int = Field(512, ge=264)
    sequence_length: int = Field(256, ge=8)
    batch_size: int = Field(32, ge=1)  # rows of `sequence_length`, over all ranks
    micro_batch_size: int = Field(32, ge=1)
    memory: MemoryConfig = MemoryConfig()
    expert_parallel: int = Field(1, ge=1)
    steps: int = Field(1000, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig()
    loss: LanguageModelLoss = LanguageModelLoss()
    bias_update_speed: float = Field(1e-3, ge=0)
    bias_frozen_share: float = Field(0.05, ge=0, le=1)  # of the steps, at the end (arXiv 2412.19437, 4.2)
    dtype: Dtype = "auto"
    fp8: FP8Scaling | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _by_name(cls, model: Any) -> Any:
        return {"preset": model} if isinstance(model, str) else model

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.shards and (self.text or self.tokenizer):
            raise ValueError("shards bring a tokenizer, and text beside them goes into shards of its own")
        if len({source.path for source in self.shards}) < len(self.shards):
            raise ValueError("shards: one folder is named twice; give it a weight")
        if not (self.shards or self.documents or self.text):
            raise ValueError("a corpus is needed: give [documents], text = [...], or both, or shards = [...]")
        if bool(self.model) == bool(self.start):
            raise ValueError("give model = {...} for a new one, or start = CHECKPOINT to go on from one, and not both")
        if self.start and self.tokenizer:
            raise ValueError("start brings its tokenizer; leave `tokenizer` out")
        if self.yarn and not self.start:
            raise ValueError("yarn makes the context of a checkpoint longer; name it: start = CHECKPOINT")
        if self.model and (trouble := self._too_long(self.shape(self.vocab_size))):
            raise ValueError(trouble)
        return self

    def shape(self, vocab_size: int) -> ModelConfig:
        """The model's config for a tokenizer of this size. SlingshotError where it is a checkpoint's, and its context
        shorter than rows are."""
        if self.start is None:
            return ModelConfig.parse({**self.model, "vocab_size": vocab_size}, "model")
        config = open_weights(self.start).config.stored_as(None)
        if self.yarn is not None:
            config = self.yarn.extended(config, self.start)
        if trouble := self._too_long(config):
            raise SlingshotError(f"{self.start}: {trouble}; give yarn = {{ factor = ... }} to extend it")
        return config

    def _too_long(self, config: ModelConfig) -> str | None:
        given, longest = self.sequence_length, config.max_position_embeddings
        if given <= longest:
            return None
        return f"sequence_length {given} is beyond the model's max_position_embeddings {longest}"


def run(config: PretrainConfig, out: Path) -> None:
    """Train and write a checkpoint to `out`; resumes from `out.partial`."""
    with Parallel.start(config.expert_parallel) as parallel, Checkpointer(out, "pretrain", config, parallel) as work:
        corpus = _open_shards(config) if config.shards else prepare(config)
        model_config = config.shape(corpus.tokenizer.vocab_size)
        model = Transformer.empty(model_config, parallel.device, shard=parallel.shard)
        if config.start is None:
            model.init_weights(torch.Generator().manual_seed(config.seed))
        else:
            load_weights(model, open_weights(config.start))
        model.compute_dtype = work.dtype
        train_in_fp8(model, config.fp8)
        config.memory.apply(model)
        optimizer = Optimizer(model, config.optimizer)
        saved = work.load()
        restore(saved, model, optimizer)

        with Interrupts() as interrupts, Progress(out.name, config.steps, saved.step, parallel.is_first) as progress:
            for step in range(saved.step, config.steps):
                batch = corpus.batch(step, config.batch_size)
                rows = batch.shard(parallel)
                losses = language_model_step(model, rows, config.loss, config.micro_batch_size, parallel)
                lr = schedule(config.optimizer, step, config.steps)
                norm = optimizer.step(lr)
                if step < config.steps * (1 - config.bias_frozen_share):
                    update_router_biases(model, losses.load_LE, config.bias_update_speed)

                work.meter.add(rows.n_tokens, **training_parts(model_config, rows.lengths(), mtp=config.loss.mtp > 0))
                speed = work.speed(batch.n_tokens)
                clocks = {"lr": lr * config.optimizer.lr, "gradient_norm": norm, **speed}
                work.log({"step": step + 1, **losses.logged(), **clocks})
                progress.update(step + 1, loss=losses.loss, **{"tokens/s": speed["tokens_per_second"]})
                work.keep(step + 1, lambda: work.training_state(model, optimizer), stop=interrupts.asked)

        extra = corpus.account(config.steps * config.batch_size)
        if corpus.heldout_bytes:
            pieces = (rows.shard(parallel) for rows in corpus.heldout)
            nats = sum(evaluate_loss(model, rows, config.micro_batch_size, parallel) for rows in pieces)
            extra["bits_per_byte"] = nats / math.log(2) / corpus.heldout_bytes
        source = None if config.start is None else work.reads[config.start]
        work.finish_checkpoint(model, corpus.tokenizer, source, extra)


def _open_shards(config: PretrainConfig) -> ShardCorpus:
    weights = {Path(source.path): source.weight for source in config.shards}
    corpus = ShardCorpus.open(weights, config.sequence_length, config.seed)
    if config.start and corpus.tokenizer.digest != load_tokenizer(config.start).digest:
        way_out = f'tokenize the text with tokenizer = "{config.start}"'
        what = f"{config.shards[0].path} was written by another tokenizer than {config.start}'s"
        raise SlingshotError(f"{what}; {way_out}")
    corpus.tokenizer.check_split(config.shape(config.vocab_size).model_type)
    if config.documents is None:
        return corpus
    written_NT = pack(_encode(corpus.tokenizer, _written(config)), config.sequence_length)
    return corpus.beside(*written_NT, config.documents.weight)


@dataclass
class PackedCorpus:
    """The tokenizer, the rows to train on, and held-out rows with their bytes where the corpus is real text."""

    tokenizer: Tokenizer
    tokens_NT: np.ndarray
    segments_NT: np.ndarray
    seed: int = 0
    heldout: Sequence[Rows] = ()
    heldout_bytes: int = 0

    def batch(self, step: int, size: int) -> Rows:
        """The rows of one global step of `size` rows: every epoch in an order of its own."""
        epoch, index = divmod(step, len(self.tokens_NT) // size)
        order = epoch_order(len(self.tokens_NT), self.seed, epoch)
        chosen = np.sort(order[index * size : (index + 1) * size])
        return Rows.of(self.tokens_NT[chosen], self.segments_NT[chosen])

    def account(self, rows: int) -> dict[str, Any]:
        """For the receipt: tokens, and how many times as many rows go through them."""
        return {"corpus_tokens": int((self.segments_NT > 0).sum()), "epochs": rows / len(self.tokens_NT)}


def prepare(config: PretrainConfig) -> PackedCorpus:
    """Write, read, tokenize and pack what the config asks for, in memory."""
    written = _written(config) if config.documents else []
    train_text, heldout_text = split_documents(read_corpus(config.text, config.text_key))
    model_type = config.shape(config.vocab_size).model_type
    if brought := config.start or config.tokenizer:
        tokenizer = load_tokenizer(brought)
        tokenizer.check_split(model_type)
    else:
        first = written[:20_000]
        tools = [tool for each in first if isinstance(each, ToolDocument) for tool in each.tools]
        sample = [part for each in first for part in (each.texts if isinstance(each, ToolDocument) else each)]
        sample += [json.dumps(tool, ensure_ascii=False) for tool in tools] + train_text
        split = SPLIT_OF_MODEL_TYPE.get(model_type, DEFAULT_SPLIT)
        tokenizer = Tokenizer.train(sample, config.vocab_size, split, tools=bool(tools))
    documents = _encode(tokenizer, written) + tokenizer.encode_documents(train_text)
    random.Random(f"order/{config.seed}").shuffle(documents)
    tokens_NT, segments_NT = pack(documents, config.sequence_length)
    if len(tokens_NT) < config.batch_size:
        rows = f"{len(tokens_NT)} rows of {config.sequence_length} tokens, fewer than one batch of {config.batch_size}"
        raise SlingshotError(f"the corpus fills {rows}; add text or lower batch_size")
    corpus = PackedCorpus(tokenizer, tokens_NT, segments_NT, config.seed)
    if heldout_text:
        windows = list(strided(tokenizer.encode_documents(heldout_text), config.sequence_length))
        corpus.heldout = [Rows.of_examples(windows, config.sequence_length)]
        corpus.heldout_bytes = sum(len(text.encode()) for text in heldout_text)
    return corpus


def _written(config: PretrainConfig) -> list[tuple[str, ...] | ToolDocument]:
    """Documents of the tasks' train split: (text,) plain, or (prompt, reasoning, answer) for the chat template."""
    documents = config.documents
    assert documents is not None
    rng = random.Random(f"documents/{config.seed}")
    pieces: list[tuple[str, ...] | ToolDocument] = []
    for spec in documents.tasks:
        task = spec.load()
        if not task.has_solutions:
            raise SlingshotError(f"documents: the task {spec.name} writes no worked solutions; give text instead of it")
        for style, count in documents.counts(spec).items():
            problems = passes(task, "train", f"documents/{config.seed}")  # the same ones at a glance and worked out
            for problem in islice(problems, count):
                solution = task.write(problem, style, rng, documents.language_mix)
                chat = rng.random() < documents.template_share
                if task.tools and (chat or solution.calls):
                    pieces.append(ToolDocument.write(task, problem, solution))
                elif chat:
                    pieces.append((problem.prompt, solution.reasoning, solution.answer))
                else:
                    pieces.append(("\n".join(filter(None, (problem.prompt, solution.reasoning, solution.answer))),))
    rng.shuffle(pieces)
    return pieces


def _encode(tokenizer: Tokenizer, written: Sequence[tuple[str, ...] | ToolDocument]) -> list[list[int]]:
    with_tools = [document.encode(tokenizer) for document in written if isinstance(document, ToolDocument)]
    documents = [document for document in written if not isinstance(document, ToolDocument)]
    plain = [document[0] for document in documents if len(document) == 1]
    chats = [document for document in documents if len(document) == 3]
    prompts = [tokenizer.encode_chat([{"role": "user", "content": prompt}]) for prompt, _, _ in chats]
    responses = encode_responses(tokenizer, [(reasoning, answer) for _, reasoning, answer in chats], opened=True)
    asked = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return tokenizer.encode_documents(plain) + asked + with_tools
