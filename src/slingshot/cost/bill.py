"""What an artifact cost in all: its own receipt and those of everything it was made from, each counted once. No torch.

    bill = total(Path("runs/tiny/rl_final"))
    for line in bill.lines: line.receipt.seconds         # ancestors first, the artifact itself last
    bill.seconds, bill.device_seconds, bill.flops, bill.energy_joules, bill.money
    bill.missing                                         # parents gone, changed, or without a receipt: a line each

A receipt names its parents by path and by the digest of their content. A parent is looked for beside the artifact, then
where its path leads from the folders above the artifact, never from the working directory: a run may have been moved or
copied. Whoever answers must have the digest; another artifact in its place is not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.names import closest
from slingshot.cost.receipt import RECEIPT, Parent, PeakMemory, Receipt, artifact_digest


class BillLine(Strict):
    """An artifact's place and its receipt."""

    path: str
    receipt: Receipt


class Sums(PeakMemory):
    """Of receipts; of memory the largest. `partial` names sums that not all receipts have a figure for."""

    seconds: float
    device_seconds: float
    flops: float
    tokens: int
    energy_joules: float | None
    money: float | None
    partial: list[str]  # sums that some receipts have no figure for

    @staticmethod
    def of(receipts: Sequence[Receipt]) -> Sums:
        joules = [receipt.energy_joules for receipt in receipts if receipt.energy_joules is not None]
        money = [receipt.money for receipt in receipts if receipt.money is not None]
        return Sums(
            seconds=sum(receipt.seconds for receipt in receipts),
            device_seconds=sum(receipt.device_seconds for receipt in receipts),
            flops=sum(receipt.flops for receipt in receipts),
            tokens=sum(receipt.tokens for receipt in receipts),
            energy_joules=sum(joules) if joules else None,
            money=sum(money) if money else None,
            partial=[name for name, known in (("energy", joules), ("money", money)) if 0 < len(known) < len(receipts)],
            peak_host_memory_bytes=max((receipt.peak_host_memory_bytes or 0 for receipt in receipts), default=0)
            or None,
            peak_device_memory_bytes=max((receipt.peak_device_memory_bytes or 0 for receipt in receipts), default=0)
            or None,
        )


class Bill(Sums):
    """Lines in the order they were made, with their sums; `missing` says which are not among them."""

    lines: list[BillLine]
    missing: list[str]


def total(path: Path) -> Bill:
    """Walk from an artifact's receipt through its parents'. SlingshotError when one is missing at `path`, or broken."""
    if not (path / RECEIPT).is_file():
        raise SlingshotError(f"{path} has no {RECEIPT}: {_way_out(path)}")
    lines: dict[tuple[str, str], BillLine] = {}
    missing: dict[str, None] = {}
    waiting: list[tuple[Path, bool]] = [(path, False)]
    on_the_way: set[tuple[str, str]] = set()
    while waiting:  # depth first, an artifact's line after those of its parents
        folder, parents_done = waiting.pop()
        receipt = Receipt.read(folder)
        key = (receipt.stage, receipt.digest)
        if parents_done:
            lines.setdefault(key, BillLine(path=str(folder), receipt=receipt))
        elif key not in lines and key not in on_the_way:
            on_the_way.add(key)
            waiting.append((folder, True))
            for parent in reversed(receipt.parents):
                found, trouble = _find(parent, folder)
                if found is not None:
                    waiting.append((found, False))
                if trouble:
                    missing[f"{receipt.name}: {trouble}"] = None
    sums = Sums.of([line.receipt for line in lines.values()])
    return Bill(**dict(sums), lines=list(lines.values()), missing=list(missing))


def _find(parent: Parent, child: Path) -> tuple[Path | None, str]:
    """Where a parent with a receipt lies, or why its cost is not known."""
    recorded, why = Path(parent.path), "is gone"
    above = (child.parent, *child.resolve().parents)
    # Beside the child, or beside the folder of its evaluation; then where the recorded path leads from above the child.
    places = [folder / recorded.name for folder in above[:3]] + [folder / recorded for folder in above]
    for place in dict.fromkeys(place for place in places if place not in above):
        if (place / RECEIPT).is_file():
            if Receipt.read(place).digest == parent.digest:
                return place, ""
            why = "changed since"
        elif place.exists():
            why = "came without a receipt" if artifact_digest(place) == parent.digest else "changed since"
            break
    return None, f"its parent {recorded} {why}; what it cost is not counted"


def _way_out(path: Path) -> str:
    """The nearest thing that has one."""
    near = sorted(file.parent for file in path.glob(f"*/{RECEIPT}")) if path.is_dir() else []
    if near:
        return f"give one of its artifacts, such as {near[-1]}"
    beside = sorted(file.parent for file in path.parent.glob(f"*/{RECEIPT}")) if path.parent.is_dir() else []
    if meant := closest(path.name, [place.name for place in beside]):
        return f"did you mean {path.parent / meant}?"
    return "give the folder of an artifact that a stage made"
