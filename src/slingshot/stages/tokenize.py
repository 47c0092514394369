"""A corpus as token shards, written once for any number of runs that read them (data/shards.py).

Documents are streamed: memory holds a batch of them, and the shards that are being filled. A new tokenizer is trained
on a sample, if the corpus is large. Held out is what has a SHA-256 below a threshold, so that copies of a text never
stand on both sides.

    slingshot tokenize text=corpus.parquet vocab_size=32768 --out runs/corpus
"""

from __future__ import annotations

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from slingshot.base.config import StageConfig
from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.base.progress import Progress
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.load_save import load_tokenizer
from slingshot.data.corpora import corpus_size, read_corpus
from slingshot.data.shards import INDEX, ShardIndex, ShardWriter
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.checkpointer import Checkpointer, Named
from slingshot.training.interrupts import Interrupts
from slingshot.training.parallel import Parallel

_BATCH = 1 << 21  # characters tokenized at once, on all cores
_SAMPLE = 1 << 26  # bytes of text that a tokenizer is trained on, about; all of a corpus that is smaller


class TokenizeConfig(StageConfig):
    """`heldout`: the share of documents kept for bits per byte. A shard ends with the document that fills it."""

    text: list[str] = Field(min_length=1)  # files, folders, .jsonl, .parquet, "stdlib", package:NAME, dataset:NAME
    text_key: str = "text"  # of a .jsonl or .parquet row
    tokenizer: str | None = None  # of this checkpoint, instead of a new one
    vocab_size: int = Field(32_768, ge=264)
    heldout: float = Field(0.05, ge=0, lt=1)
    shard_tokens: int = Field(1 << 24, ge=1)

    def holds_out(self, text: str) -> bool:
        return _chance(text, 0) < self.heldout


def run(config: TokenizeConfig, out: Path) -> None:
    """Write the shards, their index and the tokenizer's files to `out`; resumes from `out.partial`. With several
    processes the first one does the work."""
    with Parallel.start() as parallel, Checkpointer(out, "tokenize", config, parallel) as work:
        if parallel.is_first:
            _keep_tokenizer(config, work.folder / "tokenizer")
        parallel.barrier()
        tokenizer = load_tokenizer(work.folder / "tokenizer")
        sides = {
            side: ShardWriter(work.folder, side, tokenizer.vocab_size, config.shard_tokens)
            for side in ("tokens", "heldout")
        }
        done = {"documents": 0, "bytes": 0, "heldout_bytes": 0}
        if saved := work.load():
            done = saved.info["done"]
            for side, writer in sides.items():
                writer.resume(saved.info[side], saved.read(side).numpy())

        def state() -> Named:
            waiting = {side: torch.from_numpy(writer.waiting.astype("int32")) for side, writer in sides.items()}
            shards = {side: [shard.model_dump() for shard in writer.shards] for side, writer in sides.items()}
            return waiting, {"done": done, **shards}

        megabytes = max(1, corpus_size(config.text) // 10**6)
        left = itertools.islice(read_corpus(config.text, config.text_key), done["documents"], None)
        begin = done["bytes"] // 10**6
        with Interrupts() as interrupts, Progress(f"{out.name} MB", megabytes, begin, parallel.is_first) as progress:
            for step, texts in enumerate(_batches(left), start=saved.step + 1):
                count = _write(texts, tokenizer, config, sides, done) if parallel.is_first else 0
                work.meter.add(count)
                work.log({"step": step, **done, **work.speed(count)})
                progress.update(done["bytes"] // 10**6)
                work.keep(step, state, stop=interrupts.asked)
            if (read := max(1, done["bytes"] // 10**6)) != megabytes:  # compressed files, or more than text in them
                progress.total = read
                progress.update(progress.total)
        if parallel.is_first:
            for writer in sides.values():
                writer.flush()
            if not sides["tokens"].shards:
                way = f"add text, or lower heldout {config.heldout:g}"
                raise SlingshotError(f"all of the corpus would be held out; {way}")
        files = {side: writer.shards for side, writer in sides.items()}
        kept = {"tokenizer": tokenizer.digest, "eos_id": tokenizer.eos_id, **done, **files}

        def write(folder: Path) -> None:
            for shard in (*files["tokens"], *files["heldout"]):
                _link(work.folder / shard.file, folder / shard.file)
            tokenizer.save(folder)
            write_json(folder / INDEX, ShardIndex.parse(kept).model_dump())

        counts = {side: sum(shard.tokens for shard in shards) for side, shards in files.items()}
        work.finish(write, {"train_tokens": counts["tokens"], "heldout_tokens": counts["heldout"], **done})


def _keep_tokenizer(config: TokenizeConfig, folder: Path) -> None:
    """The tokenizer of a checkpoint or a new one, in a folder of the work begun, where it may be already."""
    if not (folder / "tokenizer_config.json").exists():  # which is written last
        tokenizer = load_tokenizer(locate(config.tokenizer)) if config.tokenizer else _train(config)
        if (
            tokenizer.eos_id is None
            or tokenizer.eos_id in tokenizer.begin_ids
            or (tokenizer.eos_id not in tokenizer.control_ids)
        ):
            what = "the tokenizer has no eos token of its own to end documents with"
            raise SlingshotError(f"{what}; leave `tokenizer` out to train one")
        tokenizer.save(folder)


def _train(config: TokenizeConfig) -> Tokenizer:
    share = min(1.0, _SAMPLE / max(1, corpus_size(config.text)))

    def sample() -> Iterator[str]:
        taken = 0
        for text in read_corpus(config.text, config.text_key):
            if not config.holds_out(text) and _chance(text, 1) < share:
                yield text
                taken += len(text)
                if taken > 2 * _SAMPLE:  # of a compressed file, whose size says little
                    return

    return Tokenizer.train(sample(), config.vocab_size)


def _chance(text: str, which: int) -> float:
    """One of the numbers in [0, 1) that a text's content draws."""
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[8 * which : 8 * which + 8]) / 2.0**64


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _write(
    texts: list[str], tokenizer: Tokenizer, config: TokenizeConfig, sides: dict[str, ShardWriter], done: dict[str, Any]
) -> int:
    """Put documents into shards and count them into `done`; returns their tokens."""
    total = 0
    for text, document in zip(texts, tokenizer.encode_documents(texts), strict=True):
        heldout, size = config.holds_out(text), len(text.encode(errors="surrogatepass"))
        sides["heldout" if heldout else "tokens"].add(document)
        done["documents"] += 1
        done["bytes"] += size
        done["heldout_bytes"] += size * heldout
        total += len(document)
    return total


def _link(file: Path, other: Path) -> None:
    """The file at a second place, so that a kill leaves it at the first; a copy where there are no links."""
    try:
        os.link(file, other)
    except OSError:
        shutil.copyfile(file, other)
