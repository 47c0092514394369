"""`slingshot keys` and `slingshot usage`: who may use the server, and what was used.

slingshot keys create alice --balance 5.00 --concurrency 4
slingshot usage --by key,day,model --html usage.html
"""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from slingshot.base.files import os_errors, write_text

if TYPE_CHECKING:
    from slingshot.serving.ledger import Ledger

keys_app = typer.Typer(no_args_is_help=True, help="Make, list, take back and top up the keys of the server.")

Where = Annotated[
    str | None, typer.Option("--ledger", help="A file, or a database's URL.", show_default="the user's own")
]
Prices = Annotated[Path | None, typer.Option("--prices", help="The price list (TOML) the server has.")]
Name = Annotated[str, typer.Argument(help="Whose key.", show_default=False)]


def ledger_url(where: str | None) -> str:
    """The URL of a ledger: one is given, or a file, or nothing: then it is the user's own."""
    if where is not None and "://" in where:
        return where
    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    path = Path(where) if where is not None else home / "slingshot" / "ledger.sqlite"
    with os_errors(f"cannot make {path.parent}", "; choose another --ledger"):
        path.parent.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{path.absolute()}"


def _ledger(where: str | None, prices: Path | None = None) -> Ledger:
    from slingshot.serving.ledger import Ledger
    from slingshot.serving.prices import PriceList

    return Ledger(ledger_url(where), None if prices is None else PriceList.load(prices), gateway=False)


@keys_app.command()
def create(
    name: Name,
    balance: Annotated[float | None, typer.Option(help="Dollars it may spend.", show_default="no limit")] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests at once.", show_default="no limit")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(min=1, show_default="no limit")] = None,
    models: Annotated[list[str] | None, typer.Option(help="Models it may use.", show_default="all")] = None,
    days: Annotated[float | None, typer.Option(help="Until it expires.", show_default="never")] = None,
    ledger: Where = None,
) -> None:
    """Make a key. It is shown once."""
    from slingshot.serving import accounts

    names = [one for part in models or [] for one in part.split(",") if one]
    print(accounts.create(_ledger(ledger), name, balance, concurrency, tokens_per_minute, names, days))


@keys_app.command("list")
def list_keys(ledger: Where = None) -> None:
    """Show all keys, their limits and what is left of their balances."""
    from slingshot.serving import accounts
    from slingshot.serving.prices import dollars

    table = Table("name", "key", "balance", "running", "tokens/minute", "models", "created", "state", box=None)
    for row in accounts.keys(_ledger(ledger)):
        expired = row.expires is not None and row.expires < datetime.now(UTC).timestamp()
        table.add_row(
            row.name,
            f"...{row.hint}",
            "no limit" if row.balance is None else dollars(row.balance),
            f"{row.running}" + (f" of {row.concurrency}" if row.concurrency else ""),
            str(row.tokens_per_minute or "no limit"),
            ", ".join(row.models or ["all"]),
            datetime.fromtimestamp(row.created, UTC).strftime("%Y-%m-%d"),
            "revoked" if row.revoked else "expired" if expired else "",
        )
    Console().print(table)


@keys_app.command()
def revoke(name: Name, ledger: Where = None) -> None:
    """Take a key back: from now on it opens nothing."""
    from slingshot.serving import accounts

    accounts.revoke(_ledger(ledger), name)


@keys_app.command("topup")
def top_up(name: Name, amount: Annotated[float, typer.Argument(help="Dollars.")], ledger: Where = None) -> None:
    """Add dollars to a key's balance."""
    from slingshot.serving import accounts

    accounts.top_up(_ledger(ledger), name, amount)


def usage(
    by: Annotated[str, typer.Option(help="What to group by, in this order: key, day, model.")] = "key,day,model",
    html: Annotated[Path | None, typer.Option(help="Write a page, too.")] = None,
    prices: Prices = None,
    ledger: Where = None,
) -> None:
    """Show what was used, by key, day and model, and the margin where the price list has the machine's cost."""
    from slingshot.serving.usage import UsageReport, parse_groups

    report = UsageReport.of(_ledger(ledger, prices), parse_groups(by))
    console = Console(width=1000)  # a narrow terminal wraps the lines: a number that is cut would be another number
    console.print(report.table())
    if report.margin:
        console.print(report.margin, highlight=False)
    if html is not None:
        write_text(html, report.html())
        print(html)
