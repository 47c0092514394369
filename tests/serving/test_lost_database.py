"""PostgreSQL killed under a running server, and brought back: streams end, limits hold, and every token is booked."""

import asyncio
import random
import threading
import time

import httpx
import pytest

from slingshot.serving import accounts
from slingshot.serving.ledger import Ledger
from tests.serving.test_killed import PRICES, assert_consistent, checkpoint, crowd, rows_of, started  # noqa: F401
from tests.serving.test_load import BODY, CHAT, until

pytestmark = pytest.mark.slow


def test_a_database_that_is_killed_under_load_costs_no_stream_and_no_token(postgres, checkpoint, tmp_path):  # noqa: F811
    (tmp_path / "prices.toml").write_text(PRICES)
    ledger = Ledger(postgres.url, tmp_path / "prices.toml", gateway=False)
    key, told, again = accounts.create(ledger, "alice", balance=100.0, concurrency=60), {}, {}
    headers = {"Authorization": f"Bearer {key}"}
    options = ["--require-key", "--ledger", postgres.url, "--prices", tmp_path / "prices.toml"]
    with started(checkpoint, options, tmp_path) as (process, url), httpx.Client(base_url=url, headers=headers) as http:
        asking = crowd(url, key, 60, random.Random(0), None, 450, told)
        load = threading.Thread(target=asyncio.run, args=[asking], daemon=True)
        load.start()
        until(lambda: len(told) == 60 and any(row.completion for row in rows_of(ledger).values()), 60)
        whole_before = sum(usage is not None for usage, _ in list(told.values()))
        postgres.kill()
        refused = []
        for _ in range(5):
            began = time.monotonic()
            answer = http.post(CHAT, json=BODY, timeout=30)
            refused.append((answer.status_code, answer.json()["error"]["message"], time.monotonic() - began < 10))
            time.sleep(0.2)
        assert set(refused) == {(503, "the ledger does not answer; try again later", True)}
        load.join(120)  # while the database is gone
        assert not load.is_alive() and process.poll() is None
        assert len(told) == 60 and all(usage is not None for usage, _ in told.values()) and whole_before < 60
        assert http.get("/health").json() == {"status": "ok"}
        postgres.start()
        until(lambda: not accounts.keys(ledger)[0].running, 30)
        asyncio.run(crowd(url, key, 3, random.Random(1), None, 20, again))
        until(lambda: not accounts.keys(ledger)[0].running)
        rows = rows_of(ledger)
        assert rows.keys() == told.keys() | again.keys()
        for name, (usage, _) in (told | again).items():
            assert (rows[name].prompt, rows[name].completion) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert_consistent(ledger, 100.0)
    ledger.close()
