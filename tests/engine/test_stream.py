"""A sample's text as its reader gets it: stop strings, reasoning and answer, streams."""

import itertools

import pytest

from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams

from .asking import PROMPT, ask, read


def test_stop_token_ids_end_a_sample(dense_model, tokenizer):
    engine, params = Engine(dense_model, tokenizer), {"max_tokens": 12, "temperature": 0}
    ids = ask(engine, PROMPT, **params)[0].token_ids
    (stopped,) = ask(engine, PROMPT, **params, stop_token_ids=(ids[6],))
    first = ids.index(ids[6])
    assert stopped.token_ids == ids[: first + 1] and stopped.finish_reason == "stop"
    assert stopped.text == tokenizer.decode(ids[:first])


@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("3 plus 4 is 7.", ("plus",), "3 "),
        ("3 plus 4 is 7.", ("s 4 i",), "3 plu"),  # begins and ends inside tokens
        ("3 plus 4 is 7.", ("is", "lus"), "3 p"),  # the first to be complete wins
        ("3 plus 4 is 7.", ("7.",), "3 plus 4 is "),
        ("3 plus 4 is 7.", ("3",), ""),
        ("3 plus 4 is 7.", ("minus",), "3 plus 4 is 7."),
        ("いくつ? 3足す4は7", ("足す",), "いくつ? 3"),
        ("aaab", ("aab",), "a"),
        ("Th end", ("nd", "e", "d"), "Th "),  # completed by one token, the first to begin cuts
    ],
)
def test_stop_strings_cut_the_text_before_them(scripted, tokenizer, text, stop, expected):
    engine = scripted(tokenizer.encode(text))
    (completion,) = ask(engine, PROMPT, stop=stop)
    assert completion.text == completion.answer == expected and completion.finish_reason == "stop"
    assert "".join(delta for _, delta in engine.stream(PROMPT, SamplingParams(stop=stop))) == expected
    if expected != text:
        assert tokenizer.eos_id not in completion.token_ids
        assert any(one in tokenizer.decode(completion.token_ids) for one in stop)
        assert not any(one in tokenizer.decode(completion.token_ids[:-1]) for one in stop)


def test_stop_string_inside_reasoning_keeps_tags_apart_by_id(scripted, tokenizer):
    """`</think>` spelt by ordinary tokens is text, the token is the tag, also where the text is cut."""
    typed = tokenizer.encode("no </think> tag")
    ids = [tokenizer.think_id, *typed, tokenizer.end_think_id, *tokenizer.encode("the end stop here")]
    (completion,) = ask(scripted(ids), PROMPT, stop=("p he",))
    assert (completion.reasoning, completion.answer) == ("no </think> tag", "the end sto")
    assert completion.text == "<think>no </think> tag</think>the end sto"


def test_a_special_tokens_text_stops(scripted, tokenizer):
    """Alone, with text before it, and within a longer token's text; a special token that is passed adds nothing."""
    pad = tokenizer.pad_id
    name = next(token["content"] for token in tokenizer.description()["added_tokens"] if token["id"] == pad)
    assert tokenizer.decode([pad]) == "" and pad not in tokenizer.eos_ids
    ids = [*tokenizer.encode("one"), pad, *tokenizer.encode(" two"), pad, *tokenizer.encode(" three")]
    for stop, text, length in (
        (name, "one", 1 + len(tokenizer.encode("one"))),
        (f"two{name}", "one ", len(ids) - len(tokenizer.encode(" three"))),
        (name[:-1], "one", 1 + len(tokenizer.encode("one"))),
        ("three", "one two ", len(ids)),
    ):
        (completion,) = ask(scripted(ids), PROMPT, stop=(stop,))
        assert (completion.text, completion.token_ids) == (text, ids[:length])
        assert completion.finish_reason == "stop"
        assert "".join(delta for _, delta in scripted(ids).stream(PROMPT, SamplingParams(stop=(stop,)))) == text


def test_reasoning_and_answer_stream_as_they_are_parsed(scripted, tokenizer):
    ids = [*tokenizer.encode("3 plus 4 is 7\n"), tokenizer.end_think_id, *tokenizer.encode("\n\n7")]
    engine, prompt = scripted(ids), [*PROMPT, tokenizer.think_id]
    deltas, _ = read(engine.stream(prompt))
    (completion,) = ask(engine, prompt)
    for kind, whole in (("reasoning", completion.reasoning), ("answer", completion.answer)):
        assert "".join(text for its_kind, text in deltas if its_kind == kind) == whole
    assert completion.answer == "7" and len(deltas) > 3
    assert [kind for kind, _ in itertools.groupby(deltas, key=lambda delta: delta[0])] == ["reasoning", "answer"]


def test_stream_of_random_bytes_gives_whole_characters_and_the_completions_text(dense_model, tokenizer, scripted):
    """A random model emits broken UTF-8 all the time; "😀" comes in four tokens and must arrive as one piece."""
    engine = Engine(dense_model, tokenizer)
    for seed in range(5):
        params = SamplingParams(max_tokens=60, temperature=1.5, seed=seed, stop=("e", " p"))
        pieces, completion = read(engine.stream(PROMPT, params))
        assert "".join(text for kind, text in pieces if kind == "answer") == completion.answer
        assert "".join(text for kind, text in pieces if kind == "reasoning") == (completion.reasoning or "")
    assert len(ids := tokenizer.encode("a😀b")) == 6
    assert [text for _, text in scripted(ids).stream(PROMPT)] == ["a", "😀", "b"]


def test_stream_withholds_what_may_become_a_stop_string(scripted, tokenizer):
    ids = [token for character in "a sto a stop b" for token in tokenizer.encode(character)]
    pieces = [text for _, text in scripted(ids).stream(PROMPT, SamplingParams(stop=("stop",)))]
    assert "".join(pieces) == "a sto a "


def test_stream_leaves_other_requests_to_their_owner(dense_model, tokenizer):
    engine = Engine(dense_model, tokenizer)
    mine = engine.add(PROMPT, SamplingParams(max_tokens=3, temperature=0))
    list(engine.stream(PROMPT, SamplingParams(max_tokens=20, temperature=0)))
    engine.generate([PROMPT], SamplingParams(max_tokens=2))
    (output,) = engine.step()
    assert output.request_id == mine and engine.step() == []
