"""Two small tokenizers: R1's kind, trained here, and ChatML's (SmolLM2's kind), which has no think tokens."""

import pytest
from tokenizers import pre_tokenizers

from slingshot.text.tokenizer import Tokenizer

TEXTS = [
    "What is 3+4-2? 3足す4は7、答えは5。",
    "def add(x, y):\n    return x + y  # the quick brown fox, the think user",
] * 4

# As SmolLM2-135M-Instruct's behaves: a system message stands first, whether or not there is one.
CHATML = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}\
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(TEXTS, 340)


@pytest.fixture(scope="session")
def chatml() -> Tokenizer:
    added = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*added, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "Ġt", "Ġthe"]
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
    config = {
        "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "chat_template": CHATML,
    }  # fmt: skip
    return Tokenizer.from_bpe(vocab, merges, dict.fromkeys(added, True), config)
