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
import contextlib
import copy
import functools
import itertools
import json
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_text, write_json, write_text
from slingshot.text.chat_template import R1_TEMPLATE, clean, render
from slingshot.text.pretokenizers import SPLIT_OF_MODEL_TYPE, SPLITS, recognise
from slingshot.text.tiktoken import read_tiktoken

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"
THINK, END_THINK = "<think>", "</think>"

# In R1's tokenizers the role and think tokens are added with special=false, so that decoding without special tokens keeps the tags.
R1_TOKENS = {BOS: True, EOS: True, PAD: True, USER: False, ASSISTANT: False, THINK: False, END_THINK: False}
R1_CONFIG = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": None, "chat_template": R1_TEMPLATE}

# Added tokens that are not special are text, but for those that a chat is framed with: tags between bars, think tags, and what looks like
# a tag and stands in the chat template.
_FRAME, _TAG = re.compile(r"<[|｜].*[|｜]>|</?think>"), re.compile(r"<.+>|\[.+\]")

_SPECIAL = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)  # what a template knows by name

# White space as the Rust side has it (Python's str.strip takes U+001C to U+001F too): an added token may swallow what stands beside it.
_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"

# The class of transformers that takes tokenizer.json as it is; others put a split of their own in its place.
_CLASS = "PreTrainedTokenizerFast"

_UNSPLIT = "the tokenizer's regular expression could not split the text"  # it gives up after millions of steps

_BATCH = 10_000  # texts handed to the Rust side at once; its results are many times the size of the ids


class Tokenizer:
    """A byte-level BPE vocabulary, its control tokens and its chat template.

    vocab_size          one more than the highest id
    bos_id, eos_id, pad_id, user_id, assistant_id, think_id, end_think_id      None where the vocabulary has no such token
    eos_ids             every id that ends a generation: eos_id and those of generation_config.json and config.json
    control_ids         special tokens, and what else frames a chat; `encode` yields none of them
    begin_ids, end_ids  what the tokenizer itself puts around a text that stands alone: bos or nothing, mostly
    chat_template       Jinja, None when the model came without
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], eos_ids: Iterable[int] = ()) -> None:
        """`config` is tokenizer_config.json: bos_token, eos_token, pad_token, chat_template and what else it holds, kept for `save`."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary) + 100_000:  # before the Rust side makes a list of them
            raise SlingshotError(
                f"tokenizer.json gives {len(vocabulary)} tokens ids up to {self.vocab_size - 1}; ids must stand close together"
            )
        description = json.loads(backend.to_str())
        if description["model"]["type"] != "BPE" or '"ByteLevel"' not in json.dumps(description["decoder"]):
            raise SlingshotError(
                "only byte-level BPE tokenizers are supported (DeepSeek, Llama 3, Qwen, SmolLM); convert tokenizer.json to one"
            )
        if '"ByteLevel"' not in json.dumps([description["normalizer"], description["pre_tokenizer"]]):
            raise SlingshotError(
                "tokenizer.json decodes bytes that it never encodes; it lacks its ByteLevel pre_tokenizer"
            )
        self._backend = backend
        self._backend.no_truncation()
        self._backend.no_padding()
        self.config = dict(config)
        self._templates = _templates(self.config.get("chat_template"))
        added = {token["id"]: token for token in description["added_tokens"]}
        controls = {id: token for id, token in added.items() if token["special"] or self._frames(token["content"])}
        self.control_ids = frozenset(controls)
        self._control_tokens = {token["content"]: id for id, token in controls.items()}
        if long := [token["content"] for token in added.values() if len(token["content"]) > 500]:
            raise SlingshotError(
                f"tokenizer.json adds the token {reprlib.repr(long[0])} of {len(long[0])} characters; 500 would be many"
            )
        self._swallows = {
            token["content"]: (token["lstrip"], token["rstrip"])
            for token in controls.values()
            if token["lstrip"] or token["rstrip"]
        }
        self._plain = _without_control_tokens(description, set(self._control_tokens))
        self.bos_id, self.eos_id, self.pad_id = (self._named(f"{name}_token") for name in ("bos", "eos", "pad"))
        self.user_id, self.assistant_id, self.think_id, self.end_think_id = map(
            self._control_tokens.get, (USER, ASSISTANT, THINK, END_THINK)
        )
        self.eos_ids: set[int] = {self._checked(id) for id in eos_ids} | (
            {self.eos_id} if self.eos_id is not None else set()
        )
        self.begin_ids, self.end_ids = _around(backend)
        silent = {id for id, token in added.items() if token["special"]} - {self.think_id, self.end_think_id}
        self._bytes = [b""] * self.vocab_size  # what each id adds to the text
        for token, id in vocabulary.items():
            if id not in silent:
                self._bytes[id] = token.encode() if id in added else _token_bytes(token)

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a folder with tokenizer.json (or tiktoken.model) and tokenizer_config.json.

        Chat templates stand in the latter, or beside it: chat_template.jinja, and further ones by name in additional_chat_templates.
        """
        path = Path(path)
        config = _read_config(path / "tokenizer_config.json")
        if (file := path / "tokenizer.json").is_file():
            backend = _read_backend(file)
        elif (file := path / "tiktoken.model").is_file():
            with _rust(f"{file} is not a tokenizer"):
                backend = read_tiktoken(file, config, {byte: character for character, byte in _byte_of().items()})
            config = _new_config(
                {key: value for key, value in config.items() if key not in ("tokenizer_class", "auto_map")}
            )
        else:
            raise SlingshotError(
                f"{path} has no tokenizer.json; name the folder of a checkpoint in the Hugging Face layout"
            )
        if (path / "chat_template.jinja").is_file():
            config["chat_template"] = read_text(path / "chat_template.jinja")
        if further := sorted((path / "additional_chat_templates").glob("*.jinja")):
            named = _templates(config.get("chat_template")) | {file.stem: read_text(file) for file in further}
            config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
        config |= {key: text for key, text in _named_beside(path, backend).items() if config.get(key) is None}
        try:
            return cls(backend, config, _ends(path, backend))
        except SlingshotError as error:
            raise SlingshotError(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder; transformers.AutoTokenizer reads them."""
        write_text(Path(path) / "tokenizer.json", self._backend.to_str(pretty=True))
        config = {key: value for key, value in self.config.items() if key != "auto_map"} | {"tokenizer_class": _CLASS}
        write_json(Path(path) / "tokenizer_config.json", config)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, split: str = "smollm") -> Tokenizer:
        """Train a vocabulary with R1's special tokens on texts; smaller than `vocab_size` when these have no more pairs to merge.

        split: how text is split before merging, a name of text/pretokenizers.py.
        """
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < len(alphabet) + len(R1_TOKENS):
            raise SlingshotError(
                f"vocab_size {vocab_size} is too small: bytes and special tokens need {len(alphabet) + len(R1_TOKENS)}"
            )
        texts = iter(texts)
        first = next((text for text in texts if text), None)
        if first is None:
            raise SlingshotError("there is no text to train a tokenizer on; give a corpus that is not empty")
        backend = _byte_level(models.BPE(ignore_merges=SPLITS[split].ignore_merges), split)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(R1_TOKENS), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(map(clean, itertools.chain([first], texts)), trainer)
        _write_bos(backend, BOS)
        return cls(_with_flags(backend, R1_TOKENS), _new_config(R1_CONFIG))

    @classmethod
    def from_bpe(
        cls,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        added: Mapping[str, bool],
        config: Mapping[str, Any],
        split: str = "smollm",
        eos_ids: Iterable[int] = (),
    ) -> Tokenizer:
        """Build a tokenizer from its tables, a GGUF file's say.

        vocab: byte-level token -> id, the added (control) tokens included; added: those, and whether they are special.
        config: bos_token, eos_token, pad_token, chat_template; add_bos_token is for texts that stand alone.
        split: how text is split before merging, a name of text/pretokenizers.py. eos_ids: what ends a generation besides eos_token.
        """
        backend = _byte_level(
            models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=SPLITS[split].ignore_merges), split
        )
        backend.add_tokens(
            [tokenizers.AddedToken(token, special=special, normalized=False) for token, special in added.items()]
        )
        if config.get("add_bos_token"):
            _write_bos(backend, config["bos_token"])
        return cls(backend, _new_config(config), eos_ids)

    def description(self) -> dict[str, Any]:
        """What tokenizer.json holds: model (vocab, merges), added_tokens, normalizer, pre_tokenizer and the rest."""
        description: dict[str, Any] = json.loads(self._backend.to_str())
        return description

    @property
    def chat_template(self) -> str | None:
        return self._templates.get("default")

    def token(self, key: str) -> str | None:
        """The text of a token that tokenizer_config.json names: bos_token, unk_token ..."""
        return _content(self.config.get(key))

    def check_fits(self, vocab_size: int) -> None:
        """Raise SlingshotError where this tokenizer has ids that a model with so large a vocabulary does not know."""
        if self.vocab_size > vocab_size:
            raise SlingshotError(
                f"the tokenizer has {self.vocab_size} ids, the model's vocabulary {vocab_size}: they do not belong together; "
                "take tokenizer.json from the model's own checkpoint"
            )

    def check_split(self, model_type: str) -> None:
        """Raise SlingshotError where other programs would split this tokenizer's text otherwise, beside a model of that type."""
        wanted = SPLIT_OF_MODEL_TYPE.get(model_type)
        with contextlib.suppress(SlingshotError):
            if wanted is None or recognise(self.description()) == wanted:
                return
        raise SlingshotError(
            f"transformers splits the text of every {model_type} model as {wanted} does, this tokenizer otherwise; "
            "leave `tokenizer` out to train one, or take a model of another type"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without bos or eos. Never a control token: `<think>` in a text is its characters."""
        with _rust(_UNSPLIT):
            return self._plain.encode(clean(text), add_special_tokens=False).ids

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        ids: list[list[int]] = []
        texts = map(clean, texts)
        while batch := list(itertools.islice(texts, _BATCH)):
            with _rust(_UNSPLIT):
                ids += [encoding.ids for encoding in self._plain.encode_batch_fast(batch, add_special_tokens=False)]
        return ids

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a text that stands alone, a prompt without a chat template say: with bos where this tokenizer writes one."""
        return [*self.begin_ids, *self.encode(text), *self.end_ids]

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        thinking: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        **variables: Any,
    ) -> list[int]:
        """Ids of a chat in the model's template, which writes bos and all control tokens; what messages hold stays text.

        messages: [{"role": "user", "content": "..."}, ...]. thinking: whether the reply is to begin with reasoning, where the template can choose.
        tools: JSON schemas of functions, for templates that know tools. continue_final_message: the model goes on with the last message.
        documents, variables: what else this model's template reads, plain JSON.
        Raises SlingshotError when there is no template or it refuses the messages.
        """
        template = self._templates.get("tool_use" if tools is not None and "tool_use" in self._templates else "default")
        if template is None:
            raise SlingshotError(
                "this tokenizer has no chat template; add chat_template to tokenizer_config.json, or prompt with plain text"
            )
        special = {name: token for name in _SPECIAL if (token := _content(self.config.get(name))) is not None}
        choices = {"thinking": thinking, "enable_thinking": thinking}  # DeepSeek's name for it, and Qwen3's
        pieces = render(
            template,
            messages,
            self._control_tokens,
            special,
            tools=tools,
            documents=documents,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            **{**choices, **variables},
        )
        texts, controls = pieces[::2], pieces[1::2]
        for place, token in enumerate(controls):
            left, right = self._swallows.get(token, (False, False))
            texts[place] = texts[place].rstrip(_SPACE) if left else texts[place]
            texts[place + 1] = texts[place + 1].lstrip(_SPACE) if right else texts[place + 1]
        ids = self.encode(texts[0])
        for token, text in zip(controls, texts[1:], strict=True):
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

    def _frames(self, content: str) -> bool:
        return bool(_FRAME.fullmatch(content)) or (
            bool(_TAG.fullmatch(content)) and any(content in template for template in self._templates.values())
        )

    def _checked(self, id: Any) -> int:
        if type(id) is not int or not 0 <= id < self.vocab_size:
            raise SlingshotError(
                f"eos_token_id {reprlib.repr(id)} is beyond the tokenizer's {self.vocab_size} ids; mend generation_config.json"
            )
        return id

    def _named(self, key: str) -> int | None:
        content = _content(self.config.get(key))
        if content is None:
            return None
        if not isinstance(content, str):
            raise SlingshotError(
                f"tokenizer_config.json gives {key} as {reprlib.repr(content)}; it must be a text, or an object with `content`"
            )
        if content not in self._control_tokens:
            raise SlingshotError(
                f"tokenizer_config.json names {key} {reprlib.repr(content)}, tokenizer.json adds no such token; make the two agree"
            )
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


def _byte_level(model: models.BPE, split: str = "smollm") -> tokenizers.Tokenizer:
    """A byte-level tokenizer; by default it splits individual digits, then as GPT-2."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = SPLITS[split].pre_tokenizer(), decoders.ByteLevel()
    if normalizer := SPLITS[split].normalizer():
        backend.normalizer = normalizer
    return backend


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that tokenizer.json alone puts before and after a text, as for transformers; tokenizer_config.json has no say."""
    with _rust("tokenizer.json puts what it does not know around a text"):
        probe = backend.encode("0")
    marks = list(zip(probe.ids, probe.special_tokens_mask, strict=True))
    begin = list(itertools.takewhile(lambda pair: pair[1], marks))
    end = list(itertools.takewhile(lambda pair: pair[1], reversed(marks[len(begin) :])))
    return [id for id, _ in begin], [id for id, _ in reversed(end)]


def _write_bos(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Let other readers put bos in front of a text."""
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _with_flags(backend: tokenizers.Tokenizer, special: Mapping[str, bool]) -> tokenizers.Tokenizer:
    """Set which added tokens are special: the trainer makes all of them so."""
    description = json.loads(backend.to_str())
    for token in description["added_tokens"]:
        token["special"] = special[token["content"]]
    return tokenizers.Tokenizer.from_str(json.dumps(description))


def _without_control_tokens(description: dict[str, Any], names: set[str]) -> tokenizers.Tokenizer:
    """The same splits and merges with no way to a control token: not by matching, nor by a merge or a whole-word lookup that ends in one."""
    description = copy.deepcopy(description)
    model = description["model"]
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if names.isdisjoint((*pair, "".join(pair)))]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in names}
    model |= {"unk_token": None, "dropout": None}
    added = [token for token in description["added_tokens"] if token["content"] not in names]
    model["vocab"] |= {token["content"]: token["id"] for token in added}  # so that it keeps its id
    description |= {"added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    with _rust("tokenizer.json holds merges that fit only with its control tokens"):
        return tokenizers.Tokenizer.from_str(json.dumps(description))


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    model = _read_object(file).get("model")
    if not isinstance(model, dict):
        raise SlingshotError(f"{file} is not a tokenizer: it describes no model")
    if model.get("continuing_subword_prefix") or model.get(
        "end_of_word_suffix"
    ):  # the Rust side may cut them off in the middle of a character
        raise SlingshotError(
            f"{file} marks the parts of words, which no byte-level BPE tokenizer does; convert it to one"
        )
    with _rust(f"{file} is not a tokenizer"):
        return tokenizers.Tokenizer.from_str(read_text(file))


def _templates(value: Any) -> dict[str, str]:
    """Chat templates by name, the usual one being "default": tokenizer_config.json holds that one, or a list of several."""
    named = value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    try:
        templates = {entry["name"]: entry["template"] for entry in named}
    except (TypeError, KeyError):
        templates = {"": None}
    if not all(isinstance(text, str) for pair in templates.items() for text in pair):
        raise SlingshotError("chat_template in tokenizer_config.json must be a text, or a list of {name, template}")
    return templates


@contextlib.contextmanager
def _rust(what: str) -> Iterator[None]:
    """What the Rust side raises (plain Exception, and a panic, which is a BaseException) as one line."""
    try:
        yield
    except (SlingshotError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise SlingshotError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def _new_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"tokenizer_class": _CLASS, "clean_up_tokenization_spaces": False, **config}


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise SlingshotError(f"{path} must hold a JSON object")
    return value


def _ends(path: Path, backend: tokenizers.Tokenizer) -> list[Any]:
    """Ids that end a generation by generation_config.json and config.json: of the latter those that the tokenizer adds,
    for any other is a default that nobody chose."""
    found: list[list[Any]] = []
    for file in ("generation_config.json", "config.json"):
        eos = _read_object(path / file).get("eos_token_id")
        found.append(eos if isinstance(eos, list) else [] if eos is None else [eos])
    added = backend.get_added_tokens_decoder()
    return found[0] + [id for id in found[1] if type(id) is int and id in added]


def _named_beside(path: Path, backend: tokenizers.Tokenizer) -> dict[str, Any]:
    """The bos, eos and pad tokens that special_tokens_map.json names and tokenizer.json adds."""
    named = _read_object(path / "special_tokens_map.json")
    added = {token.content for token in backend.get_added_tokens_decoder().values()}
    return {
        key: text
        for key in ("bos_token", "eos_token", "pad_token")
        if isinstance(text := _content(named.get(key)), str) and text in added
    }


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, its text such that `save` can write it again."""
    try:
        config: dict[str, Any] = json.loads(clean(json.dumps(_read_object(path), ensure_ascii=False)))
    except RecursionError as error:
        raise SlingshotError(f"{path} nests its values too deep") from error
    return config


def _content(token: Any) -> str | None:
    """A token named in tokenizer_config.json: its text, or an object with `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


@functools.cache
def _byte_of() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters stand for themselves, the other bytes for U+0100 onwards, in order."""
    printable = {byte for byte in range(256) if chr(byte).isprintable() and byte not in (0x20, 0xA0, 0xAD)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


def _token_bytes(token: str) -> bytes:
    alphabet = _byte_of()
    return (
        bytes(alphabet[character] for character in token) if all(map(alphabet.__contains__, token)) else token.encode()
    )
