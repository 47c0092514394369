"""Steps of few tokens on a GPU: what the network does is recorded once for each size of step, then replayed at once.

    reason = GraphRunner.obstacle(model, cache) # None, or what cannot be recorded
    runner = GraphRunner(model, cache)
    output = runner.forward(batch)

A graph has fixed shapes and addresses. So a step is rounded up to a `Bucket`: tokens and pages to powers of two, its
numbers copied into the bucket's own memory by one transfer that nobody waits for. Every token is a row by itself, with
its sequence's pages and a mask that ends at its position: rows that decode, their drafts and short pieces of prompts
are all alike. Rows of padding are token 0 at position 0 of page 0, nobody's. Larger steps run as TorchRunner's.

Where nothing can be recorded (a CPU, for which this is slower than TorchRunner) the same operations are run as they
come. Suffixes: N rows, P pages of each, U = P PAGE tokens there, F = N (3 + P) numbers of a step, G key heads, Z = N G,
H query heads, W width of queries and keys, V of values, D model width, L MoE layers, k experts a token.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slingshot.engine.batch import PAGE, FlatBatch, RunnerOutput
from slingshot.engine.kv_cache import KVCache
from slingshot.engine.runner import TorchRunner
from slingshot.kernels.attention import attend_short, bias_of
from slingshot.model.context import Context
from slingshot.model.dispatch import FEW, LocalDispatcher
from slingshot.model.rope import rotary
from slingshot.model.transformer import Transformer

PIECE = 8  # tokens of one sequence at most: each of them gathers its sequence's pages
LEAST_PAGES = 8  # of a bucket: below, the gathering costs nothing
GATHERED = 1 << 30  # bytes at most that a layer gathers; such a step keeps a GPU busy, recorded or not

Hidden = tuple[Tensor, Tensor | None]  # hidden_ND and, of the main model with MoE layers, the experts chosen [N, L, k]


class RowsContext(Context):
    """Attention of N rows over a KVCache, made of tensors alone: nothing depends on a number that the host would have
    to know. `inputs_F`: token ids, positions and slots of the rows, then their block tables."""

    absorb = True

    def __init__(self, cache: KVCache, tables: tuple[Tensor, Tensor], rows: int, inputs_F: Tensor) -> None:
        self._cache = cache
        self.token_ids_N, positions_N, self._slots_N = inputs_F[: 3 * rows].view(3, rows)
        self.cos_XR, self.sin_XR = (table.index_select(0, positions_N) for table in tables)
        tokens_PT = torch.arange(PAGE, device=inputs_F.device) + inputs_F[3 * rows :, None] * PAGE
        tokens_NU = tokens_PT.view(rows, -1)
        self._mask_N1U = (torch.arange(tokens_NU.shape[1], device=inputs_F.device) <= positions_N[:, None])[:, None]
        self._bias_Z1U: Tensor | None = None  # the mask as numbers of the queries' type
        self._groups = cache.keys[0].shape[2] if cache.keys else 1
        heads_G1 = torch.arange(self._groups, device=inputs_F.device)[:, None]
        self._places = (tokens_NU[:, None] * self._groups + heads_G1).flatten()  # of a head's numbers in the cache

    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        if isinstance(v_XGV, int):
            k_ZUW = self._written(self._cache.entries[layer], k_XGW)
            v_ZUV = k_ZUW[..., :v_XGV]
        else:
            k_ZUW = self._written(self._cache.keys[layer], k_XGW)
            v_ZUV = self._written(self._cache.values[layer], v_XGV)
        if self._bias_Z1U is None:
            self._bias_Z1U = bias_of(self._mask_N1U, self._groups, q_XHW.dtype)
        q_ZMW = q_XHW.unflatten(1, (self._groups, -1)).flatten(0, 1)  # heads that share a key head: M queries
        bias_ZMU = self._bias_Z1U.expand(-1, q_ZMW.shape[1], -1)
        y_ZMV = attend_short(q_ZMW.unsqueeze(2), k_ZUW.unsqueeze(2), v_ZUV.unsqueeze(2), bias_ZMU, scale)
        return y_ZMV.view(*q_XHW.shape[:2], -1)

    def _written(self, held: Tensor, fresh_NGW: Tensor) -> Tensor:
        """Put the rows' own in; -> what each row may look at. A head's lie side by side, as products want them."""
        held.flatten(0, 1).flatten(1).index_copy_(0, self._slots_N, fresh_NGW.flatten(1).to(held.dtype))
        found = held.view(-1, held.shape[-1]).index_select(0, self._places)
        return found.view(len(fresh_NGW) * self._groups, -1, held.shape[-1]).to(fresh_NGW.dtype)


@dataclass
class Bucket:
    """Steps of one size: where their numbers go (`hidden_ND`: what the MTP module continues from), and what is done
    with them. recorded: the graph, and where its results are; None where it is not recorded."""

    rows: int
    pages: int
    inputs_F: Tensor
    hidden_ND: Tensor | None
    work: Callable[[], Hidden]
    recorded: tuple[torch.cuda.CUDAGraph, Hidden] | None = None

    def fill(self, batch: FlatBatch, hidden_ND: Tensor | None) -> None:
        """With a step's numbers; the rest is padding."""
        rows, count = self.rows, len(batch.token_ids_N)
        memory_F = torch.zeros(self.inputs_F.shape, dtype=torch.int64, pin_memory=self.inputs_F.is_cuda)
        host_F = memory_F.numpy()
        for place, numbers in enumerate((batch.token_ids_N, batch.positions_N, batch.slots_N)):
            host_F[place * rows : place * rows + count] = numbers.numpy()
        tables_SP, counts_S = batch.block_tables[:, : self.pages].numpy(), np.diff(batch.starts.numpy())
        tables_NP = host_F[3 * rows :].reshape(rows, self.pages)
        tables_NP[:count, : tables_SP.shape[1]] = np.repeat(tables_SP, counts_S, axis=0)
        self.inputs_F.copy_(memory_F, non_blocking=True)
        if self.hidden_ND is not None and hidden_ND is not None:
            self.hidden_ND[:count] = hidden_ND

    def run(self) -> Hidden:
        if self.recorded is None:
            return self.work()
        graph, results = self.recorded
        graph.replay()
        return results


class GraphRunner(TorchRunner):
    """Runs the model over the cache's pages; see the Runner protocol."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        super().__init__(model, cache)
        longest = min(model.config.max_position_embeddings, cache.pages * PAGE)
        self._rotary = rotary(model.config, torch.arange(longest, device=self._device))
        self._records = self._device.type == "cuda"
        self._forget()

    @staticmethod
    def obstacle(model: Transformer, cache: KVCache) -> str | None:
        """Why this model's steps over this cache cannot be recorded."""
        if cache.form != "auto":
            return f"the cache holds {cache.form}"
        if any(hasattr(parameter, "to_local") for parameter in model.parameters()):
            return "weights are spread over several devices"
        if any(not isinstance(layer.dispatcher, LocalDispatcher) for layer in model.moe_layers()):
            return "experts are spread over several devices"
        return None

    def refresh(self) -> None:
        """Graphs read the weights where they are: they stay while those do."""
        if self._addresses != self._addresses_now():
            self._forget()

    def forward(self, batch: FlatBatch) -> RunnerOutput:
        bucket = self._bucket(batch, drafting=False)
        return super().forward(batch) if bucket is None else self._output(batch, *self._run(bucket, batch))

    def draft(self, batch: FlatBatch, hidden_ND: Tensor) -> RunnerOutput:
        bucket = self._bucket(batch, drafting=True)
        if bucket is None:
            return super().draft(batch, hidden_ND)
        return self._output(batch, *self._run(bucket, batch, hidden_ND))

    def _bucket(self, batch: FlatBatch, drafting: bool) -> Bucket | None:
        """What holds the batch; None where it is too large."""
        config, count = self._model.config, len(batch.token_ids_N)
        rows = 1 << (count - 1).bit_length()
        pages = max(LEAST_PAGES, 1 << (-(-int(batch.lengths.max()) // PAGE) - 1).bit_length())
        gathered = rows * pages * PAGE * config.cache_width * self._cache.dtype.itemsize
        if rows > FEW or int(batch.starts.diff().max()) > PIECE or gathered > GATHERED:
            return None
        if (found := self._buckets.get((rows, pages, drafting))) is not None:
            return found
        inputs_F = torch.zeros(rows * (3 + pages), dtype=torch.int64, device=self._device)
        hidden_ND = self._empty_hidden(rows) if drafting else None

        def work() -> Hidden:
            context = RowsContext(self._cache, self._rotary, rows, inputs_F)
            if hidden_ND is not None:
                return self._drafted(context.token_ids_N, context, hidden_ND), None
            return self._hidden(context.token_ids_N, context, routing=config.n_moe_layers > 0)

        made = self._buckets[rows, pages, drafting] = Bucket(rows, pages, inputs_F, hidden_ND, work)
        return made

    def _run(self, bucket: Bucket, batch: FlatBatch, hidden_ND: Tensor | None = None) -> Hidden:
        bucket.fill(batch, hidden_ND)
        if self._records and bucket.recorded is None:
            self._record(bucket)
        return bucket.run()

    def _record(self, bucket: Bucket) -> None:
        """The bucket's work, which it does on the way (twice: libraries make ready at the first); what it writes to the
        cache is the step's own."""
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream(self._device))
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    bucket.work()
                # What other threads ask of the device meanwhile is none of this graph's business.
                with torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"):
                    results = bucket.work()
        except RuntimeError as error:
            warnings.warn(f"the engine runs without CUDA graphs: {str(error).splitlines()[0]}", stacklevel=2)
            self._records = False
        else:
            bucket.recorded = graph, results
        torch.cuda.current_stream(self._device).wait_stream(stream)

    def _empty_hidden(self, rows: int) -> Tensor:
        dtype = self._model.compute_dtype or self._model.model.embed_tokens.weight.dtype
        return torch.zeros(rows, self._model.config.hidden_size, dtype=dtype, device=self._device)

    def _forget(self) -> None:
        self._buckets: dict[tuple[int, int, bool], Bucket] = {}
        self._addresses = self._addresses_now()
        if self._records:
            self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(self._device)

    def _addresses_now(self) -> list[int]:
        return [parameter.data_ptr() for parameter in self._model.parameters()]
