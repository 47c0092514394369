"""The ledger's tables, and what is said to them for every request: statements that are made once.

    connection.execute(TAKE, {"of": key_id, "worst": picodollars, "tokens": tokens, "this_minute": minute})

KEYS has the accounts, REQUESTS what each of them asked, GATEWAYS the processes that serve.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy import bindparam

METADATA = sa.MetaData()

KEYS = sa.Table(
    "keys", METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("name", sa.String, nullable=False, unique=True),
    sa.Column("hash", sa.String, nullable=False, unique=True),       # SHA-256 of the key
    sa.Column("hint", sa.String, nullable=False),                    # its last characters
    sa.Column("created", sa.Float, nullable=False),
    sa.Column("expires", sa.Float),
    sa.Column("revoked", sa.Float),
    sa.Column("models", sa.JSON(none_as_null=True)),                 # None: all
    sa.Column("concurrency", sa.Integer),                            # None, here and below: without limit
    sa.Column("tokens_per_minute", sa.BigInteger),
    sa.Column("balance", sa.BigInteger),                             # picodollars
    sa.Column("reserved", sa.BigInteger, nullable=False, default=0),
    sa.Column("running", sa.Integer, nullable=False, default=0),
    sa.Column("minute", sa.BigInteger, nullable=False, default=0),   # the last one in which it was used
    sa.Column("minute_tokens", sa.BigInteger, nullable=False, default=0),
)  # fmt: skip

REQUESTS = sa.Table(
    "requests", METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("key_id", sa.String, nullable=False, index=True),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("began", sa.Float, nullable=False, index=True),
    sa.Column("ended", sa.Float),                                    # None: open
    sa.Column("gateway", sa.String, nullable=False),
    sa.Column("reserved", sa.BigInteger, nullable=False),            # picodollars
    sa.Column("reserved_tokens", sa.BigInteger, nullable=False),
    sa.Column("prompt", sa.BigInteger, nullable=False),
    sa.Column("cached", sa.BigInteger, nullable=False, default=0),
    sa.Column("completion", sa.BigInteger, nullable=False, default=0),
    sa.Column("reasoning", sa.BigInteger, nullable=False, default=0),
    sa.Column("cost", sa.BigInteger, nullable=False, default=0),
)  # fmt: skip

GATEWAYS = sa.Table(
    "gateways", METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("host", sa.String, nullable=False),
    sa.Column("pid", sa.Integer, nullable=False),
    sa.Column("began", sa.Float, nullable=False),
    sa.Column("seen", sa.Float, nullable=False),                     # alive, at the latest
    sa.Column("ended", sa.Float),
)  # fmt: skip

# The worst case is set aside where the key has it left: "of" a key, "worst" in picodollars, "tokens" in "this_minute".
_USED = sa.case((KEYS.c.minute == bindparam("this_minute"), KEYS.c.minute_tokens), else_=0)
TAKE = sa.update(KEYS).where(
    KEYS.c.id == bindparam("of"),
    KEYS.c.revoked.is_(None),
    sa.or_(KEYS.c.balance.is_(None), KEYS.c.balance - KEYS.c.reserved >= bindparam("worst")),
    sa.or_(KEYS.c.concurrency.is_(None), KEYS.c.running < KEYS.c.concurrency),
    sa.or_(KEYS.c.tokens_per_minute.is_(None), _USED + bindparam("tokens") <= KEYS.c.tokens_per_minute),
).values(
    reserved=KEYS.c.reserved + bindparam("worst"), running=KEYS.c.running + 1,
    minute_tokens=_USED + bindparam("tokens"), minute=bindparam("this_minute"),
)  # fmt: skip
OPEN = sa.insert(REQUESTS)
_STILL_OPEN = sa.update(REQUESTS).where(REQUESTS.c.id == bindparam("of"), REQUESTS.c.ended.is_(None))
PROGRESS = _STILL_OPEN.values(cached=bindparam("new_cached"), completion=bindparam("new_completion"))
CLOSE = _STILL_OPEN.values(
    ended=bindparam("now"), cost=bindparam("new_cost"), prompt=bindparam("new_prompt"), cached=bindparam("new_cached"),
    completion=bindparam("new_completion"), reasoning=bindparam("new_reasoning"),
)  # fmt: skip
# "unused" tokens go back to the minute they were taken from, if it is still the key's last.
_GIVEN_BACK = sa.case((KEYS.c.minute == bindparam("its_minute"), bindparam("unused", type_=sa.BigInteger)), else_=0)
CHARGE = sa.update(KEYS).where(KEYS.c.id == bindparam("of")).values(
    balance=KEYS.c.balance - bindparam("spent"), reserved=KEYS.c.reserved - bindparam("worst"),
    running=KEYS.c.running - 1, minute_tokens=KEYS.c.minute_tokens - _GIVEN_BACK,
)  # fmt: skip
# Whoever took it for dead, by a clock that jumped, was wrong.
SEEN = sa.update(GATEWAYS).where(GATEWAYS.c.id == bindparam("of")).values(seen=bindparam("now"), ended=None)
