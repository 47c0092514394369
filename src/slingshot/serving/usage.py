"""What was used, by key, day or model, and what it cost beside what serving it cost: on the terminal and as a page.

report = UsageReport.of(ledger, by=("key", "day"))
report.table(); write_text(path, report.html())
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from rich.table import Table

from slingshot.base.errors import SlingshotError
from slingshot.base.files import rendered
from slingshot.base.names import unknown_name
from slingshot.base.quantity import show_count, show_duration, show_share
from slingshot.serving.ledger import Ledger
from slingshot.serving.ledger_tables import GATEWAYS, KEYS, REQUESTS
from slingshot.serving.prices import PICO, dollars

GROUPS = ("key", "day", "model")


@dataclass(frozen=True)
class UsageRow:
    """Tokens and picodollars of the requests that `group` names."""

    group: tuple[str, ...]
    requests: int
    prompt: int
    cached: int
    completion: int
    reasoning: int
    cost: int

    @property
    def cells(self) -> list[str]:
        counts = [show_count(number) for number in (self.requests, self.prompt)]
        share = show_share(self.cached / self.prompt) if self.prompt else "-"
        return [*self.group, *counts, share, *map(show_count, (self.completion, self.reasoning)), dollars(self.cost)]


@dataclass(frozen=True)
class UsageReport:
    """rows by group, their total, and what the machine cost meanwhile: up, seconds that gateways ran."""

    by: tuple[str, ...]
    rows: tuple[UsageRow, ...]
    total: UsageRow
    up: float
    device_hour: float

    @classmethod
    def of(cls, ledger: Ledger, by: Sequence[str] = GROUPS) -> UsageReport:
        """Of all requests that ended. Raises SlingshotError for a group that is not of GROUPS."""
        for name in by:
            if name not in GROUPS:
                raise unknown_name("group", name, GROUPS)
        with ledger.transaction() as connection:
            ended = sa.select(REQUESTS, KEYS.c.name).join(KEYS, KEYS.c.id == REQUESTS.c.key_id)
            found = connection.execute(ended.where(REQUESTS.c.ended.is_not(None))).all()
            spans = connection.execute(sa.select(GATEWAYS)).all()
        named = sorted((_group(row, by), row) for row in found)
        grouped = itertools.groupby(named, key=lambda pair: pair[0])
        rows = tuple(_row(group, [row for _, row in pairs]) for group, pairs in grouped)
        total = _row(("all", *[""] * (len(by) - 1)), found)
        up = sum((row.ended or row.seen) - row.began for row in spans)
        return cls(tuple(by), rows, total, up, ledger.prices.serving.device_hour)

    @property
    def columns(self) -> list[str]:
        return [*self.by, "requests", "prompt", "cached", "completion", "reasoning", "cost"]

    @property
    def margin(self) -> str:
        """What was charged beside what the machine cost; empty where its price is not known."""
        if not self.device_hour:
            return ""
        spent = round(self.up / 3600 * self.device_hour * PICO)
        charged = self.total.cost
        of_it = f", {show_share((charged - spent) / charged)} of what was charged" if charged > spent else ""
        machine = f"{show_duration(self.up)} of serving at ${self.device_hour:g} an hour: {dollars(spent)}"
        return f"{machine}; margin {dollars(charged - spent)}{of_it}"

    def table(self) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for place, column in enumerate(self.columns):
            table.add_column(column, justify="left" if place < len(self.by) else "right")
        for row in (*self.rows, self.total):
            table.add_row(*row.cells, style="bold" if row is self.total else None)
        return table

    def html(self) -> str:
        most = max((row.cost or row.completion for row in self.rows), default=1) or 1
        bars = [(row.cost or row.completion) / most for row in self.rows]
        made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        return rendered("slingshot.serving", "usage.html.jinja", report=self, bars=bars, made=made)


def _group(row: Any, by: Sequence[str]) -> tuple[str, ...]:
    day = datetime.fromtimestamp(row.began, UTC).strftime("%Y-%m-%d")
    return tuple({"key": row.name, "day": day, "model": row.model}[name] for name in by)


def _row(group: tuple[str, ...], rows: Sequence[Any]) -> UsageRow:
    names = [field.name for field in fields(UsageRow)][2:]
    return UsageRow(group, len(rows), *(sum(getattr(row, name) for row in rows) for name in names))


def parse_groups(text: str) -> list[str]:
    """ "key,day" -> ["key", "day"]."""
    groups = [part.strip() for part in text.split(",") if part.strip()]
    if not groups:
        raise SlingshotError(f"--by names nothing; take some of {', '.join(GROUPS)}")
    return list(dict.fromkeys(groups))
