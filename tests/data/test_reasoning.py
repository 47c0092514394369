"""The reasoning parser: by ids and by text, whole and in any pieces."""

import itertools
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from slingshot.data.reasoning import Parsed, ReasoningStream, ends_in_reasoning, parse
from slingshot.data.tokenizer import END_THINK, THINK, Tokenizer

thorough = settings(derandomize=True, deadline=None, max_examples=300)
outputs = st.lists(st.sampled_from([THINK, END_THINK, "<think", "</", "think>", "<", "\n", "\n\n", " ", "7", "so é🙂"]), max_size=10).map("".join)


def expected(text: str, opened: bool, think: str = THINK, end_think: str = END_THINK) -> Parsed:
    """The same by regular expressions over the whole text."""
    begin = re.match(rf"(\n*{think})*" if opened else rf"\s*{think}(\n*{think})*", text)
    if begin is None:
        return Parsed(None, text, False)
    reasoning, closing, answer = text[begin.end() :].partition(end_think)
    return Parsed(reasoning.strip("\n") if closing else reasoning.lstrip("\n"), answer.lstrip("\n"), bool(closing))


@pytest.mark.parametrize(
    ("text", "opened", "parsed"),
    [
        ("3 plus 4 is 7\n</think>\n\n7", True, Parsed("3 plus 4 is 7", "7", True)),
        ("<think>\n3 plus 4\n</think>\n\n7", False, Parsed("3 plus 4", "7", True)),
        ("<think>\n3 plus 4\n</think>\n\n7", True, Parsed("3 plus 4", "7", True)),  # opened twice
        ("7", False, Parsed(None, "7", False)),
        ("\n7</think>", False, Parsed(None, "\n7</think>", False)),
        ("3 plus\n", True, Parsed("3 plus\n", "", False)),
        ("</think>7", True, Parsed("", "7", True)),
        ("a <think> b</think>7</think>\n", True, Parsed("a <think> b", "7</think>\n", True)),
        ("", True, Parsed("", "", False)),
        (" \n", False, Parsed(None, " \n", False)),
        ("so </thin", True, Parsed("so </thin", "", False)),
    ],
)
def test_text(text: str, opened: bool, parsed: Parsed) -> None:
    assert parse(text, opened) == parsed == expected(text, opened)


@thorough
@given(text=outputs, opened=st.booleans(), cuts=st.lists(st.integers(0, 60), max_size=12))
@example(text="a</think>b", opened=True, cuts=list(range(10)))
def test_text_in_any_pieces_is_the_same(text: str, opened: bool, cuts: list[int]) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream = ReasoningStream(None, opened)
    deltas = [delta for begin, end in itertools.pairwise(bounds) for delta in stream.push(text[begin:end])] + stream.finish()
    reasoning, answer = ("".join(part for kind, part in deltas if kind == wanted) for wanted in ("reasoning", "answer"))
    assert Parsed(reasoning if stream.reasoned else None, answer, stream.closed) == parse(text, opened) == expected(text, opened)
    assert all(part for _, part in deltas)
    kinds = [kind for kind, _ in deltas]
    assert kinds == sorted(kinds, reverse=True)  # reasoning, then the answer


@thorough
@given(opened=st.booleans(), data=st.data())
def test_ids_follow_the_tokens(tokenizer: Tokenizer, opened: bool, data: st.DataObject) -> None:
    words = [
        [tokenizer.think_id],
        [tokenizer.end_think_id],
        *map(tokenizer.encode, ["\n", " ", "7", "é🙂", THINK, END_THINK]),
        tokenizer.encode("é")[:1],
    ]
    ids = [id for word in data.draw(st.lists(st.sampled_from(words), max_size=10)) for id in word]
    marks = {tokenizer.think_id: "\ue000", tokenizer.end_think_id: "\ue001"}
    text, run = "", []
    for id in [*ids, None]:
        if id is None or id in marks:
            text, run = text + tokenizer.decode(run) + marks.get(id, ""), []
        else:
            run.append(id)
    whole = expected(text, opened, "\ue000", "\ue001")

    def spelt(part: str) -> str:
        return part.replace("\ue000", THINK).replace("\ue001", END_THINK)

    assert parse(ids, opened, tokenizer) == Parsed(None if whole.reasoning is None else spelt(whole.reasoning), spelt(whole.answer), whole.closed)


def test_tags_spelt_by_other_tokens_are_text(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("say </think> or <think>"), tokenizer.end_think_id, *tokenizer.encode("7"), tokenizer.eos_id]
    assert parse(ids, True, tokenizer) == Parsed("say </think> or <think>", "7", True)


def test_ids_of_a_vocabulary_without_tags_are_read_as_text(chatml: Tokenizer) -> None:
    ids = [*chatml.encode("<think>\nhé\n</think>\n\n7"), chatml.eos_id]
    assert parse(ids, False, chatml) == Parsed("hé", "7", True)


def test_deltas_come_as_soon_as_they_are_sure() -> None:
    stream = ReasoningStream(None, True)
    pieces = ["\n", "so", "\n", "then", " </th", "e", "</think", ">\n", "\n7", "\n"]
    told = [stream.push(piece) for piece in pieces]
    reasoning = [[], [("reasoning", "so")], [], [("reasoning", "\nthen")], [("reasoning", " ")], [("reasoning", "</the")], []]
    assert told == [*reasoning, [], [("answer", "7")], [("answer", "\n")]]
    assert stream.finish() == []


def test_the_prompt_tells_where_the_output_begins(tokenizer: Tokenizer, chatml: Tokenizer) -> None:
    messages = [{"role": "user", "content": "say <think>"}]
    assert ends_in_reasoning(tokenizer.encode_chat(messages), tokenizer)
    assert not ends_in_reasoning(tokenizer.encode_chat(messages, thinking=False), tokenizer)
    assert not ends_in_reasoning(tokenizer.encode("<think>"), tokenizer)
    assert not ends_in_reasoning(chatml.encode_chat(messages), chatml)
    assert ends_in_reasoning(chatml.encode("3+4 <think>\n"), chatml)
    assert not ends_in_reasoning([], tokenizer)


def test_ids_need_their_tokenizer() -> None:
    with pytest.raises(ValueError, match="tokenizer"):
        parse([5], True)
