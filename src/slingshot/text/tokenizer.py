"""The tokenizer: BPE over bytes or SentencePiece's, with its chat template, in the Hugging Face layout.

    tokenizer = Tokenizer.train(texts, vocab_size=512)         # R1's special tokens, DeepSeek-V3's split
    tokenizer.save(folder); tokenizer = Tokenizer.load(folder)
    ids = tokenizer.encode("3+4")                              # text never becomes a control token, whatever it holds
    ids = tokenizer.encode_raw("3+4")                          # with bos where this tokenizer writes one
    ids = tokenizer.encode_chat([{"role": "user", "content": "3+4"}])
    tokenizer.decode(ids)

Only a chat template writes control tokens (bos, roles, think tags); text, a user's above all, never does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import re
import reprlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json, write_text
from slingshot.text.chat_template import END_THINK, R1_TEMPLATE, THINK, TOOL_TEMPLATE, ControlTokens, clean, render
from slingshot.text.detokenizer import Detokenizer, TextStream
from slingshot.text.pretokenizers import DEFAULT_SPLIT, SPLIT_OF_MODEL_TYPE, SPLITS, recognise
from slingshot.text.tokenizer_files import (
    CONFIG_FILE,
    PLAIN_CLASS,
    named_templates,
    read_tokenizer_files,
    rust_errors,
    token_text,
)

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
USER, ASSISTANT = "<｜User｜>", "<｜Assistant｜>"

# In R1's tokenizers roles and think tags are added with special=false: decoding without special tokens keeps them.
R1_TOKENS = {BOS: True, EOS: True, PAD: True, USER: False, ASSISTANT: False, THINK: False, END_THINK: False}
_TOOL = ["calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "output▁begin", "output▁end"]
TOOL_TOKENS = {f"<｜tool▁{name}｜>": False for name in _TOOL}
_NEW = {"tokenizer_class": PLAIN_CLASS, "clean_up_tokenization_spaces": False}
R1_CONFIG = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": None, "chat_template": R1_TEMPLATE}

# Added tokens that are not special are text, but for those that a chat is framed with: tags between bars, think tags,
# and what looks like a tag and stands in the chat template.
_FRAME, _TAG = re.compile(r"<[|｜].*[|｜]>|</?think>"), re.compile(r"<.+>|\[.+\]")

# What a template knows by name.
_NAMED = [f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]

# White space as the Rust side has it, which an added token may swallow; Python's str.strip takes U+001C to U+001F too.
_SPACE = "".join(chr(code) for code in range(0x3001) if chr(code).isspace() and not 0x1C <= code < 0x20)

_UNSPLIT = "the tokenizer's regular expression could not split the text"  # it gives up after millions of steps

_LONG = 10_000  # characters: milliseconds of work
_BATCH = 10_000  # texts handed to the Rust side at once; its results are many times the size of the ids


class Tokenizer:
    """A BPE vocabulary, its control tokens and its chat template.

    vocab_size          one more than the highest id
    bos_id, eos_id, pad_id, think_id, end_think_id   None where there is no such token
    eos_ids             every id that ends a generation: eos_id, those of generation_config.json and config.json
    control_ids         special tokens, and what else frames a chat; `encode` yields none of them
    begin_ids, end_ids  what the tokenizer itself puts around a text that stands alone: bos or nothing, mostly
    kind                "byte-level BPE" or "SentencePiece BPE"
    chat_template       Jinja, None when the model came without
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: Mapping[str, Any], eos_ids: Iterable[int] = ()) -> None:
        """config: tokenizer_config.json's bos_token, eos_token, pad_token, chat_template, and what else it holds."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > 2 * len(vocabulary) + 100_000:  # before the Rust side makes a list of them
            ids = f"{len(vocabulary)} tokens ids up to {self.vocab_size - 1}"
            raise SlingshotError(f"tokenizer.json gives {ids}; ids must stand close together")
        backend.no_truncation()
        backend.no_padding()
        self._backend, self.config = backend, dict(config)
        self._templates = named_templates(self.config.get("chat_template"))
        description = self.description()
        added = description["added_tokens"]
        if len(long := max((token["content"] for token in added), key=len, default="")) > 500:
            text = f"{reprlib.repr(long)} of {len(long)} characters"
            raise SlingshotError(f"tokenizer.json adds the token {text}; 500 would be many")
        silent = {token["id"] for token in added if token["special"] and token["content"] not in (THINK, END_THINK)}
        self.detokenizer = Detokenizer(description, vocabulary, silent)
        self.kind = self.detokenizer.kind
        controls = [token for token in added if self._is_control(token)]
        self.control_ids = frozenset(token["id"] for token in controls)
        self._ids = {token["content"]: token["id"] for token in controls}
        self._swallows = {token["content"]: (token["lstrip"], token["rstrip"]) for token in controls}
        self._controls = ControlTokens(self._ids)
        self._begins, self._follows, self._continues = _encoders(description, set(self._ids), self.kind)
        self.begin_ids, self.end_ids = _around(backend)
        self.bos_id, self.eos_id, self.pad_id = (self._named(f"{name}_token") for name in ("bos", "eos", "pad"))
        self.think_id, self.end_think_id = map(self._ids.get, (THINK, END_THINK))
        self.eos_ids = {self._checked(id) for id in eos_ids} | ({self.eos_id} if self.eos_id is not None else set())

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Read a folder with tokenizer.json (or tiktoken.model) and tokenizer_config.json.

        Chat templates stand in the latter, in chat_template.jinja, and by name in additional_chat_templates/.
        """
        backend, config, eos_ids = read_tokenizer_files(Path(path))
        try:
            return cls(backend, config, eos_ids)
        except SlingshotError as error:
            raise SlingshotError(f"{path}: {error}") from error

    def save(self, path: Path | str) -> None:
        """Write tokenizer.json and tokenizer_config.json into a folder; transformers gives the same ids."""
        write_text(Path(path) / "tokenizer.json", self._backend.to_str(pretty=True))
        write_json(Path(path) / CONFIG_FILE, self.config | {"tokenizer_class": PLAIN_CLASS})

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, split: str = DEFAULT_SPLIT, tools: bool = False) -> Tokenizer:
        """Train a vocabulary with R1's special tokens; smaller than `vocab_size` when there are no more pairs to merge.

        split: how text is split before merging, a name of text/pretokenizers.py. tools: with the tokens and the chat
        template of a model that calls some.
        """
        special = R1_TOKENS | TOOL_TOKENS if tools else R1_TOKENS
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        if vocab_size < (least := len(alphabet) + len(special)):
            raise SlingshotError(f"vocab_size {vocab_size} is too small: bytes and special tokens need {least}")
        texts = iter(texts)
        first = next((text for text in texts if text), None)
        if first is None:
            raise SlingshotError("there is no text to train a tokenizer on; give a corpus that is not empty")
        backend = _byte_level(models.BPE(ignore_merges=SPLITS[split].ignore_merges), split)
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
        )
        texts = map(clean, itertools.chain([first], texts))
        _stoppable(lambda texts: backend.train_from_iterator(texts, trainer), texts)
        _write_bos(backend, BOS)
        description = json.loads(backend.to_str())
        for token in description["added_tokens"]:
            token["special"] = special[token["content"]]  # the trainer makes all of them special
        config = R1_CONFIG | ({"chat_template": TOOL_TEMPLATE} if tools else {})
        return cls(tokenizers.Tokenizer.from_str(json.dumps(description)), _NEW | config)

    @classmethod
    def from_bpe(
        cls, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], added: Mapping[str, bool],
        config: Mapping[str, Any], split: str = DEFAULT_SPLIT, eos_ids: Iterable[int] = (),
    ) -> Tokenizer:  # fmt: skip
        """Build a byte-level tokenizer from its tables, a GGUF file's say.

        vocab: token -> id, added tokens included; added: those, and whether they are special.
        config: bos_token, eos_token, pad_token, chat_template; add_bos_token puts bos before texts that stand alone.
        split: as for `train`. eos_ids: what ends a generation besides eos_token.
        """
        model = models.BPE(vocab=dict(vocab), merges=list(merges), ignore_merges=SPLITS[split].ignore_merges)
        backend = _byte_level(model, split)
        tokens = [tokenizers.AddedToken(token, special=special, normalized=False) for token, special in added.items()]
        backend.add_tokens(tokens)
        if config.get("add_bos_token"):
            _write_bos(backend, config["bos_token"])
        return cls(backend, {**_NEW, **config}, eos_ids)

    def description(self) -> dict[str, Any]:
        """What tokenizer.json holds: model (vocab, merges), added_tokens, normalizer, pre_tokenizer and the rest."""
        description: dict[str, Any] = json.loads(self._backend.to_str())
        return description

    @functools.cached_property
    def digest(self) -> str:
        """Alike for tokenizers that give a text the same ids, and only for those."""
        return hashlib.sha256(json.dumps(self.description(), sort_keys=True).encode()).hexdigest()[:16]

    @property
    def chat_template(self) -> str | None:
        return self._templates.get("default")

    @property
    def tool_template(self) -> str | None:
        """The template that renders a chat with tools."""
        return self._templates.get("tool_use", self.chat_template)

    def control_id(self, token: str) -> int | None:
        """The id of a control token by its text."""
        return self._ids.get(token)

    def token(self, key: str) -> str | None:
        """The text of a token that tokenizer_config.json names: bos_token, unk_token ..."""
        text: str | None = token_text(self.config.get(key))
        return text

    def check_fits(self, vocab_size: int) -> None:
        """Raise SlingshotError where this tokenizer has ids that a model with so large a vocabulary does not know."""
        if self.vocab_size > vocab_size:
            sizes = f"the tokenizer has {self.vocab_size} ids, the model's vocabulary {vocab_size}"
            raise SlingshotError(f"{sizes}: they do not belong together; take the model's own tokenizer.json")

    def check_split(self, model_type: str) -> None:
        """Raise SlingshotError where transformers would split text otherwise, beside a model of that type."""
        wanted = SPLIT_OF_MODEL_TYPE.get(model_type)
        with contextlib.suppress(SlingshotError):
            if wanted is None or recognise(self.description()) == wanted:
                return
        theirs = f"transformers splits the text of every {model_type} model as {wanted} does, this tokenizer otherwise"
        raise SlingshotError(f"{theirs}; leave `tokenizer` out to train one, or take a model of another type")

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Ids of a text, without bos or eos. Never a control token: `<think>` in a text is its characters.

        continues: other text stands before it, so that no space is put there (SentencePiece's begin a text with one).
        """
        return _ids(self._continues if continues else self._begins, text)

    def encode_batch(self, texts: Iterable[str], continues: bool = False) -> list[list[int]]:
        """`encode` for many texts, on all cores."""
        backend = self._continues if continues else self._begins
        ids: list[list[int]] = []
        texts = map(clean, texts)
        while batch := list(itertools.islice(texts, _BATCH)):
            with rust_errors(_UNSPLIT):
                ids += [encoding.ids for encoding in backend.encode_batch_fast(batch, add_special_tokens=False)]
        return ids

    def encode_documents(self, texts: Iterable[str]) -> list[list[int]]:
        """Texts to train on: each as it stands alone, and the end of text."""
        if self.eos_id is None:
            way_out = "leave `tokenizer` out to train one"
            raise SlingshotError(f"the tokenizer has no eos token to end documents with; {way_out}")
        return [[*self.begin_ids, *ids, self.eos_id] for ids in self.encode_batch(texts)]

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a text that stands alone, a prompt without a template say: with bos where the tokenizer writes one."""
        return [*self.begin_ids, *self.encode(text), *self.end_ids]

    def encode_chat(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, thinking: bool = True,
        **more: Any,
    ) -> list[int]:  # fmt: skip
        """Ids of a chat in the model's template, which writes all control tokens; what messages hold stays text.

        messages: [{"role": "user", "content": "..."}, ...]. thinking: whether the reply begins with reasoning, where
        the template can choose. more: `tools` (JSON schemas of functions), `continue_final_message` (the model goes on
        with the last message), `documents` and what else this model's template reads, plain JSON.
        Raises SlingshotError when there is no template, or it refuses the messages.
        """
        tools = more.get("tools") is not None and "tool_use" in self._templates
        template = self._templates.get("tool_use" if tools else "default")
        if template is None:
            way_out = f"add chat_template to {CONFIG_FILE}, or prompt with plain text"
            raise SlingshotError(f"this tokenizer has no chat template; {way_out}")
        special = {name: token for name in _NAMED if (token := self.token(name)) is not None}
        more = {"thinking": thinking, "enable_thinking": thinking, **more}  # DeepSeek's name for it, and Qwen3's
        more["add_generation_prompt"] = add_generation_prompt
        pieces = render(template, messages, self._controls, special, **more)
        texts, controls = pieces[::2], pieces[1::2]
        for place, token in enumerate(controls):
            left, right = self._swallows[token]
            texts[place] = texts[place].rstrip(_SPACE) if left else texts[place]
            texts[place + 1] = texts[place + 1].lstrip(_SPACE) if right else texts[place + 1]
        ids = _ids(self._begins, texts[0])
        for token, text in zip(controls, texts[1:], strict=True):
            ids += [self._ids[token], *_ids(self._follows, text)]
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids. Role and think tags stay; special tokens (bos, eos, pad) and unknown ids add nothing."""
        return self.detokenizer.decode(ids)

    def stream(self) -> TextStream:
        """Decode id by id."""
        return TextStream(self.detokenizer)

    def _is_control(self, token: Mapping[str, Any]) -> bool:
        content: str = token["content"]
        if token["special"] or _FRAME.fullmatch(content) or content in map(self.token, _NAMED):
            return True
        return bool(_TAG.fullmatch(content)) and any(content in template for template in self._templates.values())

    def _checked(self, id: Any) -> int:
        if type(id) is not int or not 0 <= id < self.vocab_size:
            wrong = f"eos_token_id {reprlib.repr(id)} is beyond the tokenizer's {self.vocab_size} ids"
            raise SlingshotError(f"{wrong}; mend generation_config.json")
        return id

    def _named(self, key: str) -> int | None:
        content: Any = self.token(key)
        if content is not None and not isinstance(content, str):
            named = f"{CONFIG_FILE} gives {key} as {reprlib.repr(content)}"
            raise SlingshotError(f"{named}; it must be a text, or an object with `content`")
        if content is not None and content not in self._ids:
            named = f"{CONFIG_FILE} names {key} {reprlib.repr(content)}"
            raise SlingshotError(f"{named}, tokenizer.json adds no such token; make the two agree")
        return None if content is None else self._ids[content]


def _ids(backend: tokenizers.Tokenizer, text: str) -> list[int]:
    with rust_errors(_UNSPLIT):
        if len(text) > _LONG:  # `encode` keeps Python's lock, so that no other thread would run for seconds
            return backend.encode_batch_fast([clean(text)], add_special_tokens=False)[0].ids
        return backend.encode(clean(text), add_special_tokens=False).ids


def _byte_level(model: models.BPE, split: str) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = SPLITS[split].pre_tokenizer(), decoders.ByteLevel()
    if normalizer := SPLITS[split].normalizer():
        backend.normalizer = normalizer
    return backend


def _write_bos(backend: tokenizers.Tokenizer, bos: str) -> None:
    """Put bos in front of texts that stand alone."""
    backend.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", "$B"], special_tokens=[(bos, backend.token_to_id(bos))]
    )


def _around(backend: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that tokenizer.json puts before and after a text. As for transformers, tokenizer_config.json has no say."""
    with rust_errors("tokenizer.json puts what it does not know around a text"):
        probe = backend.encode("0")
    marks = list(zip(probe.ids, probe.special_tokens_mask, strict=True))
    begin = list(itertools.takewhile(lambda pair: pair[1], marks))
    end = list(itertools.takewhile(lambda pair: pair[1], reversed(marks[len(begin) :])))
    return [id for id, _ in begin], [id for id, _ in reversed(end)]


def _encoders(description: dict[str, Any], controls: set[str], kind: str) -> list[tokenizers.Tokenizer]:
    """Backends with the same splits and merges and no way to a control token, be it a match, a merge or a whole word.

    Three, which differ where text begins with a space: for what begins a text, follows a control token, follows text.
    """
    model = dict(description["model"])
    unknown = model["unk_token"] if kind == "SentencePiece BPE" else None  # the others have every byte
    hidden = controls - {unknown}
    pairs = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    model["merges"] = [pair for pair in pairs if hidden.isdisjoint((*pair, "".join(pair)))]
    model["vocab"] = {token: id for token, id in model["vocab"].items() if token not in hidden}
    model |= {"unk_token": unknown, "dropout": None}
    added = [token for token in description["added_tokens"] if token["content"] not in controls]
    model["vocab"] |= {token["content"]: token["id"] for token in added}  # so that it keeps its id
    plain = {"model": model, "added_tokens": added, "post_processor": None, "truncation": None, "padding": None}
    begins = json.dumps([description["normalizer"], description["pre_tokenizer"]], ensure_ascii=False)
    follows = begins.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    continues = follows.replace('"prepend_scheme": "always"', '"prepend_scheme": "never"')
    continues = continues.replace('"prepend": "▁"', '"prepend": ""')
    made: dict[str, tokenizers.Tokenizer] = {}
    for steps in {begins, follows, continues}:
        normalizer, pre_tokenizer = json.loads(steps)
        text = json.dumps({**description, **plain, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer})
        with rust_errors("tokenizer.json holds merges that fit only with its control tokens"):
            made[steps] = tokenizers.Tokenizer.from_str(text)
    return [made[begins], made[follows], made[continues]]


def _stoppable(work: Callable[[Iterator[str]], None], texts: Iterable[str]) -> None:
    """Do it in a thread, so that Ctrl-C need not wait for the library, which does not look for signals as it counts."""
    failed: list[BaseException] = []
    stopped, done = threading.Event(), threading.Event()

    def run() -> None:
        try:
            work(itertools.takewhile(lambda _: not stopped.is_set(), texts))
        except BaseException as error:
            failed.append(error)
        done.set()

    threading.Thread(target=run, daemon=True).start()
    try:
        done.wait()
    except KeyboardInterrupt:
        stopped.set()
        done.wait(1.0)  # it ends sooner where texts are still being read
        raise
    if failed:
        raise failed[0]
