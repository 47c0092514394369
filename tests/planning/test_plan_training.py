"""cost/plan_training.py: bills that add up, rates from any of their sources, layouts that fit or say what would, monotony, nonsense refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import DEVICES, device
from slingshot.cost.flops import decode_parts, parameters, prefill_parts, training_flops
from slingshot.model.config import ModelConfig
from slingshot.planning.plan import ASSUMED_MFU, Plan
from slingshot.planning.plan_training import plan_distill, plan_pretrain, plan_rl

LLAMA = ModelConfig.preset("llama-3.1-8b")
V3 = ModelConfig.preset("deepseek-v3")
MOONLIGHT = ModelConfig.preset("moonlight-16b-a3b")
H100 = device("h100")


def pretrain(config: ModelConfig = LLAMA, on: str = "h100", count: int = 64, **settings: Any) -> Any:
    return plan_pretrain(config, "it", device(on), count, **{"tokens": 1e12} | settings)


def rl(config: ModelConfig = LLAMA, on: str = "h100", count: int = 64, **settings: Any) -> Any:
    return plan_rl(config, "it", device(on), count, **{"steps": 100, "response": 2000, "longest": 16384} | settings)


def distill(config: ModelConfig = LLAMA, on: str = "h100", count: int = 64, **settings: Any) -> Any:
    given = {"teacher": MOONLIGHT, "teacher_name": "moonlight", "samples": 1e5, "response": 4000}
    return plan_distill(config, "it", device(on), count, **given | settings)


def test_pretraining_by_hand() -> None:
    """8B parameters, a tenth of a T tokens at 400 TFLOP/s on 64 devices of $2."""
    plan = pretrain(tokens=1e11, tflops=400, price=2.0)
    flops = training_flops(LLAMA, [4096]) / 4096 * 1e11
    assert plan.flops == pytest.approx(flops)
    assert plan.device_hours == pytest.approx(flops / 400e12 / 3600)
    assert plan.days == pytest.approx(plan.device_hours / 64 / 24)
    assert plan.money == pytest.approx(2 * plan.device_hours)
    assert plan.energy_kwh == pytest.approx(0.7 * plan.device_hours)
    assert plan.mfu == plan.mfu_of_bfloat16 == pytest.approx(400 / 989.4)
    assert plan.six_nd_flops == 6 * parameters(LLAMA).total * 1e11
    assert plan.tokens_per_day == pytest.approx(1e11 / plan.days)
    assert plan.dense_equivalent is None and plan.nearest_fit is None and plan.fits


@pytest.mark.parametrize("make", [pretrain, rl, distill])
def test_plans_add_up_and_are_json(make: Any) -> None:
    plan: Plan = make()
    assert plan.device_hours == pytest.approx(sum(stage.device_hours for stage in plan.stages))
    assert plan.money == pytest.approx(sum(stage.money or 0 for stage in plan.stages))
    assert plan.days == pytest.approx(sum(stage.days for stage in plan.stages))
    assert plan.memory_per_device_bytes == plan.memory.total and plan.fits == (
        plan.memory.total <= plan.usable_memory_bytes
    )
    if plan.kind != "pretrain":
        assert sum(plan.flops_by_part.values()) == pytest.approx(plan.flops)
    found = json.loads(json.dumps(plan.model_dump(mode="json"), allow_nan=False))
    assert {
        "device_hours",
        "days",
        "money",
        "flops",
        "memory_per_device_bytes",
        "fits",
        "stages",
        "assumptions",
        "dominates",
    } <= found.keys()
    assert type(plan).model_validate(found) == plan


@pytest.mark.parametrize("make", [pretrain, rl, distill])
def test_every_assumption_is_listed(make: Any) -> None:
    """The rate, the layout, the price and the share of memory, and that they were assumed, given or the table's."""
    text = "\n".join(make().assumptions)
    assert (
        "MFU 40.0%, assumed" in text
        and "layout: " in text
        and "the table's example" in text
        and "90.0% of 80 GiB" in text
        and "700 W" in text
    )
    text = "\n".join(make(mfu=0.3, price=5).assumptions)
    assert "MFU 30.0%, as given" in text and "5 per h100 hour, as given" in text


def test_the_rate_may_come_from_any_of_three() -> None:
    by_mfu = pretrain(mfu=0.4)
    assert pretrain().device_hours == by_mfu.device_hours  # 40% is what is assumed in bfloat16
    assert pretrain(tflops=0.4 * 989.4).device_hours == pytest.approx(by_mfu.device_hours)
    by_hours = pretrain(hours=by_mfu.device_hours)
    assert by_hours.mfu == pytest.approx(0.4) and by_hours.device_hours == pytest.approx(by_mfu.device_hours)


def test_mtp_stands_on_a_line_of_its_own() -> None:
    """Its FLOPs are in no rate, so it adds none to the hours; without the module there is no line."""
    plan = pretrain(V3, "h800", 2048, tflops=385)
    line = plan.stages[1]
    assert "MTP" in line.name and line.device_hours == 0 and line.flops == plan.flops_by_part["mtp"]
    with_mtp, without = training_flops(V3, [4096]), training_flops(V3, [4096], mtp=False)
    assert line.flops == pytest.approx((with_mtp - without) / 4096 * 1e12)
    assert (
        plan.flops
        == pytest.approx(without / 4096 * 1e12)
        == pytest.approx(sum(plan.flops_by_part.values()) - line.flops)
    )
    none = pretrain(V3.model_copy(update={"num_nextn_predict_layers": 0}), "h800", 2048, tflops=385)
    assert none.device_hours == pytest.approx(plan.device_hours) and len(none.stages) == 1


def test_known_stages_are_further_lines() -> None:
    plan = pretrain(stages={"context extension": 1000.0})
    assert plan.stages[-1].device_hours == 1000 and plan.device_hours == pytest.approx(pretrain().device_hours + 1000)
    # They stay as they are on other devices.
    here, a100 = (next(other for other in plan.alternatives if other.device == name) for name in ("h100", "a100"))
    assert pretrain().alternatives[0].device == here.device == "h100" and here.precision == "fp8"
    assert here.device_hours == pytest.approx(pretrain().alternatives[0].device_hours + 1000)
    assert a100.device_hours == pytest.approx((plan.device_hours - 1000) * 989.4 / 312 + 1000)


def test_fp8_and_bfloat16_are_compared_at_each_part_s_rate() -> None:
    plan = pretrain(V3, "h800", 2048, mfu=0.2)
    here, sixteen = (
        other for other in plan.alternatives if other.device == "h800" and other.precision in ("fp8", "bfloat16")
    )
    assert here.device_hours == pytest.approx(plan.device_hours) and plan.precision == "fp8"
    assert 1.5 < sixteen.device_hours / here.device_hours < 2
    listed = {other.device for other in plan.alternatives}
    assert listed == DEVICES.keys()
    assert not any(other.fits for other in pretrain(V3, "h800", 8).alternatives if other.device == "rtx4090")


def test_the_dense_model_of_equal_loss_costs_more() -> None:
    plan = pretrain(V3, "h800", 2048, tokens=14.8e12, tflops=385)
    assert plan.dense_equivalent is not None and "2502.05172" in plan.dense_equivalent.rule
    assert plan.dense_device_hours == pytest.approx(plan.dense_equivalent.ratio * plan.device_hours)


def test_a_given_layout_is_kept_and_the_rest_chosen() -> None:
    plan = pretrain(V3, "h800", 2048, ways={"tp": 1, "pp": 16, "ep": 64})
    assert (plan.layout.tp, plan.layout.pp, plan.layout.ep, plan.layout.dp) == (1, 16, 64, 128)
    assert plan.fits and "chosen" not in " ".join(plan.assumptions)
    wide = pretrain(count=64, ways={"tp": 16})
    assert wide.layout.tp == 16  # beyond a node, where nothing would be chosen


def test_the_chosen_layout_lets_no_less_through_than_others_that_fit() -> None:
    """Of a 70B model on 64 devices: within the few percent that recomputation is guessed to cost."""
    config = ModelConfig.preset("llama-3.1-70b")
    chosen = pretrain(config)
    assert chosen.fits
    others = [pretrain(config, ways={"tp": tp, "pp": pp}) for tp in (1, 4, 8) for pp in (1, 2, 8)]
    bounds = [other.tflops_bound for other in others if other.fits]
    assert pretrain().layout.recompute == "none"  # an 8B model has room, so nothing is computed twice
    assert len(bounds) > 3 and min(bounds) < 0.8 * chosen.tflops_bound and max(bounds) < 1.1 * chosen.tflops_bound


@pytest.mark.parametrize(
    ("config", "on", "count", "ways"),
    [
        ("llama-3.1-405b", "h100", 2048, {"tp": 8}),
        ("llama-3.1-405b", "h100", 2048, {"tp": 8, "zero": 0}),
        ("llama-3.1-405b", "h100", 4096, {"tp": 16}),
        ("llama-3.1-8b", "h200", 1, {}),
        ("llama-3.1-8b", "h200", 1, {"zero": 1}),
    ],
)
def test_a_given_way_leaves_the_rest_to_be_chosen(config: str, on: str, count: int, ways: dict[str, Any]) -> None:
    plan = pretrain(ModelConfig.preset(config), on, count, ways=ways)
    assert plan.fits and all(getattr(plan.layout, name) == value for name, value in ways.items())


def test_without_zero_a_small_model_is_still_data_parallel() -> None:
    assert pretrain(ModelConfig.preset("qwen3-0.6b"), count=8, ways={"zero": 0}).layout.dp == 8


def test_zero_asked_for_shards_something_where_that_fits() -> None:
    assert pretrain(count=16, ways={"zero": 3}).layout.dp > 1


def test_a_layout_that_waits_for_its_memory_is_not_the_fastest() -> None:
    """V3 on 2048 devices in 32 stages with EP8, on few links, reads its many experts for every one of 128 microbatches."""
    reading = pretrain(V3, "h800", 2048, ways={"tp": 4, "pp": 32, "ep": 8, "zero": 1, "recompute": "none"})
    assert reading.fits and reading.dominates.dominant == "memory traffic"
    assert pretrain(V3, "h800", 2048).tflops_bound > 1.2 * reading.tflops_bound


def test_the_assumed_batch_is_at_most_the_run() -> None:
    """A million tokens are 244 sequences of 4096: fewer than 2,048 devices, so they cannot all be data parallel."""
    plan = pretrain(count=2048, tokens=1e6)
    assert plan.batch_tokens == 244 * 4096 and 1 <= plan.optimizer_steps < 1.01 and plan.layout.dp <= 244
    assert "no more whole sequences" in " ".join(plan.assumptions)
    assert pretrain(count=2048, tokens=1e6, batch=plan.batch_tokens).layout == plan.layout
    assert pretrain(count=128, tokens=1e6).batch_tokens == 128 * 4096


def test_sequences_beyond_the_model_s_own_and_hours_given_are_assumptions() -> None:
    assert any(
        "1e+06 tokens, though the model is made for 131072" in line for line in pretrain(context=1_000_000).assumptions
    )
    assert any("though the model is made for" in line for line in rl(longest=200_000.0).assumptions)
    assert not any("though the model" in line for line in [*pretrain(context=131_072).assumptions, *rl().assumptions])
    assert "hours given are the same on every device" in pretrain(stages={"more": 5.0}).assumptions
    assert "hours given are the same on every device" not in pretrain().assumptions


def test_the_nearest_rate_named_is_one_that_is_taken() -> None:
    for asked, read in (
        ({"tflops": 5000.0}, float),
        ({"hours": 1.0}, lambda text: float(text.removesuffix(" hours").replace(",", ""))),
    ):
        with pytest.raises(SlingshotError) as refused:
            plan_pretrain(V3, "v3", device("h800"), 2048, tokens=14.8e12, **asked)
        nearest = read(str(refused.value).rpartition("the nearest valid value is ")[2])
        plan_pretrain(V3, "v3", device("h800"), 2048, tokens=14.8e12, **{key: nearest for key in asked})


def test_a_precision_may_be_written_short() -> None:
    assert [pretrain(precision=short).precision for short in ("bf16", "FP32", "half")] == [
        "bfloat16",
        "float32",
        "float16",
    ]


def test_a_pipeline_stands_idle_while_it_fills() -> None:
    """Four stages and 16 microbatches of a sequence: 3 of 19 turns."""
    plan = pretrain(count=4, batch=16 * 4096, ways={"pp": 4, "tp": 1})
    assert plan.bubble == pytest.approx(3 / 19) and plan.dominates.dominant == "compute"
    step = 16 * training_flops(LLAMA, [4096]) / 4 / plan.tflops_bound / 1e12
    assert step == pytest.approx(plan.dominates.compute_seconds * 19 / 16)


def test_what_does_not_fit_says_what_would() -> None:
    plan = pretrain(V3, "h800", 8)
    assert not plan.fits and plan.nearest_fit is not None and plan.nearest_fit.device == "h800"
    assert plan.nearest_fit.count > 8
    there = pretrain(V3, "h800", plan.nearest_fit.count)
    assert there.fits
    assert not pretrain(V3, "h800", plan.nearest_fit.count // 2).fits
    # More of the same cannot help one device that has no neighbours, so another device is named.
    alone = DEVICES["rtx4090"].model_copy(update={"network": 0.0})
    plan = plan_pretrain(LLAMA, "it", alone, 1, tokens=1e9)
    assert not plan.fits and plan.nearest_fit is not None and plan.nearest_fit.device == "h800"


def test_a_given_layout_that_does_not_fit_names_one_that_does() -> None:
    plan = pretrain(count=8, ways={"tp": 1, "pp": 1, "zero": 0, "recompute": "none"})
    assert not plan.fits and plan.nearest_fit is not None and plan.nearest_fit.count == 8


def test_what_dominates_is_the_longest() -> None:
    for plan in (pretrain(), pretrain(V3, "h800", 2048), rl(), distill()):
        found = plan.dominates
        times = {
            "compute": found.compute_seconds,
            "memory traffic": found.memory_traffic_seconds,
            "network": found.network_seconds,
        }
        ranked = sorted(times.values(), reverse=True)
        assert times[found.dominant] == ranked[0] and found.factor == pytest.approx(ranked[0] / ranked[1])


def test_a_rate_the_layout_cannot_let_through_is_said() -> None:
    """DeepSeek-V3's layout lets its rate through on InfiniBand; with a tenth of the network it does not."""
    ways = {"tp": 1, "pp": 16, "ep": 64}
    plan = pretrain(V3, "h800", 2048, tflops=385, batch=15360 * 4096, ways=ways)
    assert plan.tflops_bound > 385 and "lets through" not in " ".join(plan.assumptions)
    step = 15360 * 4096 * training_flops(V3, [4096], mtp=False) / 4096 / 2048 / plan.tflops_bound / 1e12
    found = plan.dominates
    assert step == pytest.approx(
        max(found.compute_seconds / (1 - plan.bubble), found.memory_traffic_seconds, found.network_seconds)
    )
    slow = DEVICES["h800"].model_copy(update={"network": 5e9})
    plan = plan_pretrain(V3, "it", slow, 2048, tokens=1e12, tflops=385, batch=15360 * 4096, ways=ways)
    assert plan.tflops_bound < 385 and "the rate is more than this layout lets through" in " ".join(plan.assumptions)


def test_rl_by_hand() -> None:
    """100 steps of 32 x 16 responses of 2,000 tokens after prompts of 200: trained on once, and passed once through the reference.

    With a cap far off lengths are exponential, so their mean square is 2 x 2,000^2: in the mean over tokens a row is (200^2 + 2 x 200 x 2,000 +
    8e6) / 2,200 = 4,018 long, and a token decoded meets 200 + 8e6 / 4,000 = 2,200 keys.
    """
    plan = rl(tflops=400, longest=1e6)
    assert plan.responses == 51_200 and plan.rounds == 100 and plan.tokens == 51_200 * 2200
    forward = training_flops(LLAMA, [4018]) / 3 / 4018
    assert plan.stages[2].device_hours == pytest.approx((3 + 1) * forward * plan.tokens / 400e12 / 3600)
    assert plan.stages[2].flops == pytest.approx(4 * forward * plan.tokens)
    assert plan.stages[0].flops == pytest.approx(sum(decode_parts(LLAMA, 2200, 51_200 * 2000).values()), rel=1e-3)
    assert plan.stages[0].device_hours == pytest.approx(100 * plan.round_seconds * 64 / 3600)
    assert plan.stages[1].device_hours == pytest.approx(100 * 0.1 * 64 / 3600)  # 512 responses on 1,024 cores
    assert rl(tflops=400, longest=1e6, forwards=0).stages[2].device_hours == pytest.approx(
        plan.stages[2].device_hours * 3 / 4
    )


def test_spread_lengths_cost_more_attention_than_their_mean() -> None:
    """V3 at a mean of 8K and a cap of 32K: 1.42 times the FLOPs of decoding and 1.18 times those of the update."""
    plan = rl(V3, "h800", 512, response=8000, longest=32_768)
    responses, tokens = 51_200, 51_200 * 8200
    flat = 4 * training_flops(V3, [8200], mtp=False) / 3 / 8200 * tokens
    assert plan.stages[2].flops / flat == pytest.approx(1.18, abs=0.01)
    assert plan.stages[0].flops / sum(decode_parts(V3, 4200, responses * 8000).values()) == pytest.approx(
        1.42, abs=0.01
    )


@pytest.mark.parametrize(("workers", "waits"), [(8192, 1), (512, 1), (511, 2), (100, 6)])
def test_a_round_is_not_verified_faster_than_its_cores_verify_a_response(workers: int, waits: int) -> None:
    plan = rl(count=512, verify_workers=workers, verify_seconds=60)
    assert plan.stages[1].days * 86400 == pytest.approx(100 * 60 * waits)


def test_a_last_round_of_few_takes_its_own_time() -> None:
    """17 steps of 32 responses, 512 at once: a full round, and one of 32, which alone would wait for its longest as well."""
    plan, full, rest = (rl(steps=steps, prompts=2, rollout=512, devices_per_copy=8) for steps in (17, 16, 1))
    assert (plan.rounds, full.rounds, rest.rounds) == (2, 1, 1) and "the last of 32" in plan.stages[0].note
    assert plan.stages[0].device_hours == pytest.approx(full.stages[0].device_hours + rest.stages[0].device_hours)
    assert rest.stages[0].device_hours > 0.3 * full.stages[0].device_hours


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (pretrain, {"price": 5.0, "stages": {"more": 1000.0}}),
        (pretrain, {"precision": "float16"}),
        (
            pretrain,
            {"count": 8, "ways": {"tp": 1, "pp": 1, "zero": 0, "recompute": "none"}},
        ),  # does not fit, though another layout does
        (rl, {"price": 5.0, "devices_per_copy": 8}),
        (rl, {"config": V3, "on": "h800", "count": 512, "devices_per_copy": 64}),
        (distill, {"price": 5.0, "teacher": V3, "on": "h800", "devices_per_copy": 64}),
        (distill, {"teacher_precision": "float32"}),
    ],
)
def test_a_plan_s_own_row_is_its_bill(make: Any, settings: dict[str, Any]) -> None:
    plan: Plan = make(**settings)
    (own,) = (other for other in plan.alternatives if (other.device, other.precision) == (plan.device, plan.precision))
    assert (own.device_hours, own.days, own.money, own.fits) == (plan.device_hours, plan.days, plan.money, plan.fits)
    for other in plan.alternatives:
        if other.device == plan.device:
            assert plan.price is not None and other.money == pytest.approx(
                other.device_hours * plan.price
            )  # here an hour costs what was given


@pytest.mark.parametrize(("make", "settings"), [(rl, {}), (distill, {}), (distill, {"teacher": V3, "on": "h800"})])
def test_sampling_elsewhere_is_what_a_plan_there_says(make: Any, settings: dict[str, Any]) -> None:
    """The teacher in its own precision, V3's FP8, where a device has it."""
    plan = make(**settings, mfu=0.4)
    for other in plan.alternatives:
        if other.fits and other.precision == "bfloat16":
            there = make(**settings | {"on": other.device}, mfu=0.4, precision="bfloat16")
            assert other.device_hours == pytest.approx(there.device_hours) and other.money == pytest.approx(there.money)
    listed = {
        (other.device, other.precision): other.fits for other in make(config=V3, on="h800", count=256).alternatives
    }
    assert listed["h800", "fp8"] and not listed["rtx4090", "bfloat16"]


def test_fewer_larger_rollouts_wait_less_for_the_longest() -> None:
    assert rl(rollout=5120).stages[0].device_hours < rl().stages[0].device_hours
    assert rl(rollout=5120).rounds == 10


def test_distillation_pays_for_what_is_thrown_away_once_and_for_what_is_kept_twice() -> None:
    plan, picky = distill(epochs=2), distill(epochs=2, accepted=0.25)
    assert picky.stages[0].device_hours == pytest.approx(4 * plan.stages[0].device_hours, rel=0.05)
    assert (
        picky.stages[1].device_hours
        == plan.stages[1].device_hours
        == pytest.approx(2 * distill(epochs=1).stages[1].device_hours)
    )
    assert picky.sampled == 4e5 and picky.kept == 1e5


def test_distillation_counts_reading_the_prompts() -> None:
    plan = distill(prompt=1000.0, accepted=0.5)
    read, written = sum(prefill_parts(MOONLIGHT, 1000).values()), sum(decode_parts(MOONLIGHT, 3000, 4000).values())
    assert plan.stages[0].flops == plan.flops_by_part["sampling"] == pytest.approx(2e5 * (read + written))
    assert "prompts read at 40.0%" in " ".join(plan.assumptions)


@given(
    st.sampled_from([LLAMA, MOONLIGHT]),
    st.integers(1, 9),
    st.floats(1e8, 1e13),
    st.sampled_from(["h800", "a100", "mi300x"]),
)
@settings(derandomize=True, deadline=None, max_examples=20)
def test_more_devices_never_take_more_days_and_more_tokens_never_fewer(
    config: ModelConfig, power: int, tokens: float, on: str
) -> None:
    one, twice = (
        plan_pretrain(config, "it", device(on), count, tokens=tokens) for count in (2**power, 2 ** (power + 1))
    )
    assert twice.days <= one.days * (1 + 1e-9) and twice.device_hours == pytest.approx(one.device_hours)
    more = plan_pretrain(config, "it", device(on), 2**power, tokens=1.5 * tokens)
    assert more.days > one.days and more.money is not None and one.money is not None and more.money > one.money
    assert one.layout.devices == 2**power


@given(st.floats(0.01, 1), st.floats(0.01, 1))
@settings(derandomize=True, deadline=None, max_examples=10)
def test_a_better_mfu_never_costs_more(first: float, second: float) -> None:
    low, high = sorted((first, second))
    assert pretrain(mfu=high).device_hours <= pretrain(mfu=low).device_hours


@given(st.integers(1, 64), st.floats(10, 8000))
@settings(derandomize=True, deadline=None, max_examples=6)
def test_longer_responses_never_cost_less(group: int, response: float) -> None:
    plan, longer = (rl(group=group, response=length) for length in (response, response * 1.2))
    assert longer.device_hours >= plan.device_hours and math.isfinite(longer.device_hours)


@pytest.mark.parametrize(
    ("make", "settings", "says"),
    [
        (pretrain, {"count": 0}, "the nearest valid count is 1"),
        (pretrain, {"tokens": -1.0}, "did you mean 1?"),
        (pretrain, {"tokens": 0.0}, "must be more than 0"),
        (pretrain, {"tokens": math.nan}, "must be more than 0"),
        (pretrain, {"price": -1.0}, "the nearest valid value is 0"),
        (pretrain, {"mfu": 1.5}, "the nearest valid value is 1"),
        (pretrain, {"mfu": 0.4, "tflops": 300.0}, "give one of them"),
        (pretrain, {"tflops": 5000.0}, "the nearest valid value is 989.4"),
        (pretrain, {"hours": 1.0}, "the nearest valid value is 13,547 hours"),
        (pretrain, {"context": 1}, "the nearest valid value is 2"),
        (pretrain, {"context": 0}, "the nearest valid value is 2"),
        (pretrain, {"batch": 3.0}, "the nearest valid value is 4096"),
        (pretrain, {"batch": 1e13}, "the nearest valid value is 1e+12"),
        (pretrain, {"tokens": 100.0}, "fewer than one sequence of 4096; the nearest valid value is 4096"),
        (pretrain, {"batch": 4096.0, "ways": {"tp": 1, "pp": 1}}, "the nearest valid batch is 262144"),
        (
            pretrain,
            {"tokens": 1e5, "ways": {"tp": 1, "pp": 1}},
            "the nearest valid batch is 262144, in a run of at least as many tokens",
        ),
        (pretrain, {"ways": {"tp": 3}}, "the nearest valid value is 2"),
        (pretrain, {"ways": {"ep": 2}}, "no experts"),
        (pretrain, {"precision": "fp4"}, "did you mean fp8?"),
        (pretrain, {"precision": "int8"}, "nothing is trained in it"),
        (pretrain, {"on": "a100", "precision": "fp8"}, "it multiplies in float32, bfloat16"),
        (pretrain, {"stages": {"more": -2.0}}, "did you mean 2?"),
        (rl, {"steps": 0}, "steps 0: must be more than 0"),
        (rl, {"response": 20_000}, "needs a longer cap than 16384"),
        (rl, {"forwards": -1}, "must not be negative"),
        (rl, {"devices_per_copy": 3}, "the nearest valid value is 2"),
        (rl, {"config": V3, "on": "h800", "count": 8}, "the nearest that do are 16 x h800"),
        (distill, {"accepted": 0.0}, "must be more than 0"),
        (distill, {"accepted": 1.5}, "the nearest valid value is 1"),
        (distill, {"epochs": -1}, "did you mean 1?"),
        (distill, {"teacher": V3, "on": "rtx4090", "count": 4}, "the nearest that do are"),
    ],
)
def test_nonsense_is_one_line_with_the_nearest_valid_choice(make: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SlingshotError) as caught:
        make(**settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_assumed_mfu_is_a_share_for_every_precision() -> None:
    assert all(0 < mfu < 1 for mfu in ASSUMED_MFU.values())
    assert "arXiv 2505.09343" in pretrain(V3, "h800", 2048).assumptions[0]
