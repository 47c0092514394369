import json

import httpx
import pytest

from slingshot.serving import sse
from tests.serving.conftest import ORDERS, WEATHER, said

QUESTION = {"role": "user", "content": "What is 3+4-2?"}
TOOL = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}


def ask(client, messages=(QUESTION,), **more):
    return client.messages.create(model="tiny", messages=list(messages), **{"max_tokens": 100} | more)


def told(message):
    return [
        (block.type, getattr(block, {"tool_use": "input"}.get(block.type, block.type))) for block in message.content
    ]


def test_reasoning_and_answer_are_blocks(says, anthropic_of):
    client = says("3 plus 4 is 7.\n</think>\n\n5")
    message = ask(anthropic_of(client))
    assert told(message) == [("thinking", "3 plus 4 is 7."), ("text", "5")]
    assert (message.stop_reason, message.role) == ("end_turn", "assistant") and message.content[0].signature
    assert message.usage.output_tokens == len(client.backend.ids)


@pytest.mark.parametrize("chunk", [1, 3])
def test_the_stream_adds_up_to_the_message(calls, anthropic_of, chunk):
    calls.backend.chunk = chunk
    client = anthropic_of(calls)
    with client.messages.stream(model="tiny", messages=[QUESTION], tools=[TOOL], max_tokens=300) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_message()
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 4
    whole = ask(client, tools=[TOOL], max_tokens=300)
    called = [("tool_use", {"city": "Paris"})] * 2
    assert told(whole) == told(streamed) == [("thinking", "Look it up."), ("text", "One moment."), *called]
    assert streamed.stop_reason == whole.stop_reason == "tool_use"
    assert streamed.content[0].signature and streamed.usage.output_tokens == len(calls.backend.ids)


@pytest.mark.parametrize("text", ORDERS)
def test_the_next_turn_begins_with_the_very_tokens_that_were_sampled(calls, caller, anthropic_of, text):
    client, calls.backend.ids = anthropic_of(calls), said(caller, text)
    message = ask(client, tools=[TOOL], max_tokens=300)
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "rain"}]}
        for block in message.content
        if block.type == "tool_use"
    ]
    history = [QUESTION, {"role": "assistant", "content": message.content}, {"role": "user", "content": results}]
    ask(client, history, tools=[TOOL], max_tokens=300)
    first, second = (list(generation.prompt_ids) for generation in calls.backend.asked)
    assert second[: len(first) + len(calls.backend.ids)] == first + calls.backend.ids


def test_history_is_read_as_the_chat_it_was_without_the_billing_block(says, anthropic_of, tokenizer):
    client = says("Yes.\n</think>\n\n5")
    system = [
        {"type": "text", "text": "x-anthropic-billing-header: cch=1a2b3;"},
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}},
    ]
    messages = [
        QUESTION,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "7", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "It is 5."},
            ],
        },
        {"role": "system", "content": "Now in Japanese."},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}, {"type": "text", "text": "Say so."}]},
    ]
    ask(anthropic_of(client), messages, system=system)
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 3+4-2?"},
        {"role": "assistant", "content": "It is 5.", "reasoning_content": "7"},
        {"role": "user", "content": "Now in Japanese.\n\nSure?\nSay so."},
    ]
    assert list(client.backend.asked[0].prompt_ids) == tokenizer.encode_chat(chat)


def test_count_tokens_counts_what_is_asked(client, anthropic_of):
    client = anthropic_of(client)
    its = {"system": "Be brief.", "messages": [QUESTION]}
    counted = client.messages.count_tokens(model="tiny", **its).input_tokens
    usage = ask(client, max_tokens=1, **its).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens


def test_input_tokens_leave_out_what_the_cache_had(client, anthropic_of):
    question = {"role": "user", "content": "3+4-2? " * 15}
    first, again = (ask(anthropic_of(client), [question], max_tokens=1).usage for _ in range(2))
    assert again.cache_read_input_tokens > 0
    total = again.input_tokens + again.cache_read_input_tokens
    assert total == first.input_tokens + first.cache_read_input_tokens


def test_an_answer_ends_by_its_length_or_by_a_sequence(says, anthropic_of):
    client = anthropic_of(says("3 plus 4 is 7.\n</think>\n\n5 is 7"))
    cut = ask(client, max_tokens=3)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    stopped = ask(client, stop_sequences=["x", "7"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "7")
    assert told(stopped)[-1] == ("text", "5 is ")


@pytest.mark.parametrize(
    "more, kinds",
    [
        ({"thinking": {"type": "disabled"}}, ["text"]),
        ({"thinking": {"type": "enabled", "budget_tokens": 4}}, ["thinking", "text"]),
        ({"thinking": {"type": "adaptive"}, "output_config": {"effort": "low"}}, ["thinking", "text"]),
    ],
)
def test_how_much_it_thinks(client, anthropic_of, more, kinds):
    message = ask(anthropic_of(client), max_tokens=40, extra_body=more | {"seed": 5})
    assert [block.type for block in message.content] == kinds


@pytest.mark.parametrize("place", ["output_config", "output_format"])
def test_a_schema_binds_the_answer_alone(client, anthropic_of, place):
    pytest.importorskip("xgrammar")
    schema = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    more = {"thinking": {"type": "enabled", "budget_tokens": 6}}
    more |= {"output_config": {"format": form}} if place == "output_config" else {"output_format": form}
    message = ask(anthropic_of(client), extra_body=more)
    assert [block.type for block in message.content] == ["thinking", "text"]
    assert json.loads(message.content[1].text)["x"] in (1, 2)


def test_a_begun_answer_is_gone_on_with(client, says, anthropic_of, tokenizer):
    client = says("5")
    ask(anthropic_of(client), [QUESTION, {"role": "assistant", "content": "It is"}])
    assert tokenizer.decode(client.backend.asked[0].prompt_ids).endswith("It is")


def test_what_claude_code_sends_beside_is_tolerated(served):
    body = {
        "model": "tiny",
        "max_tokens": 5,
        "messages": [QUESTION],
        "thinking": {"type": "adaptive"},
        "metadata": {"user_id": "{}"},
        "context_management": {"edits": []},
        "tools": [{"type": "web_search_20250305", "name": "web_search"}],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    }
    headers = {"x-api-key": "a", "Authorization": "Bearer b", "anthropic-version": "2023-06-01", "anthropic-beta": "x"}
    answer = httpx.post(f"{served}/v1/messages?beta=true", json=body, headers=headers)
    assert answer.status_code == 200 and answer.json()["type"] == "message"


@pytest.mark.parametrize(
    "wrong, code, kind, said",
    [
        ({"model": "big"}, 404, "not_found_error", "there is no model 'big'"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": [{"role": "user", "content": "7" * 300}]}, 400, "invalid_request_error", "prompt is too long"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "invalid_request_error", "role 'tool'"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "invalid_request_error", "a list of blocks"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "text only"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no function to call"),
        ({"tools": [{"name": ""}]}, 400, "invalid_request_error", "has a name"),
        ({"tools": [TOOL]}, 400, "invalid_request_error", "knows no tools"),
    ],
)
def test_errors_have_the_bodies_of_this_api(served, wrong, code, kind, said):
    body = {"model": "tiny", "max_tokens": 5, "messages": [QUESTION]} | wrong
    for stream in (False, True):
        answer = httpx.post(f"{served}/v1/messages", json=body | {"stream": stream})
        assert answer.status_code == code and answer.json()["type"] == "error"
        assert answer.json()["error"]["type"] == kind and said in answer.json()["error"]["message"]


def test_what_fails_midway_is_told_as_the_last_event(says, anthropic_of):
    import anthropic

    client = says("3 plus 4 is 7.\n</think>\n\n5")
    client.backend.fails_after = 4
    with pytest.raises(anthropic.APIStatusError, match="failed"):
        list(ask(anthropic_of(client), stream=True))
    with pytest.raises(anthropic.InternalServerError):
        ask(anthropic_of(client))


def test_silence_is_broken_by_pings(says, anthropic_of, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.02)
    client = says("7\n</think>\n\n5")
    client.backend.pause = 0.1
    body = {"model": "tiny", "max_tokens": 100, "messages": [QUESTION], "stream": True}
    url = str(client.base_url) + "messages"
    with httpx.stream("POST", url, json=body) as answer:
        lines = list(answer.iter_lines())
    events = [line.removeprefix("event: ") for line in lines if line.startswith("event: ")]
    assert "ping" in events and events[-1] == "message_stop"
    assert all(json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: "))
    with anthropic_of(client).messages.stream(model="tiny", messages=[QUESTION], max_tokens=100) as stream:
        assert stream.get_final_text() == "5"


def test_a_client_that_leaves_stops_the_model(says):
    client = says("3 plus 4 is 7.\n</think>\n\n5" * 40, chunk=1)
    client.backend.pause = 0.02
    body = {"model": "tiny", "max_tokens": 1000, "messages": [QUESTION], "stream": True}
    with httpx.stream("POST", str(client.base_url) + "messages", json=body) as answer:
        next(answer.iter_lines())
    for _ in range(100):
        if client.backend.aborted:
            break
        client.models.list()
    assert client.backend.aborted == 1
