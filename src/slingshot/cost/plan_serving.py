"""What serving costs: tokens a second against batch under a latency, cost per million tokens, margin, and when buying is cheaper. No torch.

plan_serve(config, "deepseek-v3", device("h800"), prompt=4383, response=1210, hit_share=0.563, latency=1 / 21, prices=(0.14, 0.55, 2.19))
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from slingshot.config import ModelConfig
from slingshot.cost.devices import DEVICES, Device
from slingshot.cost.flops import decode_parts, prefill_parts
from slingshot.cost.memory import PRECISIONS, Precision
from slingshot.cost.plan import (
    ASSUMED_MFU,
    HOURS,
    USABLE,
    Alternative,
    Batch,
    BreakEven,
    Day,
    Fit,
    HitCost,
    ServePlan,
    checked_mfu,
    checked_prices,
    chosen_precision,
    dominates,
    pool,
    positive,
)
from slingshot.cost.quantity import show_share, show_size
from slingshot.cost.serving import DECODE_EFFICIENCY, Fleet
from slingshot.files import SlingshotError

HIT_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
DAY = 86400.0


def plan_serve(
    config: ModelConfig,
    model: str,
    device: Device,
    count: int | None = None,
    *,
    prompt: float = 4000,
    response: float = 1000,
    hit_share: float = 0.0,
    latency: float = 0.05,
    input_tokens: float | None = None,
    output_tokens: float | None = None,
    prices: Sequence[float] | None = None,
    price: float | None = None,
    precision: str | None = None,
    mfu: float | None = None,
    devices_per_copy: int | None = None,
    efficiency: float = DECODE_EFFICIENCY,
) -> ServePlan:
    """What a day of serving costs: some devices decode, others read prompts, as many of each as keeps both busy.

    prompt, response  mean tokens of a request;  hit_share   of the prompt tokens, already cached
    latency           seconds a user waits for a token, at most
    input_tokens, output_tokens    a day's traffic; without it the fleet runs at full speed
    prices            per million tokens: cached input, other input, output: what you sell at, and what buying from an API would cost
    mfu               of reading prompts;  efficiency   the share of the decode roofline that is reached
    """
    positive(prompt=prompt, response=response, latency=latency, efficiency=efficiency)
    if not 0 <= hit_share <= 1:
        raise SlingshotError(f"hit share {hit_share:g}: a share lies between 0 and 1; the nearest valid value is {min(max(hit_share, 0), 1):g}")
    if (input_tokens is None) != (output_tokens is None):
        raise SlingshotError("a day's traffic needs both its input and its output tokens; give the other one too")
    listed = checked_prices(prices) if prices is not None else None
    chosen = chosen_precision(config, device, precision)
    reads = ASSUMED_MFU[chosen.dtype] if mfu is None else checked_mfu(mfu)
    usable = pool(device, 1 if count is None else count, price).usable
    context = prompt + response / 2  # tokens a sequence has cached while it is decoded, in the mean
    fleet = _serving_fleet(config, device, chosen, count, devices_per_copy, context, latency, usable, efficiency)
    batch = fleet.best_batch(context, usable, latency) or 1

    # Seconds of one device: to write a token of a response, and to read a prompt.
    writing, reading = fleet.step_seconds(batch, context) / batch, fleet.prefill_seconds(prompt, hit_share, reads)
    per_request = response * writing + reading
    needed = None
    if input_tokens is not None and output_tokens is not None:
        positive(input_tokens=input_tokens, output_tokens=output_tokens)
        needed = (output_tokens * writing + input_tokens / prompt * reading) / DAY
        count = count or fleet.devices * math.ceil(needed / fleet.devices)
    count = count or fleet.devices
    hired = pool(device, count, price)
    written = output_tokens if output_tokens is not None else count * DAY / per_request * response
    read = input_tokens if input_tokens is not None else written / response * prompt

    per_second = None if hired.price is None else hired.price / 3600
    cost = None if hired.price is None else count * HOURS * hired.price
    margin, break_even, revenue = None, None, None
    if listed is not None:
        hit, miss, out = listed
        per_input = hit_share * hit + (1 - hit_share) * miss
        revenue = (read * per_input + written * out) / 1e6
        if per_second and cost:
            tokens = prompt + response
            bought, made = (prompt * per_input + response * out) / tokens, per_request * per_second / tokens * 1e6
            most = count * DAY / per_request * tokens
            even = cost / bought * 1e6 if bought else math.inf
            margin = (bought - made) / made
            break_even = BreakEven(
                bought_per_million=bought, made_per_million=made, fleet_per_day=cost, fleet_tokens_per_day=most,
                tokens_per_day=even if even <= most else None, utilisation=even / most if even <= most else None,
            )  # fmt: skip
    day = None
    if needed is not None:
        earned = (revenue - cost) / cost if revenue is not None and cost else None
        day = Day(
            input_tokens=read, output_tokens=written, cost=cost, revenue=revenue, margin=earned, devices_needed=needed, utilisation=needed / count
        )

    decoded = written / response * sum(decode_parts(config, context, response).values())
    prefilled = read / prompt * sum(prefill_parts(config, prompt, prompt * hit_share).values())
    writes = written * writing / (written * writing + read / prompt * reading)
    memory = fleet.memory(batch, context)
    lines = [
        hired.stage("decoding", count * HOURS * writes, written, decoded),
        hired.stage("reading prompts", count * HOURS * (1 - writes), read, prefilled, f"{show_share(hit_share)} of the tokens cached"),
    ]
    return ServePlan(
        **hired.common("serve", config, model, chosen, memory, lines),
        nearest_fit=None if memory.total <= usable else _nearest_fit(config, device, chosen, context),
        flops=decoded + prefilled,
        flops_by_part={"decoding": decoded, "reading prompts": prefilled},
        dominates=dominates(f"a decoding step of {batch} sequences a device", fleet.decode_step(batch, context)),
        alternatives=_alternatives(fleet, prompt, response, hit_share, latency, reads, count * HOURS / per_request),
        assumptions=[
            f"a copy of the model on {fleet.devices} devices{'' if devices_per_copy else ', the power of two that writes most in time'}",
            f"decoding at {efficiency:.0%} of the roofline (DeepSeek's day-6 disclosure comes to 46%), no speculation",
            f"prompts of {prompt:g} tokens and responses of {response:g} in the mean, so {context:g} cached tokens a sequence, in 16 bits",
            f"prompts read at {show_share(reads)} of the peak of their products, on devices of their own",
            "cached prompt tokens cost nothing: neither their storage nor their way back is counted",
            "experts are chosen evenly, and there is one of each a copy",
            "the fleet runs at full load all day" if needed is None else "the day's traffic comes evenly; no peaks",
            *hired.notes(),
        ],
        prompt=prompt,
        response=response,
        hit_share=hit_share,
        latency=latency,
        devices_per_copy=fleet.devices,
        batch=batch,
        tokens_per_second_per_device=1 / writing,
        bound_tokens_per_second_per_device=batch / fleet.decode_step(batch, context).bound,
        tokens_per_second_per_user=1 / writing / batch,
        prompt_tokens_per_second_per_device=prompt / reading,
        output_cost_per_million=None if per_second is None else 1e6 * writing * per_second,
        prompt_cost_per_million=None if per_second is None else 1e6 * reading / prompt * per_second,
        curve=_curve(fleet, batch, context, usable, latency),
        cost_by_hit_share=[] if per_second is None else _by_hit_share(fleet, per_second, prompt, response, reads, writing),
        prices=listed,
        margin=margin,
        break_even=break_even,
        day=day,
    )


def _curve(fleet: Fleet, batch: int, context: float, usable: float, latency: float) -> list[Batch]:
    """Batches in powers of two, and the chosen one, up to the first that has no room or comes too late."""
    found = []
    for point in sorted({2**power for power in range(15)} | {batch}):
        step = fleet.step_seconds(point, context)
        found.append(
            Batch(
                batch=point,
                tokens_per_second_per_device=point / step,
                tokens_per_second_per_user=1 / step,
                bound_tokens_per_second_per_device=point / fleet.decode_step(point, context).bound,
                step_seconds=step,
                bytes_per_token=fleet.bytes_read(point, context) / point,
                dominant=fleet.decode_step(point, context).ranked[0][0],
                fits=point <= fleet.largest_batch(context, usable),
                within_latency=step <= latency,
            )
        )
        if not (found[-1].fits and found[-1].within_latency):
            break
    return found


def _by_hit_share(fleet: Fleet, per_second: float, prompt: float, response: float, mfu: float, writing: float) -> list[HitCost]:
    found = []
    for hit_share in HIT_SHARES:
        reading = fleet.prefill_seconds(prompt, hit_share, mfu)
        blended = (reading + response * writing) / (prompt + response)
        found.append(HitCost(hit_share=hit_share, prompt=1e6 * reading / prompt * per_second, blended=1e6 * blended * per_second))
    return found


def _serving_fleet(
    config: ModelConfig, device: Device, precision: Precision, count: int | None, given: int | None, context: float, latency: float, usable: float,
    efficiency: float,
) -> Fleet:  # fmt: skip
    """The copy of the model whose devices write most tokens a second in time; where none is in time, the smallest that holds it."""
    if given is not None:
        positive(**{"devices per copy": given})
        if given > (count or given):
            raise SlingshotError(f"{given} devices a copy, of {count}; the nearest valid value is {count}")
        return Fleet(config, device, precision, given, efficiency=efficiency)

    def speed(fleet: Fleet) -> float:
        batch = fleet.best_batch(context, usable, latency)
        return batch / fleet.step_seconds(batch, context) if batch else 0.0

    most = count or 256 if device.network else device.per_node
    fleets = [Fleet(config, device, precision, ways, efficiency=efficiency) for ways in _copy_sizes(config, most)]
    holding = [fleet for fleet in fleets if fleet.largest_batch(context, usable) >= 1] or fleets[-1:]
    best = max(holding, key=speed)
    return best if speed(best) else holding[0]


def _copy_sizes(config: ModelConfig, most: int) -> list[int]:
    """Numbers of devices one copy of a model may be spread over: powers of two, at least an expert or an attention head each."""
    limit = min(most, config.n_routed_experts if config.n_moe_layers else config.num_attention_heads)
    return [2**power for power in range(max(1, limit).bit_length())]


def sampling_fleet(
    config: ModelConfig, device: Device, precision: Precision, count: int, given: int | None, context: float, batch: float, efficiency: float
) -> tuple[int, Fleet]:
    """How many copies of a model sample at once, and one of them: the smallest that holds it and `batch` sequences a device, else the roomiest.

    SlingshotError with the nearest thing that holds a copy when these devices do not.
    """
    ways = [size for size in _copy_sizes(config, count) if count % size == 0]
    if given is not None:
        if given < 1 or count % given:
            nearest = min((size for size in range(1, count + 1) if count % size == 0), key=lambda size: abs(size - given))
            raise SlingshotError(f"{given} devices a copy do not divide {count} devices; the nearest valid value is {nearest}")
        ways = [given]
    usable = USABLE * device.memory_bytes
    fleets = [Fleet(config, device, precision, size, efficiency=efficiency) for size in ways]
    roomy = [fleet for fleet in fleets if fleet.largest_batch(context, usable) >= 1]
    if not roomy:
        fit = _nearest_fit(config, device, precision, context)
        way_out = f"the nearest that do are {fit.count} x {fit.device}" if fit else "nothing in the table does"
        need, has = show_size(fleets[-1].memory(1, context).total), show_size(usable)
        raise SlingshotError(
            f"{fleets[-1].devices} x {device.name} do not hold a copy of the model and a sequence ({need} each, {has} usable); {way_out}"
        )
    best = next((fleet for fleet in roomy if fleet.largest_batch(context, usable) >= batch), roomy[-1])
    return count // best.devices, best


def _nearest_fit(config: ModelConfig, device: Device, precision: Precision, context: float) -> Fit | None:
    """The fewest of these devices, else of the first others in the table, that hold a copy of the model and one sequence."""
    for other in [device, *(entry for entry in DEVICES.values() if entry.name != device.name)]:
        if precision.dtype not in other.peak:
            continue
        for ways in _copy_sizes(config, 1024 if other.network else 1):
            if Fleet(config, other, precision, ways).largest_batch(context, USABLE * other.memory_bytes) >= 1:
                return Fit(device=other.name, count=ways, layout=f"a copy on {ways} device{'' if ways == 1 else 's'}")
    return None


def _alternatives(fleet: Fleet, prompt: float, response: float, hit_share: float, latency: float, mfu: float, requests: float) -> list[Alternative]:
    """The same day's requests on the best copy of every device of the table, in 8 and 16 bits; `fits` where one has room and is in time."""
    found, context = [], prompt + response / 2
    for other in [fleet.device, *(entry for entry in DEVICES.values() if entry.name != fleet.device.name)]:
        for dtype in ("fp8", "bfloat16"):
            if dtype not in other.peak:
                continue
            usable = USABLE * other.memory_bytes
            best = _serving_fleet(fleet.config, other, PRECISIONS[dtype], None, None, context, latency, usable, fleet.efficiency)
            batch = best.best_batch(context, usable, latency)
            reads = mfu if dtype == fleet.precision.dtype else ASSUMED_MFU[dtype]
            seconds = response * best.step_seconds(batch or 1, context) / (batch or 1) + best.prefill_seconds(prompt, hit_share, reads)
            hours = requests * seconds
            money = hours * other.price if other.price is not None else None
            found.append(Alternative(device=other.name, precision=dtype, device_hours=hours, days=1.0, money=money, fits=bool(batch)))
    return found
