"""The tokenizer of a GGUF file: byte-level BPE tables and the chat template, read and written. No torch.

tokenizer = load_gguf_tokenizer(GGUFFile(path))
notes = add_tokenizer(writer, tokenizer, vocab_size)
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import GGUFWriter, TokenType

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.description import check_tokenizer
from slingshot.checkpoint.gguf.file import GGUFFile
from slingshot.checkpoint.gguf.names import NAMED_TOKENS
from slingshot.text.pretokenizers import SPLITS, recognise
from slingshot.text.tokenizer import Tokenizer


def load_gguf_tokenizer(file: GGUFFile) -> Tokenizer:
    """The tokenizer and chat template of a file. SlingshotError names the key that does not fit, or too many ids."""
    place = f"{file.path}: tokenizer.ggml"
    model, split = file.get("tokenizer.ggml.model", str), file.get("tokenizer.ggml.pre", str, "default")
    for key, given, known in (("model", model, ("gpt2",)), ("pre", split, tuple(SPLITS))):
        if given not in known:
            why = f"is not supported, {', '.join(known)} is; give a checkpoint folder with its tokenizer.json instead"
            raise SlingshotError(f"{place}.{key} {given!r:.80} {why}")
    tokens, types = file.get("tokenizer.ggml.tokens", list), file.get("tokenizer.ggml.token_type", np.ndarray)
    if not len(types) == len(tokens) == len(set(tokens)):
        counts = f"{len(tokens)} entries, {len(set(tokens))} different ones, token_type {len(types)}"
        raise SlingshotError(f"{place}.tokens has {counts}")
    names: dict[str, str] = {}
    for key in ("bos", "eos", "unknown", "padding", "eot", "eom"):
        id = file.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if id >= len(tokens):
            raise SlingshotError(f"{place}.{key}_token_id {id} is beyond the {len(tokens)} tokens")
        if id >= 0:
            names[key] = tokens[id]
    config: dict[str, Any] = {f"{ours}_token": names[key] for ours, key in NAMED_TOKENS.items() if key in names}
    # llama.cpp's own default
    config["add_bos_token"] = file.get("tokenizer.ggml.add_bos_token", bool, split == "llama-bpe")
    if template := file.get("tokenizer.chat_template", str, ""):
        config["chat_template"] = template
    kinds = dict(zip(tokens, types.tolist(), strict=True))
    vocab = {token: id for id, token in enumerate(tokens) if kinds[token] != TokenType.UNUSED}
    apart = (TokenType.CONTROL, TokenType.USER_DEFINED)
    added = {token: kinds[token] == TokenType.CONTROL for token in vocab if kinds[token] in apart}
    merges = [merge.partition(" ")[::2] for merge in file.get("tokenizer.ggml.merges", list)]
    ends = [tokens.index(names[key]) for key in ("eot", "eom") if key in names]
    try:
        tokenizer = Tokenizer.from_bpe(vocab, merges, added, config, split, ends)
    except Exception as error:  # the Rust side raises plain Exception
        raise SlingshotError(f"{place}.tokens and .merges make no tokenizer: {str(error)!a:.200}") from error
    if embedding := file.tensors.get("token_embd.weight"):
        check_tokenizer(tokenizer, math.prod(embedding.shape[:-1]), file.path)
    return tokenizer


def add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> list[str]:
    """Write the vocabulary, filled up to the embedding's rows, and the chat template. Returns what has no place."""
    description = tokenizer.description()
    model, added = description["model"], {token["id"]: token for token in description["added_tokens"]}
    split = recognise(description)
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(key):
            raise SlingshotError(f"llama.cpp knows no tokenizer with {key} {model[key]!r:.80}")
    tokenizer.check_fits(vocab_size)
    if tokenizer.eos_id is None:
        why = "llama.cpp would take token 11 for it: name one in tokenizer_config.json"
        raise SlingshotError(f"the tokenizer names no eos_token; {why}")
    if not model["merges"]:
        raise SlingshotError("the tokenizer has no merges; llama.cpp reads none without")
    texts = {id: token for token, id in model["vocab"].items()} | {id: token["content"] for id, token in added.items()}
    tokens = [texts.get(id, f"[PAD{id}]") for id in range(vocab_size)]
    if len(set(tokens)) < vocab_size:
        raise SlingshotError("two tokens of the tokenizer have the same text, which llama.cpp refuses")
    kinds = [TokenType.NORMAL if id in texts else TokenType.UNUSED for id in range(vocab_size)]
    for id, token in added.items():
        kinds[id] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]])
    ids, ends = {text: id for id, text in texts.items()}, sorted(tokenizer.eos_ids - {tokenizer.eos_id}, reverse=True)
    named = {key: ids.get(tokenizer.token(f"{name}_token")) for name, key in NAMED_TOKENS.items()}
    for key, id in (named | dict(zip(("eot", "eom"), ends, strict=False))).items():
        if id is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", id)
    writer.add_add_bos_token(bool(tokenizer.begin_ids))
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)
    lost = "ends a generation too; of such tokens llama.cpp has places for three, not for this one"
    return [f"token {id} {lost}" for id in ends[2:]]
