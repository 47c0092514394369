import json

import openai
import pytest

from tests.serving.conftest import WEATHER

QUESTION = {"role": "user", "content": "What is the weather?"}


def ask(client, messages, **more):
    return client.chat.completions.create(model="tiny", messages=messages, **{"tools": [WEATHER]} | more)


def test_calls_come_beside_reasoning_and_content(calls):
    choice = ask(calls, [QUESTION]).choices[0]
    message = choice.message
    assert (message.reasoning_content, message.content) == ("Look it up.", "One moment.")
    assert choice.finish_reason == "tool_calls"
    assert [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls] == [
        ("weather", {"city": "Paris"})
    ] * 2


def test_a_stream_tells_the_same_calls_each_with_its_index(calls):
    deltas = [chunk.choices[0].delta for chunk in ask(calls, [QUESTION], stream=True)]
    told = [call for delta in deltas for call in delta.tool_calls or []]
    assert [(call.index, call.function.name) for call in told] == [(0, "weather"), (1, "weather")]
    assert len({call.id for call in told}) == 2


def test_the_next_turn_begins_with_the_very_tokens_that_were_sampled(calls):
    message = ask(calls, [QUESTION]).choices[0].message
    history = [QUESTION, message.model_dump(exclude_none=True)]
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in message.tool_calls]
    ask(calls, history + results)
    first, second = (list(generation.prompt_ids) for generation in calls.backend.asked)
    assert second[: len(first) + len(calls.backend.ids)] == first + calls.backend.ids
    without = [{key: value for key, value in history[1].items() if key != "reasoning_content"}]
    ask(calls, [QUESTION, *without, *results])
    assert list(calls.backend.asked[2].prompt_ids) == second


def test_a_history_that_was_changed_is_read_as_it_stands(calls, caller):
    message = ask(calls, [QUESTION]).choices[0].message.model_dump(exclude_none=True)
    changed = [{"role": "user", "content": "Another question"}, message, {"role": "tool", "content": "rain"}]
    ask(calls, changed)
    prompt = caller.decode(calls.backend.asked[1].prompt_ids)
    assert "Another question" in prompt and "What is the weather" not in prompt


def test_without_tools_the_same_words_are_text(calls):
    message = ask(calls, [QUESTION], tools=openai.NOT_GIVEN).choices[0].message
    assert message.tool_calls is None and message.content.count("<tool_call>") == 2
    assert ask(calls, [QUESTION], tool_choice="none").choices[0].message.tool_calls is None


def test_tools_that_a_server_would_run_are_passed_over(calls):
    ask(calls, [QUESTION], tools=[{"type": "web_search"}, WEATHER])
    ask(calls, [QUESTION], tools=[WEATHER])
    assert len({generation.prompt_ids for generation in calls.backend.asked}) == 1


def test_a_model_that_knows_no_tools_says_so(client):
    with pytest.raises(openai.BadRequestError, match="knows no tools"):
        ask(client, [QUESTION])


@pytest.mark.parametrize(
    "wrong, what",
    [
        ({"tools": [{"type": "function"}]}, "has a name"),
        ({"tools": [3]}, "with a type"),
        ({"tool_choice": "some"}, "is none of"),
        ({"tool_choice": "required"}, "cannot be made to call"),
        ({"tool_choice": {"type": "function", "function": {"name": "weathr"}}}, "did you mean weather"),
    ],
)
def test_impossible_tools_are_refused(calls, wrong, what):
    with pytest.raises(openai.BadRequestError, match=what):
        ask(calls, [QUESTION], **wrong)
