"""Ids back to text, all at once or one by one, by a table of the bytes that each id adds.

detokenizer = Detokenizer(json.loads(tokenizer_json), vocabulary, silent=special_ids)
detokenizer.decode(ids)
stream = TextStream(detokenizer)
parts = [*map(stream.push, ids), stream.finish()]
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping, Set
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.text.pretokenizers import flat

# GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards, in order.
_PRINTABLE = {byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)}
_OTHERS = iter(range(256, 512))
CHARACTER_OF_BYTE = {byte: chr(byte if byte in _PRINTABLE else next(_OTHERS)) for byte in range(256)}
_BYTE_OF_CHARACTER = {character: byte for byte, character in CHARACTER_OF_BYTE.items()}

_BYTE = re.compile("<0x([0-9A-F]{2})>")  # a byte among SentencePiece's tokens
_SENTENCEPIECE: list[dict[str, Any]] = [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


class Detokenizer:
    """What each id adds to the text.

    kind        "byte-level BPE" (DeepSeek, Llama 3, Qwen) or "SentencePiece BPE" (Llama 2, Mistral, Yi)
    spaced      a text begins with a space that encoding puts there and decoding takes away
    """

    def __init__(self, description: Mapping[str, Any], vocabulary: Mapping[str, int], silent: Set[int]) -> None:
        """description: tokenizer.json. silent: ids that add nothing. SlingshotError where it decodes in its own way."""
        steps = flat(description["decoder"], "decoders")
        spaces = [step for step in steps if step["type"] == "Metaspace" and step["replacement"] == "▁"]
        self.spaced = _SENTENCEPIECE[3] in steps or any(step["prepend_scheme"] != "never" for step in spaces)
        bytewise = any(step["type"] == "ByteLevel" for step in steps)
        pieces = (spaces or _SENTENCEPIECE[0] in steps) and all(step in _SENTENCEPIECE + spaces for step in steps)
        if description["model"]["type"] != "BPE" or not (bytewise or pieces):
            known = "DeepSeek, Llama, Mistral, Qwen, SmolLM, Yi"
            supported = f"only byte-level and SentencePiece's BPE tokenizers are supported ({known})"
            raise SlingshotError(f"{supported}; convert tokenizer.json to one")
        self.kind = "byte-level BPE" if bytewise else "SentencePiece BPE"
        encoding = json.dumps([description["normalizer"], description["pre_tokenizer"]], ensure_ascii=False)
        if ('"ByteLevel"' if bytewise else "▁") not in encoding:
            raise SlingshotError("tokenizer.json decodes what it never encodes; it lacks its pre_tokenizer")
        added = {token["id"] for token in description["added_tokens"]}
        self._bytes = [b""] * (max(vocabulary.values()) + 1)
        for token, id in vocabulary.items():
            if id not in silent:
                self._bytes[id] = self._token_bytes(token, id in added)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; halves of characters become U+FFFD, ids beyond the vocabulary add nothing."""
        text = b"".join(map(self.bytes_of, ids)).decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.spaced else text

    def bytes_of(self, id: int) -> bytes:
        return self._bytes[id] if 0 <= id < len(self._bytes) else b""

    def _token_bytes(self, token: str, added: bool) -> bytes:
        if self.kind == "SentencePiece BPE":
            byte = None if added else _BYTE.fullmatch(token)
            return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()
        if added or not all(map(_BYTE_OF_CHARACTER.__contains__, token)):
            return token.encode()
        return bytes(map(_BYTE_OF_CHARACTER.__getitem__, token))


class TextStream:
    """Decodes id by id, never part of a character: `push(id)` for each, `finish()` once. Joined it is `decode`."""

    def __init__(self, detokenizer: Detokenizer) -> None:
        self._bytes_of = detokenizer.bytes_of
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._spaced = detokenizer.spaced  # until the first character

    def push(self, id: int) -> str:
        text = self._decoder.decode(self._bytes_of(id))
        if self._spaced and text:
            self._spaced, text = False, text.removeprefix(" ")
        return text

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)
