"""However an answer comes in pieces, it is the same answer."""

from functools import cache

from hypothesis import given
from hypothesis import strategies as st

from slingshot.serving.answer import AnswerStream, joined
from slingshot.serving.backend import TokenDelta
from slingshot.text.tokenizer import Tokenizer
from tests.serving.conftest import TEXTS
from tests.text.test_tool_calls import BY_NAME, encode, section, tokenizers  # noqa: F401

WORDS = ["3 plus 4", " is 7", "\n", "\n\n", "</think>", "<think>", "足す", "🙂", " 7", "The end", " ", "<", "/think>"]


@cache
def trained():
    return Tokenizer.train(TEXTS * 20, vocab_size=300)


def told(tokenizer, ids, sizes, stop, opened, ended, tools=None, several=True):
    """(reasoning, content, finish_reason, stop string, tokens, tokens of reasoning, unanswered, calls) of an answer."""
    answer, pieces, at = AnswerStream(tokenizer, opened, stop, False, tools, several), [], 0
    for size in [*sizes, len(ids)]:
        part, at = ids[at : at + size], at + size
        last = at >= len(ids)
        reason = ("stop" if ended else "length") if last else None
        pieces += joined(answer.push(TokenDelta(part, [-1.0] * len(part), finish_reason=reason)))
        if last or answer.finish_reason is not None or answer.unanswered:
            break
    text = {kind: "".join(piece.text for piece in pieces if piece.kind == kind) for kind in ("reasoning", "content")}
    counted = answer.completion_tokens, answer.reasoning_tokens
    streamed = [["", None, 0, 0] for _ in answer.calls]  # arguments, name, begun, ended
    for piece in pieces:
        if piece.call is not None:
            its = streamed[piece.call.number]
            its[:] = its[0] + piece.text, piece.call.name, its[2] + piece.begins, its[3] + piece.ends
    assert streamed == [[call.arguments, call.name, 1, int(call.whole)] for call in answer.calls]
    return *text.values(), answer.finish_reason, answer.stopped, *counted, answer.unanswered, streamed


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


NAMES = [*BY_NAME, "spelt"]
CALL_WORDS = [
    "Fine. ",
    "\n",
    "{",
    "}",
    '"',
    "日本",
    "</think>",
    "<think>",
    "<tool_call>",
    "</tool_call>",
    ' {"name": "f", ',
]


@given(data=st.data(), name=st.sampled_from(NAMES))
def test_chunks_do_not_change_calls_and_what_was_streamed_is_the_call(tokenizers, data, name):  # noqa: F811
    tokenizer, form = tokenizers[name], BY_NAME["hermes" if name == "spelt" else name]
    call = section(name, [("weather", '{"city": "Paris", "note": "a </b> {\\" 日本"}')])
    pieces = data.draw(st.lists(st.sampled_from([*CALL_WORDS, call, "QUOTED", "CUT", "BROKEN"]), max_size=6))
    ids = []
    for piece in pieces:
        size = data.draw(st.integers(0, len(call)))
        text = {"QUOTED": call, "CUT": call[:size], "BROKEN": call[:size] + call[size + 1 :]}.get(piece, piece)
        ids += encode(tokenizer, text, spelt=piece == "QUOTED") if text else []
    ended = data.draw(st.booleans())
    ids += [tokenizer.eos_id] if ended else []
    stop = tuple(data.draw(st.lists(st.sampled_from(["Par", "日", "}}", "ine"]), max_size=1)))
    opened, several = data.draw(st.booleans()), data.draw(st.booleans())
    sizes = data.draw(st.lists(st.integers(1, 7), max_size=len(ids)))
    asked = stop, opened, ended, form, several
    whole = told(tokenizer, ids, [], *asked)
    assert told(tokenizer, ids, sizes, *asked) == whole
    assert told(tokenizer, ids, [1] * len(ids), *asked) == whole
    assert several or len(whole[-1]) < 2
