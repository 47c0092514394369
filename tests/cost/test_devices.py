"""cost/devices.py: every figure has a source, names are found or the nearest is said, and mixed work runs at each
part's own rate."""

from __future__ import annotations

from pathlib import Path

import pytest

from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import DEVICES, device, dtype_peak, mixed_peak
from slingshot.cost.flops import forward_parts
from slingshot.machine.machine import Measurement, describe, save_measurement
from slingshot.model.config import ModelConfig


def test_the_table_has_what_was_asked_for_and_its_sources() -> None:
    assert {"h800", "h100", "h200", "a100", "l40s", "rtx4090", "mi300x", "m4-max", "cpu"} <= DEVICES.keys()
    for entry in DEVICES.values():
        assert entry.sources and all(len(source) > 10 for source in entry.sources)
        assert ("price" in " ".join(entry.sources)) == (entry.price is not None)
        assert entry.network > 0 and entry.power_watts and entry.memory_bytes > 2**34
        assert (entry.link > 0) == (entry.per_node > 1)
        # A dtype half as wide is at least as fast.
        assert entry.peak.get("fp8", entry.peak["bfloat16"]) >= entry.peak["bfloat16"] >= entry.peak["float32"]


@pytest.mark.parametrize(
    ("name", "says"),
    [("h80", "did you mean h800?"), ("4090", "did you mean rtx4090?"), ("quantum", "the table has h800")],
)
def test_an_unknown_device_is_named_with_the_nearest(name: str, says: str) -> None:
    with pytest.raises(SlingshotError, match="no device is called") as caught:
        device(name)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_dtype_is_named_with_the_nearest() -> None:
    with pytest.raises(SlingshotError, match="did you mean bfloat16"):
        dtype_peak(device("a100"), "bf16")
    with pytest.raises(SlingshotError, match="a100 has no products in 'fp8'"):
        dtype_peak(device("a100"), "fp8")


def test_fp8_work_takes_each_part_s_own_time() -> None:
    """2 of FP8 work at rate 2 and 1 of bfloat16 work at rate 1 take 2 seconds, a rate of 1.5; the router and attention
    are not in FP8."""
    made = device("h800").model_copy(update={"peak": {"bfloat16": 1.0, "fp8": 2.0, "float32": 0.5}})
    parts = {"routed_experts": 1.5, "projections": 0.5, "attention": 0.75, "router": 0.25}
    assert mixed_peak(made, "fp8", parts) == 1.5
    v3 = forward_parts(ModelConfig.preset("deepseek-v3"), [2])
    alone = {part: mixed_peak(made, "fp8", {part: 1.0}) for part in v3}
    assert alone == {"projections": 2, "mlp": 2, "shared_experts": 2, "routed_experts": 2, "router": 1, "attention": 1,
                     "head": 1}  # fmt: skip
    assert mixed_peak(made, "bfloat16", {"routed_experts": 2.0, "attention": 1.0}) == 1.0
    assert mixed_peak(made, "fp8", {}) == 2.0


def test_local_is_this_machine_as_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SlingshotError, match="slingshot doctor"):
        device("local")
    cpu = describe().cpu
    save_measurement(f"{cpu}, 1 threads, torch 2.13.0", Measurement(peak={"float32": 2.0, "bfloat16": 3.0}))
    save_measurement("another processor, 1 threads, torch 2.13.0", Measurement(peak={"float32": 99.0}, bandwidth=99.0))
    longer = f"{cpu} of a longer name, 1 threads, torch 2.13.0"
    save_measurement(longer, Measurement(peak={"float32": 98.0}, bandwidth=98.0))
    with pytest.raises(SlingshotError, match="memory has not been measured"):
        device("local")
    save_measurement(f"{cpu}, 2 threads, torch 2.13.0", Measurement(peak={"float32": 4.0}, bandwidth=7.0))
    local = device("local")
    assert local.peak == {"float32": 4.0, "bfloat16": 3.0} and local.bandwidth == 7.0
    assert local.memory_bytes == describe().memory_bytes and local.price is None
