"""`slingshot receipt CHECKPOINT`: what an artifact cost, stage by stage, everything it was made from included.

show(Path("runs/tiny/rl_final"), Console())
"""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from slingshot.base.quantity import show_count, show_duration, show_energy, show_flops, show_money
from slingshot.cost.bill import Bill, total
from slingshot.cost.receipt import Receipt


def show(path: Path, console: Console, as_json: bool = False) -> None:
    """Print the bill of the artifact at `path`. SlingshotError when it has no receipt."""
    bill = total(path)
    if as_json:
        console.out(json.dumps(bill.model_dump(mode="json"), indent=2, ensure_ascii=False), highlight=False)
        return
    devices = any(line.receipt.devices > 1 for line in bill.lines)
    table = Table(box=None, pad_edge=False, header_style="dim")
    for heading in (
        "stage",
        "kind",
        "tokens",
        "FLOPs",
        "time",
        *(["device time"] if devices else []),
        "memory",
        "energy",
        "money",
    ):
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
    times = [show_duration(spent.seconds), *([show_duration(spent.device_seconds)] if devices else [])]
    return [
        name,
        kind,
        show_count(spent.tokens),
        show_flops(spent.flops),
        *times,
        spent.peak_memory,
        show_energy(spent.energy_joules),
        show_money(spent.money, ""),
    ]
