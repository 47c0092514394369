"""LoRA: a frozen base, and beside chosen matrices a trained change of low rank (arXiv 2106.09685).

    add_lora(model, config.lora, seed)       # from now on only the adapters have gradients and optimizer state
    sampler.update_weights(step, merged(model))
    adapters(model)                          # name -> A or B

Shape suffixes: as model/linear.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.layout import adapter_group, adapter_numbers
from slingshot.model.config import ModelConfig
from slingshot.model.linear import Embedding, GroupedLinear, Linear, LoRAGroupedLinear, LoRALinear
from slingshot.model.moe import Gate
from slingshot.model.stored import holds_stored, share_stored
from slingshot.model.transformer import MTP, Transformer
from slingshot.training.parallel import Parallel, whole

GROUPS = ("attention", "mlp", "experts")  # of targets


class LoRAConfig(Strict):
    """The table `lora` of sft, rl and distill. The change is scaled by alpha / rank.

    `targets`: attention, mlp, experts (each its own A and B), or names of matrices as PEFT's target_modules: q_proj.
    """

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    targets: list[str] = Field(["attention", "mlp"], min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        if len(set(self.targets)) < len(self.targets):
            raise ValueError("lora.targets: a target is named twice")
        return self

    def numbers_passed(self, config: ModelConfig) -> int:
        """Through how many numbers of the adapters a token passes."""
        return adapter_numbers(config, self.rank, self.targets).passed


def add_lora(model: Transformer, config: LoRAConfig | None, seed: int, parallel: Parallel) -> int | None:
    """Freeze the model and put adapters beside the targets; -> through how many of their numbers a token passes. None:
    without a config the model is trained itself. SlingshotError: an unknown target, a rank above a width.

    Beside so small a state, activations would be most of the memory: blocks compute them again. Several processes
    shard the model afterwards.
    """
    if config is None:
        return None
    if parallel.mesh is not None and holds_stored(model):
        raise SlingshotError("lora: over int8, int4 and FP8 numbers adapters are trained by one process; start one")
    chosen: dict[str, Linear | GroupedLinear] = {}
    for target in config.targets:
        found = {
            name: module for name, module in _candidates(model) if target in (adapter_group(name), name.split(".")[-1])
        }
        if not found:
            names = {name.split(".")[-1] for name, module in _candidates(model) if isinstance(module, Linear)}
            kinds = {adapter_group(name) for name, _ in _candidates(model)}
            known = [*(kind for kind in GROUPS if kind in kinds), *sorted(names)]
            raise SlingshotError(f"lora.targets: this model has no {target}; it has {', '.join(known)}")
        chosen |= found
    model.requires_grad_(False)
    model.recompute = "full"
    generator = torch.Generator().manual_seed(seed)
    for name, module in sorted(chosen.items()):
        *leading, out, width = module.weight.shape
        if config.rank > min(out, width):
            raise SlingshotError(f"lora.rank: {config.rank} is above {min(out, width)}, the smaller side of {name}")
        numbers = torch.randn(*leading, config.rank, width, generator=generator) / width**0.5  # x A^T is as large as x
        given = numbers.to(module.weight.device), config.alpha / config.rank
        beside = LoRALinear(module, *given) if isinstance(module, Linear) else LoRAGroupedLinear(module, *given)
        model.set_submodule(name, beside)
    return config.numbers_passed(model.config)


def _candidates(model: Transformer) -> Iterator[tuple[str, Linear | GroupedLinear]]:
    """Matrices of the layers by name: not of routers, and not of the MTP module, which other programs do not have."""
    for number, layer in enumerate(model.model.layers):
        if not isinstance(layer, MTP):
            for name, module in layer.named_modules():
                if isinstance(module, Linear | GroupedLinear) and not isinstance(module, Gate | Embedding):
                    yield f"model.layers.{number}.{name}", module


def adapters(model: Transformer) -> dict[str, Tensor]:
    """The trained tensors by name, NAME.lora_A and NAME.lora_B; none where the model has no adapters."""
    return {name: each for name, each in model.state_dict().items() if name.endswith((".lora_A", ".lora_B"))}


def merged(model: Transformer) -> Mapping[str, Tensor]:
    """The state dict of a model without adapters that computes the same; each changed matrix is made when asked for."""
    return _Merged(model) if adapters(model) else model.state_dict()


class _Merged(Mapping[str, Tensor]):
    def __init__(self, model: Transformer) -> None:
        beside = adapters(model)
        self._state = {name: each for name, each in model.state_dict().items() if name not in beside}
        modules = model.named_modules()
        self._changed = {
            f"{name}.weight": each for name, each in modules if isinstance(each, LoRALinear | LoRAGroupedLinear)
        }
        self._last: dict[str, Tensor] = {}  # an expert's matrices are asked for one by one, from two stacks in turn

    @torch.no_grad()
    def __getitem__(self, name: str) -> Tensor:
        if (module := self._changed.get(name)) is None:
            return self._state[name]
        if name not in self._last:
            self._last = dict([*self._last.items()][-1:]) | {name: _whole_matrix(module)}
        return self._last[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def _whole_matrix(module: LoRALinear | LoRAGroupedLinear) -> Tensor:
    """W + scale B A in W's dtype, of all ranks where they share it."""
    if not hasattr(module.weight, "full_tensor"):
        return module.matrix(module.weight.dtype)
    weight, a, b = (whole(each) for each in (module.weight, module.lora_A, module.lora_B))
    return (weight.to(a.dtype) + module.scale * (b @ a)).to(weight.dtype)


def twin(model: Transformer) -> Transformer:
    """Another model over the same parameters, without memory of its own, and plain: without the one's adapters."""
    with torch.device("meta"):
        base = Transformer(model.config)
    share_stored(base, model)
    beside = adapters(model)
    base.load_state_dict({name: each for name, each in model.state_dict().items() if name not in beside}, assign=True)
    return base.requires_grad_(False)
