"""`slingshot receipt CHECKPOINT`: what an artifact cost, stage by stage, everything it was made from included.

show(Path("runs/tiny/rl_final"), Console())
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slingshot.cost.bill import Bill, total
from slingshot.cost.quantity import show_count
from slingshot.cost.receipt import Receipt


def show(path: Path, console: Console, as_json: bool = False) -> None:
    """Print the bill of the artifact at `path`. SlingshotError when it has no receipt."""
    bill = total(path)
    if as_json:
        console.out(json.dumps(bill.model_dump(mode="json"), indent=2, ensure_ascii=False), highlight=False)
        return
    devices = any(line.receipt.devices > 1 for line in bill.lines)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in ("stage", "kind", "tokens", "FLOPs", "time", *(["device time"] if devices else []), "energy", "money"):
        table.add_column(heading, justify="left" if heading in ("stage", "kind") else "right")
    for line in bill.lines:
        table.add_row(*map(Text, _row(line.receipt.name, line.receipt.stage, line.receipt, devices)))
    table.add_row(*map(Text, _row("in all", "", bill, devices)), style="bold")
    console.print(table)
    for note in notes(bill):
        console.print(Text(note, style="yellow"), soft_wrap=True)


def notes(bill: Bill) -> list[str]:
    """What the sums leave out."""
    return [*bill.missing, *(f"{name} is known of some stages only, so the sum is a part" for name in bill.partial)]


def _row(name: str, kind: str, spent: Receipt | Bill, devices: bool) -> list[str]:
    times = [duration(spent.seconds), *([duration(spent.device_seconds)] if devices else [])]
    return [name, kind, show_count(spent.tokens), show_count(spent.flops), *times, energy(spent.energy_joules), price(spent.money)]


def duration(seconds: float) -> str:
    """4000 -> "1 h 06 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def energy(joules: float | None) -> str:
    """In watt-hours; nothing where it is not known."""
    return "" if joules is None else f"{joules / 3.6e6:.3g} kWh" if joules >= 3.6e6 else f"{joules / 3600:.3g} Wh"


def price(money: float | None) -> str:
    """To the cent, as prices are; nothing where none is known."""
    return "" if money is None else f"{money:,.2f}" if money >= 0.01 or not money else "under 0.01"
