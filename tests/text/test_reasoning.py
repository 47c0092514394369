"""The reasoning parser: by ids and by text, whole and in any pieces."""

import itertools
import re
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from slingshot.base.errors import SlingshotError
from slingshot.text.reasoning import Parsed, ReasoningStream, encode_responses, ends_in_reasoning, parse
from slingshot.text.tokenizer import END_THINK, THINK, Tokenizer

outputs = st.lists(
    st.sampled_from([THINK, END_THINK, "<think", "</", "think>", "<", "\n", "\n\n", " ", "7", "so é🙂"]), max_size=10
).map("".join)


def expected(text: str, opened: bool | None, think: str = THINK, end_think: str = END_THINK) -> Parsed:
    """The same by regular expressions over the whole text."""
    begin = re.match(rf"(\n*{think})*" if opened else rf"\s*{think}(\n*{think})*", text)
    if begin is None and not (opened is None and end_think in text):
        return Parsed(None, text, False)
    reasoning, closing, answer = text[begin.end() if begin else 0 :].partition(end_think)
    return Parsed(reasoning.strip("\n") if closing else reasoning.lstrip("\n"), answer.lstrip("\n"), bool(closing))


def reassembles(text: str, opened: bool | None, parsed: Parsed, think: str = THINK, end_think: str = END_THINK) -> bool:
    """Whether text is reasoning, tags and answer with nothing but layout between them."""
    if parsed.reasoning is None:
        return text == parsed.answer
    reasoning, answer = re.escape(parsed.reasoning), re.escape(parsed.answer)
    begun = rf"\s*{think}(\n*{think})*"
    beginning = {True: rf"(\n*{think})*", False: begun, None: rf"({begun})?"}[opened]
    ending = rf"\n*{end_think}\n*{answer}" if parsed.closed else ""
    return bool(re.fullmatch(rf"{beginning}\n*{reasoning}{ending}", text))


@pytest.mark.parametrize(
    ("text", "opened", "parsed"),
    [
        ("3 plus 4 is 7\n</think>\n\n7", True, Parsed("3 plus 4 is 7", "7", True)),
        ("<think>\n3 plus 4\n</think>\n\n7", False, Parsed("3 plus 4", "7", True)),
        ("<think>\n3 plus 4\n</think>\n\n7", True, Parsed("3 plus 4", "7", True)),  # opened twice
        ("7", False, Parsed(None, "7", False)), ("\n7</think>", False, Parsed(None, "\n7</think>", False)),
        ("3 plus\n", True, Parsed("3 plus\n", "", False)), ("</think>7", True, Parsed("", "7", True)),
        ("a <think> b</think>7</think>\n", True, Parsed("a <think> b", "7</think>\n", True)),
        ("", True, Parsed("", "", False)), (" \n", False, Parsed(None, " \n", False)),
        ("so </thin", True, Parsed("so </thin", "", False)),
        ("```\n</think>\n```", False, Parsed(None, "```\n</think>\n```", False)),  # an answer that speaks of tags
        ("so\n</think>\n\n```\n<think>\n</think>\n```", True, Parsed("so", "```\n<think>\n</think>\n```", True)),
        ("</think>\n\n7", False, Parsed(None, "</think>\n\n7", False)),
        ("so\n</think>\n\n7", None, Parsed("so", "7", True)), ("\n\n</think>7", None, Parsed("", "7", True)),
        ("\n<think>\nso\n</think>\n\n7", None, Parsed("so", "7", True)),
        ("so <think> on</think>7</think>", None, Parsed("so <think> on", "7</think>", True)),
        ("<think>so", None, Parsed("so", "", False)), ("7 <think>\n", None, Parsed(None, "7 <think>\n", False)),
        ("", None, Parsed(None, "", False)),
    ],
)  # fmt: skip
def test_text(text: str, opened: bool | None, parsed: Parsed) -> None:
    assert parse(text, opened) == parsed == expected(text, opened)
    assert reassembles(text, opened, parsed)


opening = st.sampled_from([True, False, None])


@given(text=outputs, opened=opening, cuts=st.lists(st.integers(0, 60), max_size=12))
@example(text="a</think>b", opened=True, cuts=list(range(10)))
@example(text="a</think>b", opened=None, cuts=list(range(10)))
def test_text_in_any_pieces_is_the_same(text: str, opened: bool | None, cuts: list[int]) -> None:
    bounds, stream = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)], ReasoningStream(None, opened)
    pieces = [text[begin:end] for begin, end in itertools.pairwise(bounds)]
    deltas = [delta for piece in pieces for delta in stream.push(piece)] + stream.finish()
    reasoning, answer = ("".join(part for kind, part in deltas if kind == wanted) for wanted in ("reasoning", "answer"))
    parsed = Parsed(reasoning if stream.reasoned else None, answer, stream.closed)
    assert parsed == parse(text, opened) == expected(text, opened)
    assert reassembles(text, opened, parsed)
    assert all(part for _, part in deltas)
    kinds = [kind for kind, _ in deltas]
    assert kinds == sorted(kinds, reverse=True)  # reasoning, then the answer


@given(opened=opening, data=st.data())
def test_ids_follow_the_tokens(tokenizer: Tokenizer, opened: bool | None, data: st.DataObject) -> None:
    tags = [[tokenizer.think_id], [tokenizer.end_think_id]]
    words = [*tags, *map(tokenizer.encode, ["\n", " ", "7", "é🙂", THINK, END_THINK]), tokenizer.encode("é")[:1]]
    ids = [id for word in data.draw(st.lists(st.sampled_from(words), max_size=10)) for id in word]
    marks = {tokenizer.think_id: "\ue000", tokenizer.end_think_id: "\ue001"}
    runs = itertools.groupby(ids, lambda id: marks.get(id))
    text = "".join(mark * len([*run]) if mark else tokenizer.decode(run) for mark, run in runs)
    whole = expected(text, opened, "\ue000", "\ue001")

    def spelt(part: str) -> str:
        return part.replace("\ue000", THINK).replace("\ue001", END_THINK)

    assert reassembles(text, opened, whole, "\ue000", "\ue001")
    assert parse(ids, opened, tokenizer) == Parsed(
        None if whole.reasoning is None else spelt(whole.reasoning), spelt(whole.answer), whole.closed
    )


def test_tags_spelt_by_other_tokens_are_text(tokenizer: Tokenizer) -> None:
    typed = tokenizer.encode("say </think> or <think>")
    ids = [*typed, tokenizer.end_think_id, *tokenizer.encode("7"), tokenizer.eos_id]
    assert parse(ids, True, tokenizer) == Parsed("say </think> or <think>", "7", True)


def test_ids_of_a_vocabulary_without_tags_are_read_as_text(chatml: Tokenizer) -> None:
    ids = [*chatml.encode("<think>\nhé\n</think>\n\n7"), chatml.eos_id]
    assert parse(ids, False, chatml) == Parsed("hé", "7", True)


def test_deltas_come_as_soon_as_they_are_sure() -> None:
    stream = ReasoningStream(None, True)
    pieces = ["\n", "so", "\n", "then", " </th", "e", "</think", ">\n", "\n7", "\n"]
    told = [stream.push(piece) for piece in pieces]
    texts = [None, "so", None, "\nthen", " ", "</the", None]
    reasoning = [[] if text is None else [("reasoning", text)] for text in texts]
    assert told == [*reasoning, [], [("answer", "7")], [("answer", "\n")]]
    assert stream.finish() == []


def test_with_an_unknown_prompt_nothing_is_told_before_it_is_sure() -> None:
    stream = ReasoningStream(None, None)
    assert [stream.push(piece) for piece in ["so", "\n", " far</thi"]] == [[], [], []]
    assert stream.push("nk>\n7") == [("reasoning", "so\n far"), ("answer", "7")]
    stream = ReasoningStream(None, None)
    deltas = [delta for piece in ["\n", "<think>", "\nso", " far"] for delta in stream.push(piece)]
    assert deltas == [("reasoning", "so"), ("reasoning", " far")]
    stream = ReasoningStream(None, None)
    assert stream.push("7") + stream.finish() == [("answer", "7")]


@pytest.mark.slow
def test_long_outputs_take_no_time() -> None:
    start = time.thread_time()
    long = {END_THINK * 100_000: False, THINK * 100_000: True, "\n" * 500_000: True, "a " * 300_000: None}
    for text, opened in long.items():
        assert reassembles(text, opened, parse(text, opened)) or opened
    stream = ReasoningStream(None, True)
    for _ in range(200_000):
        stream.push("\n")
    assert stream.push("so") == [("reasoning", "so")]
    stream = ReasoningStream(None, None)
    for _ in range(200_000):
        stream.push("so ")
    assert len(stream.finish()[0][1]) == 600_000
    assert time.thread_time() - start < 10


@pytest.mark.parametrize("missing", [THINK, END_THINK])
def test_a_vocabulary_with_one_of_the_tags_is_read_as_text(missing: str) -> None:
    tokens = [tag for tag in (THINK, END_THINK) if tag != missing]
    vocab = {token: id for id, token in enumerate([*tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    template = {"chat_template": "{{ messages[0].content }}<think>\n"}
    tokenizer = Tokenizer.from_bpe(vocab, [], dict.fromkeys(tokens, False), template)
    assert ends_in_reasoning(tokenizer.encode_chat([{"role": "user", "content": "3"}]), tokenizer)
    closing = tokenizer.encode(END_THINK) if missing == END_THINK else [tokenizer.end_think_id]
    ids = [*tokenizer.encode("so"), *closing, *tokenizer.encode("7")]
    assert parse(ids, True, tokenizer) == Parsed("so", "7", True)


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


written = st.text(max_size=12).map(lambda text: text.strip("\n")).filter(lambda text: "think>" not in text)


def test_responses_are_written_in_r1s_layout(tokenizer: Tokenizer) -> None:
    (primed,) = encode_responses(tokenizer, [("3 plus 4 is 7", "7")], opened=True)
    assert tokenizer.decode(primed) == "3 plus 4 is 7\n</think>\n\n7"
    assert primed[-1] == tokenizer.eos_id and primed.count(tokenizer.end_think_id) == 1
    (whole,) = encode_responses(tokenizer, [("3 plus 4 is 7", "7")], opened=False)
    assert whole[0] == tokenizer.think_id and tokenizer.decode(whole) == "<think>\n3 plus 4 is 7\n</think>\n\n7"


@given(responses=st.lists(st.tuples(written, written), max_size=3), opened=st.booleans())
def test_parsing_reads_back_what_was_written(
    tokenizer: Tokenizer, chatml: Tokenizer, responses: list[tuple[str, str]], opened: bool
) -> None:
    for one in (tokenizer, chatml):
        ids = encode_responses(one, responses, opened)
        assert [parse(each, opened, one) for each in ids] == [
            Parsed(reasoning, answer, True) for reasoning, answer in responses
        ]


def test_tags_typed_within_reasoning_stay_text(tokenizer: Tokenizer) -> None:
    (ids,) = encode_responses(tokenizer, [("a </think> b", "<think>")], opened=True)
    assert parse(ids, True, tokenizer) == Parsed("a </think> b", "<think>", True)


def test_a_response_must_be_able_to_end(tokenizer: Tokenizer) -> None:
    with pytest.raises(SlingshotError, match="names no eos_token"):
        encode_responses(Tokenizer(tokenizer._backend, {}), [("a", "b")], opened=True)
