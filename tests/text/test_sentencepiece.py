"""SentencePiece's tokenizers (Llama 2, TinyLlama, Mistral, Yi) in tokenizer.json: transformers' ids and text."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from slingshot.base.errors import SlingshotError
from slingshot.base.files import write_json
from slingshot.text.reasoning import encode_responses
from slingshot.text.tokenizer import Tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }}[/INST]{{ eos_token }}{% endfor %}"
LETTERS = ["▁", *"abcdefghijklmnopqrstuvwxyzé0123456789+=<>/", "\n"]
MERGES = ["t h", "th e", "▁ the", "▁ t", "▁ ▁", "▁▁ ▁▁", "h e", "he l", "l o", "hel lo"]


def write(folder: Path, spacing: str, bytewise: bool = True, model_type: str = "llama", **config: Any) -> Path:
    """A tokenizer that puts spaces as `spacing` says: "prepend" (a normalizer's), or a scheme of Metaspace."""
    merges = [(first, second) for first, second in map(str.split, MERGES)]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if bytewise), *LETTERS]
    vocab = {token: id for id, token in enumerate([*tokens, *map("".join, merges), "[INST]", "[/INST]"])}
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=bytewise)
    backend = tokenizers.Tokenizer(model)
    if spacing == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=spacing, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps if spacing == "never" else [*steps, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    backend.add_tokens([tokenizers.AddedToken("é9", normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named, **config})
    write_json(folder / "config.json", {"model_type": model_type})
    return folder


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("prepend", {}),
    "Mistral": ("prepend", {"model_type": "mistral", "tokenizer_class": "LlamaTokenizer"}),
    "first": ("first", {}),
    "always": ("always", {}),
    "never": ("never", {}),
    "Llama 2": ("prepend", {"tokenizer_class": "LlamaTokenizer", "legacy": False}),
    "Yi": ("prepend", {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}),
    "unspaced": ("prepend", {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}),
    "without bytes": ("prepend", {"bytewise": False}),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer, read twice and written once between, and transformers' reading of the first folder."""
    spacing, config = KINDS[request.param]
    folder = write(tmp_path_factory.mktemp("sp"), spacing, **config)
    saved = tmp_path_factory.mktemp("saved")
    Tokenizer.load(folder).save(saved)
    return Tokenizer.load(saved), AutoTokenizer.from_pretrained(folder)


parts = st.sampled_from(["the", "hello", " ", "  ", "\n", "é", "é9", "🙂", "漢", "3+4", "x", "▁", "\u0301"])
texts = st.lists(parts, max_size=8).map("".join)


@settings(max_examples=15)
@given(text=texts, more=texts)
def test_ids_and_text_are_transformers(pair: tuple[Tokenizer, Any], text: str, more: str) -> None:
    ours, theirs = pair
    assert ours.kind == "SentencePiece BPE"
    ids = ours.encode_raw(text)
    assert ids == theirs(text).input_ids
    messages = [{"role": "user", "content": text}, {"role": "user", "content": more}]
    chat = ours.encode_chat(messages)
    assert chat == theirs.apply_chat_template(messages, return_dict=False)
    assert ours.encode_batch([text, more]) == [ours.encode(text), ours.encode(more)]
    for sample in (ids, chat):
        decoded = ours.decode(sample)
        assert decoded == theirs.decode(sample, skip_special_tokens=True)
        stream, written = ours.stream(), ""
        for id in sample:
            written += stream.push(id)
            assert decoded.startswith(written)
        assert written + stream.finish() == decoded


@given(text=texts, more=texts)
def test_text_that_goes_on_brings_no_space(pair: tuple[Tokenizer, Any], text: str, more: str) -> None:
    ours, _ = pair
    ids = [*ours.encode(text), *ours.encode(more, continues=True)]
    if 0 not in ids and text.strip():
        assert ours.decode(ids) == ours.decode(ours.encode(text)) + more.replace("▁", " ")


def test_control_tokens_that_are_typed_stay_text(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path, "first"))
    typed = "a</s>[INST]<unk><s> <0x41>"
    assert ours.control_ids.isdisjoint(ours.encode(typed)) and ours.decode(ours.encode(typed)) == typed
    ids = ours.encode_chat([{"role": "user", "content": typed}])
    names = ["<s>", "[INST]", "[/INST]", "</s>"]
    assert [id for id in ids if id in ours.control_ids] == [ours._backend.token_to_id(name) for name in names]


def test_responses_are_what_the_model_would_write(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path, "first"))
    (ids,) = encode_responses(ours, [("the", "3")], opened=True)
    prompt = ours.encode_raw("hello\n")
    assert ours.decode(prompt + ids) == "hello\nthe\n</think>\n\n3" and ids[-1] == ours.eos_id


def test_bytes_come_together_to_characters(tmp_path: Path) -> None:
    ours = Tokenizer.load(write(tmp_path, "first"))
    stream, ids = ours.stream(), ours.encode("🙂a")
    assert [stream.push(id) for id in ids] == [*([""] * (len(ids) - 2)), "🙂", "a"]
    assert stream.push(ids[-3]) + stream.finish() == "\ufffd"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("decoder", {"type": "WordPiece", "prefix": "##", "cleanup": True}, "only byte-level and SentencePiece's"),
        ("decoder", {"type": "Fuse"}, "only byte-level and SentencePiece's"),
        ("model", {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0]]}, "only byte-level and SentencePiece's"),
        ("normalizer", None, "decodes what it never encodes"),
    ],
)
def test_what_decodes_in_another_way_is_refused(tmp_path: Path, key: str, value: Any, reason: str) -> None:
    file = write(tmp_path, "prepend") / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(SlingshotError, match=reason):
        Tokenizer.load(tmp_path)
