"""What a model is and what its files hold, from their headers alone: the checks of loading, told instead of raised.

    examine("deepseek-v3")                               # a preset: what a checkpoint of that configuration holds
    examine("runs/tiny/rl_final")["problems"]            # a line for each thing that makes it unusable
    examine("org/name")["parameters"]["total"]           # nothing is downloaded but text and headers

Plain JSON, without torch, so that it answers at once; only a .gguf file needs the reader of its weights.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.files import os_errors
from slingshot.base.names import closest
from slingshot.checkpoint.adapter import Adapter, described_by, is_adapter
from slingshot.checkpoint.description import check_tokenizer, folder_tokenizer, load_config
from slingshot.checkpoint.hub import locate, outline
from slingshot.checkpoint.layout import Spec, layout, packed_layout
from slingshot.checkpoint.repository import hub_name
from slingshot.checkpoint.safetensors import INDEX, NEVER_READ, PICKLED, Shards, fit
from slingshot.cost.flops import cache_bytes_per_token, parameters
from slingshot.model.config import ModelConfig, presets
from slingshot.quantization.formats import BITS, Scheme, is_packed, scale_shape
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer

_TOLD = 5  # problems of one kind; the rest is a number

Facts = dict[str, Any]


def described(source: str) -> ModelConfig:
    """The architecture of a folder, a .gguf file, package:NAME or a name of the hub, whose weights stay there."""
    with outline(source) if hub_name(source) else contextlib.nullcontext(locate(source)) as path:
        path = described_by(path)
        if path.is_dir():
            return load_config(path)
        from slingshot.checkpoint.gguf.read import GGUFWeights  # brings torch

        return GGUFWeights(path).config


def examine(source: str) -> Facts:
    """The facts. `problems` make the model unusable, `notes` are good to know; what cannot be told is null.

    source: a folder, a .gguf file, package:NAME, a name of the hub, or a preset. SlingshotError when it is none.
    """
    facts: Facts = {"source": source, "problems": [], "notes": []}
    facts |= dict.fromkeys(("kind", "files", "tokenizer", "template"))
    config: ModelConfig | None
    if source in presets() and not Path(source).exists():
        facts["kind"], config = "preset", ModelConfig.preset(source)
    elif (name := hub_name(source)) is not None:
        with outline(source) as path:
            config = _examine_path(path, facts)
            here = str(path if path.is_dir() else path.parent)
        facts["kind"] = "hub"
        for key in ("problems", "notes"):
            facts[key] = [line.replace(here, name.repo) for line in facts[key]]
    else:
        try:
            path = locate(source)
        except SlingshotError as error:
            preset = closest(source, presets(), cutoff=0.7)
            raise SlingshotError(f"{error}; or did you mean the preset {preset}?" if preset else str(error)) from error
        config = _examine_path(path, facts)
    if config is None:
        return facts | dict.fromkeys(("model", "parameters", "cache", "memory", "checkpoint"))
    return facts | _architecture(config)


def _examine_path(path: Path, facts: Facts) -> ModelConfig | None:
    if is_adapter(path):
        return _examine_adapter(path, facts)
    facts["kind"] = "folder" if path.is_dir() else "gguf"
    return _examine_folder(path, facts) if path.is_dir() else _examine_gguf(path, facts)


def _examine_adapter(folder: Path, facts: Facts) -> ModelConfig | None:
    """Its own tensors, and the model that it makes of its base."""
    config = None
    with _told(facts):
        adapter = Adapter(folder)
        config = _examine_path(adapter.base, facts)
        facts["notes"].append(f"{folder} is an adapter: what is told beside its files is of its base, {adapter.base}")
        if config is not None:
            headers = adapter.fit(config).headers.values()
            facts["files"] = _stored((each.dtype, each.shape, each.file, None) for each in headers)
    facts["kind"] = "adapter"
    return config


@contextlib.contextmanager
def _told(facts: Facts) -> Iterator[None]:
    """What cannot be loaded is a problem."""
    try:
        yield
    except SlingshotError as error:
        facts["problems"].append(str(error))


def _examine_folder(folder: Path, facts: Facts) -> ModelConfig | None:
    config, notes = None, facts["notes"]
    with _told(facts):
        config = load_config(folder)
    with os_errors(f"cannot read {folder}"):
        names = sorted(file.name for file in folder.iterdir())
    others = {".py": "is a program, and is never run"} | dict.fromkeys(PICKLED, NEVER_READ)
    others[".gguf"] = "is another checkpoint; give its own path to look at it"
    notes += [f"{folder}: {name} {others[end]}" for name in names if (end := Path(name).suffix) in others]
    weights = any(name == INDEX or name.endswith((".safetensors", *PICKLED)) for name in names)
    if weights:
        with _told(facts):
            config = _examine_shards(config, folder, facts)
    elif config is not None:
        notes.append(f"{folder} holds no weights: these are the numbers of what its config.json describes")
    if weights or "tokenizer.json" in names:
        with _told(facts):
            tokenizer = folder_tokenizer(folder)
            _examine_tokenizer(tokenizer, folder, config, facts)
            if config is not None:
                check_tokenizer(tokenizer, config.vocab_size, folder)
    return config


def _examine_shards(described: ModelConfig | None, folder: Path, facts: Facts) -> ModelConfig | None:
    headers = Shards(folder).headers
    facts["files"] = _stored((each.dtype, each.shape, each.file, None) for each in headers.values())
    if described is None:
        return None
    config, found = fit(described, headers, folder)
    file, notes = folder / "config.json", facts["notes"]
    if config is not described:
        notes.append(f"{file} mentions an MTP module that the files have not; the model is read without")
    more = f"... and {len(found) - _TOLD:,} more like these"
    facts["problems"] += found[:_TOLD] + ([more] if len(found) > _TOLD else [])
    fp8 = any(header.dtype == "F8_E4M3" for header in headers.values())
    if fp8 != (config.quantization == "fp8"):
        has = "no quantization_config, but FP8 tensors" if fp8 else "a quantization_config, but no FP8 tensors"
        notes.append(f"{file} has {has} beside it: slingshot goes by the tensors, other programs may not")
    return config


def _examine_gguf(path: Path, facts: Facts) -> ModelConfig | None:
    from slingshot.checkpoint.gguf.file import GGUFFile
    from slingshot.checkpoint.gguf.read import GGUFWeights  # brings torch
    from slingshot.checkpoint.gguf.tokenizer import load_gguf_tokenizer

    file, config = GGUFFile(path), None
    stored = ((tensor.kind.name, tensor.shape, tensor.file, tensor.nbytes) for tensor in file.tensors.values())
    facts["files"] = _stored(stored)
    with _told(facts):
        config = GGUFWeights(path).config
    with _told(facts):
        _examine_tokenizer(load_gguf_tokenizer(file), path, config, facts)
    return config


def _stored(tensors: Iterable[tuple[str, tuple[int, ...], Path, int | None]]) -> Facts:
    """What files hold, by dtype: tensors, numbers, bytes."""
    dtypes: dict[str, Counter[str]] = {}
    files: set[Path] = set()
    sums = Counter(tensors=0, numbers=0, bytes=0)
    for dtype, shape, file, size in tensors:
        numbers = math.prod(shape)
        if size is None:
            bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, I64; BOOL takes a byte
            size = numbers * int(bits[0] if bits else 8) // 8
        for counts in (dtypes.setdefault(dtype, Counter()), sums):
            counts.update(tensors=1, numbers=numbers, bytes=size)
        files.add(file)
    by_size = sorted(dtypes.items(), key=lambda item: -item[1]["bytes"])
    return {"files": len(files), **sums, "dtypes": {dtype: dict(counts) for dtype, counts in by_size}}


def _examine_tokenizer(tokenizer: Tokenizer, place: Path, config: ModelConfig | None, facts: Facts) -> None:
    special = {name: tokenizer.token(f"{name}_token") for name in ("bos", "eos", "pad")}
    facts["tokenizer"] = {
        "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "control_tokens": len(tokenizer.control_ids),
        "special": {name: token for name, token in special.items() if token is not None},
        "eos_ids": sorted(tokenizer.eos_ids), "think_tokens": tokenizer.think_id is not None,
    }  # fmt: skip
    end = config.eos_token_id if config is not None else None
    if end is not None and tokenizer.eos_ids and end not in tokenizer.eos_ids:
        ends = f"none of the tokenizer's ({', '.join(map(str, sorted(tokenizer.eos_ids)))}), which count"
        facts["notes"].append(f"{place}: config.json's eos_token_id {end} is {ends}")
    template = tokenizer.chat_template
    if template is None:
        facts["notes"].append(f"{place}: there is no chat template; chat, sft and rl need one, generate --raw does not")
        return
    facts["template"] = {"tools": False, "reasoning": None, "switchable": None}
    question = [{"role": "user", "content": "Hi"}]
    tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
    if re.search(r"\btools\b", template):  # which may stand there to say that there are none
        with contextlib.suppress(SlingshotError):
            tokenizer.encode_chat(question, tools=[tool])
            facts["template"]["tools"] = True
    try:
        thinking, plain = (tokenizer.encode_chat(question, thinking=thinking) for thinking in (True, False))
    except SlingshotError as error:
        facts["notes"].append(f"{place}: the chat template fails on a plain question: {error}")
        return
    tags = "tags" if "<think>" in template or tokenizer.think_id is not None else None
    facts["template"]["reasoning"] = "opened" if ends_in_reasoning(thinking, tokenizer) else tags
    facts["template"]["switchable"] = thinking != plain


_KEYS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings", "rope_theta", "rope_scaling", "tie_word_embeddings", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "moe_intermediate_size", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
    "num_nextn_predict_layers", "num_key_value_heads", "head_dim",
}  # fmt: skip

_PARTS = ("main", "mtp", "copies")

_SHAPE = 16  # bytes that say the shape of an int8 or int4 matrix


def _integer_bytes(bits: int, group: int) -> dict[str, float]:
    """A 16-bit scale for every group of numbers."""
    return {"matrix": bits / 8 + 2 / group, "kv_b": 2.0, "embedding": 2.0, "router_bias": 4.0, "other": 2.0}


# Bytes per number of each kind of tensor, by a checkpoint's dtype. q8_0 has a float16 scale for every 32 numbers.
_BYTES = {
    "float32": {"matrix": 4.0, "kv_b": 4.0, "embedding": 4.0, "router_bias": 4.0, "other": 4.0},
    "bfloat16": {"matrix": 2.0, "kv_b": 2.0, "embedding": 2.0, "router_bias": 4.0, "other": 2.0},
    "fp8": {"matrix": 1.0, "kv_b": 1.0, "scale": 4.0, "embedding": 2.0, "router_bias": 4.0, "other": 2.0},
    "q8_0": {"matrix": 34 / 32, "kv_b": 34 / 32, "embedding": 34 / 32, "router_bias": 4.0, "other": 4.0},
    "int8": _integer_bytes(8, 32),
    "int4": _integer_bytes(4, 32),
}


def _architecture(config: ModelConfig) -> Facts:
    """What follows from the configuration alone."""
    counts, fp8, (numbers, tensors) = parameters(config), config.quantization == "fp8", _numbers(config)
    dtype, group = config.extra.get("torch_dtype", config.extra.get("dtype")), config.quantization_group_size
    stored = config.quantization or ("float32" if dtype in (None, "float32") else "bfloat16")
    n_bytes = {
        name: {part: round(sum(each * numbers[part, kind] for kind, each in widths.items())) for part in _PARTS}
        for name, widths in _BYTES.items()
    }
    packed = more = 0  # matrices of few bits, and the tensors that they are besides one
    if (scheme := config.scheme) is not None:
        n_bytes[stored], more = _few_bits(config, scheme)
        packed = tensors["matrix"] if scheme.kind in BITS else 0
    copies = sum(count for (part, _), count in numbers.items() if part == "copies")
    scales, biases = (sum(numbers[part, kind] for part in _PARTS) for kind in ("scale", "router_bias"))
    scales *= fp8
    width = 2 * config.head_dim if config.family == "dense" else config.qk_head_dim + config.v_head_dim
    per_token = round(cache_bytes_per_token(config))
    kind: Facts = {"model_type": config.model_type, "family": config.family, "quantization": config.quantization}
    kind |= {"quantization_group_size": group, "quantization_numbers": _widths(config)}
    return {
        "model": kind | {key: value for key, value in config.to_hf().items() if key in _KEYS},
        "parameters": {
            "total": counts.total, "mtp": counts.mtp, "mtp_copies": copies, "router_biases": biases,
            "fp8_scales": scales, "embedding": counts.embedding, "head": counts.head,
        } | counts.active_ways,
        "cache": {
            "bytes_per_token": per_token, "bytes_at_full_context": per_token * config.max_position_embeddings,
            "bytes_per_token_of_mha": 2 * width * config.num_attention_heads * config.num_hidden_layers,
        },
        "memory": {name: {part: each[part] for part in ("main", "mtp")} for name, each in n_bytes.items()},
        "checkpoint": {
            "tensors": tensors["all"] + (tensors["matrix"] + tensors["kv_b"]) * fp8 + more,
            "bytes": sum(n_bytes[stored].values()) + _SHAPE * packed,
            "numbers": counts.total + counts.mtp + copies + biases + scales,
        },
    }  # fmt: skip


def _few_bits(config: ModelConfig, scheme: Scheme) -> tuple[dict[str, int], int]:
    """Bytes by part where matrices are stored so, without what says their shapes; how many tensors there are more."""
    sizes, more = Counter(dict.fromkeys(_PARTS, 0)), 0
    for spec in layout(config):
        if is_packed(spec.name, spec.stored):
            stored = list(scheme.parts(spec.name, spec.shape).values())
            more += len(stored) - 1
        else:
            stored = [("F32" if spec.stored == "float32" else "", spec.shape)]
        widths = {"I8": 1, "U8": 1, "": 2, "I32": 4, "F32": 4, "I64": 0}
        sizes[_part(config, spec)] += sum(widths[kind] * math.prod(shape) for kind, shape in stored)
    return dict(sizes), more


def _widths(config: ModelConfig) -> dict[str, int]:
    """Of matrices of int4 some of which are int8: how many numbers are which."""
    widths: Counter[str] = Counter()
    if (scheme := config.scheme) is not None and scheme.wide:
        for spec in packed_layout(config):
            widths[f"int{scheme.bits(spec.name)}"] += math.prod(spec.shape)
    return dict(sorted(widths.items()))


def _part(config: ModelConfig, spec: Spec) -> str:
    mtp = spec.name.startswith(f"model.layers.{config.num_hidden_layers}.")
    return "copies" if spec.copy_of else "mtp" if mtp else "main"


def _numbers(config: ModelConfig) -> tuple[Counter[tuple[str, str]], Counter[str]]:
    """Over the tensors of `layout`: numbers by (part, kind), FP8's scales among them; tensors by kind, and all."""
    numbers: Counter[tuple[str, str]] = Counter()
    tensors: Counter[str] = Counter()
    kinds = {"linear": "matrix", "float32": "router_bias"}
    for spec in layout(config):
        part = _part(config, spec)
        outside = spec.name.endswith(("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight"))
        kind = kinds.get(spec.stored, "embedding" if outside else "other")
        kind = "kv_b" if kind == "matrix" and not is_packed(spec.name, spec.stored) else kind
        tensors.update((kind, "all"))
        numbers[part, kind] += math.prod(spec.shape)
        if spec.stored == "linear":
            numbers[part, "scale"] += math.prod(scale_shape(spec.shape))
    return numbers, tensors
