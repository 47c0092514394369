"""An engine that fails under load: every stream is told, what was made is booked, and nothing is left behind."""

import asyncio
import json
import time

import httpx
import pytest

from slingshot.base.errors import SlingshotError
from slingshot.engine.engine import Engine
from slingshot.serving import accounts
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.local import LocalBackend
from slingshot.serving.prices import PICO, PriceList
from tests.serving.conftest import serving
from tests.serving.test_load import BODY, CHAT
from tests.waiting import until

STREAMS = 20
PRICES = PriceList.parse({"models": {"*": {"output": 100}}})


class Failing(Engine):
    """Begins when all streams are here, and fails once, in a step whose tokens nobody has been told of."""

    failure = None

    def advance(self):
        if self.failure and self.unfinished < STREAMS:
            return time.sleep(0.001)
        super().advance()
        if self.failure and self.counters.running == STREAMS and self.counters.decoded > 10 * STREAMS:
            failure, self.failure = self.failure, None
            raise failure


async def told(url, headers):
    """The payloads of all streams, each of its own."""

    async def one(http, number):
        body = BODY | {"stream": True, "ignore_eos": True, "seed": number, "max_tokens": 200}
        async with http.stream("POST", CHAT, json=body) as answer:
            assert answer.status_code == 200
            lines = [line async for line in answer.aiter_lines() if line.startswith("data: ")]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line[6:]) for line in lines]

    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as http:
        return await asyncio.gather(*(one(http, number) for number in range(STREAMS)))


@pytest.mark.parametrize("failure", [RuntimeError("7 is not 8"), SlingshotError("the logits are no numbers")])
def test_every_stream_hears_of_a_step_that_failed_and_what_was_made_is_paid(
    tokenizer, make_model, dense, tmp_path, caplog, failure
):
    engine = Failing(make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=256)), tokenizer)
    engine.failure, lost = failure, isinstance(failure, RuntimeError)
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", PRICES)
    headers = {"Authorization": f"Bearer {accounts.create(ledger, 'alice', balance=100.0)}"}
    with serving(tokenizer, LocalBackend(engine), ledger, keyless=False) as url:
        reason = "the engine stopped with RuntimeError; restart the server" if lost else "the logits are no numbers"
        for payloads in asyncio.run(told(url, headers)):
            assert len(payloads) > 1 and payloads[-1]["error"]["message"] == reason
        until(lambda: not accounts.keys(ledger)[0].running)
        with ledger.transaction() as connection:
            rows = connection.execute(REQUESTS.select()).all()
        assert len(rows) == STREAMS and sum(row.completion for row in rows) == engine.counters.decoded
        assert engine.counters.pages_used == engine.counters.running == engine.counters.waiting == 0
        [key] = accounts.keys(ledger)
        assert (key.reserved, key.balance) == (0, 100 * PICO - engine.counters.decoded * 100 * PICO // 10**6)
        again = httpx.post(f"{url}{CHAT}", json=BODY | {"max_tokens": 5}, headers=headers)
        health, ready = (httpx.get(url + path) for path in ("/health", "/ready"))
        for answer in (again, health, ready):
            assert answer.status_code == (503 if lost else 200) and ("RuntimeError" in answer.text) == lost
        assert "7 is not 8" not in caplog.text  # it may hold what was asked
    ledger.close()
