"""Structures through the API: they bind the answer alone, and hostile ones hold nobody up."""

import json
import sys
import threading
import time

import openai
import pytest

from slingshot.engine.engine import Engine
from slingshot.serving.local import LocalBackend
from tests.serving.conftest import talking

QUESTION = [{"role": "user", "content": "What is 3+4-2?"}]
FREE = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(autouse=True)
def xgrammar():
    pytest.importorskip("xgrammar")


def ask(client, **more):
    return client.chat.completions.create(**{"model": "tiny", "messages": QUESTION, "max_tokens": 60, "seed": 1} | more)


def test_without_reasoning_json_is_content_and_no_reasoning(client):
    schema = {"type": "object", "properties": {"x": {"enum": ["3", "4"]}}, "required": ["x"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    choice = ask(client, response_format=wanted, max_tokens=200, extra_body=FREE).choices[0]
    assert json.loads(choice.message.content)["x"] in ("3", "4") and choice.finish_reason == "stop"
    assert not getattr(choice.message, "reasoning_content", None)


@pytest.mark.slow
@pytest.mark.parametrize("budget", [0, 7])
def test_a_grammar_binds_the_answer_and_leaves_the_reasoning_its_words_and_its_end(client, budget):
    more = {"structured_outputs": {"grammar": "root ::= [a-z]+"}, "thinking_token_budget": budget}
    choice = ask(client, temperature=1.5, extra_body=more).choices[0]
    assert choice.message.content.isalpha() and choice.message.content.islower()
    assert bool(getattr(choice.message, "reasoning_content", None)) == bool(budget)


def test_asking_for_json_leaves_the_reasoning_on(client):
    chosen = ask(client, response_format={"type": "json_object"}, extra_body={"thinking_budget": 9}, max_tokens=80)
    plain = ask(client, extra_body={"thinking_budget": 9}, max_tokens=80)
    reasoning = plain.choices[0].message.reasoning_content
    assert reasoning and chosen.choices[0].message.reasoning_content == reasoning
    assert chosen.choices[0].message.content.lstrip()[0] == "{"
    assert chosen.usage.prompt_tokens == plain.usage.prompt_tokens


def in_schema(schema):
    return {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}


HOSTILE = {
    "enumeration": in_schema({"enum": [f"v{number}" for number in range(100_000)]}),
    "long": {"structured_outputs": {"regex": "[a-z]" * 100_000}},
    "ambiguous": {"structured_outputs": {"grammar": "root ::= r0\n" + "".join(
        f"r{n} ::= r{n + 1} r{n + 1} | r{n + 1}\n" for n in range(60)) + 'r60 ::= "z" | ""'}},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_structure_is_refused_in_one_line_while_others_are_answered(client, kind):
    stop, waits = threading.Event(), []

    def go_on():
        while not stop.is_set():
            began = time.perf_counter()
            assert ask(client, max_tokens=5).usage.completion_tokens == 5
            waits.append(time.perf_counter() - began)

    other = threading.Thread(target=go_on)
    other.start()
    try:
        began = time.perf_counter()
        with pytest.raises(openai.BadRequestError) as caught:
            ask(client, extra_body=HOSTILE[kind] | FREE)
        assert time.perf_counter() - began < 60  # of a busy machine, the start of the process included
    finally:
        stop.set()
        other.join()
    message = caught.value.body["message"]
    assert "cannot be used" in message and "\n" not in message and len(message) < 500
    assert waits and max(waits) < 5
    assert ask(client, extra_body={"guided_choice": ["yes"]} | FREE).choices[0].message.content == "yes"


@pytest.mark.slow
def test_repetitions_of_repetitions_are_no_burden(client):
    choice = ask(client, extra_body={"guided_regex": "(a{1000}){1000}"} | FREE).choices[0]
    assert set(choice.message.content) == {"a"} and choice.finish_reason == "length"


def test_without_xgrammar_a_structure_is_refused_with_the_way_out_and_others_are_answered(
    tokenizer, make_model, dense, monkeypatch
):
    monkeypatch.setitem(sys.modules, "xgrammar", None)
    engine = Engine(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)), tokenizer)
    with talking(tokenizer, LocalBackend(engine)) as client:
        for more in ({"response_format": {"type": "json_object"}}, {"extra_body": {"guided_regex": "a"}}):
            with pytest.raises(openai.BadRequestError) as caught:
                ask(client, **more)
            way_out = "structured output needs the package xgrammar: pip install 'slingshot-lm[structured]'"
            assert caught.value.body["message"] == way_out
        assert ask(client, max_tokens=3).usage.completion_tokens == 3
