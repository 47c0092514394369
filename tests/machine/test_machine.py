"""machine/machine.py: what the system says, and a cache that may be lost but never lies or harms."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from slingshot.machine.machine import Measurement, describe, load_measurement, measurement_path, save_measurement


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def test_describe_is_within_the_host() -> None:
    machine = describe(accelerator="H800", threads=3, torch="2.13.0")
    assert machine.cpu and 1 <= machine.cores <= (os.cpu_count() or 1)
    assert 2**28 < machine.memory_bytes <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert (machine.accelerator, machine.threads, machine.torch) == ("H800", 3, "2.13.0")


def test_measurements_are_kept_apart_by_key_and_merged_within(cache: Path) -> None:
    assert load_measurement("a") == Measurement()
    assert save_measurement("a", Measurement(peak={"float32": 2.0}))
    assert save_measurement("b", Measurement(peak={"float32": 9.0}))
    assert save_measurement("a", Measurement(peak={"bfloat16": 5.0}, bandwidth=3.0))
    assert load_measurement("a") == Measurement(peak={"float32": 2.0, "bfloat16": 5.0}, bandwidth=3.0)
    assert load_measurement("b") == Measurement(peak={"float32": 9.0})
    assert measurement_path() == cache / "slingshot" / "machine.json"


def test_the_best_measurement_stays(cache: Path) -> None:
    for peak, bandwidth, best in ((2.0, 4.0, (2.0, 4.0)), (1.0, 3.0, (2.0, 4.0)), (3.0, 5.0, (3.0, 5.0))):
        save_measurement("a", Measurement(peak={"float32": peak}, bandwidth=bandwidth))
        assert load_measurement("a") == Measurement(peak={"float32": best[0]}, bandwidth=best[1])


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 3}', '{"a": {"peak": "fast"}}', '{"a": {"unknown": 1}}'])
def test_a_cache_from_another_hand_counts_as_empty(cache: Path, content: str) -> None:
    measurement_path().parent.mkdir()
    measurement_path().write_text(content)
    assert load_measurement("a") == Measurement()
    assert save_measurement("a", Measurement(peak={"float32": 2.0}))
    assert load_measurement("a").peak == {"float32": 2.0}


def test_home_is_the_default_and_an_unwritable_cache_is_no_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(cache / "home"))
    assert measurement_path() == cache / "home" / ".cache" / "slingshot" / "machine.json"
    (cache / "home").write_text("a file where a folder should be")
    assert save_measurement("a", Measurement(peak={"float32": 2.0})) is False
