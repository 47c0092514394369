"""cost/receipt.py: the meter goes on where it stopped, and a digest names content, not clocks."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.cost import receipt as module
from slingshot.cost.receipt import Meter, Receipt, artifact_digest
from slingshot.machine.machine import Machine

MACHINE = Machine(cpu="test", cores=2, memory_bytes=2**30)


class Clock:
    """time.perf_counter under the test's control."""

    now = 100.0
    time_ns = staticmethod(time.time_ns)

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "peak_host_memory_bytes", lambda: 500)
    return clock


def folder(path: Path, **files: str) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name.replace("__", ".")).write_text(content)
    return path


def test_meter_goes_on_over_interruptions(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Meter()
    first.add(tokens=10, training=3e9, mtp=1e9)
    clock.now += 5
    saved = json.loads(json.dumps(first.state()))
    first.add(tokens=99, training=9e9)  # lost: it came after the last saved state
    clock.now += 1000  # nobody was running
    monkeypatch.setattr(module, "peak_host_memory_bytes", lambda: 400)
    monkeypatch.setattr(module, "peak_device_memory_bytes", lambda: 900)
    second = Meter(saved)
    second.add(tokens=20, training=4e9)
    clock.now += 2
    assert (second.tokens, second.flops, second.seconds) == (30, 8e9, 7.0)
    peaks = ("peak_host_memory_bytes", "peak_device_memory_bytes")
    assert [second.state()[peak] for peak in peaks] == [500, 900]
    assert second.flops_by_part == {"training": 7e9, "mtp": 1e9}
    assert second.receipt("rl", "x", {}, [], tmp_path, MACHINE, peak=4e9).mfu == pytest.approx(8e9 / 7 / 4e9)


def test_receipt_round_trip(tmp_path: Path, clock: Clock) -> None:
    base = folder(tmp_path / "base", model="weights")
    out = folder(tmp_path / "zero", model="better weights")
    meter = Meter()
    meter.add(tokens=10, training=4e9)
    clock.now += 2
    written = meter.receipt("rl", "zero", {"lr": 0.1}, [base], out, MACHINE, peak=8e9, price=1.8, extra={"note": "x"})
    written.write(out)
    assert Receipt.read(out) == written
    assert (written.tokens, written.flops, written.seconds, written.mfu, written.money) == (10, 4e9, 2.0, 0.25, 0.001)
    assert written.parents[0].path == str(base) and written.parents[0].digest == artifact_digest(base)
    assert written.machine == MACHINE and re.fullmatch(r"\d+\.\d+\.\d+", written.version)
    again = meter.receipt("rl", "zero", {}, [out], base, MACHINE)
    assert again.parents[0].digest == written.digest  # the next stage's receipt names this one
    assert again.mfu is None and again.money is None


def test_digest_names_content_not_clocks(tmp_path: Path) -> None:
    clocks = {"metrics__jsonl": '{"seconds": 1}', "events__out__tfevents": "a", "__hidden": "a"}
    one = folder(tmp_path / "one", model="weights", **clocks)
    two = folder(tmp_path / "two", model="weights", metrics__jsonl='{"seconds": 2}')
    assert artifact_digest(one) == artifact_digest(two) and re.fullmatch("[0-9a-f]{16}", artifact_digest(one))
    assert artifact_digest(one) != artifact_digest(folder(tmp_path / "content", model="other weights"))
    assert artifact_digest(one) != artifact_digest(folder(tmp_path / "name", modem="weights"))
    folder(tmp_path / "deep" / "more", model="weights")
    assert artifact_digest(one) != artifact_digest(tmp_path / "deep")
    assert artifact_digest(one / "model") == artifact_digest(two / "model")  # a parent may be a single file
    for name in (b"caf\xe9", b"caf\xe8"):  # names that are no UTF-8 count like others
        (two / os.fsdecode(name)).write_text("notes")
    both = artifact_digest(two)
    (two / os.fsdecode(b"caf\xe8")).unlink()
    assert len({artifact_digest(one), artifact_digest(two), both}) == 3


def test_digest_is_answered_by_the_receipt(tmp_path: Path, clock: Clock) -> None:
    out = folder(tmp_path / "out", model="weights")
    before = artifact_digest(out)
    Meter().receipt("sft", "out", {}, [], out, MACHINE).write(out)
    assert artifact_digest(out) == before
    Receipt.read(out).model_copy(update={"digest": "of the receipt"}).write(out)
    assert artifact_digest(out) == "of the receipt"  # gigabytes are not read twice


def test_a_large_copy_is_read_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its receipt is not trusted, since the files are younger; what rested is remembered by size, inode and times."""
    out, read = folder(tmp_path / "out", model="weights"), []
    real, now = hashlib.file_digest, time.time_ns
    os.truncate(out / "model", 1 << 24)
    Meter().receipt("sft", "out", {}, [], out, MACHINE).write(out)
    time.sleep(0.02)
    shutil.copy2(out / "model", out / "copy")
    (out / "copy").rename(out / "model")
    monkeypatch.setattr(hashlib, "file_digest", lambda *content: read.append(1) or real(*content))
    assert artifact_digest(out) == artifact_digest(out) and len(read) == 2, "younger than two seconds: not remembered"
    monkeypatch.setattr(time, "time_ns", lambda: now() + 3_000_000_000)
    assert (before := artifact_digest(out)) == artifact_digest(out) == Receipt.read(out).digest and len(read) == 3
    times = (out / "model").stat()
    (out / "model").write_bytes(bytes(1 << 24))
    os.utime(out / "model", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert artifact_digest(out) != before and len(read) == 4, "same size, and its mtime set back"


def test_a_folder_that_changed_after_its_receipt_is_read(tmp_path: Path) -> None:
    """Edited, a file replaced by an older one, one added, one removed."""
    old = folder(tmp_path / "old", model="others") / "model"
    os.utime(old, (0, 0))
    changes: dict[str, Callable[[Path], object]] = {
        "edited": lambda out: (out / "model").write_text("edited!"), "replaced": lambda out: old.rename(out / "model"),
        "added": lambda out: (out / "more").write_text("weights"), "removed": lambda out: (out / "model").unlink(),
    }  # fmt: skip
    for name, change in changes.items():
        out = folder(tmp_path / name, model="weights", config="{}")
        Meter().receipt("sft", "out", {}, [], out, MACHINE).write(out)
        before = artifact_digest(out)
        time.sleep(0.02)
        change(out)
        assert artifact_digest(out) != before, name


def test_what_is_missing_or_broken_is_named(tmp_path: Path) -> None:
    with pytest.raises(SlingshotError, match="nowhere does not exist"):
        artifact_digest(tmp_path / "nowhere")
    with pytest.raises(SlingshotError, match=r"receipt\.json"):
        Receipt.read(tmp_path)
    for content in ("[]", '{"stage": "rl"}'):
        (tmp_path / "receipt.json").write_text(content)
        with pytest.raises(SlingshotError, match=r"receipt\.json") as caught:
            Receipt.read(tmp_path)
        assert "\n" not in str(caught.value)


def test_a_receipt_of_impossible_numbers_is_refused(tmp_path: Path) -> None:
    good = Meter().receipt("rl", "x", {}, [], tmp_path, MACHINE).model_dump(mode="json")
    for key, value in {"seconds": -1, "flops": math.inf, "devices": 0, "money": math.nan, "mfu": math.nan}.items():
        (tmp_path / "receipt.json").write_text(json.dumps(good | {key: value}))
        with pytest.raises(SlingshotError, match=rf"receipt\.json\.{key}"):
            Receipt.read(tmp_path)


def test_energy_goes_on_over_interruptions_and_is_none_where_a_part_was_not_counted(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = SimpleNamespace(joules=0.0, poll=lambda: None)
    monkeypatch.setattr(module, "Energy", lambda: counter)
    first = Meter()
    counter.joules = 30.0
    saved = json.loads(json.dumps(first.state()))
    counter.joules = 12.0
    second = Meter(saved)
    clock.now += 4
    out = folder(tmp_path / "out", model="weights")
    receipt = second.receipt("rl", "out", {}, [], out, MACHINE, devices=8)
    assert (receipt.energy_joules, receipt.devices, receipt.device_seconds) == (42.0, 8, 8 * receipt.seconds)
    del saved["energy_joules"]  # begun before there were counters
    assert Meter(saved).state()["energy_joules"] is None
    counter.joules = None
    assert Meter().state()["energy_joules"] is None


def test_receipts_of_other_versions_are_read(tmp_path: Path, clock: Clock) -> None:
    Meter().receipt("sft", "out", {"lr": 1.0}, [], tmp_path, MACHINE, price=1).write(tmp_path)
    values = json.loads((tmp_path / "receipt.json").read_text())
    needed = {key: values[key] for key in ("stage", "name", "digest", "tokens", "flops", "seconds")}
    (tmp_path / "receipt.json").write_text(json.dumps(needed))
    old = Receipt.read(tmp_path)
    assert (old.peak_host_memory_bytes, old.peak_device_memory_bytes) == (None, None)
    assert (old.energy_joules, old.devices) == (None, 1)
    assert (old.mfu, old.money, old.machine.cpu, old.version) == (None, None, "unknown", "unknown")
    newer = values | {"carbon_grams": 3, "machine": values["machine"] | {"rack": 4}}
    (tmp_path / "receipt.json").write_text(json.dumps(newer))
    assert Receipt.read(tmp_path) == Receipt.parse(values)
