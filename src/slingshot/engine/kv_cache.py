"""The engine's cache: what attention keeps of every token, in pages of 16 tokens.

    cache = KVCache(config, pages=1000, dtype=torch.bfloat16)
    cache.entries[layer]                        # MLA: [pages, PAGE, latent + rope width]
    cache.keys[layer], cache.values[layer]      # GQA: [pages, PAGE, key heads, head width]

With 8 bits (`KVCache(..., form="int8")` or "fp8") an entry is bytes: a number each, for each token and key head (MLA:
the latent), then what they are multiplied by, in bfloat16; MLA's rope part follows as it is.

Which sequence a page belongs to is not known here: that is pages.py's. The MTP module's layer is the last one, index
`num_hidden_layers`.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.engine.batch import PAGE, placed
from slingshot.model.config import ModelConfig

SLACK = 4096  # bytes after the last page that kernels may read
CacheForm = Literal["auto", "int8", "fp8"]  # what entries are kept as; auto: as they are computed
LARGEST = {"int8": 127.0, "fp8": 448.0}  # fp8: e4m3
SCALE = torch.bfloat16


class CacheTooSmall(SlingshotError):
    """The memory given to the cache does not hold one sequence."""


class KVCache:
    """Tensors of `pages` pages for every layer. Memory is taken from the machine as it is first written."""

    def __init__(
        self, config: ModelConfig, pages: int, dtype: torch.dtype, device: torch.device | str = "cpu",
        mtp: bool = False, form: CacheForm = "auto",
    ) -> None:  # fmt: skip
        self.config, self.pages, self.dtype, self.form = config, pages, dtype, form
        layers = config.num_hidden_layers + mtp
        heads, width = _entry(config, dtype, form)
        held = dtype if form == "auto" else torch.uint8
        self.entries: list[Tensor] = []
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        if config.family == "dense":
            shape: tuple[int, ...] = (pages, PAGE, heads, width)
            self.keys, self.values = ([_zeros(shape, held, device) for _ in range(layers)] for _ in range(2))
        else:
            self.entries = [_zeros((pages, PAGE, width), held, device) for _ in range(layers)]

    @staticmethod
    def page_bytes(config: ModelConfig, dtype: torch.dtype, mtp: bool = False, form: CacheForm = "auto") -> int:
        """Bytes of one page of all layers."""
        heads, width = _entry(config, dtype, form)
        size = dtype.itemsize if form == "auto" else 1
        return PAGE * (1 + (config.family == "dense")) * heads * width * size * (config.num_hidden_layers + mtp)

    def kept(self, entries_NGW: Tensor) -> Tensor:
        """Entries as the cache holds them. int8 is off by half a 127th of a head's largest number at most, e4m3 by a
        16th of the number itself, or by 2^-10 of a 448th of the largest."""
        if self.form == "auto":
            return entries_NGW.to(self.dtype)
        numbers, rest = entries_NGW.split([self._rounded, entries_NGW.shape[-1] - self._rounded], dim=-1)
        most, numbers = LARGEST[self.form], numbers.float()
        scale = (numbers.abs().amax(-1, keepdim=True) / most).to(SCALE)
        scale = torch.where(scale == 0, 1.0, scale)  # NaN stays, for the sampler to see
        numbers = (numbers / scale.float()).clamp_(-most, most)
        numbers = numbers.round_().to(torch.int8) if self.form == "int8" else numbers.to(torch.float8_e4m3fn)
        rest = rest.to(self.dtype).contiguous()
        return torch.cat([each.view(torch.uint8) for each in (numbers, scale, rest)], dim=-1)

    def computed(self, held_XB: Tensor, dtype: torch.dtype) -> Tensor:
        """Entries that the cache holds as numbers of this dtype."""
        if self.form == "auto":
            return held_XB.to(dtype)
        numbers, scale, rest = held_XB.split(
            [self._rounded, SCALE.itemsize, held_XB.shape[-1] - self._rounded - SCALE.itemsize], dim=-1
        )
        kind = torch.int8 if self.form == "int8" else torch.float8_e4m3fn
        values = numbers.view(kind).to(dtype).mul_(_apart(scale).view(SCALE).to(dtype))
        return torch.cat((values, _apart(rest).view(self.dtype).to(dtype)), -1) if rest.shape[-1] else values

    @property
    def _rounded(self) -> int:
        """How many numbers of an entry have 8 bits."""
        return self.config.head_dim if self.config.family == "dense" else self.config.kv_lora_rank

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


def _apart(bytes_XB: Tensor) -> Tensor:
    """In memory of their own, where wider numbers may begin."""
    return bytes_XB.clone(memory_format=torch.contiguous_format)


def check_form(form: str) -> None:
    """Raise SlingshotError for what is no CacheForm."""
    if form not in get_args(CacheForm):
        raise SlingshotError(f"kv_cache {form!r:.40}: choose {', '.join(get_args(CacheForm))}")


def _entry(config: ModelConfig, dtype: torch.dtype, form: CacheForm) -> tuple[int, int]:
    """Entries of a token side by side, of keys or of values, and how many numbers, or bytes, each is."""
    if config.family == "dense":
        return config.num_key_value_heads, config.head_dim + (form != "auto") * SCALE.itemsize
    if form == "auto":
        return 1, config.kv_lora_rank + config.qk_rope_head_dim
    return 1, config.kv_lora_rank + SCALE.itemsize + config.qk_rope_head_dim * dtype.itemsize


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
