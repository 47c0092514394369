"""`slingshot inspect`: the facts of checkpoint/inspection.py as sections of rows, or as JSON.

show(examine("runs/tiny/rl_final"), Console())
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from rich.console import Console
from rich.text import Text

from slingshot.base.quantity import plural, show_count, show_share, show_size

Facts = dict[str, Any]
_Row = tuple[str, ...]

_KINDS = {"preset": "a preset: what its checkpoint holds", "hub": "a checkpoint on the hub", "gguf": "a GGUF file",
          "folder": "a checkpoint folder", "adapter": "an adapter and its base"}  # fmt: skip
_REASONING = {"opened": "opens <think> in the prompt", "tags": "leaves the think tags to the model",
              None: "no think tags"}  # fmt: skip
_ACTIVE = {"with embedding and head": "active", "without the input embedding": "active_without_embedding",
           "without both": "active_without_embedding_and_head"}  # fmt: skip


def show(facts: Facts, console: Console) -> None:
    title = Text.assemble((_plain(facts["source"]), "bold"), "  ", (_KINDS[facts["kind"]], "dim"), "\n")
    console.print(title, soft_wrap=True)
    for heading, rows, remark in _sections(facts):
        console.print(heading, style="bold")
        widths = [max(len(cells[column]) for cells in rows) for column in range(len(rows[0]))]
        for name, *values in rows:
            if len(values) > 1:  # one value is text; of several, all are numbers, in columns
                values = [value.rjust(width) for value, width in zip(values, widths[1:], strict=True)]
            console.print(Text.assemble((name.ljust(widths[0]), "dim"), "  ", "  ".join(values)), soft_wrap=True)
        if remark:
            console.print(remark, style="dim", soft_wrap=True, highlight=False)
        console.print()
    for style, name in (("red", "problem"), ("yellow", "note")):
        for line in facts[f"{name}s"]:
            console.print(Text.assemble((f"{name}: ", style), _plain(line)), soft_wrap=True)
    if facts["files"]:
        verdict = "" if facts["problems"] else "Everything fits. "
        unseen = "Headers only: no tensor's numbers were read, so NaN among them would not show."
        console.print(verdict + unseen, style="dim", soft_wrap=True)


def _sections(facts: Facts) -> Iterator[tuple[str, list[_Row], str]]:
    """Headings, rows of cells below each, and a remark."""
    if model := facts["model"]:
        counts, cache = facts["parameters"], facts["cache"]
        yield "Model", list(_model_rows(model)), ""
        yield "Parameters", list(_parameter_rows(facts)), ""
        several = counts["active"] != counts["total"]
        v3 = "; DeepSeek's 37B for V3 is the second" * (show_count(counts["active_without_embedding"], 2) == "37B")
        rows: list[_Row] = [(name, show_count(counts[key], 4)) for name, key in _ACTIVE.items()]
        yield "Active for one token", rows, f"Model cards differ in what they leave out{v3}." if several else ""
        full = f"{show_size(cache['bytes_at_full_context'])} for {model['max_position_embeddings']:,} tokens"
        rows = [("one token", f"{cache['bytes_per_token']:,} bytes"), ("full context", full)]
        if (ratio := cache["bytes_per_token_of_mha"] / cache["bytes_per_token"]) > 1:
            many = f"{cache['bytes_per_token_of_mha']:,} bytes a token, {ratio:.0f} times as much"
            rows.append(("as plain MHA", many))
        yield "KV cache in bfloat16", rows, ""
        parts = ["main", "mtp"] if counts["mtp"] else ["main"]
        sums = {dtype: accumulate([by[part] for part in parts]) for dtype, by in facts["memory"].items()}
        rows = [(dtype, *map(show_size, sizes)) for dtype, sizes in sums.items()]
        yield "Memory of the weights" + (", without and with the MTP module" if counts["mtp"] else ""), rows, ""
    if files := facts["files"]:
        entries = files["dtypes"] | {plural(files["files"], "file"): files}
        rows = [(name, plural(each["tensors"], "tensor"), show_size(each["bytes"])) for name, each in entries.items()]
        yield "Stored", rows, ""
    if facts["tokenizer"]:
        yield "Tokenizer", list(_tokenizer_rows(facts["tokenizer"], facts["template"])), ""


def _model_rows(model: Facts) -> Iterator[_Row]:
    kind, group = (model["quantization"] or "").replace("fp", "FP"), model["quantization_group_size"]
    if numbers := model["quantization_numbers"]:
        shares = {name: count / sum(numbers.values()) for name, count in numbers.items()}
        kind = " and ".join(f"{name} ({show_share(share)} of the numbers)" for name, share in shares.items())
    stored = f", its matrices stored in {kind}" if kind else ""
    yield "type", model["model_type"] + stored + (f" in groups of {group}" if group else "")
    layers, heads = model["num_hidden_layers"], model["num_attention_heads"]
    yield "layers", f"{layers} of width {model['hidden_size']}"
    if model["family"] == "dense":
        yield "attention", f"{heads} heads of {model['head_dim']} on {model['num_key_value_heads']} of keys and values"
        yield "MLP", f"{model['intermediate_size']} wide"
    else:
        query = f"queries through {model['q_lora_rank']}" if model["q_lora_rank"] else "queries in one step"
        keys = f"keys of {model['qk_nope_head_dim']} + {model['qk_rope_head_dim']}"
        yield "attention", f"MLA, {heads} heads; {keys}, values of {model['v_head_dim']}"
        yield "", f"keys and values from a latent of {model['kv_lora_rank']}, {query}"
        if dense := min(layers, model["first_k_dense_replace"]):
            yield "MLP", f"{model['intermediate_size']} wide in the first {dense}"
        if dense < layers:
            each = f"{model['n_routed_experts']} of width {model['moe_intermediate_size']}"
            groups = f", from {model['topk_group']} of {model['n_group']} groups" if model["n_group"] > 1 else ""
            shared = f", {model['n_shared_experts']} shared" if model["n_shared_experts"] else ""
            yield "experts", f"{each}, {model['num_experts_per_tok']} a token{groups}{shared}"
    extended = ""
    if rope := model["rope_scaling"]:
        kind = {"yarn": "YaRN", "llama3": "Llama 3's scaling"}[rope["rope_type"]]
        extended = f" ({kind}: {rope['factor']:g} times {rope['original_max_position_embeddings']:,})"
    yield "context", f"{model['max_position_embeddings']:,} tokens{extended}"
    tied = ", embedding and head are one matrix" if model["tie_word_embeddings"] else ""
    yield "vocabulary", f"{model['vocab_size']:,}{tied}"


def _parameter_rows(facts: Facts) -> Iterator[_Row]:
    counts, checkpoint = facts["parameters"], facts["checkpoint"]
    rows = {"model": counts["total"], "MTP module": counts["mtp"],
            "its copies of embedding and head": counts["mtp_copies"], "router biases": counts["router_biases"],
            "FP8 scales": counts["fp8_scales"]}  # fmt: skip
    if checkpoint["numbers"] != counts["total"]:
        rows[f"all, in {checkpoint['tensors']:,} tensors"] = checkpoint["numbers"]
    for name, count in rows.items():
        if count:
            yield name, f"{count:,}", show_count(count, 4)
    if facts["files"] is None:
        yield "a checkpoint's size", "", show_size(checkpoint["bytes"])


def _tokenizer_rows(tokenizer: Facts, template: Facts | None) -> Iterator[_Row]:
    size = f"{tokenizer['vocab_size']:,} ids, {tokenizer['control_tokens']} of them control tokens"
    yield "vocabulary", f"{tokenizer['kind']}, {size}"
    for name, token in tokenizer["special"].items():
        yield name, _plain(str(token))
    if tokenizer["eos_ids"]:
        yield "ends", f"id {', '.join(map(str, tokenizer['eos_ids']))}"
    if template:
        switch = ", can be switched off" if template["switchable"] and template["reasoning"] else ""
        tools = "knows tools" if template["tools"] else "knows no tools"
        yield "template", f"{_REASONING[template['reasoning']]}{switch}; {tools}"


def _plain(text: str) -> str:
    """Text from a file, fit for a terminal: no control sequences."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)
