import json

import httpx
import openai
import pytest
from pydantic import BaseModel, Field

from slingshot.serving import sse
from tests.serving.conftest import ORDERS, WEATHER, said

FUNCTION = {"type": "function", **WEATHER["function"], "strict": False}


def ask(client, question="What is 3+4-2?", **more):
    return client.responses.create(model="tiny", input=question, **more)


def told(response):
    """The items, ids aside."""
    return [
        (item.type, item.arguments if item.type == "function_call" else item.content[0].text)
        for item in response.output
    ]


def test_reasoning_and_answer_are_items(says):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    response = ask(client)
    assert told(response) == [("reasoning", "3 plus 4 is 7."), ("message", "5")]
    assert (response.status, response.output_text, response.store) == ("completed", "5", False)
    assert response.usage.output_tokens == len(client.backend.ids)
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    assert response.usage.input_tokens == len(client.backend.asked[0].prompt_ids)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_stream_adds_up_to_the_response(calls, chunk):
    calls.backend.chunk = chunk
    events = list(ask(calls, tools=[FUNCTION], stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    final = events[-1].response
    assert events[-1].type == "response.completed"
    assert [item.type for item in final.output] == ["reasoning", "message", "function_call", "function_call"]
    done = [event.item for event in events if event.type == "response.output_item.done"]
    assert [item.to_dict() for item in done] == [item.to_dict() for item in final.output]
    for place, item in enumerate(final.output):
        its = [event for event in events if getattr(event, "output_index", None) == place]
        text = "".join(event.delta for event in its if event.type.endswith(".delta"))
        assert text == (item.arguments if item.type == "function_call" else item.content[0].text)
        assert {getattr(event, "item_id", item.id) for event in its} == {item.id}
        assert (its[0].type, its[-1].type) == ("response.output_item.added", "response.output_item.done")
    whole = ask(calls, tools=[FUNCTION])
    called = [("function_call", '{"city": "Paris"}')] * 2
    assert told(whole) == told(final) == [("reasoning", "Look it up."), ("message", "One moment."), *called]


@pytest.mark.parametrize("text", ORDERS)
def test_the_next_turn_begins_with_the_very_tokens_that_were_sampled(calls, caller, text):
    calls.backend.ids = said(caller, text)
    question = [{"role": "user", "content": [{"type": "input_text", "text": "What is the weather?"}]}]
    response = ask(calls, question, instructions="Be brief.", tools=[FUNCTION])
    items = [item.to_dict() for item in response.output]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "rain"}
        for item in items
        if item["type"] == "function_call"
    ]
    ask(calls, question + items + results, instructions="Be brief.", tools=[FUNCTION])
    first, second = (list(generation.prompt_ids) for generation in calls.backend.asked)
    assert second[: len(first) + len(calls.backend.ids)] == first + calls.backend.ids


def test_history_is_read_as_the_chat_it_was(says, tokenizer):
    client = says("Yes.\n</think>\n\n5")
    ask(
        client,
        [
            {"type": "message", "role": "developer", "content": "Be brief."},
            {"role": "user", "content": "3+4-2"},
            {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "7"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is 5."}]},
            {"type": "message", "role": "user", "content": "Sure?"},
            {"type": "message", "role": "developer", "content": "Now in Japanese."},
        ],
        instructions="Think.",
    )
    chat = [
        {"role": "system", "content": "Think.\n\nBe brief."},
        {"role": "user", "content": "3+4-2"},
        {"role": "assistant", "content": "It is 5.", "reasoning_content": "7"},
        {"role": "user", "content": "Sure?\n\nNow in Japanese."},
    ]
    assert list(client.backend.asked[0].prompt_ids) == tokenizer.encode_chat(chat)


def test_what_codex_sends_beside_is_tolerated(says):
    client = says("7\n</think>\n\n5")
    response = ask(
        client,
        tools=[
            {"type": "web_search"},
            {"type": "namespace", "name": "mcp", "tools": []},
            {"type": "custom", "name": "x"},
        ],
        tool_choice="auto",
        parallel_tool_calls=True,
        store=False,
        include=["reasoning.encrypted_content"],
        prompt_cache_key="one",
        metadata={"a": "b"},
        truncation="disabled",
        reasoning={"effort": "medium", "summary": "auto"},
        text={"verbosity": "low"},
        extra_body={"client_metadata": {"c": "d"}, "unheard_of": 1},
    )
    assert response.output_text == "5" and response.tools == []


def test_an_answer_that_is_cut_is_incomplete(says):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    response = ask(client, max_output_tokens=3)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert [item.status for item in response.output] == ["incomplete"]
    assert list(ask(client, max_output_tokens=3, stream=True))[-1].type == "response.incomplete"


class Answer(BaseModel):
    x: int = Field(ge=0, le=9)


def test_a_schema_binds_the_answer_alone(client):
    pytest.importorskip("xgrammar")
    asked = {"model": "tiny", "input": "What is 3+4-2?", "reasoning": {"effort": "low"}, "max_output_tokens": 100}
    response = client.responses.parse(**asked, text_format=Answer)
    assert isinstance(response.output_parsed, Answer)
    assert [item.type for item in response.output] == ["reasoning", "message"]


def test_effort_none_leaves_the_reasoning_out(client):
    response = ask(client, reasoning={"effort": "none"}, max_output_tokens=12, extra_body={"seed": 2})
    assert [item.type for item in response.output] == ["message"]


@pytest.mark.parametrize(
    "wrong, code, said",
    [
        ({"model": "big"}, 404, "there is no model 'big'"),
        ({"previous_response_id": "resp_1"}, 400, "send the whole conversation"),
        ({"input": "7" * 300}, 400, "context 256"),
        ({"input": []}, 400, "holds no item"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, 400, "input.0: an item of type 'item_reference'"),
        ({"input": [{"role": "boss", "content": "x"}]}, 400, "role 'boss'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "read text only"),
        ({"input": [{"type": "function_call", "name": "f"}]}, 400, "call_id"),
        ({"tool_choice": "required"}, 400, "no function to call"),
        ({"text": {"format": {"type": "xml"}}}, 400, "none of text, json_object"),
        ({"tools": [{"type": "web_search", "x": "\ud800"}]}, 400, "half a character"),
        ({"extra_body": {"n": 2}}, 400, "n is not of this API"),
    ],
)
def test_an_impossible_request_is_refused_streamed_or_not(served, wrong, code, said):
    body = {"model": "tiny", "input": "3+4"} | wrong.get("extra_body", wrong)
    for stream in (False, True):
        answer = httpx.post(
            f"{served}/v1/responses",
            content=json.dumps(body | {"stream": stream}),
            headers={"Content-Type": "application/json"},
        )
        assert answer.status_code == code and said in answer.json()["error"]["message"]


def test_what_fails_midway_is_told_as_the_last_event(says):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    client.backend.fails_after = 4
    events = list(ask(client, stream=True))
    assert events[0].type == "response.created"
    assert (events[-1].type, events[-1].response.status) == ("response.failed", "failed")
    assert events[-1].response.error.code == "server_error"
    with pytest.raises(openai.InternalServerError):
        ask(client)


def test_silence_is_broken_by_events(says, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.02)
    client = says("7\n</think>\n\n5")
    client.backend.pause = 0.1
    events = list(ask(client, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds.count("response.created") == 1
    assert kinds.count("response.in_progress") > 3 and events[-1].response.output_text == "5"
