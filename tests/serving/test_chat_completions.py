import openai
import pytest

QUESTION = [{"role": "user", "content": "What is 3+4-2?"}]


def ask(client, **more):
    return client.chat.completions.create(model="tiny", messages=QUESTION, **more)


def joined(stream):
    """What a stream's chunks say together, and whether one of them held both kinds of text."""
    parts, mixed = {"reasoning_content": "", "content": ""}, False
    for chunk in stream:
        for choice in chunk.choices:
            said = {name: getattr(choice.delta, name, None) for name in parts}
            mixed |= all(said.values())
            parts = {name: parts[name] + (said[name] or "") for name in parts}
    return *parts.values(), mixed


def test_reasoning_and_answer_are_told_apart(says, tokenizer):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    answer = ask(client)
    message = answer.choices[0].message
    assert (message.reasoning_content, message.content) == ("3 plus 4 is 7.", "5")
    assert answer.choices[0].finish_reason == "stop"
    ids = client.backend.ids
    assert answer.usage.completion_tokens == len(ids)
    assert answer.usage.completion_tokens_details.reasoning_tokens == ids.index(tokenizer.end_think_id) + 1


@pytest.mark.parametrize("chunk", [1, 2, 3, 100])
def test_no_chunk_holds_two_kinds_of_text(says, chunk):
    stream = ask(says("3 plus 4 is 7.\n</think>\n\n5", chunk=chunk), stream=True)
    assert joined(stream) == ("3 plus 4 is 7.", "5", False)


def test_an_answer_cut_in_its_reasoning_has_no_content(says):
    answer = ask(says("3 plus 4 is 7.\n</think>\n\n5"), max_tokens=3)
    assert answer.choices[0].message.content is None
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_a_stop_string_acts_on_the_answer_alone(says):
    client = says("3 plus 4 is 7.\n</think>\n\n5 is 7")
    assert ask(client, stop="7").choices[0].message.content == "5 is "
    assert joined(ask(client, stop="7", stream=True)) == ("3 plus 4 is 7.", "5 is ", False)


def test_the_same_seed_gives_the_same_answer_streamed_or_not(client):
    whole = ask(client, seed=3, max_tokens=20).choices[0].message
    reasoning, content, _ = joined(ask(client, seed=3, max_tokens=20, stream=True))
    assert (whole.reasoning_content or "", whole.content or "") == (reasoning, content)


def test_samples_of_one_seed_differ(client):
    choices = ask(client, seed=3, max_tokens=20, n=3).choices
    assert len({choice.message.reasoning_content for choice in choices}) == 3


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"model": "big"}, "there is no model 'big'"),
        ({"messages": [{"role": "user", "content": "7" * 300}]}, "context 256"),
        ({"temperature": -1}, "temperature"),
        ({"messages": [{"role": "user"}]}, "no content"),
        ({"stream_options": {"include_usage": True}}, "stream: true"),
    ],
)
def test_an_impossible_request_is_refused_with_what_is_wrong(client, wrong, said):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": QUESTION} | wrong)
    assert caught.value.status_code in (400, 404) and said in caught.value.body["message"]
