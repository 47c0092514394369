"""Models in GGUF files: weights under Hugging Face's names.

    weights = GGUFWeights(Path("SmolLM2-135M-Instruct.Q4_1.gguf"))
    weights.config; weights.read("model.layers.0.self_attn.q_proj.weight", slice(0, 64))

Architectures llama, qwen2, qwen3 and deepseek2 (DeepSeek-V3's routing), any tensor type `gguf` can dequantise (F32,
F16, BF16, Q8_0, Q4_0, Q4_1, the K-quants ...). What would compute something else than llama.cpp does is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.gguf.config import read_config
from slingshot.checkpoint.gguf.file import GGUFFile, GGUFTensor
from slingshot.checkpoint.gguf.names import ROPE_FREQS, kv_b_parts, place
from slingshot.checkpoint.layout import Spec, layout

PLAIN = {Kind.F32: torch.float32, Kind.F16: torch.float16, Kind.BF16: torch.bfloat16}
_PIECE = 2**20  # numbers dequantised at a time: `gguf` takes several times their float32 size


class GGUFWeights:
    """The tensors of a .gguf file as a checkpoint holds them (load_save.py's StoredWeights)."""

    dtype = "float32"

    def __init__(self, path: Path) -> None:
        """Reads the header and checks every tensor of the architecture: SlingshotError names what is at fault."""
        self.file = GGUFFile(path)
        self.config = read_config(self.file)
        self.architecture = self.file.get("general.architecture", str)
        self._shapes = {spec.name: spec.shape for spec in self._specs()}

    def where(self, name: str) -> Path:
        tensor, _ = place(name)
        return next(self.file.tensors[part].file for part in (tensor, *kv_b_parts(tensor)) if part in self.file.tensors)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor, or these rows of it (dimension 0): float32, or the file's own 16-bit type."""
        shape = self._shapes[name]
        start, stop = (0, shape[0]) if rows is None else (rows.start, rows.stop)
        tensor, expert = place(name)
        if name.endswith("kv_b_proj.weight") and tensor not in self.file.tensors:
            return self._kv_b_proj(tensor)[start:stop]
        stored = self.file.tensors[tensor]
        interleaved = self.architecture == "llama" and bool(re.search(r"\.[qk]_proj\.", name))
        if len(shape) == 1:
            values = self._rows(stored, 0, 1)[0]
            return (self._half_split(values) if interleaved else values)[start:stop]
        if not interleaved:
            return self._rows(stored, (expert or 0) * shape[0] + start, stop - start)
        head = self.config.head_dim
        first, last = start // head * head, -(-stop // head) * head
        return self._half_split(self._rows(stored, first, last - first))[start - first : stop - first]

    def _specs(self) -> Iterator[Spec]:
        """The tensors of the architecture, each found in the file in its shape, and nothing else in the file."""
        config, tensors = self.config, self.file.tensors
        heads, latent = config.num_attention_heads, config.kv_lora_rank
        known = {ROPE_FREQS} if self.architecture == "llama" else set()
        for spec in layout(config):
            name, expert = place(spec.name)
            if spec.copy_of is None:
                yield spec
            if expert:
                continue  # within the stack that was checked for the first
            expected = {name: spec.shape if expert is None else (config.n_routed_experts, *spec.shape)}
            if name not in tensors and spec.name.endswith("kv_b_proj.weight"):
                key, value = kv_b_parts(name)
                expected = {key: (heads, latent, config.qk_nope_head_dim), value: (heads, config.v_head_dim, latent)}
            known |= expected.keys()
            for part, shape in expected.items():
                if spec.copy_of is None or part in tensors:
                    self._check(part, shape)
        if unknown := next((name for name in tensors if name not in known), None):
            raise SlingshotError(f"{self.file.path}: {unknown!r:.80} is no tensor of a plain {self.architecture} model")

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.file.tensors:
            have = f"{self.architecture} models of its keys have it"
            raise SlingshotError(f"{self.file.path}: the tensor {name} is missing; {have}")
        stored = self.file.tensors[name]
        ones = (1,) * (len(shape) - len(stored.shape))  # llama.cpp drops them when it writes a file
        if ones + stored.shape != shape:
            raise SlingshotError(f"{stored.file}: {name} has shape {list(stored.shape)}, its keys say {list(shape)}")
        if stored.kind not in PLAIN:
            try:
                dequantize(np.zeros((1, stored.row_bytes), dtype=np.uint8), stored.kind)
            except NotImplementedError as error:
                odd = f"{stored.file}: {name} is of type {stored.kind.name}, which cannot be dequantised"
                raise SlingshotError(f"{odd}; give F16 or Q8_0") from error

    def _rows(self, tensor: GGUFTensor, first: int, count: int) -> Tensor:
        """Rows of a tensor, all dimensions but the last counted through: [count, width]."""
        width = tensor.shape[-1]
        if tensor.kind in PLAIN:
            return torch.from_numpy(self.file.read(tensor, first, count)).view(PLAIN[tensor.kind])
        values = torch.empty((count, width), dtype=torch.float32)
        step = max(1, _PIECE // width)
        for row in range(0, count, step):
            data = self.file.read(tensor, first + row, min(step, count - row))
            values[row : row + len(data)] = torch.from_numpy(dequantize(data, tensor.kind))
        return values

    def _kv_b_proj(self, name: str) -> Tensor:
        heads = self.config.num_attention_heads
        key, value = (self.file.tensors[part] for part in kv_b_parts(name))
        key_HKN = self._rows(key, 0, heads * self.config.kv_lora_rank).unflatten(0, (heads, -1))
        value_HVK = self._rows(value, 0, heads * self.config.v_head_dim).unflatten(0, (heads, -1))
        return torch.cat((key_HKN.transpose(1, 2), value_HVK), dim=1).flatten(0, 1)

    def _half_split(self, values: Tensor) -> Tensor:
        """Whole heads of llama's q or k in Hugging Face's order: llama.cpp puts row j of the halves side by side."""
        return values.unflatten(0, (-1, self.config.head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
