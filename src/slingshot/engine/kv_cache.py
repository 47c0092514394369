"""The engine's cache: what attention keeps of every token, in pages of 16 tokens.

    cache = KVCache(config, pages=1000, dtype=torch.bfloat16)
    cache.entries[layer]                        # MLA: [pages, PAGE, latent + rope width]
    cache.keys[layer], cache.values[layer]      # GQA: [pages, PAGE, key heads, head width]

Which sequence a page belongs to is not known here: that is pages.py's. The MTP module's layer is the last one, index
`num_hidden_layers`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.batch import PAGE, placed
from slingshot.model.config import ModelConfig

SLACK = 4096  # bytes after the last page that kernels may read


class CacheTooSmall(SlingshotError):
    """The memory given to the cache does not hold one sequence."""


class KVCache:
    """Tensors of `pages` pages for every layer, in `dtype`. Memory is taken from the machine as it is first written."""

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device | str = "cpu", mtp: bool = False
    ) -> None:
        self.config, self.pages, self.dtype = config, pages, dtype
        layers = config.num_hidden_layers + mtp
        self.entries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        if config.family == "dense":
            shape: tuple[int, ...] = (pages, PAGE, config.num_key_value_heads, config.head_dim)
            self.keys, self.values = ([_zeros(shape, dtype, device) for _ in range(layers)] for _ in range(2))
        else:
            shape = (pages, PAGE, config.kv_lora_rank + config.qk_rope_head_dim)
            self.entries = [_zeros(shape, dtype, device) for _ in range(layers)]

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
        """Bytes of one page of all layers."""
        return PAGE * config.cache_width * (config.num_hidden_layers + mtp) * dtype.itemsize

    @classmethod
    def pages_in(cls, budget: int, config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
        """How many pages `budget` bytes hold besides page 0."""
        return max(0, budget // cls.page_bytes(config, dtype, mtp) - 1)

    @property
    def layers(self) -> list[Tensor]:
        """Every tensor of the cache: pages first."""
        return [*self.entries, *self.keys, *self.values]

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole pages."""
        device = self.layers[0].device
        from_P, to_P = (placed(torch.tensor(list(pages)), device) for pages in (sources, targets))
        for layer in self.layers:
            layer.index_copy_(0, to_P, layer.index_select(0, from_P))

    def clear(self) -> None:
        """Write zeros over everything: after weights that gave NaN, which masks do not hide."""
        for layer in self.layers:
            layer.zero_()


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Zeros; on a CPU memory that the operating system gives when it is touched, where torch.zeros touches all.

    Not the C library's, which in a process that trains (machine/memory.py) clears what it hands out.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    memory = mmap.mmap(-1, size + SLACK)  # begins with a page, and so with a cache line
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(dtype).view(shape)
