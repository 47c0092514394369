import json

import openai
import pytest

from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway, ServedModel
from slingshot.text.tokenizer import R1_CONFIG, R1_TOKENS, Tokenizer
from tests.serving.conftest import TEXTS, ScriptedBackend, running

# Qwen's layout: tools first, calls between tags, results in a user's turn; earlier reasoning is left out.
TEMPLATE = """\
{%- if tools %}
    {{- '<｜User｜>tools: ' }}
    {%- for tool in tools %}{{ tool.function.name }} <tool_call></tool_call>{% endfor %}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<｜Assistant｜>' + (message.content or '') }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- (call.function.arguments | tojson) + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- eos_token }}
    {%- else %}
        {{- '<｜User｜>' + ('result: ' if message.role == 'tool' else '') + message.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

QUESTION = {"role": "user", "content": "What is the weather?"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = '<tool_call>\n{"name":  "weather", "arguments": {"city": "Paris"}}\n</tool_call>'  # two spaces: the model's own


@pytest.fixture(scope="module")
def caller():
    """A tokenizer whose template knows tools."""
    plain = Tokenizer.train(TEXTS * 20, 300)
    description = plain.description()
    vocab = description["model"]["vocab"] | {t["content"]: t["id"] for t in description["added_tokens"]}
    tags = ["<tool_call>", "</tool_call>"]
    vocab |= {tag: plain.vocab_size + place for place, tag in enumerate(tags)}
    merges = [tuple(pair) for pair in description["model"]["merges"]]
    return Tokenizer.from_bpe(
        vocab, merges, R1_TOKENS | dict.fromkeys(tags, False), R1_CONFIG | {"chat_template": TEMPLATE}
    )


def said(tokenizer, text):
    """Ids of what a model writes, tags as control tokens."""
    ids, tags = [], ["<tool_call>", "</tool_call>", "</think>"]
    while text:
        found = [(text.index(tag), tag) for tag in tags if tag in text]
        start, tag = min(found, default=(len(text), ""))
        ids += tokenizer.encode(text[:start], continues=True) if start else []
        ids += [tokenizer.control_id(tag)] if tag else []
        text = text[start + len(tag) :]
    return [*ids, tokenizer.eos_id]


@pytest.fixture
def calls(caller):
    ids = said(caller, f"Look it up.\n</think>\n\nOne moment.\n{CALL}\n{CALL}")
    backend = ScriptedBackend(ids, eos_ids=caller.eos_ids)
    with (
        running(create_app(Gateway([ServedModel("tiny", caller, backend)]))) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        client.backend = backend
        yield client


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
