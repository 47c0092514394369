"""How byte-level tokenizers split a text before they merge, by the names of GGUF files (tokenizer.ggml.pre).

    split = SPLITS["qwen2"]
    backend.pre_tokenizer, backend.normalizer = split.pre_tokenizer(), split.normalizer()
    recognise(json.loads(backend.to_str()))              # "qwen2"

The patterns are those of the models' tokenizer.json files; llama.cpp's src/llama-vocab.cpp says which name is which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Regex, normalizers, pre_tokenizers

from slingshot.base.errors import SlingshotError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}+"
# Llama 3's and Qwen2's differ only in how many digits stand together.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|\p{{N}}|{_REST}"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
)


@dataclass(frozen=True)
class Split:
    """Patterns one after the other: what matches stands alone, and so does what is left between.

    ignore_merges       a piece that is a token as a whole is that token, whether or not merges lead to it
    nfc                 text is brought into Unicode's form C first; llama.cpp leaves that out
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    nfc: bool = False

    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        steps: list[pre_tokenizers.PreTokenizer] = []
        for pattern in self.patterns:
            if pattern in (_DIGIT, _DIGITS):
                steps.append(pre_tokenizers.Digits(individual_digits=pattern == _DIGIT))
            elif pattern != _GPT2 or pattern != self.patterns[-1]:
                steps.append(pre_tokenizers.Split(Regex(pattern), "isolated"))
        steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=self.patterns[-1] == _GPT2))
        return pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]

    def normalizer(self) -> normalizers.Normalizer | None:
        return normalizers.NFC() if self.nfc else None


# Where several names stand for the same, the first is written.
SPLITS = {
    "smollm": Split((_DIGIT, _GPT2)),
    "gpt-2": Split((_GPT2,)),
    "llama-bpe": Split((_LLAMA3,), ignore_merges=True),
    "dbrx": Split((_LLAMA3,)),
    "qwen2": Split((_QWEN2,), nfc=True),
    "deepseek-r1-qwen": Split((_QWEN2,), nfc=True),
    "deepseek-v3": Split(_DEEPSEEK_V3),
    # llama.cpp's for a file that names none
    "default": Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _DIGITS, r"[0-9][0-9][0-9]")),
}

DEFAULT_SPLIT = "deepseek-v3"  # of new tokenizers

# Model types whose text transformers splits so, whatever tokenizer.json and tokenizer_config.json say.
SPLIT_OF_MODEL_TYPE = {"qwen2": "qwen2"}


def recognise(description: Mapping[str, Any]) -> str:
    """The name of the split that a tokenizer.json describes. SlingshotError when llama.cpp would split otherwise."""
    patterns: list[str] = []
    for step in flat(description["pre_tokenizer"], "pretokenizers"):
        match step:
            case {"type": "Digits", "individual_digits": individual}:
                patterns.append(_DIGIT if individual else _DIGITS)
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
                patterns.append(pattern.replace("\r", r"\r").replace("\n", r"\n"))
            case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": regex}:
                patterns += [_GPT2, ""] if regex else [""]
            case _:
                patterns.append(step["type"])
    forms = [step["type"] for step in flat(description["normalizer"], "normalizers")]
    ignore_merges = description["model"].get("ignore_merges", False)
    for name, split in SPLITS.items():
        if ([*split.patterns, ""], split.ignore_merges, split.nfc * ["NFC"]) == (patterns, ignore_merges, forms):
            return name
    known = f"known: {', '.join(SPLITS)}"
    raise SlingshotError(f"llama.cpp knows no pre-tokenizer that splits text as this tokenizer.json does; {known}")


def flat(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences unfolded."""
    if part is None:
        return []
    return [step for one in part[inner] for step in flat(one, inner)] if part["type"] == "Sequence" else [part]
