"""LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    write_adapter(folder, adapters(model), rank=16, alpha=32.0, base="runs/tiny/base")

Tensors are named as PEFT names them: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight, [R, D]. Experts,
stacked in the module, are an A and a B each for gate_proj, up_proj and down_proj.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from slingshot.base.files import write_json


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], rank: int, alpha: float, base: str) -> None:
    """Write the adapters of a model (training/lora.py names them) into an existing folder; `base` is named in it."""
    stored = {f"base_model.model.{name}.weight": each.contiguous() for name, each in _by_matrix(tensors)}
    save_file(stored, folder / "adapter_model.safetensors", {"format": "pt"})
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
    write_json(folder / "adapter_config.json", config)


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
