"""Tokenizers that come as tiktoken.model: Kimi K2's and Moonlight's. Their Python code is never run.

    backend = read_tiktoken(folder / "tiktoken.model", tokenizer_config)

The file ranks the tokens: a line is a token's bytes in base64 and its rank, which is also its id. Encoding merges, in
each piece of text, the neighbours that make the token of lowest rank, until none do. tokenizer.json wants the merges
instead: for each token the two parts whose merge completes it, when its own bytes are encoded. No other two parts ever
make it: inside a token's bytes the same merges happen in any text.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_text
from slingshot.text.detokenizer import CHARACTER_OF_BYTE

# How Kimi splits text (tokenization_kimi.py and tokenization_moonshot.py, pat_str): Chinese characters apart from other
# letters, words by case as o200k does it, up to three digits, punctuation, line breaks, spaces.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_ENDING = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_BEFORE = r"[^\r\n\p{L}\p{N}]?"
KIMI = rf"[\p{{Han}}]+|{_BEFORE}{_UPPER}*{_LOWER}+{_ENDING}|{_BEFORE}{_UPPER}+{_LOWER}*{_ENDING}"
KIMI += r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_RESERVED = 256  # ids after those of the ranks, named or not: the models' vocabularies end there


def read_tiktoken(file: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """The tokenizer of a tiktoken.model and its tokenizer_config.json, which names the control tokens."""
    if config.get("tokenizer_class") != "TikTokenTokenizer":
        known = "of such files only Kimi's and Moonlight's are known, so bring a tokenizer.json"
        raise SlingshotError(f"{file} does not say how text is split; {known}")
    ranks = _ranks(file)
    names = {token: "".join(map(CHARACTER_OF_BYTE.__getitem__, token)) for token in ranks}
    vocab = {name: ranks[token] for token, name in names.items()}
    added = _added_tokens(config, len(ranks))
    if clash := vocab.keys() & {token.content for token in added.values()}:
        named = f"added_tokens_decoder in tokenizer_config.json names {min(clash)!r}"
        raise SlingshotError(f"{named}, which is a token of tiktoken.model already")
    vocab |= {token.content: id for id, token in added.items()}
    pairs = [pair for token in sorted(ranks, key=ranks.__getitem__) if (pair := _parts(token, ranks))]
    merges = [(names[left], names[right]) for left, right in pairs]
    # A piece that is a token is that token, whether or not merges lead to it.
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(KIMI), "isolated"), bytewise])
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added.values()))
    return backend


def _ranks(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_text(file).splitlines(), start=1):
        if line.strip():
            try:
                token, rank = line.split()
                ranks[base64.b64decode(token, validate=True)] = int(rank)
            except ValueError:
                wrong = f"{file} line {number} is not a token in base64 and its rank"
                raise SlingshotError(f"{wrong}; is it a tiktoken vocabulary?") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        wanted = f"give its {len(ranks)} tokens the ranks 0 to {len(ranks) - 1}, each once"
        raise SlingshotError(f"{file} must {wanted}; fetch the file again")
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        lacks = f"has no token for {len(missing)} of the 256 bytes, so it cannot write every text"
        raise SlingshotError(f"{file} {lacks}; fetch the file again")
    return ranks


def _added_tokens(config: Mapping[str, Any], first: int) -> dict[int, tokenizers.AddedToken]:
    """The control tokens of tokenizer_config.json by id; their ids follow those of the ranks."""
    place = "added_tokens_decoder in tokenizer_config.json"
    added: dict[int, tokenizers.AddedToken] = {}
    try:
        for id, token in config.get("added_tokens_decoder", {}).items():
            flags = {flag: bool(token.get(flag)) for flag in ("single_word", "lstrip", "rstrip", "normalized")}
            added[int(id)] = tokenizers.AddedToken(token["content"], special=bool(token.get("special", True)), **flags)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise SlingshotError(f"{place} must map ids to objects with `content`") from error
    for id in range(first, first + _RESERVED):
        added.setdefault(id, tokenizers.AddedToken(f"<|reserved_token_{id}|>", special=True, normalized=False))
    if wrong := [id for id in added if not first <= id < first + 10_000]:
        raise SlingshotError(f"{place} has the id {wrong[0]}; tiktoken.model leaves the ids from {first} on")
    return added


def _parts(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two parts whose merge completes a token; None for a single byte, and for what merges never lead to."""
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        pairs = [parts[at] + parts[at + 1] for at in range(len(parts) - 1)]
        at = min(range(len(pairs)), key=lambda at: ranks.get(pairs[at], len(ranks)))
        if pairs[at] not in ranks:
            return None
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None
