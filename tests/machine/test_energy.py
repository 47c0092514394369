"""machine/energy.py on a made-up /sys/class/powercap and a made-up NVML."""

from __future__ import annotations

import ctypes
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from slingshot.machine.energy import Energy


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def zone(root: Path, name: str, label: str, microjoules: int, span: int = 1_000_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_and_memory_are_added_up_and_their_parts_are_not(tmp_path: Path) -> None:
    labels = {":0": "package-0", ":1": "package-1", ":0:0": "core", ":0:1": "dram", ":2": "psys"}
    files = [zone(tmp_path, f"intel-rapl{number}", label, 5_000_000) for number, label in labels.items()]
    energy = Energy(tmp_path)
    assert energy.joules == 0.0
    for file, more in zip(files, (2_000_000, 1_500_000, 900_000, 250_000, 99_000_000), strict=True):
        file.write_text(f"{5_000_000 + more}\n")
    assert energy.joules == pytest.approx(2 + 1.5 + 0.25)


def test_a_counter_that_turns_over_goes_on(tmp_path: Path) -> None:
    file = zone(tmp_path, "intel-rapl:0", "package-0", 990_000_000)
    energy = Energy(tmp_path)
    for microjoules in (999_000_000, 4_000_000, 2_000_000):  # the second turn is over after 998 joules more
        file.write_text(str(microjoules))
        energy.poll()
    assert energy.joules == pytest.approx(9 + 5 + 998)


def test_what_cannot_be_read_is_none_and_what_stops_being_readable_stands_still(tmp_path: Path) -> None:
    assert Energy(tmp_path / "nothing").joules is None
    file = zone(tmp_path, "intel-rapl:0", "package-0", 1_000_000)
    (zone(tmp_path, "intel-rapl:1", "package-1", 0)).write_text("secret")
    energy = Energy(tmp_path)
    for change in (lambda: file.write_text("3000000"), file.unlink):
        change()
        assert energy.joules == 2.0


class FourGPUs:
    """NVML on a machine of four, whose handles are 1 to 4; from one reading to the next they use 1, 2, 4, 8 joules."""

    readings = Counter[int]()

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 4
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:
        handle._obj.value = index.value + 1
        return 0

    def nvmlDeviceGetHandleByUUID(self, name: Any, handle: Any) -> int:
        handle._obj.value = 3
        return name.value != b"GPU-third"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        self.readings[handle.value] += 1
        value._obj.value = 1000 * 2 ** (handle.value - 1) * self.readings[handle.value]
        return 0


@pytest.mark.parametrize(
    ("visible", "joules"),
    [
        (None, 15), ("", None), ("-1", None), ("0, 1", 3), ("2", 4), ("3,-1,0", 8), ("1,7,0", 2), ("GPU-third,0", 5),
        ("GPU-gone", None),
    ],
)  # fmt: skip
def test_only_gpus_this_process_may_use_are_counted(
    visible: str | None, joules: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA_VISIBLE_DEVICES as CUDA reads it: numbers or UUIDs, up to the first that is no device's."""
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FourGPUs())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert Energy(tmp_path).joules == joules
