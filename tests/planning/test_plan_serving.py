"""cost/plan_serving.py: costs by hand, latency kept, copies chosen, margins and break-even that agree with the bill, nonsense refused."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import device
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS
from slingshot.planning.plan import ServePlan
from slingshot.planning.plan_serving import plan_serve, sampling_fleet
from slingshot.planning.throughput import Fleet, Lengths, round_seconds

LLAMA = ModelConfig.preset("llama-3.1-8b")
V3 = ModelConfig.preset("deepseek-v3")


def serve(config: ModelConfig = LLAMA, on: str = "h100", count: int | None = None, **settings: Any) -> ServePlan:
    return plan_serve(config, "it", device(on), count, **settings)


def test_costs_by_hand() -> None:
    plan = serve(devices_per_copy=1, price=3.6, prompt=4000, response=1000)
    it = Fleet(LLAMA, device("h100"), PRECISIONS["bfloat16"], 1)
    writing = it.step_seconds(plan.batch, 4500) / plan.batch
    assert plan.tokens_per_second_per_device == pytest.approx(1 / writing)
    assert plan.output_cost_per_million == pytest.approx(1e6 * writing * 0.001)
    reading = it.prefill_seconds(4000, 0.0, 0.4)
    assert plan.prompt_tokens_per_second_per_device == pytest.approx(4000 / reading)
    assert plan.prompt_cost_per_million == pytest.approx(1e6 * reading / 4000 * 0.001)
    assert plan.cost_by_hit_share[0].blended == pytest.approx(1e6 * (reading + 1000 * writing) / 5000 * 0.001)
    assert plan.count == 1 and plan.device_hours == 24 and plan.money == pytest.approx(24 * 3.6)


def test_the_latency_is_kept_by_the_largest_batch_that_keeps_it() -> None:
    for latency in (0.02, 0.05):
        plan = serve(devices_per_copy=1, latency=latency)
        assert 1 / plan.tokens_per_second_per_user <= latency
        chosen = next(point for point in plan.curve if point.batch == plan.batch)
        assert chosen.within_latency and chosen.fits
        assert not (plan.curve[-1].within_latency and plan.curve[-1].fits)
    assert serve(devices_per_copy=1, latency=0.05).batch > serve(devices_per_copy=1, latency=0.02).batch


def test_a_latency_nothing_keeps_is_seen_in_the_plan() -> None:
    plan = serve(latency=1e-5)
    assert plan.batch == 1 and plan.tokens_per_second_per_user < 1e5 and not plan.curve[0].within_latency


def test_the_chosen_copy_writes_most_in_time() -> None:
    plan = serve(V3, "h800")
    for ways in (16, 32, 64, 128):
        assert serve(
            V3, "h800", devices_per_copy=ways
        ).tokens_per_second_per_device <= plan.tokens_per_second_per_device * (1 + 1e-9)
    assert plan.fits and plan.devices_per_copy >= 16


@pytest.mark.parametrize(
    ("name", "device_name", "largest"),
    [
        ("qwen2.5-1.5b", "h100", 4),
        ("qwen2.5-7b", "h100", 4),
        ("smollm2-135m", "h100", 1),
        ("qwen3-0.6b", "h100", 16),
        ("llama-3.1-405b", "h100", 128),
    ],
)
def test_a_chosen_copy_parts_its_heads_evenly_and_has_room(name: str, device_name: str, largest: int) -> None:
    config = ModelConfig.preset(name)
    plan = serve(config, device_name)
    assert plan.devices_per_copy <= largest and config.num_attention_heads % plan.devices_per_copy == 0 and plan.fits
    heads = max(1, config.num_key_value_heads // plan.devices_per_copy)  # on a device
    sequences = plan.batch * plan.devices_per_copy
    assert plan.memory.cache == sequences * 4500 * heads * 2 * config.head_dim * config.num_hidden_layers * 2


def test_sampling_takes_the_copy_that_writes_most_at_its_batch() -> None:
    """A few sequences a device are written fastest where a copy's weights are spread widest; with a given size that is kept."""
    fp8, usable = PRECISIONS["fp8"], 72 * 2.0**30
    for batch in (1.0, 40.0, 80.0, math.inf):
        copies, best = sampling_fleet(V3, device("h800"), fp8, 512, None, 8000, batch, 0.46)
        assert copies * best.devices == 512
        tokens = {}
        for size in (16, 32, 64, 128, 256):
            it = Fleet(V3, device("h800"), fp8, size)
            held = min(batch, it.largest_batch(8000, usable))
            tokens[size] = held / it.step_seconds(held, 8000)
        assert tokens[best.devices] == max(tokens.values())
    assert sampling_fleet(V3, device("h800"), fp8, 512, 16, 8000, 1, 0.46)[1].devices == 16


def test_sampling_a_round_takes_the_copies_that_end_it_first_and_more_devices_never_take_longer() -> None:
    lengths, usable, times = Lengths(4000, 16384), 72 * 2.0**30, []

    def seconds(copies: int, fleet: Fleet) -> float:
        return round_seconds(fleet, 512, copies, 200, lengths, usable)

    for count in range(1, 10):
        copies, best = sampling_fleet(
            LLAMA, device("h100"), PRECISIONS["bfloat16"], count, None, 4200, 512 / count, 0.46, seconds
        )
        times.append(seconds(copies, best))
        assert copies * best.devices <= count
        sizes = [size for size in (1, 2, 4, 8) if size <= count]
        assert times[-1] == min(
            seconds(count // size, Fleet(LLAMA, device("h100"), PRECISIONS["bfloat16"], size)) for size in sizes
        )
    assert times == sorted(times, reverse=True)


def test_what_does_not_fit_says_what_would() -> None:
    plan = serve(V3, "h800", 8)
    assert (
        not plan.fits
        and plan.nearest_fit is not None
        and (plan.nearest_fit.device, plan.nearest_fit.count) == ("h800", 16)
    )
    alone = device("cpu").model_copy(update={"network": 0.0, "memory_bytes": 2.0**34})
    plan = plan_serve(V3, "it", alone, 1, precision="bfloat16")
    assert not plan.fits and plan.nearest_fit is not None and plan.nearest_fit.device == "h800"


def test_a_day_of_traffic_sizes_the_fleet() -> None:
    plan = serve(
        input_tokens=1e12,
        output_tokens=1e11,
        prompt=4000,
        response=400,
        price=2.0,
        prices=(0.1, 0.2, 0.4),
        devices_per_copy=4,
        hit_share=0.5,
    )
    day = plan.day
    assert day is not None and plan.count % 4 == 0 and plan.count - 4 < day.devices_needed <= plan.count
    seconds = 1e11 / plan.tokens_per_second_per_device + 1e12 / plan.prompt_tokens_per_second_per_device
    assert day.devices_needed == pytest.approx(seconds / 86400) and day.utilisation == pytest.approx(
        day.devices_needed / plan.count
    )
    assert day.cost == plan.money == pytest.approx(plan.count * 48)
    assert day.revenue == pytest.approx((1e12 * 0.15 + 1e11 * 0.4) / 1e6)
    assert day.margin == pytest.approx((day.revenue - day.cost) / day.cost)


def test_a_fleet_that_cannot_carry_the_day_is_refused_with_the_nearest_that_can() -> None:
    day = {"input_tokens": 608e9, "output_tokens": 168e9, "devices_per_copy": 144, "prices": (0.14, 0.55, 2.19)}
    enough = serve(V3, "h800", **day)
    assert (
        enough.count % 144 == 0
        and enough.day is not None
        and enough.count - 144 < enough.day.devices_needed <= enough.count
    )
    with pytest.raises(
        SlingshotError,
        match=f"160 x h800 do not carry this day's traffic.*the nearest count that does is {enough.count}$",
    ):
        serve(V3, "h800", 160, **day)
    assert serve(V3, "h800", enough.count, **day).money == enough.money
    # A machine without a network is one machine.
    alone = device("h100").model_copy(update={"network": 0.0, "per_node": 1, "link": 0.0})
    for count in (None, 1):
        with pytest.raises(
            SlingshotError, match=r"1 x h100 do not carry this day's traffic.*no more than 1 can be had"
        ):
            plan_serve(LLAMA, "it", alone, count, input_tokens=1e12, output_tokens=1e12)
    with pytest.raises(SlingshotError, match="no more than 10000000 can be had"):
        serve(input_tokens=1e308, output_tokens=1e308)


def test_a_little_traffic_takes_one_copy_of_the_smallest_size() -> None:
    plan = serve(V3, "h800", input_tokens=1e6, output_tokens=1e5)
    assert plan.count == plan.devices_per_copy == 16 and "fewest devices" in plan.assumptions[0]


def test_this_plan_s_row_among_the_alternatives_is_its_own_bill() -> None:
    """In whatever precision, at whatever price, at full speed or for a day's traffic on more devices than it needs."""
    day = {"input_tokens": 1e9, "output_tokens": 1e8}
    for asked in (
        {},
        {"price": 5.0},
        {"count": 64, "price": 5.0, **day},
        {"precision": "int8"},
        {"devices_per_copy": 2, **day},
        {"latency": 1e-6},
    ):
        plan = serve(**asked)
        own = [other for other in plan.alternatives if (other.device, other.precision) == (plan.device, plan.precision)]
        assert [(other.device_hours, other.money) for other in own] == [(plan.device_hours, plan.money)]
        assert own[0].fits == ("latency" not in asked)
    # The same devices in another precision cost the same an hour.
    found = next(other for other in serve(price=5.0).alternatives if (other.device, other.precision) == ("h100", "fp8"))
    assert found.money == pytest.approx(found.device_hours * 5)


def test_alternatives_carry_the_day_s_traffic_with_whole_copies() -> None:
    """What a plan there says, not what the fleet asked about could do; at full speed they serve what it does."""
    day = {"input_tokens": 3e9, "output_tokens": 1e9, "price": 1.0}
    for plan in (serve(**day), serve(count=1000, **day)):
        for other in plan.alternatives:
            if other.fits and other.precision == "bfloat16" and other.device != plan.device:
                there = serve(on=other.device, precision="bfloat16", **day)
                assert other.device_hours == pytest.approx(there.device_hours) and other.device_hours % 24 == 0
    plan = serve()
    tokens = plan.stages[0].tokens
    for other in plan.alternatives:
        if other.fits and other.precision == "bfloat16":
            there = serve(on=other.device, precision="bfloat16")
            assert other.device_hours == pytest.approx(tokens / there.stages[0].tokens * there.device_hours)


def test_devices_that_nothing_joins_hold_no_copy_together() -> None:
    alone = device("h100").model_copy(update={"network": 0.0, "per_node": 1, "link": 0.0})
    for day in ({}, {"input_tokens": 1e6, "output_tokens": 1e6}):
        with pytest.raises(
            SlingshotError, match="what joins several of them is not known; the nearest valid count is 1"
        ):
            plan_serve(LLAMA, "it", alone, None, devices_per_copy=2, **day)


def test_break_even_is_where_the_fleet_costs_what_buying_does() -> None:
    plan = serve(price=2.0, prices=(0.01, 0.02, 0.04), count=8)
    even = plan.break_even
    assert even is not None and plan.margin is not None
    assert plan.margin == pytest.approx(even.bought_per_million / even.made_per_million - 1)
    assert even.fleet_per_day == 8 * 48
    assert even.made_per_million == pytest.approx(plan.cost_by_hit_share[0].blended)
    assert even.fleet_tokens_per_day * even.made_per_million / 1e6 == pytest.approx(even.fleet_per_day)
    if even.tokens_per_day is not None:
        assert (
            even.tokens_per_day * even.bought_per_million / 1e6 == pytest.approx(even.fleet_per_day)
            and even.utilisation is not None
        )
        assert (
            even.utilisation == pytest.approx(even.tokens_per_day / even.fleet_tokens_per_day) and even.utilisation <= 1
        )
    # Where making costs more than buying even at full load there is no such point.
    never = serve(price=200.0, prices=(0.01, 0.02, 0.04)).break_even
    assert never is not None and never.tokens_per_day is None and never.made_per_million > never.bought_per_million


def test_plans_add_up_and_are_json() -> None:
    plan = serve(V3, "h800", 64, prices=(0.14, 0.55, 2.19), input_tokens=1e9, output_tokens=1e8)
    assert (
        plan.device_hours == pytest.approx(64 * 24) == pytest.approx(sum(stage.device_hours for stage in plan.stages))
    )
    assert sum(plan.flops_by_part.values()) == pytest.approx(plan.flops)
    found = json.loads(json.dumps(plan.model_dump(mode="json"), allow_nan=False))
    assert ServePlan.model_validate(found) == plan
    listed = " ".join(plan.assumptions)
    assert (
        "46% of the roofline" in listed
        and "cached prompt tokens are kept and fetched for nothing" in listed
        and "22.0% of the peak" in listed
    )
    assert (
        "latents are expanded anew" in listed
        and "80% of their rate" in listed
        and "latents" not in " ".join(serve().assumptions)
    )


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(["h800", "a100", "m3-ultra"]))
@settings(derandomize=True, deadline=None, max_examples=25)
def test_more_cache_hits_never_cost_more(first: float, second: float, on: str) -> None:
    low, high = sorted((first, second))
    few, many = (serve(on=on, devices_per_copy=1, hit_share=hit_share, price=1.0) for hit_share in (low, high))
    assert few.prompt_cost_per_million is not None and many.prompt_cost_per_million is not None
    assert many.prompt_cost_per_million <= few.prompt_cost_per_million * (1 + 1e-9)
    assert few.tokens_per_second_per_device <= few.bound_tokens_per_second_per_device


def test_without_a_price_there_is_no_money_and_a_line_that_says_so() -> None:
    plan = serve(on="m3-ultra", prices=(1, 1, 1))
    assert (
        plan.money is None
        and plan.margin is None
        and plan.cost_by_hit_share == []
        and "no price" in " ".join(plan.assumptions)
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"count": 0}, "the nearest valid count is 1"),
        ({"hit_share": 1.5}, "the nearest valid value is 1"),
        ({"hit_share": -0.5}, "the nearest valid value is 0"),
        ({"latency": 0.0}, "must be more than 0"),
        ({"prompt": -5.0}, "did you mean 5?"),
        ({"prompt": 1e300}, "the nearest valid values are 1.34218e+08 and 1000"),
        ({"response": 0.1}, "the nearest valid values are 4000 and 1"),
        ({"prices": (1.0, 2.0)}, "such as 0.14/0.55/2.19"),
        ({"prices": (1.0, 2.0, -3.0)}, "none negative"),
        ({"input_tokens": 1e9}, "give the other one too"),
        ({"input_tokens": -1.0, "output_tokens": 1.0}, "did you mean 1?"),
        ({"count": 4, "devices_per_copy": 8}, "the nearest valid value is 4"),
        ({"devices_per_copy": 3}, "32 attention heads and 8 of keys and values evenly; the nearest valid value is 2"),
        ({"devices_per_copy": 64}, "the nearest valid value is 32"),
        ({"config": ModelConfig.preset("qwen2.5-1.5b"), "devices_per_copy": 8}, "the nearest valid value is 6"),
        ({"devices_per_copy": 0}, "the nearest valid count is 1"),
        ({"precision": "fp4"}, "did you mean fp8?"),
        ({"mfu": 0.0}, "a share above 0"),
        ({"efficiency": -1.0}, "must be more than 0"),
    ],
)
def test_nonsense_is_one_line_with_the_nearest_valid_choice(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(SlingshotError) as caught:
        serve(**settings)
    assert says in str(caught.value) and "\n" not in str(caught.value)
