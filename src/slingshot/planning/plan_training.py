"""What pre-training, reinforcement learning and distillation cost. No torch.

plan_pretrain(PretrainRequest.parse({"model": "deepseek-v3", "device": "h800", "count": 2048, "tokens": "14.8T"}))
"""

from __future__ import annotations

import math

from slingshot.base.errors import SlingshotError
from slingshot.base.files import packaged_toml
from slingshot.base.quantity import show_count, show_share
from slingshot.cost.flops import decode_parts, forward_flops, parameters, prefill_parts, training_parts
from slingshot.machine.machine import describe
from slingshot.model.config import ModelConfig
from slingshot.planning.memory import Precision
from slingshot.planning.model_copy import ModelCopy, ResponseLengths, round_seconds
from slingshot.planning.network import transfers
from slingshot.planning.plan import Hire, Plan, chosen_precision
from slingshot.planning.request import LONGEST, DistillRequest, PretrainRequest, RLRequest
from slingshot.planning.training_run import TrainingRun

BATCH = 4e6  # tokens in an optimizer step where the request does not say
MTP_NOTE = "its FLOPs are not in the rate, its time is in the hours above"


def plan_pretrain(asked: PretrainRequest) -> Plan:
    """The bill of training on so many tokens: `asked.stage` are further lines whose device-hours are known."""
    hire, config, tokens = Hire.of(asked), asked.model.config, asked.tokens
    context = asked.context or min(4096, config.max_position_embeddings)
    if not 2 <= context <= LONGEST:
        nearest = min(max(2, context), LONGEST)
        raise SlingshotError(f"--context {context}: from 2 to {LONGEST} tokens; the nearest valid value is {nearest}")
    if tokens < context:
        few = f"fewer than one sequence of {context}"
        raise SlingshotError(f"--tokens {tokens:g}: {few}; the nearest valid value is {context}")
    batch, batch_note = _batch(asked.batch, tokens, context, hire.count)
    run = TrainingRun(asked, hire, context, batch, context, tokens)
    mtp, flops = training_parts(config, [context])["mtp"] * tokens / context, sum(run.parts.values())
    rate, layout, memory, computed, given = run.rate, run.layout, run.memory, run.hours, sum(asked.stage.values())
    times = run.times(layout, memory)
    bubble = (layout.pp - 1) / (run.microbatches(layout) + layout.pp - 1)  # a stage stands idle under 1F1B
    shortest = max(times.compute / (1 - bubble), times.memory_traffic, times.network)
    bound = flops / tokens * batch / hire.count / shortest if shortest < math.inf else 0.0
    lines = [hire.line("pre-training", computed, tokens, flops, _published(asked, computed))]
    if mtp:
        lines.append(hire.line("of it the MTP module", 0.0, tokens, mtp, MTP_NOTE))
    lines += [hire.line(name, known, note="hours given, not computed") for name, known in asked.stage.items()]
    assumptions = hire.assumed(
        asked, context, rate=rate, batch=batch_note, context=context, layout=layout, bytes=hire.precision,
        chosen="" if asked.ways else "; chosen as the fastest that fits", mtp=mtp or None,
        bound=bound / 1e12 if rate.per_device > bound else None, given=given or None,
    )  # fmt: skip
    return hire.plan(
        asked, memory, lines, lambda other: run.elsewhere(other, computed, lambda _: given), **run.fields(),
        flops=flops, flops_by_part=run.parts | ({"mtp": mtp} if mtp else {}), assumptions=assumptions,
        dominates=times.dominates(f"an optimizer step of {show_count(batch)} tokens"),
        tokens=tokens, context=context, batch_tokens=batch, optimizer_steps=tokens / batch,
        tokens_per_day=tokens * hire.count * 24 / computed, six_nd_flops=6.0 * parameters(config).active * tokens,
        mfu_of_bfloat16=rate.per_device / hire.device.peak["bfloat16"] if "bfloat16" in hire.device.peak else None,
        tflops_bound=bound / 1e12, layout=layout, bubble=bubble,
        transfers=transfers(run.blocks, layout, hire.device, batch, context),
    )  # fmt: skip


def _published(asked: PretrainRequest, hours: float) -> str:
    """What was published of training this preset on these devices with as many tokens, a percent more or less."""
    name = asked.model.name
    bill = packaged_toml("slingshot.planning", "published.toml").get(name)
    if not bill or asked.device.name != bill["device"] or abs(asked.tokens / bill["tokens"] - 1) > 0.01:
        return ""
    beside = f"published are {bill['hours']:,.0f} hours ({bill['source']}), these are {hours / bill['hours'] - 1:+.1%}"
    return beside if asked.model.config == ModelConfig.preset(name) else ""


def plan_rl(asked: RLRequest) -> Plan:
    """The bill of GRPO: rollouts, then their verification, then the update, one after the other on the same devices."""
    hire, config, prompt, response = Hire.of(asked), asked.model.config, asked.prompt, asked.response
    if response >= asked.longest:
        short = f"needs a longer cap than {asked.longest:g}; one of {2 * response:g} is usual"
        raise SlingshotError(f"a mean response of {response:g} tokens {short}")
    responses = asked.steps * asked.prompts * asked.group
    at_once = min(asked.rollout or asked.prompts * asked.group, responses)
    workers = asked.verify_workers or (describe().cores if hire.device.name == "local" else 16 * hire.count)
    full, last = divmod(responses, at_once)
    rounds, lengths = full + (last > 0), ResponseLengths(response, asked.longest)

    def sampling(hire: Hire, given: int | None = None) -> tuple[float, ModelCopy]:
        """Device-hours of all rounds on the copies that end them first, devices that make up no copy standing idle."""

        def hours(copy: ModelCopy) -> float:
            each = [round_seconds(copy, some, hire.count // copy.devices, prompt, lengths) for some in (at_once, last)]
            return (full * each[0] + each[1]) * hire.count / 3600

        one = ModelCopy(config, hire.device, hire.precision, efficiency=asked.efficiency)
        copies = one.roomy(hire.count, given, prompt + response)
        return min(((hours(copy), copy) for copy in copies), key=lambda found: found[0])

    sampled, copy = sampling(hire, asked.devices_per_copy)
    copies = hire.count // copy.devices
    # A group reads its prompt once, of which each response's first token comes. Step i of n - 1 then meets the prompt
    # and i more: E[n (n - 1)] / 2 E[n - 1] in the mean over all.
    met = prompt + (lengths.square - response) / 2 / max(1.0, response - 1)
    decoding = responses * sum(decode_parts(config, met, max(0.0, response - 1)).values())
    decoding += asked.steps * asked.prompts * sum(prefill_parts(config, prompt).values())
    # Trained are rows of a prompt, which stands once, and of all responses of its group, each with the prompt's last
    # ids for itself (training/policy.py).
    own = min(prompt, 2.0 if config.num_nextn_predict_layers else 1.0)
    shared, each = prompt - own, response + own
    tokens = responses * (shared / asked.group + each)
    square = lengths.square + 2 * own * response + own**2  # E[each^2]
    pairs = responses * ((shared + 1) * shared / 2 / asked.group + each * shared + (square + each) / 2)
    longer = max(2, round(2 * pairs / tokens - 1))  # documents that have as many pairs a token
    length = max(2, round(tokens / responses))
    batch_tokens = max(asked.prompts * asked.group, hire.count) * float(length)
    run = TrainingRun(asked, hire, length, batch_tokens, longer, tokens)
    at = (tokens - responses) / (longer - 1)  # the module does not run at a last position
    mtp = training_parts(config, [longer], adapters=asked.adapters and asked.adapters.passed)["mtp"] * at
    train, other_passes = sum(run.parts.values()), asked.forwards * forward_flops(config, [longer]) * tokens / longer
    batch = min(at_once / hire.count, copy.largest_batch(prompt + response))
    step = copy.decode_step(batch, prompt + response / 2)
    memory = max(run.memory, copy.memory(batch, prompt + response), key=lambda held: held.total)
    # A response waits for those before it on its core.
    waits = full * math.ceil(at_once / workers) + math.ceil(last / workers)
    verifying = waits * asked.verify_seconds * hire.count / 3600
    updating = train + other_passes
    which = f"{rounds:,} rounds of {at_once:,} responses{f', the last of {last:,}' if last else ''}"
    on_cores = f"{workers:,} cores, {asked.verify_seconds:g} s a response"
    lines = [
        hire.line("rollouts", sampled, responses * response, decoding, which),
        hire.line("verification", verifying, note=on_cores),
        hire.line("update", updating / run.rate.per_device / 3600, tokens, updating),
    ]
    if mtp:
        lines.append(hire.line("of it the MTP module", 0.0, tokens, mtp, MTP_NOTE))
    return hire.plan(
        asked, memory, lines,
        lambda other: run.elsewhere(other, lines[2].device_hours, lambda other: sampling(other)[0] + verifying),
        **run.fields(), flops=decoding + updating,
        flops_by_part={"rollouts": decoding, "training": train, "other forward passes": other_passes}
        | ({"mtp": mtp} if mtp else {}),
        dominates=step.dominates(f"a decoding step of {batch:.3g} sequences a device"),
        assumptions=hire.assumed(
            asked, prompt + asked.longest, rate=run.rate, cores=on_cores, layout=run.layout,
            copies=_copies(copies, asked.devices_per_copy, "policy", copy), adapters=asked.adapters,
        ),
        steps=asked.steps, responses=responses, rounds=rounds, tokens=tokens, devices_per_copy=copy.devices,
        round_seconds=round_seconds(copy, at_once, copies, prompt, lengths),
    )  # fmt: skip


def plan_distill(asked: DistillRequest) -> Plan:
    """The bill of sampling until `samples` responses of the teacher are kept, and of training the model on them."""
    hire, teacher = Hire.of(asked), asked.teacher.config
    prompt, response = asked.prompt, asked.response
    sampled, context = asked.samples / asked.accepted, prompt + response / 2

    def sampling(hire: Hire, precision: Precision, given: int | None = None) -> tuple[float, float, ModelCopy]:
        """Device-hours of the copies that write fastest, sequences a device of each, and one of them."""

        def hours(copy: ModelCopy) -> tuple[float, float, ModelCopy]:
            used = copy.devices * (hire.count // copy.devices)  # devices that make up no copy stand idle
            batch = min(copy.largest_batch(context), max(1.0, sampled / used))
            reading = copy.prefill_seconds(prompt, 0.0, precision.mfu)
            seconds = sampled * (response * copy.step_seconds(batch, context) / batch + reading)
            return seconds / 3600 * hire.count / used, batch, copy

        one = ModelCopy(teacher, hire.device, precision, efficiency=asked.efficiency)
        return min((hours(copy) for copy in one.roomy(hire.count, given, context)), key=lambda found: found[0])

    of_teacher = chosen_precision(teacher, hire.device, asked.teacher_precision, served=True)
    sampling_hours, batch, copy = sampling(hire, of_teacher, asked.devices_per_copy)
    each = *prefill_parts(teacher, prompt).values(), *decode_parts(teacher, context, response).values()
    writing = sampled * sum(each)
    length = max(2, round(prompt + response))
    tokens = asked.epochs * asked.samples * (prompt + response)
    run = TrainingRun(asked, hire, length, max(64, hire.count) * float(length), length, tokens)
    learning = sum(run.parts.values())
    memory = max(run.memory, copy.memory(batch, context), key=lambda held: held.total)
    kept = f"{show_count(sampled)} responses, {show_count(asked.samples)} kept"
    lines = [
        hire.line("the teacher samples", sampling_hours, sampled * response, writing, kept),
        hire.line("the student trains", run.hours, tokens, learning, f"{asked.epochs:g} epochs"),
    ]

    def more(other: Hire) -> float:
        here = of_teacher.dtype in other.device.peak
        return sampling(other, of_teacher if here else chosen_precision(teacher, other.device, None, served=True))[0]

    return hire.plan(
        asked, memory, lines, lambda other: run.elsewhere(other, run.hours, more), **run.fields(),
        flops=writing + learning, flops_by_part={"sampling": writing, "training": learning},
        dominates=copy.decode_step(batch, context).dominates(
            f"a decoding step of the teacher, {batch:.3g} sequences a device"
        ),
        assumptions=hire.assumed(
            asked, 0.0, rate=run.rate, dtype=of_teacher.dtype, layout=run.layout, adapters=asked.adapters,
            copies=_copies(hire.count // copy.devices, asked.devices_per_copy, "teacher", copy),
            mfu=show_share(of_teacher.mfu),
        ),
        teacher=asked.teacher.name, sampled=sampled, kept=asked.samples, devices_per_copy=copy.devices,
        sampled_tokens_per_second_per_device=batch / copy.step_seconds(batch, context),
    )  # fmt: skip


def _copies(copies: int, given: int | None, of: str, copy: ModelCopy) -> str:
    chosen = "" if given else " (the power of two that is fastest)"
    return f"{copies} {'copy' if copies == 1 else 'copies'} of the {of} on {copy.devices} devices each{chosen}"


def _batch(batch: float | None, tokens: float, context: int, count: int) -> tuple[float, str]:
    """Tokens in an optimizer step, and the line that says so."""
    if batch is not None:
        if context <= batch <= tokens:
            return batch, f"{show_count(batch)} tokens in an optimizer step, as given"
        nearest = f"the nearest valid value is {min(max(batch, context), tokens):g}"
        raise SlingshotError(f"--batch {batch:g} tokens: from one sequence of {context} to the whole run; {nearest}")
    wanted, all_there_are = max(round(min(BATCH, tokens / 1000) / context), count), int(tokens // context)
    sequences = min(wanted, all_there_are)
    why = "at least a sequence a device" if wanted <= all_there_are else "the whole run has no more whole sequences"
    return sequences * float(context), f"{show_count(sequences * context)} tokens in an optimizer step, assumed; {why}"
