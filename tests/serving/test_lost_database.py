"""PostgreSQL killed or frozen under a running server, and brought back: streams end, limits hold, and every token is
booked."""

import asyncio
import contextlib
import random
import socket
import sqlite3
import threading
import time

import httpx
import pytest
import sqlalchemy as sa

from slingshot.base.errors import SlingshotError
from slingshot.serving import accounts
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import LOCAL, Ledger
from slingshot.serving.ledger_tables import KEYS, REQUESTS
from slingshot.serving.prices import PICO
from tests.serving.test_killed import PRICES, assert_consistent, checkpoint, crowd, rows_of, started  # noqa: F401
from tests.serving.test_load import BODY, CHAT
from tests.waiting import until

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("lose", "restore"), [("kill", "start"), ("freeze", "thaw")])
def test_a_database_that_is_lost_under_load_costs_nothing(database, checkpoint, tmp_path, lose, restore):  # noqa: F811
    (tmp_path / "prices.toml").write_text(PRICES)
    ledger = Ledger(database.url, tmp_path / "prices.toml", gateway=False)
    key, told, again = accounts.create(ledger, lose, balance=100.0, concurrency=60), {}, {}
    headers = {"Authorization": f"Bearer {key}"}
    options = ["--require-key", "--ledger", database.url, "--prices", tmp_path / "prices.toml"]
    with started(checkpoint, options, tmp_path) as (process, url), httpx.Client(base_url=url, headers=headers) as http:
        asking = crowd(url, key, 60, random.Random(0), None, 800, told)
        load = threading.Thread(target=asyncio.run, args=[asking], daemon=True)
        load.start()
        until(lambda: len(told) == 60 and any(row.completion for row in rows_of(ledger).values()))
        whole_before = sum(usage is not None for usage, _ in list(told.values()))
        getattr(database, lose)()
        refused = set()
        for _ in range(5):
            answer = http.post(CHAT, json=BODY, timeout=60)
            refused.add((answer.status_code, answer.json()["error"]["message"]))
            time.sleep(0.2)
        assert refused == {(503, "the ledger does not answer; try again later")}
        load.join(120)  # while the database is gone
        assert not load.is_alive() and process.poll() is None
        assert len(told) == 60 and all(usage is not None for usage, _ in told.values()) and whole_before < 60
        assert http.get("/health").json() == {"status": "ok"}
        getattr(database, restore)()
        until(lambda: not accounts.keys(ledger)[0].running)
        asyncio.run(crowd(url, key, 3, random.Random(1), None, 20, again))
        until(lambda: not accounts.keys(ledger)[0].running)
        rows = rows_of(ledger)
        assert rows.keys() == told.keys() | again.keys()
        for name, (usage, _) in (told | again).items():
            assert (rows[name].prompt, rows[name].completion) == (usage["prompt_tokens"], usage["completion_tokens"])
        assert_consistent(ledger, 100.0)
    ledger.close()


def test_what_was_set_aside_though_its_commit_came_late_is_given_back(database):
    """The one who asked knows nothing of it, and neither does the database, until that commit."""
    ledger = Ledger(f"{database.url}&options=-c statement_timeout=500")
    alice = accounts.authenticate(ledger, accounts.create(ledger, "late", balance=100.0), False)
    other = sa.create_engine(database.url)
    with other.begin() as connection:
        mine = sa.update(KEYS).where(KEYS.c.id == alice.id)
        connection.execute(mine.values(reserved=KEYS.c.reserved + 7, running=KEYS.c.running + 1))
        row = {"id": "a", "key_id": alice.id, "model": "tiny", "began": time.time(), "gateway": ledger.id}
        connection.execute(sa.insert(REQUESTS).values(row | {"reserved": 7, "reserved_tokens": 20, "prompt": 10}))
        with pytest.raises(ApiError, match="does not answer"):
            ledger.reserve(alice, "tiny", 10, 10, "a")
        ledger.tick()
    assert {key.name: key.running for key in accounts.keys(ledger)}["late"] == 1
    ledger.tick()
    [key] = [key for key in accounts.keys(ledger) if key.name == "late"]
    assert (key.balance, key.reserved, key.running) == (100 * PICO, 0, 0)
    other.dispose()
    ledger.close()


def test_a_database_that_never_answers_is_an_error_and_no_wait():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(SlingshotError, match="cannot be opened"):
        Ledger(f"postgresql+psycopg://slingshot@127.0.0.1:{silent.getsockname()[1]}/postgres?connect_timeout=2")


def test_who_waits_for_a_database_that_does_not_answer_is_refused_with_the_first(tmp_path):
    ledger, tried = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite"), []

    def trying(connection):
        tried.append(connection)

    async def ask():
        asked = (ledger.aside(ledger.balance, LOCAL) for _ in range(10))
        return await asyncio.gather(*asked, return_exceptions=True)

    with contextlib.closing(sqlite3.connect(tmp_path / "ledger.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        sa.event.listen(sa.Engine, "engine_connect", trying)
        refused = asyncio.run(ask())
        sa.event.remove(sa.Engine, "engine_connect", trying)
    assert [error.status for error in refused] == [503] * 10 and len(tried) == 1
    assert ledger.balance(LOCAL) is None
    ledger.close()
