"""Who may use how much, and what was used, each token exactly once.

    ledger = Ledger("sqlite:///ledger.sqlite", prices)       # or postgresql+psycopg://..., for several gateways
    reservation = ledger.reserve(account, "tiny", prompt_tokens=20, most=256, request_id="...")
    reservation.progress(cached=16, completion=7)            # in memory; `tick`, once a second, writes it
    reservation.settle(Usage(...))                           # what was generated; a second time changes nothing

The worst case is reserved by one conditional UPDATE, so that requests at the same moment cannot spend the same dollar.
What a gateway that was killed left open is settled by the progress it wrote last, by whoever ticks or starts next.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from slingshot.base.errors import SlingshotError
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger_tables import (
    CHARGE,
    CLOSE,
    GATEWAYS,
    KEYS,
    METADATA,
    OPEN,
    PROGRESS,
    REQUESTS,
    SEEN,
    TAKE,
)
from slingshot.serving.prices import PriceFile, PriceList, dollars

T = TypeVar("T")

_LOG = logging.getLogger(__name__)

DEAD = 15.0  # seconds without a sign of life after which a gateway is taken for dead
_GAP = 5.0  # seconds between two signs of one's own, above which the database was away, for the others too
_BUSY = 5.0  # seconds for which SQLite's lock is waited for
_FIRST = 0x736C696E67  # names the lock under which servers that start at once make the tables


@dataclass(frozen=True)
class Usage:
    """Tokens of a request. cached: of the prompt's, those that were not computed. reasoning: of the completion's."""

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    reasoning: int = 0


@dataclass(frozen=True)
class Account:
    """Whom a request is booked to. models: those it may use, None: all."""

    id: str
    name: str
    models: tuple[str, ...] | None = None

    def may_use(self, model: str) -> bool:
        return self.models is None or model in self.models


LOCAL = Account("local", "local")  # who uses the server on its own machine, without a key


@dataclass(eq=False)
class Reservation:
    """One request's share of its account, until it is settled. reserved: picodollars. due: what to settle it by, once
    it has ended. doubtful: nobody knows whether it was set aside."""

    ledger: Ledger
    id: str
    key_id: str
    model: str
    began: float
    reserved: int
    reserved_tokens: int
    cached: int = 0
    completion: int = 0
    due: Usage | None = None
    doubtful: bool = False
    settled: bool = False
    cost: int = 0  # picodollars, once it is settled
    lock: threading.Lock = field(default_factory=threading.Lock)

    def progress(self, cached: int, completion: int) -> None:
        """What was generated so far: all that is booked should this process be killed."""
        self.cached, self.completion = cached, completion

    def settle(self, usage: Usage) -> None:
        """Book what was used and give the rest back; where the database does not answer, a later `tick` does."""
        with self.lock:
            if self.settled:
                return
            self.due = usage
            try:
                self.cost = self.ledger.settle(self, usage)
                self.settled = True
            except ApiError as error:
                _LOG.error("request %s is booked later: %s", self.id, error)


class Ledger:
    """The database. prices: a list, or its file, which `tick` reads again when it has changed. clock: seconds since
    1970. gateway: whether this process serves requests, and not only looks after keys."""

    def __init__(
        self,
        url: str,
        prices: PriceList | Path | None = None,
        clock: Callable[[], float] = time.time,
        gateway: bool = True,
    ) -> None:
        self._price_file = PriceFile(prices) if isinstance(prices, Path) else None
        self.prices = PriceList.load(prices) if isinstance(prices, Path) else prices or PriceList()
        self._clock = clock
        self.id = secrets.token_hex(8)
        self._open: dict[str, Reservation] = {}
        self._failed = 0.0  # when the database did not answer, last (time.monotonic)
        self._ticked, self._steady = clock(), 0.0  # since when no sign of life was late
        self._work = threading.local()  # asked: when what a clerk does was asked of it
        try:
            place = sa.make_url(url)
            if patient := place.get_dialect().driver == "psycopg":
                from slingshot.serving.postgres import PATIENCE, connect

                place = place.update_query_dict({key: its for key, its in PATIENCE.items() if key not in place.query})
            self._engine = sa.create_engine(place, pool_pre_ping=patient)  # a file does not go away
            if patient:
                sa.event.listen(self._engine, "do_connect", connect)
            if self._engine.dialect.name == "sqlite":
                sa.event.listen(self._engine, "connect", _sqlite_settings)
                sa.event.listen(self._engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
            # SQLite takes one writer at a time and lets the others starve: here they queue.
            self._clerks = ThreadPoolExecutor(1 if self._engine.dialect.name == "sqlite" else 8, "ledger")
            with self._engine.begin() as connection:
                if self._engine.dialect.name == "postgresql":
                    connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_FIRST)))
                METADATA.create_all(connection)
                self._add_local(connection)
                row = {"id": self.id, "host": socket.gethostname(), "pid": os.getpid()}
                row |= dict.fromkeys(("began", "seen"), self._clock())
                if gateway:
                    connection.execute(sa.insert(GATEWAYS).values(row))
            self.settle_dead()
        except (SQLAlchemyError, ApiError, ImportError) as error:
            reason = str(getattr(error, "orig", error)).splitlines()[0]
            raise SlingshotError(f"the ledger {url.split('@')[-1]} cannot be opened: {reason}") from error

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """ApiError 503 where the database does not answer, or did not while this was waiting for its turn."""
        silent = ApiError(503, "the ledger does not answer; try again later", code="unavailable", retry_after=5)
        if getattr(self._work, "asked", self._failed) < self._failed:
            raise silent
        try:
            with self._engine.begin() as connection:
                yield connection
        except IntegrityError:
            raise
        except DBAPIError as error:
            self._failed = time.monotonic()
            raise silent from error

    async def aside(self, work: Callable[..., T], *args: Any) -> T:
        """Do what concerns the database without holding up the event loop, first come first served."""
        asked = time.monotonic()

        def do() -> T:
            self._work.asked = asked
            return work(*args)

        return await asyncio.get_running_loop().run_in_executor(self._clerks, do)

    def reserve(self, account: Account, model: str, prompt_tokens: int, most: int, request_id: str) -> Reservation:
        """Set the worst case aside. ApiError 402 without the balance for it, 429 beyond a limit, 503 where the database
        does not answer."""
        now = datetime.fromtimestamp(self._clock(), UTC)
        worst = self.prices.of(model).cost(prompt_tokens, 0, most, now)
        tokens, minute = prompt_tokens + most, int(now.timestamp()) // 60
        its = Reservation(self, request_id, account.id, model, now.timestamp(), worst, tokens)
        row = {
            "id": request_id, "key_id": account.id, "model": model, "began": its.began, "gateway": self.id,
            "reserved": worst, "reserved_tokens": tokens, "prompt": prompt_tokens,
        }  # fmt: skip
        try:
            with self.transaction() as connection:
                share = {"of": account.id, "worst": worst, "tokens": tokens, "this_minute": minute}
                admitted = connection.execute(TAKE, share).rowcount == 1
                if admitted:
                    connection.execute(OPEN, row)
        except ApiError:  # lost within the commit it may stand there all the same: a tick gives it back
            its.due, its.doubtful = Usage(), True
            self._open[request_id] = its
            raise
        if not admitted:
            raise self._refusal(account, worst, tokens)
        self._open[request_id] = its
        return its

    def balance(self, account: Account) -> int | None:
        """Picodollars that it may still reserve; None without limit."""
        with self.transaction() as connection:
            row = connection.execute(sa.select(KEYS).where(KEYS.c.id == account.id)).one()
        return None if row.balance is None else int(row.balance - row.reserved)

    def settle(self, reservation: Reservation, usage: Usage) -> int:
        """-> what it cost, picodollars."""
        its: Any = reservation
        with self.transaction() as connection:
            if reservation.doubtful:  # a commit which may still come has locked the account; what it left counts
                connection.execute(sa.select(KEYS.c.id).where(KEYS.c.id == its.key_id).with_for_update())
                its = connection.execute(sa.select(REQUESTS).where(REQUESTS.c.id == its.id)).one_or_none()
            cost = 0 if its is None else self._settle(connection, its, usage)
        self._open.pop(reservation.id, None)
        return cost

    def tick(self) -> None:
        """A sign of life, the progress of what is open, what could not be settled when it ended, and prices that have
        changed. Call it about once a second."""
        if self._price_file is not None and (prices := self._price_file.changed()):
            self.prices = prices
        rows = [
            {"of": its.id, "new_cached": its.cached, "new_completion": its.completion}
            for its in list(self._open.values())
            if its.completion
        ]
        with self.transaction() as connection:
            connection.execute(SEEN, {"of": self.id, "now": self._clock()})
            if rows:
                connection.execute(PROGRESS, rows)
        now = self._clock()
        self._steady, self._ticked = self._steady if 0 <= now - self._ticked < _GAP else now, now
        for its in list(self._open.values()):
            if its.due is not None:
                its.settle(its.due)

    def settle_dead(self) -> int:
        """Settle what gateways that are no more left open; -> how many requests. Where the database was away lately,
        nobody could show a sign of life."""
        if self._clock() - self._steady < DEAD:
            return 0
        with self.transaction() as connection:
            gateways = connection.execute(sa.select(GATEWAYS).where(GATEWAYS.c.ended.is_(None))).all()
            dead = [row.id for row in gateways if row.id != self.id and not _lives(row, self._clock())]
            open_there = REQUESTS.c.ended.is_(None) & REQUESTS.c.gateway.in_(dead)
            rows = connection.execute(sa.select(REQUESTS).where(open_there)).all() if dead else []
            for row in rows:
                begun = row.completion > 0  # what was lost before its first token costs nothing
                used = Usage(row.prompt, row.cached, row.completion, row.reasoning) if begun else Usage()
                self._settle(connection, row, used)
            ended = sa.update(GATEWAYS).where(GATEWAYS.c.id.in_(dead)).values(ended=GATEWAYS.c.seen)
            connection.execute(ended)
        return len(rows)

    def close(self) -> None:
        """What is still open is settled by whoever ticks or starts next."""
        with suppress(ApiError), self.transaction() as connection:
            if not self._open:
                connection.execute(sa.update(GATEWAYS).where(GATEWAYS.c.id == self.id).values(ended=self._clock()))
        self._engine.dispose()
        self._clerks.shutdown(wait=False)

    def _settle(self, connection: sa.Connection, its: Any, usage: Usage) -> int:
        """Close the request (a Reservation, or its row), if nobody did yet, and charge its account; -> its cost."""
        price, began = self.prices.of(its.model), datetime.fromtimestamp(its.began, UTC)
        cost = min(its.reserved, price.cost(usage.prompt, usage.cached, usage.completion, began))
        closed = {"of": its.id, "now": self._clock(), "new_cost": cost, "new_prompt": usage.prompt}
        closed |= {"new_cached": usage.cached, "new_completion": usage.completion, "new_reasoning": usage.reasoning}
        if connection.execute(CLOSE, closed).rowcount != 1:  # it is booked, or was never set aside
            return int(connection.execute(sa.select(REQUESTS.c.cost).where(REQUESTS.c.id == its.id)).scalar() or 0)
        unused, minute = its.reserved_tokens - usage.prompt - usage.completion, int(its.began) // 60
        share = {"of": its.key_id, "spent": cost, "worst": its.reserved, "unused": unused, "its_minute": minute}
        connection.execute(CHARGE, share)
        return cost

    def _refusal(self, account: Account, worst: int, tokens: int) -> ApiError:
        with self.transaction() as connection:
            row = connection.execute(sa.select(KEYS).where(KEYS.c.id == account.id)).one_or_none()
        if row is None or row.revoked is not None:
            return ApiError(401, "this key was revoked", code="invalid_api_key")
        if row.balance is not None and row.balance - row.reserved < worst:
            left = f"{dollars(row.balance)}, of which {dollars(row.reserved)} are set aside for running requests"
            needed = f"this request could cost {dollars(worst)}"
            return ApiError(402, f"insufficient balance: the key has {left}; {needed}", code="insufficient_balance")
        if row.concurrency is not None and row.running >= row.concurrency:
            message = f"the key's {row.concurrency} concurrent requests are running; wait for one to end"
            return ApiError(429, message, code="rate_limit_exceeded", retry_after=1)
        if row.tokens_per_minute is not None and tokens > row.tokens_per_minute:
            message = f"a request of up to {tokens} tokens is more than the key's {row.tokens_per_minute} a minute"
            return ApiError(429, f"{message}; lower max_tokens", code="rate_limit_exceeded")
        message = f"the key's {row.tokens_per_minute} tokens a minute are used up"
        return ApiError(429, message, code="rate_limit_exceeded", retry_after=60 - int(self._clock()) % 60)

    def _add_local(self, connection: sa.Connection) -> None:
        if connection.execute(sa.select(KEYS.c.id).where(KEYS.c.id == LOCAL.id)).first() is None:
            row = {"id": LOCAL.id, "name": LOCAL.name, "hash": "", "hint": "", "created": self._clock()}
            connection.execute(sa.insert(KEYS).values(row))


def _lives(gateway: Any, now: float) -> bool:
    """Whether it showed a sign of life lately and, on this machine, its process is there."""
    if now - gateway.seen > DEAD:
        return False
    if gateway.host != socket.gethostname():
        return True
    try:
        os.kill(gateway.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _sqlite_settings(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # transactions begin where SQLAlchemy says so
    for setting in ("synchronous=NORMAL", f"busy_timeout={1000 * _BUSY:.0f}", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {setting}")
    patience = time.monotonic() + _BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError:  # of a file that others open for the first time too: SQLite itself waits not
            if time.monotonic() > patience:
                raise
            time.sleep(0.01)
