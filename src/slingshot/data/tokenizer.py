"""The tokenizer: byte-level BPE with its chat template, in the Hugging Face layout.

    tokenizer = Tokenizer.train(texts, vocab_size=512)         # individual digits, then GPT-2's byte-level split; R1's special tokens
    tokenizer.save(folder); tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("3+4")                              # text never becomes a control token, whatever it holds
    ids = tokenizer.encode_chat([{"role": "user", "content": "3+4"}])
    tokenizer.decode(ids)

Only a chat template writes control tokens (the added ones: bos, roles, think tags); text, a user's above all, never does.
"""

from __future__ import annotations

import codecs
import copy
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from slingshot.data.template import R1_TEMPLATE, render
from slingshot.files import SlingshotError, read_json, read_text, write_json, write_text

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"

# In R1's tokenizers the role and think tokens are added with special=false, so that decoding without special tokens keeps the tags.
R1_TOKENS = {BOS: True, EOS: True, PAD: True, USER: False, ASSISTANT: False, THINK: False, END_THINK: False}
R1_CONFIG = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "chat_template": R1_TEMPLATE}

_BATCH = 10_000  # texts handed to the Rust side at once; its results are many times the size of the ids


class Tokenizer:
    """A byte-level BPE vocabulary, its control tokens and its chat template.

    vocab_size          one more than the highest id
    bos_id, eos_id, pad_id, user_id, assistant_id, think_id, end_think_id      None where the vocabulary has no such token
    eos_ids             every id that ends a generation: eos_id and those of generation_config.json
    control_ids         every added token; `encode` yields none of them
    chat_template       Jinja, None when the model came without
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], eos_ids: Iterable[int] = ()) -> None:
        """`config` is tokenizer_config.json: bos_token, eos_token, pad_token, chat_template and what else it holds, kept for `save`."""
        description = json.loads(backend.to_str())
        if description["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(description["decoder"]):
            raise SlingshotError("only byte-level BPE tokenizers are supported (DeepSeek, Llama 3, Qwen, SmolLM); convert tokenizer.json to one")
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config = dict(config)
        added = {token["id"]: token for token in description["added_tokens"]}
        self.control_ids = frozenset(added)
        self._control_tokens = {token["content"]: id for id, token in added.items()}
        self._plain = _without_added_tokens(description)
        self.bos_id, self.eos_id, self.pad_id = (self._named(f"{name}_token") for name in ("bos", "eos", "pad"))
        self.user_id, self.assistant_id, self.think_id, self.end_think_id = map(self._control_tokens.get, (USER, ASSISTANT, THINK, END_THINK))
        self.eos_ids: set[int] = {*eos_ids} | ({self.eos_id} if self.eos_id is not None else set())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        silent = {id for id, token in added.items() if token["special"]} - {self.think_id, self.end_think_id}
        self._bytes = [b""] * self.vocab_size  # what each id adds to the text
        for token, id in vocabulary.items():
            if id not in silent:
                self._bytes[id] = token.encode() if id in added else _token_bytes(token)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a folder with tokenizer.json and tokenizer_config.json (its chat template inside, or beside it as chat_template.jinja)."""
        path = Path(path)
        file = path / "tokenizer.json"
        if not file.is_file():
            raise SlingshotError(f"{path} has no tokenizer.json; name the folder of a checkpoint in the Hugging Face layout")
        try:
            backend = tokenizers.Tokenizer.from_str(read_text(file))
        except SlingshotError:
            raise
        except Exception as error:  # the Rust side raises plain Exception
            raise SlingshotError(f"{file} is not a tokenizer: {error}") from error
        config = _read_object(path / "tokenizer_config.json")
        if (path / "chat_template.jinja").is_file():
            config["chat_template"] = read_text(path / "chat_template.jinja")
        eos = _read_object(path / "generation_config.json").get("eos_token_id")
        try:
            return cls(backend, config, eos if isinstance(eos, list) else [] if eos is None else [eos])
        except SlingshotError as error:
            raise SlingshotError(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder; transformers.AutoTokenizer reads them."""
        write_text(Path(path) / "tokenizer.json", self._backend.to_str(pretty=True))
        write_json(Path(path) / "tokenizer_config.json", self.config)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> Tokenizer:
        """Train a vocabulary with R1's special tokens on texts. It stays smaller than `vocab_size` when the texts have no more pairs to merge."""
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(R1_TOKENS):
            raise SlingshotError(f"vocab_size {vocab_size} is too small: bytes and special tokens need {len(alphabet) + len(R1_TOKENS)}")
        texts = iter(texts)
        first = next((text for text in texts if text), None)
        if first is None:
            raise SlingshotError("there is no text to train a tokenizer on; give a corpus that is not empty")
        backend = _byte_level(models.BPE())
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(R1_TOKENS), initial_alphabet=alphabet, show_progress=False)
        backend.train_from_iterator(map(_clean, itertools.chain([first], texts)), trainer)
        return cls(_with_flags(backend, R1_TOKENS), _new_config(R1_CONFIG))

    @classmethod
    def from_bpe(cls, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Mapping[str, bool], config: Mapping[str, Any]) -> Tokenizer:
        """Build a tokenizer that splits individual digits, then as GPT-2 (SmolLM's): from a GGUF file's tables, say.

        vocab: byte-level token -> id, the added (control) tokens included; added: those, and whether they are special.
        config: bos_token, eos_token, pad_token, chat_template.
        """
        backend = _byte_level(models.BPE(vocab=dict(vocab), merges=list(merges)))
        backend.add_tokens([tokenizers.AddedToken(token, special=special, normalized=False) for token, special in added.items()])
        return cls(backend, _new_config(config))

    @property
    def chat_template(self) -> str | None:
        template = self.config.get("chat_template")
        if isinstance(template, list):  # several named ones
            return next((entry["template"] for entry in template if entry["name"] == "default"), None)
        return template

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. Never a control token: `<think>` in a text is its characters."""
        return self._plain.encode(_clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        ids: list[list[int]] = []
        texts = map(_clean, texts)
        while batch := list(itertools.islice(texts, _BATCH)):
            ids += [encoding.ids for encoding in self._plain.encode_batch_fast(batch, add_special_tokens=False)]
        return ids

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, thinking: bool = True) -> list[int]:
        """Ids of a chat in the model's template, which writes bos and all control tokens; what messages hold stays text.

        messages: [{"role": "user", "content": "..."}, ...]. thinking: whether the reply is to begin with reasoning, where the template can choose.
        Raises SlingshotError when there is no template or it refuses the messages.
        """
        if self.chat_template is None:
            raise SlingshotError("this tokenizer has no chat template; add chat_template to tokenizer_config.json, or prompt with plain text")
        names = {name: _content(self.config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        variables = {name: token for name, token in names.items() if token is not None}
        pieces = render(
            self.chat_template,
            messages,
            self._control_tokens,
            add_generation_prompt=add_generation_prompt,
            thinking=thinking,
            enable_thinking=thinking,  # Qwen3's name for it
            **variables,
        )
        ids = self.encode(pieces[0])
        for token, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids += [self._control_tokens[token], *self.encode(text)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Role and think tags stay; special tokens (bos, eos, pad) and ids beyond the vocabulary add nothing."""
        return b"".join(map(self._bytes_of, ids)).decode("utf-8", errors="replace")

    def stream(self) -> TextStream:
        """Decode id by id."""
        return TextStream(self)

    def _bytes_of(self, id: int) -> bytes:
        return self._bytes[id] if 0 <= id < self.vocab_size else b""

    def _named(self, key: str) -> int | None:
        content = _content(self.config.get(key))
        if content is None:
            return None
        if content not in self._control_tokens:
            raise SlingshotError(f"tokenizer_config.json names {key} {content!r}, tokenizer.json has no such added token; make the two agree")
        return self._control_tokens[content]


class TextStream:
    """Decodes id by id and never gives part of a character: `push(id)` for each, `finish()` once. Joined, the parts are `decode` of all ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id: int) -> str:
        return self._decoder.decode(self._tokenizer._bytes_of(id))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    """Individual digits, then GPT-2's byte-level split (llama.cpp knows it as `smollm`)."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    backend.decoder = decoders.ByteLevel()
    return backend


def _with_flags(backend: tokenizers.Tokenizer, special: Mapping[str, bool]) -> tokenizers.Tokenizer:
    """Set which added tokens are special: the trainer makes all of them so."""
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = special[token["content"]]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _without_added_tokens(description: dict[str, Any]) -> tokenizers.Tokenizer:
    """The same splits and merges with no way to an added token: not by matching, nor by a merge or a whole-word lookup that ends in one."""
    description = copy.deepcopy(description)
    names = {token["content"] for token in description["added_tokens"]}
    model = description["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if names.isdisjoint((*pair, "".join(pair)))]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in names}
    model["unk_token"] = None
    description |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _new_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **config}


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise SlingshotError(f"{path} must hold a JSON object")
    return value


def _content(token: Any) -> str | None:
    """A token named in tokenizer_config.json: its text, or an object with `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


def _clean(text: str) -> str:
    """Replace lone surrogates, which JSON can carry and UTF-8 cannot, by U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", errors="surrogatepass").decode("utf-16", errors="replace")


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards, in order."""
    printable = {byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _token_bytes(token: str) -> bytes:
    alphabet = _byte_of()
    return bytes(alphabet[character] for character in token) if all(map(alphabet.__contains__, token)) else token.encode()
