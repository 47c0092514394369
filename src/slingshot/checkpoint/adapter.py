"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    write_adapter(folder, adapters(model), rank=16, alpha=32.0, base="runs/tiny/base")
    adapter = Adapter(folder)
    adapter.base                                    # where the model lies that it changes
    adapter.change("model.layers.0.self_attn.q_proj.weight")        # A [R, D], B [F, R] and their scale

Tensors are named as PEFT names them: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, [R, D]. Experts,
stacked in the module, are an A and a B each for gate_proj, up_proj and down_proj. Opening one needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from slingshot.base.errors import SlingshotError
from slingshot.base.files import inside, read_json, write_json
from slingshot.checkpoint.hub import locate
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.safetensors import Shards, write_tensors
from slingshot.model.config import ModelConfig

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER, _WEIGHTS, _PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What the change depends on, and is read; what changes nothing here. Any other key that is set is refused.
_READ = {"peft_type", "base_model_name_or_path", "revision", "r", "lora_alpha", "use_rslora"}
_IGNORED = {
    "task_type", "auto_mapping", "peft_version", "inference_mode", "target_modules", "exclude_modules", "lora_dropout",
    "layers_to_transform", "layers_pattern", "megatron_core", "megatron_config", "qalora_group_size", "rank_pattern",
}  # fmt: skip
_OFF = {"bias": "none", "init_lora_weights": "gaussian"}  # beside None, false, true of the latter, and what is empty


def is_adapter(path: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (path / ADAPTER).is_file() and not (path / "config.json").exists()


def described_by(path: Path) -> Path:
    """Where config.json, tokenizer and the like of a checkpoint lie: of an adapter, with its base."""
    return Adapter(path).base if is_adapter(path) else path


class Adapter:
    """An adapter folder. SlingshotError where it is more than low-rank changes of matrices."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, inside(folder, ADAPTER)
        if not self.file.is_file():
            raise SlingshotError(f"{folder} is no adapter: it holds no {ADAPTER}")
        config = read_json(self.file)
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise SlingshotError(f"{self.file}: peft_type is not LORA; merge it with the program that made it")
        for key, value in config.items():
            plain = not value or value == _OFF.get(key) or (key == "init_lora_weights" and value is True)
            if key not in _READ | _IGNORED and not plain:
                says = f"{key} {str(value)[:60]} is not computed here"
                raise SlingshotError(f"{self.file}: {says}; merge it with the program that made it")
        alpha = config.get("lora_alpha")
        if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
            raise SlingshotError(f"{self.file}: lora_alpha is to be a number above 0, not {alpha!r:.60}")
        self._alpha, self._of_rank = float(alpha), math.sqrt if config.get("use_rslora") else float
        self._config = config

    @cached_property
    def base(self) -> Path:
        """Where the model lies that it names. SlingshotError where it is not there."""
        config = self._config
        name, revision = config.get("base_model_name_or_path"), config.get("revision")
        if not isinstance(name, str) or not name:
            raise SlingshotError(f"{self.file} names no base_model_name_or_path; write there what it changes")
        # As the path is written, or from the adapter's folder on, if a model lies there; else on the hub.
        places = [
            p for p in (Path(name), self.folder / name) if p.is_file() or is_adapter(p) or (p / "config.json").exists()
        ]
        try:
            base = locate(str(places[0]) if places else f"{name}@{revision}" if revision else name)
        except SlingshotError as error:
            raise SlingshotError(f"{self.file}: its base is missing: {error}") from error
        if is_adapter(base):
            raise SlingshotError(f"{self.file}: its base {name} is an adapter too; convert that one first")
        return base

    def fit(self, config: ModelConfig) -> Shards:
        """Its tensors. SlingshotError for one whose matrix the base, of this architecture, has not or otherwise."""
        shards = Shards(self.folder, _WEIGHTS)
        matrices = {spec.name: spec.shape for spec in layout(config) if len(spec.shape) == 2 and not spec.copy_of}
        for name, header in shards.headers.items():
            matrix, _, part = name.removesuffix(".weight").removeprefix(_PREFIX).rpartition(".lora_")
            place = f"{header.file}: {name}"
            out, width = matrices.get(f"{matrix}.weight", (0, 0))
            if part not in ("A", "B") or not out or matrix == "model.embed_tokens":
                raise SlingshotError(f"{place} changes nothing that this model has as a matrix; is it another model's?")
            other = shards.headers.get(f"{_PREFIX}{matrix}.lora_{'B' if part == 'A' else 'A'}.weight")
            a, b = (header, other) if part == "A" else (other, header)
            rank = 0 if a is None else a.shape[0]
            if a is None or b is None or a.shape != (rank, width) or b.shape != (out, rank):
                pair = " and ".join("none" if its is None else str(list(its.shape)) for its in (a, b))
                fitting = f"of {[out, width]} they are [r, {width}], [{out}, r]"
                raise SlingshotError(f"{place}: A and B are {pair}, {fitting}")
        return shards

    def changes(self, shards: Shards) -> dict[str, tuple[Tensor, Tensor, float]]:
        """By matrix: A [R, D] and B [F, R] in float32, and the scale of their product."""
        found = {}
        for name in shards.headers:
            if name.endswith(".lora_A.weight"):
                stem = name.removesuffix("lora_A.weight")
                a_RD, b_FR = (shards.read(f"{stem}lora_{part}.weight").float() for part in "AB")
                scale = self._alpha / self._of_rank(len(a_RD))
                found[f"{stem.removeprefix(_PREFIX)}weight"] = a_RD, b_FR, scale
        return found


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float, base: str) -> None:
    """Write the adapters of a model (training/lora.py names them) into an existing folder; `base` is named in it."""
    stored = {f"{_PREFIX}{name}.weight": each.contiguous() for name, each in _by_matrix(tensors)}
    write_tensors(folder / _WEIGHTS, stored)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-3] for name in stored}),
        "inference_mode": True,
    }
    write_json(folder / ADAPTER, config)


def _by_matrix(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Every A and B by its matrix's Hugging Face name; of a stack [E, *G, ...] each expert's."""
    for name, tensor in tensors.items():
        each = tensor.detach().cpu()
        if ".experts." not in name or ".shared_experts." in name:
            yield name, each
            continue
        stack, matrix, part = name.rsplit(".", 2)
        for number, of_expert in enumerate(each):
            if matrix == "gate_up_proj":
                yield f"{stack}.{number}.gate_proj.{part}", of_expert[0]
                yield f"{stack}.{number}.up_proj.{part}", of_expert[1]
            else:
                yield f"{stack}.{number}.{matrix}.{part}", of_expert
