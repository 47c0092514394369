"""Written responses: what is encoded is what the parser reads back."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.text.reasoning import Parsed, parse
from slingshot.text.response import encode_responses
from slingshot.text.tokenizer import Tokenizer

texts = st.text(max_size=12).map(lambda text: text.strip("\n"))


def test_r1s_layout(tokenizer: Tokenizer) -> None:
    (primed,) = encode_responses(tokenizer, [("3 plus 4 is 7", "7")], opened=True)
    assert tokenizer.decode(primed) == "3 plus 4 is 7\n</think>\n\n7"
    assert primed[-1] == tokenizer.eos_id and primed.count(tokenizer.end_think_id) == 1
    (whole,) = encode_responses(tokenizer, [("3 plus 4 is 7", "7")], opened=False)
    assert whole[0] == tokenizer.think_id and tokenizer.decode(whole) == "<think>\n3 plus 4 is 7\n</think>\n\n7"


@settings(derandomize=True, deadline=None)
@given(responses=st.lists(st.tuples(texts, texts), max_size=3), opened=st.booleans())
def test_parsing_reads_back_what_was_written(
    tokenizer: Tokenizer, chatml: Tokenizer, responses: list[tuple[str, str]], opened: bool
) -> None:
    for one in (tokenizer, chatml):
        written = encode_responses(one, responses, opened)
        assert [parse(ids, opened, one) for ids in written] == [
            Parsed(reasoning, answer, True) for reasoning, answer in responses
        ]


def test_tags_typed_within_reasoning_stay_text(tokenizer: Tokenizer) -> None:
    (ids,) = encode_responses(tokenizer, [("a </think> b", "<think>")], opened=True)
    assert parse(ids, True, tokenizer) == Parsed("a </think> b", "<think>", True)


def test_a_response_must_be_able_to_end(tokenizer: Tokenizer) -> None:
    with pytest.raises(SlingshotError, match="names no eos_token"):
        encode_responses(Tokenizer(tokenizer._backend, {}), [("a", "b")], opened=True)
