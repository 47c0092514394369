"""Bills that add up, rates from any of their sources, layouts that fit or say what would, monotony, nonsense
refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slingshot.base.errors import SlingshotError
from slingshot.cost.devices import DEVICES, device
from slingshot.cost.flops import decode_parts, forward_flops, forward_parts, parameters, prefill_parts
from slingshot.machine.machine import describe
from slingshot.model.config import ModelConfig
from slingshot.planning.plan import Plan
from slingshot.planning.plan_training import plan_distill, plan_pretrain, plan_rl
from slingshot.planning.request import DistillRequest, NamedModel, PretrainRequest, RLRequest
from slingshot.quantization.formats import Scheme

SLOW = pytest.mark.slow
LLAMA = ModelConfig.preset("llama-3.1-8b")
V3 = ModelConfig.preset("deepseek-v3")
MOONLIGHT = ModelConfig.preset("moonlight-16b-a3b")
ON_V3 = {"model": "deepseek-v3", "device": "h800"}
DEFAULTS = {"model": "llama-3.1-8b", "device": "h100", "count": 64}
OWN_LAYOUT = {"tp": 1, "pp": 16, "ep": 64, "batch": 15360 * 4096}


def pretrain(**asked: Any) -> Any:
    return plan_pretrain(PretrainRequest.parse(DEFAULTS | {"tokens": 1e12} | asked))


def rl(**asked: Any) -> Any:
    return plan_rl(RLRequest.parse(DEFAULTS | {"steps": 100, "response": 2000, "longest": 16384} | asked))


def distill(**asked: Any) -> Any:
    defaults = DEFAULTS | {"teacher": "moonlight-16b-a3b", "samples": 1e5, "response": 4000}
    return plan_distill(DistillRequest.parse(defaults | asked))


def test_pretraining_by_hand() -> None:
    """8B parameters, a tenth of a T tokens at 400 TFLOP/s on 64 devices of $2."""
    plan = pretrain(tokens=1e11, tflops=400, price=2.0)
    flops = 3 * forward_flops(LLAMA, [4096], mtp=True) / 4096 * 1e11
    assert plan.flops == pytest.approx(flops) and plan.device_hours == pytest.approx(flops / 400e12 / 3600)
    assert (plan.days, plan.money) == pytest.approx((plan.device_hours / 64 / 24, 2 * plan.device_hours))
    assert plan.energy_kwh == pytest.approx(0.7 * plan.device_hours)
    assert plan.mfu == plan.mfu_of_bfloat16 == pytest.approx(400 / 989.4)
    assert plan.six_nd_flops == 6 * parameters(LLAMA).total * 1e11
    assert plan.tokens_per_day == pytest.approx(1e11 / plan.days)
    assert plan.nearest_fit is None and plan.fits


@pytest.mark.parametrize("make", [pretrain, rl, distill])
def test_plans_add_up_are_json_and_list_what_they_assumed(make: Any) -> None:
    plan: Plan = make()
    assert plan.device_hours == pytest.approx(sum(stage.device_hours for stage in plan.stages))
    assert plan.money == pytest.approx(sum(stage.money or 0 for stage in plan.stages))
    assert plan.fits == (plan.memory.total <= plan.usable_memory_bytes)
    if plan.kind != "pretrain":
        assert sum(plan.flops_by_part.values()) == pytest.approx(plan.flops)
    assert json.loads(json.dumps(plan.model_dump(mode="json"), allow_nan=False))["memory"]["total"] == plan.memory.total
    text = "\n".join(plan.assumptions)
    for wanted in ("MFU 40.0%, assumed", "layout: ", "the table's example", "90.0% of 80 GiB", "700 W"):
        assert wanted in text
    text = "\n".join(make(mfu=0.3, price=5).assumptions)
    assert "MFU 30.0%, as given" in text and "5 per h100 hour, as given" in text


def test_the_rate_may_come_from_any_of_three() -> None:
    hours = pretrain().device_hours  # at the 40% that are assumed in bfloat16
    for rate in ({"mfu": 0.4}, {"tflops": 0.4 * 989.4}, {"hours": hours}):
        assert (pretrain(**rate).device_hours, pretrain(**rate).mfu) == pytest.approx((hours, 0.4))


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8", 64)])
def test_whole_weights_are_trained_in_sixteen_bits_whatever_they_are_stored_in(scheme: Scheme) -> None:
    stored, plain = pretrain(model=NamedModel(name="small", config=LLAMA.stored_as(scheme))), pretrain()
    assert (stored.precision, stored.memory, stored.money) == (plain.precision, plain.memory, plain.money)


def test_mtp_stands_on_a_line_of_its_own() -> None:
    """Its FLOPs are in no rate, so it adds none to the hours; without the module there is no line."""
    plan = pretrain(**ON_V3, count=2048, tflops=385)
    line, without = plan.stages[1], 3 * forward_flops(V3, [4096])
    assert "MTP" in line.name and line.device_hours == 0 and line.flops == plan.flops_by_part["mtp"]
    assert line.flops == pytest.approx((3 * forward_flops(V3, [4096], mtp=True) - without) / 4096 * 1e12)
    assert plan.flops == pytest.approx(without / 4096 * 1e12)
    none = NamedModel(name="it", config=V3.model_copy(update={"num_nextn_predict_layers": 0}))
    plain = pretrain(model=none, device="h800", count=2048, tflops=385)
    assert plain.device_hours == pytest.approx(plan.device_hours) and len(plain.stages) == 1


def test_the_chosen_layout_lets_no_less_through_than_others_that_fit() -> None:
    """Of a 70B model on 64 devices: within the few percent that recomputation is guessed to cost."""
    chosen = pretrain(model="llama-3.1-70b")
    others = [pretrain(model="llama-3.1-70b", tp=tp, pp=pp) for tp in (1, 8) for pp in (1, 2, 8)]
    bounds = [other.tflops_bound for other in others if other.fits]
    assert chosen.fits and len(bounds) > 2 and max(bounds) < 1.1 * chosen.tflops_bound
    assert pretrain().layout.recompute == "none"  # an 8B model has room, so nothing is computed twice
    assert pretrain(model="qwen3-0.6b", count=8, zero=0).layout.dp == 8
    assert pretrain(count=16, zero=3).layout.dp > 1  # who asks for ZeRO shards something


@pytest.mark.parametrize(
    ("asked", "ways"),
    [
        (ON_V3 | {"count": 2048}, {"tp": 1, "pp": 16, "ep": 64}),
        ({}, {"tp": 16}),  # beyond a node, where nothing would be chosen
        ({"model": "llama-3.1-405b", "count": 2048}, {"tp": 8, "zero": 0}),
        ({"device": "h200", "count": 1}, {"zero": 1}),
    ],
)
def test_a_given_way_is_kept_and_the_rest_chosen(asked: dict[str, Any], ways: dict[str, Any]) -> None:
    plan = pretrain(**asked, **ways)
    assert plan.fits and all(getattr(plan.layout, name) == value for name, value in ways.items())


def test_what_does_not_fit_says_what_would() -> None:
    plan = pretrain(**ON_V3, count=8)
    assert not plan.fits and plan.nearest_fit["device"] == "h800" and plan.nearest_fit["count"] > 8
    assert pretrain(**ON_V3, count=plan.nearest_fit["count"]).fits
    assert not pretrain(**ON_V3, count=plan.nearest_fit["count"] // 2).fits
    # More of the same cannot help one device that has no neighbours, so another device is named.
    alone = DEVICES["rtx4090"].model_copy(update={"network": 0.0})
    assert pretrain(device=alone, count=1, tokens=1e9).nearest_fit["device"] == "h800"
    given = pretrain(count=8, tp=1, pp=1, zero=0, recompute="none")
    assert not given.fits and given.nearest_fit["count"] == 8


def test_a_rate_the_layout_cannot_let_through_is_said() -> None:
    """DeepSeek-V3's layout lets its rate through on InfiniBand; with a tenth of the network it does not."""
    plan = pretrain(**ON_V3, count=2048, tflops=385, **OWN_LAYOUT)
    assert plan.tflops_bound > 385 and "lets through" not in " ".join(plan.assumptions)
    step = 15360 * 4096 * 3 * forward_flops(V3, [4096]) / 4096 / 2048 / plan.tflops_bound / 1e12
    compute, *others = (plan.dominates[f"{what}_seconds"] for what in ("compute", "memory_traffic", "network"))
    assert step == pytest.approx(max(compute / (1 - plan.bubble), *others))
    slow = DEVICES["h800"].model_copy(update={"network": 5e9})
    plan = pretrain(model="deepseek-v3", device=slow, count=2048, tflops=385, **OWN_LAYOUT)
    assert plan.tflops_bound < 385 and "the rate is more than this layout lets through" in " ".join(plan.assumptions)


def test_rl_by_hand() -> None:
    """100 steps of 32 x 16 responses of 2,000 tokens after prompts of 200: trained on once, and once through the
    reference.

    A group's row is 199 ids of the prompt, and 16 times its last id and a response: 16 x 2,001 + 199 = 32,215 tokens.
    With a cap far off lengths are exponential, their mean square 2 x 2,000^2: of 2,001 then 8,004,001. Pairs of a row:
    199 x 100 + 16 x (2,001 x 199 + (8,004,001 + 2,001) / 2) = 70,439,100, 2,186.5 a token, as documents of 4,372 have.
    A response is read once in 16, and each of its 1,999 steps meets 200 + (8e6 - 2,000) / 2 / 1,999 keys.
    """
    plan = rl(tflops=400, longest=1e6)
    assert plan.responses == 51_200 and plan.rounds == 100 and plan.tokens == pytest.approx(3200 * 32_215)
    rollouts, verification, update = plan.stages
    assert update.flops == pytest.approx(4 * forward_flops(LLAMA, [4372]) / 4372 * plan.tokens)
    assert update.device_hours == pytest.approx(update.flops / 400e12 / 3600)
    steps = sum(decode_parts(LLAMA, 200 + 7_998_000 / 2 / 1999, 51_200 * 1999).values())
    assert rollouts.flops == pytest.approx(steps + 3200 * sum(prefill_parts(LLAMA, 200).values()), rel=1e-3)
    assert rollouts.device_hours == pytest.approx(100 * plan.round_seconds * 64 / 3600)
    assert verification.device_hours == pytest.approx(100 * 0.1 * 64 / 3600)  # 512 responses on 1,024 cores
    without = rl(tflops=400, longest=1e6, forwards=0).stages[2]
    assert without.device_hours == pytest.approx(update.device_hours * 3 / 4)


def test_a_round_is_not_verified_faster_than_its_cores_verify_a_response() -> None:
    for workers, waits in ((8192, 1), (512, 1), (511, 2), (100, 6)):
        plan = rl(count=512, verify_workers=workers, verify_seconds=60)
        assert plan.stages[1].days * 86400 == pytest.approx(100 * 60 * waits)
    local = device("h100").model_copy(update={"name": "local", "network": 0.0})
    assert f"{describe().cores} cores" in rl(model="qwen3-0.6b", device=local, count=1).stages[1].note


def test_rounds_wait_for_their_longest_response() -> None:
    """17 steps of 32 responses, 512 at once: a full round, and one of 32, which alone would wait for its longest as
    well."""
    plan, full, rest = (rl(steps=steps, prompts=2, rollout=512, devices_per_copy=8) for steps in (17, 16, 1))
    assert (plan.rounds, full.rounds, rest.rounds) == (2, 1, 1) and "the last of 32" in plan.stages[0].note
    assert plan.stages[0].device_hours == pytest.approx(full.stages[0].device_hours + rest.stages[0].device_hours)
    assert rest.stages[0].device_hours > 0.3 * full.stages[0].device_hours
    assert rl(rollout=5120).stages[0].device_hours < rl().stages[0].device_hours and rl(rollout=5120).rounds == 10


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (pretrain, {"price": 5.0, "stage": {"more": 1000.0}}), (pretrain, {"precision": "half"}),
        (pretrain, {"count": 8, "tp": 1, "pp": 1, "zero": 0, "recompute": "none"}),  # does not fit; another layout does
        (rl, {"price": 5.0, "devices_per_copy": 8}), (distill, {"teacher_precision": "float32"}),
        (distill, {"price": 5.0, "teacher": "deepseek-v3", "device": "h800", "devices_per_copy": 64}),
    ],
)  # fmt: skip
def test_a_plan_s_own_row_among_the_alternatives_is_its_bill(make: Any, asked: dict[str, Any]) -> None:
    plan: Plan = make(**asked)
    here = {key: getattr(plan, key) for key in ("device", "precision", "device_hours", "days", "money", "fits")}
    assert plan.alternatives.count(here) == 1
    for other in plan.alternatives:
        if other["device"] == plan.device and other["device_hours"]:  # here an hour costs what was given
            assert other["money"] == pytest.approx(other["device_hours"] * (plan.price or 0))


@pytest.mark.parametrize(
    ("make", "asked"),
    [(rl, {}), pytest.param(distill, {}, marks=SLOW), (distill, {"teacher": "deepseek-v3", "device": "h800"})],
)
def test_an_alternative_is_what_a_plan_there_says(make: Any, asked: dict[str, Any]) -> None:
    """The teacher in its own precision, V3's FP8, where a device has it."""
    for other in make(**asked, mfu=0.4).alternatives:
        if other["fits"] and other["precision"] == "bfloat16":
            there = make(**asked | {"device": other["device"]}, mfu=0.4, precision="bfloat16")
            assert (other["device_hours"], other["money"]) == pytest.approx((there.device_hours, there.money))


def test_distillation_pays_for_what_is_thrown_away_and_twice_for_what_is_kept_for_two_epochs() -> None:
    plan, picky, once = distill(), distill(accepted=0.25), distill(epochs=1)
    assert picky.stages[0].device_hours == pytest.approx(4 * plan.stages[0].device_hours, rel=0.05)
    assert picky.stages[1] == plan.stages[1] and picky.sampled == 4e5 and picky.kept == 1e5
    assert plan.stages[1].device_hours == pytest.approx(2 * once.stages[1].device_hours)
    read, written = sum(prefill_parts(MOONLIGHT, 200).values()), sum(decode_parts(MOONLIGHT, 2200, 4000).values())
    assert plan.stages[0].flops == plan.flops_by_part["sampling"] == pytest.approx(1e5 * (read + written))


@pytest.mark.slow
@given(
    st.sampled_from(["llama-3.1-8b", "moonlight-16b-a3b"]), st.integers(1, 9), st.floats(1e8, 1e13), st.floats(0.01, 1)
)
@settings(max_examples=15)
def test_more_devices_or_a_better_mfu_never_cost_more_and_more_tokens_never_less(
    model: str, power: int, tokens: float, mfu: float
) -> None:
    asked = {"model": model, "count": 2**power, "tokens": tokens, "mfu": mfu}
    changes: list[dict[str, Any]] = [{}, {"count": 2 ** (power + 1)}, {"tokens": 1.5 * tokens}, {"mfu": 1}]
    one, twice, more, best = (pretrain(**asked | change) for change in changes)
    assert twice.days <= one.days * (1 + 1e-9) and twice.device_hours == pytest.approx(one.device_hours)
    assert more.days > one.days and more.money > one.money and best.device_hours <= one.device_hours
    assert one.layout.devices == 2**power


@pytest.mark.parametrize(
    ("make", "asked", "says"),
    [
        (pretrain, {"count": 0}, "the nearest is 1"), (pretrain, {"count": 10**8}, "the largest count a plan takes"),
        (pretrain, {"tokens": -1.0}, "did you mean 1.0?"), (pretrain, {"tokens": 0.0}, "must be more than 0"),
        (pretrain, {"tokens": float("nan")}, "number"), (pretrain, {"price": -1.0}, "did you mean 1.0?"),
        (pretrain, {"mfu": 1.5}, "a share lies between 0 and 1"),
        (pretrain, {"mfu": 0.4, "tflops": 300.0}, "give one of them"),
        (pretrain, {"tflops": 5000.0}, "the nearest valid value is 989.4"),
        (pretrain, {"hours": 1.0}, "the nearest valid value is 13,547 hours"),
        (pretrain, {"context": 1}, "the nearest valid value is 2"),
        (pretrain, {"batch": 3.0}, "the nearest valid value is 4096"),
        (pretrain, {"batch": 1e13}, "the nearest valid value is 1e+12"),
        (pretrain, {"tokens": 100.0}, "fewer than one sequence of 4096; the nearest valid value is 4096"),
        (pretrain, {"batch": 4096.0, "tp": 1, "pp": 1}, "the nearest valid batch is 262144"),
        (pretrain, {"tp": 3}, "the nearest valid value is 2"), (pretrain, {"ep": 2}, "the nearest valid value is 1"),
        (pretrain, {"zero": 5}, "Input should be 0, 1, 2 or 3"),
        (pretrain, {"recompute": "all"}, "Input should be 'none', 'selective' or 'full'"),
        (pretrain, {"precision": "fp4"}, "did you mean fp8?"),
        (pretrain, {"precision": "int8"}, "nothing is trained in it"),
        (pretrain, {"device": "a100", "precision": "fp8"}, "it multiplies in float32, bfloat16"),
        (pretrain, {"modle": "x"}, "did you mean model?"),
        (rl, {"response": 20_000}, "needs a longer cap than 16384"), (rl, {"forwards": -1}, "must not be negative"),
        (rl, {"devices_per_copy": 3}, "the nearest valid value is 2"),
        (rl, ON_V3 | {"count": 8}, "the nearest that do are 16 x h800"),
        (distill, {"accepted": 0.0}, "must be more than 0"), (distill, {"epochs": -1}, "did you mean 1?"),
        (distill, {"teacher": "deepseek-v3", "device": "rtx4090", "count": 4}, "the nearest that do are"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line_with_the_nearest_valid_choice(make: Any, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(SlingshotError) as caught:
        make(**asked)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_adapters_by_hand() -> None:
    """Rank 16 beside the seven matrices of 32 blocks: q, o 4096 to 4096; k, v to 1024; gate, up to 14336, down back.

    Frozen matrices cost a forward pass and the gradients of activations, a third less; attention and adapters all."""
    held = 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    whole, plan = rl(tflops=400, longest=1e6), rl(tflops=400, longest=1e6, lora=16)
    tokens = plan.tokens
    forward = {part: flops * tokens / 4372 for part, flops in forward_parts(LLAMA, [4372]).items()}
    expected = 2 * sum(forward.values()) + forward["attention"] + 3 * 2 * held * tokens
    assert plan.flops_by_part["training"] == pytest.approx(expected)
    assert plan.flops_by_part["rollouts"] == whole.flops_by_part["rollouts"]
    assert plan.layout_text == whole.layout_text.replace("none", "full")
    assert any(f"{held:,} numbers are trained" in line for line in plan.assumptions)
    assert not any("are trained" in line for line in whole.assumptions)


def test_adapters_fit_where_a_whole_model_does_not() -> None:
    keys = {"model": "llama-3.1-70b", "count": 8}
    assert not distill(**keys).fits
    plan = distill(**keys, lora=16, lora_targets="attention")
    assert plan.fits and plan.flops_by_part["training"] < 0.72 * distill(**keys).flops_by_part["training"]


def test_targets_that_a_model_does_not_have_are_refused() -> None:
    with pytest.raises(SlingshotError, match="--lora-targets experts: this model has no such matrices"):
        rl(lora=16, lora_targets="attention,experts")
