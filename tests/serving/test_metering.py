"""What is counted and paid: the same by every dialect, streamed or not; and no door without its key."""

import json

import httpx
import pytest

from slingshot.serving import accounts
from slingshot.serving.backend import TokenDelta
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.prices import PICO, PriceList
from tests.serving.conftest import ScriptedBackend, ids_of, serving
from tests.serving.test_ledger import url  # noqa: F401
from tests.waiting import until

PRICES = PriceList.parse({"models": {"*": {"cache_hit": 1, "cache_miss": 10, "output": 100}}})
CHAT = [{"role": "user", "content": "What is 3+4-2?"}]
QUESTIONS = {
    "/v1/chat/completions": {"messages": CHAT, "max_tokens": 50},
    "/v1/completions": {"prompt": "What is 3+4-2?", "max_tokens": 50},
    "/v1/responses": {"input": CHAT, "max_output_tokens": 50},
    "/v1/messages": {"messages": CHAT, "max_tokens": 50},
}

APART = {"/tokenize": "messages", "/v1/responses": "prompt"}  # what contradicts another key there


class Cached(ScriptedBackend):
    """Has 7 tokens of every prompt; fails before its first token while `refuses`."""

    refuses = None

    async def generate(self, generation):
        if self.refuses:
            raise self.refuses
        async for delta in super().generate(generation):
            yield TokenDelta(delta.token_ids, delta.logprobs, 7, delta.finish_reason)


@pytest.fixture
def backend(tokenizer):
    return Cached([*ids_of(tokenizer, "3 plus 4.\n</think>\n\n5"), tokenizer.eos_id], eos_ids=tokenizer.eos_ids)


@pytest.fixture
def ledger(url):  # noqa: F811
    ledger = Ledger(url, PRICES)
    yield ledger
    ledger.close()


@pytest.fixture
def http(ledger, backend, tokenizer):
    """A client of a server that demands keys, without one."""
    with serving(tokenizer, backend, ledger, keyless=False) as url, httpx.Client(base_url=url, timeout=30) as http:  # noqa: F811
        yield http


def bearer(ledger, name="alice", **limits):
    return {"Authorization": f"Bearer {accounts.create(ledger, name, **limits)}"}


def usages(body):
    """All that tell of tokens, wherever a stream or an answer has them."""
    if isinstance(body, list):
        return [its for each in body for its in usages(each)]
    found = [body["usage"]] if body.get("usage") else []
    return found + [
        its for name in ("response", "message") if isinstance(body.get(name), dict) for its in usages(body[name])
    ]


@pytest.mark.parametrize("path", QUESTIONS)
def test_a_stream_tells_the_usage_that_an_answer_tells_and_pays_the_same(http, ledger, path):
    headers, body = bearer(ledger, balance=1.0), {"model": "tiny"} | QUESTIONS[path]
    whole = usages(http.post(path, json=body, headers=headers).json())
    more = {"stream": True} | ({"stream_options": {"include_usage": True}} if "completions" in path else {})
    lines = http.post(path, json=body | more, headers=headers).text.splitlines()
    streamed = usages([json.loads(line[6:]) for line in lines if line.startswith("data: {")])
    if path == "/v1/messages":  # the first event tells of the prompt alone
        streamed.pop(0)
    assert streamed == whole and len(whole) == 1
    until(lambda: not accounts.keys(ledger)[0].running)
    with ledger.transaction() as connection:
        rows = connection.execute(REQUESTS.select()).all()
    assert len(rows) == 2 and all(row.cached == 7 for row in rows)
    for row in rows:
        assert row.cost == (7 * 1 + (row.prompt - 7) * 10 + row.completion * 100) * PICO // 10**6
    [its] = whole
    prompt = its.get("prompt_tokens") or its["input_tokens"] + its.get("cache_read_input_tokens", 0)
    assert prompt == rows[0].prompt
    assert accounts.keys(ledger)[0].balance == PICO - sum(row.cost for row in rows)


@pytest.mark.parametrize("path", QUESTIONS)
@pytest.mark.parametrize("stream", [False, True])
def test_what_fails_before_its_first_token_costs_nothing(http, ledger, backend, path, stream):
    headers, body = bearer(ledger, balance=1.0), {"model": "tiny", "stream": stream} | QUESTIONS[path]
    for error in (ApiError(503, "busy"), RuntimeError("broken")):
        backend.refuses = error
        told = http.post(path, json=body, headers=headers)
        assert told.status_code in (500, 503) or "error" in told.text or "failed" in told.text
    until(lambda: not accounts.keys(ledger)[0].running)
    [key] = accounts.keys(ledger)
    assert (key.balance, key.reserved) == (PICO, 0)


def test_every_door_asks_for_a_key_and_a_key_s_models_hold_behind_every_one(http, ledger, backend):
    """But for those that tell whether the server lives, and the page, which asks for the key itself."""
    other = bearer(ledger, "bob", models=["big"])
    body = {"model": "tiny", "messages": CHAT, "prompt": "3", "input": "3", "tokens": [3], "max_tokens": 5}
    body |= {"id": "chatcmpl-1", "action": "stop"}
    open_to_all, held = set(), set()
    for path, methods in http.get("/openapi.json").json()["paths"].items():
        for method in methods:
            place = path.replace("{name}", "tiny").replace("{id}", "chatcmpl-1")
            own = {name: value for name, value in body.items() if name != APART.get(path)}
            asked = {"json": own} if method == "post" else {}
            if http.request(method, place, **asked).status_code != 401:
                open_to_all.add(path)
            elif method == "post" or "{name}" in path:
                held |= {path} if http.request(method, place, headers=other, **asked).status_code == 403 else set()
    assert open_to_all == {"/health", "/ready"}
    assert held >= {*QUESTIONS, "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/v1/models/{name}"}
    assert not backend.asked
