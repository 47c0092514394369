"""PostgreSQL for the ledger: a server that vanished, or hangs, is an error in seconds and not in hours.

    url = url.update_query_dict(PATIENCE)
    sa.event.listen(engine, "do_connect", connect)

Its extra (`pip install 'slingshot-lm[postgres]'`) is needed to import this.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence
from typing import Any, TypeVar

import psycopg

T = TypeVar("T")

# What libpq is told: seconds until a connection is made, until what was sent is acknowledged, and until a connection on
# which nothing comes is looked at. A statement may wait for another's lock.
PATIENCE = {
    "connect_timeout": "5", "tcp_user_timeout": "10000", "keepalives_idle": "5", "keepalives_interval": "2",
    "keepalives_count": "3", "options": "-c statement_timeout=10s",
}  # fmt: skip

SILENCE = 12.0  # seconds: longer than a statement may take. A frozen server's kernel acknowledges what nobody reads


class PatientConnection(psycopg.Connection[Any]):
    """One that is closed, with OperationalError, when an answer takes longer than SILENCE."""

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._until(gen, time.monotonic() + SILENCE), *args, **kwargs)

    def _until(self, gen: Generator[Any, Any, T], end: float) -> Generator[Any, Any, T]:
        """`gen`, which is told every tenth of a second that nothing came, as long as it may wait."""
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > end:
                    self.close()
                    raise psycopg.OperationalError(f"PostgreSQL says nothing for {SILENCE:.0f} seconds")
                wanted = gen.send(ready)
        except StopIteration as done:
            result: T = done.value
            return result


def connect(_dialect: Any, _record: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> PatientConnection:
    return PatientConnection.connect(*arguments, **options)
