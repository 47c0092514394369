"""What an artifact cost in all: its own receipt and those of everything it was made from, each counted once. No torch.

    total(Path("runs/tiny/rl_final")).seconds

A receipt names its parents by path and by the digest of their content. A parent is looked for beside the artifact, then
where its path leads from the folders above the artifact, never from the working directory: a run may have been moved or
copied. Whoever answers must have the digest; another artifact in its place is not counted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slingshot.base.config import Strict
from slingshot.base.errors import SlingshotError
from slingshot.base.names import closest
from slingshot.cost.receipt import RECEIPT, Parent, Receipt, artifact_digest
from slingshot.machine.memory import PeakMemory


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
    partial: list[str]

    @classmethod
    def of(cls, receipts: Sequence[Receipt]) -> Sums:
        def known(field: str) -> list[Any]:
            return [value for receipt in receipts if (value := getattr(receipt, field)) is not None]

        found: dict[str, Any] = {field: max(known(field), default=None) for field in PeakMemory.model_fields}
        found |= {field: sum(known(field)) for field in ("seconds", "device_seconds", "flops", "tokens")}
        maybe = {field: known(field) for field in ("energy_joules", "money")}
        found |= {field: sum(values) if values else None for field, values in maybe.items()}
        partial = [field.removesuffix("_joules") for field, some in maybe.items() if 0 < len(some) < len(receipts)]
        return cls(**found, partial=partial)


class Bill(Sums):
    """Lines in the order they were made, with their sums; `missing` says which are not among them."""

    lines: list[BillLine]
    missing: list[str]


def total(path: Path) -> Bill:
    """Walk from an artifact's receipt through its parents'. SlingshotError when one is missing at `path`, or broken."""
    if not (path / RECEIPT).is_file():
        raise SlingshotError(f"{path} has no {RECEIPT}: {_way_out(path)}")
    lines: list[BillLine] = []
    seen: set[tuple[str, str]] = set()
    missing: dict[str, None] = {}

    def add(folder: Path) -> None:
        receipt = Receipt.read(folder)
        if (key := (receipt.stage, receipt.digest)) in seen:
            return
        seen.add(key)
        for parent in receipt.parents:
            found, trouble = _find(parent, folder)
            if found is not None:
                add(found)
            else:
                missing[f"{receipt.name}: {trouble}"] = None
        lines.append(BillLine(path=str(folder), receipt=receipt))

    add(path)
    return Bill(**dict(Sums.of([line.receipt for line in lines])), lines=lines, missing=list(missing))


def _find(parent: Parent, child: Path) -> tuple[Path | None, str]:
    """Where a parent with a receipt lies, or why its cost is not known."""
    recorded, why = Path(parent.path), "is gone"
    above = (child.parent, *child.resolve().parents)
    # Beside the child, or beside the folder of its evaluation; then where the recorded path leads from above the child.
    places = [folder / recorded.name for folder in above[:3]] + [folder / recorded for folder in above]
    for place in dict.fromkeys(place for place in places if place not in above):
        if (place / RECEIPT).is_file():
            with contextlib.suppress(SlingshotError):  # a broken one that happens to lie there is no parent
                if Receipt.read(place).digest == parent.digest:
                    return place, ""
            why = "changed since"
        elif place.exists():
            why = "came without a receipt" if artifact_digest(place) == parent.digest else "changed since"
            break
    return None, f"its parent {recorded} {why}; what it cost is not counted"


def _way_out(path: Path) -> str:
    """The nearest thing that has one."""
    if near := sorted(path.glob(f"*/{RECEIPT}")):
        return f"give one of its artifacts, such as {near[-1].parent}"
    if meant := closest(path.name, sorted(file.parent.name for file in path.parent.glob(f"*/{RECEIPT}"))):
        return f"did you mean {path.parent / meant}?"
    return "give the folder of an artifact that a stage made"
