"""A tokenizer's files in Hugging Face's layout, read and checked: tokenizer.json or tiktoken.model, and what is beside.

backend, config, eos_ids = read_tokenizer_files(folder)
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, pre_tokenizers

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, read_text
from slingshot.text.chat_template import clean
from slingshot.text.tiktoken import read_tiktoken

CONFIG_FILE = "tokenizer_config.json"

# The class of transformers that takes tokenizer.json as it is; others put a split of their own in its place.
PLAIN_CLASS = "PreTrainedTokenizerFast"


def read_tokenizer_files(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any], list[Any]]:
    """The backend, tokenizer_config.json completed by the files beside it, and the ids that end a generation."""
    config = _read_config(path / CONFIG_FILE)
    if (file := path / "tokenizer.json").is_file():
        backend = _read_backend(file, config, _read_object(path / "config.json").get("model_type"))
    elif (file := path / "tiktoken.model").is_file():
        with rust_errors(f"{file} is not a tokenizer"):
            backend = read_tiktoken(file, config)
        config["tokenizer_class"] = PLAIN_CLASS
    else:
        raise SlingshotError(f"{path} has no tokenizer.json; name a folder of a checkpoint in Hugging Face's layout")
    if (path / "chat_template.jinja").is_file():
        config["chat_template"] = read_text(path / "chat_template.jinja")
    if further := sorted((path / "additional_chat_templates").glob("*.jinja")):
        named = named_templates(config.get("chat_template")) | {file.stem: read_text(file) for file in further}
        config["chat_template"] = [{"name": name, "template": template} for name, template in named.items()]
    added = backend.get_added_tokens_decoder()
    config |= {key: text for key, text in _named_beside(path, added.values()).items() if config.get(key) is None}
    return backend, config, _ends(path, added)


def named_templates(value: Any) -> dict[str, str]:
    """Chat templates by name, "default" the usual one; tokenizer_config.json holds that one, or a list of several."""
    named = value if isinstance(value, list) else [] if value is None else [{"name": "default", "template": value}]
    with contextlib.suppress(TypeError, KeyError):
        templates = {entry["name"]: entry["template"] for entry in named}
        if all(isinstance(text, str) for pair in templates.items() for text in pair):
            return templates
    raise SlingshotError("chat_template in tokenizer_config.json must be a text, or a list of {name, template}")


def token_text(token: Any) -> Any:
    """A token named in tokenizer_config.json: its text, or an object with `content`."""
    return token.get("content") if isinstance(token, Mapping) else token


@contextlib.contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """What the Rust side raises (plain Exception, and a panic, which is a BaseException) as one line."""
    try:
        yield
    except (SlingshotError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise SlingshotError(f"{what}: {' '.join(str(error).split())[:300]}") from error


def _read_backend(file: Path, config: Mapping[str, Any], model_type: Any) -> tokenizers.Tokenizer:
    description = _read_object(file)
    model = description.get("model")
    if not isinstance(model, dict):
        raise SlingshotError(f"{file} is not a tokenizer: it describes no model")
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        # the Rust side may cut them off in the middle of a character
        raise SlingshotError(f"{file} marks the parts of words, as no tokenizer of this kind does; convert it to one")
    with rust_errors(f"{file} is not a tokenizer"):
        backend = tokenizers.Tokenizer.from_str(read_text(file))
        llama = config.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast") and model_type != "mistral"
        if llama and '"ByteLevel"' not in json.dumps(description):
            _space_as_llama(backend, config)
    return backend


def _space_as_llama(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Put spaces before text as tokenizer_config.json says; transformers reads it there for this class."""
    spaced = config.get("add_prefix_space") in (None, True)
    scheme = "never" if not spaced else "always" if config.get("legacy") else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if spaced else steps)


def _read_config(path: Path) -> dict[str, Any]:
    """tokenizer_config.json, its text such that it can be written again, without the names of other people's code."""
    try:
        config: dict[str, Any] = json.loads(clean(json.dumps(_read_object(path), ensure_ascii=False)))
    except RecursionError as error:
        raise SlingshotError(f"{path} nests its values too deep") from error
    return {key: value for key, value in config.items() if key != "auto_map"}


def _read_object(path: Path) -> dict[str, Any]:
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise SlingshotError(f"{path} must hold a JSON object")
    return value


def _ends(path: Path, added: Mapping[int, Any]) -> list[Any]:
    """Ids that end a generation by generation_config.json and config.json: of the latter those that the tokenizer adds,
    for any other is a default that nobody chose."""
    found = [_read_object(path / file).get("eos_token_id") for file in ("generation_config.json", "config.json")]
    chosen, default = (eos if isinstance(eos, list) else [] if eos is None else [eos] for eos in found)
    return chosen + [id for id in default if type(id) is int and id in added]


def _named_beside(path: Path, added: Iterable[Any]) -> dict[str, Any]:
    """The bos, eos and pad tokens that special_tokens_map.json names and tokenizer.json adds."""
    named = {key: token_text(token) for key, token in _read_object(path / "special_tokens_map.json").items()}
    known = [token.content for token in added]
    return {key: named[key] for key in ("bos_token", "eos_token", "pad_token") if named.get(key) in known}
