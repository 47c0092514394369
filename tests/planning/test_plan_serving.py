"""Serving by hand: costs, the latency kept, a day's traffic carried, make or buy; nonsense refused."""

from __future__ import annotations

import json
from math import prod
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.checkpoint.layout import layout
from slingshot.cost.devices import device
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS
from slingshot.planning.model_copy import ModelCopy
from slingshot.planning.plan_serving import plan_serve
from slingshot.planning.request import NamedModel, ServeRequest
from slingshot.quantization.formats import Scheme, is_packed

ON_V3 = {"model": "deepseek-v3", "device": "h800"}
MATRICES = 32 * (2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336)  # numbers of Llama-3.1-8B's blocks
ALONE = device("h100").model_copy(update={"network": 0.0, "per_node": 1, "link": 0.0})


def serve(**asked: Any) -> Any:
    return plan_serve(ServeRequest.parse({"model": "llama-3.1-8b", "device": "h100"} | asked))


def test_costs_by_hand() -> None:
    plan = serve(devices_per_copy=1, price=3.6, prompt=4000, response=1000)
    copy = ModelCopy(ModelConfig.preset("llama-3.1-8b"), device("h100"), PRECISIONS["bfloat16"], 1)
    writing, reading = copy.step_seconds(plan.batch, 4500) / plan.batch, copy.prefill_seconds(4000, 0.0, 0.4)
    assert plan.tokens_per_second_per_device == pytest.approx(1 / writing)
    assert plan.output_cost_per_million == pytest.approx(1e6 * writing * 0.001)
    assert plan.prompt_tokens_per_second_per_device == pytest.approx(4000 / reading)
    assert plan.prompt_cost_per_million == pytest.approx(1e6 * reading / 4000 * 0.001)
    assert plan.count == 1 and plan.device_hours == 24 and plan.money == pytest.approx(24 * 3.6)


def test_the_latency_is_kept_by_the_largest_batch_that_keeps_it() -> None:
    plans = [serve(devices_per_copy=1, latency=latency) for latency in (0.02, 0.05)]
    for plan in plans:
        assert 1 / plan.tokens_per_second_per_user <= plan.latency
        chosen = next(point for point in plan.curve if point["batch"] == plan.batch)
        assert chosen["within_latency"] and chosen["fits"]
        assert not (plan.curve[-1]["within_latency"] and plan.curve[-1]["fits"])
    assert plans[1].batch > plans[0].batch
    late = serve(latency=1e-5)
    assert late.batch == 1 and not late.curve[0]["within_latency"]


def test_the_chosen_copy_writes_most_in_time_and_has_room() -> None:
    plan = serve(**ON_V3)
    others = [serve(**ON_V3, devices_per_copy=size).tokens_per_second_per_device for size in (16, 32, 64, 128)]
    assert plan.fits and max(others) <= plan.tokens_per_second_per_device * (1 + 1e-9)
    small = serve(**ON_V3, count=8)
    assert not small.fits and (small.nearest_fit["device"], small.nearest_fit["count"]) == ("h800", 16)


def test_a_day_of_traffic_is_carried_by_whole_copies() -> None:
    traffic = {"input": 1e12, "output": 1e11, "prompt": 4000, "response": 400, "hit_share": 0.5}
    plan = serve(**traffic, price=2.0, prices="0.1/0.2/0.4", devices_per_copy=4)
    day = plan.day
    assert plan.count % 4 == 0 and plan.count - 4 < day["devices_needed"] <= plan.count
    seconds = 1e11 / plan.tokens_per_second_per_device + 1e12 / plan.prompt_tokens_per_second_per_device
    assert day["devices_needed"] == pytest.approx(seconds / 86400) == pytest.approx(day["utilisation"] * plan.count)
    assert day["cost"] == plan.money == pytest.approx(plan.count * 48)
    assert day["revenue"] == pytest.approx((1e12 * 0.15 + 1e11 * 0.4) / 1e6)
    assert day["margin"] == pytest.approx((day["revenue"] - day["cost"]) / day["cost"])
    little = serve(**ON_V3, input=1e6, output=1e5)
    assert little.count == little.devices_per_copy == 16 and "fewest devices" in little.assumptions[0]


def test_devices_that_cannot_carry_the_day_are_refused_with_the_nearest_that_can() -> None:
    day = ON_V3 | {"input": "608B", "output": "168B", "devices_per_copy": 144}
    enough = serve(**day)
    assert enough.count % 144 == 0 and enough.count - 144 < enough.day["devices_needed"] <= enough.count
    with pytest.raises(SlingshotError, match=f"160 x h800 do not carry .* nearest count that does is {enough.count}$"):
        serve(**day, count=160)
    for count in ({}, {"count": 1}):  # a machine without a network is one machine
        with pytest.raises(SlingshotError, match=r"1 x h100 do not carry .*no more than 1 can be had"):
            serve(device=ALONE, input=1e12, output=1e12, **count)
    with pytest.raises(SlingshotError, match="what joins several of them is not known"):
        serve(device=ALONE, devices_per_copy=2)


def test_break_even_is_where_the_devices_cost_what_buying_does() -> None:
    plan = serve(price=2.0, prices=(0.01, 0.02, 0.04), count=8)
    even = plan.break_even
    assert plan.margin == pytest.approx(even["bought_per_million"] / even["made_per_million"] - 1)
    assert even["devices_per_day"] == 8 * 48
    made = 4000 * plan.prompt_cost_per_million + 1000 * plan.output_cost_per_million
    assert even["made_per_million"] == pytest.approx(made / 5000)
    assert even["devices_tokens_per_day"] * even["made_per_million"] / 1e6 == pytest.approx(even["devices_per_day"])
    even = serve(price=2.0, prices=(1, 2, 4), count=8).break_even
    assert even["tokens_per_day"] * even["bought_per_million"] / 1e6 == pytest.approx(even["devices_per_day"])
    assert 1 >= even["utilisation"] == pytest.approx(even["tokens_per_day"] / even["devices_tokens_per_day"])
    # Where making costs more than buying even at full load there is no such point.
    never = serve(price=200.0, prices=(0.01, 0.02, 0.04)).break_even
    assert never["tokens_per_day"] is None and never["made_per_million"] > never["bought_per_million"]


def test_plans_add_up_are_json_and_list_what_they_assumed() -> None:
    plan = serve(**ON_V3, count=64, prices="0.14/0.55/2.19", input=1e9, output=1e8)
    assert plan.device_hours == 64 * 24 == pytest.approx(sum(stage.device_hours for stage in plan.stages))
    assert sum(plan.flops_by_part.values()) == pytest.approx(plan.flops)
    assert json.loads(json.dumps(plan.model_dump(mode="json"), allow_nan=False))["prices"] == [0.14, 0.55, 2.19]
    listed, dense = " ".join(plan.assumptions), " ".join(serve().assumptions)
    for wanted in ("46% of the roofline", "kept and fetched for nothing", "22.0% of the peak", "80% of their rate"):
        assert wanted in listed
    assert "latents are expanded anew" in listed and "latents" not in dense
    free = serve(device="m3-ultra", prices=(1, 1, 1))
    assert free.money is free.margin is None is free.output_cost_per_million
    assert "no price" in " ".join(free.assumptions)


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.sampled_from(["h800", "a100", "m3-ultra"]))
@settings(max_examples=20)
def test_more_cache_hits_never_cost_more(first: float, second: float, on: str) -> None:
    low, high = sorted((first, second))
    few, many = (serve(device=on, devices_per_copy=1, hit_share=share, price=1.0) for share in (low, high))
    assert many.prompt_cost_per_million <= few.prompt_cost_per_million * (1 + 1e-9)
    assert few.tokens_per_second_per_device <= few.bound_tokens_per_second_per_device


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"count": 0}, "the nearest is 1"), ({"hit_share": 1.5}, "a share lies between 0 and 1"),
        ({"latency": 0.0}, "must be more than 0"), ({"prompt": -5.0}, "did you mean 5.0?"),
        ({"prompt": 1e29}, "less than or equal to 134217728"), ({"response": 0.1}, "greater than or equal to 1"),
        ({"prices": "1/2"}, "such as 0.14/0.55/2.19"), ({"prices": (1.0, 2.0, -3.0)}, "must not be negative"),
        ({"input": 1e9}, "give the other one too"),
        ({"count": 4, "devices_per_copy": 8}, "the nearest valid value is 4"),
        ({"devices_per_copy": 3}, "32 attention heads and 8 of keys and values evenly; the nearest valid value is 2"),
        ({"model": "qwen2.5-1.5b", "devices_per_copy": 8}, "the nearest valid value is 6"),
        ({"precision": "fp4"}, "did you mean fp8?"), ({"efficiency": -1.0}, "must not be negative"),
        ({"mfu": "inf"}, "not a number"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_with_the_nearest_valid_choice(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(SlingshotError) as caught:
        serve(**asked)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_few_bits_is_served_in_its_own_bytes_and_multiplied_in_sixteen() -> None:
    llama, plain = ModelConfig.preset("llama-3.1-8b"), serve(devices_per_copy=1)
    wide = tuple(f"model.layers.{layer}.mlp.down_proj" for layer in range(16))
    mixed = 4.5 + 4 * 16 * 4096 * 14336 / MATRICES
    for scheme, bits in ((Scheme("int4", 32), 4.5), (Scheme("int4", 32, wide), mixed), (Scheme("int8", 64), 8.25)):
        plan = serve(model=NamedModel(name="small", config=llama.stored_as(scheme)), devices_per_copy=1)
        fewer = plain.memory.weights - plan.memory.weights
        assert fewer == pytest.approx(MATRICES * (16 - bits) / 8) and plan.precision == plain.precision
        assert plan.prompt_tokens_per_second_per_device == plain.prompt_tokens_per_second_per_device


def test_an_mtp_module_that_is_not_served_changes_no_width() -> None:
    scheme = Scheme("int4", 32, ("model.layers.3.mlp.experts.", "model.layers.5.mlp.experts."))
    config = ModelConfig.preset("deepseek-v3-tiny-576").stored_as(scheme)
    without = config.model_copy(update={"num_nextn_predict_layers": 0})
    assert config.num_nextn_predict_layers == 1
    plan = serve(model=NamedModel(name="small", config=config), devices_per_copy=1)
    stored = sum(
        prod(spec.shape) * (scheme.bits(spec.name) / 8 + 1 / 16 if is_packed(spec.name, spec.stored) else 2)
        for spec in layout(without)
        if spec.stored != "float32"  # routers' biases, which plans leave out
    )
    assert plan.memory.weights == pytest.approx(stored)
