import json

import openai
import pytest

from slingshot.engine.engine import Engine
from slingshot.engine.sampling import SamplingParams
from slingshot.engine.vocabulary import Vocabulary
from slingshot.serving.call_structure import call_structure, free_text
from slingshot.serving.local import LocalBackend
from slingshot.text.tool_calls import ToolCallStream
from tests.serving.conftest import WEATHER, talking
from tests.text.test_tool_calls import BY_NAME, encode, tokenizers, whole_calls  # noqa: F401

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
    chunks = list(ask(calls, [QUESTION], stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Look it up."
    told = [call for delta in deltas for call in delta.tool_calls or []]
    begun = [call for call in told if call.id]
    assert [(call.index, call.function.name) for call in begun] == [(0, "weather"), (1, "weather")]
    assert len({call.id for call in begun}) == 2 and len(told) > 8
    for number in range(2):
        its = "".join(call.function.arguments for call in told if call.index == number)
        assert json.loads(its) == {"city": "Paris"}


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
    message["tool_calls"][0]["function"]["arguments"] = "[" * 2000  # nested deeper than JSON is read
    changed = [{"role": "user", "content": "Another question"}, message, {"role": "tool", "content": "rain"}]
    ask(calls, changed)
    prompt = caller.decode(calls.backend.asked[1].prompt_ids)
    assert "Another question" in prompt and "What is the weather" not in prompt


def test_without_tools_the_same_words_are_text(calls):
    message = ask(calls, [QUESTION], tools=openai.NOT_GIVEN).choices[0].message
    assert message.tool_calls is None and message.content.count("<tool_call>") == 2
    assert ask(calls, [QUESTION], tool_choice="none").choices[0].message.tool_calls is None


def test_tools_that_a_server_would_run_are_passed_over(calls):
    ask(calls, [QUESTION], tools=[{"type": "web_search", "strict": True}, WEATHER])
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
        ({"extra_body": {"messages": [{"role": "assistant", "tool_calls": 5}]}}, "a call has a function"),
        ({"tool_choice": "some"}, "is none of"),
        ({"tool_choice": "required", "tools": []}, "no function to call"),
        ({"tool_choice": "required", "response_format": {"type": "json_object"}}, "bind the same answer"),
        ({"tool_choice": {"type": "function", "function": {"name": "weathr"}}}, "did you mean weather"),
    ],
)
def test_impossible_tools_are_refused(calls, wrong, what):
    with pytest.raises(openai.BadRequestError, match=what):
        ask(calls, [QUESTION], **wrong)


ADD = {
    "name": "add",
    "description": "Add them.",
    "parameters": {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}, "y": {"type": "boolean"}},
        "required": ["x", "y"],
    },
}
NOW = {"name": "now", "parameters": {"type": "object", "properties": {}}}
BOTH = [{"type": "function", "function": its} for its in (ADD, NOW)]


def fits(name, arguments):
    value = json.loads(arguments)
    return value == {} if name == "now" else value["x"] in (1, 2) and type(value["y"]) is bool and len(value) == 2


@pytest.fixture(scope="module")
def forced(make_model, dense, caller):
    """A client of a small random model whose template knows tools."""
    pytest.importorskip("xgrammar")
    engine = Engine(make_model(dense(vocab_size=caller.vocab_size, max_position_embeddings=512)), caller)
    with talking(caller, LocalBackend(engine)) as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("budget", [0, 5])
def test_a_call_that_is_required_comes_and_fits_its_schema(forced, budget, stream):
    more = {"thinking_token_budget": budget, "seed": budget}
    asked = {"tools": BOTH, "tool_choice": "required", "parallel_tool_calls": False, "extra_body": more}
    if stream:
        with forced.chat.completions.stream(model="tiny", messages=[QUESTION], **asked) as events:
            for _ in events:
                pass
            choice = events.get_final_completion().choices[0]
    else:
        choice = ask(forced, [QUESTION], **asked).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls" and not choice.message.content
    assert fits(call.function.name, call.function.arguments)


def test_a_certain_function_is_called_in_every_dialect(forced, anthropic_of):
    more = {"thinking_token_budget": 4, "seed": 3}
    choice = {"type": "function", "function": {"name": "add"}}
    told = ask(forced, [QUESTION], tools=BOTH, tool_choice=choice, extra_body=more).choices[0].message
    (call,) = told.tool_calls
    assert call.function.name == "add" and fits("add", call.function.arguments)
    response = forced.responses.create(
        model="tiny", input="Add.", tools=[{"type": "function", "strict": True, **ADD}], reasoning={"effort": "none"},
        tool_choice={"type": "function", "name": "add"}, extra_body={"seed": 2},
    )  # fmt: skip
    (item,) = response.output
    assert (item.type, item.name, item.status) == ("function_call", "add", "completed") and fits("add", item.arguments)
    assert response.tool_choice.name == "add" and response.tools[0].strict
    tools = [{"name": its["name"], "input_schema": its["parameters"]} for its in (ADD, NOW)]
    for choice in ({"type": "tool", "name": "add"}, {"type": "any", "disable_parallel_tool_use": True}):
        message = anthropic_of(forced).messages.create(
            model="tiny", messages=[QUESTION], max_tokens=400, tools=tools, tool_choice=choice,
            thinking={"type": "disabled"}, extra_body={"seed": 2},
        )  # fmt: skip
        (block,) = message.content
        assert message.stop_reason == "tool_use" and fits(block.name, json.dumps(block.input))
        assert choice["type"] == "any" or block.name == "add"


def test_one_call_at_most_ends_the_answer_before_the_second(calls):
    choice = ask(calls, [QUESTION], parallel_tool_calls=False).choices[0]
    assert (choice.finish_reason, len(choice.message.tool_calls)) == ("tool_calls", 1)
    assert ask(calls, [QUESTION], parallel_tool_calls=True).choices[0].message.tool_calls[1]


def test_a_call_that_the_length_cut_is_told_as_far_as_it_came(calls, caller, anthropic_of):
    cut = caller.decode(calls.backend.ids).index("Paris") + 2
    size = next(n for n in range(len(calls.backend.ids)) if len(caller.decode(calls.backend.ids[:n])) >= cut)
    choice = ask(calls, [QUESTION], max_tokens=size).choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "length" and '{"city": "Paris"}'.startswith(call.function.arguments)
    assert len(call.function.arguments) > 1
    tool = {"name": "weather", "input_schema": WEATHER["function"]["parameters"]}
    asked = {"model": "tiny", "messages": [QUESTION], "tools": [tool], "max_tokens": size}
    with anthropic_of(calls).messages.stream(**asked) as stream:
        pieces = [
            event.delta.partial_json
            for event in stream
            if getattr(event, "delta", None) and hasattr(event.delta, "partial_json")
        ]
        streamed = stream.get_final_message()
    whole = anthropic_of(calls).messages.create(**asked)
    assert "".join(pieces) == call.function.arguments
    assert streamed.stop_reason == whole.stop_reason == "max_tokens"
    assert whole.content[-1].input == streamed.content[-1].input
    tools = [{"type": "function", **WEATHER["function"], "strict": False}]
    with calls.responses.stream(model="tiny", input="x", tools=tools, max_output_tokens=size) as events:
        told = list(events)
    item = told[-1].response.output[-1]
    assert (told[-1].type, item.status, item.arguments) == (
        "response.incomplete",
        "incomplete",
        call.function.arguments,
    )
    deltas = [event.delta for event in told if event.type == "response.function_call_arguments.delta"]
    assert "".join(deltas) == item.arguments and len(deltas) > 1


FORMS = [*BY_NAME, "spelt"]


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("several", [False, True])
def test_calls_of_every_format_are_made_and_read(request, make_model, dense, tokenizers, name, several):  # noqa: F811
    """A random model must call, after its reasoning and in the format's own words: what it writes is read."""
    pytest.importorskip("xgrammar")
    tokenizer, form = tokenizers[name], BY_NAME["hermes" if name == "spelt" else name]
    engine = Engine(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=512)), tokenizer)
    tag = call_structure(form, tokenizer, [ADD, NOW], several)
    params = SamplingParams(max_tokens=400, n=6, temperature=1.3, thinking_budget=6, structural_tag=tag)
    prompt = [*tokenizer.encode("Add."), tokenizer.think_id]
    (output,) = engine.generate([prompt], params)
    whole = [its for its in output.outputs if its.finish_reason == "stop"]
    assert len(whole) >= 3
    for sample in whole:
        stream = ToolCallStream(tokenizer, True, form)
        told = [part for id in sample.token_ids[:-1] for part in stream.push(id)] + stream.finish()
        found = whole_calls(told)
        assert found and all(fits(call.name, call.arguments) for call in found)
        assert not [text for kind, text in (part for part in told if isinstance(part, tuple)) if kind == "answer"]
        assert several or len(found) == 1


@pytest.mark.parametrize("name", FORMS)
def test_a_strict_call_that_is_begun_keeps_to_its_schema_and_text_is_free(tokenizers, name):  # noqa: F811
    pytest.importorskip("xgrammar")
    from slingshot.engine.structured import GrammarMatcher  # needs xgrammar

    tokenizer, form = tokenizers[name], BY_NAME["hermes" if name == "spelt" else name]
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    grammar = vocabulary.grammars.compile(("structural_tag", free_text(form, tokenizer, [ADD, NOW])))

    def accepted(text):
        matcher = GrammarMatcher(grammar, vocabulary.size)
        fits = all(map(matcher.push, encode(tokenizer, text)))
        return fits and bool(matcher.mask()[tokenizer.eos_id // 32] >> tokenizer.eos_id % 32 & 1)

    def call(arguments):
        text = form.call.replace("NAME", "add").replace("ARGUMENTS", arguments).replace("DIGITS", "0")
        return form.begin + text + form.end

    good, bad = '{"x": 1, "y": true}', '{"x": 3, "y": true}'
    if form.sign == "<function=":
        good, bad = (f"<parameter=x>{x}</parameter><parameter=y>true</parameter>" for x in (1, 3))
    free = "" if name == "llama" else "Fine {so} it is. "
    assert accepted("Fine. 日本 {") and accepted(free + call(good)) and not accepted(free + call(bad))
