"""The assistant's turn as token ids: reasoning, the closing tag, the answer, end of text.

    encode_responses(tokenizer, [("3 plus 4 is 7", "7")], opened=True)

The inverse of text/reasoning.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from slingshot.base.errors import SlingshotError
from slingshot.text.tokenizer import Tokenizer


def encode_responses(tokenizer: Tokenizer, responses: Sequence[tuple[str, str]], opened: bool) -> list[list[int]]:
    """Ids of `reasoning\\n</think>\\n\\nanswer` and the end token; `opened`: the prompt already holds `<think>\\n`.

    Where the vocabulary has no think tokens (models not made for reasoning) the tags are written as ordinary text.
    """
    if tokenizer.end_think_id is None or tokenizer.think_id is None:
        start = "" if opened else "<think>\n"
        texts = [f"{start}{reasoning}\n</think>\n\n{answer}" for reasoning, answer in responses]
        return encode_answers(tokenizer, texts)
    start = "" if opened else "\n"
    reasonings = tokenizer.encode_batch([f"{start}{reasoning}\n" for reasoning, _ in responses], continues=True)
    answers = encode_answers(tokenizer, [f"\n\n{answer}" for _, answer in responses])
    start_ids = [] if opened else [tokenizer.think_id]
    return [
        [*start_ids, *reasoning, tokenizer.end_think_id, *answer]
        for reasoning, answer in zip(reasonings, answers, strict=True)
    ]


def encode_answers(tokenizer: Tokenizer, answers: Sequence[str]) -> list[list[int]]:
    """Ids of responses without reasoning, each with the end token."""
    if tokenizer.eos_id is None:
        missing = "this tokenizer names no eos_token, so a response could never end"
        raise SlingshotError(f"{missing}; add it to tokenizer_config.json")
    return [[*ids, tokenizer.eos_id] for ids in tokenizer.encode_batch(list(answers), continues=True)]
