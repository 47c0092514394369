"""What serving costs: tokens a second under a latency, cost per million, margin, make or buy. No torch.

plan_serve(ServeRequest.parse({"model": "deepseek-v3", "device": "h800", "prompt": 4383, "response": 1210}))
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import plural, show_share
from slingshot.cost.flops import decode_parts, prefill_parts
from slingshot.planning.model_copy import ModelCopy
from slingshot.planning.plan import MOST, Hire, Plan
from slingshot.planning.request import ServeRequest


class _Server(NamedTuple):
    """A copy at work."""

    copy: ModelCopy
    batch: int  # sequences a device decodes at once: the most that are in time; 0: not even one is
    writing: float  # seconds of one device for a token of a response
    reading: float  # and for a prompt
    devices: float  # kept busy all day by the traffic, or by one request where none is given

    def taken(self, whole: bool) -> float:
        """Devices it takes: all of as many copies as are kept busy where those are `whole`."""
        size = self.copy.devices
        return size * math.ceil(self.devices / size) if whole and self.devices < math.inf else self.devices


def plan_serve(asked: ServeRequest) -> Plan:
    """What a day of serving costs: some devices decode, others read prompts, as many of each as keeps both busy.

    A day's traffic (`input`, `output`) is carried by whole copies; without it the devices run at full speed.
    """
    config, prompt, response, hit_share = asked.model.config, asked.prompt, asked.response, asked.hit_share
    context = prompt + response / 2  # tokens a sequence has cached while it is decoded, in the mean
    hire = Hire.of(asked, asked.count or asked.devices_per_copy)
    chosen, device = hire.precision, hire.device
    mfu = asked.mfu or chosen.mfu
    if (asked.input is None) != (asked.output is None):
        raise SlingshotError("a day's traffic needs both its --input and its --output tokens; give the other one too")
    traffic = asked.input is not None
    to_read, to_write = asked.input or prompt, asked.output or response

    def server(copy: ModelCopy, mfu: float) -> _Server:
        batch, reading = copy.best_batch(context, asked.latency), copy.prefill_seconds(prompt, hit_share, mfu)
        writing = copy.step_seconds(batch or 1, context) / (batch or 1)
        return _Server(copy, batch, writing, reading, (to_write * writing + to_read / prompt * reading) / 86400)

    def best(copy: ModelCopy, count: int | None, mfu: float, whole: bool) -> _Server:
        """That takes fewest devices in time; where none is in time, the smallest that holds the model."""
        copies = copy.spread(count or 256 if copy.device.network else copy.device.per_node)
        holding = [copy for copy in copies if copy.largest_batch(context) >= 1] or copies[-1:]
        servers = [server(copy, mfu) for copy in holding]
        return min((one for one in servers if one.batch), key=lambda one: one.taken(whole), default=servers[0])

    one, whole = ModelCopy(config, device, chosen, efficiency=asked.efficiency), traffic and asked.count is None
    if (size := asked.devices_per_copy) is not None:
        served = server(one.over(size, asked.count or size), mfu)
    else:
        served = best(one, asked.count, mfu, whole)
    copy, in_time, writing, reading, needed = served
    batch = in_time or 1
    hire = Hire.of(asked, _carrying(asked.count, served) if traffic else asked.count or copy.devices)
    count = hire.count
    many = 1.0 if traffic else count / needed  # as many requests as the devices can serve
    read, written = to_read * many, to_write * many

    def money(seconds: float) -> float | None:
        return None if hire.device.price is None else seconds * hire.device.price / 3600

    cost = money(count * 86400)
    margin, break_even, revenue, day = None, None, None, None
    if asked.prices is not None:
        hit, miss, out = asked.prices
        per_input = hit_share * hit + (1 - hit_share) * miss
        revenue = (read * per_input + written * out) / 1e6
        if cost:
            most = count * 86400 / (response * writing + reading) * (prompt + response)
            bought, made = (prompt * per_input + response * out) / (prompt + response), cost / most * 1e6
            even = cost / bought * 1e6 if bought else math.inf
            margin = (bought - made) / made
            break_even = {
                "bought_per_million": bought, "made_per_million": made, "devices_per_day": cost,
                "devices_tokens_per_day": most, "tokens_per_day": even if even <= most else None,
                "utilisation": even / most if even <= most else None,
            }  # fmt: skip
    if traffic:
        earned = (revenue - cost) / cost if revenue is not None and cost else None
        day = {"input_tokens": read, "output_tokens": written, "cost": cost, "revenue": revenue, "margin": earned,
               "devices_needed": needed, "utilisation": needed / count}  # fmt: skip

    decoded = written / response * sum(decode_parts(config, context, response).values())
    prefilled = read / prompt * sum(prefill_parts(config, prompt, prompt * hit_share).values())
    decoding_share = written * writing / (written * writing + read / prompt * reading)
    memory, step = copy.memory(batch, context), copy.decode_step(batch, context)
    cached = f"{show_share(hit_share)} of the tokens cached"
    lines = [
        hire.line("decoding", count * 24 * decoding_share, written, decoded),
        hire.line("reading prompts", count * 24 * (1 - decoding_share), read, prefilled, cached),
    ]

    def there(other: Hire) -> tuple[float, bool]:
        reads = mfu if other.precision == chosen else other.precision.mfu
        found = best(ModelCopy(config, other.device, other.precision, 1, asked.efficiency), None, reads, traffic)
        return 24 * many * found.taken(traffic), bool(found.batch)

    fit = None if memory.total <= hire.device.usable_bytes else copy.smallest(context)
    spread = f"a copy on {plural(fit.devices, 'device')}" if fit else ""
    choice = "needs the fewest devices in all" if whole else "writes most in time"
    return hire.plan(
        asked, memory, lines, there, own_fits=in_time > 0,
        nearest_fit={"device": fit.device.name, "count": fit.devices, "layout": spread} if fit else None,
        flops=decoded + prefilled, flops_by_part={"decoding": decoded, "reading prompts": prefilled},
        dominates=step.dominates(f"a decoding step of {batch} sequences a device"),
        assumptions=hire.assumed(
            asked, prompt + response, devices=copy.devices, context=context,
            choice="" if asked.devices_per_copy else f", the power of two that {choice}", mfu=show_share(mfu),
            latents="" if config.family == "dense" else "; their latents are expanded anew",
            late=None if in_time else asked.latency,
            load="the day's traffic comes evenly; no peaks" if traffic else "the devices run at full load all day",
        ),
        prompt=prompt, response=response, hit_share=hit_share, latency=asked.latency, devices_per_copy=copy.devices,
        batch=batch, tokens_per_second_per_device=1 / writing, bound_tokens_per_second_per_device=batch / max(step),
        tokens_per_second_per_user=1 / writing / batch, prompt_tokens_per_second_per_device=prompt / reading,
        output_cost_per_million=money(1e6 * writing), prompt_cost_per_million=money(1e6 * reading / prompt),
        curve=_curve(copy, batch, context, asked.latency), prices=asked.prices, margin=margin, day=day,
        break_even=break_even,
    )  # fmt: skip


def _curve(copy: ModelCopy, batch: int, context: float, latency: float) -> list[dict[str, Any]]:
    """Batches in powers of two, and the chosen one, up to the first that has no room or comes too late."""
    found: list[dict[str, Any]] = []
    for point in sorted({2**power for power in range(15)} | {batch}):
        times, step = copy.decode_step(point, context), copy.step_seconds(point, context)
        found.append({
            "batch": point, "tokens_per_second_per_device": point / step, "tokens_per_second_per_user": 1 / step,
            "bound_tokens_per_second_per_device": point / max(times), "step_seconds": step,
            "bytes_per_token": copy.bytes_read(point, context) / point, "dominant": times.ranked[0][0],
            "fits": point <= copy.largest_batch(context), "within_latency": step <= latency,
        })  # fmt: skip
        if not (found[-1]["fits"] and found[-1]["within_latency"]):
            break
    return found


def _carrying(count: int | None, served: _Server) -> int:
    """How many devices carry the day's traffic. SlingshotError with the nearest number where `count` does not."""
    device, enough = served.copy.device, served.taken(whole=True)
    most = MOST if device.network else served.copy.devices
    count = count or int(min(enough, most))
    if served.devices > count:
        short = f"no more than {most} can be had, which carry {show_share(most / served.devices)} of it"
        way_out = f"the nearest count that does is {enough:.0f}" if enough <= most else short
        needs = f"do not carry this day's traffic, which needs {served.devices:,.6g}"
        raise SlingshotError(f"{count} x {device.name} {needs}; {way_out}")
    return count
