"""A tokenizer's folder: read by transformers with the same ids, survives a round trip, and what is broken is named."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_json
from slingshot.model.hf_config import MODEL_TYPES
from slingshot.text.pretokenizers import SPLIT_OF_MODEL_TYPE
from slingshot.text.tokenizer import EOS, THINK, Tokenizer


def alike(folder: Path, model_type: str = "llama") -> tuple[Tokenizer, Any]:
    """Our reading of a folder and transformers', which chooses a class by the model's type."""
    write_json(folder / "config.json", {"model_type": model_type})
    return Tokenizer.load(folder), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_transformers_reads_our_folders_alike_beside_every_model_type(tmp_path: Path, model_type: str) -> None:
    text = "I'LL say1234 'tis  x=y;\n\n 漢字です e\u0301!\tEND"
    trained = Tokenizer.train([text] * 5, 340, SPLIT_OF_MODEL_TYPE.get(model_type, "smollm"))
    trained.check_split(model_type)
    trained.config["tokenizer_class"] = "GPT2Tokenizer"
    trained.save(tmp_path)
    ours, theirs = alike(tmp_path, model_type)
    assert theirs(text).input_ids == ours.encode_raw(text)
    assert len(theirs) == ours.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos_id, ours.eos_id, ours.pad_id)
    messages = [{"role": "user", "content": text}]
    assert theirs.apply_chat_template(messages, return_dict=False) == ours.encode_chat(messages, False)


def test_a_split_that_transformers_would_replace_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SlingshotError, match="splits the text of every qwen2 model as qwen2 does"):
        tokenizer.check_split("qwen2")


def backend_of(added: list[str], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    tokens = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    vocab = {token: id for id, token in enumerate(tokens)}
    description = Tokenizer.from_bpe(vocab, merges, dict.fromkeys(added, True), {}).description()
    return tokenizers.Tokenizer.from_str(json.dumps(description))


@pytest.mark.parametrize("single", [None, "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
@pytest.mark.parametrize(
    "config", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}, {"bos_token": None}]
)
def test_a_text_that_stands_alone_is_framed_as_transformers_does(
    tmp_path: Path, config: dict[str, Any], single: str | None
) -> None:
    backend = backend_of(["<bos>", "<eos>"], [])
    if single is not None:
        template = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 0), ("<eos>", 1)])
        backend.post_processor = processors.Sequence([processors.ByteLevel(), template])
    Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>"} | config).save(tmp_path)
    ours, theirs = alike(tmp_path)
    assert ours.encode_raw("a b") == theirs("a b").input_ids


def test_added_tokens_that_are_not_special_are_text(tmp_path: Path) -> None:
    """As DeepSeek-Coder's letters; tags that frame a chat are none, special or not."""
    backend = backend_of([], [("e", "r")])
    words = ["ü", "covid", "<item>", "<tool_call>", "<|fim|>", THINK]
    backend.add_tokens([AddedToken(word, normalized=False) for word in words])
    backend.add_special_tokens(["<|eot|>", "plain"])
    Tokenizer(backend, {"chat_template": "{{ messages[0].content }}<tool_call>"}).save(tmp_path)
    ours, theirs = alike(tmp_path)
    ids = theirs.convert_tokens_to_ids
    text = "Führer covid19 <item>"
    assert ours.encode(text) == theirs(text).input_ids and ids("ü") in ours.encode(text)
    assert ours.decode(ours.encode(text)) == text
    assert ours.control_ids == set(map(ids, ["<tool_call>", "<|fim|>", THINK, "<|eot|>", "plain"]))
    said = f"plain<|fim|><tool_call>{THINK}ü"
    chat = ours.encode_chat([{"role": "user", "content": said}])
    assert chat == [*ours.encode(said), ids("<tool_call>")] and ours.control_ids.isdisjoint(chat[:-1])


def test_a_folder_survives_a_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    more = {"model_max_length": 77, "eos_token": {"content": EOS}, "auto_map": {"AutoTokenizer": ["other.Code", None]}}
    write_json(tmp_path / "tokenizer_config.json", tokenizer.config | more)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1, 3]})
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }}")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.eos_ids == {1, 3}
    assert loaded.encode_chat([]) == [1]
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").config == loaded.config
    assert loaded.config["model_max_length"] == 77 and "auto_map" not in loaded.config


def test_the_default_of_several_templates_is_taken(tokenizer: Tokenizer, tmp_path: Path) -> None:
    named = {"tool_use": "{{ eos_token }}", "default": "{{ bos_token }}"}
    templates = [{"name": name, "template": template} for name, template in named.items()]
    several = Tokenizer(tokenizer._backend, {**tokenizer.config, "chat_template": templates})
    assert several.encode_chat([]) == [0]
    assert several.encode_chat([], tools=[]) == [1]
    (tmp_path / "additional_chat_templates").mkdir()
    tokenizer.save(tmp_path)
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("{{ pad_token }}")
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode_chat([], tools=[]) == [2]
    assert loaded.chat_template == tokenizer.chat_template
    loaded.save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").encode_chat([], tools=[]) == [2]


def test_unusable_folders_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(SlingshotError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    words = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str()
    for text, reason in [("{}", r"tokenizer\.json is not a tokenizer"), (words, "only byte-level and SentencePiece")]:
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(SlingshotError, match=reason):
            Tokenizer.load(tmp_path)


def change(value: Any, path: str, new: Any) -> Any:
    """A deep copy of a JSON value with one thing in it replaced: `change(description, "model/vocab/a", 3)`."""
    first, _, rest = path.partition("/")
    value = copy.deepcopy(value)
    key = int(first) if isinstance(value, list) else first
    value[key] = change(value[key], rest, new) if rest else new
    return value


_NO_TOKENIZER, _NO_TEMPLATE = "is not a tokenizer", "chat_template in tokenizer_config.json must be a text"


@pytest.mark.parametrize(
    ("path", "new", "reason"),
    [
        ("model/vocab/a", -1, _NO_TOKENIZER), ("model/vocab/a", 2**31, r"gives \d+ tokens ids up to 2147483648"),
        ("model/vocab/a", 2**40, _NO_TOKENIZER), ("model/vocab", {}, _NO_TOKENIZER),
        ("model/merges/0", ["zz", "a"], _NO_TOKENIZER),
        ("model/continuing_subword_prefix", "x", "marks the parts of words"), ("model/type", "Unigram", _NO_TOKENIZER),
        ("model", [], "it describes no model"), ("pre_tokenizer", None, "decodes what it never encodes"),
        ("decoder", None, "only byte-level and SentencePiece"), ("added_tokens/0/id", "zero", _NO_TOKENIZER),
        ("added_tokens/3/content", "x" * 100_000, "of 100000 characters; 500 would be many"),
        ("added_tokens", {}, _NO_TOKENIZER), ("eos_token", "<eos>", "names eos_token '<eos>'"),
        ("eos_token", 3, "gives eos_token as 3"), ("bos_token", {"content": []}, r"gives bos_token as \[\]"),
        ("chat_template", 3, _NO_TEMPLATE), ("chat_template", [{"name": "default"}], _NO_TEMPLATE),
        ("chat_template", [{"name": ["x"], "template": ""}], _NO_TEMPLATE), ("chat_template", ["x"], _NO_TEMPLATE),
        ("eos_token_id", 325, "eos_token_id 325 is beyond the tokenizer's 325 ids"),
        ("eos_token_id", [1, -1], "eos_token_id -1 is beyond"), ("eos_token_id", [True], "eos_token_id True is beyond"),
        ("eos_token_id", "1", "eos_token_id '1' is beyond"),
    ],
)  # fmt: skip
def test_broken_files_are_named(tokenizer: Tokenizer, tmp_path: Path, path: str, new: Any, reason: str) -> None:
    tokenizer.save(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 1})
    Tokenizer.load(tmp_path)
    file = next(file for file in map(tmp_path.joinpath, FILES) if path.split("/")[0] in read_json(file))
    write_json(file, change(read_json(file), path, new))
    with pytest.raises(SlingshotError, match=reason) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


FILES = ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_files_that_hold_no_object(tokenizer: Tokenizer, tmp_path: Path, file: str) -> None:
    tokenizer.save(tmp_path)
    (tmp_path / file).write_text("[]")
    with pytest.raises(SlingshotError, match="must hold a JSON object"):
        Tokenizer.load(tmp_path)


STRANGE: list[Any] = [None, True, -1, 2**31, 2**64, 1e300, "", "<think>", "\ud800", "Ġ", "x" * 9999, [], {}, [[]]]
STRANGE += [["a", "b"], {"content": "x"}, {"type": "ByteLevel"}, {"type": "Sequence", "normalizers": []}]
STRANGE += [{"type": "Split", "pattern": {"Regex": "(("}, "behavior": "Isolated", "invert": False}]
STRANGE += [{"type": "Prepend", "prepend": "<think>"}]


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else []
    return [path, *(place for key, child in list(children)[:12] for place in _places(child, (*path, key)))]


@given(data=st.data())
def test_any_change_to_its_files_is_read_or_refused(tokenizer: Tokenizer, tmp_path: Path, data: st.DataObject) -> None:
    tokenizer.save(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": [1]})
    file = tmp_path / data.draw(st.sampled_from([*FILES, FILES[0]]))
    value = read_json(file)
    *path, last = data.draw(st.sampled_from(_places(value)[1:]))
    inner = functools.reduce(lambda part, key: part[key], path, value)
    if data.draw(st.booleans()):
        inner[last] = data.draw(st.sampled_from(STRANGE))
    else:
        del inner[last]
    file.write_text(json.dumps(value))
    try:
        loaded = Tokenizer.load(tmp_path)
        ids = loaded.encode("What is 12 <think>?\n é🙂")
        assert loaded.control_ids.isdisjoint(ids)
        loaded.decode(ids)
        loaded.encode_chat([{"role": "user", "content": "hi <think>"}])
        loaded.save(tmp_path / "copy")
    except SlingshotError as error:
        assert "\n" not in str(error)
