import time
from datetime import datetime

import pytest
import sqlalchemy as sa

from slingshot.base.errors import SlingshotError
from slingshot.serving import accounts
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import LOCAL, Ledger, Usage
from slingshot.serving.prices import PICO, PriceList
from tests.serving.conftest import at_once
from tests.serving.postgres import PostgresServer, find

PRICES = PriceList.parse({"models": {"tiny": {"cache_hit": 1, "cache_miss": 10, "output": 100}}})  # dollars a million


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def url(request, tmp_path):
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/ledger.sqlite"
    return request.getfixturevalue("database").url


@pytest.fixture
def ledger(url):
    ledger = Ledger(url, PRICES, clock=lambda: 1e9)
    yield ledger
    ledger.close()


def account(ledger, **limits):
    return accounts.authenticate(ledger, accounts.create(ledger, "alice", **limits), keyless=False)


def row(ledger):
    return next(row for row in accounts.keys(ledger) if row.name == "alice")


def test_a_request_costs_its_tokens_once_and_cached_ones_at_their_own_price(ledger):
    alice = account(ledger, balance=1.0)
    reservation = ledger.reserve(alice, "tiny", prompt_tokens=1000, most=100, request_id="a")
    assert row(ledger).reserved == (1000 * 10 + 100 * 100) * PICO // 10**6
    for _ in range(2):
        reservation.settle(Usage(prompt=1000, cached=800, completion=50, reasoning=20))
    assert row(ledger).balance == PICO - (800 * 1 + 200 * 10 + 50 * 100) * PICO // 10**6
    assert (row(ledger).reserved, row(ledger).running) == (0, 0)


def test_of_many_at_once_only_as_many_pass_as_the_balance_pays_for(ledger):
    alice = account(ledger, balance=0.011)  # one request of 100 + 100 tokens

    def ask(number):
        try:
            ledger.reserve(alice, "tiny", 100, 100, f"r{number}")
        except ApiError as error:
            return error.status
        return 200

    assert sorted(at_once(8, ask)) == [200] + [402] * 7


@pytest.mark.parametrize("limits, status", [({"concurrency": 1}, 429), ({"tokens_per_minute": 250}, 429)])
def test_a_limit_refuses_until_there_is_room_again(ledger, limits, status):
    alice = account(ledger, **limits)
    first = ledger.reserve(alice, "tiny", 100, 100, "a")
    with pytest.raises(ApiError) as caught:
        ledger.reserve(alice, "tiny", 100, 100, "b")
    assert caught.value.status == status and caught.value.retry_after >= 1
    first.settle(Usage(100, 0, 1, 0))  # 101 of the minute's 250 tokens
    ledger.reserve(alice, "tiny", 49, 100, "c")


@pytest.mark.parametrize("begun", [True, False])
def test_what_a_dead_gateway_left_open_is_settled_by_the_progress_it_wrote(url, begun):
    """What had not begun costs nothing."""
    dead = Ledger(url, PRICES)
    alice = account(dead, balance=1.0)
    lost = dead.reserve(alice, "tiny", 100, 100, "a")
    if begun:
        lost.progress(cached=60, completion=7)
    dead.tick()
    with dead.transaction() as connection:
        connection.exec_driver_sql("UPDATE gateways SET pid = 2147483632")  # no such process
    other = Ledger(url, PRICES)
    left = PICO - begun * (60 * 1 + 40 * 10 + 7 * 100) * PICO // 10**6
    assert row(other).balance == left
    assert (row(other).reserved, row(other).running) == (0, 0)
    lost.settle(Usage(100, 60, 90, 0))  # should it come back: booked already
    assert row(other).balance == left


@pytest.mark.parametrize("arrived", [True, False])
def test_what_was_set_aside_though_the_connection_broke_is_given_back(url, arrived):
    """Whether a commit whose answer is lost has arrived, nobody knows."""
    ledger, broken = Ledger(url, PRICES), False

    def lose(connection):
        nonlocal broken
        if broken:
            broken = False
            if arrived:
                connection.connection.driver_connection.execute("COMMIT")
            raise sa.exc.OperationalError("COMMIT", None, ConnectionError("the server is gone"))

    sa.event.listen(sa.Engine, "commit", lose)
    try:
        alice = account(ledger, balance=1.0)
        broken = True
        with pytest.raises(ApiError) as caught:
            ledger.reserve(alice, "tiny", 100, 100, "a")
        assert caught.value.status == 503 and row(ledger).running == arrived
        ledger.tick()
        assert (row(ledger).balance, row(ledger).reserved, row(ledger).running) == (PICO, 0, 0)
    finally:
        sa.event.remove(sa.Engine, "commit", lose)
    ledger.close()


def test_a_database_that_was_away_makes_no_gateway_dead(url):
    now = [1e9]
    one, other = (Ledger(url, PRICES, clock=lambda: now[0]) for _ in range(2))
    one.reserve(account(one, balance=1.0), "tiny", 100, 100, "a").progress(cached=0, completion=7)
    one.tick()
    now[0] += 60  # in which neither of them reached it
    other.tick()
    assert other.settle_dead() == 0 and row(other).running == 1
    for _ in range(15):  # the one does not come back
        now[0] += 1
        other.tick()
    assert other.settle_dead() == 1 and row(other).running == 0
    one.close()
    other.close()


def test_a_gateway_that_was_taken_for_dead_by_a_clock_that_jumped_is_looked_after_again(url):
    now = [1e9]
    one, other = (Ledger(url, PRICES, clock=lambda: now[0]) for _ in range(2))
    alice = account(one, balance=1.0)
    now[0] += 3600
    assert other.settle_dead() == 0  # nothing was open
    one.tick()
    one.reserve(alice, "tiny", 100, 100, "a").progress(cached=0, completion=7)
    one.tick()
    one.close()  # with an answer still open
    now[0] += 3600
    assert other.settle_dead() == 1
    assert row(other).balance == PICO - (100 * 10 + 7 * 100) * PICO // 10**6 and not row(other).running


def test_servers_that_start_at_once_make_one_ledger(url):
    at_once(6, lambda _: Ledger(url).close())


def test_what_a_living_gateway_has_open_stays_open(url):
    one = Ledger(url, PRICES)
    one.reserve(LOCAL, "tiny", 100, 100, "a")
    assert Ledger(url, PRICES).settle_dead() == 0


def test_keys_are_known_by_what_they_hash_to(ledger):
    secret = accounts.create(ledger, "alice", models=["tiny"], days=1)
    known = accounts.authenticate(ledger, secret, keyless=False)
    assert known.may_use("tiny") and not known.may_use("big")
    assert secret not in str(accounts.keys(ledger))
    accounts.revoke(ledger, "alice")
    for wrong in (secret, secret[:-1], None, "none"):
        with pytest.raises(ApiError) as caught:
            accounts.authenticate(ledger, wrong, keyless=False)
        assert caught.value.status == 401
    assert accounts.authenticate(ledger, "none", keyless=True) is LOCAL


def test_an_expired_key_opens_nothing(ledger):
    secret = accounts.create(ledger, "alice", days=-1)
    with pytest.raises(ApiError, match="expired"):
        accounts.authenticate(ledger, secret, keyless=True)


def test_a_balance_is_topped_up(ledger):
    accounts.create(ledger, "alice", balance=1)
    accounts.top_up(ledger, "alice", 2.5)
    assert row(ledger).balance == 3.5 * PICO
    with pytest.raises(SlingshotError, match="no key 'alise'; did you mean alice"):
        accounts.top_up(ledger, "alise", 1)


@pytest.mark.parametrize("amount", [1e8, float("nan"), float("inf"), -1e8])
def test_an_amount_that_no_balance_holds_is_refused(ledger, amount):
    accounts.create(ledger, "alice", balance=1)
    for work in (
        lambda: accounts.create(ledger, "bob", balance=amount),
        lambda: accounts.top_up(ledger, "alice", amount),
    ):
        with pytest.raises(SlingshotError, match="dollars"):
            work()
    assert [key.name for key in accounts.keys(ledger)] == ["alice"] and row(ledger).balance == PICO


@pytest.mark.parametrize("limits", [{"days": float("nan")}, {"concurrency": 0}, {"tokens_per_minute": 2**70}])
def test_a_limit_that_is_none_is_refused(ledger, limits):
    with pytest.raises(SlingshotError, match="leave"):
        accounts.create(ledger, "alice", **limits)


def test_the_account_of_those_without_a_key_is_not_taken_back(ledger):
    with pytest.raises(SlingshotError, match="no key 'local'"):
        accounts.revoke(ledger, "local")
    ledger.reserve(LOCAL, "tiny", 1, 1, "a")


def test_minutes_are_told_apart_whichever_way_the_clock_goes(url):
    now = [1e9]
    ledger = Ledger(url, PRICES, clock=lambda: now[0])
    alice = account(ledger, tokens_per_minute=200)
    for place, step in enumerate((0, 60, -3600)):  # a clock that is set back begins a minute, and no more
        now[0] += step
        ledger.reserve(alice, "tiny", 100, 100, f"r{place}")
        with pytest.raises(ApiError):
            ledger.reserve(alice, "tiny", 1, 1, "none")
    ledger.close()


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"output": 1e5}, "output"),
        ({"output": -1}, "output"),
        ({"output": float("nan")}, "no number"),
        ({"off_peak": {"start": "16:30Z", "end": "00:30", "factor": 0.5}}, "leave the zone out"),
        ({"off_peak": {"start": "16:30", "end": "24:30", "factor": 0.5}}, "end"),
    ],
)
def test_a_price_that_cannot_be_reckoned_with_is_refused(wrong, said):
    with pytest.raises(SlingshotError, match=said):
        PriceList.parse({"models": {"*": wrong}})


@pytest.mark.parametrize(
    "start, end, cheap, dear",
    [
        ("16:30", "00:30", "00:00 00:29 16:30 23:59", "00:30 12:00 16:29"),
        ("01:00", "04:00", "01:00 03:59", "00:59 04:00 23:59"),
        ("01:00", "01:00", "", "00:59 01:00 23:59"),
    ],
)
def test_an_off_peak_window_has_its_first_minute_and_not_its_last(start, end, cheap, dear):
    its = {"start": start, "end": end, "factor": 0.5}
    price = PriceList.parse({"models": {"*": {"output": 2.0, "off_peak": its}}}).of("any")
    for times, cost in ((cheap, PICO), (dear, 2 * PICO)):
        for its in times.split():
            assert price.cost(0, 0, 10**6, datetime.fromisoformat(f"2026-01-01T{its}:00+00:00")) == cost


def test_a_ledger_that_cannot_be_opened_says_so(tmp_path):
    with pytest.raises(SlingshotError, match="cannot be opened"):
        Ledger(f"sqlite:///{tmp_path}/none/ledger.sqlite")


def test_prices_that_change_are_taken_over_and_broken_ones_are_not(tmp_path, caplog):
    path = tmp_path / "prices.toml"
    path.write_text("[models.tiny]\noutput = 1.0\n")
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.sqlite", path)
    seen = []
    for text in ("[models.tiny]\noutput = 20.5\n", "[models.tiny]\noutput = -1\n", "[models.tiny]\noutput = 3.25\n"):
        path.write_text(text)
        ledger.tick()
        seen.append(ledger.prices.of("tiny").output)
    assert seen == [20.5, 20.5, 3.25] and "prices before go on" in caplog.text


@pytest.mark.slow
def test_a_database_that_is_gone_refuses_and_one_that_is_back_serves():
    if (programs := find()) is None:
        pytest.skip("PostgreSQL is not installed")
    server = PostgresServer(programs)
    ledger = Ledger(server.url, PRICES)
    alice = account(ledger, balance=1.0)
    reservation = ledger.reserve(alice, "tiny", 100, 100, "a")
    server.kill()
    time.sleep(1)  # its children see that it is gone
    secret = accounts.PREFIX + "x"
    for work in (lambda: ledger.reserve(alice, "tiny", 1, 1, "b"), lambda: accounts.authenticate(ledger, secret, True)):
        with pytest.raises(ApiError) as caught:
            work()
        assert caught.value.status == 503
    reservation.settle(Usage(100, 0, 7, 0))  # the answer is told all the same
    server.start()
    assert row(ledger).running == 1
    ledger.tick()
    ledger.tick()
    assert row(ledger).balance == PICO - (100 * 10 + 7 * 100) * PICO // 10**6
    assert (row(ledger).reserved, row(ledger).running) == (0, 0)
    ledger.close()
    server.stop()
