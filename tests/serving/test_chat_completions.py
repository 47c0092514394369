import openai
import pytest

from slingshot.engine.engine import Engine
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import running

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


def test_with_glass_every_token_says_whether_it_was_drafted(tokenizer, make_model, dense):
    """Greedy decoding of a random model runs in circles, which are guessed."""
    model = make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    backend = LocalBackend(Engine(model, tokenizer, speculation="on"))
    with (
        running(create_app(Gateway([ServedModel("tiny", tokenizer, backend)]))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        asked = {"max_tokens": 200, "temperature": 0, "logprobs": True, "extra_body": {"glass": True}}
        (choice,) = ask(client, **asked).choices
        told = [chunk.choices[0] for chunk in ask(client, stream=True, **asked) if chunk.choices]
    drafted = choice.glass["drafted"]
    assert len(drafted) == sum(len(choice.logprobs.to_dict()[kind]) for kind in ("content", "reasoning_content")) == 200
    assert backend.counters.accepted >= 2 * sum(drafted) > 100
    assert [flag for its in told for flag in getattr(its, "glass", {"drafted": []})["drafted"]] == drafted


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
