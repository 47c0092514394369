"""However an answer comes in pieces, it is the same answer."""

from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.serving.answer import AnswerStream, joined
from slingshot.serving.backend import TokenDelta
from slingshot.text.tokenizer import Tokenizer
from tests.serving.conftest import TEXTS

WORDS = ["3 plus 4", " is 7", "\n", "\n\n", "</think>", "<think>", "足す", "🙂", " 7", "The end", " ", "<", "/think>"]


@cache
def trained():
    return Tokenizer.train(TEXTS * 20, vocab_size=300)


def told(tokenizer, ids, sizes, stop, opened, ended):
    """(reasoning, content, finish_reason, stop string, tokens, tokens of reasoning, unanswered) of an answer."""
    answer, pieces, at = AnswerStream(tokenizer, opened, stop), [], 0
    for size in [*sizes, len(ids)]:
        part, at = ids[at : at + size], at + size
        last = at >= len(ids)
        reason = ("stop" if ended else "length") if last else None
        pieces += joined(answer.push(TokenDelta(part, [-1.0] * len(part), finish_reason=reason)))
        if last or answer.finish_reason is not None or answer.unanswered:
            break
    text = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("reasoning", "content")}
    counted = answer.completion_tokens, answer.reasoning_tokens
    return *text.values(), answer.finish_reason, answer.stopped, *counted, answer.unanswered


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.data())
def test_chunks_do_not_change_an_answer(data):
    tokenizer = trained()
    words = data.draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8))
    tags = {"<think>": tokenizer.think_id, "</think>": tokenizer.end_think_id}
    quoted = data.draw(st.booleans())  # tags spelt in characters are text
    ids = [
        id
        for word in words
        for id in ([tags[word]] if word in tags and not quoted else tokenizer.encode(word, continues=True))
    ]
    ended = data.draw(st.booleans())
    ids += [tokenizer.eos_id] if ended else []
    stop = tuple(data.draw(st.lists(st.sampled_from(["7", " is", "end", "\n\n", "足"]), max_size=2)))
    opened = data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=len(ids)))
    whole = told(tokenizer, ids, [], stop, opened, ended)
    assert told(tokenizer, ids, sizes, stop, opened, ended) == whole
    assert told(tokenizer, ids, [1] * len(ids), stop, opened, ended) == whole
    assert not any(word in whole[1] for word in stop)
