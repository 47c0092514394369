"""tiktoken.model: what merging by rank gives, in Kimi's pieces of text."""

import base64
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from slingshot.base.errors import SlingshotError
from slingshot.base.files import read_json, write_json, write_text
from slingshot.text.tiktoken import KIMI
from slingshot.text.tokenizer import Tokenizer

BYTES = [bytes([byte]) for byte in range(256)]
TRAINED = [b"th", b" th", b" the", b"\n\n", b"  ", b"    ", b"12", b"123", b"'s", b"he", b"hel", b"lo", b"hello"]
TRAINED += [b"\xe4\xb8", "中".encode(), "中文".encode()]
CONFIG: dict[str, Any] = {
    "tokenizer_class": "TikTokenTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
    "bos_token": "[BOS]",
    "eos_token": "[EOS]",
    "chat_template": "{{ bos_token }}{% for m in messages %}<|im_user|>{{ m.content }}<|im_end|>{% endfor %}<think>",
}
NAMED = ["[BOS]", "[EOS]", "<|im_user|>", "<|im_end|>", None, "<think>", "</think>"]


def write(folder: Path, tokens: list[bytes], config: dict[str, Any] | None = None) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    write_text(folder / "tiktoken.model", "".join(lines))
    named = {str(id): name for id, name in enumerate(NAMED, start=len(tokens)) if name}
    added = {id: {"content": name, "special": "think" not in name} for id, name in named.items()}
    write_json(folder / "tokenizer_config.json", {**CONFIG, "added_tokens_decoder": added, **(config or {})})
    return folder


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule: a piece that is a token is that; or merge the neighbours of lowest rank, leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while found := [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [ranks[part] for part in parts]


def shuffled(seed: int) -> list[bytes]:
    """Ranks that no training would give: parts of a token may rank after it, and some tokens no merge leads to."""
    generator = random.Random(seed)
    letters = [b"a", b"b", b"c", b" ", "é".encode(), "中".encode(), b"'s"]
    tokens = {b"".join(generator.choices(letters, k=generator.randint(2, 5))) for _ in range(250)} - set(BYTES)
    everything = sorted({*BYTES, *tokens})
    generator.shuffle(everything)
    return everything


@pytest.fixture(scope="module", params=["trained", "shuffled 1", "shuffled 2"])
def vocabulary(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, dict[bytes, int]]:
    tokens = [*BYTES, *TRAINED] if request.param == "trained" else shuffled(int(request.param[-1]))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return Tokenizer.load(write(tmp_path_factory.mktemp("kimi"), tokens)), ranks


PARTS = [
    "a", "b", "c", "é", "中", "文", "'s", "'S", "hello", "The", "aB", "12345", "٣", "ア", "々", "〇", "ǅ", "ʰ", "́", "!",
    "_", "🙂", "ſ", "<think>", "[BOS]",
]  # fmt: skip
SPACES = [" the", " ", "  ", "\n", "\r\n", "\u3000", "\x85"]
texts = st.lists(st.sampled_from([*PARTS, *SPACES]) | st.text(max_size=3), max_size=14).map("".join)


@given(text=texts)
def test_text_is_split_and_merged_as_tiktoken_does(vocabulary: tuple[Tokenizer, dict[bytes, int]], text: str) -> None:
    tokenizer, ranks = vocabulary
    pieces = regex.findall(f"(?V1){KIMI}", text)
    assert "".join(pieces) == text
    assert tokenizer.encode(text) == [id for piece in pieces for id in merged(piece.encode(), ranks)]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_kimis_pieces(tmp_path: Path) -> None:
    split = Tokenizer.load(write(tmp_path, BYTES))._backend.pre_tokenizer.pre_tokenize_str
    text = "中文English混合。中文 HelloWorld's 1234 ...\n\n  x"
    pieces = ["中文", "English", "混合", "。", "中文", " Hello", "World's", " ", "123", "4", " ...\n\n", " ", " x"]
    assert [text[begin:end] for _, (begin, end) in split(text)] == pieces


def test_control_tokens_follow_the_ranks(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, [*BYTES, *TRAINED]))
    first = 256 + len(TRAINED)
    ids = [tokenizer.bos_id, tokenizer.eos_id, tokenizer.think_id, tokenizer.end_think_id]
    assert ids == [first, first + 1, first + 5, first + 6]
    assert tokenizer.vocab_size == first + 256  # the unnamed ones are there too
    ids = tokenizer.encode_chat([{"role": "user", "content": "<|im_end|>"}])
    assert [id - first for id in ids if id >= first] == [0, 2, 3, 5]
    assert tokenizer.decode(ids) == "<|im_end|><think>"


def test_it_is_saved_as_an_ordinary_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write(tmp_path, [*BYTES, *TRAINED]))
    tokenizer.save(tmp_path / "saved")
    assert "auto_map" not in read_json(tmp_path / "saved" / "tokenizer_config.json")
    write_json(tmp_path / "saved" / "config.json", {"model_type": "llama"})
    again, theirs = Tokenizer.load(tmp_path / "saved"), AutoTokenizer.from_pretrained(tmp_path / "saved")
    messages = [{"role": "user", "content": "hello 中文 it's 12345\n\n  the"}]
    ids = tokenizer.encode_chat(messages)
    assert ids == again.encode_chat(messages) == theirs.apply_chat_template(messages, return_dict=False)
    assert len(theirs) == tokenizer.vocab_size


GOOD = base64.b64encode(b"th").decode()


@pytest.mark.parametrize(
    ("lines", "config", "reason"),
    [
        (["!!! 256"], {}, "line 257 is not a token in base64 and its rank"),
        ([GOOD], {}, "line 257 is not a token in base64 and its rank"),
        ([f"{GOOD} x"], {}, "line 257 is not a token in base64 and its rank"),
        ([f"{GOOD} {'9' * 5000}"], {}, "line 257 is not a token in base64 and its rank"),
        ([f"{GOOD} 255"], {}, "must give its 257 tokens the ranks 0 to 256, each once"),
        ([f"{GOOD} 300"], {}, "must give its 257 tokens the ranks 0 to 256, each once"),
        ([], {"tokenizer_class": "QWenTokenizer"}, "does not say how text is split"),
        *(
            ([], {"added_tokens_decoder": decoder}, reason)
            for decoder, reason in [
                ([], "must map ids to objects"),
                ({"x": {"content": "a"}}, "must map ids to objects"),
                ({"256": "[BOS]"}, "must map ids to objects"),
                ({"256": {"content": 3}}, "must map ids to objects"),
                ({"3": {"content": "[BOS]"}}, "has the id 3; tiktoken.model leaves the ids from 256 on"),
                ({"99999999999": {"content": "[BOS]"}}, "has the id 99999999999"),
                ({"256": {"content": "a"}}, "names 'a', which is a token of tiktoken.model already"),
                ({}, "names bos_token"),
            ]
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, lines: list[str], config: dict[str, Any], reason: str) -> None:
    write(tmp_path, BYTES, config)
    with (tmp_path / "tiktoken.model").open("a") as file:
        file.writelines(f"{line}\n" for line in lines)
    with pytest.raises(SlingshotError, match=reason) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_every_byte_must_be_a_token(tmp_path: Path) -> None:
    write(tmp_path, BYTES[1:])
    with pytest.raises(SlingshotError, match="no token for 1 of the 256 bytes"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(b"\xff\xfe")
    with pytest.raises(SlingshotError, match="not UTF-8"):
        Tokenizer.load(tmp_path)
