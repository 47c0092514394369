"""What every backend does behind the same API, this engine, vLLM's server or llama.cpp's: one body of tests.

from tests.serving.behaviours import *      # beside a fixture `served` that yields a Served
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest

from tests.waiting import until

MESSAGES = [{"role": "user", "content": "What is 3+4-2?"}]
PROMPT = "What is 3+4-2? 3 plus"


@dataclass(frozen=True)
class Served:
    """A server's client, of a model that reasons. busy: whether the backend itself makes an answer."""

    client: openai.OpenAI
    model: str
    busy: Callable[[], bool]

    def chat(self, **more: Any) -> Any:
        """Greedy, its reasoning bounded to 8 tokens."""
        asked = {"model": self.model, "messages": MESSAGES, "temperature": 0, "max_tokens": 40}
        return self.client.chat.completions.create(**asked | {"extra_body": {"thinking_budget": 8}} | more)

    def complete(self, **more: Any) -> Any:
        """Greedy, and 24 tokens whatever they are."""
        asked = {"model": self.model, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
        return self.client.completions.create(**asked | {"extra_body": {"ignore_eos": True}} | more)


def test_a_stream_says_what_the_whole_answer_does(served: Served) -> None:
    whole = served.chat()
    chunks = list(served.chat(stream=True, stream_options={"include_usage": True}))
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    message = whole.choices[0].message
    assert "".join(delta.content or "" for delta in deltas) == (message.content or "")
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == message.reasoning_content
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    streamed = chunks[-1].usage
    assert (streamed.prompt_tokens, streamed.completion_tokens) == (
        whole.usage.prompt_tokens, whole.usage.completion_tokens
    )  # fmt: skip
    assert streamed.completion_tokens_details == whole.usage.completion_tokens_details


def test_reasoning_and_answer_are_parted_and_a_budget_is_kept(served: Served) -> None:
    answer = served.chat()
    message = answer.choices[0].message
    assert message.reasoning_content and "think>" not in message.reasoning_content + (message.content or "")
    budget, closing = 8, 4  # a template's own words that close it are few
    assert 1 <= answer.usage.completion_tokens_details.reasoning_tokens <= budget + closing
    silent = served.chat(extra_body={"thinking": {"type": "disabled"}})
    assert not getattr(silent.choices[0].message, "reasoning_content", None)
    assert silent.usage.completion_tokens_details.reasoning_tokens == 0


def test_a_stop_string_ends_the_answer_before_it(served: Served) -> None:
    whole = served.complete().choices[0].text
    [*_, last] = re.finditer(r"[ -~]{2}", whole)
    choice = served.complete(stop=[last[0]]).choices[0]
    assert (choice.text, choice.finish_reason) == (whole.split(last[0])[0], "stop")


@pytest.mark.parametrize("most", [1, 7])
def test_an_answer_has_so_many_tokens_at_most(served: Served, most: int) -> None:
    answer = served.complete(max_tokens=most)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (most, "length")


def test_the_usage_counts_the_tokens_there_are(served: Served) -> None:
    answer = served.complete(logprobs=0)
    assert answer.usage.completion_tokens == len(answer.choices[0].logprobs.tokens) == 24
    url = str(served.client.base_url).removesuffix("/v1/")
    ids = httpx.post(f"{url}/tokenize", json={"messages": MESSAGES}).json()["tokens"]
    usage = served.chat().usage
    assert usage.prompt_tokens == len(ids) and usage.total_tokens == len(ids) + usage.completion_tokens


def test_logprobs_are_told_of_every_token_the_likeliest_first(served: Served) -> None:
    choice = served.chat(logprobs=True, top_logprobs=2, extra_body={"thinking": {"type": "disabled"}}).choices[0]
    tokens = choice.logprobs.content
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == choice.message.content
    assert all(token.logprob <= 0 and len(token.top_logprobs) == 2 for token in tokens)
    assert all(token.top_logprobs[0].logprob == pytest.approx(token.logprob, abs=1e-4) for token in tokens)


def test_a_seed_brings_the_same_answer_again_and_another_seed_another(served: Served) -> None:
    said = [served.complete(temperature=1, seed=seed).choices[0].text for seed in (1, 2, 3, 1)]
    assert said[0] == said[3] and len(set(said)) > 1


def test_several_answers_of_one_question_differ_and_are_all_counted(served: Served) -> None:
    answer = served.complete(temperature=1, seed=5, n=3)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.completion_tokens == 3 * 24
    again = served.complete(temperature=1, seed=5, n=3)
    assert [choice.text for choice in again.choices] == [choice.text for choice in answer.choices]


def test_who_hangs_up_stops_the_backend(served: Served) -> None:
    with served.complete(stream=True, max_tokens=900) as stream:
        for _ in zip(range(3), stream, strict=False):
            pass
        assert served.busy()
    until(lambda: not served.busy())
