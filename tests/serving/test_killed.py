"""`slingshot serve` as a process of its own, killed under load; test_memory.py asks such servers, too."""

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import threading
from datetime import UTC, datetime

import httpx
import pytest

from slingshot.checkpoint.load_save import save_checkpoint
from slingshot.serving import accounts
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.prices import PICO, PriceList
from tests.serving.test_load import BODY, CHAT
from tests.waiting import until

pytestmark = pytest.mark.slow

PRICES = "[models.'*']\ncache_hit = 1\ncache_miss = 10\noutput = 100\n"


@pytest.fixture(scope="module")
def checkpoint(tokenizer, make_model, dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("served") / "tiny"
    folder.mkdir()
    save_checkpoint(folder, make_model(dense(vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)), tokenizer)
    return folder


@pytest.fixture
def ledger(tmp_path):
    """The ledger of the servers of `serve`, seen from outside."""
    (tmp_path / "prices.toml").write_text(PRICES)
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", tmp_path / "prices.toml", gateway=False)
    yield ledger
    ledger.close()


@contextlib.contextmanager
def started(checkpoint, options, folder, environment=None):
    """A server's process and its URL, until the block ends."""
    command = [sys.executable, "-m", "slingshot", "serve", checkpoint, "--port", "0", *options]
    with (
        (folder / "errors.txt").open("a") as errors,
        subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ) as process,
    ):
        try:
            url = next(line.split()[1] for line in process.stdout if line.startswith("API"))
            yield process, url.removesuffix("/v1")
        finally:
            process.kill()


@pytest.fixture
def serve(checkpoint, ledger, tmp_path):
    """serve(): a server's process and its URL."""
    with contextlib.ExitStack() as stack:
        options = ["--ledger", tmp_path / "ledger.sqlite", "--prices", tmp_path / "prices.toml"]
        yield lambda: stack.enter_context(started(checkpoint, options, tmp_path))


async def crowd(url, key, size, draw, hang_up, longest, told):
    """`size` streams at once; hang_up: every which one does, at any event. told[id] is (usage, events seen) of each,
    without usage where it was cut."""

    async def one(http, number):
        question = [{"role": "user", "content": f"What is {number}+4-2?"}]
        more = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
        body = BODY | more | {"messages": question, "seed": number, "max_tokens": draw.randint(1, longest)}
        leaves = draw.randint(0, longest) if hang_up and number % hang_up == 0 else None
        with contextlib.suppress(httpx.HTTPError):
            async with http.stream("POST", CHAT, json=body) as answer:
                assert answer.status_code == 200
                seen, name = 0, answer.headers["X-Request-Id"]
                told[name] = None, 0
                async for line in answer.aiter_lines():
                    if seen == leaves:
                        return
                    if line.startswith("data: {"):
                        seen += 1
                        told[name] = json.loads(line[6:]).get("usage"), seen

    limits = httpx.Limits(max_connections=None)
    headers = {"Authorization": f"Bearer {key}"}
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, headers=headers) as http:
        await asyncio.gather(*(one(http, number) for number in range(size)))


def rows_of(ledger):
    with ledger.transaction() as connection:
        return {row.id: row for row in connection.execute(REQUESTS.select())}


def assert_consistent(ledger, start):
    """Nothing is open, and the one key paid for what is booked, no more and no less."""
    [key], rows = accounts.keys(ledger), rows_of(ledger).values()
    assert all(row.ended is not None for row in rows)
    assert (key.reserved, key.running) == (0, 0)
    assert key.balance == round(start * PICO) - sum(row.cost for row in rows)
    price = PriceList.parse({"models": {"*": {"cache_hit": 1, "cache_miss": 10, "output": 100}}}).of("tiny")
    for row in rows:
        assert row.cost == price.cost(row.prompt, row.cached, row.completion, datetime.fromtimestamp(row.began, UTC))


def test_a_server_that_is_killed_books_what_it_wrote_and_nothing_twice(serve, ledger):
    key = accounts.create(ledger, "alice", balance=100.0)
    process, url = serve()
    told, again = {}, {}
    asking = crowd(url, key, 200, random.Random(0), None, 450, told)  # seconds of work on a fast machine, too
    load = threading.Thread(target=asyncio.run, args=[asking], daemon=True)
    load.start()

    def half_way():
        under_way = sum(row.ended is None and row.completion > 0 for row in rows_of(ledger).values())
        return under_way >= 5 and any(usage for usage, _ in list(told.values()))

    until(half_way)
    process.kill()
    process.wait()
    load.join(30)
    assert not load.is_alive()
    before = rows_of(ledger)
    was_open = {name for name, row in before.items() if row.ended is None}
    assert len(was_open) >= 5 and accounts.keys(ledger)[0].running == len(was_open)
    _, url = serve()
    after = rows_of(ledger)
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before.keys() - was_open)
    assert all(after[name].completion == before[name].completion for name in was_open)
    assert_consistent(ledger, 100.0)
    whole = {name: usage for name, (usage, _) in told.items() if usage}
    assert whole and all(after[name].completion == usage["completion_tokens"] for name, usage in whole.items())
    asyncio.run(crowd(url, key, 1, random.Random(1), None, 20, again))
    [[usage, _]] = again.values()
    until(lambda: not accounts.keys(ledger)[0].running)
    assert rows_of(ledger)[next(iter(again))].completion == usage["completion_tokens"]
    assert_consistent(ledger, 100.0)
