"""A checkpoint as the base of adapters: matrices that are stored as int4, int8 or FP8 stay so, no larger than the file.

model = load_frozen("runs/tiny-int4", device)        # any other checkpoint: as load_model reads it
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.layout import layout, place
from slingshot.checkpoint.load_save import AdaptedWeights, FolderWeights, load_model, load_weights, open_weights
from slingshot.model.stored import StoredMatrix, hold
from slingshot.model.transformer import Transformer


def load_frozen(path: Path | str, device: torch.device | str = "cpu") -> Transformer:
    """The model without gradients; what is not stored in fewer bits in the dtype that the files have for it.

    SlingshotError for an adapter over such a base, whose change belongs beside the numbers, and for a stack of which
    some experts alone are stored so.
    """
    weights = open_weights(path)
    if isinstance(weights, AdaptedWeights) and weights.over:
        way_out = f"train from {weights.adapter.base}, or from a checkpoint of 16 bits"
        raise SlingshotError(f"lora: {path} is itself an adapter, over {weights.over} numbers; {way_out}")
    if not isinstance(weights, FolderWeights) or not weights.config.quantization:
        return load_model(path, device=device)
    config, scheme = weights.config.stored_as(None), weights.config.scheme
    with torch.device("meta"):
        model = Transformer(config)
    model.cast(getattr(torch, weights.dtype))
    for name, (numbers, scales) in _stacked(weights, path).items():
        module: Any = model.get_submodule(name.removesuffix(".weight"))
        first = name.replace("experts.gate_up_proj", "experts.0.up_proj").replace("experts.down", "experts.0.down")
        bits = 0 if scheme is None else scheme.bits(first)
        hold(module, StoredMatrix(module.weight.shape, numbers.to(device), scales.to(device), bits))
    state = model.state_dict().items()
    blank = {name: torch.empty(t.shape, dtype=t.dtype, device=device) if t.is_meta else t for name, t in state}
    model.load_state_dict(blank, assign=True)
    load_weights(model, weights)
    return model.requires_grad_(False)


def _stacked(weights: FolderWeights, path: Path | str) -> dict[str, tuple[Tensor, Tensor]]:
    """Numbers and scales by the module's name of its weight, those of experts put together."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    matrices: dict[str, list[bool]] = {}  # whether each of a stack's is stored so
    for spec in layout(weights.config):
        if spec.copy_of is not None:
            continue
        (name, index), stored = place(spec.name), weights.stored(spec.name)
        matrices.setdefault(name, []).append(stored is not None)
        if stored is None:
            continue
        if not stored[1].isfinite().all():
            raise SlingshotError(f"{weights.where(spec.name)}: {spec.name} has scales that are NaN or infinite")
        stack = (weights.config.n_routed_experts, 2)[: len(index)]
        if name not in found:
            found[name] = tuple(each.new_empty(*stack, *each.shape) for each in stored)  # type: ignore[assignment]
        for whole, part in zip(found[name], stored, strict=True):
            whole[index] = part
    if mixed := [name for name in found if not all(matrices[name])]:
        raise SlingshotError(f"lora: {path}: of {mixed[0]} some experts are stored in fewer bits and some are not")
    return found
