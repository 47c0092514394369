"""Token shards as training takes them: any step's rows by arithmetic, the same for any number of ranks.

corpus = ShardCorpus.open({Path("runs/corpus"): 1.0}, length=256, seed=0)
rows = corpus.batch(step=7, size=32).shard(parallel)
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.load_save import load_tokenizer
from slingshot.cost.receipt import RECEIPT, Receipt, artifact_digest
from slingshot.data.mixing import RowMix
from slingshot.data.packing import Int32, strided
from slingshot.data.shards import TokenShards
from slingshot.text.tokenizer import Tokenizer
from slingshot.training.batch import Rows

_DOCUMENTS = 256  # held out, in memory at once


@dataclass
class ShardCorpus:
    """Shards of one tokenizer, mixed, and rows in memory where some are `written` beside them; `length` tokens each."""

    tokenizer: Tokenizer
    sources: list[TokenShards]
    mix: RowMix
    length: int
    written: tuple[Int32, Int32] | None = None

    @classmethod
    def open(cls, weights: Mapping[Path, float], length: int, seed: int) -> ShardCorpus:
        """Shards by their folders, each with its share of the rows. SlingshotError names what does not fit, and a shard
        that is not what was written: bytes are compared where the folder has changed since its receipt was."""
        sources = [TokenShards.open(folder) for folder in weights]
        for source in sources:
            folder = source.folder
            if not (folder / RECEIPT).exists() or artifact_digest(folder) != Receipt.read(folder).digest:
                source.verify()
        first = sources[0]
        tokenizer = load_tokenizer(first.folder)
        for source in sources:
            if source.index.tokenizer != tokenizer.digest:
                beside = "its tokenizer.json" if source is first else f"{first.folder}'s"
                way_out = "tokenize the text anew, with `tokenizer` where two are to be mixed"
                raise SlingshotError(f"{source.folder} was written by another tokenizer than {beside}; {way_out}")
        mix = RowMix([source.rows(length) for source in sources], list(weights.values()), seed)
        return cls(tokenizer, sources, mix, length)

    def beside(self, tokens_NT: Int32, segments_NT: Int32, weight: float) -> ShardCorpus:
        """The same, these rows mixed in."""
        mix = RowMix([*self.mix.sizes, len(tokens_NT)], [*self.mix.weights, weight], self.mix.seed)
        return replace(self, mix=mix, written=(tokens_NT, segments_NT))

    def batch(self, step: int, size: int) -> Rows:
        """The rows of one global step of `size` rows."""
        sources_N, rows_N = self.mix.rows(step * size, size)
        tokens_NT, segments_NT = (np.empty((size, self.length), dtype=np.int32) for _ in range(2))
        for number in np.unique(sources_N).tolist():
            own = sources_N == number
            if number < len(self.sources):
                tokens_NT[own], segments_NT[own] = self.sources[number].read(rows_N[own], self.length)
            elif self.written is not None:
                tokens_NT[own], segments_NT[own] = (each_NT[rows_N[own]] for each_NT in self.written)
        return Rows.of(tokens_NT, segments_NT)

    @property
    def heldout(self) -> Iterator[Rows]:
        """All that is held out, each token a target once; a few documents at a time."""
        documents = itertools.chain.from_iterable(source.heldout() for source in self.sources)
        while some := list(itertools.islice(documents, _DOCUMENTS)):
            yield Rows.of_examples(list(strided(some, self.length)), self.length)

    @property
    def heldout_bytes(self) -> int:
        return sum(source.index.heldout_bytes for source in self.sources)

    def account(self, rows: int) -> dict[str, Any]:
        """For the receipt: tokens, and how many times as many rows go through each source."""
        names = [*(str(source.folder) for source in self.sources), *["documents"] * (self.written is not None)]
        epochs = dict(zip(names, self.mix.epochs(rows), strict=True))
        tokens = sum(source.tokens for source in self.sources)
        tokens += 0 if self.written is None else int((self.written[1] > 0).sum())
        return {"corpus_tokens": tokens, "epochs": rows / sum(self.mix.sizes), "epochs_of": epochs}
