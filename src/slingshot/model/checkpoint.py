"""Checkpoints in the Hugging Face layout: config.json, model.safetensors (or shards with an index), tokenizer, generation_config.json.

    model = load_model("runs/tiny/zero", dtype=torch.float32)
    save_checkpoint(folder, model, tokenizer)

Tensor names are Hugging Face's. Expert matrices, stacked in the module, are one tensor per expert in the file; the MTP module is
layer `num_hidden_layers` with its copies of embedding and head, as DeepSeek released it. A `.gguf` file can be loaded as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from slingshot.config import ModelConfig
from slingshot.data.tokenizer import Tokenizer
from slingshot.files import SlingshotError, read_json, write_json
from slingshot.model.transformer import Transformer

_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def to_hf_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the module's stacked experts into Hugging Face's names and add the MTP module's copies of embedding and head."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".experts.gate_up_proj.weight"):
            prefix = name.removesuffix(".gate_up_proj.weight")
            for expert, (gate, up) in enumerate(tensor):
                tensors[f"{prefix}.{expert}.gate_proj.weight"] = gate
                tensors[f"{prefix}.{expert}.up_proj.weight"] = up
        elif name.endswith(".experts.down_proj.weight"):
            prefix = name.removesuffix(".down_proj.weight")
            tensors |= {f"{prefix}.{expert}.down_proj.weight": down for expert, down in enumerate(tensor)}
        else:
            tensors[name] = tensor
    for layer in range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers):
        embedding = state["model.embed_tokens.weight"]
        tensors[f"model.layers.{layer}.embed_tokens.weight"] = embedding
        tensors[f"model.layers.{layer}.shared_head.head.weight"] = embedding if config.tie_word_embeddings else state["lm_head.weight"]
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def from_hf_tensors(config: ModelConfig, tensors: Iterable[tuple[str, Tensor]], where: str, dtype: torch.dtype) -> Transformer:
    """Build the model from named tensors; a missing, unknown or misshapen one is a SlingshotError that names it."""
    with torch.device("meta"):
        model = Transformer(config)
    expected = dict(model.state_dict(keep_vars=False))
    state = {name: torch.empty(meta.shape, dtype=torch.float32 if "e_score_correction_bias" in name else dtype) for name, meta in expected.items()}
    missing = set(to_hf_names(config, expected))
    for name, tensor in tensors:
        if _is_copy(config, name):
            continue
        target = _target(state, name)
        if target is None:
            raise SlingshotError(f"{where}: unknown tensor {name}; is its configuration another model's?")
        if target.shape != tensor.shape:
            raise SlingshotError(f"{where}: {name} has shape {list(tensor.shape)}, its configuration says {list(target.shape)}")
        target.copy_(tensor)
        if not torch.isfinite(target).all():
            raise SlingshotError(f"{where}: {name} holds NaN or infinite values")
        missing.discard(name)
    mtp = f"model.layers.{config.num_hidden_layers}."
    if missing and missing == {name for name in to_hf_names(config, expected) if name.startswith(mtp)}:
        # transformers does not save the MTP module, though its config.json goes on mentioning one
        with torch.device("meta"):
            model = Transformer(config.model_copy(update={"num_nextn_predict_layers": 0}))
        state = {name: tensor for name, tensor in state.items() if not name.startswith(mtp)}
    elif missing:
        raise SlingshotError(f"{where}: {len(missing)} tensors are missing, among them {sorted(missing)[0]}")
    model.load_state_dict(state, assign=True)
    return model


def to_hf_names(config: ModelConfig, state: Mapping[str, Any]) -> list[str]:
    """Names of the tensors a checkpoint must hold (without the MTP module's copies)."""
    names = []
    for name in state:
        stacked = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)\.weight", name)
        if stacked is None:
            names.append(name)
        else:
            parts = ("gate_proj", "up_proj") if stacked[2] == "gate_up_proj" else ("down_proj",)
            names += [f"{stacked[1]}.{expert}.{part}.weight" for expert in range(config.n_routed_experts) for part in parts]
    return names


def _is_copy(config: ModelConfig, name: str) -> bool:
    mtp = f"model.layers.{config.num_hidden_layers}."
    copy = config.num_nextn_predict_layers and name in (f"{mtp}embed_tokens.weight", f"{mtp}shared_head.head.weight")
    return bool(copy) or name.endswith("rotary_emb.inv_freq") or (config.tie_word_embeddings and name == "lm_head.weight")


def _target(state: dict[str, Tensor], name: str) -> Tensor | None:
    expert = _EXPERT.fullmatch(name)
    if expert is None:
        return state.get(name)
    prefix, index, part = expert[1], int(expert[2]), expert[3]
    stacked = state.get(f"{prefix}.down_proj.weight" if part == "down_proj" else f"{prefix}.gate_up_proj.weight")
    if stacked is None or index >= stacked.shape[0]:
        return None
    return stacked[index] if part == "down_proj" else stacked[index, 0 if part == "gate_proj" else 1]


def load_config(path: Path | str) -> ModelConfig:
    file = Path(path) / "config.json"
    raw = read_json(file)
    if not isinstance(raw, dict):
        raise SlingshotError(f"{file} does not hold a JSON object")
    return ModelConfig.from_hf(raw, str(file))


def load_model(path: Path | str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Transformer:
    """Load a checkpoint folder or a .gguf file in `dtype`. SlingshotError names the file and tensor that do not fit."""
    path = Path(path)
    if path.suffix == ".gguf":
        from slingshot.model.gguf import load_gguf

        return load_gguf(path, dtype).to(device)
    if not path.is_dir():
        raise SlingshotError(f"{path} is not a checkpoint folder; a checkpoint holds config.json and model.safetensors")
    return from_hf_tensors(load_config(path), _read_tensors(path), str(path), dtype).to(device)


def load_tokenizer(path: Path | str) -> Tokenizer:
    """The tokenizer and chat template of a checkpoint folder or .gguf file."""
    path = Path(path)
    if path.suffix == ".gguf":
        from slingshot.model.gguf import load_gguf_tokenizer

        return load_gguf_tokenizer(path)
    return Tokenizer.load(path)


def _read_tensors(path: Path) -> Iterable[tuple[str, Tensor]]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        raw = read_json(index)
        shards = sorted(set(raw.get("weight_map", {}).values())) if isinstance(raw, dict) else []
        if not shards:
            raise SlingshotError(f"{index} has no weight_map")
    else:
        shards = ["model.safetensors"]
        if not (path / shards[0]).exists():
            pickled = next(path.glob("*.bin"), None)
            hint = f"; {pickled.name} is pickled and never read: convert it to safetensors" if pickled else ""
            raise SlingshotError(f"{path} holds no model.safetensors{hint}")
    for shard in shards:
        file = path / shard
        if Path(shard).name != shard or not file.exists():
            raise SlingshotError(f"{index} names {shard}, which is not a file beside it")
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
                    yield name, tensors.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise SlingshotError(f"{file} cannot be read: {error}; is the download complete?") from error


def save_checkpoint(folder: Path, model: Transformer, tokenizer: Tokenizer, state: Mapping[str, Tensor] | None = None) -> None:
    """Write model (or `state`, its gathered weights) and tokenizer into an existing folder; the caller makes it atomic."""
    config = model.config.model_copy(update={"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id})
    tensors = to_hf_tensors(config, model.state_dict() if state is None else state)
    try:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise SlingshotError(f"cannot write {folder / 'model.safetensors'}: {error}; free space there or choose another --out") from error
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    write_json(folder / "config.json", {key: value for key, value in config.to_hf().items() if key != "dtype"} | {"torch_dtype": dtype})
    eos = sorted(tokenizer.eos_ids)
    generation = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos if len(eos) > 1 else tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    write_json(folder / "generation_config.json", generation | {"do_sample": True, "temperature": 0.6, "top_p": 0.95})
    tokenizer.save(folder)
