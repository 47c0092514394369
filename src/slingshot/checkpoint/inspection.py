"""`slingshot inspect`: what a model is and what its files hold, from their headers alone. No tensor data is read, nothing is downloaded but text.

    inspect("deepseek-v3", Console())                    # a preset: what a checkpoint of that configuration holds
    inspect("runs/tiny/rl_final", Console())             # False when it has problems that make it unusable
    examine("org/name")["parameters"]["total"]           # the same facts as plain JSON

Without torch, so that it answers at once; only a .gguf file needs the reader of its weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from slingshot.base.errors import SlingshotError
from slingshot.base.files import inside, read_json
from slingshot.base.names import closest
from slingshot.base.quantity import plural, show_count, show_size
from slingshot.checkpoint.gguf.file import GGUFFile
from slingshot.checkpoint.hub import hub_name, locate, remote_headers
from slingshot.checkpoint.layout import layout
from slingshot.checkpoint.safetensors import INDEX, Shards, TensorHeader, fit
from slingshot.cost.flops import cache_bytes_per_token, parameters
from slingshot.model.config import ModelConfig, presets
from slingshot.quantization.formats import scale_shape
from slingshot.text.reasoning import ends_in_reasoning
from slingshot.text.tokenizer import Tokenizer

_SHOWN = 5  # problems of one kind; the rest is a number
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_READ = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

Facts = dict[str, Any]


def inspect(source: str, console: Console, as_json: bool = False) -> bool:
    """Print what `source` is and holds; whether it can be used. SlingshotError when it names nothing that can be looked at."""
    facts = examine(source)
    if as_json:
        console.out(json.dumps(facts, indent=2, ensure_ascii=False), highlight=False)
    else:
        _show(facts, console)
    return not facts["problems"]


def examine(source: str) -> Facts:
    """The facts as plain JSON. `problems` make the model unusable, `notes` are good to know; a part that cannot be told is null.

    source: a folder, a .gguf file, package:NAME, a name of the hub, or a preset.
    """
    facts: Facts = {
        "source": source,
        "kind": None,
        "files": None,
        "tokenizer": None,
        "template": None,
        "problems": [],
        "notes": [],
    }
    config: ModelConfig | None
    if source in presets() and not Path(source).exists():
        facts["kind"], config = "preset", ModelConfig.preset(source)
    elif (name := hub_name(source)) is not None and name.file is None:
        folder, headers, sizes = remote_headers(source)
        facts["kind"] = "hub"
        _note_unread(source, sizes, facts)
        config = _check_tensors(_folder_config(folder, facts), headers, folder, facts)
        _tokenizer(folder, config, facts)
    else:
        path = _locate(source)
        if path.is_dir():
            facts["kind"], config = "folder", _examine_folder(path, facts)
        else:
            facts["kind"], config = "gguf", _examine_gguf(path, facts)
    return facts | (
        _architecture(config)
        if config is not None
        else dict.fromkeys(("model", "parameters", "cache", "memory", "checkpoint"))
    )


def _locate(source: str) -> Path:
    try:
        return locate(source)
    except SlingshotError as error:
        near = closest(source, presets(), cutoff=0.7)
        raise SlingshotError(f"{error}; or did you mean the preset {near}?" if near else str(error)) from error


def _examine_folder(folder: Path, facts: Facts) -> ModelConfig | None:
    config = _folder_config(folder, facts)
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise SlingshotError(f"cannot read {folder}: {error.strerror or error}") from error
    for name in _READ:
        try:
            inside(folder, name)
        except SlingshotError as error:
            facts["problems"].append(str(error))
    _note_unread(str(folder), names, facts)
    if gguf := [name for name in names if name.endswith(".gguf")]:
        facts["notes"].append(f"{folder}: {gguf[0]} is another checkpoint; give its own path to look at it")
    if not any(name == INDEX or name.endswith((".safetensors", *_PICKLED)) for name in names):
        if config is not None:
            facts["notes"].append(f"{folder} holds no weights: these are the numbers of what its config.json describes")
        if "tokenizer.json" in names:
            _tokenizer(folder, config, facts)
        return config
    try:
        headers = Shards(folder).headers
    except SlingshotError as error:
        facts["problems"].append(str(error))
    else:
        config = _check_tensors(config, headers, folder, facts)
    _tokenizer(folder, config, facts)
    return config


def _examine_gguf(path: Path, facts: Facts) -> ModelConfig | None:
    from slingshot.checkpoint.gguf.read import GGUFWeights, load_gguf_tokenizer  # brings torch

    tensors = GGUFFile(path).tensors
    facts["files"] = _stored(
        (tensor.kind.name, tensor.shape, tensor.file, tensor.nbytes) for tensor in tensors.values()
    )
    config = None
    try:
        config = GGUFWeights(path).config
    except SlingshotError as error:
        facts["problems"].append(str(error))
    try:
        _look_at_tokenizer(load_gguf_tokenizer(path), path, config, facts)
    except SlingshotError as error:
        facts["problems"].append(str(error))
    return config


def _folder_config(folder: Path, facts: Facts) -> ModelConfig | None:
    try:
        file = inside(folder, "config.json")
        return ModelConfig.from_hf(read_json(file), str(file))
    except SlingshotError as error:
        facts["problems"].append(str(error))
        return None


def _note_unread(where: str, names: Iterable[str], facts: Facts) -> None:
    for name in names:
        if name.endswith(_PICKLED):
            facts["notes"].append(f"{where}: {name} is pickled, can run code when opened, and is never read")
        elif name.endswith(".py"):
            facts["notes"].append(f"{where}: {name} is a program, and is never run")


def _check_tensors(
    config: ModelConfig | None, headers: Mapping[str, TensorHeader], folder: Path, facts: Facts
) -> ModelConfig | None:
    """Count the tensors and hold them against the architecture, which is without the MTP module where only config.json has one."""
    facts["files"] = _stored((header.dtype, header.shape, header.file, None) for header in headers.values())
    if config is None:
        return None
    described = config
    config, found = fit(config, headers, folder)
    if config is not described:
        facts["notes"].append(
            f"{folder / 'config.json'} mentions an MTP module that the files have not; the model is read without"
        )
    facts["problems"] += _capped(found)
    fp8 = any(header.dtype == "F8_E4M3" for header in headers.values())
    if fp8 != (config.quantization == "fp8"):
        has = "no quantization_config, but FP8 tensors" if fp8 else "a quantization_config, but no FP8 tensors"
        facts["notes"].append(
            f"{folder / 'config.json'} has {has} beside it: slingshot goes by the tensors, other programs may not"
        )
    return config


def _capped(lines: list[str]) -> list[str]:
    return lines if len(lines) <= _SHOWN else [*lines[:_SHOWN], f"... and {len(lines) - _SHOWN:,} more like these"]


def _stored(tensors: Iterable[tuple[str, tuple[int, ...], Path, int | None]]) -> Facts:
    """What files hold, by dtype: tensors, numbers, bytes."""
    dtypes: dict[str, Facts] = {}
    files: set[Path] = set()
    for dtype, shape, file, size in tensors:
        entry = dtypes.setdefault(dtype, {"tensors": 0, "numbers": 0, "bytes": 0})
        numbers = math.prod(shape)
        entry["tensors"] += 1
        entry["numbers"] += numbers
        if size is None:
            bits = re.search(r"\d+", dtype)  # BF16, F8_E4M3, I64; BOOL takes a byte
            size = numbers * int(bits[0] if bits else 8) // 8
        entry["bytes"] += size
        files.add(file)
    dtypes = dict(sorted(dtypes.items(), key=lambda item: -item[1]["bytes"]))
    return {
        "files": len(files),
        **{key: sum(entry[key] for entry in dtypes.values()) for key in ("tensors", "numbers", "bytes")},
        "dtypes": dtypes,
    }


def _tokenizer(folder: Path, config: ModelConfig | None, facts: Facts) -> None:
    try:
        _look_at_tokenizer(Tokenizer.load(folder), folder, config, facts)
    except SlingshotError as error:
        facts["problems"].append(str(error))


def _look_at_tokenizer(tokenizer: Tokenizer, place: Path, config: ModelConfig | None, facts: Facts) -> None:
    named = {name: tokenizer.config.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    facts["tokenizer"] = {
        "kind": "byte-level BPE",
        "vocab_size": tokenizer.vocab_size,
        "control_tokens": len(tokenizer.control_ids),
        "special": {
            name: token.get("content") if isinstance(token, Mapping) else token
            for name, token in named.items()
            if token is not None
        },
        "eos_ids": sorted(tokenizer.eos_ids),
        "think_tokens": tokenizer.think_id is not None,
    }
    if config is not None and tokenizer.vocab_size > config.vocab_size:
        facts["problems"].append(
            f"{place}: the tokenizer has {tokenizer.vocab_size} ids, the embedding {config.vocab_size} rows; one of the two is another model's"
        )
    if (
        config is not None
        and config.eos_token_id is not None
        and tokenizer.eos_ids
        and config.eos_token_id not in tokenizer.eos_ids
    ):
        ends = ", ".join(map(str, sorted(tokenizer.eos_ids)))
        facts["notes"].append(
            f"{place}: config.json's eos_token_id {config.eos_token_id} is none of the tokenizer's ({ends}), which count"
        )
    template = tokenizer.chat_template
    if template is None:
        facts["notes"].append(f"{place}: there is no chat template; chat, sft and rl need one, generate --raw does not")
        return
    facts["template"] = {"tools": re.search(r"\btools\b", template) is not None, "reasoning": None, "switchable": None}
    try:
        thinking, plain = (
            tokenizer.encode_chat([{"role": "user", "content": "Hi"}], thinking=thinking) for thinking in (True, False)
        )
    except SlingshotError as error:
        facts["notes"].append(f"{place}: the chat template fails on a plain question: {error}")
        return
    tags = "<think>" in template or tokenizer.think_id is not None
    facts["template"]["reasoning"] = "opened" if ends_in_reasoning(thinking, tokenizer) else "tags" if tags else None
    facts["template"]["switchable"] = thinking != plain


def _architecture(config: ModelConfig) -> Facts:
    """What follows from the configuration alone."""
    counts, sizes = parameters(config), _sizes(config)
    head = 0 if config.tie_word_embeddings else counts.head
    # A tied matrix is multiplied by as the head, so leaving out the look-up leaves it in.
    look_up = 0 if config.tie_word_embeddings else counts.embedding
    width = 2 * config.head_dim if config.family == "dense" else config.qk_head_dim + config.v_head_dim
    fp8 = config.quantization == "fp8"
    stored = (
        "fp8"
        if fp8
        else "float32"
        if config.extra.get("torch_dtype", config.extra.get("dtype")) in (None, "float32")
        else "bfloat16"
    )
    per_token = cache_bytes_per_token(config)
    return {
        "model": {
            "model_type": config.model_type,
            "family": config.family,
            "quantization": config.quantization,
            **{key: value for key, value in config.to_hf().items() if key in _SHOWN_KEYS},
        },
        "parameters": {
            "total": counts.total,
            "mtp": counts.mtp,
            "mtp_copies": sizes["copies"],
            "router_biases": sizes["router_biases"],
            "fp8_scales": sizes["scales"] if fp8 else 0,
            "embedding": counts.embedding,
            "head": head,
            "active": counts.active,
            "active_without_embedding": counts.active - look_up,
            "active_without_embedding_and_head": counts.active - counts.embedding - head,
        },
        "cache": {
            "bytes_per_token": round(per_token),
            "bytes_at_full_context": round(per_token) * config.max_position_embeddings,
            "bytes_per_token_of_mha": 2 * width * config.num_attention_heads * config.num_hidden_layers,
        },
        "memory": {dtype: {part: sizes["bytes"][dtype, part] for part in ("main", "mtp")} for dtype in _BYTES},
        "checkpoint": {
            "tensors": sizes["tensors"] + (sizes["matrices"] if fp8 else 0),
            "numbers": counts.total
            + counts.mtp
            + sizes["copies"]
            + sizes["router_biases"]
            + (sizes["scales"] if fp8 else 0),
            "bytes": sum(sizes["bytes"][stored, part] for part in ("main", "mtp", "copies")),
        },
    }


_SHOWN_KEYS = {
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "rope_theta",
    "rope_scaling", "tie_word_embeddings", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok", "n_group", "topk_group", "first_k_dense_replace",
    "num_nextn_predict_layers", "num_key_value_heads", "head_dim",
}  # fmt: skip

# Bytes per number of each kind of tensor, by the dtype that a checkpoint is called by: matrices, embedding and head, router biases, the rest.
# A block scale of fp8 takes 4 bytes; q8_0 has a float16 scale for every 32 numbers.
_BYTES = {
    "float32": (4.0, 4.0, 4.0, 4.0),
    "bfloat16": (2.0, 2.0, 4.0, 2.0),
    "fp8": (1.0, 2.0, 4.0, 2.0),
    "q8_0": (34 / 32, 34 / 32, 4.0, 4.0),
}


def _sizes(config: ModelConfig) -> Facts:
    """Sums over the tensors of `layout`: how many, their numbers beyond `parameters`, and bytes by (dtype, part)."""
    found: Facts = {"tensors": 0, "matrices": 0, "scales": 0, "copies": 0, "router_biases": 0}
    mtp = f"model.layers.{config.num_hidden_layers}."
    numbers: dict[tuple[str, int], int] = {}
    for spec in layout(config):
        count = math.prod(spec.shape)
        part = "copies" if spec.copy_of else "mtp" if spec.name.startswith(mtp) else "main"
        found["tensors"] += 1
        if part == "copies":
            found["copies"] += count
        if spec.stored == "linear":
            found["matrices"] += 1
            scales = math.prod(scale_shape(spec.shape))
            found["scales"] += scales
            numbers[part, 4] = numbers.get((part, 4), 0) + scales
            kind = 0
        elif spec.stored == "float32":
            found["router_biases"] += count
            kind = 2
        else:
            kind = 1 if spec.name.endswith(("embed_tokens.weight", "lm_head.weight", "shared_head.head.weight")) else 3
        numbers[part, kind] = numbers.get((part, kind), 0) + count
    found["bytes"] = {
        (dtype, part): round(
            sum(each * numbers.get((part, kind), 0) for kind, each in enumerate(widths))
            + (4 * numbers.get((part, 4), 0) if dtype == "fp8" else 0)
        )
        for dtype, widths in _BYTES.items()
        for part in ("main", "mtp", "copies")
    }
    return found


def _show(facts: Facts, console: Console) -> None:
    what = {
        "preset": "a preset: what its checkpoint holds",
        "hub": "a checkpoint on the hub",
        "gguf": "a GGUF file",
        "folder": "a checkpoint folder",
    }
    console.print(Text.assemble((_plain(facts["source"]), "bold"), "  ", (what[facts["kind"]], "dim")), soft_wrap=True)
    console.print()
    for heading, rows, remark in _sections(facts):
        console.print(heading, style="bold")
        widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
        for name, *values in rows:
            # One value is text; of several, all are numbers, in columns.
            aligned = (
                values
                if len(values) == 1
                else [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            )
            console.print(Text.assemble((name.ljust(widths[0]), "dim"), "  ", "  ".join(aligned)), soft_wrap=True)
        if remark:
            console.print(remark, style="dim", soft_wrap=True, highlight=False)
        console.print()
    for style, name in (("red", "problem"), ("yellow", "note")):
        for line in facts[f"{name}s"]:
            console.print(Text.assemble((f"{name}: ", style), _plain(line)), soft_wrap=True)
    if facts["files"]:
        verdict = "" if facts["problems"] else "Everything fits. "
        console.print(
            f"{verdict}Headers only: no tensor's numbers were read, so NaN among them would not show.",
            style="dim",
            soft_wrap=True,
        )


_Row = tuple[str, ...]


def _sections(facts: Facts) -> Iterator[tuple[str, list[_Row], str]]:
    """Headings, rows of cells below each, and a remark."""
    if facts["model"]:
        yield "Model", list(_model_rows(facts["model"])), ""
        yield "Parameters", list(_parameter_rows(facts)), ""
        several = facts["parameters"]["active"] != facts["parameters"]["total"]
        remark = (
            "Model cards differ in what they leave out: DeepSeek's 37B for V3 is the second, 36.6 B." if several else ""
        )
        yield "Active for one token", list(_active_rows(facts["parameters"])), remark
        yield "KV cache in bfloat16", list(_cache_rows(facts["model"], facts["cache"])), ""
        mtp = facts["parameters"]["mtp"] > 0
        memory: list[_Row] = [
            (dtype, show_size(by["main"]), *([show_size(by["main"] + by["mtp"])] if mtp else []))
            for dtype, by in facts["memory"].items()
        ]
        yield "Memory of the weights" + (", without and with the MTP module" if mtp else ""), memory, ""
    if files := facts["files"]:
        stored: list[_Row] = [
            (dtype, plural(entry["tensors"], "tensor"), show_size(entry["bytes"]))
            for dtype, entry in files["dtypes"].items()
        ]
        yield (
            "Stored",
            [*stored, (plural(files["files"], "file"), plural(files["tensors"], "tensor"), show_size(files["bytes"]))],
            "",
        )
    if tokenizer := facts["tokenizer"]:
        yield "Tokenizer", list(_tokenizer_rows(tokenizer, facts["template"])), ""


def _tokenizer_rows(tokenizer: Facts, template: Facts | None) -> Iterator[_Row]:
    yield (
        "vocabulary",
        f"{tokenizer['kind']}, {tokenizer['vocab_size']:,} ids, {tokenizer['control_tokens']} of them control tokens",
    )
    for name, token in tokenizer["special"].items():
        yield name, _plain(str(token))
    if tokenizer["eos_ids"]:
        yield "ends", f"id {', '.join(map(str, tokenizer['eos_ids']))}"
    if template:
        reasoning = {
            "opened": "opens <think> in the prompt",
            "tags": "leaves the think tags to the model",
            None: "no think tags",
        }
        switch = ", can be switched off" if template["switchable"] and template["reasoning"] else ""
        yield (
            "template",
            f"{reasoning[template['reasoning']]}{switch}; {'knows tools' if template['tools'] else 'knows no tools'}",
        )


def _model_rows(model: Facts) -> Iterator[_Row]:
    yield "type", model["model_type"] + (", its matrices stored in FP8" if model["quantization"] else "")
    layers, heads = model["num_hidden_layers"], model["num_attention_heads"]
    yield "layers", f"{layers} of width {model['hidden_size']}"
    if model["family"] == "dense":
        yield "attention", f"{heads} heads of {model['head_dim']} on {model['num_key_value_heads']} of keys and values"
        yield "MLP", f"{model['intermediate_size']} wide"
    else:
        query = f"queries through {model['q_lora_rank']}" if model["q_lora_rank"] else "queries in one step"
        yield (
            "attention",
            f"MLA, {heads} heads; keys of {model['qk_nope_head_dim']} + {model['qk_rope_head_dim']}, values of {model['v_head_dim']}",
        )
        yield "", f"keys and values from a latent of {model['kv_lora_rank']}, {query}"
        dense = min(layers, model["first_k_dense_replace"])
        if dense:
            yield "MLP", f"{model['intermediate_size']} wide in the first {dense}"
        if dense < layers:
            groups = f", from {model['topk_group']} of {model['n_group']} groups" if model["n_group"] > 1 else ""
            shared = f", {model['n_shared_experts']} shared" if model["n_shared_experts"] else ""
            yield (
                "experts",
                f"{model['n_routed_experts']} of width {model['moe_intermediate_size']}, {model['num_experts_per_tok']} a token{groups}{shared}",
            )
    rope = model["rope_scaling"]
    kind = {"yarn": "YaRN", "llama3": "Llama 3's scaling"}[rope["rope_type"]] if rope else ""
    extended = f" ({kind}: {rope['factor']:g} times {rope['original_max_position_embeddings']:,})" if rope else ""
    yield "context", f"{model['max_position_embeddings']:,} tokens{extended}"
    yield (
        "vocabulary",
        f"{model['vocab_size']:,}{', embedding and head are one matrix' if model['tie_word_embeddings'] else ''}",
    )


def _parameter_rows(facts: Facts) -> Iterator[_Row]:
    counts, checkpoint = facts["parameters"], facts["checkpoint"]
    rows = {
        "model": counts["total"],
        "MTP module": counts["mtp"],
        "its copies of embedding and head": counts["mtp_copies"],
        "router biases": counts["router_biases"],
        "FP8 scales": counts["fp8_scales"],
    }
    for name, count in rows.items():
        if count:
            yield name, f"{count:,}", show_count(count, 4)
    if checkpoint["numbers"] != counts["total"]:
        yield (
            f"all, in {checkpoint['tensors']:,} tensors",
            f"{checkpoint['numbers']:,}",
            show_count(checkpoint["numbers"], 4),
        )
    if facts["files"] is None:
        yield "a checkpoint's size", "", show_size(checkpoint["bytes"])


def _active_rows(counts: Facts) -> Iterator[_Row]:
    yield "with embedding and head", show_count(counts["active"], 4)
    yield "without the input embedding", show_count(counts["active_without_embedding"], 4)
    yield "without both", show_count(counts["active_without_embedding_and_head"], 4)


def _cache_rows(model: Facts, cache: Facts) -> Iterator[_Row]:
    ratio = cache["bytes_per_token_of_mha"] / cache["bytes_per_token"]
    yield "one token", f"{cache['bytes_per_token']:,} bytes"
    yield "full context", f"{show_size(cache['bytes_at_full_context'])} for {model['max_position_embeddings']:,} tokens"
    if ratio > 1:
        yield "as plain MHA", f"{cache['bytes_per_token_of_mha']:,} bytes a token, {ratio:.0f} times as much"


def _plain(text: str) -> str:
    """Text from a file, fit for a terminal: no control sequences."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
