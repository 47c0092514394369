"""What a server does now and did today, as its owner's page reads it: GET /status.json, once a second.

await StatusBoard(gateway).read()
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from slingshot import __version__
from slingshot.serving.gateway import Gateway
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import REQUESTS
from slingshot.serving.prices import PICO
from slingshot.serving.served_model import ServedModel

_FRESH = 5.0  # seconds for which the ledger's sums are told again: they are read from the whole day's rows


class StatusBoard:
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway
        self._today: dict[str, Any] | None = None
        self._read = -_FRESH

    async def read(self) -> dict[str, Any]:
        """Counts go up from the server's start; whoever reads twice knows what a second has. today: by UTC, of requests
        that ended; None without a ledger."""
        gateway, now = self._gateway, time.monotonic()
        if gateway.ledger is not None and now - self._read >= _FRESH:
            self._read = now
            self._today = await gateway.ledger.aside(_today, gateway.ledger)
        state = "stopping" if gateway.draining else gateway.obstacle or "serving"
        models = [self._model(model) for model in gateway.models.values()]
        return {"version": __version__, "state": state, "time": now, "models": models, "today": self._today}

    def _model(self, model: ServedModel) -> dict[str, Any]:
        gateway, counters = self._gateway, model.backend.counters
        pages = counters and {"used": counters.pages_used, "kept": counters.pages_kept, "all": counters.pages}
        return {
            "name": model.name,
            "runs": model.runs,
            "context": model.backend.max_length,
            "obstacle": model.backend.obstacle,
            "running": gateway.running_models.count(model.name),
            "waiting_tokens": gateway.waiting[model.name].tokens,
            "generated_tokens": gateway.metrics.meters[model.name].generated,
            "pages": pages,
        }


def _today(ledger: Ledger) -> dict[str, Any]:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0).timestamp()
    names = ("prompt", "cached", "completion", "reasoning", "cost")
    sums = [sa.func.coalesce(sa.func.sum(REQUESTS.c[name]), 0).label(name) for name in names]
    ended = sa.select(sa.func.count().label("requests"), *sums).where(
        REQUESTS.c.ended.is_not(None), REQUESTS.c.began >= midnight
    )
    with ledger.transaction() as connection:
        row = connection.execute(ended).one()
    counts = {f"{name}_tokens": int(getattr(row, name)) for name in names[:-1]}
    return {"requests": row.requests, **counts, "dollars": int(row.cost) / PICO}
