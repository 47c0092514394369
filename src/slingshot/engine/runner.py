"""The Transformer over pages: the runner for every device, and the reference of the native one.

    runner = TorchRunner(model, KVCache(model.config, pages=100, dtype=torch.float32))
    output = runner.forward(FlatBatch.of([([5, 9, 4], 0, [1])]))

A context writes each token's entry to its slot. Then sequences of about the same size attend together, their pages
gathered into rows; padding repeats a sequence's last query and reads page 0, which masks hide.

Suffixes: N tokens, S sequences, T queries of a sequence, U cached tokens, P pages, H query heads, G key heads, W width
of queries and keys, V of values.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slingshot.engine.batch import PAGE, FlatBatch, RunnerOutput, placed
from slingshot.engine.kv_cache import KVCache
from slingshot.kernels.attention import attend_folded
from slingshot.model.context import Context
from slingshot.model.dispatch import Routing
from slingshot.model.transformer import MTP, Transformer

TOKEN_STEP = 16  # the network sees a multiple of so many tokens, since matrix libraries compile code for every shape
SCORES = 1 << 24  # attention scores of a layer at once: 64 MiB in float32, copied a few times
WASTE = 1.5  # how much padding may add to the scores of sequences that attend together


@dataclass
class AttentionGroup:
    """Sequences that attend together. `tokens_ST`: where their queries stand in the batch; None: one after the other,
    one each."""

    tokens_ST: Tensor | None
    tables_F: Tensor  # their block tables, one after the other
    mask_STU: Tensor


class PagedContext(Context):
    """Attention of a flat batch, to which `padding` tokens of no sequence are added, over a KVCache.

    All that depends on the batch is worked out on the CPU beforehand: layers then run without waiting for a device.
    """

    absorb = True

    def __init__(self, cache: KVCache, batch: FlatBatch, padding: int = 0) -> None:
        self._device = cache.layers[0].device
        super().__init__(cache.config, self._placed(F.pad(batch.positions_N, (0, padding))))
        self._cache, self._slots_N = cache, self._placed(F.pad(batch.slots_N, (0, padding)))
        self._groups = self._grouped(batch, padding)

    def _placed(self, tensor: Tensor) -> Tensor:
        return placed(tensor, self._device)

    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        cache = self._cache
        if isinstance(v_XGV, int):
            width, (pages,) = v_XGV, ([cache.entries[layer]],)
            new = [k_XGW]
        else:
            width, pages = v_XGV.shape[-1], [cache.keys[layer], cache.values[layer]]
            new = [k_XGW, v_XGV]
        for held, fresh in zip(pages, new, strict=True):
            held.flatten(0, 1).flatten(1).index_copy_(0, self._slots_N, cache.kept(fresh).flatten(1))
        if len(self._groups) == 1 and self._groups[0].tokens_ST is None:
            return self._of_group(self._groups[0], q_XHW.unsqueeze(1), pages, width, scale).squeeze(1)
        y_NHV = q_XHW.new_zeros(*q_XHW.shape[:2], width)
        for group in self._groups:
            assert group.tokens_ST is not None
            y_STHV = self._of_group(group, q_XHW[group.tokens_ST], pages, width, scale)
            y_NHV[group.tokens_ST] = y_STHV  # a token that stands there several times has the same result each time
        return y_NHV

    def _of_group(self, group: AttentionGroup, q_STHW: Tensor, pages: list[Tensor], width: int, scale: float) -> Tensor:
        rows, groups = len(q_STHW), 1 if len(pages) == 1 else pages[0].shape[2]
        k_SUGW, *values = (
            self._cache.computed(
                held.index_select(0, group.tables_F).view(rows, -1, groups, held.shape[-1]), q_STHW.dtype
            )
            for held in pages
        )
        v_SUGV = values[0] if values else k_SUGW[..., :width]
        if q_STHW.is_cuda:
            q, k, v = (t.transpose(1, 2) for t in (q_STHW, k_SUGW, v_SUGV))
            y = F.scaled_dot_product_attention(q, k, v, group.mask_STU.unsqueeze(1), scale=scale, enable_gqa=True)
            return y.transpose(1, 2)
        piece = max(1, SCORES // (rows * q_STHW.shape[2] * k_SUGW.shape[1]))
        parts = zip(q_STHW.split(piece, 1), group.mask_STU.split(piece, 1), strict=True)
        return torch.cat([attend_folded(q, k_SUGW, v_SUGV, mask, scale) for q, mask in parts], dim=1)

    def _grouped(self, batch: FlatBatch, padding: int) -> list[AttentionGroup]:
        """Sequences grouped so that padding stays small; all of this is known on the CPU."""
        starts_S, lengths_S = batch.starts.numpy()[:-1], batch.lengths.numpy()
        counts_S, tables_SP = np.diff(batch.starts.numpy()), batch.block_tables.numpy()
        positions_N = batch.positions_N.numpy()
        work_S = counts_S.astype(np.int64) * lengths_S
        if counts_S.max() == 1 and lengths_S.max() * len(lengths_S) <= WASTE * work_S.sum() + 64 * len(lengths_S):
            tables, last_S1 = np.pad(tables_SP, ((0, padding), (0, 0))), np.pad(positions_N, (0, padding))[:, None]
            return [self._group(None, tables, last_S1, int(lengths_S.max()))]
        order, groups = np.lexsort((lengths_S, counts_S)), []
        cuts, area = [0], 0
        for at, row in enumerate(order):  # sorted, so that the last one is the largest of its group
            area += int(work_S[row])
            size = at + 1 - cuts[-1]
            if size > 1 and size * int(counts_S[row]) * int(lengths_S[order[cuts[-1] : at + 1]].max()) > WASTE * area:
                cuts.append(at)
                area = int(work_S[row])
        for first, end in pairwise([*cuts, len(order)]):
            rows = order[first:end]
            steps_ST = np.minimum(np.arange(counts_S[rows].max())[None], counts_S[rows][:, None] - 1)
            tokens_ST = starts_S[rows][:, None] + steps_ST
            groups.append(self._group(tokens_ST, tables_SP[rows], positions_N[tokens_ST], int(lengths_S[rows].max())))
        return groups

    def _group(
        self, tokens_ST: np.ndarray | None, tables_SP: np.ndarray, positions_ST: np.ndarray, longest: int
    ) -> AttentionGroup:
        pages = -(-longest // PAGE)
        mask_STU = np.arange(pages * PAGE) <= positions_ST[..., None]
        tokens = None if tokens_ST is None else self._placed(torch.from_numpy(tokens_ST.astype(np.int64)))
        tables_F = tables_SP[:, :pages].flatten()
        return AttentionGroup(
            tokens, self._placed(torch.from_numpy(tables_F)), self._placed(torch.from_numpy(mask_STU))
        )


class TorchRunner:
    """Runs the model over the cache's pages; see the Runner protocol."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._device = model.model.embed_tokens.weight.device
        main = sum(map(model.config.has_experts, range(model.config.num_hidden_layers)))
        self._routed = model.moe_layers()[:main]

    def refresh(self) -> None:
        """Nothing: the modules read their weights at every call."""

    def forward(self, batch: FlatBatch) -> RunnerOutput:
        return self._output(batch, *self._hidden(*self._context(batch), batch.routing))

    def draft(self, batch: FlatBatch, hidden_ND: Tensor) -> RunnerOutput:
        tokens, context = self._context(batch)
        padded_ND = F.pad(hidden_ND, (0, 0, 0, len(tokens) - len(hidden_ND)))
        return self._output(batch, self._drafted(tokens, context, padded_ND))

    def _hidden(self, tokens_N: Tensor, context: Context, routing: bool) -> tuple[Tensor, Tensor | None]:
        """The main model's hidden states after the final norm, and, where asked, the experts it chose [N, L, k]."""
        chosen: list[Routing] = []
        hooks = [
            layer.gate.register_forward_hook(lambda _, __, routing: chosen.append(routing))
            for layer in (self._routed if routing else ())
        ]
        try:
            hidden_ND = self._model(tokens_N, context=context, logits=False).hidden_BTD
        finally:
            for hook in hooks:
                hook.remove()
        experts = [its.experts_Nk.to(torch.int16) for its in chosen]
        return hidden_ND, torch.stack(experts, dim=1) if experts else None

    def _drafted(self, tokens_N: Tensor, context: Context, hidden_ND: Tensor) -> Tensor:
        """The MTP module's own hidden states."""
        module = self._model.model.layers[self._model.config.num_hidden_layers]
        assert isinstance(module, MTP)
        drafted_ND: Tensor = module(hidden_ND, context, self._model.model.embed_tokens(tokens_N).to(hidden_ND.dtype))[0]
        return drafted_ND

    def _output(self, batch: FlatBatch, hidden_ND: Tensor, routing_NLk: Tensor | None = None) -> RunnerOutput:
        wanted_RD = hidden_ND.index_select(0, placed(batch.wanted, self._device))
        count = len(batch.token_ids_N)
        routing_NLk = routing_NLk[:count] if batch.routing and routing_NLk is not None else None
        return RunnerOutput(self._model.lm_logits(wanted_RD), hidden_ND[:count] if batch.hidden else None, routing_NLk)

    def _context(self, batch: FlatBatch) -> tuple[Tensor, PagedContext]:
        """The batch's tokens, padded, and their attention."""
        count = len(batch.token_ids_N)
        padding = -count % TOKEN_STEP if count > TOKEN_STEP else 0
        context = PagedContext(self._cache, batch, padding)
        return placed(F.pad(batch.token_ids_N, (0, padding)), self._device), context
