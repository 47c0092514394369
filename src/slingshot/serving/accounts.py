"""Keys: made, listed, taken back, topped up, and recognised.

    secret = create(ledger, "alice", balance=5.0, concurrency=4)       # "sk-slingshot-...", shown once
    account = authenticate(ledger, secret, keyless=False)

The database has only a key's SHA-256: it is random, so nobody guesses it from that.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import re
import secrets
import time
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from slingshot.base.errors import SlingshotError
from slingshot.base.names import did_you_mean
from slingshot.serving.errors import ApiError
from slingshot.serving.ledger import LOCAL, Account, Ledger
from slingshot.serving.ledger_tables import KEYS
from slingshot.serving.prices import PICO

PREFIX = "sk-slingshot-"
_NAME = re.compile(r"[\w.@-]{1,64}")
_MOST = 1e6  # dollars at once: nine of them fit into 64 bits of picodollars


def create(
    ledger: Ledger,
    name: str,
    balance: float | None = None,
    concurrency: int | None = None,
    tokens_per_minute: int | None = None,
    models: Sequence[str] = (),
    days: float | None = None,
) -> str:
    """Make a key and return it. balance: dollars, None without limit, as the others; days: until it expires."""
    if not _NAME.fullmatch(name):
        raise SlingshotError(f"{name!r} is no name for a key; take letters, digits, . @ _ - (at most 64)")
    for what, limit in (("concurrency", concurrency), ("tokens_per_minute", tokens_per_minute)):
        if limit is not None and not 0 < limit < 2**31:
            raise SlingshotError(f"{what} {limit} limits nothing; take 1 or more, below 2**31, or leave it out")
    if balance is not None and balance < 0:
        raise SlingshotError(f"a balance of {balance:g} dollars pays for nothing; take 0 or more, or leave it out")
    if days is not None and not math.isfinite(days):
        raise SlingshotError(f"{days} days have no end; leave them out for a key that does not expire")
    secret, now = PREFIX + secrets.token_urlsafe(32), time.time()
    row = {
        "id": secrets.token_hex(8), "name": name, "hash": _hash(secret), "hint": secret[-4:], "created": now,
        "expires": None if days is None else now + days * 86_400, "models": list(models) or None,
        "concurrency": concurrency, "tokens_per_minute": tokens_per_minute,
        "balance": None if balance is None else _picodollars(balance),
    }  # fmt: skip
    try:
        with ledger.transaction() as connection:
            connection.execute(sa.insert(KEYS).values(row))
    except IntegrityError as error:
        raise SlingshotError(f"there is a key {name!r} already, or was one; take another name") from error
    return secret


def keys(ledger: Ledger) -> Sequence[Any]:
    """Rows of all keys, the oldest first."""
    with ledger.transaction() as connection:
        return connection.execute(sa.select(KEYS).where(KEYS.c.id != LOCAL.id).order_by(KEYS.c.created)).all()


def revoke(ledger: Ledger, name: str) -> None:
    """From now on the key opens nothing; what is running ends as it would."""
    _change(ledger, name, revoked=time.time())


def top_up(ledger: Ledger, name: str, amount: float) -> None:
    """Add dollars to a balance (or take some away); a key without limit gets one."""
    _change(ledger, name, balance=sa.func.coalesce(KEYS.c.balance, 0) + _picodollars(amount))


def is_ours(secret: str | None) -> bool:
    """Whether this looks like a key of a server like this one."""
    return secret is not None and secret.startswith(PREFIX)


def authenticate(ledger: Ledger, secret: str | None, keyless: bool) -> Account:
    """Whose key this is; ApiError 401 for none. keyless: whoever comes without one of ours uses the local account."""
    if secret is None or not is_ours(secret):
        if keyless:
            return LOCAL
        missing = "no API key was given" if not secret else "this is no key of this server"
        raise ApiError(401, f"{missing}; send it as `Authorization: Bearer KEY`", code="invalid_api_key")
    digest = _hash(secret)
    with ledger.transaction() as connection:
        row = connection.execute(sa.select(KEYS).where(KEYS.c.hash == digest)).one_or_none()
    if row is None or not hmac.compare_digest(row.hash, digest):
        raise ApiError(401, "this key is unknown", code="invalid_api_key")
    if row.revoked is not None or (row.expires is not None and row.expires < time.time()):
        what = "was revoked" if row.revoked is not None else "has expired"
        raise ApiError(401, f"this key {what}; ask for a new one", code="invalid_api_key")
    return Account(row.id, row.name, None if row.models is None else tuple(row.models))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _picodollars(amount: float) -> int:
    if not abs(amount) <= _MOST:
        raise SlingshotError(f"{amount:g} dollars are no amount; take at most {_MOST:,.0f} at once")
    return round(amount * PICO)


def _change(ledger: Ledger, name: str, **values: Any) -> None:
    with ledger.transaction() as connection:
        changed = connection.execute(
            sa.update(KEYS).where(KEYS.c.name == name, KEYS.c.id != LOCAL.id, KEYS.c.revoked.is_(None)).values(values)
        )
    if changed.rowcount != 1:
        known = [row.name for row in keys(ledger) if row.revoked is None]
        raise SlingshotError(f"there is no key {name!r}; {did_you_mean(name, known)}")
