"""Servers behind the gateway that are killed under load, and come back."""

import asyncio
import contextlib
import json
import os
import subprocess
import sys

import httpx
import pytest

from slingshot.serving import accounts, upstream
from slingshot.serving.app import create_app
from slingshot.serving.gateway import Gateway
from slingshot.serving.inference_servers import VllmServer
from slingshot.serving.ledger import Ledger
from slingshot.serving.prices import PICO, PriceList
from slingshot.serving.served_model import ServedModel
from slingshot.serving.server import listening
from slingshot.serving.upstream import UpstreamBackend
from slingshot.text.tokenizer import Tokenizer
from tests.serving.conftest import ScriptedBackend, ids_of, running
from tests.serving.fake_servers import fake_server
from tests.serving.test_killed import rows_of
from tests.serving.test_load import CHAT
from tests.waiting import until

AT_ONCE = 4  # answers that one of them makes; others wait there
TEXT = "3 plus 4 is 7, 7 minus 2 is 5. " * 2 + "\n</think>\n\n5"
PRICES = PriceList.parse({"models": {"*": {"cache_hit": 1, "cache_miss": 10, "output": 100}}})


class Busy(ScriptedBackend):
    async def generate(self, generation):
        self.seats = getattr(self, "seats", None) or asyncio.Semaphore(AT_ONCE)
        async with self.seats:
            async for delta in super().generate(generation):
                yield delta


@pytest.fixture
def start(tokenizer, tmp_path):
    """start(port=0): a server's process and its port."""
    tokenizer.save(tmp_path)
    with contextlib.ExitStack() as stack:

        def make(port=0):
            with listening("127.0.0.1", port) as listener:
                port = listener.getsockname()[1]
            command = [sys.executable, "-m", "tests.serving.test_lost_upstream", str(tmp_path), str(port)]
            process = stack.enter_context(subprocess.Popen(command))
            stack.callback(process.kill)
            return process, port

        yield make


def serve(folder, port):
    tokenizer = Tokenizer.load(folder)
    backend = Busy([*ids_of(tokenizer, TEXT), tokenizer.eos_id], eos_ids=tokenizer.eos_ids)
    backend.pause = 0.05
    app = fake_server(backend, tokenizer, "vllm")
    app.get("/asked")(lambda: len(backend.asked))
    import uvicorn

    uvicorn.run(app, port=port, log_level="error")


def asked(url):
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/asked").json()


async def crowd(http, size, seen, events):
    """Whether each of `size` streams came to its end; seen: tokens of each, events: its errors."""

    async def one(number):
        messages = [{"role": "user", "content": f"{number} and 4?"}]
        body = {"model": "tiny", "messages": messages, "stream": True, "logprobs": True}
        async with http.stream("POST", CHAT, json=body) as answer:
            name = answer.headers["X-Request-Id"]
            seen[name] = 0
            async for line in answer.aiter_lines():
                event = json.loads(line[6:]) if line.startswith("data: {") else {}
                if "error" in event:
                    events[name] = event["error"]["message"]
                for choice in event.get("choices", ()):
                    told = choice["logprobs"] or {"content": [], "reasoning_content": []}
                    seen[name] += len(told["content"] + told["reasoning_content"])

    await asyncio.gather(*(one(number) for number in range(size)))


@pytest.mark.slow
def test_of_a_server_that_is_killed_only_what_had_begun_is_lost_and_all_is_booked(
    start, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(upstream, "CHECK", 0.2)
    (first, port), (_, other) = start(), start()
    urls = [f"http://127.0.0.1:{its}" for its in (port, other)]
    until(lambda: all(asked(url) == 0 for url in urls))
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", PRICES)
    key = accounts.create(ledger, "alice", balance=100.0)
    model = ServedModel("tiny", tokenizer, UpstreamBackend([VllmServer(url) for url in urls], tokenizer))
    seen, errors = {}, {}
    length = len(ids_of(tokenizer, TEXT)) + 1
    with running(create_app(Gateway([model], ledger), keyless=False)) as url:
        headers = {"Authorization": f"Bearer {key}"}

        async def load():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits, headers=headers) as http:
                crowded = asyncio.create_task(crowd(http, 20, seen, errors))
                while sum(count > 3 for count in seen.values()) < 2 * AT_ONCE:
                    await asyncio.sleep(0.02)
                first.kill()
                await crowded

        asyncio.run(load())
        assert first.wait() < 0 and len(seen) == 20
        assert 0 < len(errors) <= AT_ONCE
        assert set(errors.values()) == {"the server that made this answer failed midway; ask again"}
        until(lambda: not accounts.keys(ledger)[0].running)
        rows = rows_of(ledger)
        assert rows.keys() == seen.keys()
        for name, row in rows.items():
            assert (row.completion < length) == (name in errors)
            assert row.completion - seen[name] <= 3  # what is not told yet, and what has no text
            assert row.cost == (row.prompt * 10 + row.completion * 100) * PICO // 10**6
        [alice] = accounts.keys(ledger)
        assert (alice.balance, alice.reserved) == (100 * PICO - sum(row.cost for row in rows.values()), 0)
        start(port)
        until(lambda: asked(urls[0]) == 0)

        def used_again():
            body = {"model": "tiny", "messages": [{"role": "user", "content": os.urandom(4).hex()}], "max_tokens": 1}
            assert httpx.post(f"{url}{CHAT}", json=body, headers=headers, timeout=60).status_code == 200
            return asked(urls[0])

        until(used_again)
    ledger.close()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
