"""The engine's cache, one row of `length` entries per slot and layer, and the context through which attention meets it.

An entry is what `ModelConfig.cache_width` counts: MLA's latent and rotated key, or K and V of every KV head. Its place
in the row is its token's position, so what lies beyond a sequence's end is masked by causality and may hold anything.

    cache = SlotCache(config, slots=256, length=512, dtype=torch.float32)
    model(tokens_BT, context=cache.context(first_slot, positions_BT))

Shape suffixes: B rows, T new tokens, S cached tokens, C cache width, H query heads, G key heads, W width of queries and
keys, V of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slingshot.kernels.attention import attend_folded
from slingshot.model.config import ModelConfig
from slingshot.model.context import Context


class SlotCache:
    """Contiguous cache of `slots` sequences of at most `length` tokens."""

    def __init__(
        self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        self.config, self.slots, self.length = config, slots, length
        shape = (slots, length, config.cache_width)
        self.data = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def context(self, first_slot: int, positions_BT: Tensor, extent: int | None = None) -> CachedContext:
        """Consecutive slots as one batch, its new tokens at these positions; attention looks at `extent` entries."""
        return CachedContext(self, first_slot, positions_BT, self.length if extent is None else extent)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for layer in self.data:
            layer[target, :length] = layer[source, :length]


class CachedContext(Context):
    """Writes every token's entry to its place, then attends over the row's entries up to the token's own."""

    absorb = True

    def __init__(self, cache: SlotCache, first_slot: int, positions_BT: Tensor, extent: int) -> None:
        super().__init__(cache.config, positions_BT)
        rows, device = len(positions_BT), positions_BT.device
        self._layers = [layer[first_slot : first_slot + rows] for layer in cache.data]
        self._place = torch.arange(rows, device=device)[:, None], positions_BT
        self._extent = extent
        self._mask_BTS = torch.arange(extent, device=device) <= positions_BT[..., None]

    def attend(self, layer: int, q_XHW: Tensor, k_XGW: Tensor, v_XGV: Tensor | int, scale: float) -> Tensor:
        parts = [part for part in (k_XGW, v_XGV) if isinstance(part, Tensor)]
        rows_BSC = self._layers[layer]
        rows_BSC[self._place] = torch.stack(parts, dim=2).flatten(2).to(rows_BSC.dtype)
        rows_BSC = rows_BSC[:, : self._extent].to(q_XHW.dtype)
        k_BSGW, *values = rows_BSC.view(*rows_BSC.shape[:2], len(parts), *k_XGW.shape[2:]).unbind(2)
        v_BSGV = k_BSGW[..., :v_XGV] if isinstance(v_XGV, int) else values[0]
        return attend_folded(q_XHW, k_BSGW, v_BSGV, self._mask_BTS, scale)
