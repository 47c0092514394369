"""doctor.py: what it prints follows from what it measured, and what it measured is what `auto` goes by afterwards."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console

from slingshot.cli import doctor
from slingshot.kernels.native import native_levels
from slingshot.machine import device as hardware
from slingshot.machine.device import auto_dtype, machine_key
from slingshot.machine.machine import Measurement, load_measurement, measurement_path, save_measurement

CPU = torch.device("cpu")
SPEEDS = {torch.float32: 200e9, torch.bfloat16: 900e9, torch.int8: 2000e9}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a machine of known speeds that has no float16."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def measure_peak(dtype: torch.dtype, device: torch.device, seconds: float) -> float:
        if dtype not in SPEEDS:
            raise RuntimeError("not implemented for 'Half'")
        return SPEEDS[dtype]

    monkeypatch.setattr(doctor, "auto_device", lambda: CPU)
    monkeypatch.setattr(hardware, "measure_peak", measure_peak)
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda device, seconds: 28e9)
    return tmp_path


def examined(calibrate: bool = False) -> str:
    target = io.StringIO()
    doctor.examine(Console(file=target, width=200), 0.01, calibrate)
    return target.getvalue()


def test_doctor_prints_what_it_measured(cache: Path) -> None:
    text = examined()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert {"float32 200 1.00", "bfloat16 900 4.50", "int8 2,000 10.00", "float16 not offered"} <= {*lines}
    assert "read at 28.0 GB/s" in text and f"torch {torch.__version__}" in text and "GiB" in text
    assert "bfloat16 on cpu: bfloat16 multiplies 4.5 times as fast as float32 here, at least the 1.5 times" in text


def test_doctor_says_whose_kernels_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLINGSHOT_NATIVE", "off")
    assert "torch's: no native library, or it is off" in examined()
    monkeypatch.delenv("SLINGSHOT_NATIVE")
    if levels := native_levels():
        assert f"native ({levels[-1]})" in examined()


def test_doctor_keeps_what_auto_goes_by(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined()
    kept = load_measurement(machine_key(CPU))
    assert kept.peak == {"float32": 200e9, "bfloat16": 900e9, "int8": 2000e9} and kept.bandwidth == 28e9
    assert auto_dtype(CPU) == torch.bfloat16
    assert str(measurement_path()) in examined()


def test_slow_bfloat16_is_not_used(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SPEEDS, torch.bfloat16, 290e9)
    assert "float32 on cpu: bfloat16 multiplies 1.4 times as fast as float32 here, less than" in examined()
    assert auto_dtype(CPU) == torch.float32


def test_a_second_look_never_forgets_a_better_one(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examined()
    monkeypatch.setitem(SPEEDS, torch.float32, 50e9)  # the machine is busy this time
    assert ["float32", "200", "1.00"] in [line.split() for line in examined().splitlines()]


def test_a_cache_that_cannot_be_written_is_said(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    assert "cannot be written, so this is measured again each time" in examined()


@pytest.mark.parametrize(("load", "said"), [(0.1, False), (64_000.0, True)])
def test_a_busy_machine_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch, load: float, said: bool) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert ("The machine is busy" in examined()) == said


def test_calibration_measures_longer_and_forgets_what_was(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_measurement(machine_key(CPU), Measurement(peak={"float32": 1e15, "float16": 2e15}, bandwidth=1e12))
    examined()
    assert load_measurement(machine_key(CPU)).peak["float32"] == 1e15  # the best ever
    taken: list[float] = []
    monkeypatch.setattr(hardware, "measure_bandwidth", lambda device, seconds: taken.append(seconds) or 28e9)
    assert f"Kept in {measurement_path()}, in place of what was measured before." in examined(calibrate=True)
    peak = {"float32": 200e9, "bfloat16": 900e9, "int8": 2000e9}
    assert load_measurement(machine_key(CPU)) == Measurement(peak=peak, bandwidth=28e9) and taken == [0.04]
