"""Hard times on loopback: a crowd of which a third hangs up, bodies that are none, and whatever the schema allows."""

import asyncio
import json
import random
import resource
from http.client import HTTPConnection

import httpx
import pytest

from slingshot.engine.engine import Engine
from slingshot.serving import accounts, sse
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.load import Limits
from slingshot.serving.local import LocalBackend
from slingshot.serving.served_model import ServedModel
from tests.serving.conftest import ScriptedBackend, running, serving
from tests.serving.test_callers import error_of, posts
from tests.serving.test_load import BODY, CHAT, Slow
from tests.waiting import until

pytestmark = pytest.mark.slow

COUNT = 1000  # bodies
OPEN = ("/health", "/ready")  # to whoever has no key


@pytest.fixture
def small(tokenizer, make_model, dense):
    model = make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256))
    return Engine(model, tokenizer, max_batch=128)


async def crowd(url, size, draw):
    """(question, finish_reason or None) of `size` requests at once; None: it hung up."""

    async def one(http, number):
        question = [{"role": "user", "content": f"What is {number}+4-2?"}]
        body = BODY | {"messages": question, "stream": number % 2 == 0, "seed": number, "max_tokens": 24}
        patience = draw.random() * 2 if number % 3 == 0 else None
        try:
            async with asyncio.timeout(patience):
                if not body["stream"]:
                    answer = await http.post(CHAT, json=body)
                    assert answer.status_code == 200, answer.text
                    message = answer.json()["choices"][0]["message"]
                    return number, [message.get("reasoning_content") or "", message["content"] or ""]
                said = ["", ""]
                async with http.stream("POST", CHAT, json=body) as answer:
                    assert answer.status_code == 200
                    lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
                assert lines[-1] == "data: [DONE]"
                for line in lines[:-1]:
                    [choice] = json.loads(line[6:])["choices"]
                    for place, name in enumerate(("reasoning_content", "content")):
                        said[place] += choice["delta"].get(name) or ""
                return number, said
        except TimeoutError:
            return number, None

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as http:
        return dict(await asyncio.gather(*(one(http, number) for number in range(size))))


def test_a_crowd_of_which_a_third_hangs_up_leaves_whole_answers_and_nothing_else(small, tokenizer, tmp_path):
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")
    gateway = Gateway([ServedModel("tiny", tokenizer, LocalBackend(small))], ledger, Limits(queue_tokens=10**6))
    with running(create_app(gateway)) as url:
        asyncio.run(crowd(url, 100, random.Random(0)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        told = asyncio.run(crowd(url, 300, random.Random(1)))
        until(lambda: not small.counters.running and not small.counters.waiting and not gateway.running)
        assert small.counters.pages_used == 0
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB
        again = asyncio.run(crowd(url, 1, random.Random(2)))
    whole = {number: said for number, said in told.items() if said is not None}
    assert 198 < len(whole) < 300 and all(number in whole for number in range(300) if number % 3)
    assert again[0] is None or again[0] == told[0] or told[0] is None  # a seed's answer does not depend on the crowd
    with ledger.transaction() as connection:
        rows = connection.execute(REQUESTS.select()).all()
    assert len(rows) >= 400 - 140 and all(row.ended is not None for row in rows)
    booked = sum(row.completion for row in rows)
    # What closes a reasoning is booked and not drawn; a step that ran when its reader left is drawn and not booked.
    assert abs(small.counters.decoded - booked) <= small.counters.decoded // 50
    ledger.close()


def bodies(draw, count):
    """Bodies that are not what a client should send: cut, of other types, nested, huge, unprintable, or not JSON."""
    strange = [
        None, True, -1, 0, 10**30, 1e308, "", "x" * 5000, "\ud800", "\x00", [], {}, [[]] * 50, {"a": {"a": None}},
        float("nan"), float("inf"), "🙂", ["a", 1, None], [{"role": "user"}], [{"role": "user", "content": [None]}],
    ]  # fmt: skip
    names = [
        "model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature", "top_p", "top_k", "n",
        "seed", "stop", "logit_bias", "logprobs", "top_logprobs", "thinking", "reasoning_effort", "response_format",
        "structured_outputs", "guided_regex", "tools", "thinking_budget", "echo", "suffix", "chat_template_kwargs",
        "input", "instructions", "system", "tool_choice", "max_output_tokens", "text", "reasoning", "metadata",
        "tokens", "id", "stop_sequences", "output_config",
    ]  # fmt: skip
    for _ in range(count):
        body = {"model": "tiny", "messages": BODY["messages"], "prompt": "3+4", "max_tokens": 1}
        body |= {"input": "3+4", "max_output_tokens": 1, "tokens": [1], "id": "a", "action": "reasoning_end"}
        for _ in range(draw.randint(1, 3)):
            body[draw.choice(names)] = draw.choice(strange)
        kind = draw.random()
        text = json.dumps(body)
        if kind < 0.1:
            text = text[: draw.randrange(len(text))]
        elif kind < 0.2:
            text = "".join(draw.choice('{}[]",:0a\\u') for _ in range(draw.randint(0, 40)))
        elif kind < 0.22:
            text = "[" * 100_000
        raw = text.encode()
        if kind > 0.9:
            at = draw.randrange(len(raw))
            raw = raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
        yield raw


@pytest.fixture(params=["with a key", "with a wrong one"])
def served(request, small, tokenizer, tmp_path):
    """(URL, headers of a caller, whether he is let in)."""
    known = request.param == "with a key"
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite")
    key = accounts.create(ledger, "alice") if known else accounts.PREFIX + "wrong"
    with serving(tokenizer, LocalBackend(small), ledger, keyless=False) as url:
        yield url, {"Authorization": f"Bearer {key}"}, known
    ledger.close()


def test_no_body_brings_the_server_down(small, served):
    draw, (url, key, known) = random.Random(0), served
    paths = posts(url)
    wire, refused = HTTPConnection(url.removeprefix("http://"), timeout=60), 0
    for number, content in enumerate(bodies(draw, COUNT)):
        path, headers = paths[number % len(paths)], {"Content-Type": "application/json"} if number % 50 else {}
        wire.request("POST", path, content, headers | key)
        answer = wire.getresponse()
        told = answer.read()
        assert answer.status < 500 if known else answer.status == 401, (content[:500], told)
        if answer.status >= 400:
            refused += 1
            error_of(path, told)
    assert refused > COUNT // 2 and httpx.get(f"{url}/health").json() == {"status": "ok"}
    until(lambda: not small.counters.running and not small.counters.waiting)
    assert small.counters.pages_used == 0 and bool(small.counters.decoded) == known


def test_no_request_that_the_schema_allows_fails_the_server(served):
    schemathesis = pytest.importorskip("schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings

    url, key, known = served
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    for operation in (its.ok() for its in schema.get_all_operations()):

        @given(case=operation.as_strategy())
        @settings(
            max_examples=15, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def check(case):
            answer = case.call(base_url=url, headers=key)
            path = case.operation.path
            # A path that is none, which an id with a slash in it makes, is no door.
            allowed = range(200, 500) if known or path in OPEN else (401, 404)
            assert answer.status_code in allowed, answer.text
            if answer.status_code >= 400:
                error_of(path, answer.text)

        check()


def test_who_does_not_read_holds_nobody_up_and_loses_nothing(tokenizer):
    backend = ScriptedBackend(tokenizer.encode("3 plus 4 is 7, ", continues=True) * 300)
    with serving(tokenizer, backend) as url:
        greedy = BODY | {"stream": True, "logprobs": True, "n": 8}  # more than what sockets hold
        with httpx.stream("POST", f"{url}{CHAT}", json=greedy, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            short = httpx.post(f"{url}{CHAT}", json=BODY | {"max_tokens": 3}, timeout=60).json()
            assert short["usage"]["completion_tokens"] == 3
            said = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    tokens = [
        len(told["content"] + told["reasoning_content"]) for its in said if (told := its["choices"][0]["logprobs"])
    ]
    assert sum(tokens) >= 8 * len(backend.ids) - 16  # those at the end of a stream may add no text
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in said) == 8


def test_a_stream_that_has_nothing_to_say_yet_says_that_it_lives(tokenizer, monkeypatch):
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.1)
    body = BODY | {"stream": True}
    with (
        serving(tokenizer, Slow(tokenizer, "5", None)) as url,
        httpx.stream("POST", f"{url}{CHAT}", json=body, timeout=60) as answer,
    ):
        assert answer.status_code == 200 and next(answer.iter_lines()) == ": keep-alive"
