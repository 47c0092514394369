"""Splits: each name's pieces by hand, and a tokenizer.json recognised by what it does."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from slingshot.base.errors import SlingshotError
from slingshot.text.pretokenizers import SPLITS, recognise

TEXT = "I'LL say1234 'tis  x=y;\n\n 漢字です é!\tEND"


def description(name: str) -> dict[str, Any]:
    """The tokenizer.json of an empty tokenizer that splits so."""
    split = SPLITS[name]
    backend = Tokenizer(models.BPE(ignore_merges=split.ignore_merges))
    backend.pre_tokenizer = split.pre_tokenizer()
    if normalizer := split.normalizer():
        backend.normalizer = normalizer
    return json.loads(backend.to_str())


def pieces(name: str) -> list[str]:
    """What a text falls into, in its own characters."""
    return [TEXT[start:stop] for _, (start, stop) in SPLITS[name].pre_tokenizer().pre_tokenize_str(TEXT)]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("smollm", "I|'|LL| say|1|2|3|4| '|tis| | x|=|y|;|\n\n| 漢字です| é|!|\t|END"),
        ("gpt-2", "I|'|LL| say|1234| '|tis| | x|=|y|;|\n\n| 漢字です| é|!|\t|END"),
        ("llama-bpe", "I|'LL| say|123|4| '|tis| | x|=y|;\n\n| 漢字です| é|!|\tEND"),
        ("dbrx", "I|'LL| say|123|4| '|tis| | x|=y|;\n\n| 漢字です| é|!|\tEND"),
        ("qwen2", "I|'LL| say|1|2|3|4| '|tis| | x|=y|;\n\n| 漢字です| é|!|\tEND"),
        ("deepseek-r1-qwen", "I|'LL| say|1|2|3|4| '|tis| | x|=y|;\n\n| 漢字です| é|!|\tEND"),
        ("deepseek-v3", "I|'LL| say|123|4| '|tis| | x|=y|;\n\n| |漢字です| é|!|\tEND"),
        ("default", "I|'|LL| say|123|4| |'|tis| | x|=|y|;|\n\n| 漢字です| é|!|\t|END"),
    ],
)
def test_pieces(name: str, expected: str) -> None:
    assert "|".join(pieces(name)) == expected


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_is_recognised_in_its_own_tokenizer_json(name: str) -> None:
    found = recognise(description(name))
    assert SPLITS[found] == SPLITS[name] and (found == name or name == "deepseek-r1-qwen")


def test_other_spellings_of_the_same_split() -> None:
    spelled = description("deepseek-v3")
    last = spelled["pre_tokenizer"]["pretokenizers"][2]["pattern"]
    last["Regex"] = last["Regex"].replace(r"\r\n", "\r\n")  # as DeepSeek's own file has it
    spelled["normalizer"] = {"type": "Sequence", "normalizers": []}
    assert recognise(spelled) == "deepseek-v3"
    nested = description("smollm")
    nested["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [nested["pre_tokenizer"]]}
    assert recognise(nested) == "smollm"
    digits = description("smollm")
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}"}, "behavior": "Isolated", "invert": False}
    digits["pre_tokenizer"]["pretokenizers"][0] = split
    assert recognise(digits) == "smollm"


@pytest.mark.parametrize(
    ("pre_tokenizer", "normalizer"),
    [
        (pre_tokenizers.ByteLevel(add_prefix_space=True), None),
        (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(False)]), None),
        (pre_tokenizers.Split("a", "isolated"), None),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True)]), None),
        (SPLITS["smollm"].pre_tokenizer(), normalizers.NFC()), (SPLITS["qwen2"].pre_tokenizer(), None),
        (SPLITS["qwen2"].pre_tokenizer(), normalizers.NFKC()), (None, None),
    ],
)  # fmt: skip
def test_anything_else_is_refused(
    pre_tokenizer: pre_tokenizers.PreTokenizer | None, normalizer: normalizers.Normalizer | None
) -> None:
    backend = Tokenizer(models.BPE())
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        backend.normalizer = normalizer
    with pytest.raises(SlingshotError, match=r"splits text as this tokenizer\.json does; known: smollm, "):
        recognise(json.loads(backend.to_str()))
