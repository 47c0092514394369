"""What serving costs: tokens a second against batch under a latency, cost per million tokens, margin, and when buying is cheaper. No torch.

plan_serve(config, "deepseek-v3", device("h800"), prompt=4383, response=1210, hit_share=0.563, latency=1 / 21, prices=(0.14, 0.55, 2.19))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_share, show_size
from slingshot.cost.devices import Device, and_others
from slingshot.cost.flops import decode_parts, prefill_parts
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import PRECISIONS, Precision
from slingshot.planning.plan import (
    ASSUMED_MFU,
    HOURS,
    MOST,
    USABLE,
    Alternative,
    Batch,
    BreakEven,
    Day,
    Fit,
    HitCost,
    ServePlan,
    beyond,
    checked_mfu,
    checked_prices,
    chosen_precision,
    dominates,
    pool,
    positive,
)
from slingshot.planning.sharding import LINK_EFFICIENCY
from slingshot.planning.throughput import DECODE_EFFICIENCY, Fleet, cached_heads

HIT_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
DAY = 86400.0
LONGEST = 2**27  # tokens of a prompt or a response
DECODING = "of the roofline (DeepSeek's day-6 disclosure comes to 46%), no speculation"


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
    input_tokens, output_tokens    a day's traffic, carried by whole copies; without it the fleet runs at full speed
    prices            per million tokens: cached input, other input, output: what you sell at, and what buying from an API would cost
    mfu               of reading prompts;  efficiency   the share of the decode roofline that is reached
    """
    positive(prompt=prompt, response=response, latency=latency, efficiency=efficiency)
    if not (1 <= prompt <= LONGEST and 1 <= response <= LONGEST):
        raise SlingshotError(f"prompt {prompt:g} and response {response:g}: each from 1 to {LONGEST} tokens; the nearest valid values are "
                             f"{min(max(prompt, 1), LONGEST):g} and {min(max(response, 1), LONGEST):g}")  # fmt: skip
    if not 0 <= hit_share <= 1:
        raise SlingshotError(
            f"hit share {hit_share:g}: a share lies between 0 and 1; the nearest valid value is {min(max(hit_share, 0), 1):g}"
        )
    listed = checked_prices(prices) if prices is not None else None
    chosen = chosen_precision(config, device, precision)
    reads = ASSUMED_MFU[chosen.dtype] if mfu is None else checked_mfu(mfu)
    usable = pool(
        device, count if count is not None else devices_per_copy if devices_per_copy is not None else 1, price
    ).usable
    if input_tokens is not None and output_tokens is not None:
        positive(input_tokens=input_tokens, output_tokens=output_tokens)
        work = _Work(prompt, response, hit_share, input_tokens, output_tokens, whole=True)
    elif input_tokens is None and output_tokens is None:
        work = _Work(prompt, response, hit_share, prompt, response, whole=False)  # one request, as yet
    else:
        raise SlingshotError("a day's traffic needs both its input and its output tokens; give the other one too")
    sought = work if count is None else replace(work, whole=False)
    if devices_per_copy is not None:
        size = _checked_size(config, devices_per_copy, devices_per_copy if count is None else count)
        fleet = Fleet(config, device, chosen, size, efficiency=efficiency)
    else:
        fleet = _serving_fleet(config, device, chosen, count, sought, latency, usable, reads, efficiency)
    context = work.context
    in_time = fleet.best_batch(context, usable, latency)
    batch = in_time or 1

    # Seconds of one device: to write a token of a response, and to read a prompt.
    writing, reading = fleet.step_seconds(batch, context) / batch, fleet.prefill_seconds(prompt, hit_share, reads)
    per_request = response * writing + reading
    needed = work.busy(fleet, batch, reads)
    if work.whole:
        count = _carrying(count, work, fleet, batch, reads)
    else:  # as many requests as the fleet can serve
        count = count or fleet.devices
        work = replace(work, read=prompt * count / needed, written=response * count / needed)
    read, written = work.read, work.written
    hired = pool(device, count, price)

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
    if work.whole:
        earned = (revenue - cost) / cost if revenue is not None and cost else None
        day = Day(
            input_tokens=read,
            output_tokens=written,
            cost=cost,
            revenue=revenue,
            margin=earned,
            devices_needed=needed,
            utilisation=needed / count,
        )

    decoded = written / response * sum(decode_parts(config, context, response).values())
    prefilled = read / prompt * sum(prefill_parts(config, prompt, prompt * hit_share).values())
    writes = written * writing / (written * writing + read / prompt * reading)
    memory = fleet.memory(batch, context)
    here = Alternative(
        device=device.name, precision=chosen.dtype, device_hours=count * HOURS, days=1.0, money=cost, fits=in_time > 0
    )
    chosen_for = "needs the fewest devices in all" if sought.whole else "writes most in time"
    choice = "" if devices_per_copy else f", the power of two that {chosen_for}"
    lines = [
        hired.stage("decoding", count * HOURS * writes, written, decoded),
        hired.stage(
            "reading prompts",
            count * HOURS * (1 - writes),
            read,
            prefilled,
            f"{show_share(hit_share)} of the tokens cached",
        ),
    ]
    return ServePlan(
        **hired.common("serve", config, model, chosen, memory, lines),
        nearest_fit=None if memory.total <= usable else _nearest_fit(config, device, chosen, context),
        flops=decoded + prefilled,
        flops_by_part={"decoding": decoded, "reading prompts": prefilled},
        dominates=dominates(f"a decoding step of {batch} sequences a device", fleet.decode_step(batch, context)),
        alternatives=_alternatives(here, fleet, work, latency, reads, hired.price),
        assumptions=[
            f"a copy of the model on {fleet.devices} devices{choice}",
            f"decoding at {efficiency:.0%} {DECODING}",
            f"prompts of {prompt:g} tokens and responses of {response:g} in the mean, so {context:g} cached tokens a sequence, in 16 bits",
            *beyond(config, prompt + response),
            f"prompts read at {show_share(reads)} of the peak of their products, on devices of their own",
            f"cached prompt tokens are kept and fetched for nothing{'' if config.family == 'dense' else '; their latents are expanded anew'}",
            "experts are chosen evenly, and there is one of each a copy",
            f"links reach {LINK_EFFICIENCY:.0%} of their rate; an all-reduce over several nodes takes the network links of all its members",
            "the day's traffic comes evenly; no peaks" if work.whole else "the fleet runs at full load all day",
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
        cost_by_hit_share=[]
        if per_second is None
        else _by_hit_share(fleet, per_second, prompt, response, reads, writing),
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


def _by_hit_share(
    fleet: Fleet, per_second: float, prompt: float, response: float, mfu: float, writing: float
) -> list[HitCost]:
    found = []
    for hit_share in HIT_SHARES:
        reading = fleet.prefill_seconds(prompt, hit_share, mfu)
        blended = (reading + response * writing) / (prompt + response)
        found.append(
            HitCost(hit_share=hit_share, prompt=1e6 * reading / prompt * per_second, blended=1e6 * blended * per_second)
        )
    return found


@dataclass(frozen=True)
class _Work:
    """A day's requests: mean tokens of each, the share of the prompt's that is cached, and the tokens of all that are read and written.

    whole   whether they are carried by whole copies of the model, rather than by as much of one as they keep busy
    """

    prompt: float
    response: float
    hit_share: float
    read: float
    written: float
    whole: bool

    @property
    def context(self) -> float:
        """Tokens a sequence has cached while it is decoded, in the mean."""
        return self.prompt + self.response / 2

    def busy(self, fleet: Fleet, batch: int, mfu: float) -> float:
        """Devices it keeps busy all day: decoding in such batches, and reading prompts."""
        writing = self.written * fleet.step_seconds(batch, self.context) / batch
        return (writing + self.read / self.prompt * fleet.prefill_seconds(self.prompt, self.hit_share, mfu)) / DAY

    def devices(self, fleet: Fleet, batch: int, mfu: float) -> float:
        """Devices it takes."""
        busy = self.busy(fleet, batch, mfu)
        return fleet.devices * math.ceil(busy / fleet.devices) if self.whole and busy < math.inf else busy


def _carrying(count: int | None, work: _Work, fleet: Fleet, batch: int, mfu: float) -> int:
    """How many devices carry the day's traffic. SlingshotError with the nearest number that does where `count` does not."""
    busy, enough = work.busy(fleet, batch, mfu), work.devices(fleet, batch, mfu)
    most = MOST if fleet.device.network else fleet.devices
    count = count or int(min(enough, most))
    if busy > count:
        short = f"no more than {most} can be had, which carry {show_share(most / busy)} of it"
        way_out = f"the nearest count that does is {enough:.0f}" if enough <= most else short
        raise SlingshotError(
            f"{count} x {fleet.device.name} do not carry this day's traffic, which needs {busy:,.6g}; {way_out}"
        )
    return count


def _serving_fleet(
    config: ModelConfig, device: Device, precision: Precision, count: int | None, work: _Work, latency: float, usable: float, mfu: float,
    efficiency: float,
) -> Fleet:  # fmt: skip
    """The copy of the model of which the work takes fewest devices in time; where none is in time, the smallest that holds it."""
    most = count or 256 if device.network else device.per_node
    fleets = [Fleet(config, device, precision, ways, efficiency=efficiency) for ways in _copy_sizes(config, most)]
    holding = [fleet for fleet in fleets if fleet.largest_batch(work.context, usable) >= 1] or fleets[-1:]
    in_time = [(fleet, batch) for fleet in holding if (batch := fleet.best_batch(work.context, usable, latency))]
    return min(in_time, key=lambda choice: work.devices(choice[0], choice[1], mfu))[0] if in_time else holding[0]


def _splits(config: ModelConfig, size: int) -> bool:
    """Whether a copy may be spread over `size` devices. Without experts, each takes as many attention heads as the next, and whole heads of
    the cache or a share of one."""
    heads = cached_heads(config)
    return bool(config.n_moe_layers) or (
        config.num_attention_heads % size == 0 and (heads % size == 0 or size % heads == 0)
    )


def _copy_sizes(config: ModelConfig, most: int) -> list[int]:
    """Numbers of devices one copy of a model may be spread over: powers of two, at least an expert or an attention head each."""
    limit = min(most, config.n_routed_experts if config.n_moe_layers else config.num_attention_heads)
    return [size for size in (2**power for power in range(max(1, limit).bit_length())) if _splits(config, size)]


def _checked_size(config: ModelConfig, given: int, most: int, divides: bool = False) -> int:
    """`given` devices a copy, at most `most`, which it must divide where `divides`. SlingshotError with the nearest size there is."""

    def valid(size: int) -> bool:
        return 0 < size <= most and not (divides and most % size) and _splits(config, size)

    if not valid(given):
        if 0 < given <= most and not _splits(config, given):
            heads = f"{config.num_attention_heads} attention heads and {cached_heads(config)} of keys and values"
            trouble = f"{given} devices a copy do not share {heads} evenly"
        else:
            trouble = (
                f"{given} devices a copy do not divide {most} devices"
                if divides
                else f"{given} devices a copy, of {most}"
            )
        nearest = min((size for size in range(1, most + 1) if valid(size)), key=lambda size: abs(size - given))
        raise SlingshotError(f"{trouble}; the nearest valid value is {nearest}")
    return given


def sampling_fleet(
    config: ModelConfig, device: Device, precision: Precision, count: int, given: int | None, context: float, batch: float, efficiency: float,
    seconds: Callable[[int, Fleet], float] | None = None,
) -> tuple[int, Fleet]:  # fmt: skip
    """How many copies of a model sample at once, and one of them: of those that hold it, the fastest at the work.

    batch     sequences there are to write, a device; math.inf for as many as have room
    seconds   of the work on so many copies of such a fleet, devices that make up no copy standing idle; without it a token counts, at that batch,
              and copies use all devices
    SlingshotError with the nearest thing that holds a copy when these devices do not.
    """
    if given is not None:
        ways = [_checked_size(config, given, count, divides=True)]
    else:
        ways = [size for size in _copy_sizes(config, count) if seconds or count % size == 0]
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

    def of_a_token(fleet: Fleet) -> float:
        held = min(max(batch, 1 / fleet.devices), fleet.largest_batch(context, usable))
        return fleet.step_seconds(held, context) / held

    best = min(roomy, key=lambda fleet: seconds(count // fleet.devices, fleet) if seconds else of_a_token(fleet))
    return count // best.devices, best


def _nearest_fit(config: ModelConfig, device: Device, precision: Precision, context: float) -> Fit | None:
    """The fewest of these devices, else of the first others in the table, that hold a copy of the model and one sequence."""
    for other in and_others(device):
        if precision.dtype not in other.peak:
            continue
        for ways in _copy_sizes(config, 1024 if other.network else 1):
            if Fleet(config, other, precision, ways).largest_batch(context, USABLE * other.memory_bytes) >= 1:
                return Fit(device=other.name, count=ways, layout=f"a copy on {ways} device{'' if ways == 1 else 's'}")
    return None


def _alternatives(
    here: Alternative, fleet: Fleet, work: _Work, latency: float, mfu: float, price: float | None
) -> list[Alternative]:
    """The same work on the best copy of every device of the table, in 8 and 16 bits, beside this plan's; `fits` where one has room and is in time."""
    found = []
    for other in and_others(fleet.device):
        for dtype in dict.fromkeys(
            ("fp8", "bfloat16", here.precision) if other.name == here.device else ("fp8", "bfloat16")
        ):
            if (other.name, dtype) == (here.device, here.precision):
                found.append(here)
            elif dtype in other.peak:
                usable, reads = USABLE * other.memory_bytes, mfu if dtype == here.precision else ASSUMED_MFU[dtype]
                best = _serving_fleet(
                    fleet.config, other, PRECISIONS[dtype], None, work, latency, usable, reads, fleet.efficiency
                )
                batch = best.best_batch(work.context, usable, latency)
                hours = HOURS * work.devices(best, batch or 1, reads)
                hourly = price if other.name == here.device else other.price
                money = hours * hourly if hourly is not None else None
                found.append(
                    Alternative(
                        device=other.name, precision=dtype, device_hours=hours, days=1.0, money=money, fits=bool(batch)
                    )
                )
    return found
