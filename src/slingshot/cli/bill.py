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
    several = any(line.receipt.devices > 1 for line in bill.lines)
    table = Table("stage", "kind", box=None, pad_edge=False, header_style="dim")
    for heading in ("tokens", "FLOPs", "time", *["device time"] * several, "memory", "energy", "money"):
        table.add_column(heading, justify="right")
    for line in bill.lines:
        table.add_row(*map(Text, _row(line.receipt.name, line.receipt.stage, line.receipt, several)))
    table.add_row(*map(Text, _row("in all", "", bill, several)), style="bold")
    console.print(table)
    partial = [f"{name} is known of some stages only, so the sum is a part" for name in bill.partial]
    for note in [*bill.missing, *partial]:
        console.print(Text(note, style="yellow"), soft_wrap=True)


def _row(name: str, kind: str, spent: Receipt | Bill, several: bool) -> list[str]:
    times = [show_duration(spent.seconds)] + [show_duration(spent.device_seconds)] * several
    used = [show_count(spent.tokens), show_flops(spent.flops), *times, spent.peak_memory]
    return [name, kind, *used, show_energy(spent.energy_joules), show_money(spent.money, "")]
