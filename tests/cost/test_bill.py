"""cost/bill.py: what an artifact cost with everything it was made from, and the doors `slingshot receipt` opens to
it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from slingshot.base.errors import SlingshotError
from slingshot.cli import bill as door
from slingshot.cost.bill import total
from slingshot.cost.receipt import Parent, Receipt, artifact_digest


def made(run: Path, name: str, parents: list[Path], seconds: float, kind: str = "rl", **known: object) -> Path:
    """An artifact in the run's folder, whose receipt names its parents as they are now."""
    folder = run / name
    folder.mkdir(parents=True)
    named = [Parent(path=str(parent), digest=artifact_digest(parent)) for parent in parents]
    told = {"stage": kind, "name": name, "parents": named, "digest": f"{name:0<16.16}", "tokens": 10}
    told |= {"flops": 100 * seconds, "seconds": seconds, "peak_host_memory_bytes": 1}
    Receipt.parse(told | known).write(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """base -> cold_start -> rl -> sample; sft of base on sample: base is reached twice."""
    run = tmp_path / "run"
    base = made(run, "base", [], 100, "pretrain", money=1.0, energy_joules=7200.0)
    rl = made(run, "rl", [made(run, "cold_start", [base], 10, "sft", money=0.5)], 50, devices=4, money=0.25)
    made(run, "sft", [base, made(run, "sample", [rl], 5, "sample")], 20, "sft")
    made(run, "other", [base], 1000)
    return run


def test_ancestors_come_first_and_each_counts_once(run: Path) -> None:
    bill = total(run / "sft")
    assert [line.receipt.name for line in bill.lines] == ["base", "cold_start", "rl", "sample", "sft"]
    assert (bill.seconds, bill.device_seconds, bill.flops, bill.tokens) == (185, 185 + 3 * 50, 18_500, 50)
    assert (bill.money, bill.energy_joules, bill.partial, bill.missing) == (1.75, 7200, ["energy", "money"], [])
    alone = total(run / "base")
    assert len(alone.lines) == 1 and alone.partial == []
    assert total(run / "other").money == 1.0


def test_a_run_that_was_moved_finds_its_own(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = run.rename(run.with_name("moved"))
    assert total(moved / "sft").seconds == 185
    monkeypatch.chdir(moved)
    assert total(Path("sft")).seconds == 185


def test_a_run_copied_next_to_another_of_the_same_names_is_billed_for_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two clones made runs/tiny; the same content cost them different times."""
    for clone, seconds in (("theirs", 100), ("mine", 7)):
        (tmp_path / clone).mkdir()
        monkeypatch.chdir(tmp_path / clone)
        base = made(Path("runs/tiny"), "base", [], seconds)
        made(Path("runs/tiny"), "rl", [base], 1)
        made(Path("runs/tiny/evaluations"), "base", [base], 0.5, "evaluate", digest="evaluation")
        made(Path("elsewhere"), "sft", [base], 2)
    copy = Path(shutil.copytree(tmp_path / "theirs" / "runs" / "tiny", "runs/copy"))
    assert (total(copy / "rl").seconds, total(Path("runs/tiny/rl")).seconds) == (101, 8)
    assert total(tmp_path / "theirs" / "elsewhere" / "sft").seconds == 102
    assert total(copy / "evaluations" / "base").seconds == 100.5
    shutil.rmtree(copy / "base")
    shutil.copytree(copy, tmp_path / "alone")
    assert "is gone" in total(tmp_path / "alone" / "rl").missing[0]


def test_what_is_gone_or_changed_is_said_and_not_counted(run: Path) -> None:
    shutil.rmtree(run / "cold_start")
    bill = total(run / "sft")
    assert [line.receipt.name for line in bill.lines] == ["base", "rl", "sample", "sft"]
    assert len(bill.missing) == 1 and bill.missing[0].startswith("rl: its parent ") and "is gone" in bill.missing[0]
    shutil.rmtree(run / "base")
    made(run, "base", [], 7, "pretrain", money=9.0, digest="another")
    bill = total(run / "sft")
    assert [line.receipt.name for line in bill.lines] == ["rl", "sample", "sft"] and bill.money == 0.25
    assert any(line.startswith("sft: its parent ") and "changed since" in line for line in bill.missing)


def test_a_broken_receipt_that_happens_to_lie_where_a_parent_may_is_passed_over(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = run / "elsewhere"
    for place in (here / "base", run.parent / "base"):
        place.mkdir(parents=True)
        (place / "receipt.json").write_text("{")
    monkeypatch.chdir(here)
    assert total(run / "sft").seconds == 185


def test_a_parent_from_outside_has_no_cost(run: Path) -> None:
    outside = run / "outside"
    outside.mkdir()
    (outside / "weights").write_text("x")
    child = made(run, "child", [outside], 3)
    assert "came without a receipt" in total(child).missing[0]
    (outside / "weights").write_text("y")
    assert "changed since" in total(child).missing[0]


def test_receipts_in_a_circle_end(run: Path) -> None:
    base, sft = Receipt.read(run / "base"), Parent(path=str(run / "sft"), digest=Receipt.read(run / "sft").digest)
    base.model_copy(update={"parents": [sft]}).write(run / "base")
    assert len(total(run / "sft").lines) == 5


def test_the_door_prints_every_stage_and_the_sum(run: Path) -> None:
    shutil.rmtree(run / "cold_start")
    target = io.StringIO()
    door.show(run / "sft", Console(file=target, width=200))
    lines = [" ".join(line.split()) for line in target.getvalue().splitlines()]
    assert lines[0] == "stage kind tokens FLOPs time device time memory energy money"
    assert lines[1] == "base pretrain 10 10 KFLOP 1 min 40 s 1 min 40 s 1 B 2 Wh 1.00"
    assert lines[2] == "rl rl 10 5 KFLOP 50 s 3 min 20 s 1 B 0.25"
    assert lines[5] == "in all 40 17.5 KFLOP 2 min 55 s 5 min 25 s 1 B 2 Wh 1.25"
    text = target.getvalue()
    assert "is gone; what it cost is not counted" in text and "money is known of some stages only" in text
    target = io.StringIO()
    door.show(run / "sft", Console(file=target, width=20), as_json=True)
    assert json.loads(target.getvalue())["seconds"] == 175


@pytest.mark.parametrize(
    ("asked", "hint"),
    [("sfd", "did you mean .*sft"), (".", "such as .*sft"), ("nowhere/at/all", "an artifact that a stage made")],
)
def test_no_receipt_names_the_nearest(run: Path, asked: str, hint: str) -> None:
    with pytest.raises(SlingshotError, match=hint) as caught:
        total(run / asked)
    assert "\n" not in str(caught.value)
