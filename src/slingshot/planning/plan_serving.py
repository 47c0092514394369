"""What serving costs: tokens a second under a latency, cost per million, margin, make or buy. No torch.

plan_serve(ServeRequest.parse({"model": "deepseek-v3", "device": "h800", "prompt": 4383, "response": 1210}))
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from slingshot.base.errors import SlingshotError
from slingshot.base.quantity import show_share
from slingshot.cost.devices import Device
from slingshot.cost.flops import decode_parts, prefill_parts
from slingshot.planning.memory import Precision
from slingshot.planning.model_copy import ModelCopy, checked_size, copies_of, smallest_copy
from slingshot.planning.network import LINK_EFFICIENCY
from slingshot.planning.plan import HOURS, MOST, Hire, Plan, beyond, dominates
from slingshot.planning.plan_training import DECODING
from slingshot.planning.request import ServeRequest
from slingshot.planning.training_run import ASSUMED_MFU

HIT_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
DAY = 86400.0


def plan_serve(asked: ServeRequest) -> Plan:
    """What a day of serving costs: some devices decode, others read prompts, as many of each as keeps both busy.

    A day's traffic (`input`, `output`) is carried by whole copies; without it the devices run at full speed.
    """
    config, prompt, response, hit_share = asked.model.config, asked.prompt, asked.response, asked.hit_share
    hire = Hire.of(asked, asked.count or asked.devices_per_copy)
    chosen, device = hire.precision, hire.device
    mfu = asked.mfu or ASSUMED_MFU[chosen.dtype]
    if (asked.input is None) != (asked.output is None):
        raise SlingshotError("a day's traffic needs both its --input and its --output tokens; give the other one too")
    traffic = asked.input is not None
    # Without a day's traffic: one request, as yet.
    work = _Requests(asked, asked.input or prompt, asked.output or response, whole=traffic)
    sought = work if asked.count is None else replace(work, whole=False)
    if asked.devices_per_copy is not None:
        size = checked_size(config, asked.devices_per_copy, asked.count or asked.devices_per_copy)
        copy = ModelCopy(config, device, chosen, size, asked.efficiency)
    else:
        copy = sought.best_copy(device, chosen, asked.count, mfu)
    context = work.context
    in_time = copy.best_batch(context, asked.latency)
    batch = in_time or 1

    # Seconds of one device: to write a token of a response, and to read a prompt.
    writing, reading = copy.step_seconds(batch, context) / batch, copy.prefill_seconds(prompt, hit_share, mfu)
    per_request, needed = response * writing + reading, work.busy(copy, batch, mfu)
    if traffic:
        hire = Hire.of(asked, _carrying(asked.count, work, copy, batch, mfu))
    else:  # as many requests as the devices can serve
        hire = Hire.of(asked, asked.count or copy.devices)
        work = replace(work, read=prompt * hire.count / needed, written=response * hire.count / needed)
    read, written, count = work.read, work.written, hire.count

    per_second = None if hire.price is None else hire.price / 3600
    cost = None if hire.price is None else count * HOURS * hire.price
    margin, break_even, revenue, day = None, None, None, None
    if asked.prices is not None:
        hit, miss, out = asked.prices
        per_input = hit_share * hit + (1 - hit_share) * miss
        revenue = (read * per_input + written * out) / 1e6
        if per_second and cost:
            tokens = prompt + response
            bought, made = (prompt * per_input + response * out) / tokens, per_request * per_second / tokens * 1e6
            most = count * DAY / per_request * tokens
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
        hire.line("decoding", count * HOURS * decoding_share, written, decoded),
        hire.line("reading prompts", count * HOURS * (1 - decoding_share), read, prefilled, cached),
    ]

    def there(other: Hire) -> tuple[float, bool]:
        reads = mfu if other.precision == chosen else ASSUMED_MFU[other.precision.dtype]
        best = work.best_copy(other.device, other.precision, None, reads)
        held = best.best_batch(context, asked.latency)
        return HOURS * work.devices(best, held or 1, reads), bool(held)

    fit = None if memory.total <= hire.usable else smallest_copy(config, device, chosen, context)
    spread = f"a copy on {fit.devices} device{'' if fit.devices == 1 else 's'}" if fit else ""
    hit_costs = []
    for share in HIT_SHARES if per_second is not None else ():
        seconds = copy.prefill_seconds(prompt, share, mfu)
        blended = 1e6 * (seconds + response * writing) / (prompt + response) * (per_second or 0)
        hit_costs.append({"hit_share": share, "prompt": 1e6 * seconds / prompt * (per_second or 0), "blended": blended})
    choice = f", the power of two that {'needs the fewest devices in all' if sought.whole else 'writes most in time'}"
    latents = "" if config.family == "dense" else "; their latents are expanded anew"
    return hire.plan(
        "serve", asked, memory, lines, there, own_fits=in_time > 0,
        nearest_fit={"device": fit.device.name, "count": fit.devices, "layout": spread} if fit else None,
        flops=decoded + prefilled, flops_by_part={"decoding": decoded, "reading prompts": prefilled},
        dominates=dominates(f"a decoding step of {batch} sequences a device", step),
        assumptions=[
            f"a copy of the model on {copy.devices} devices{'' if asked.devices_per_copy else choice}",
            f"decoding at {asked.efficiency:.0%} {DECODING}",
            f"prompts of {prompt:g} tokens and responses of {response:g} in the mean, so {context:g} cached tokens a "
            "sequence, in 16 bits",
            *beyond(config, prompt + response),
            f"prompts read at {show_share(mfu)} of the peak of their products, on devices of their own",
            f"cached prompt tokens are kept and fetched for nothing{latents}",
            *(["no batch is in time: a token takes longer than asked even for one sequence"] if not in_time else []),
            "experts are chosen evenly, and there is one of each a copy",
            f"links reach {LINK_EFFICIENCY:.0%} of their rate; an all-reduce over several nodes takes the network "
            "links of all its members",
            "the day's traffic comes evenly; no peaks" if traffic else "the devices run at full load all day",
            *hire.notes(),
        ],
        prompt=prompt, response=response, hit_share=hit_share, latency=asked.latency, devices_per_copy=copy.devices,
        batch=batch, tokens_per_second_per_device=1 / writing, bound_tokens_per_second_per_device=batch / step.bound,
        tokens_per_second_per_user=1 / writing / batch, prompt_tokens_per_second_per_device=prompt / reading,
        output_cost_per_million=None if per_second is None else 1e6 * writing * per_second,
        prompt_cost_per_million=None if per_second is None else 1e6 * reading / prompt * per_second,
        curve=_curve(copy, batch, context, asked.latency), cost_by_hit_share=hit_costs,
        prices=asked.prices, margin=margin, break_even=break_even, day=day,
    )  # fmt: skip


def _curve(copy: ModelCopy, batch: int, context: float, latency: float) -> list[dict[str, Any]]:
    """Batches in powers of two, and the chosen one, up to the first that has no room or comes too late."""
    found: list[dict[str, Any]] = []
    for point in sorted({2**power for power in range(15)} | {batch}):
        times, step = copy.decode_step(point, context), copy.step_seconds(point, context)
        found.append({
            "batch": point, "tokens_per_second_per_device": point / step, "tokens_per_second_per_user": 1 / step,
            "bound_tokens_per_second_per_device": point / times.bound, "step_seconds": step,
            "bytes_per_token": copy.bytes_read(point, context) / point, "dominant": times.ranked[0][0],
            "fits": point <= copy.largest_batch(context), "within_latency": step <= latency,
        })  # fmt: skip
        if not (found[-1]["fits"] and found[-1]["within_latency"]):
            break
    return found


@dataclass(frozen=True)
class _Requests:
    """A day's requests, with the tokens of all of them that are read and written.

    whole   whether they are carried by whole copies of the model, rather than by as much of one as they keep busy
    """

    asked: ServeRequest
    read: float
    written: float
    whole: bool

    @property
    def context(self) -> float:
        """Tokens a sequence has cached while it is decoded, in the mean."""
        return self.asked.prompt + self.asked.response / 2

    def busy(self, copy: ModelCopy, batch: int, mfu: float) -> float:
        """Devices it keeps busy all day: decoding in such batches, and reading prompts."""
        writing = self.written * copy.step_seconds(batch, self.context) / batch
        prompts = self.read / self.asked.prompt
        return (writing + prompts * copy.prefill_seconds(self.asked.prompt, self.asked.hit_share, mfu)) / DAY

    def devices(self, copy: ModelCopy, batch: int, mfu: float) -> float:
        """Devices it takes."""
        busy = self.busy(copy, batch, mfu)
        return copy.devices * math.ceil(busy / copy.devices) if self.whole and busy < math.inf else busy

    def best_copy(self, device: Device, precision: Precision, count: int | None, mfu: float) -> ModelCopy:
        """The copy that takes fewest devices in time; where none is in time, the smallest that holds the model."""
        most = count or 256 if device.network else device.per_node
        copies = copies_of(self.asked.model.config, device, precision, most, self.asked.efficiency)
        holding = [copy for copy in copies if copy.largest_batch(self.context) >= 1] or copies[-1:]
        batches = [(copy, copy.best_batch(self.context, self.asked.latency)) for copy in holding]
        in_time = [(copy, batch) for copy, batch in batches if batch]
        return min(in_time, key=lambda pair: self.devices(pair[0], pair[1], mfu))[0] if in_time else holding[0]


def _carrying(count: int | None, work: _Requests, copy: ModelCopy, batch: int, mfu: float) -> int:
    """How many devices carry the day's traffic. SlingshotError with the nearest number where `count` does not."""
    busy, enough = work.busy(copy, batch, mfu), work.devices(copy, batch, mfu)
    most = MOST if copy.device.network else copy.devices
    count = count or int(min(enough, most))
    if busy > count:
        short = f"no more than {most} can be had, which carry {show_share(most / busy)} of it"
        way_out = f"the nearest count that does is {enough:.0f}" if enough <= most else short
        needs = f"do not carry this day's traffic, which needs {busy:,.6g}"
        raise SlingshotError(f"{count} x {copy.device.name} {needs}; {way_out}")
    return count
