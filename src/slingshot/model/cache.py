"""What attention needs of a cache, and the contiguous one: one row of `length` entries per slot and layer.

An entry is what `ModelConfig.cache_width` counts: MLA's latent and rotated key, or K and V of every KV head. An entry's place in
its row is its token's position, so what lies beyond a sequence's end is masked by causality and may hold anything.

    cache = Cache(config, slots=256, length=512, dtype=torch.float32)
    model(tokens_BT, positions_BT, cache=cache.view(first_slot, rows))

Shape suffixes: B rows, T new tokens, S cached tokens, C cache width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from slingshot.model.config import ModelConfig


class CacheView:
    """Consecutive slots of a cache as one batch; `extent` is how many entries attention has to look at."""

    def __init__(self, data: list[Tensor], first_slot: int, rows: int, extent: int) -> None:
        self._data, self._rows, self.extent = data, slice(first_slot, first_slot + rows), extent

    def update(self, layer: int, entries_BTC: Tensor, positions_BT: Tensor) -> Tensor:
        """Write entries at their positions, return all entries up to the extent: [B, S, C]."""
        rows_BSC = self._data[layer][self._rows]
        rows_BSC[torch.arange(len(rows_BSC), device=rows_BSC.device)[:, None], positions_BT] = entries_BTC.to(
            rows_BSC.dtype
        )
        return rows_BSC[:, : self.extent]


class Cache:
    """Contiguous cache of `slots` sequences of at most `length` tokens."""

    def __init__(
        self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        shape = (slots, length, config.cache_width)
        self.slots, self.length = slots, length
        self.data = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def view(self, first_slot: int, rows: int, extent: int | None = None) -> CacheView:
        return CacheView(self.data, first_slot, rows, self.length if extent is None else extent)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` entries of one slot to another."""
        for layer in self.data:
            layer[target, :length] = layer[source, :length]

    def grow(self, length: int) -> None:
        """Lengthen every slot, keeping what it holds."""
        for index, layer in enumerate(self.data):
            longer = layer.new_zeros(self.slots, length, layer.shape[2])
            longer[:, : self.length] = layer
            self.data[index] = longer
        self.length = length
